// SPDX-License-Identifier: MIT OR Apache-2.0
//! Futures that are polled once and then left alone, runtimes that end in the middle, and threads that must not wait.

use std::collections::BTreeSet;
use std::time::Duration;

use blockcore::testing::fault::{Event, Rule};
use blockcore::testing::{CrashDriver, DelayDriver, FaultDriver, Polls};
use blockcore::{IoBufMut, NodeFlags, Result, SnapshotRequest, SnapshotSelector, WriteFlags};
use futures::FutureExt;

use super::{Shape, findings, fresh_image, open_on, open_over, open_with_faults, read_all, write};

const CLUSTER: u64 = 4096;
/// Clusters that one L2 table maps.
const TABLE: u64 = 512 * CLUSTER;

async fn in_time<T>(what: &str, request: impl Future<Output = Result<T>>) -> T {
    let done = tokio::time::timeout(Duration::from_secs(5), request).await;
    done.unwrap_or_else(|_| panic!("{what} hangs")).unwrap()
}

/// An image with data in its first table, opened anew, so that nothing is cached.
async fn with_cold_cache() -> CrashDriver {
    let disk = CrashDriver::new(fresh_image(Shape::small(4 * TABLE)));
    let (node, _image) = open_on(disk.clone(), None).await;
    write(&node, 0, 4096, 1).await.unwrap();
    node.flush().await.unwrap();
    CrashDriver::new(disk.snapshot())
}

// INV REQ-PARK-1: a read that waits for its L2 table and is never polled again holds up nobody.
#[tokio::test]
async fn a_parked_read_holds_up_nobody() {
    let (node, _image, _faults) = open_with_faults(with_cold_cache().await).await;
    let mut read = Box::pin(node.preadv(0, IoBufMut::zeroed(4096), Default::default()));
    assert!(read.as_mut().now_or_never().is_none());
    in_time("a discard", node.pdiscard(2 * CLUSTER, CLUSTER)).await;
    in_time("a write", write(&node, 2 * CLUSTER, 512, 2)).await;
    in_time("a write elsewhere", write(&node, 2 * TABLE, 512, 3)).await;
    in_time("a flush", node.flush()).await;
    assert_eq!(read.await.unwrap().to_vec(), vec![1; 4096]);
}

// INV REQ-PARK-1: nor does a write in place to a part of a block of the file, which holds metadata besides, or reaches behind the end of the file.
#[tokio::test]
async fn a_parked_write_to_a_part_of_a_block_holds_up_nobody() {
    let small = Shape {
        cluster_bits: 9,
        ..Shape::small(1 << 20)
    };
    for shape in [small, Shape::extended(1 << 20)] {
        let disk = CrashDriver::new(fresh_image(shape));
        let (node, _image) = open_on(disk.clone(), None).await;
        write(&node, 0, 512, 1).await.unwrap();
        node.flush().await.unwrap();
        let file = FaultDriver::new(Box::new(disk)).aligned_to(4096);
        let file = file.into_node(NodeFlags::default()).await.unwrap();
        let (node, _image) = open_over(file, None).await.unwrap();
        let mut parked = Box::pin(write(&node, 0, 512, 3));
        assert!(parked.as_mut().now_or_never().is_none());
        in_time("a write elsewhere", write(&node, 1 << 16, 512, 3)).await;
        in_time("a flush", node.flush()).await;
        parked.await.unwrap();
        let all = read_all(&node).await;
        assert!(all[..512] == [3; 512] && all[512..1024] == [0; 512]);
    }
}

// INV REQ-PARK-1: nor does a write in place that reaches behind the end of the file, which a commit makes longer. (A cluster that we have made lies in the file as a whole.)
#[tokio::test]
async fn a_parked_write_behind_the_end_of_the_file_holds_up_nobody() {
    let disk = CrashDriver::new(fresh_image(Shape::small(4 * TABLE)));
    let (node, _image) = open_on(disk.clone(), None).await;
    write(&node, 0, 512, 1).await.unwrap();
    node.driver().close().await.unwrap();
    let mut bytes = disk.snapshot();
    bytes.truncate(bytes.iter().rposition(|b| *b == 1).unwrap() + 1);
    let (node, _image) = open_on(CrashDriver::new(bytes), None).await;
    let mut parked = Box::pin(write(&node, 1024, 512, 3));
    assert!(parked.as_mut().now_or_never().is_none());
    in_time("a write elsewhere", write(&node, 2 * TABLE, 512, 3)).await;
    in_time("a flush", node.flush()).await;
    parked.await.unwrap();
    assert_eq!(read_all(&node).await[1024], 3);
}

// INV QCOW2-ORD-5: what a commit had taken when its runtime ended is written by the next one.
#[test]
fn a_commit_whose_runtime_ends_loses_nothing() {
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    };
    for yields in 0..40 {
        let (first, second) = (runtime(), runtime());
        let disk = CrashDriver::new(fresh_image(Shape::small(4 * TABLE)));
        let node = first.block_on(async {
            let (node, image) = open_on(disk.clone(), None).await;
            write(&node, 0, 4096, 5).await.unwrap();
            write(&node, TABLE, 512, 6).await.unwrap();
            tokio::spawn(async move { image.commit().await });
            for _ in 0..yields {
                tokio::task::yield_now().await;
            }
            node
        });
        drop(first);
        second.block_on(async {
            in_time("a flush", node.flush()).await;
            let (again, _image) = open_on(CrashDriver::new(disk.snapshot()), None).await;
            let all = read_all(&again).await;
            assert_eq!(
                (all[0], all[TABLE as usize]),
                (5, 6),
                "after {yields} turns"
            );
            in_time("closing", node.driver().close()).await;
            assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
        });
    }
}

