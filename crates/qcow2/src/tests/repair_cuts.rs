// SPDX-License-Identifier: MIT OR Apache-2.0
//! Power cuts in repairs, each with the smallest damage that needs one flush. The method: the power is cut at every place of the log, with nothing, everything
//! and any part of what was not flushed. What is left is no worse than the damaged image.

use blockcore::SnapshotRequest;
use blockcore::testing::{CrashDriver, Rng};

use super::repair_rules::{put, repair, with_data, word};
use super::{
    Shape, corruptions, findings, fresh_image, open_image_read_only, open_on, read_all, write,
};
use crate::format::{L1E_OFFSET_MASK, L2E_OFFSET_MASK, OFLAG_COPIED, OFLAG_ZERO};
use crate::refcount::{get_refcount, set_refcount};

const CLUSTER: usize = 4096;
/// Byte offset of the incompatible feature bits in the header; those that say "dirty" and "corrupt".
const FEATURES: usize = 72;
const DIRTY: u64 = 1;
const CORRUPT: u64 = 2;

/// What power cuts can leave of what was done to a disk.
fn cuts(disk: &CrashDriver) -> impl Iterator<Item = (String, Vec<u8>)> {
    (0..=disk.log_len()).flat_map(move |cut| {
        let parts = (0..16).map(|seed| (50, seed));
        let all = [(0, 0), (100, 0)].into_iter().chain(parts);
        all.map(move |(keep, seed)| {
            let story = format!("cut at {cut}, {keep}% kept, seed {seed}");
            (story, disk.image_after(cut, keep, &mut Rng::new(seed)))
        })
    })
}

/// What is wrong with an image and may cost data. That doesn't go for what is counted although nobody uses it, nor for a flag that lacks.
async fn dangers(image: Vec<u8>) -> Vec<String> {
    let mut lines = corruptions(image).await;
    let lacks_flag = |l: &str| l.contains("OFLAG_COPIED") && l.ends_with("refcount=1");
    lines.retain(|l| !l.starts_with("Leaked") && !lacks_flag(l));
    lines
}

/// Asserts that a state which a power cut has left has no danger that the damaged image hadn't.
async fn assert_no_worse(damaged: &[String], left: Vec<u8>, story: &str) {
    for line in dangers(left).await {
        assert!(damaged.contains(&line), "{story}: {line}");
    }
}

/// Asserts that after a repair, cut anywhere, an image which has no mark any more is sound.
async fn assert_marks_go_last(disk: &CrashDriver) {
    let mut sound = 0;
    for (story, left) in cuts(disk) {
        if word(&left, FEATURES) as u64 & (DIRTY | CORRUPT) == 0 {
            sound += 1;
            assert_eq!(corruptions(left).await, [""; 0], "{story}");
        }
    }
    assert!(sound > 0);
}

/// The place of the first L2 table.
fn l2_table(image: &[u8]) -> usize {
    word(image, word(image, 40)) & L1E_OFFSET_MASK as usize
}

fn refcount_block(image: &mut [u8]) -> &mut [u8] {
    let block = word(image, word(image, 48));
    &mut image[block..block + CLUSTER]
}

fn refcount(image: &[u8], host: u64) -> u64 {
    let block = word(image, word(image, 48));
    get_refcount(&image[block..block + CLUSTER], 4, host / CLUSTER as u64)
}

fn set_refcount_of(image: &mut [u8], host: u64, to: u64) {
    set_refcount(refcount_block(image), 4, host / CLUSTER as u64, to);
}

/// An image as [`with_data`] makes, and a snapshot "a" of it; the first cluster is 2 since.
async fn with_snapshot() -> Vec<u8> {
    let disk = CrashDriver::new(with_data().await);
    let (node, _image) = open_on(disk.clone(), None).await;
    let request = SnapshotRequest::now("a");
    node.snapshot_create(request).await.unwrap();
    write(&node, 0, CLUSTER, 2).await.unwrap();
    node.driver().close().await.unwrap();
    disk.snapshot()
}

