// SPDX-License-Identifier: MIT OR Apache-2.0
//! Rules of subclusters that random plans (`model`, `crash`, `stress`, with extended L2 entries in some of their runs) would show late, or not by name.
//! What `map` shows of them is in the golden scripts `subcluster-*`.

use blockcore::testing::CrashDriver;
use blockcore::testing::fault::{Event, Rule};
use blockcore::{BlockDriver, TruncateRequest, WriteFlags};

use super::{Shape, findings, forge, fresh_image, open_on, open_with_faults};
use super::{read_all, write};
use crate::driver::Qcow2;
use crate::image::Intent;

/// Bytes in a cluster of [`Shape::extended`], and in a subcluster.
const CLUSTER: u64 = 16384;
const SUBCLUSTER: u64 = 512;

#[tokio::test]
async fn a_disk_says_how_long_its_subclusters_are() {
    let disk = CrashDriver::new(fresh_image(Shape::extended(1 << 20)));
    let (_node, image) = open_on(disk, None).await;
    let driver = Qcow2 { image };
    let info = driver.info().await.unwrap();
    assert_eq!((info.cluster_size, info.subcluster_size), (16384, 512));
    let limits = driver.limits();
    assert_eq!(limits.pwrite_zeroes_alignment, 512);
    assert_eq!(limits.pdiscard_alignment, 16384);
}

// INV QCOW2-ORD-2: a subcluster of a cluster that is there becomes data only when its data is in the file.
#[tokio::test]
async fn a_subcluster_whose_write_fails_stays_what_it_was() {
    for zeroes_first in [false, true] {
        let disk = CrashDriver::new(fresh_image(Shape::extended(4 * CLUSTER)));
        let (node, image, faults) = open_with_faults(disk.clone()).await;
        write(&node, 0, 1024, 1).await.unwrap();
        if zeroes_first {
            write(&node, 2048, 512, 2).await.unwrap();
            let none = WriteFlags::empty();
            node.pwrite_zeroes(2048, 512, none).await.unwrap();
        }
        node.flush().await.unwrap();
        let before = image.l2.entry_now(0).unwrap();
        faults.add(Rule::fail(Event::Write, libc::EIO).only(0));
        write(&node, 2048, 512, 3).await.unwrap_err();
        assert_eq!(image.l2.entry_now(0).unwrap(), before);
        let mut expected = vec![0; 4 * CLUSTER as usize];
        expected[..1024].fill(1);
        assert_eq!(read_all(&node).await, expected);
        node.flush().await.unwrap();
        assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
    }
}

// INV QCOW2-META-2: all data of a shared cluster moves when any of it changes, and the snapshot keeps what it holds.
#[tokio::test]
async fn a_write_to_a_shared_cluster_takes_its_data_along() {
    let backing = vec![9; 2 * CLUSTER as usize];
    for at in [1, 8, 20, 31] {
        let disk = CrashDriver::new(fresh_image(Shape::extended(2 * CLUSTER)));
        let (node, _image) = open_on(disk.clone(), Some(backing.clone())).await;
        write(&node, 5 * SUBCLUSTER, 512, 1).await.unwrap();
        write(&node, 12 * SUBCLUSTER, 1024, 2).await.unwrap();
        let none = WriteFlags::empty();
        let zeroed = node.pwrite_zeroes(8 * SUBCLUSTER, 512, none);
        zeroed.await.unwrap();
        let mut expected = read_all(&node).await;
        node.driver().close().await.unwrap();
        let shared = forge::snapshot(disk.snapshot()).await;
        let below = Some(backing.clone()).into();
        let kept = forge::snapshot_contents(shared.clone(), &below).await;
        assert_eq!(kept, expected);
        let disk = CrashDriver::new(shared);
        let (node, image) = open_on(disk.clone(), &below).await;
        let before = image.mapping(0, Intent::Read).await.unwrap();
        write(&node, at * SUBCLUSTER + 100, 100, 3).await.unwrap();
        expected[(at * SUBCLUSTER + 100) as usize..][..100].fill(3);
        assert_eq!(read_all(&node).await, expected, "{at}");
        let after = image.mapping(0, Intent::Read).await.unwrap();
        assert_ne!(before.referenced(CLUSTER), after.referenced(CLUSTER));
        node.driver().close().await.unwrap();
        assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
        let kept_still = forge::snapshot_contents(disk.snapshot(), &below).await;
        assert_eq!(kept_still, kept);
    }
}

#[tokio::test]
async fn subclusters_behind_the_end_are_forgotten_by_a_growth() {
    let end = CLUSTER + 5 * SUBCLUSTER;
    for backing in [None, Some(vec![7; 3 * CLUSTER as usize])] {
        let disk = CrashDriver::new(fresh_image(Shape::extended(4 * CLUSTER)));
        let (node, _image) = open_on(disk.clone(), backing).await;
        write(&node, 0, 4 * CLUSTER as usize, 66).await.unwrap();
        node.truncate(TruncateRequest::to(end)).await.unwrap();
        node.truncate(TruncateRequest::to(end + 512)).await.unwrap();
        let longer = TruncateRequest::to(4 * CLUSTER);
        node.truncate(longer).await.unwrap();
        let all = read_all(&node).await;
        assert!(all[..end as usize].iter().all(|&b| b == 66));
        assert!(all[end as usize..].iter().all(|&b| b == 0));
        node.driver().close().await.unwrap();
        assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
    }
}

#[tokio::test]
async fn a_bitmap_that_makes_no_sense_is_told_and_never_written() {
    let disk = CrashDriver::new(fresh_image(Shape::extended(4 * CLUSTER)));
    let (node, image) = open_on(disk.clone(), None).await;
    write(&node, 0, 1024, 1).await.unwrap();
    node.driver().close().await.unwrap();
    let slice = image.slice_offset(0).unwrap().unwrap() as usize;
    let mut bytes = disk.snapshot();
    // The first subcluster is zero, too.
    bytes[slice + 8 + 3] |= 1;
    let disk = CrashDriver::new(bytes.clone());
    let (node, _image) = open_on(disk.clone(), None).await;
    let kinds = [
        write(&node, 0, 512, 2).await,
        write(&node, 4096, 512, 2).await,
        node.pwrite_zeroes(4096, 512, WriteFlags::empty()).await,
        node.pdiscard(0, CLUSTER).await,
    ];
    for result in kinds {
        assert_eq!(result.unwrap_err().kind(), blockcore::ErrorKind::Corrupt);
    }
    node.driver().close().await.unwrap();
    // But for the bit that says so.
    let mut marked = bytes;
    marked[79] |= 2;
    assert!(disk.snapshot() == marked);
}
