// SPDX-License-Identifier: MIT OR Apache-2.0
//! Persistent dirty bitmaps. The rule (INV QCOW2-BITMAP-1): whenever the power is cut, and whatever fails, a bitmap in the image is either in use, or what differs from
//! the time when it was empty is dirty in it. [`Clean`] is that time; the plans of `torture` look at it, too.

use std::sync::Arc;

use blockcore::testing::fault::{Event, Rule};
use blockcore::testing::{CrashDriver, FaultDriver, Rng, given_up_after};
use blockcore::{
    Backend, BlockError, CheckFix, Child, ChildRole, Diagnostics, NewBitmap, Node, NodeFlags,
    Options, Result, TruncateRequest, WriteFlags,
};
use futures::FutureExt;

use super::{
    Backing, READ_ONLY, Shape, corruptions, findings, fresh_image, open_on, open_over,
    open_with_faults, read_all, try_read_all, write,
};
use crate::extension::{self, Extension};
use crate::header::Header;
use crate::image::Image;

const CLUSTER: u64 = 4096;
const DISK: u64 = 64 * CLUSTER;
const SECTOR: u64 = 512;

/// Adds an empty bitmap of sectors to an image.
pub(crate) async fn with_bitmap(bytes: Vec<u8>, backing: &Backing, name: &str) -> Vec<u8> {
    let disk = CrashDriver::new(bytes);
    let (node, _image) = open_on(disk.clone(), backing).await;
    node.add_dirty_bitmap(stored(name)).await.unwrap();
    close(node).await.unwrap();
    disk.snapshot()
}

pub(crate) fn stored(name: &str) -> NewBitmap {
    NewBitmap {
        persistent: true,
        granularity: Some(SECTOR),
        ..NewBitmap::new(name)
    }
}

/// An image with the bitmap `b`.
async fn image_with_bitmap() -> Vec<u8> {
    with_bitmap(fresh_image(Shape::small(DISK)), &Backing::default(), "b").await
}

pub(crate) async fn close(node: Arc<Node>) -> Result<()> {
    Child::new("top", ChildRole::File, node).close().await
}

/// Whether the bitmap of an open image says all that it has to say, where `before` is what the disk held when it was empty. `Ok(true)`: it does; `Ok(false)`: it
/// is in use, and says nothing.
///
/// # Errors
/// What it doesn't say.
pub(crate) fn covers(node: &Node, name: &str, before: &[u8], now: &[u8]) -> Result<bool, String> {
    let bitmap = node.dirty_bitmap(name).map_err(|e| e.to_string())?;
    if bitmap.is_inconsistent() {
        return Ok(false);
    }
    let bits = bitmap.bits();
    let zeroes = [0; SECTOR as usize];
    for (i, sector) in now.chunks(SECTOR as usize).enumerate() {
        let at = i * SECTOR as usize;
        let old = before.get(at..at + SECTOR as usize).unwrap_or(&zeroes);
        if sector != old && !bits.get(i as u64) {
            return Err(format!("sector {i} has changed and is not dirty"));
        }
    }
    Ok(true)
}

pub(crate) fn dirty(node: &Node, name: &str) -> Vec<(u64, u64)> {
    let bitmap = node.dirty_bitmap(name).unwrap();
    let bits = bitmap.bits();
    let granularity = bitmap.granularity();
    let in_bytes = |r: std::ops::Range<u64>| (r.start * granularity, r.end * granularity);
    bits.ranges().map(in_bytes).collect()
}

async fn reopened(disk: &CrashDriver) -> (Arc<Node>, Arc<Image>) {
    open_on(CrashDriver::new(disk.snapshot()), &Backing::default()).await
}

