// SPDX-License-Identifier: MIT OR Apache-2.0
//! Single rules, each with the smallest case that breaks when the rule does.

use blockcore::testing::fault::{Event, Rule};
use blockcore::testing::{CrashDriver, Rng};
use blockcore::{SnapshotRequest, SnapshotSelector, StatusFlags, StatusMode, WriteFlags};
use futures::FutureExt;

use super::{
    Backing, DataFileKind, Shape, corruptions, findings, fresh_image, open_on, open_with_faults,
    read_all, set_data_file, write,
};
use crate::format::{OFLAG_COPIED, OFLAG_ZERO};
use crate::l2_entry::L2Entry;

const CLUSTER: u64 = 4096;

// INV QCOW2-META-1: an L2 entry that points at the refcount table must not let a guest write destroy it.
#[tokio::test]
async fn a_guest_write_never_lands_on_metadata() {
    for (cluster, what) in [
        (0, "header"),
        (1, "refcount table"),
        (2, "refcount block"),
        (3, "active L1"),
        (4, "active L2"),
    ] {
        let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
        let (node, image) = open_on(disk.clone(), None).await;
        node.pwritev(0, vec![1; 512].into(), WriteFlags::empty())
            .await
            .unwrap();
        let mut meta = image.meta.lock().await;
        image
            .set_entry(
                &mut meta,
                0,
                L2Entry::one_word((cluster * CLUSTER) | OFLAG_COPIED),
            )
            .await
            .unwrap();
        drop(meta);
        let before = disk.snapshot();
        if cluster == 0 {
            // An offset of 0 is no data cluster at all.
            continue;
        }
        let err = node
            .pwritev(0, vec![1; 512].into(), WriteFlags::empty())
            .await
            .unwrap_err();
        assert!(err.to_string().contains(what), "{err}");
        let mut after = disk.snapshot();
        assert_eq!(after[79], 2, "the corrupt bit is set");
        after[79] = 0;
        assert!(after == before, "nothing else was written");
        assert!(
            node.pwritev(8192, vec![1; 512].into(), WriteFlags::empty())
                .await
                .is_err(),
            "no further writes"
        );
    }
}

// INV QCOW2-META-2: without COPIED a cluster belongs to somebody else too.
#[tokio::test]
async fn a_shared_cluster_is_copied_and_not_written() {
    let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
    let (node, image) = open_on(disk.clone(), None).await;
    node.pwritev(0, vec![7; CLUSTER as usize].into(), WriteFlags::empty())
        .await
        .unwrap();
    let before = image.mapping(0, crate::image::Intent::Read).await.unwrap();
    let (host, _) = before.referenced(CLUSTER).unwrap();
    {
        // As a snapshot would leave it: two references, no COPIED.
        let mut meta = image.meta.lock().await;
        image
            .set_entry(&mut meta, 0, L2Entry::one_word(host))
            .await
            .unwrap();
        meta.refcounts
            .set(&image.file, host / CLUSTER, 2)
            .await
            .unwrap();
    }
    node.pwritev(512, vec![8; 512].into(), WriteFlags::empty())
        .await
        .unwrap();
    assert_eq!(
        disk.snapshot()[host as usize..][..CLUSTER as usize],
        vec![7; CLUSTER as usize],
        "the other owner's data"
    );
    let all = read_all(&node).await;
    assert_eq!((all[0], all[512], all[1024]), (7, 8, 7));
    node.flush().await.unwrap();
    let mut meta = image.meta.lock().await;
    assert_eq!(
        meta.refcounts
            .get(&image.file, host / CLUSTER)
            .await
            .unwrap(),
        1
    );
}