// INV QCOW2-REPAIR-2: the table that is completed lies elsewhere, and is durable before the header names it; the old place is not free before that is durable.
#[tokio::test]
async fn a_completed_snapshot_table_is_there_before_it_is_named() {
    let mut image = with_snapshot().await;
    let table = word(&image, 64);
    // No extra data: id and name follow at once.
    let extra = image[table + 36..table + 40].to_vec();
    let extra = u32::from_be_bytes(extra.try_into().unwrap()) as usize;
    image.copy_within(table + 40 + extra..table + 42 + extra, table + 40);
    image[table + 36..table + 40].fill(0);
    let damaged = corruptions(image.clone()).await;
    assert_eq!(damaged, ["ERROR snapshot table entry 0 is incomplete"]);
    let disk = CrashDriver::new(image);
    assert_eq!(repair(&disk).await.corruptions_fixed, 1);
    assert_ne!(word(&disk.snapshot(), 64), table, "it has moved");
    for (story, left) in cuts(&disk) {
        let (node, _image) = open_on(CrashDriver::new(left.clone()), None).await;
        let snapshots = node.snapshots().await.unwrap();
        assert_eq!(snapshots[0].name, "a", "{story}");
        assert_no_worse(&damaged, left, &story).await;
    }
}

// INV QCOW2-REPAIR-5: a flag that is wrong lets a writer change what a snapshot shares.
#[tokio::test]
async fn a_mark_stays_until_flags_are_durably_right() {
    let mut image = with_snapshot().await;
    // The second cluster is the snapshot's, too.
    let at = l2_table(&image) + 8;
    let entry = word(&image, at) as u64;
    put(&mut image, at, entry | OFLAG_COPIED);
    put(&mut image, FEATURES, DIRTY | CORRUPT);
    let disk = CrashDriver::new(image);
    assert_eq!(repair(&disk).await.corruptions_fixed, 1);
    assert_marks_go_last(&disk).await;
}

// INV QCOW2-REPAIR-5: refcounts that are too low are durably right, too; here no flag has to be changed, and so nothing else flushes.
#[tokio::test]
async fn a_mark_stays_until_refcounts_are_durably_right() {
    let mut image = with_snapshot().await;
    let host = word(&image, l2_table(&image) + 8) as u64 & L2E_OFFSET_MASK;
    assert_eq!(refcount(&image, host), 2);
    set_refcount_of(&mut image, host, 1);
    put(&mut image, FEATURES, DIRTY | CORRUPT);
    let disk = CrashDriver::new(image);
    assert!(repair(&disk).await.corruptions_fixed > 0);
    assert_marks_go_last(&disk).await;
}

// INV QCOW2-REPAIR-5: the same for an entry that could do without its impossible place.
#[tokio::test]
async fn a_mark_stays_until_entries_are_durably_mended() {
    let mut image = with_data().await;
    let at = l2_table(&image) + 20 * 8;
    put(&mut image, at, 1 << 40 | 512 | OFLAG_ZERO);
    put(&mut image, FEATURES, CORRUPT);
    let disk = CrashDriver::new(image);
    assert_eq!(repair(&disk).await.corruptions_fixed, 1);
    assert_eq!(word(&disk.snapshot(), at) as u64, OFLAG_ZERO);
    assert_marks_go_last(&disk).await;
}

// INV QCOW2-REPAIR-1: who writes to a cluster without the flag copies it and takes its reference away. One that was not counted is the other entry's. Where all
// refcounts are written anew, and nothing is lowered since an entry names an impossible place, the header names the new ones durably before.
#[tokio::test]
async fn refcounts_are_raised_before_flags_go() {
    for is_rebuilt in [false, true] {
        let mut image = with_data().await;
        let table = l2_table(&image);
        let entry = word(&image, table) as u64;
        assert!(entry & OFLAG_COPIED != 0);
        // What the second entry named is named by another.
        let second = word(&image, table + 8) as u64;
        put(&mut image, table + 20 * 8, second);
        put(&mut image, table + 8, entry);
        if is_rebuilt {
            let refcounts = word(&image, 48);
            put(&mut image, refcounts + 8, 1);
            put(&mut image, table + 21 * 8, 1 << 40 | OFLAG_COPIED);
        }
        let disk = CrashDriver::new(image);
        let result = repair(&disk).await;
        assert!(result.corruptions_fixed > 0, "{:?}", result.messages);
        let host = entry & L2E_OFFSET_MASK;
        let mut flagless = 0;
        for (story, left) in cuts(&disk) {
            let entries = [table, table + 8].map(|at| word(&left, at) as u64);
            assert_eq!(entries.map(|e| e & L2E_OFFSET_MASK), [host; 2]);
            if entries.iter().any(|e| e & OFLAG_COPIED == 0) {
                flagless += 1;
                let counted = refcount(&left, host);
                assert_eq!(counted, 2, "rebuilt: {is_rebuilt}, {story}");
            }
        }
        assert!(flagless > 0);
    }
}

