// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rule: whatever may have changed since a bitmap was added, cleared or frozen is dirty in it. The method: changes that are done, fail, are dropped, or are
//! half way when the bitmap is touched.

use futures::FutureExt;

use super::*;
use crate::buffer::IoBuf;
use crate::driver::{TruncateRequest, WriteFlags};
use crate::testing::fault::{Event, Rule};
use crate::testing::{CrashDriver, FaultDriver, MemoryDriver};

const KIB: u64 = 1024;

async fn memory_node(bytes: u64) -> Arc<Node> {
    let disk = MemoryDriver::new(vec![0; bytes as usize]);
    disk.into_node(Default::default()).await.unwrap()
}

fn fine(name: &str) -> NewBitmap {
    NewBitmap {
        granularity: Some(512),
        ..NewBitmap::new(name)
    }
}

fn dirty(node: &Node, name: &str) -> Vec<(u64, u64)> {
    let bitmap = node.dirty_bitmap(name).unwrap();
    let mut at = 0;
    let next = || {
        let range = bitmap.next_dirty(at)?;
        at = range.end;
        Some((range.start, range.end))
    };
    std::iter::from_fn(next).collect()
}

fn data(bytes: usize) -> IoBuf {
    IoBuf::from(vec![7; bytes])
}

// INV REQ-DIRTY-1
#[tokio::test]
async fn every_kind_of_change_is_marked() {
    let node = memory_node(1 << 20).await;
    node.add_dirty_bitmap(fine("b")).await.unwrap();
    let none = WriteFlags::empty();
    node.pwritev(1000, data(100), none).await.unwrap();
    node.pwrite_zeroes(10 * KIB, KIB, none).await.unwrap();
    node.pdiscard(20 * KIB, KIB).await.unwrap();
    // Past the end, where a file grows.
    node.pwritev(1 << 20, data(512), none).await.unwrap();
    let wanted = [
        (512, 1536),
        (10 * KIB, 11 * KIB),
        (20 * KIB, 21 * KIB),
        (1 << 20, (1 << 20) + 512),
    ];
    assert_eq!(dirty(&node, "b"), wanted);
    node.truncate(TruncateRequest::to(10 * KIB + 512))
        .await
        .unwrap();
    node.truncate(TruncateRequest::to(1 << 20)).await.unwrap();
    assert_eq!(dirty(&node, "b"), [(512, 1536), (10 * KIB, 10 * KIB + 512)]);
}

// INV REQ-DIRTY-1
#[tokio::test]
async fn what_fails_or_is_dropped_counts_as_changed() {
    let driver = FaultDriver::new(Box::new(CrashDriver::new(vec![0; 1 << 20])));
    let faults = driver.faults();
    let node = driver.into_node(Default::default()).await.unwrap();
    node.add_dirty_bitmap(fine("b")).await.unwrap();
    faults.add(Rule::fail(Event::Write, libc::EIO));
    let failed = node.pwritev(512, data(512), WriteFlags::empty()).await;
    assert!(failed.is_err());
    faults.clear();
    let mut dropped = Box::pin(node.pwritev(4096, data(512), WriteFlags::empty()));
    assert!(dropped.as_mut().now_or_never().is_none());
    assert_eq!(
        dirty(&node, "b"),
        [(512, 1024), (4096, 4608)],
        "marked before"
    );
    drop(dropped);
    assert_eq!(dirty(&node, "b"), [(512, 1024), (4096, 4608)]);
}