// INV QCOW2-ORD-4: a freed cluster is not handed out before the commit, nor while somebody may still read it.
#[tokio::test]
async fn a_freed_cluster_waits_for_the_commit_and_for_its_readers() {
    let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
    let (node, image) = open_on(disk.clone(), None).await;
    node.pwritev(0, vec![7; CLUSTER as usize].into(), WriteFlags::empty())
        .await
        .unwrap();
    node.flush().await.unwrap();
    let (old, _) = image
        .mapping(0, crate::image::Intent::Read)
        .await
        .unwrap()
        .referenced(CLUSTER)
        .unwrap();
    let host_of = async |guest: u64| {
        image
            .mapping(guest, crate::image::Intent::Read)
            .await
            .unwrap()
            .referenced(CLUSTER)
            .unwrap()
            .0
    };

    node.pdiscard(0, CLUSTER).await.unwrap();
    node.pwritev(
        CLUSTER,
        vec![8; CLUSTER as usize].into(),
        WriteFlags::empty(),
    )
    .await
    .unwrap();
    assert_ne!(host_of(1).await, old, "the discard is not durable yet");

    let reader = image.epochs.enter();
    node.flush().await.unwrap();
    node.pwritev(
        2 * CLUSTER,
        vec![9; CLUSTER as usize].into(),
        WriteFlags::empty(),
    )
    .await
    .unwrap();
    assert_ne!(host_of(2).await, old, "somebody still reads it");

    drop(reader);
    node.pwritev(
        3 * CLUSTER,
        vec![9; CLUSTER as usize].into(),
        WriteFlags::empty(),
    )
    .await
    .unwrap();
    node.flush().await.unwrap();
    node.pwritev(
        4 * CLUSTER,
        vec![9; CLUSTER as usize].into(),
        WriteFlags::empty(),
    )
    .await
    .unwrap();
    assert_eq!(host_of(4).await, old, "now it is free");
    node.flush().await.unwrap();
    assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
}

// INV QCOW2-ORD-4: the host takes its time to punch the hole; who writes meanwhile must not get the cluster, or the hole swallows what was written.
#[tokio::test]
async fn a_freed_cluster_is_not_handed_out_before_its_hole_is_punched() {
    let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
    let (node, image, faults) = open_with_faults(disk.clone()).await;
    let host_of = async |guest: u64| {
        let mapping = image.mapping(guest, crate::image::Intent::Read).await;
        mapping.unwrap().referenced(CLUSTER).unwrap().0
    };
    write(&node, 0, CLUSTER as usize, 7).await.unwrap();
    node.flush().await.unwrap();
    let old = host_of(0).await;
    node.pdiscard(0, CLUSTER).await.unwrap();
    faults.add(Rule::slow(Event::Discard, 20_000));
    let flushed = std::cell::Cell::new(false);
    let flushing = async {
        node.flush().await.unwrap();
        flushed.set(true);
    };
    let writing = async {
        for guest in 1..40 {
            write(&node, guest * CLUSTER, CLUSTER as usize, 9)
                .await
                .unwrap();
            tokio::task::yield_now().await;
            assert!(!flushed.get(), "the hole is not slow enough");
        }
    };
    tokio::join!(flushing, writing);
    let hole = &disk.snapshot()[old as usize..][..CLUSTER as usize];
    assert!(hole.iter().all(|b| *b == 0), "there is a hole");
    for guest in 1..40 {
        let buf = blockcore::IoBufMut::zeroed(CLUSTER as usize);
        let at = guest * CLUSTER;
        let read = node.preadv(at, buf, Default::default()).await.unwrap();
        assert!(read.to_vec() == [9; CLUSTER as usize], "cluster {guest}");
    }
    write(&node, 40 * CLUSTER, CLUSTER as usize, 9)
        .await
        .unwrap();
    assert_eq!(host_of(40).await, old, "now it is free");
}

// INV QCOW2-ORD-5: what a flush has promised is reachable from the disk alone.
#[tokio::test]
async fn a_flush_makes_data_reachable() {
    let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
    let (node, _image) = open_on(disk.clone(), None).await;
    node.pwritev(5000, vec![3; 10_000].into(), WriteFlags::empty())
        .await
        .unwrap();
    node.flush().await.unwrap();
    let kept = disk.image_after(disk.log_len(), 0, &mut blockcore::testing::Rng::new(1));
    let (again, _) = open_on(CrashDriver::new(kept), None).await;
    assert_eq!(read_all(&again).await, read_all(&node).await);
}

