// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images that were made to do harm, or were damaged. More of them in `check/tests`, `header/tests`, `snapshot/tests` and the golden scripts `bad-*`.

use blockcore::testing::fault::{Event, Rule};
use blockcore::testing::{CrashDriver, FaultDriver};
use blockcore::{Child, ChildRole, Diagnostics, NodeFlags, Options, SnapshotRequest, WriteFlags};

use super::{
    Shape, findings, fresh_image, image_over, node_over, open_on, open_with_faults, read_all, write,
};
use crate::format::OFLAG_COPIED;
use crate::header::Header;
use crate::l2_entry::L2Entry;
use crate::open::open_image;

const CLUSTER: u64 = 4096;
const DIRTY: u8 = 1;
const CORRUPT: u8 = 2;

// INV QCOW2-META-1: giving back a cluster that is metadata by another entry must neither free it nor make a hole of it.
#[tokio::test]
async fn a_discard_never_hits_metadata() {
    for (entry, what) in [
        (CLUSTER | OFLAG_COPIED, "refcount table"),
        ((2 * CLUSTER) | OFLAG_COPIED, "refcount block"),
        ((3 * CLUSTER) | OFLAG_COPIED, "active L1 table"),
        ((4 * CLUSTER) | OFLAG_COPIED, "active L2 table"),
        (1 << 62, "qcow2_header"),
    ] {
        let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
        let (node, image) = open_on(disk.clone(), None).await;
        for offset in [0, 8192] {
            node.pwritev(offset, vec![1; 512].into(), WriteFlags::empty())
                .await
                .unwrap();
        }
        node.flush().await.unwrap();
        let mut meta = image.meta.lock().await;
        image
            .set_entry(&mut meta, 0, L2Entry::one_word(entry))
            .await
            .unwrap();
        drop(meta);
        let mut before = disk.snapshot();
        let err = node.pdiscard(0, CLUSTER).await.unwrap_err();
        assert!(err.to_string().contains(what), "{err}");
        assert!(node.flush().await.is_err());
        before[79] |= CORRUPT;
        assert!(disk.snapshot() == before, "{what}: nothing else changed");
    }
}

// The image is known to be corrupt on disk only when the bit is there.
#[tokio::test]
async fn the_corrupt_bit_is_tried_again() {
    let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
    let (node, image, faults) = open_with_faults(disk.clone()).await;
    node.pwritev(0, vec![1; 512].into(), WriteFlags::empty())
        .await
        .unwrap();
    let mut meta = image.meta.lock().await;
    image
        .set_entry(&mut meta, 0, L2Entry::one_word(CLUSTER | OFLAG_COPIED))
        .await
        .unwrap();
    drop(meta);
    faults.add(
        Rule::fail(Event::Write, libc::EIO)
            .within(0..CLUSTER)
            .only(0),
    );
    assert!(node.pdiscard(0, CLUSTER).await.is_err());
    assert_eq!(disk.snapshot()[79], 0);
    assert!(node.pdiscard(0, CLUSTER).await.is_err());
    assert_eq!(disk.snapshot()[79], CORRUPT);
}

/// Opens an image for writing, and says what it answers.
async fn open_for_writing(disk: CrashDriver) -> Result<(), String> {
    let file = disk.into_node(NodeFlags::default()).await.unwrap();
    let file = Child::new("file", ChildRole::File, file);
    let header = Header::read(&file).await.map_err(|e| e.to_string())?;
    let image = open_image(file, None, header, Diagnostics::new(|_| {})).await;
    let image = image.map_err(|e| e.to_string())?;
    image.prepare_writing().await.map_err(|e| e.to_string())
}

#[tokio::test]
async fn offsets_at_their_extremes_are_no_surprise() {
    let mut bytes = fresh_image(Shape::small(1 << 20));
    bytes[4096 + 8..4096 + 16].copy_from_slice(&0xffff_ffff_ffff_f000u64.to_be_bytes());
    let _answer = open_for_writing(CrashDriver::new(bytes)).await;
    let mut bytes = fresh_image(Shape::small(1 << 20));
    bytes.resize(5 * 4096, 0);
    bytes[60..64].copy_from_slice(&1u32.to_be_bytes());
    bytes[64..72].copy_from_slice(&(4 * CLUSTER).to_be_bytes());
    bytes[4 * 4096..4 * 4096 + 8].copy_from_slice(&u64::MAX.to_be_bytes());
    bytes[4 * 4096 + 8..4 * 4096 + 12].copy_from_slice(&1u32.to_be_bytes());
    let _answer = open_for_writing(CrashDriver::new(bytes)).await;
}

