// SPDX-License-Identifier: MIT OR Apache-2.0
//! Futures that are polled once and then left alone, and runtimes that end in the middle.

use std::time::Duration;

use blockcore::testing::CrashDriver;
use blockcore::testing::fault::{Event, Rule};
use blockcore::{IoBufMut, Result};
use futures::FutureExt;

use super::{Shape, findings, fresh_image, open_on, open_with_faults, read_all, write};

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

// INV REQ-PARK-1: nor does a write in place that reaches behind the end of the file, which a commit makes longer.
#[tokio::test]
async fn a_parked_write_behind_the_end_of_the_file_holds_up_nobody() {
    let disk = CrashDriver::new(fresh_image(Shape::small(4 * TABLE)));
    let (node, _image) = open_on(disk.clone(), None).await;
    write(&node, 0, 512, 1).await.unwrap();
    let mut parked = Box::pin(write(&node, 1024, 512, 3));
    assert!(parked.as_mut().now_or_never().is_none());
    in_time("a flush", node.flush()).await;
    in_time("a write elsewhere", write(&node, 2 * TABLE, 512, 3)).await;
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
