// SPDX-License-Identifier: MIT OR Apache-2.0
//! What one request holds in memory, or takes of the file, however long its range is and however often it fails.

use std::sync::Arc;

use blockcore::testing::CrashDriver;
use blockcore::{Node, Preallocation, Result, SnapshotRequest, TruncateRequest};

use super::{Shape, fresh_image, open_on, write};
use crate::crypto::CryptMethod;
use crate::image::Image;

/// Small clusters, so that little disks have many tables.
const SHAPE: Shape = Shape {
    size: 1 << 20,
    cluster_bits: 9,
    version: 3,
    refcount_order: 4,
    extended_l2: false,
    encryption: CryptMethod::None,
};

/// The most slices that are changed and not yet written while a request is under way.
async fn most_dirty_slices<F>(
    node: &Arc<Node>,
    image: &Image,
    request: impl FnOnce(Arc<Node>) -> F,
) -> usize
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let request = tokio::spawn(request(node.clone()));
    let mut most = 0;
    while !request.is_finished() {
        if let Ok(meta) = image.meta.try_lock() {
            most = most.max(meta.dirty_slices.len());
        }
        tokio::task::yield_now().await;
    }
    request.await.unwrap().unwrap();
    most
}

#[tokio::test]
async fn a_growth_holds_no_more_changes_in_memory_than_other_requests() {
    let long = 80 << 20;
    let cases = [
        (None, Preallocation::Metadata),
        (Some(vec![1; long]), Preallocation::Off),
    ];
    for (backing, preallocation) in cases {
        let (node, image) = open_on(CrashDriver::new(fresh_image(SHAPE)), backing).await;
        let grow = TruncateRequest {
            preallocation,
            ..TruncateRequest::to(long as u64)
        };
        let most = most_dirty_slices(
            &node,
            &image,
            |node| async move { node.truncate(grow).await },
        );
        let most = most.await;
        assert!(most < 1100, "{preallocation}: {most} slices");
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