#[tokio::test]
async fn changes_are_found_by_who_opens_the_image_next() {
    let disk = CrashDriver::new(image_with_bitmap().await);
    let none = WriteFlags::empty();
    for round in 0..3u64 {
        let (node, _image) = open_on(disk.clone(), None).await;
        write(&node, round * 8192, 512, 7).await.unwrap();
        node.pwrite_zeroes(100 * SECTOR, 2 * SECTOR, none)
            .await
            .unwrap();
        node.pdiscard(4 * 8192, CLUSTER).await.unwrap();
        close(node).await.unwrap();
        assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
    }
    let (node, _image) = open_on(disk.clone(), None).await;
    let wanted = [
        (0, 512),
        (8192, 8704),
        (16384, 16896),
        (32768, 36864),
        (51200, 52224),
    ];
    assert_eq!(dirty(&node, "b"), wanted);
    node.remove_dirty_bitmap("b").await.unwrap();
    close(node).await.unwrap();
    let (node, image) = open_on(disk.clone(), None).await;
    assert!(node.dirty_bitmaps().is_empty());
    assert!(image.header().extensions.is_empty());
    assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
}

#[tokio::test]
async fn an_image_that_is_not_changed_is_not_written() {
    let disk = CrashDriver::new(image_with_bitmap().await);
    let (node, _image) = open_on(disk.clone(), None).await;
    read_all(&node).await;
    node.flush().await.unwrap();
    close(node).await.unwrap();
    let flushes = (0..disk.log_len()).filter(|&at| disk.is_flush(at)).count();
    assert_eq!(disk.log_len(), flushes);
}

// INV QCOW2-BITMAP-1
#[tokio::test]
async fn a_copy_is_in_use_or_tells_of_all_changes_wherever_the_power_is_cut() {
    let seed = Rng::seed_from_env();
    let start = image_with_bitmap().await;
    let disk = CrashDriver::new(start.clone());
    let before = vec![0; DISK as usize];
    for value in 1..3 {
        let (node, _image) = open_on(disk.clone(), None).await;
        write(&node, 4096 * u64::from(value), 2048, value)
            .await
            .unwrap();
        node.flush().await.unwrap();
        write(&node, 65536, 1024, value).await.unwrap();
        let more = stored(&format!("more{value}"));
        node.add_dirty_bitmap(more).await.unwrap();
        close(node).await.unwrap();
    }
    let mut clean = 0;
    for cut in 0..=disk.log_len() {
        for keep in [0, 30, 70, 100] {
            let mut rng = Rng::new(seed.wrapping_add(cut as u64 * 4 + keep));
            let image = disk.image_after(cut, keep, &mut rng);
            let found = corruptions(image.clone()).await;
            assert_eq!(found, Vec::<String>::new(), "cut {cut}, {keep}%");
            let (node, _image) = open_on(CrashDriver::new(image), None).await;
            let now = read_all(&node).await;
            match covers(&node, "b", &before, &now) {
                Ok(is_clean) => clean += usize::from(is_clean),
                Err(why) => panic!("cut {cut}, {keep}%: {why}"),
            }
        }
    }
    assert!(clean > 20, "{clean} cuts left a bitmap that can be used");
    assert!(clean < 3 * disk.log_len(), "and some didn't");
}

/// Opens with faults, changes something, and closes, with an error in the request number `nth` from closing on. `None`: there was no such request.
async fn closed_with_fault(disk: &CrashDriver, nth: u32) -> Option<Result<()>> {
    let driver = FaultDriver::new(Box::new(disk.clone()));
    let faults = driver.faults();
    let file = driver.into_node(NodeFlags::default()).await.unwrap();
    let (node, _image) = open_over(file, None).await.unwrap();
    write(&node, 8192, 1024, 9).await.unwrap();
    node.add_dirty_bitmap(stored("c")).await.unwrap();
    faults.add(Rule::fail_all(libc::EIO).only(nth));
    let closed = close(node).await;
    (!faults.failed().is_empty()).then_some(closed)
}

