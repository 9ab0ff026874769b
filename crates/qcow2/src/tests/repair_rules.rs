// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rules of repairs, one by one, where random damage (`repair`) does not show that they hold.

use blockcore::testing::{CrashDriver, Rng};
use blockcore::{CheckFix, CheckResult, Child, ChildRole, NodeFlags};

use super::{Shape, fresh_image, open_on, read_all, write};
use crate::check::check;
use crate::crypto::CryptMethod;
use crate::format::L1E_OFFSET_MASK;
use crate::header::Header;
use crate::refcount::get_refcount;

const CLUSTER: usize = 4096;

pub(super) fn word(image: &[u8], at: usize) -> usize {
    u64::from_be_bytes(image[at..at + 8].try_into().unwrap()) as usize
}

pub(super) fn put(image: &mut [u8], at: usize, word: u64) {
    image[at..at + 8].copy_from_slice(&word.to_be_bytes());
}

/// An image of 1 MiB whose first 64 KiB are 1.
pub(super) async fn with_data() -> Vec<u8> {
    let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
    let (node, _image) = open_on(disk.clone(), None).await;
    write(&node, 0, 64 << 10, 1).await.unwrap();
    node.driver().close().await.unwrap();
    disk.snapshot()
}

pub(super) async fn repair(disk: &CrashDriver) -> CheckResult {
    let file = disk.clone().into_node(NodeFlags::default()).await.unwrap();
    let file = Child::new("file", ChildRole::File, file);
    let header = Header::read_for_check(&file).await.unwrap();
    check(&header, &file, CheckFix::All).await.unwrap()
}

/// Turns one bit of the only L1 entry, so that it names no place there is, and damages the refcounts as well if asked; repairs that; turns the bit again.
async fn after_a_flipped_bit(without_refcounts: bool) -> (Vec<u8>, CheckResult) {
    let mut image = with_data().await;
    let l1 = word(&image, 40);
    let entry = word(&image, l1) as u64;
    put(&mut image, l1, entry ^ 1 << 45);
    if without_refcounts {
        let table = word(&image, 48);
        put(&mut image, table, 1 << 40);
    }
    let disk = CrashDriver::new(image);
    let result = repair(&disk).await;
    let mut image = disk.snapshot();
    let left = word(&image, l1) as u64 & L1E_OFFSET_MASK;
    assert_eq!(
        left,
        (entry ^ 1 << 45) & L1E_OFFSET_MASK,
        "it can't be known"
    );
    put(&mut image, l1, entry);
    (image, result)
}

// INV QCOW2-REPAIR-4: what the entry once meant is still there, and nobody else gets it.
#[tokio::test]
async fn what_a_flipped_bit_hides_is_kept() {
    for without_refcounts in [false, true] {
        let (image, result) = after_a_flipped_bit(without_refcounts).await;
        assert!(result.corruptions > 0);
        let block = word(&image, word(&image, 48));
        let block = &image[block..block + CLUSTER];
        let l2 = word(&image, word(&image, 40)) & L1E_OFFSET_MASK as usize;
        let hosts = (0..16).map(|i| word(&image, l2 + 8 * i) & L1E_OFFSET_MASK as usize);
        for host in hosts.chain([l2]) {
            let refcount = get_refcount(block, 4, (host / CLUSTER) as u64);
            assert!(
                refcount > 0,
                "{host:#x}, without refcounts: {without_refcounts}"
            );
        }
        let (node, _image) = open_on(CrashDriver::new(image.clone()), None).await;
        assert!(read_all(&node).await[..64 << 10].iter().all(|b| *b == 1));
    }
}

// INV QCOW2-REPAIR-4: what a damaged refcount table names is no refcount block, and nothing to be freed once the refcounts are written anew.
#[tokio::test]
async fn guest_data_that_a_damaged_refcount_table_names_is_kept() {
    let mut image = with_data().await;
    let l2 = word(&image, word(&image, 40)) & L1E_OFFSET_MASK as usize;
    let data = word(&image, l2) & L1E_OFFSET_MASK as usize;
    // Nothing names the data any more, since an entry above it makes no sense; but the refcount table does, for a block that there is not.
    let l1 = word(&image, 40);
    let entry = word(&image, l1) as u64;
    put(&mut image, l1, entry ^ 1 << 45);
    let table = word(&image, 48);
    put(&mut image, table + 8, data as u64);
    // Refcounts have to be written anew.
    put(&mut image, table + 16, 1);
    let disk = CrashDriver::new(image);
    let result = repair(&disk).await;
    assert!(result.corruptions > 0, "{:?}", result.messages);
    let after = disk.snapshot();
    assert!(word(&after, 48) != table, "{:?}", result.messages);
    assert_eq!(after[data], 1, "it was punched");
    let block = word(&after, word(&after, 48));
    let refcount = get_refcount(&after[block..block + CLUSTER], 4, (data / CLUSTER) as u64);
    assert!(refcount > 0, "{:?}", result.messages);
}