// INV REQ-DROP-1: a write that is given up half way is finished all the same, before anything else touches its clusters.
#[tokio::test]
async fn a_dropped_write_finishes_before_the_next_one_to_its_cluster() {
    for polls in 0..12 {
        let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
        let (node, image) = open_on(disk.clone(), None).await;
        let mut first = Box::pin(node.pwritev(0, vec![1; 3000].into(), WriteFlags::empty()));
        for _ in 0..polls {
            if first.as_mut().now_or_never().is_some() {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(first);
        node.pwritev(1000, vec![2; 3000].into(), WriteFlags::empty())
            .await
            .unwrap();
        let all = read_all(&node).await;
        assert!(
            all[1000..4000].iter().all(|&b| b == 2),
            "after {polls} polls: the later write stays"
        );
        assert!(
            all[..1000].iter().all(|&b| b == 1) || all[..1000].iter().all(|&b| b == 0),
            "after {polls} polls"
        );
        image.tasks.wait_idle().await;
        node.flush().await.unwrap();
        assert_eq!(
            findings(disk.snapshot()).await,
            Vec::<String>::new(),
            "after {polls} polls"
        );
    }
}

// INV REQ-DROP-1: so is one that goes to a cluster in place and on to a new one. What comes later lines up behind it, and doesn't overtake it in place.
#[tokio::test]
async fn a_write_in_place_does_not_overtake_one_that_was_dropped() {
    let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
    let (node, image, faults) = open_with_faults(disk).await;
    write(&node, 0, CLUSTER as usize, 1).await.unwrap();
    faults.add(Rule::slow(Event::Write, 100).starting_with(2));
    let mut dropped = Box::pin(write(&node, 0, 2 * CLUSTER as usize, 2));
    for _ in 0..20 {
        assert!(dropped.as_mut().now_or_never().is_none());
        tokio::task::yield_now().await;
    }
    drop(dropped);
    write(&node, 0, 512, 3).await.unwrap();
    image.tasks.wait_idle().await;
    let all = read_all(&node).await;
    assert!(all[..512].iter().all(|b| *b == 3), "the later write stays");
    assert!(all[512..2 * CLUSTER as usize].iter().all(|b| *b == 2));
}

#[tokio::test]
async fn a_partial_zero_write_to_an_empty_cluster_allocates_nothing() {
    let size = 4 * CLUSTER + 2048;
    for (backing, zero_tail) in [
        (None, true),
        (Some(vec![0; size as usize]), true),
        (Some(vec![0; 4 * 4096 + 1024]), true),
        (Some(vec![9; 4 * 4096 + 512]), false),
    ] {
        let disk = CrashDriver::new(fresh_image(Shape::small(size)));
        let (node, image) = open_on(disk.clone(), backing).await;
        node.pwrite_zeroes(4 * CLUSTER + 1024, 512, WriteFlags::empty())
            .await
            .unwrap();
        let status = node
            .block_status(4 * CLUSTER, 2048, StatusMode::Precise)
            .await
            .unwrap();
        assert_eq!(status.flags.contains(StatusFlags::ZERO), zero_tail);
        let entry = image.l2.entry_now(4).unwrap();
        assert_eq!(entry.word == OFLAG_ZERO, zero_tail, "{entry:?}");
        node.flush().await.unwrap();
        assert_eq!(corruptions(disk.snapshot()).await, Vec::<String>::new());
    }
}

// INV QCOW2-RAW-1: a write in place that is on its way does not land in the file of a cluster that has become zero meanwhile.
#[tokio::test]
async fn a_raw_data_file_reads_as_the_disk_does_after_a_write_and_a_zero_write_at_once() {
    let mut image = fresh_image(Shape::small(1 << 20));
    set_data_file(&mut image, DataFileKind::Raw);
    let disk = CrashDriver::new(image);
    let backing = Backing::default().with_data(disk.beside(Vec::new(), 1));
    let (node, _image) = open_on(disk, &backing).await;
    let cluster = CLUSTER as usize;
    write(&node, 0, cluster, 1).await.unwrap();
    let (_, faults) = backing.data.as_ref().unwrap();
    for yields in 0..12 {
        faults.clear();
        faults.add(Rule::slow(Event::Write, yields));
        let late = write(&node, 0, cluster, 2);
        let zero = node.pwrite_zeroes(0, CLUSTER, WriteFlags::empty());
        let (late, zero) = futures::join!(late, zero);
        late.and(zero).unwrap();
        let data = backing.data().unwrap();
        let contents = read_all(&node).await;
        assert!(data[..cluster] == contents[..cluster], "{yields} yields");
        // So that the next round begins with data.
        write(&node, 0, cluster, 1).await.unwrap();
    }
}

// INV QCOW2-RAW-1: nor is a write that has failed half way in the file alone.
#[tokio::test]
async fn a_raw_data_file_reads_as_the_disk_does_after_a_write_that_failed() {
    for shape in [Shape::small(1 << 20), Shape::extended(1 << 20)] {
        let mut image = fresh_image(shape);
        set_data_file(&mut image, DataFileKind::Raw);
        let disk = CrashDriver::new(image);
        let backing = Backing::default().with_data(disk.beside(vec![0; 1 << 20], 1));
        let (node, _image) = open_on(disk, &backing).await;
        let (_, faults) = backing.data.as_ref().unwrap();
        for at in [0, 5 * CLUSTER] {
            faults.add(Rule::tear_all(libc::ENOSPC));
            write(&node, at, 4096, 1).await.unwrap_err();
            faults.clear();
            let data = backing.data().unwrap();
            assert!(data == read_all(&node).await, "after a write to {at:#x}");
            // The next one finds a cluster that keeps its place.
            let none = WriteFlags::empty();
            node.pwrite_zeroes(5 * CLUSTER, 4096, none).await.unwrap();
        }
    }
}

// Version 2 has no zero clusters. That the backing file which the header names is not the one that is open changes nothing: the next one who opens the image
// sees it.
#[tokio::test]
async fn zeroes_are_zeroes_over_a_backing_file_that_is_not_open() {
    let mut bytes = fresh_image(Shape {
        version: 2,
        ..Shape::small(1 << 20)
    });
    // Its name.
    bytes[8..16].copy_from_slice(&512u64.to_be_bytes());
    bytes[16..20].copy_from_slice(&1u32.to_be_bytes());
    bytes[512] = b'b';
    let disk = CrashDriver::new(bytes);
    let (node, _image) = open_on(disk.clone(), None).await;
    let flags = WriteFlags::MAY_UNMAP;
    node.pwrite_zeroes(0, 1 << 16, flags).await.unwrap();
    node.pdiscard(1 << 16, 1 << 16).await.unwrap();
    node.driver().close().await.unwrap();
    let (node, _image) = open_on(disk, Some(vec![0xaa; 1 << 20])).await;
    let all = read_all(&node).await;
    assert!(all[..1 << 16].iter().all(|b| *b == 0));
    assert!(
        all[1 << 16..].iter().all(|b| *b == 0xaa),
        "and that was never written"
    );
}

// INV QCOW2-ORD-7: who deleted a snapshot was killed before his flush; what the next one writes in place is not the snapshot's, if the power is cut then.
#[tokio::test]
async fn what_was_read_is_durable_before_anything_is_changed_by_it() {
    let mut failed = 0;
    for request in 0..30 {
        let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
        let (node, _, faults) = open_with_faults(disk.clone()).await;
        write(&node, 0, CLUSTER as usize, 7).await.unwrap();
        node.snapshot_create(SnapshotRequest::now("kept"))
            .await
            .unwrap();
        let kept = SnapshotSelector::name("kept");
        faults.add(Rule::fail_all(libc::EIO).not_before(request));
        let begun = disk.log_len();
        failed += u32::from(node.snapshot_delete(kept.clone()).await.is_err());
        drop(node);
        let (next, _) = open_on(disk.clone(), None).await;
        write(&next, 0, CLUSTER as usize, 9).await.unwrap();
        let mut rng = Rng::new(1);
        for _ in 0..100 {
            let cut = begun + rng.below((disk.log_len() - begun) as u64 + 1) as usize;
            let left = disk.image_after(cut, 50, &mut rng);
            let (node, image) = open_on(CrashDriver::new(left), None).await;
            if image.snapshot_load(&kept).await.is_ok() {
                let first = read_all(&node).await[..CLUSTER as usize].to_vec();
                assert_eq!(first, [7; CLUSTER as usize], "request {request}, cut {cut}");
            }
        }
    }
    assert!(failed > 1, "no request has failed");
}