// INV QCOW2-BITMAP-1
#[tokio::test]
async fn an_error_while_bitmaps_are_stored_harms_nothing() {
    let start = image_with_bitmap().await;
    let before = vec![0; DISK as usize];
    let mut told = 0;
    for nth in 0.. {
        let disk = CrashDriver::new(start.clone());
        let Some(closed) = closed_with_fault(&disk, nth).await else {
            break;
        };
        told += usize::from(closed.is_err());
        let image = disk.snapshot();
        assert_eq!(
            corruptions(image.clone()).await,
            Vec::<String>::new(),
            "{nth}"
        );
        let left = CrashDriver::new(image);
        let (node, _image) = open_on(left.clone(), None).await;
        let now = read_all(&node).await;
        let is_clean = covers(&node, "b", &before, &now);
        assert!(is_clean.is_ok(), "{nth}: {is_clean:?}");
        // And it can be used: what is in use goes away only when it is removed.
        write(&node, 0, 512, 3).await.unwrap();
        node.remove_dirty_bitmap("b").await.unwrap();
        close(node).await.unwrap();
        assert_eq!(corruptions(left.snapshot()).await, Vec::<String>::new());
        let (node, _image) = reopened(&left).await;
        assert!(node.dirty_bitmap("b").is_err());
    }
    assert!(told > 10, "{told} errors were told");
}

#[tokio::test]
async fn a_bitmap_that_is_in_use_is_kept_and_can_only_be_removed() {
    let disk = CrashDriver::new(image_with_bitmap().await);
    let (node, _image) = open_on(disk.clone(), None).await;
    write(&node, 0, 512, 1).await.unwrap();
    node.flush().await.unwrap();
    // The process ends here.
    let left = CrashDriver::new(disk.snapshot());
    for _ in 0..2 {
        let (node, _image) = open_on(left.clone(), None).await;
        let b = node.dirty_bitmap("b").unwrap();
        assert!(b.is_inconsistent() && b.is_enabled());
        let text = "Bitmap 'b' is inconsistent and cannot be used";
        let texts = |r: Result<()>| r.unwrap_err().text();
        assert_eq!(texts(node.clear_dirty_bitmap("b").await), text);
        assert_eq!(texts(node.enable_dirty_bitmap("b", false).await), text);
        assert_eq!(
            texts(node.truncate(TruncateRequest::to(2 * DISK)).await),
            text
        );
        let other = node.add_dirty_bitmap(stored("other")).await;
        if let Ok(other) = &other {
            assert_eq!(texts(node.merge_dirty_bitmap("b", other).await), text);
            assert_eq!(texts(node.merge_dirty_bitmap("other", &b).await), text);
        }
        write(&node, 8192, 512, 1).await.unwrap();
        close(node).await.unwrap();
        assert_eq!(findings(left.snapshot()).await, Vec::<String>::new());
    }
    let (node, _image) = open_on(left.clone(), None).await;
    assert_eq!(dirty(&node, "other"), [(8192, 8704)]);
    node.remove_dirty_bitmap("b").await.unwrap();
    node.remove_dirty_bitmap("other").await.unwrap();
    close(node).await.unwrap();
    assert_eq!(findings(left.snapshot()).await, Vec::<String>::new());
}

#[tokio::test]
async fn bitmaps_follow_the_length_of_the_disk() {
    let disk = CrashDriver::new(image_with_bitmap().await);
    let (node, _image) = open_on(disk.clone(), None).await;
    write(&node, DISK - 512, 512, 1).await.unwrap();
    write(&node, 8192, 1024, 1).await.unwrap();
    node.truncate(TruncateRequest::to(2 * DISK)).await.unwrap();
    write(&node, 2 * DISK - 512, 512, 1).await.unwrap();
    close(node).await.unwrap();
    let (node, _image) = open_on(disk.clone(), None).await;
    let wanted = [(8192, 9216), (DISK - 512, DISK), (2 * DISK - 512, 2 * DISK)];
    assert_eq!(dirty(&node, "b"), wanted);
    node.truncate(TruncateRequest::to(8704)).await.unwrap();
    node.truncate(TruncateRequest::to(DISK)).await.unwrap();
    close(node).await.unwrap();
    let (node, _image) = open_on(disk.clone(), None).await;
    assert_eq!(dirty(&node, "b"), [(8192, 8704)]);
    // A disk of no length has bitmaps, too.
    node.truncate(TruncateRequest::to(0)).await.unwrap();
    close(node).await.unwrap();
    let (node, _image) = open_on(disk.clone(), None).await;
    assert!(!node.dirty_bitmap("b").unwrap().is_inconsistent());
    assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
}