// INV REQ-DIRTY-1: add, clear, enable and freeze wait for what was in flight, so that it is seen by who reads next, or is marked.
#[tokio::test]
async fn who_touches_a_bitmap_waits_for_changes_in_flight() {
    let disk = CrashDriver::new(vec![0; 1 << 20]);
    let node = disk.into_node(Default::default()).await.unwrap();
    let mut write = Box::pin(node.pwritev(0, data(512), WriteFlags::empty()));
    assert!(write.as_mut().now_or_never().is_none());
    let mut add = Box::pin(node.add_dirty_bitmap(fine("b")));
    assert!(add.as_mut().now_or_never().is_none(), "waits for the write");
    // What begins meanwhile is marked already.
    node.pwritev(1024, data(512), WriteFlags::empty())
        .await
        .unwrap();
    write.await.unwrap();
    add.await.unwrap();
    assert_eq!(dirty(&node, "b"), [(1024, 1536)]);
    let mut write = Box::pin(node.pwritev(0, data(512), WriteFlags::empty()));
    assert!(write.as_mut().now_or_never().is_none());
    let mut freeze = Box::pin(node.freeze_dirty_bitmap("b"));
    assert!(freeze.as_mut().now_or_never().is_none());
    write.await.unwrap();
    let frozen = freeze.await.unwrap();
    assert_eq!(
        frozen
            .ranges()
            .map(|r| (r.start, r.end))
            .collect::<Vec<_>>(),
        [(0, 512), (1024, 1536)],
        "what is not in it is marked anew"
    );
}

// INV REQ-DIRTY-1: a change whose mark is gone, or was never made, is there when the full backup begins that comes next.
#[tokio::test]
async fn who_clears_or_enables_a_bitmap_waits_for_changes_in_flight() {
    let disk = CrashDriver::new(vec![0; 1 << 20]);
    let node = disk.into_node(Default::default()).await.unwrap();
    node.add_dirty_bitmap(fine("b")).await.unwrap();
    for what in ["clear", "enable"] {
        node.enable_dirty_bitmap("b", what == "clear")
            .await
            .unwrap();
        let mut write = Box::pin(node.pwritev(0, data(512), WriteFlags::empty()));
        assert!(write.as_mut().now_or_never().is_none());
        let mut touch = Box::pin(async {
            match what {
                "clear" => node.clear_dirty_bitmap("b").await,
                _ => node.enable_dirty_bitmap("b", true).await,
            }
        });
        assert!(touch.as_mut().now_or_never().is_none(), "{what} waits");
        write.await.unwrap();
        touch.await.unwrap();
        assert_eq!(dirty(&node, "b"), [], "{what}");
    }
}

// INV REQ-DIRTY-1
#[tokio::test]
async fn a_bitmap_that_is_enabled_marks_though_nobody_had_to_look_before() {
    let node = memory_node(1 << 20).await;
    let off = NewBitmap {
        enabled: false,
        ..fine("b")
    };
    node.add_dirty_bitmap(off).await.unwrap();
    assert!(!node.bitmaps.is_watching());
    let none = WriteFlags::empty();
    node.pwritev(0, data(512), none).await.unwrap();
    node.enable_dirty_bitmap("b", true).await.unwrap();
    node.pwritev(4096, data(512), none).await.unwrap();
    assert_eq!(dirty(&node, "b"), [(4096, 4608)]);
    node.enable_dirty_bitmap("b", false).await.unwrap();
    assert!(!node.bitmaps.is_watching());
}

#[tokio::test]
async fn a_backup_that_fails_forgets_nothing() {
    let node = memory_node(1 << 20).await;
    let bitmap = node.add_dirty_bitmap(fine("b")).await.unwrap();
    let none = WriteFlags::empty();
    node.pwritev(0, data(512), none).await.unwrap();
    let frozen = node.freeze_dirty_bitmap("b").await.unwrap();
    node.pwritev(4096, data(512), none).await.unwrap();
    assert!(node.clear_dirty_bitmap("b").await.is_err(), "it is in use");
    assert!(node.remove_dirty_bitmap("b").await.is_err());
    assert_eq!(bitmap.dirty_bytes(), 1024);
    drop(frozen);
    assert_eq!(dirty(&node, "b"), [(0, 512), (4096, 4608)]);
    let frozen = node.freeze_dirty_bitmap("b").await.unwrap();
    node.pwritev(8192, data(512), none).await.unwrap();
    frozen.done();
    assert_eq!(dirty(&node, "b"), [(8192, 8704)]);
}

