// SPDX-License-Identifier: MIT OR Apache-2.0
//! Corners that random tests rarely come by, each with the smallest case that breaks.

use std::sync::atomic::Ordering;

use blockcore::testing::fault::{Event, Rule};
use blockcore::testing::{CrashDriver, Rng, given_up_after};
use blockcore::{
    NodeFlags, Options, Preallocation, SnapshotRequest, SnapshotSelector, StatusMode,
    TruncateRequest, WriteFlags,
};

use super::{
    Shape, corruptions, findings, fresh_image, image_over, node_over, open_on, open_over,
    open_with_faults, read_all, write,
};
use crate::crypto::CryptMethod;
use crate::runtime::OverlapChecks;

const CLUSTER: u64 = 4096;

/// What happens at the same time in the test below.
enum Request {
    Grow,
    Write,
    Discard,
}

// What a discard spares is settled when it is its turn: the disk may have grown since it was asked for, and what is behind its range is somebody's data.
#[tokio::test]
async fn a_discard_of_the_last_part_of_a_disk_that_grows_takes_no_more() {
    let size = 4 * CLUSTER + 1024;
    let disk = CrashDriver::new(fresh_image(Shape::small(size)));
    let (node, _image, faults) = open_with_faults(disk).await;
    write(&node, 4 * CLUSTER, 1024, 1).await.unwrap();
    node.flush().await.unwrap();
    faults.add(Rule::slow(Event::Flush, 10));
    faults.add(Rule::slow(Event::Write, 1000).starting_with(9));
    let spawn = |request: Request| {
        let node = node.clone();
        tokio::spawn(async move {
            match request {
                Request::Grow => node.truncate(TruncateRequest::to(8 * CLUSTER)).await,
                Request::Write => write(&node, 3 * CLUSTER, 4096 + 512, 9).await,
                Request::Discard => node.pdiscard(4 * CLUSTER, 1024).await,
            }
        })
    };
    let growing = spawn(Request::Grow);
    tokio::task::yield_now().await;
    // The discard has to wait for the write, and both for the growth.
    let writing = spawn(Request::Write);
    tokio::task::yield_now().await;
    let discarding = spawn(Request::Discard);
    tokio::task::yield_now().await;
    growing.await.unwrap().unwrap();
    write(&node, 4 * CLUSTER + 1024, 512, 2).await.unwrap();
    assert!(!writing.is_finished());
    writing.await.unwrap().unwrap();
    discarding.await.unwrap().unwrap();
    assert_eq!(read_all(&node).await[4 * CLUSTER as usize + 1024], 2);
}

// INV QCOW2-ORD-1: a refcount block that was given a place is counted, also where the allocation that needed it comes to nothing.
#[tokio::test]
async fn an_allocation_that_fails_leaves_no_block_uncounted() {
    let shape = Shape {
        size: 1 << 20,
        cluster_bits: 9,
        version: 3,
        refcount_order: 6,
        extended_l2: false,
        encryption: CryptMethod::None,
    };
    let (_node, image) = open_on(CrashDriver::new(fresh_image(shape)), None).await;
    // The last block that fits into the longest refcount table counts 64 clusters; behind them nothing can be counted.
    let mut meta = image.meta.lock().await;
    meta.next_free = ((8 << 20) / 8 - 1) * 64 + 10;
    let err = image.alloc_run(&mut meta, 60).await.unwrap_err();
    assert_eq!(err.errno(), libc::EFBIG);
    let blocks: Vec<u64> = meta.refcounts.table().to_vec();
    for host in blocks.into_iter().filter(|&host| host != 0) {
        let references = meta.refcounts.get(&image.file, host >> 9).await.unwrap();
        assert_eq!(references, 1, "the block at {host:#x}");
    }
    // What is left of the room can still be used.
    image.alloc_run(&mut meta, 50).await.unwrap();
}

