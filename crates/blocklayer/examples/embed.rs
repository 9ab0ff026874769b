// SPDX-License-Identifier: MIT OR Apache-2.0
//! An embedding program: makes a backing chain, opens it, keeps 32 requests in flight on a multi-thread runtime, drops some of them half way, flushes
//! and closes. It counts the polls that put their thread to sleep: no executor thread ever waits for the disk.
//!
//! `cargo run --release -p blocklayer --example embed [DIRECTORY]`

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blocklayer::{Backend, IoBuf, OpenOptions, OpenPolicy, Options, Result, WriteFlags, registry};

const IN_FLIGHT: usize = 32;
const ROUNDS: u64 = 64;
const DISK_BYTES: u64 = 64 << 20;
const REQUEST_BYTES: u64 = 16 << 10;

/// Polls of the program's tasks, and how many of them slept: a thread that waits for the disk gives up the processor of its own accord.
static POLLS: AtomicU64 = AtomicU64::new(0);
static SLEPT: AtomicU64 = AtomicU64::new(0);

/// How often the kernel has put this thread to sleep because it waited for something.
fn sleeps() -> u64 {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"));
    line.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

/// Runs a future and notes whether its polls slept.
async fn watched<T>(work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    poll_fn(|cx| {
        let before = sleeps();
        let polled = work.as_mut().poll(cx);
        SLEPT.fetch_add(u64::from(sleeps() != before), Ordering::Relaxed);
        POLLS.fetch_add(1, Ordering::Relaxed);
        polled
    })
    .await
}

async fn make_chain(dir: &std::path::Path) -> Result<String> {
    let path = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let registry = registry();
    let size = DISK_BYTES.to_string();
    registry
        .create(
            "raw",
            &path("base.raw"),
            Options::new().with("size", size.as_str()),
            Default::default(),
        )
        .await?;
    let overlay = |backing: &str, format: &str| {
        Options::new()
            .with("size", size.as_str())
            .with("backing_file", backing)
            .with("backing_fmt", format)
    };
    registry
        .create(
            "qcow2",
            &path("mid.qcow2"),
            overlay("base.raw", "raw"),
            Default::default(),
        )
        .await?;
    registry
        .create(
            "qcow2",
            &path("top.qcow2"),
            overlay("mid.qcow2", "qcow2"),
            Default::default(),
        )
        .await?;
    Ok(path("top.qcow2"))
}

/// One of the 32: writes, reads back, and now and then gives up half way.
async fn worker(disk: Arc<Backend>, number: u64) -> Result<u64> {
    let mut dropped = 0;
    for round in 0..ROUNDS {
        let offset = (round * IN_FLIGHT as u64 + number) * REQUEST_BYTES;
        let data = IoBuf::from(vec![number as u8 + 1; REQUEST_BYTES as usize]);
        let write = disk.pwritev(offset, data, WriteFlags::empty());
        if round % 8 == 7 {
            // Given up: the library finishes or forgets the write, and nothing else comes to harm.
            if tokio::time::timeout(Duration::from_micros(20), watched(write))
                .await
                .is_err()
            {
                dropped += 1;
                continue;
            }
        } else {
            watched(write).await?;
        }
        let back = watched(disk.read(offset, REQUEST_BYTES as usize)).await?;
        assert_eq!(
            back.to_vec(),
            vec![number as u8 + 1; REQUEST_BYTES as usize]
        );
    }
    Ok(dropped)
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<()> {
    let temp = tempfile::tempdir()?;
    let dir = std::env::args()
        .nth(1)
        .map_or_else(|| temp.path().to_path_buf(), Into::into);
    let top = make_chain(&dir).await?;
    // The images name each other; they may, within this directory.
    let open = OpenOptions::new()
        .format("qcow2")
        .policy(OpenPolicy::Beneath(dir));
    let disk = Arc::new(open.open(&registry(), &top).await?);

    let begun = Instant::now();
    let workers: Vec<_> = (0..IN_FLIGHT as u64)
        .map(|n| tokio::spawn(worker(disk.clone(), n)))
        .collect();
    let mut dropped = 0;
    for worker in workers {
        dropped += worker.await.expect("a worker panicked")?;
    }
    watched(disk.flush()).await?;
    let requests = 2 * ROUNDS * IN_FLIGHT as u64;
    println!(
        "{requests} requests, {IN_FLIGHT} in flight, {dropped} dropped half way, in {:?}",
        begun.elapsed()
    );
    watched(disk.close()).await?;
    let (polls, slept) = (POLLS.load(Ordering::Relaxed), SLEPT.load(Ordering::Relaxed));
    println!("flushed and closed; {slept} of {polls} polls put their thread to sleep");
    Ok(())
}