#[tokio::test]
async fn long_bitmaps_have_clusters_of_zeroes_ones_and_bits() {
    // A table of 9 entries: 4096 bytes of bits are 16 MiB of disk.
    let size = 130 << 20;
    let disk = CrashDriver::new(fresh_image(Shape::small(size)));
    let (node, _image) = open_on(disk.clone(), None).await;
    node.add_dirty_bitmap(stored("b")).await.unwrap();
    let none = WriteFlags::empty();
    node.pwrite_zeroes(32 << 20, 20 << 20, none).await.unwrap();
    node.pwrite_zeroes(size - 1536, 1536, none).await.unwrap();
    close(node).await.unwrap();
    let (node, image) = open_on(disk.clone(), None).await;
    assert_eq!(
        dirty(&node, "b"),
        [(32 << 20, 52 << 20), (size - 1536, size)]
    );
    let stored = image.bitmaps.stored().clone();
    assert_eq!(stored.bitmaps[0].entry.table_size, 9);
    assert_eq!(stored.bitmaps[0].data.len(), 2, "the rest is uniform");
    assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
}

/// A node over an image whose file hangs.
async fn reopen(node: &Arc<Node>, read_only: bool) -> Result<()> {
    let mut request = blockcore::ReopenRequest {
        read_only,
        direct: false,
        options: Options::new(),
    };
    let prepared = node.driver().reopen_prepare(&mut request).await?;
    prepared.commit();
    Ok(())
}

// INV QCOW2-BITMAP-1
#[tokio::test]
async fn a_copy_that_was_stored_is_outdated_again_by_the_next_change() {
    let disk = CrashDriver::new(image_with_bitmap().await);
    let (node, _image) = open_on(disk.clone(), None).await;
    write(&node, 0, 512, 1).await.unwrap();
    reopen(&node, true).await.unwrap();
    let (copy, _) = reopened(&disk).await;
    assert_eq!(dirty(&copy, "b"), [(0, 512)]);
    reopen(&node, false).await.unwrap();
    let (copy, _) = reopened(&disk).await;
    assert!(!copy.dirty_bitmap("b").unwrap().is_inconsistent());
    write(&node, 8192, 512, 1).await.unwrap();
    let (copy, _) = reopened(&disk).await;
    assert!(copy.dirty_bitmap("b").unwrap().is_inconsistent());
    // One that was prepared and not done.
    let mut request = blockcore::ReopenRequest {
        read_only: true,
        direct: false,
        options: Options::new(),
    };
    drop(node.driver().reopen_prepare(&mut request).await.unwrap());
    let (copy, _) = reopened(&disk).await;
    assert_eq!(dirty(&copy, "b"), [(0, 512), (8192, 8704)]);
    write(&node, 16384, 512, 1).await.unwrap();
    let (copy, _) = reopened(&disk).await;
    assert!(copy.dirty_bitmap("b").unwrap().is_inconsistent());
    close(node).await.unwrap();
    assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
}

// INV QCOW2-BITMAP-1, INV REQ-DROP-1: who makes an image read-only and doesn't wait for it may write to it, or have it repaired, at any time.
#[tokio::test]
async fn a_dropped_reopening_stores_no_bitmap_that_lacks_a_later_write() {
    let start = image_with_bitmap().await;
    let mut given_up = 0;
    for rounds in 0.. {
        let disk = CrashDriver::new(start.clone());
        let (node, _image, faults) = open_with_faults(disk.clone()).await;
        faults.add(Rule::slow(Event::Write, 3));
        write(&node, 0, 512, 1).await.unwrap();
        let backend = Backend::new(node.clone(), false);
        let read_only = backend.reopen(READ_ONLY, false, Options::new());
        let reopened_in_time = given_up_after(rounds, read_only).await.is_some();
        given_up += usize::from(!reopened_in_time);
        let written = write(&node, 8192, 512, 1).await;
        let repaired = node.check(CheckFix::Leaks).await;
        if let Ok(found) = repaired {
            assert_eq!(found.messages, [""; 0], "after {rounds} rounds");
        }
        backend.drain().await;
        for child in node.driver().children() {
            let (above, below) = (node.is_read_only(), child.is_read_only());
            assert_eq!(above, below, "modes differ after {rounds} rounds");
        }
        backend.close().await.unwrap();
        let (copy, _) = reopened(&disk).await;
        let bitmap = copy.dirty_bitmap("b").unwrap();
        let expected: &[(u64, u64)] = match written {
            Ok(()) => &[(0, 512), (8192, 8704)],
            Err(_) => &[(0, 512)],
        };
        assert!(!bitmap.is_inconsistent(), "after {rounds} rounds");
        assert_eq!(dirty(&copy, "b"), expected, "after {rounds} rounds");
        assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
        if reopened_in_time {
            break;
        }
    }
    assert!(given_up > 5, "only {given_up} were given up");
}