// INV QCOW2-META-1: the tables of a snapshot that was applied are the active ones from then on.
#[tokio::test]
async fn the_tables_of_an_applied_snapshot_can_be_written() {
    let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
    let (node, _image) = open_on(disk.clone(), None).await;
    let none = WriteFlags::empty();
    node.pwrite_zeroes(0, CLUSTER, none).await.unwrap();
    let request = SnapshotRequest::now("a");
    node.snapshot_create(request).await.unwrap();
    write(&node, 0, 4096, 1).await.unwrap();
    node.driver().close().await.unwrap();
    // Opened anew, the snapshot's L2 table is nobody's that is known.
    let (node, _image) = open_on(disk.clone(), None).await;
    let a = SnapshotSelector::name("a");
    node.snapshot_goto(a.clone()).await.unwrap();
    node.snapshot_delete(a).await.unwrap();
    write(&node, 2 * CLUSTER, 4096, 2).await.unwrap();
    node.flush().await.unwrap();
    node.driver().close().await.unwrap();
    assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
    let (again, _image) = open_on(disk, None).await;
    let all = read_all(&again).await;
    assert_eq!((all[0], all[2 * CLUSTER as usize]), (0, 2));
}

// INV QCOW2-META-2: a reference that nobody holds any more, but that is still counted because of a read, makes no cluster shared.
#[tokio::test]
async fn a_slow_read_does_not_hide_that_a_cluster_is_unshared() {
    let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
    let (node, image) = open_on(disk.clone(), None).await;
    write(&node, 0, 4096, 1).await.unwrap();
    node.snapshot_create(SnapshotRequest::now("a"))
        .await
        .unwrap();
    let reader = image.epochs.enter();
    write(&node, 0, 4096, 2).await.unwrap();
    node.flush().await.unwrap();
    let a = SnapshotSelector::name("a");
    node.snapshot_goto(a.clone()).await.unwrap();
    node.snapshot_delete(a).await.unwrap();
    drop(reader);
    node.flush().await.unwrap();
    node.driver().close().await.unwrap();
    assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
    let (again, _image) = open_on(disk, None).await;
    assert_eq!(read_all(&again).await[0], 1);
}

// A disk that shows a snapshot must not be written: the changes would land in the active layer's tables.
#[tokio::test]
async fn a_disk_that_shows_a_snapshot_stays_read_only() {
    let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
    let (node, _image) = open_on(disk.clone(), None).await;
    write(&node, 0, 4096, 1).await.unwrap();
    node.snapshot_create(SnapshotRequest::now("a"))
        .await
        .unwrap();
    write(&node, 0, 8192, 2).await.unwrap();
    node.driver().close().await.unwrap();
    let before = disk.snapshot();

    let (node, image) = open_on(disk.clone(), None).await;
    image
        .writable
        .store(false, std::sync::atomic::Ordering::Release);
    image
        .snapshot_load(&SnapshotSelector::name("a"))
        .await
        .unwrap();
    let mut request = blockcore::ReopenRequest {
        read_only: false,
        direct: false,
        options: blockcore::Options::new(),
    };
    let reopened = node.driver().reopen_prepare(&mut request).await;
    assert!(reopened.is_err(), "the image can be made writable");
    assert!(disk.snapshot() == before);
}

// INV QCOW2-ORD-4: the place of a refcount block that a shrinking disk gives up is not used again before the refcount table on disk names it no more.
#[tokio::test]
async fn the_place_of_a_dropped_refcount_block_waits_for_the_commit() {
    let (cluster, table) = (512, 64 * 512);
    let shape = Shape {
        size: 20 * table,
        cluster_bits: 9,
        version: 3,
        refcount_order: 6,
        extended_l2: false,
        encryption: CryptMethod::None,
    };
    for yields in (0..400).step_by(50) {
        let disk = CrashDriver::new(fresh_image(shape));
        let (node, image, faults) = open_with_faults(disk.clone()).await;
        write(&node, 17 * table, 3 * table as usize, 1)
            .await
            .unwrap();
        node.flush().await.unwrap();
        let begun = disk.log_len();
        faults.add(Rule::slow(Event::Flush, 5000));
        let shrinking = {
            let node = node.clone();
            tokio::spawn(async move { node.truncate(TruncateRequest::to(17 * table)).await })
        };
        let blocks = async || {
            let meta = image.meta.lock().await;
            meta.refcounts.table().to_vec()
        };
        let before = blocks().await;
        while blocks().await == before && !shrinking.is_finished() {
            tokio::task::yield_now().await;
        }
        for _ in 0..yields {
            tokio::task::yield_now().await;
        }
        // As a refcount block, this would count nothing, itself included. One cluster at a time, so that new blocks lie elsewhere than the old ones did.
        for at in (0..4 * table).step_by(cluster) {
            write(&node, at, cluster, 0).await.unwrap();
        }
        shrinking.await.unwrap().unwrap();
        for cut in begun..disk.log_len() {
            // Right before a flush most is at stake.
            let more = if disk.is_flush(cut) { 16 } else { 0 };
            for (keep, seed) in [(100, 1)].into_iter().chain((0..more).map(|s| (50, s))) {
                let left = disk.image_after(cut, keep, &mut Rng::new(seed));
                let wrong = corruptions(left).await;
                assert_eq!(wrong, [""; 0], "yields {yields} cut {cut} seed {seed}");
            }
        }
        node.driver().close().await.unwrap();
        assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
    }
}

