// SPDX-License-Identifier: MIT OR Apache-2.0
//! How fast reads of 4 KiB get through a backend to a file, for each engine: `engine_bench FILE [SECONDS]`.
//!
//! For comparison: `qemu-img bench -f raw -t none -i io_uring -d 32 -s 4096 -c 100000 FILE`.

use std::time::{Duration, Instant};

use blockcore::{Backend, OpenOptions, Registry};
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
    while running || !flights.is_empty() {
        while running && flights.len() < depth {
            flights.push(disk.read(next % blocks * BLOCK_BYTES as u64, BLOCK_BYTES));
            next += 1;
        }
        if let Some(read) = flights.next().await {
            read?;
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
                while start.elapsed() < time {
                    let at = next % blocks * BLOCK_BYTES as u64;
                    disk.read(at, BLOCK_BYTES).await?;
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

fn main() -> blockcore::Result<()> {
    let mut args = std::env::args().skip(1);
    let Some(file) = args.next() else {
        eprintln!("usage: engine_bench FILE [SECONDS]");
        std::process::exit(2);
    };
    let seconds = args.next().and_then(|s| s.parse().ok()).unwrap_or(3);
    let time = Duration::from_secs(seconds);
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
    println!("cache   engine     depth  one task   tasks (2 threads)");
    for (direct, aio, reactor) in [
        (false, None, false),
        (true, Some("threads"), false),
        (true, Some("io_uring"), false),
        (true, Some("io_uring"), true),
    ] {
        for depth in [1, 32] {
            let one = current()?.block_on(async {
                if reactor {
                    raw::use_this_runtime()?;
                }
                let disk = open(&file, aio, direct).await?;
                let rate = sequential(&disk, depth, time).await?;
                disk.close().await?;
                Ok::<f64, blockcore::BlockError>(rate)
            })?;
            let many = multi()?.block_on(async {
                if reactor {
                    raw::use_this_runtime()?;
                }
                by_tasks(open(&file, aio, direct).await?, depth, time).await
            })?;
            let cache = if direct { "none" } else { "cached" };
            let engine = if reactor {
                "reactor"
            } else {
                aio.unwrap_or("auto")
            };
            println!("{cache:7} {engine:10} {depth:5} {one:9.0}   {many:9.0}");
        }
    }
    Ok(())
}