/// Storing fails when the image is to become read-only, and so it stays writable. What was taken for the copies is given back.
#[tokio::test]
async fn copies_that_could_not_be_written_leak_nothing() {
    let start = image_with_bitmap().await;
    let mut told = 0;
    for nth in 0.. {
        let disk = CrashDriver::new(start.clone());
        let (node, _image, faults) = open_with_faults(disk.clone()).await;
        write(&node, 8192, 1024, 9).await.unwrap();
        node.flush().await.unwrap();
        faults.add(Rule::fail_all(libc::EIO).only(nth));
        let result = reopen(&node, true).await;
        if faults.failed().is_empty() {
            break;
        }
        faults.clear();
        told += usize::from(result.is_err());
        if result.is_ok() {
            reopen(&node, false).await.unwrap();
        }
        write(&node, 16384, 512, 9).await.unwrap();
        close(node).await.unwrap();
        assert_eq!(
            findings(disk.snapshot()).await,
            Vec::<String>::new(),
            "{nth}"
        );
        let (copy, _) = reopened(&disk).await;
        assert_eq!(dirty(&copy, "b"), [(8192, 9216), (16384, 16896)], "{nth}");
    }
    assert!(told > 8, "{told} errors were told");
}

// INV QCOW2-BITMAP-1: what changes a bitmap and no data counts, too.
#[tokio::test]
async fn a_bitmap_that_is_changed_by_hand_is_in_use_before() {
    for what in 0..6 {
        let disk = CrashDriver::new(image_with_bitmap().await);
        let (node, _image) = open_on(disk.clone(), None).await;
        let source = node.add_dirty_bitmap(NewBitmap::new("source")).await;
        match what {
            0 => node.clear_dirty_bitmap("b").await.unwrap(),
            1 => node.enable_dirty_bitmap("b", false).await.unwrap(),
            2 => drop(node.freeze_dirty_bitmap("b").await.unwrap()),
            3 => {
                let source = source.unwrap();
                node.merge_dirty_bitmap("b", &source).await.unwrap();
            }
            4 => node.truncate(TruncateRequest::to(512)).await.unwrap(),
            _ => {
                let mut options = Options::new();
                options.set("size", "1M");
                node.amend(options).await.unwrap();
            }
        }
        let (copy, _) = reopened(&disk).await;
        let b = copy.dirty_bitmap("b").unwrap();
        assert!(b.is_inconsistent(), "{what}");
        close(node).await.unwrap();
        let (copy, _) = reopened(&disk).await;
        let b = copy.dirty_bitmap("b").unwrap();
        assert!(!b.is_inconsistent());
        assert_eq!(b.is_enabled(), what != 1);
        assert!(copy.dirty_bitmap("source").is_err(), "not persistent");
    }
}

#[tokio::test]
async fn a_bitmap_that_takes_the_name_of_a_removed_one_takes_nothing_else() {
    let disk = CrashDriver::new(image_with_bitmap().await);
    let (node, _image) = open_on(disk.clone(), None).await;
    write(&node, 0, 512, 1).await.unwrap();
    close(node).await.unwrap();
    let (node, _image) = open_on(disk.clone(), None).await;
    node.remove_dirty_bitmap("b").await.unwrap();
    let coarse = NewBitmap {
        granularity: Some(65536),
        ..stored("b")
    };
    node.add_dirty_bitmap(coarse).await.unwrap();
    close(node).await.unwrap();
    let (copy, _) = reopened(&disk).await;
    assert_eq!(dirty(&copy, "b"), []);
    assert_eq!(copy.dirty_bitmap("b").unwrap().granularity(), 65536);
    assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
}

