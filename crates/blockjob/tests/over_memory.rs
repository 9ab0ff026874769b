// SPDX-License-Identifier: MIT OR Apache-2.0
//! Comparing, mapping and benching over disks in memory: what is found is what was put there.

use blockcore::testing::MemoryDriver;
use blockcore::{Backend, NodeFlags};
use blockjob::{Bench, Direction, Extents, Job, Outcome, compare};

async fn disk(bytes: Vec<u8>) -> (Backend, MemoryDriver) {
    let memory = MemoryDriver::new(bytes);
    let node = memory.clone().into_node(NodeFlags::default()).await;
    (Backend::new(node.expect("opens"), false), memory)
}

#[tokio::test]
async fn the_first_sector_that_differs_is_named() {
    let mut bytes = vec![1u8; 3 << 20];
    let (first, _) = disk(bytes.clone()).await;
    bytes[(2 << 20) + 1000] = 2;
    let (second, _) = disk(bytes).await;
    let job = Job::new();
    let found = compare(&first, &second, false, &job, || ())
        .await
        .expect("reads");
    assert_eq!(found, Outcome::ContentDiffers((2 << 20) + 512));
    let found = compare(&first, &first, true, &job, || ())
        .await
        .expect("reads");
    assert_eq!(found, Outcome::Identical);
    assert_eq!(job.progress().done, 3 << 20);
}

#[tokio::test]
async fn a_longer_disk_is_equal_only_with_zeroes_behind_the_end() {
    let (short, _) = disk(vec![1; 4096]).await;
    let mut bytes = vec![1; 4096];
    bytes.resize(10 << 20, 0);
    let (long, memory) = disk(bytes).await;
    let job = Job::new();
    let mut reached_tail = false;
    let on_tail = || reached_tail = true;
    let found = compare(&short, &long, false, &job, on_tail)
        .await
        .expect("reads");
    assert_eq!(found, Outcome::Identical);
    assert!(reached_tail);
    let found = compare(&short, &long, true, &job, || ())
        .await
        .expect("reads");
    assert_eq!(found, Outcome::LengthDiffers);
    memory.lock()[(9 << 20) + 1] = 1;
    let found = compare(&long, &short, false, &job, || ())
        .await
        .expect("reads");
    assert_eq!(found, Outcome::ContentDiffers(9 << 20));
}

#[tokio::test]
async fn extents_are_joined_and_cover_the_range() {
    let mut bytes = vec![0u8; 1 << 20];
    bytes[65536..131072].fill(1);
    let (disk, _) = disk(bytes).await;
    let mut extents = Extents::new(&disk, 1024, u64::MAX);
    let mut seen = Vec::new();
    while let Some(e) = extents.next().await.expect("reads") {
        seen.push((e.start, e.length, e.zero, e.data));
    }
    assert_eq!(
        seen,
        [
            (1024, 64512, true, false),
            (65536, 65536, false, true),
            (131072, 917504, true, false)
        ]
    );
}

#[tokio::test]
async fn bench_writes_where_it_says_and_fails_past_the_end() {
    let (disk, memory) = disk(vec![0; 1 << 20]).await;
    let mut bench = Bench {
        count: 10,
        depth: 3,
        request_bytes: 512,
        offset: 4096,
        step: 1024,
        direction: Direction::Write {
            pattern: 7,
            flush_interval: 4,
            drain_on_flush: true,
        },
    };
    for drain_on_flush in [true, false] {
        memory.lock().fill(0);
        bench.direction = Direction::Write {
            pattern: 7,
            flush_interval: 4,
            drain_on_flush,
        };
        bench.run(&disk, &Job::new()).await.expect("writes");
        for (i, sector) in memory.snapshot().chunks(512).enumerate() {
            let written = (8..28).contains(&i) && i % 2 == 0;
            assert!(sector.iter().all(|&b| b == if written { 7 } else { 0 }));
        }
    }
    bench.direction = Direction::Read;
    bench.run(&disk, &Job::new()).await.expect("reads");
    bench.offset = 1 << 20;
    let failed = bench.run(&disk, &Job::new()).await.unwrap_err();
    assert_eq!(failed.to_string(), "Failed request: Input/output error");
}