// A search for a free cluster ends, though one full refcount block, named everywhere in the table, claims 2^35 clusters.
#[tokio::test]
async fn refcounts_that_call_everything_used_hold_up_nobody() {
    let shape = Shape {
        refcount_order: 0,
        ..Shape::small(1 << 20)
    };
    let mut bytes = fresh_image(shape);
    let table = bytes.len();
    let table_bytes = 8 << 20;
    let block = (table + table_bytes) as u64;
    for _ in 0..table_bytes / 8 {
        bytes.extend(block.to_be_bytes());
    }
    bytes.extend([0xff; CLUSTER as usize]);
    bytes[48..56].copy_from_slice(&(table as u64).to_be_bytes());
    bytes[56..60].copy_from_slice(&((table_bytes as u64 / CLUSTER) as u32).to_be_bytes());
    let (node, _image) = open_on(CrashDriver::new(bytes), None).await;
    let writing = node.pwritev(0, vec![1; 4096].into(), WriteFlags::empty());
    let limit = std::time::Duration::from_secs(60);
    let answer = tokio::time::timeout(limit, writing).await;
    let err = answer.expect("an answer in time").unwrap_err();
    assert_eq!(err.kind(), blockcore::ErrorKind::Corrupt, "{err}");
    assert!(node.flush().await.is_ok(), "nothing was changed");
}

// INV QCOW2-META-2: an image that was not closed is repaired when it is opened: where two entries share a cluster, no flag says otherwise.
#[tokio::test]
async fn a_dirty_image_with_wrong_flags_is_not_written_in_place() {
    for shared in [false, true] {
        let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
        let (node, image) = open_on(disk.clone(), None).await;
        write(&node, 0, 4096, 1).await.unwrap();
        let first = image.l2.entry_now(0).unwrap();
        if shared {
            let mut meta = image.meta.lock().await;
            image.set_entry(&mut meta, 1, first).await.unwrap();
        }
        node.flush().await.unwrap();
        let mut bytes = disk.snapshot();
        bytes[79] |= DIRTY;
        let disk = CrashDriver::new(bytes);
        let (node, _image) = open_on(disk.clone(), None).await;
        assert_eq!(findings(disk.snapshot()).await, [""; 0], "shared: {shared}");
        assert_eq!(disk.snapshot()[79] & DIRTY, 0);
        write(&node, 0, 512, 2).await.unwrap();
        let second = read_all(&node).await[4096];
        assert_eq!(second, u8::from(shared), "its neighbour was not written");
    }
}

// A change of the whole image copies its refcount blocks, once each: a table that names one again and again would fill the disk with copies.
#[tokio::test]
async fn a_refcount_block_with_many_names_is_not_copied_for_each() {
    let mut bytes = fresh_image(Shape::small(1 << 20));
    let table = CLUSTER as usize;
    for entry in 1..CLUSTER as usize / 8 {
        bytes.copy_within(table..table + 8, table + 8 * entry);
    }
    let before = bytes.len();
    for width in ["16", "64"] {
        let disk = CrashDriver::new(bytes.clone());
        let (node, _image) = open_on(disk.clone(), None).await;
        let result = match width {
            "16" => node.snapshot_create(SnapshotRequest::now("s")).await,
            bits => {
                let options = Options::new().with("refcount_bits", bits);
                node.amend(options).await
            }
        };
        let err = result.unwrap_err();
        assert_eq!(err.kind(), blockcore::ErrorKind::Corrupt, "{err}");
        assert!(disk.snapshot().len() < before + 4 * CLUSTER as usize);
    }
}

// A repair that fails half way has perhaps named other refcounts in the header; the next one begins with those.
#[tokio::test]
async fn a_dirty_image_is_repaired_at_the_second_try() {
    let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
    let (node, _image) = open_on(disk.clone(), None).await;
    write(&node, 0, 8 * 4096, 1).await.unwrap();
    node.driver().close().await.unwrap();
    let mut bytes = disk.snapshot();
    bytes[79] |= DIRTY;
    // The refcount table names no block.
    bytes[CLUSTER as usize..CLUSTER as usize + 8].fill(0);
    for nth in 0.. {
        let disk = CrashDriver::new(bytes.clone());
        let driver = FaultDriver::new(Box::new(disk.clone()));
        let faults = driver.faults();
        let file = driver.into_node(NodeFlags::default()).await.unwrap();
        let image = image_over(file, None).await.unwrap();
        faults.add(Rule::fail_all(libc::EIO).only(nth));
        if image.prepare_writing().await.is_ok() {
            assert!(nth > 10, "{nth} requests");
            break;
        }
        faults.clear();
        image.prepare_writing().await.unwrap();
        assert_eq!(findings(disk.snapshot()).await, [""; 0], "request {nth}");
        let node = node_over(image, NodeFlags::default()).await;
        let all = read_all(&node).await;
        assert!(all[..8 * 4096].iter().all(|b| *b == 1), "request {nth}");
    }
}