#[tokio::test]
async fn what_a_backup_has_taken_is_stored_as_dirty() {
    let disk = CrashDriver::new(image_with_bitmap().await);
    let (node, _image) = open_on(disk.clone(), None).await;
    write(&node, 0, 512, 1).await.unwrap();
    let frozen = node.freeze_dirty_bitmap("b").await.unwrap();
    write(&node, 8192, 512, 1).await.unwrap();
    close(node).await.unwrap();
    drop(frozen);
    let (copy, _) = reopened(&disk).await;
    assert_eq!(dirty(&copy, "b"), [(0, 512), (8192, 8704)]);
}

// INV REQ-PARK-1: who is the first to change something and is never polled again holds up nobody.
#[tokio::test]
async fn a_parked_first_change_holds_up_nobody() {
    let disk = CrashDriver::new(image_with_bitmap().await);
    let (node, _image) = open_on(disk.clone(), None).await;
    let mut parked = Box::pin(write(&node, 0, 512, 1));
    assert!(parked.as_mut().now_or_never().is_none());
    let other = write(&node, 65536, 512, 2);
    let other = tokio::time::timeout(std::time::Duration::from_secs(5), other);
    other.await.expect("it doesn't hang").unwrap();
    drop(parked);
    close(node).await.unwrap();
    let (copy, _) = reopened(&disk).await;
    let bits = dirty(&copy, "b");
    assert!(bits.contains(&(65536, 66048)), "{bits:?}");
}

// INV QCOW2-BITMAP-1: no change without the mark.
#[tokio::test]
async fn a_copy_that_cannot_be_marked_stops_the_change() {
    for event in [Event::Write, Event::Flush] {
        let disk = CrashDriver::new(image_with_bitmap().await);
        let driver = FaultDriver::new(Box::new(disk.clone()));
        let faults = driver.faults();
        let file = driver.into_node(NodeFlags::default()).await.unwrap();
        let (node, _image) = open_over(file, None).await.unwrap();
        faults.add(Rule::fail(event, libc::EIO).only(0));
        assert!(write(&node, 0, 512, 1).await.is_err());
        assert!(read_all(&node).await.iter().all(|&b| b == 0));
        // The next change tries again.
        write(&node, 0, 512, 1).await.unwrap();
        let (copy, _) = reopened(&disk).await;
        assert!(copy.dirty_bitmap("b").unwrap().is_inconsistent());
        close(node).await.unwrap();
        let (copy, _) = reopened(&disk).await;
        assert_eq!(dirty(&copy, "b"), [(0, 512)]);
    }
}

/// Sets one byte of an image.
fn poked(mut image: Vec<u8>, at: usize, value: u8) -> Vec<u8> {
    image[at] = value;
    image
}

const AUTOCLEAR: usize = 95;

#[tokio::test]
async fn bitmaps_of_a_program_that_does_not_know_them_are_dropped() {
    let image = poked(image_with_bitmap().await, AUTOCLEAR, 0);
    let disk = CrashDriver::new(image);
    let (node, image) = open_on(disk.clone(), None).await;
    assert!(node.dirty_bitmaps().is_empty());
    assert!(image.header().extensions.is_empty());
    write(&node, 0, 512, 1).await.unwrap();
    node.add_dirty_bitmap(stored("b")).await.unwrap();
    write(&node, 512, 512, 1).await.unwrap();
    close(node).await.unwrap();
    let (copy, _) = reopened(&disk).await;
    assert_eq!(dirty(&copy, "b"), [(512, 1024)]);
    assert_eq!(corruptions(disk.snapshot()).await, Vec::<String>::new());
    // The other way round: a bit that means nothing.
    let image = poked(fresh_image(Shape::small(DISK)), AUTOCLEAR, 1);
    let disk = CrashDriver::new(image);
    let (node, _image) = open_on(disk.clone(), None).await;
    close(node).await.unwrap();
    assert_eq!(disk.snapshot()[AUTOCLEAR], 0);
}