// INV QCOW2-REPAIR-4: without its keys an image is lost, whatever else a repair sets right.
#[tokio::test]
async fn keys_that_the_header_does_not_name_any_more_are_kept() {
    let shape = Shape {
        encryption: CryptMethod::Luks,
        ..Shape::small(1 << 20)
    };
    let image = fresh_image(shape);
    let keys = word(&image, 112);
    assert!(image[keys..].starts_with(b"LUKS"));
    // The pointer's type, its offset, its length, the first bytes of what it points at.
    for (at, new) in [
        (104, 0x1537_be77_0000_0010),
        (112, 0),
        (112, 2 * CLUSTER as u64),
        (120, 0),
        (120, 512),
        (keys, 0),
    ] {
        let mut damaged = image.clone();
        put(&mut damaged, at, new);
        let disk = CrashDriver::new(damaged.clone());
        let result = repair(&disk).await;
        let story = format!("{at}: {:?}", result.messages);
        assert!(result.corruptions > 0, "{story}");
        let after = disk.snapshot();
        let block = word(&after, word(&after, 48));
        let refcount = get_refcount(&after[block..block + CLUSTER], 4, (keys / CLUSTER) as u64);
        assert!(refcount > 0, "{story}");
        assert!(
            after[keys..keys + CLUSTER] == damaged[keys..keys + CLUSTER],
            "{story}"
        );
    }
}

// INV QCOW2-REPAIR-5
#[tokio::test]
async fn an_image_that_is_still_damaged_keeps_its_mark() {
    const CORRUPT: u64 = 2;
    let mut image = with_data().await;
    put(&mut image, 72, CORRUPT);
    let disk = CrashDriver::new(image.clone());
    assert_eq!(repair(&disk).await.corruptions, 0);
    assert_eq!(word(&disk.snapshot(), 72), 0, "nothing is wrong with it");
    let l1 = word(&image, 40);
    let entry = word(&image, l1) as u64;
    put(&mut image, l1, entry ^ 1 << 45);
    let disk = CrashDriver::new(image);
    assert!(repair(&disk).await.corruptions > 0);
    assert_eq!(word(&disk.snapshot(), 72) as u64, CORRUPT);
}

// INV QCOW2-REPAIR-2: who opens the image after a power cut allocates by what the header names.
#[tokio::test]
async fn new_refcounts_are_there_before_they_are_named() {
    let mut image = with_data().await;
    let old_table = word(&image, 48);
    // The only refcount block is nowhere.
    put(&mut image, old_table, 1 << 40);
    let disk = CrashDriver::new(image);
    let result = repair(&disk).await;
    assert_eq!(result.corruptions, 0);
    let whole = disk.snapshot();
    let (table, mut named) = (word(&whole, 48), 0);
    assert_ne!(table, old_table);
    let mut rng = Rng::new(1);
    for cut in 0..=disk.log_len() {
        for _ in 0..40 {
            let left = disk.image_after(cut, 50, &mut rng);
            if word(&left, 48) != table {
                continue;
            }
            named += 1;
            assert_eq!(word(&left, table), word(&whole, table), "cut at {cut}");
            // Those of the old refcounts are given back later.
            let block = word(&whole, table);
            let counts = |image: &[u8]| image[block..block + 4096].to_vec();
            for (is, last) in counts(&left).chunks(2).zip(counts(&whole).chunks(2)) {
                assert!(is != [0, 0] || last == [0, 0], "cut at {cut}");
            }
        }
    }
    assert!(named > 0);
}

// INV QCOW2-REPAIR-3: fields of the header that a repair would write are entries of the L1 table here.
#[tokio::test]
async fn a_header_that_is_a_table_as_well_is_left_alone() {
    let mut image = with_data().await;
    // The L1 table is the header, and the only refcount block is nowhere.
    put(&mut image, 40, 0);
    let table = word(&image, 48);
    put(&mut image, table, 1 << 40);
    put(&mut image, 88, 1 << 7);
    for fix in [CheckFix::Leaks, CheckFix::All] {
        let disk = CrashDriver::new(image.clone());
        let file = disk.clone().into_node(NodeFlags::default()).await.unwrap();
        let file = Child::new("file", ChildRole::File, file);
        let header = Header::read_for_check(&file).await.unwrap();
        assert!(check(&header, &file, fix).await.is_err());
        assert!(disk.snapshot() == image, "{fix:?} has changed it");
    }
}

// INV QCOW2-REPAIR-4: what is written anew makes the file longer, but not where a snapshot table that is not believed reads as zero.
#[tokio::test]
async fn what_a_distrusted_snapshot_table_reads_behind_the_end_stays_zero() {
    const SNAPSHOTS: usize = 200;
    let mut image = with_data().await;
    let offset = image.len();
    image.resize(offset + 512, 0);
    put(&mut image, 64, offset as u64);
    image[60..64].copy_from_slice(&(SNAPSHOTS as u32).to_be_bytes());
    // The only refcount block is nowhere.
    let table = word(&image, 48);
    put(&mut image, table, 1 << 40);
    let disk = CrashDriver::new(image);
    repair(&disk).await;
    let after = disk.snapshot();
    assert_eq!(word(&after, 64), offset);
    assert!(after.len() > offset + CLUSTER, "it has new refcounts");
    let end = (offset + SNAPSHOTS * 40).min(after.len());
    assert!(after[offset..end].iter().all(|b| *b == 0));
}
