// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bitmaps while the disk changes as a whole: lengths that come and go beside writes, lengths that no bitmap can have, snapshots that are applied. The rule: an image
//! that was closed can be opened again, and its bitmaps are as long as the disk.

use std::sync::Arc;

use blockcore::testing::CrashDriver;
use blockcore::{
    DirtyBitmap, DirtyBitmaps, NewBitmap, Node, Result, SnapshotRequest, SnapshotSelector,
    TruncateRequest,
};
use futures::FutureExt;

use super::bitmaps::{close, dirty, stored};
use super::{Shape, findings, fresh_image, open_on, read_all, write};

const MIB: u64 = 1 << 20;

/// An image whose bitmaps of sectors have a cluster of bits for every 2 MiB.
fn short_clusters(size: u64) -> CrashDriver {
    CrashDriver::new(fresh_image(Shape {
        cluster_bits: 9,
        ..Shape::small(size)
    }))
}

/// A write is on its way to a range when the disk becomes shorter: it comes after that, fails, and must not make a bitmap longer than the disk.
#[tokio::test]
async fn a_write_that_waited_for_a_shorter_disk_makes_no_bitmap_longer() {
    let disk = short_clusters(8 * MIB);
    let (node, _image) = open_on(disk.clone(), None).await;
    let b = node.add_dirty_bitmap(stored("b")).await.unwrap();
    let copy = node.add_dirty_bitmap(NewBitmap::new("copy")).await.unwrap();
    write(&node, 512, 512, 1).await.unwrap();
    let mut shrink = Box::pin(node.truncate(TruncateRequest::to(MIB)));
    assert!(shrink.as_mut().now_or_never().is_none());
    let mut late = Box::pin(write(&node, 7 * MIB, 512, 2));
    assert!(late.as_mut().now_or_never().is_none(), "it waits");
    shrink.await.unwrap();
    assert_eq!(late.await.unwrap_err().errno(), libc::EIO);
    assert_eq!((b.length(), copy.length()), (MIB, MIB));
    node.merge_dirty_bitmap("copy", &b).await.unwrap();
    close(node).await.unwrap();
    let (node, _image) = open_on(disk.clone(), None).await;
    assert_eq!(dirty(&node, "b"), [(512, 1024)]);
    node.truncate(TruncateRequest::to(8 * MIB)).await.unwrap();
    assert_eq!(dirty(&node, "b"), [(512, 1024)], "what is new is not dirty");
    close(node).await.unwrap();
    assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
}

/// What lies behind the last whole sector of a disk is no part of it, and no bitmap has to cover it.
#[tokio::test]
async fn a_bitmap_is_as_long_as_the_whole_sectors_of_a_disk() {
    let mut bytes = short_clusters(2 * MIB + 512).snapshot();
    bytes[24..32].copy_from_slice(&(2 * MIB + 100).to_be_bytes());
    let disk = CrashDriver::new(bytes);
    for _ in 0..2 {
        let (node, _image) = open_on(disk.clone(), None).await;
        let _there_already = node.add_dirty_bitmap(stored("b")).await;
        assert_eq!(node.dirty_bitmap("b").unwrap().length(), 2 * MIB);
        close(node).await.unwrap();
    }
}

/// A long disk. One of a terabyte has bitmaps of sectors that are half as long as they may be.
fn long_disk(bytes: u64) -> CrashDriver {
    CrashDriver::new(fresh_image(Shape {
        cluster_bits: 16,
        ..Shape::small(bytes)
    }))
}

const TOO_LONG: &str = "Bitmap 'b' doesn't satisfy the constraints: Too much space will be occupied by the bitmap. Use larger granularity";

#[tokio::test]
async fn a_disk_does_not_outgrow_its_bitmaps() {
    let disk = long_disk(1 << 40);
    let (node, _image) = open_on(disk.clone(), None).await;
    node.add_dirty_bitmap(stored("b")).await.unwrap();
    write(&node, 0, 512, 1).await.unwrap();
    let text = |r: Result<()>| r.unwrap_err().text();
    let grown = node.truncate(TruncateRequest::to(3 << 40)).await;
    assert_eq!(text(grown), TOO_LONG);
    let mut options = blockcore::Options::new();
    options.set("size", "3T");
    assert_eq!(text(node.amend(options).await), TOO_LONG);
    assert_eq!(node.length(), 1 << 40);
    node.truncate(TruncateRequest::to(2 << 40)).await.unwrap();
    close(node).await.unwrap();
    let (node, _image) = open_on(disk.clone(), None).await;
    assert_eq!(dirty(&node, "b"), [(0, 512)]);
    node.remove_dirty_bitmap("b").await.unwrap();
    node.truncate(TruncateRequest::to(3 << 40)).await.unwrap();
    close(node).await.unwrap();
    assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
}

