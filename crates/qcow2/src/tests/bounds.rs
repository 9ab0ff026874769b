// SPDX-License-Identifier: MIT OR Apache-2.0
//! What one request holds in memory, or takes of the file, however long its range is and however often it fails.

use blockcore::testing::fault::{Event, Rule};
use blockcore::testing::{CrashDriver, FaultDriver};
use blockcore::{NodeFlags, Preallocation, SnapshotRequest, TruncateRequest};

use super::{Shape, fresh_image, open_on, open_over, write};
use crate::crypto::CryptMethod;

/// Small clusters, so that little disks have many tables.
const SHAPE: Shape = Shape {
    size: 1 << 20,
    cluster_bits: 9,
    version: 3,
    refcount_order: 4,
    extended_l2: false,
    encryption: CryptMethod::None,
};

// What has piled up when the first commit fails is what is held at most.
#[tokio::test]
async fn a_growth_holds_no_more_changes_in_memory_than_other_requests() {
    let long = 80 << 20;
    let cases = [
        (None, Preallocation::Metadata),
        (Some(vec![1; long]), Preallocation::Off),
    ];
    for (backing, preallocation) in cases {
        let disk = FaultDriver::new(Box::new(CrashDriver::new(fresh_image(SHAPE))));
        let faults = disk.faults();
        let file = disk.into_node(NodeFlags::default()).await.unwrap();
        let (node, image) = open_over(file, backing).await.unwrap();
        faults.add(Rule::fail(Event::Flush, libc::EIO));
        let grow = TruncateRequest {
            preallocation,
            ..TruncateRequest::to(long as u64)
        };
        node.truncate(grow).await.unwrap_err();
        let held = image.meta.lock().await.dirty_slices.len();
        assert!(held < 1100, "{preallocation}: {held} slices");
    }
}

// A snapshot for which the refcounts are too narrow takes its clusters again with each try.
#[tokio::test]
async fn snapshots_that_fail_leave_the_file_no_longer_each_time() {
    let shape = Shape {
        refcount_order: 0,
        ..SHAPE
    };
    let disk = CrashDriver::new(fresh_image(shape));
    let (node, _image) = open_on(disk.clone(), None).await;
    write(&node, 0, 1 << 18, 1).await.unwrap();
    node.flush().await.unwrap();
    let mut lengths = Vec::new();
    for _ in 0..4 {
        let request = SnapshotRequest::now("a");
        node.snapshot_create(request).await.unwrap_err();
        lengths.push(disk.snapshot().len());
    }
    assert_eq!(lengths[1], lengths[3], "{lengths:?}");
}