// INV REQ-DROP-1: a flush waits for a write that nobody waits for any more.
#[tokio::test]
async fn a_flush_waits_for_dropped_writes() {
    let disk = CrashDriver::new(fresh_image(Shape::small(4 * TABLE)));
    let (node, _image, faults) = open_with_faults(disk.clone()).await;
    write(&node, 2 * CLUSTER, 4096, 9).await.unwrap();
    node.flush().await.unwrap();
    faults.add(Rule::slow(Event::Write, 200).starting_with(1));
    let dropped = {
        let node = node.clone();
        tokio::spawn(async move { write(&node, 0, 4096, 1).await })
    };
    for _ in 0..5 {
        tokio::task::yield_now().await;
    }
    dropped.abort();
    let _ = dropped.await;
    node.flush().await.unwrap();
    let (left, _image) = open_on(CrashDriver::new(disk.snapshot()), None).await;
    assert_eq!(read_all(&left).await[0], read_all(&node).await[0]);
}

// A disk that takes milliseconds: whatever a request has to wait for, it gives its thread to others meanwhile. Every run is the same, so a poll that waits does so in
// all of them; what sleeps in one run alone has met another test's thread at a lock of the process.
#[tokio::test(start_paused = true)]
async fn no_poll_waits_for_a_slow_disk() {
    let (count, mut slept) = polls_of_a_slow_disk().await;
    for _ in 0..5 {
        let (again, slept_again) = polls_of_a_slow_disk().await;
        assert_eq!(again, count, "every run is the same");
        slept.retain(|number| slept_again.contains(number));
    }
    println!("{count} polls");
    assert!(slept.is_empty(), "these sleep: {slept:?}");
}

/// How many polls many requests take, and which of them put their thread to sleep.
async fn polls_of_a_slow_disk() -> (u64, BTreeSet<u64>) {
    let disk = CrashDriver::new(fresh_image(Shape::small(4 << 20)));
    let slow = DelayDriver::new(Box::new(disk), 1, Duration::from_millis(4));
    let file = slow.into_node(NodeFlags::default()).await.unwrap();
    let (node, _image) = open_over(file, None).await.unwrap();
    let polls = Polls::default();
    let requests = (0..24u64).map(|n| {
        let (node, polls) = (&node, &polls);
        async move {
            let at = n * 150_000;
            polls.watch(write(node, at, 9000, 7)).await.unwrap();
            polls.watch(write(node, at + 100, 20, 8)).await.unwrap();
            let zero = node.pwrite_zeroes(at + 4096, 4096, WriteFlags::MAY_UNMAP);
            polls.watch(zero).await.unwrap();
            polls.watch(node.flush()).await.unwrap();
            polls.watch(node.pdiscard(at, 8192)).await.unwrap();
            polls.watch(read_all(node)).await;
        }
    });
    futures::future::join_all(requests).await;
    (polls.count(), polls.which_slept())
}

// INV QCOW2-ORD-6: a runtime that ends when a snapshot has been applied leaves no old tables in memory beside the new ones.
#[test]
fn a_snapshot_that_is_applied_when_its_runtime_ends_shows_nothing_old() {
    let runtime = || tokio::runtime::Builder::new_current_thread().build();
    let (first, second) = (runtime().unwrap(), runtime().unwrap());
    let slice = |number: u64| number * TABLE;
    let (node, faults) = second.block_on(async {
        let disk = CrashDriver::new(fresh_image(Shape::small(16 * TABLE)));
        let (node, _image) = open_on(disk.clone(), None).await;
        write(&node, slice(3), 512, 1).await.unwrap();
        write(&node, slice(5), 512, 1).await.unwrap();
        let request = SnapshotRequest::now("a");
        node.snapshot_create(request).await.unwrap();
        write(&node, slice(5), 512, 2).await.unwrap();
        node.driver().close().await.unwrap();
        let disk = CrashDriver::new(disk.snapshot());
        let (node, _image, faults) = open_with_faults(disk).await;
        (node, faults)
    });
    let read = async |offset| {
        let read = node.preadv(offset, IoBufMut::zeroed(512), Default::default());
        read.await.unwrap().to_vec()[0]
    };
    first.block_on(async {
        assert_eq!(read(slice(5)).await, 2);
        // Somebody is reading another table, and that takes for ever.
        faults.add(Rule::hang().only(0));
        let mut reading = Box::pin(read(slice(3)));
        assert!(reading.as_mut().now_or_never().is_none());
        while faults.hung() == 0 {
            tokio::task::yield_now().await;
        }
        let mut applying = Box::pin(node.snapshot_goto(SnapshotSelector::name("a")));
        for _ in 0..1000 {
            assert!(applying.as_mut().now_or_never().is_none());
            tokio::task::yield_now().await;
        }
    });
    drop(first);
    faults.clear();
    assert_eq!(second.block_on(read(slice(5))), 1);
    assert_eq!(second.block_on(read(slice(3))), 1);
}