// INV QCOW2-REPAIR-1: and they are lowered before flags come.
#[tokio::test]
async fn refcounts_are_lowered_before_flags_come() {
    let mut image = with_data().await;
    let table = l2_table(&image);
    let host = word(&image, table) as u64 & L2E_OFFSET_MASK;
    put(&mut image, table, host);
    set_refcount_of(&mut image, host, 2);
    let disk = CrashDriver::new(image);
    assert_eq!(repair(&disk).await.leaks_fixed, 1);
    assert_eq!(findings(disk.snapshot()).await, [""; 0]);
    for (story, left) in cuts(&disk) {
        assert_eq!(dangers(left).await, [""; 0], "{story}");
    }
}

// INV QCOW2-ORD-1, INV QCOW2-REPAIR-1: an L2 table in a cluster that is guest data as well gets a place of its own. That is counted, and the table is there,
// before the L1 entry names it; and the old place has one reference less when the entry durably names it no more.
#[tokio::test]
async fn a_table_that_moves_is_there_before_it_is_named() {
    let disk = CrashDriver::new(fresh_image(Shape::small(4 << 20)));
    let (node, _image) = open_on(disk.clone(), None).await;
    write(&node, 0, CLUSTER, 0).await.unwrap();
    write(&node, CLUSTER as u64, CLUSTER, 5).await.unwrap();
    node.driver().close().await.unwrap();
    let mut image = disk.snapshot();
    let (l1, l2) = (word(&image, 40), l2_table(&image));
    let hosts = [l2, l2 + 8].map(|at| word(&image, at) as u64 & L2E_OFFSET_MASK);
    let [table, data] = hosts;
    // The first guest cluster is what the second L1 entry names as its table; and its first entry names the second guest cluster, with a flag that is wrong.
    put(&mut image, table as usize, data | OFLAG_COPIED);
    put(&mut image, l1 + 8, table);
    put(&mut image, l2, table);
    put(&mut image, l2 + 8, data);
    for host in hosts {
        set_refcount_of(&mut image, host, 2);
    }
    let damaged = dangers(image.clone()).await;
    assert_eq!(damaged.len(), 1, "{damaged:?}");
    let first = image[table as usize..][..CLUSTER].to_vec();
    let disk = CrashDriver::new(image);
    assert_eq!(repair(&disk).await.corruptions_fixed, 1);
    assert_eq!(findings(disk.snapshot()).await, [""; 0]);
    for (story, left) in cuts(&disk) {
        let node = open_image_read_only(left.clone(), None).await;
        let all = read_all(&node).await;
        assert!(all[..CLUSTER] == first, "{story}");
        let second_table = &all[2 << 20..][..CLUSTER];
        assert!(second_table == [5; CLUSTER], "{story}");
        assert_no_worse(&damaged, left, &story).await;
    }
}

// INV QCOW2-REPAIR-4: the file ends in the middle of a cluster, which reads as zero behind the end, and grows with noise. What is zeroed there is durable
// before anything behind it makes the file longer. (A cut in the middle of the zeroing shows noise: nothing can be done about that.)
#[tokio::test]
async fn what_a_file_grows_over_is_durably_zero_before_it_grows() {
    let mut image = with_data().await;
    let table = l2_table(&image);
    let places = (0..16).map(|i| word(&image, table + 8 * i) as u64 & L2E_OFFSET_MASK);
    let (guest, last) = places.enumerate().max_by_key(|p| p.1).unwrap();
    let tail = guest * CLUSTER + 512..(guest + 1) * CLUSTER;
    assert_eq!(image.len(), last as usize + CLUSTER);
    image.truncate(last as usize + 512);
    // The only refcount block is nowhere.
    let refcounts = word(&image, 48);
    put(&mut image, refcounts, 1 << 40);
    let disk = CrashDriver::new(image).growing_with(0xa5);
    repair(&disk).await;
    let grows = |&at: &usize| {
        let left = disk.image_after(at, 100, &mut Rng::new(1));
        left.len() > last as usize + CLUSTER
    };
    let grown = (0..=disk.log_len()).find(grows).unwrap();
    for cut in grown..=disk.log_len() {
        for seed in 0..16 {
            let left = disk.image_after(cut, 50, &mut Rng::new(seed));
            let node = open_image_read_only(left, None).await;
            let all = read_all(&node).await;
            let is_zero = all[tail.clone()].iter().all(|b| *b == 0);
            assert!(is_zero, "cut at {cut}, seed {seed}");
        }
    }
}