#[tokio::test]
async fn bitmaps_are_merged_over_granularities_and_disks() {
    let (node, other) = (memory_node(1 << 20).await, memory_node(1 << 20).await);
    node.add_dirty_bitmap(fine("fine")).await.unwrap();
    let coarse = NewBitmap {
        granularity: Some(4096),
        enabled: false,
        ..NewBitmap::new("coarse")
    };
    other.add_dirty_bitmap(coarse).await.unwrap();
    let none = WriteFlags::empty();
    node.pwritev(4608, data(512), none).await.unwrap();
    other.pwritev(0, data(512), none).await.unwrap();
    assert_eq!(dirty(&other, "coarse"), [], "it is disabled");
    let fine = node.dirty_bitmap("fine").unwrap();
    other.merge_dirty_bitmap("coarse", &fine).await.unwrap();
    assert_eq!(dirty(&other, "coarse"), [(4096, 8192)]);
    let coarse = other.dirty_bitmap("coarse").unwrap();
    node.merge_dirty_bitmap("fine", &coarse).await.unwrap();
    assert_eq!(dirty(&node, "fine"), [(4096, 8192)]);
    // A range that reaches into several bits.
    node.pwritev(16 * KIB + 512, data(9 * 1024), none)
        .await
        .unwrap();
    let fine = node.dirty_bitmap("fine").unwrap();
    other.merge_dirty_bitmap("coarse", &fine).await.unwrap();
    let wanted = [(4096, 8192), (16 * KIB, 28 * KIB)];
    assert_eq!(dirty(&other, "coarse"), wanted);
    other.truncate(TruncateRequest::to(512)).await.unwrap();
    let e = node.merge_dirty_bitmap("fine", &coarse).await.unwrap_err();
    assert_eq!(
        e.text(),
        "Bitmaps are of different sizes (destination size is 1048576, source size is 512) and can't be merged"
    );
}

#[tokio::test]
async fn impossible_bitmaps_are_refused() {
    let node = memory_node(1 << 20).await;
    let add = async |new: NewBitmap| node.add_dirty_bitmap(new).await.map(|_| ());
    let text = |r: Result<()>| r.unwrap_err().text();
    add(NewBitmap::new("b")).await.unwrap();
    assert_eq!(
        text(add(NewBitmap::new("b")).await),
        "Bitmap already exists: b"
    );
    let empty = NewBitmap::new("");
    assert_eq!(text(add(empty).await), "Bitmap name cannot be empty");
    for bytes in [0, 1, 256, 513, 1 << 32] {
        let odd = NewBitmap {
            granularity: Some(bytes),
            ..NewBitmap::new("c")
        };
        let wanted = "Granularity must be power of 2 and at least 512";
        assert_eq!(text(add(odd).await), wanted);
    }
    let stored = NewBitmap {
        persistent: true,
        ..NewBitmap::new("c")
    };
    let wanted = format!(
        "Can't store persistent bitmaps to {}: Operation not supported",
        node.name()
    );
    assert_eq!(text(add(stored).await), wanted);
    assert_eq!(
        text(node.remove_dirty_bitmap("c").await),
        "Dirty bitmap 'c' not found"
    );
    node.remove_dirty_bitmap("b").await.unwrap();
    assert!(node.dirty_bitmaps().is_empty());
    assert!(!node.bitmaps.is_watching(), "nobody has to look any more");
}

#[test]
fn of_two_backups_that_begin_at_once_one_is_refused() {
    use std::sync::atomic::{AtomicUsize, Ordering};

    for _ in 0..2000 {
        let bitmap = Arc::new(DirtyBitmap::new("b", 512, 1 << 20).unwrap());
        let other = DirtyBitmap::new("all", 512, 1 << 20).unwrap();
        let mut bits = other.bits();
        bits.set(0..bits.len());
        bitmap.merge(&other.with_bits(bits)).unwrap();
        let ready = AtomicUsize::new(0);
        let begin = || {
            ready.fetch_add(1, Ordering::AcqRel);
            // Sleepers would wake one after the other.
            while ready.load(Ordering::Acquire) < 2 {
                std::hint::spin_loop();
            }
            bitmap.freeze()
        };
        let begun: Vec<_> = std::thread::scope(|scope| {
            let threads = [scope.spawn(begin), scope.spawn(begin)];
            threads.map(|t| t.join().unwrap()).into_iter().collect()
        });
        assert_eq!(begun.iter().filter(|b| b.is_ok()).count(), 1);
        drop(begun);
        assert_eq!(bitmap.dirty_bytes(), 1 << 20, "dropped, so nothing is lost");
    }
}