// INV QCOW2-META-1: where the tables of snapshots are looked after, too, snapshots can be applied and deleted, and what was theirs can be written.
#[tokio::test]
async fn snapshots_come_and_go_where_their_tables_are_looked_after() {
    let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
    let (node, _image) = open_on(disk.clone(), None).await;
    for (name, value) in [("a", 1), ("b", 2), ("c", 3)] {
        write(&node, 0, 4096, value).await.unwrap();
        let request = SnapshotRequest::now(name);
        node.snapshot_create(request).await.unwrap();
    }
    write(&node, 0, 4096, 4).await.unwrap();
    node.driver().close().await.unwrap();

    let file = disk.clone().into_node(NodeFlags::default()).await.unwrap();
    let image = image_over(file, None).await.unwrap();
    image.runtime.write().unwrap().overlap_checks = OverlapChecks::all();
    image.prepare_writing().await.unwrap();
    image.writable.store(true, Ordering::Release);
    let node = node_over(image, NodeFlags::default()).await;
    let named = SnapshotSelector::name;
    node.snapshot_delete(named("b")).await.unwrap();
    node.snapshot_goto(named("a")).await.unwrap();
    node.snapshot_delete(named("a")).await.unwrap();
    write(&node, 2 * CLUSTER, 4096, 5).await.unwrap();
    node.flush().await.unwrap();
    node.driver().close().await.unwrap();
    assert_eq!(findings(disk.snapshot()).await, [""; 0]);
    let (again, _image) = open_on(disk, None).await;
    let all = read_all(&again).await;
    assert_eq!((all[0], all[2 * CLUSTER as usize]), (1, 5));
}

// What a growth that failed has left behind the end is no zero cluster after a downgrade: version 2 has none.
#[tokio::test]
async fn a_downgrade_leaves_no_zero_clusters_behind_the_end() {
    for backing in [None, Some(vec![7; 64 * CLUSTER as usize])] {
        let disk = CrashDriver::new(fresh_image(Shape::small(8 * CLUSTER)));
        let driver = blockcore::testing::FaultDriver::new(Box::new(disk.clone()));
        let faults = driver.faults();
        let file = driver.into_node(NodeFlags::default()).await.unwrap();
        let (node, _image) = open_over(file, backing).await.unwrap();
        faults.add(Rule::fail(Event::Flush, libc::EIO));
        let longer = TruncateRequest::to(16 * CLUSTER);
        node.truncate(longer).await.unwrap_err();
        faults.clear();
        node.amend(Options::new().with("compat", "0.10"))
            .await
            .unwrap();
        let shorter = TruncateRequest::to(4 * CLUSTER);
        node.truncate(shorter).await.unwrap();
        node.driver().close().await.unwrap();
        assert_eq!(findings(disk.snapshot()).await, [""; 0]);
    }
}

// INV REQ-DROP-1: who asks what is there sees what a dropped write makes of it, as who reads does.
#[tokio::test]
async fn a_dropped_write_is_settled_before_somebody_looks_at_the_mapping() {
    let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
    let (node, image, faults) = open_with_faults(disk).await;
    faults.add(Rule::slow(Event::Write, 100).starting_with(7));
    let dropped = given_up_after(5, write(&node, 0, 4096, 7)).await;
    assert!(dropped.is_none() && image.orphans.any(), "it goes on");
    let seen = node.block_status(0, 4096, StatusMode::Precise).await;
    image.tasks.wait_idle().await;
    let settled = node.block_status(0, 4096, StatusMode::Precise).await;
    assert_eq!(seen.unwrap().flags, settled.unwrap().flags);
}

