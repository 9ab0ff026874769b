// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rule: no executor's thread waits for the disk, whatever engine is at work.
//!
//! Method: a second thread looks again and again at which system call the executor's thread sleeps in, as the kernel tells it. With reads, writes, zero writes and
//! flushes that go to the disk, it must never be one that touches files. To show that the method sees waits, another test makes one, on a pipe.

mod common;

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use blockcore::{IoBuf, OpenOptions, WriteFlags};
use common::Disk;
use futures::future::try_join_all;

const FILE_CALLS: [libc::c_long; 16] = [
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_openat,
    libc::SYS_fstat,
    libc::SYS_copy_file_range,
];

/// Counts how often the thread that made it is found asleep in a call that touches files.
struct Watcher {
    stop: Arc<AtomicBool>,
    found: Arc<AtomicU32>,
    thread: std::thread::JoinHandle<()>,
}

impl Watcher {
    /// `None`: the kernel doesn't tell.
    fn of_this_thread() -> Option<Watcher> {
        let link = std::fs::read_link("/proc/thread-self").ok()?;
        let path = std::path::Path::new("/proc").join(link).join("syscall");
        std::fs::read_to_string(&path).ok()?;
        let (stop, found) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU32::new(0)),
        );
        let (stopped, count) = (stop.clone(), found.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let said = std::fs::read_to_string(&path).unwrap_or_default();
                let call = said.split(' ').next().and_then(|nr| nr.parse().ok());
                if call.is_some_and(|nr| FILE_CALLS.contains(&nr)) {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Some(Watcher {
            stop,
            found,
            thread,
        })
    }

    fn found(self) -> u32 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        self.found.load(Ordering::Relaxed)
    }
}

async fn work_on_the_disk(aio: &str, direct: bool) {
    let disk = Disk::create("32M").await;
    let options = OpenOptions::new().option("file.aio", aio).direct(direct);
    let backend = disk.open(options).await;
    let none = WriteFlags::empty();
    for round in 0..8u64 {
        let writes = (0..16u64).map(|i| {
            let data = IoBuf::from(vec![7; 64 << 10]);
            backend.pwritev((round * 16 + i) * (128 << 10), data, none)
        });
        try_join_all(writes).await.unwrap();
        let zeroes = backend.pwrite_zeroes(round << 20, 64 << 10, none);
        zeroes.await.unwrap();
        backend.flush().await.unwrap();
        let reads = (0..64u64).map(|i| backend.read(i * 4096 + (round << 20), 4096));
        try_join_all(reads).await.unwrap();
    }
    backend.close().await.unwrap();
}

#[tokio::test]
async fn the_executor_never_sleeps_in_a_call_that_touches_files() {
    for (aio, direct) in [
        ("threads", false),
        ("threads", true),
        ("io_uring", false),
        ("io_uring", true),
    ] {
        let Some(watcher) = Watcher::of_this_thread() else {
            eprintln!("skipped: the kernel does not tell what threads wait for");
            return;
        };
        work_on_the_disk(aio, direct).await;
        assert_eq!(watcher.found(), 0, "aio {aio} direct {direct}");
    }
}

#[test]
fn the_method_sees_a_thread_that_waits() {
    let Some(watcher) = Watcher::of_this_thread() else {
        eprintln!("skipped: the kernel does not tell what threads wait for");
        return;
    };
    let (mut reader, writer) = std::io::pipe().unwrap();
    let closer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        drop(writer);
    });
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    closer.join().unwrap();
    assert!(watcher.found() > 0);
}