async fn opened(bytes: Vec<u8>) -> Result<Arc<Image>, BlockError> {
    let file = CrashDriver::new(bytes).into_node(READ_ONLY).await.unwrap();
    let file = Child::new("file", ChildRole::File, file);
    let header = Header::read(&file).await?;
    crate::open::open_image(file, None, header, Diagnostics::default())
        .await
        .map(Arc::new)
}

/// Byte offsets of directory and table of the only bitmap of an image.
async fn places(bytes: &[u8]) -> (usize, usize) {
    let image = opened(bytes.to_vec()).await.unwrap();
    let stored = image.bitmaps.stored();
    let table = stored.bitmaps[0].entry.table_offset as usize;
    (stored.directory.unwrap().0 as usize, table)
}

#[tokio::test]
async fn bitmaps_that_ask_for_more_than_the_file_has_are_refused() {
    // One bit in each of many clusters of bits.
    let size = 512 << 20;
    let disk = CrashDriver::new(fresh_image(Shape::small(size)));
    let (node, _image) = open_on(disk.clone(), None).await;
    node.add_dirty_bitmap(stored("b")).await.unwrap();
    node.pwrite_zeroes(0, 512, WriteFlags::empty())
        .await
        .unwrap();
    close(node).await.unwrap();
    let image = disk.snapshot();
    let (directory, table) = places(&image).await;
    let text = async |bytes: Vec<u8>| opened(bytes).await.err().map(|e| e.text());
    // All of them are the same cluster.
    let mut same = image.clone();
    for entry in 1..32 {
        same.copy_within(table..table + 8, table + 8 * entry);
    }
    assert_eq!(
        text(same).await.as_deref(),
        Some("Could not read bitmap 'b' from image: The bitmaps have more bytes than the file")
    );
    let mut long = image.clone();
    long[directory + 8..directory + 12].copy_from_slice(&0x2_0000u32.to_be_bytes());
    let wanted = "The tables of the bitmaps have 1048576 bytes, more than the file";
    assert_eq!(text(long).await.as_deref(), Some(wanted));
    let mut odd = image.clone();
    odd[table + 6] = 2;
    let wanted = "Could not read bitmap_table table from image for bitmap 'b': Invalid argument";
    assert_eq!(text(odd).await.as_deref(), Some(wanted));
    let short = poked(image, directory + 17, 10);
    let wanted = "Could not read bitmap 'b' from image: Invalid argument";
    assert_eq!(text(short).await.as_deref(), Some(wanted));
}

// INV QCOW2-META-1
#[tokio::test]
async fn metadata_that_a_table_names_is_not_freed_with_the_bitmap() {
    let disk = CrashDriver::new(image_with_bitmap().await);
    let (node, _image) = open_on(disk.clone(), None).await;
    write(&node, 0, 512, 1).await.unwrap();
    close(node).await.unwrap();
    let mut image = disk.snapshot();
    let (_, table) = places(&image).await;
    // The cluster of bits is the L1 table.
    image[table..table + 8].copy_from_slice(&(3 * CLUSTER).to_be_bytes());
    let disk = CrashDriver::new(image);
    let (node, _image) = open_on(disk.clone(), None).await;
    node.remove_dirty_bitmap("b").await.unwrap();
    close(node).await.unwrap();
    let (node, _image) = reopened(&disk).await;
    assert_eq!(corruptions(disk.snapshot()).await, Vec::<String>::new());
    assert_eq!(read_all(&node).await[..512], [1; 512]);
    // And data is never written over a bitmap.
    let disk = CrashDriver::new(image_with_bitmap().await);
    let (_, image) = open_on(disk.clone(), None).await;
    for (host, bytes, _) in image.bitmaps.stored().places() {
        assert!(image.check_data_write(host, bytes).is_err());
    }
}

const LATER_FIELD: [u8; 8] = [0x77; 8];