// INV QCOW2-CRYPT-1: clusters that keep their place get no holes where data is encrypted: until the mapping is durable, a hole reads as noise.
#[tokio::test]
async fn a_power_cut_shows_no_hole_as_data_of_an_encrypted_disk() {
    let shape = Shape {
        encryption: CryptMethod::Aes,
        ..Shape::small(1 << 20)
    };
    let disk = CrashDriver::new(fresh_image(shape));
    let (node, image) = open_on(disk.clone(), None).await;
    image.runtime.write().unwrap().discard_no_unref = true;
    write(&node, 0, 4096, 1).await.unwrap();
    node.flush().await.unwrap();
    let begun = disk.log_len();
    let unmap = WriteFlags::MAY_UNMAP;
    node.pwrite_zeroes(0, CLUSTER, unmap).await.unwrap();
    node.flush().await.unwrap();
    for cut in begun..=disk.log_len() {
        let left = disk.image_after(cut, 100, &mut Rng::new(1));
        let (node, _image) = open_on(CrashDriver::new(left), None).await;
        let all = read_all(&node).await;
        let cluster = &all[..CLUSTER as usize];
        assert!(cluster.iter().all(|b| *b == cluster[0]) && cluster[0] < 2);
    }
}

/// Writes to new clusters make the file longer than it has to be, several megabytes at a time; closing takes that back.
#[tokio::test]
async fn what_a_file_was_made_longer_goes_when_it_is_closed() {
    let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
    let (node, _) = open_on(disk.clone(), None).await;
    for guest in 0..10 {
        write(&node, guest * CLUSTER, 512, 7).await.unwrap();
    }
    node.flush().await.unwrap();
    assert_eq!(disk.snapshot().len(), 4 << 20, "while it is open");
    node.driver().close().await.unwrap();
    // Four clusters of an empty image, an L2 table, ten of data.
    assert_eq!(disk.snapshot().len(), 15 * 4096);
    assert_eq!(findings(disk.snapshot()).await, [""; 0]);
    let (node, _) = open_on(disk, None).await;
    let all = read_all(&node).await;
    for (sector, bytes) in all.chunks(512).enumerate() {
        let is_written = sector < 80 && sector % 8 == 0;
        assert_eq!(bytes, [7 * u8::from(is_written); 512], "sector {sector}");
    }
}

/// Closing takes nothing of what the file had when it was opened, whether the image uses it or not.
#[tokio::test]
async fn what_lay_behind_an_image_is_not_cut_off() {
    let mut image = fresh_image(Shape::small(1 << 20));
    image.extend([0x5a; 5 * 4096]);
    let length = image.len();
    let disk = CrashDriver::new(image);
    let (node, _) = open_on(disk.clone(), None).await;
    for guest in 0..10 {
        write(&node, guest * CLUSTER, 512, 7).await.unwrap();
    }
    assert_eq!(disk.snapshot().len(), 4 << 20, "while it is open");
    node.pdiscard(0, 10 * CLUSTER).await.unwrap();
    for _ in 0..2 {
        node.flush().await.unwrap();
    }
    node.driver().close().await.unwrap();
    assert_eq!(disk.snapshot().len(), length);
}

/// A host that refuses to make the file much longer is asked for what is needed.
#[tokio::test]
async fn a_file_that_can_grow_a_little_is_written_to() {
    let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
    let (node, _, faults) = open_with_faults(disk.clone()).await;
    faults.add(Rule::fail(Event::Truncate, libc::EFBIG).within(1 << 20..u64::MAX));
    write(&node, 0, 512, 7).await.unwrap();
    node.flush().await.unwrap();
    assert!(disk.snapshot().len() < 1 << 20);
    node.driver().close().await.unwrap();
}

/// A file that lies encrypted in something else grows with noise. None of it shows: not around small writes, in new tables, or where the disk has grown.
#[tokio::test]
async fn a_file_that_grows_with_noise_shows_none_of_it() {
    for shape in [Shape::small(1 << 20), Shape::extended(1 << 20)] {
        let disk = CrashDriver::new(fresh_image(shape)).growing_with(0xa5);
        let (node, _) = open_on(disk.clone(), None).await;
        let mut model = vec![0; 3 << 20];
        for guest in [3, 700 << 10, (1 << 20) - 512] {
            write(&node, guest, 512, 7).await.unwrap();
            model[guest as usize..][..512].fill(7);
        }
        let longer = TruncateRequest {
            preallocation: Preallocation::Metadata,
            ..TruncateRequest::to(3 << 20)
        };
        node.truncate(longer).await.unwrap();
        node.flush().await.unwrap();
        assert!(read_all(&node).await == model);
        node.driver().close().await.unwrap();
        assert_eq!(findings(disk.snapshot()).await, [""; 0]);
        let (node, _) = open_on(disk, None).await;
        assert!(read_all(&node).await == model);
    }
}
