// SPDX-License-Identifier: MIT OR Apache-2.0
//! How fast reads of 4 KiB get through a backend to a file, and what they cost, for each engine: `engine_bench FILE [SECONDS [ENGINE]]`.
//!
//! For comparison: `qemu-img bench -f raw -t none -i io_uring -d 32 -s 4096 -c 100000 FILE`.

use std::time::{Duration, Instant};

use blockcore::{Backend, IoBufMut, OpenOptions, ReadFlags, Registry};
use futures::stream::{FuturesUnordered, StreamExt};

const BLOCK_BYTES: usize = 4096;

async fn open(file: &str, aio: Option<&str>, direct: bool) -> blockcore::Result<Backend> {
    let mut registry = Registry::new();
    registry.register(raw::FileFactory);
    registry.register(raw::HostDeviceFactory);
    registry.register(raw::RawFactory);
    let mut options = OpenOptions::new()
        .format("raw")
        .read_only(true)
        .direct(direct);
    if let Some(aio) = aio {
        options = options.option("file.aio", aio);
    }
    options.open(&registry, file).await
}

/// Reads block after block, `depth` at a time; returns reads per second.
async fn sequential(disk: &Backend, depth: usize, time: Duration) -> blockcore::Result<f64> {
    let blocks = disk.length() / BLOCK_BYTES as u64;
    let start = Instant::now();
    let mut flights = FuturesUnordered::new();
    let mut reads = 0u64;
    let mut next = 0;
    let mut running = true;
    let mut buffers: Vec<_> = (0..depth).map(|_| IoBufMut::zeroed(BLOCK_BYTES)).collect();
    while running || !flights.is_empty() {
        while running && let Some(buf) = buffers.pop() {
            let at = next % blocks * BLOCK_BYTES as u64;
            flights.push(disk.preadv(at, buf, ReadFlags::empty()));
            next += 1;
        }
        if let Some(read) = flights.next().await {
            buffers.push(read?);
            reads += 1;
        }
        if reads.is_multiple_of(64) {
            running = start.elapsed() < time;
        }
    }
    Ok(reads as f64 / start.elapsed().as_secs_f64())
}

/// The same with a task for each of the `depth` readers.
async fn by_tasks(disk: Backend, depth: usize, time: Duration) -> blockcore::Result<f64> {
    let disk = std::sync::Arc::new(disk);
    let start = Instant::now();
    let tasks: Vec<_> = (0..depth as u64)
        .map(|i| {
            let disk = disk.clone();
            tokio::spawn(async move {
                let blocks = disk.length() / BLOCK_BYTES as u64;
                let mut reads = 0u64;
                let mut next = i;
                let mut buf = IoBufMut::zeroed(BLOCK_BYTES);
                while start.elapsed() < time {
                    let at = next % blocks * BLOCK_BYTES as u64;
                    buf = disk.preadv(at, buf, ReadFlags::empty()).await?;
                    next += depth as u64;
                    reads += 1;
                }
                Ok::<u64, blockcore::BlockError>(reads)
            })
        })
        .collect();
    let mut reads = 0;
    for task in tasks {
        reads += task.await.map_err(std::io::Error::other)??;
    }
    Ok(reads as f64 / start.elapsed().as_secs_f64())
}

/// The processor time of this process so far, in seconds (from `/proc/self/stat`, which counts hundredths).
fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
    let ticks: f64 = fields
        .skip(11)
        .take(2)
        .filter_map(|ticks| ticks.parse::<f64>().ok())
        .sum();
    ticks / 100.0
}

fn main() -> blockcore::Result<()> {
    let mut args = std::env::args().skip(1);
    let Some(file) = args.next() else {
        eprintln!("usage: engine_bench FILE [SECONDS [ENGINE]]");
        std::process::exit(2);
    };
    let seconds = args.next().and_then(|s| s.parse().ok()).unwrap_or(3);
    let time = Duration::from_secs(seconds);
    let only = args.next();
    let current = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
    };
    let multi = || {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
    };
    println!(
        "                          one task              tasks (2 threads)\ncache   engine     depth  reads/s   us/read     reads/s   us/read"
    );
    for (direct, aio, reactor) in [
        (false, None, false),
        (true, Some("threads"), false),
        (true, Some("io_uring"), false),
        (true, Some("io_uring"), true),
    ] {
        let engine = if reactor {
            "reactor"
        } else {
            aio.unwrap_or("auto")
        };
        if only.as_deref().is_some_and(|only| only != engine) {
            continue;
        }
        for depth in [1, 32] {
            let cpu_before = processor_seconds();
            let one = current()?.block_on(async {
                if reactor {
                    raw::use_this_runtime()?;
                }
                let disk = open(&file, aio, direct).await?;
                let rate = sequential(&disk, depth, time).await?;
                disk.close().await?;
                Ok::<f64, blockcore::BlockError>(rate)
            })?;
            let cpu_between = processor_seconds();
            let many = multi()?.block_on(async {
                if reactor {
                    raw::use_this_runtime()?;
                }
                by_tasks(open(&file, aio, direct).await?, depth, time).await
            })?;
            let cache = if direct { "none" } else { "cached" };
            let cost = |cpu: f64, rate: f64| cpu / (rate * time.as_secs_f64()) * 1e6;
            let one_cost = cost(cpu_between - cpu_before, one);
            let many_cost = cost(processor_seconds() - cpu_between, many);
            println!(
                "{cache:7} {engine:10} {depth:5} {one:8.0} {one_cost:9.1}    {many:8.0} {many_cost:9.1}"
            );
        }
    }
    Ok(())
}