/// A bitmap is added at any time while the disk grows, to a length that it can't have. One of the two is refused.
#[tokio::test]
async fn a_disk_that_grows_and_a_bitmap_that_is_added_fit_each_other() {
    let mut refused = [0, 0];
    for pause in 0..60 {
        let disk = long_disk(1 << 40);
        let (node, _image) = open_on(disk.clone(), None).await;
        let growing = node.clone();
        let grow =
            tokio::spawn(async move { growing.truncate(TruncateRequest::to(3 << 40)).await });
        for _ in 0..pause {
            tokio::task::yield_now().await;
        }
        let added = node.add_dirty_bitmap(stored("b")).await;
        let grown = grow.await.unwrap();
        assert_ne!(added.is_ok(), grown.is_ok(), "{pause}");
        refused[usize::from(added.is_ok())] += 1;
        assert_eq!(node.dirty_bitmaps().is_empty(), added.is_err());
        write(&node, 0, 512, 1).await.unwrap();
        close(node).await.unwrap();
        let (node, _image) = open_on(disk.clone(), None).await;
        assert_eq!(node.length() == 3 << 40, grown.is_ok());
        assert_eq!(node.dirty_bitmaps().is_empty(), added.is_err());
    }
    assert!(refused.iter().all(|n| *n > 0), "{refused:?}");
}

// INV QCOW2-BITMAP-1: rather an error at the end than an image that nobody opens any more.
#[tokio::test]
async fn a_bitmap_that_no_reader_takes_is_not_stored() {
    let another = "Bitmap 'b' is for a disk of another length";
    for (disk_bytes, bitmap_bytes, wanted) in [
        (3 << 40, 3 << 40, TOO_LONG),
        (1 << 40, 3 << 40, another),
        (1 << 40, 1 << 30, another),
    ] {
        let disk = long_disk(disk_bytes);
        let flags = blockcore::NodeFlags::default();
        let file = disk.clone().into_node(flags).await.unwrap();
        let image = super::image_over(file, None).await.unwrap();
        let mut image = Arc::into_inner(image).expect("nobody else has it");
        image.prepare_writing().await.unwrap();
        let odd = DirtyBitmap::new("b", 512, bitmap_bytes).unwrap();
        image.bitmaps.set = Arc::new(DirtyBitmaps::loaded(vec![odd.persistent(true)]));
        let image = Arc::new(image);
        assert_eq!(image.store_bitmaps().await.unwrap_err().text(), wanted);
        image.commit().await.unwrap();
        let (node, _image) = open_on(disk.clone(), None).await;
        assert!(node.dirty_bitmaps().is_empty());
        assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
    }
}

/// As many as there can be: an image that somebody sends must not hold up who closes it.
#[tokio::test]
async fn many_bitmaps_are_stored_in_no_time() {
    let disk = CrashDriver::new(fresh_image(Shape {
        cluster_bits: 9,
        ..Shape::small(MIB)
    }));
    let file = disk.clone().into_node(blockcore::NodeFlags::default());
    let image = super::image_over(file.await.unwrap(), None).await.unwrap();
    let mut image = Arc::into_inner(image).expect("nobody else has it");
    image.prepare_writing().await.unwrap();
    let bitmap = |i: u32| DirtyBitmap::new(i.to_string(), 65536, MIB).unwrap();
    let all = (0..crate::bitmap::MAX_BITMAPS).map(|i| bitmap(i).persistent(true));
    image.bitmaps.set = Arc::new(DirtyBitmaps::loaded(all.collect()));
    let image = Arc::new(image);
    image.store_bitmaps().await.unwrap();
    image.commit().await.unwrap();
    let begin = std::time::Instant::now();
    let (node, _image) = open_on(disk, None).await;
    write(&node, 0, 512, 1).await.unwrap();
    close(node).await.unwrap();
    let spent = begin.elapsed().as_secs();
    assert!(spent < 60, "{spent} seconds");
}

/// Applies a snapshot and adds a bitmap at the same time, on two threads. Either the bitmap is there first, and the snapshot is refused; or it comes afterwards.
///
/// ```text
/// one thread:  are there bitmaps? no   ->               waits for its turn -> the disk is another one
/// the other:                  adds a bitmap, waits for what is in flight: nothing    -> reads the disk, and takes changes from here on to be marked
/// ```
#[test]
fn a_bitmap_misses_no_snapshot_that_is_applied() {
    const ROUNDS: usize = 400;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .build()
        .unwrap();
    let disk = CrashDriver::new(fresh_image(Shape::small(MIB)));
    let (node, image) = runtime.block_on(async {
        let (node, image) = open_on(disk, None).await;
        write(&node, 0, 512, 1).await.unwrap();
        node.snapshot_create(SnapshotRequest::now("s"))
            .await
            .unwrap();
        (node, image)
    });
    let ready = std::sync::Barrier::new(2);
    for round in 0..ROUNDS {
        runtime.block_on(write(&node, 0, 512, 2)).unwrap();
        let goto = |node: Arc<Node>| {
            ready.wait();
            runtime.block_on(node.snapshot_goto(SnapshotSelector::name("s")))
        };
        let add = |node: &Arc<Node>| {
            ready.wait();
            runtime.block_on(async {
                node.add_dirty_bitmap(NewBitmap::new("b")).await.unwrap();
                read_all(node).await[0]
            })
        };
        let (_, seen) = std::thread::scope(|scope| {
            let gone = scope.spawn(|| goto(node.clone()));
            let added = scope.spawn(|| add(&node));
            (gone.join().unwrap(), added.join().unwrap())
        });
        let now = runtime.block_on(read_all(&node))[0];
        assert!(
            seen == now || !dirty(&node, "b").is_empty(),
            "round {round}: {seen} has become {now}"
        );
        runtime.block_on(node.remove_dirty_bitmap("b")).unwrap();
    }
    runtime.block_on(async {
        close(node).await.unwrap();
        assert_eq!(image.tasks.count(), 0);
    });
}