/// An image as QEMU makes it: names of feature bits, so that a bitmap makes the header longer than a sector, and the name of a backing file behind them.
fn with_long_header(cluster_bits: u32) -> Vec<u8> {
    let shape = Shape {
        cluster_bits,
        ..Shape::small(DISK)
    };
    let mut image = fresh_image(shape);
    let name = b"some/backing/file.qcow2";
    let mut extensions = Vec::new();
    if cluster_bits > 9 {
        extensions.push(extension::feature_names());
    }
    if cluster_bits > 12 {
        extensions.push(Extension {
            kind: 0x1234_5678,
            data: vec![7; 40],
        });
    }
    let mut header_bytes = 104;
    if cluster_bits > 13 {
        // A later release has a field more.
        header_bytes = 120;
        image[100..104].copy_from_slice(&120u32.to_be_bytes());
        image[112..120].copy_from_slice(&LATER_FIELD);
    }
    let area = extension::encode(&extensions);
    let at = header_bytes + area.len();
    image[header_bytes..at].copy_from_slice(&area);
    image[at..at + name.len()].copy_from_slice(name);
    image[8..16].copy_from_slice(&(at as u64).to_be_bytes());
    image[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
    image
}

// INV QCOW2-ORD-6: the header is the old one or the new one.
#[tokio::test]
async fn a_header_that_becomes_longer_or_shorter_is_never_half_there() {
    let seed = Rng::seed_from_env();
    for cluster_bits in [9, 10, 11, 12, 13, 16] {
        let disk = CrashDriver::new(with_long_header(cluster_bits));
        for step in 0..3 {
            let (node, _image) = open_on(disk.clone(), None).await;
            match step {
                0 => drop(node.add_dirty_bitmap(stored("b")).await.unwrap()),
                1 => write(&node, 0, 512, 1).await.unwrap(),
                _ => node.remove_dirty_bitmap("b").await.unwrap(),
            }
            close(node).await.unwrap();
        }
        for cut in 0..=disk.log_len() {
            for keep in [0, 30, 70, 100] {
                let mut rng = Rng::new(seed.wrapping_add(cut as u64 * 4 + keep));
                let bytes = disk.image_after(cut, keep, &mut rng);
                let what = format!("clusters of 2^{cluster_bits}, cut {cut}, {keep}%");
                let opened = opened(bytes.clone()).await;
                let image = opened.unwrap_or_else(|e| panic!("{what}: {e}"));
                let header = image.header().clone();
                let backing = header.backing.map(|b| b.filename);
                assert_eq!(
                    backing.as_deref(),
                    Some("some/backing/file.qcow2"),
                    "{what}"
                );
                let kept = header.extensions.iter().any(|e| e.kind == 0x1234_5678);
                assert_eq!(kept, cluster_bits > 12, "{what}");
                let later = header.unknown_fields == LATER_FIELD;
                assert_eq!(later, cluster_bits > 13, "{what}");
                assert_eq!(corruptions(bytes).await, Vec::<String>::new(), "{what}");
            }
        }
        let header = opened(disk.snapshot()).await.unwrap().header().clone();
        let names = |e: &Extension| e.kind == extension::FEATURE_NAMES;
        let has_names = header.extensions.iter().any(names);
        assert_eq!(has_names, cluster_bits > 9, "people's names stay");
        assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
    }
}

#[tokio::test]
async fn a_downgrade_takes_the_bitmaps_away() {
    let disk = CrashDriver::new(image_with_bitmap().await);
    let (node, _image) = open_on(disk.clone(), None).await;
    write(&node, 0, 512, 1).await.unwrap();
    let mut options = Options::new();
    options.set("compat", "0.10");
    node.amend(options).await.unwrap();
    // Nothing names their clusters any more, so a repair would free what is freed again at closing.
    let found = node.check(CheckFix::Leaks).await.unwrap();
    assert_eq!(found.messages, Vec::<String>::new());
    write(&node, 512, 512, 1).await.unwrap();
    let again = node.add_dirty_bitmap(stored("c")).await.unwrap_err().text();
    assert!(again.ends_with("Cannot store dirty bitmaps in qcow2 v2 files"));
    close(node).await.unwrap();
    assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
    let (node, image) = reopened(&disk).await;
    assert!(node.dirty_bitmaps().is_empty() && image.header().extensions.is_empty());
    assert_eq!(try_read_all(&node).await.unwrap()[..1024], [1; 1024]);
}
