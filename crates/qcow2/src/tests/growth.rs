// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks that grow, while other things happen and fail.

use blockcore::testing::CrashDriver;
use blockcore::testing::fault::{Event, Rule};
use blockcore::{Preallocation, TruncateRequest, WriteFlags};

use super::{
    Shape, corruptions, findings, fresh_image, open_on, open_with_faults, read_all, write,
};
use crate::format::OFLAG_COPIED;
use crate::l2_entry::L2Entry;

const CLUSTER: u64 = 4096;
/// What one L2 table maps.
const TABLE: u64 = 512 * CLUSTER;

fn fully_allocated(bytes: u64) -> TruncateRequest {
    TruncateRequest {
        preallocation: Preallocation::Full,
        ..TruncateRequest::to(bytes)
    }
}

fn length_on_disk(disk: &CrashDriver) -> u64 {
    u64::from_be_bytes(disk.snapshot()[24..32].try_into().unwrap())
}

// INV QCOW2-ORD-2: a flush during a growth names no length behind which the backing node still shows.
#[tokio::test]
async fn a_flush_during_a_growth_shows_nothing_of_the_backing_node() {
    let size = 64 * CLUSTER;
    let backing = vec![7u8; 2 * size as usize];
    for yields in 0..40 {
        let disk = CrashDriver::new(fresh_image(Shape::small(size)));
        let (node, image) = open_on(disk.clone(), Some(backing.clone())).await;
        let growing = {
            let node = node.clone();
            tokio::spawn(async move { node.truncate(fully_allocated(2 * size)).await })
        };
        for _ in 0..yields {
            tokio::task::yield_now().await;
        }
        let flushing = tokio::spawn(async move { image.commit().await });
        for _ in 0..400 {
            if length_on_disk(&disk) == 2 * size {
                let (left, _) =
                    open_on(CrashDriver::new(disk.snapshot()), Some(backing.clone())).await;
                let all = read_all(&left).await;
                assert!(
                    all[size as usize..].iter().all(|&b| b == 0),
                    "after {yields} turns"
                );
                break;
            }
            tokio::task::yield_now().await;
        }
        flushing.await.unwrap().unwrap();
        growing.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_growth_that_fails_leaves_the_old_length() {
    let size = 64 * CLUSTER;
    let disk = CrashDriver::new(fresh_image(Shape::small(size)));
    let (node, _image, faults) = open_with_faults(disk.clone()).await;
    faults.add(Rule::fail(Event::Write, libc::ENOSPC).at_least(65536));
    assert!(node.truncate(fully_allocated(2 * size)).await.is_err());
    assert_eq!(node.length(), size);
    faults.clear();
    node.driver().close().await.unwrap();
    assert_eq!(length_on_disk(&disk), size);
}

// A growth that failed has moved the L1 table, and one that fails earlier comes after it: what is flushed later is still found.
#[tokio::test]
async fn two_growths_that_fail_lose_nothing() {
    let disk = CrashDriver::new(fresh_image(Shape::small(TABLE)));
    let (node, image, faults) = open_with_faults(disk.clone()).await;
    faults.add(Rule::fail(Event::Write, libc::ENOSPC).at_least(65536));
    assert!(node.truncate(fully_allocated(2 * TABLE)).await.is_err());
    faults.clear();
    let cursor = std::mem::replace(&mut image.meta.lock().await.next_free, 1 << 48);
    assert!(
        node.truncate(TruncateRequest::to(4 * TABLE)).await.is_err(),
        "no cluster for the L1 table"
    );
    image.meta.lock().await.next_free = cursor;
    write(&node, 0, 4096, 5).await.unwrap();
    node.flush().await.unwrap();
    let (again, _) = open_on(CrashDriver::new(disk.snapshot()), None).await;
    assert_eq!(read_all(&again).await[0], 5);
}

// A commit that was planned with one place of the L1 table ends when the table has moved on: the next flush has to name the newer place.
#[tokio::test]
async fn a_commit_settles_no_growth_that_is_newer_than_its_plan() {
    for yields in 0..60 {
        let disk = CrashDriver::new(fresh_image(Shape::small(2 * TABLE)));
        let (node, _image, faults) = open_with_faults(disk.clone()).await;
        // The first growth has moved the L1 table, and failed.
        faults.add(Rule::fail(Event::Write, libc::ENOSPC).at_least(65536));
        assert!(node.truncate(fully_allocated(3 * TABLE)).await.is_err());
        faults.clear();
        faults.add(Rule::fail(Event::Write, libc::ENOSPC).at_least(65536));
        faults.add(Rule::slow(Event::Flush, 10));
        write(&node, 0, 4096, 5).await.unwrap();
        let flushing = {
            let node = node.clone();
            tokio::spawn(async move { node.flush().await })
        };
        for _ in 0..yields {
            tokio::task::yield_now().await;
        }
        // The second moves it again while the commit runs, and fails too.
        let further = 600 * TABLE;
        assert!(node.truncate(fully_allocated(further)).await.is_err());
        flushing.await.unwrap().unwrap();
        write(&node, CLUSTER, 4096, 6).await.unwrap();
        // Needs a table of its own, which only the L1 table's newest place names.
        write(&node, TABLE, 4096, 7).await.unwrap();
        node.flush().await.unwrap();
        let (again, _) = open_on(CrashDriver::new(disk.snapshot()), None).await;
        let all = read_all(&again).await;
        assert_eq!(
            (
                all[0],
                all[CLUSTER as usize],
                all[TABLE as usize],
                again.length()
            ),
            (5, 6, 7, 2 * TABLE),
            "after {yields} turns"
        );
        node.driver().close().await.unwrap();
        let wrong = super::corruptions(disk.snapshot()).await;
        assert_eq!(wrong, Vec::<String>::new(), "after {yields} turns");
    }
}

// INV REQ-DROP-1: a growth whose future is dropped happens all the same, and everybody knows.
#[tokio::test]
async fn a_dropped_growth_is_known_to_the_node() {
    for yields in 0..30 {
        let disk = CrashDriver::new(fresh_image(Shape::small(TABLE)));
        let (node, image) = open_on(disk.clone(), None).await;
        let growing = {
            let node = node.clone();
            tokio::spawn(async move { node.truncate(TruncateRequest::to(2 * TABLE)).await })
        };
        for _ in 0..yields {
            tokio::task::yield_now().await;
        }
        growing.abort();
        let _ = growing.await;
        // The next change of length comes after it.
        node.truncate(TruncateRequest::to(3 * TABLE)).await.unwrap();
        assert_eq!(
            (node.length(), image.size(), length_on_disk(&disk)),
            (3 * TABLE, 3 * TABLE, 3 * TABLE)
        );
    }
}

// The length of the file is never believed to be less than what has been written.
#[tokio::test]
async fn a_file_that_is_written_to_while_it_grows_keeps_its_length() {
    for yields in 0..60 {
        let disk = CrashDriver::new(fresh_image(Shape::small(TABLE)));
        let (node, image, faults) = open_with_faults(disk.clone()).await;
        faults.add(Rule::slow(Event::Length, 25));
        // Makes the file 4 MiB long.
        let writing = {
            let node = node.clone();
            tokio::spawn(async move { write(&node, 0, 512, 1).await })
        };
        for _ in 0..yields {
            tokio::task::yield_now().await;
        }
        write(image.file.node(), 8 << 20, 4096, 2).await.unwrap();
        writing.await.unwrap().unwrap();
        node.flush().await.unwrap();
        assert_eq!(image.file.length(), (8 << 20) + 4096);
        assert_eq!(disk.snapshot()[8 << 20], 2, "after {yields} turns");
    }
}

// What is being written behind the end of the file, where nothing is yet, is not cut off by a disk that becomes shorter at the same time.
#[tokio::test]
async fn a_shrinking_disk_cuts_off_nothing_that_is_being_written() {
    for turns in 0..150 {
        let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
        let (node, image, faults) = open_with_faults(disk.clone()).await;
        write(&node, 10 * CLUSTER, 10 * CLUSTER as usize, 7)
            .await
            .unwrap();
        node.flush().await.unwrap();
        let end = image.file.length();
        faults.add(Rule::slow(Event::Write, 2_000).within(end..u64::MAX));
        let shrinking = {
            let node = node.clone();
            let shorter = TruncateRequest::to(10 * CLUSTER);
            tokio::spawn(async move { node.truncate(shorter).await })
        };
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
        write(&node, 3 * CLUSTER, CLUSTER as usize, 9)
            .await
            .unwrap();
        shrinking.await.unwrap().unwrap();
        node.flush().await.unwrap();
        let mut expected = vec![0; 10 * CLUSTER as usize];
        expected[3 * CLUSTER as usize..4 * CLUSTER as usize].fill(9);
        assert!(read_all(&node).await == expected, "after {turns} turns");
        assert_eq!(corruptions(disk.snapshot()).await, [""; 0]);
    }
}

// What another disk's life has left behind the end is not shown when the disk grows, and not leaked.
#[tokio::test]
async fn entries_behind_the_end_are_forgotten_by_a_growth() {
    for backing in [None, Some(vec![7u8; 12 * CLUSTER as usize])] {
        let disk = CrashDriver::new(fresh_image(Shape::small(8 * CLUSTER)));
        let (node, image) = open_on(disk.clone(), backing).await;
        write(&node, 0, 2 * 4096, 1).await.unwrap();
        {
            let mut meta = image.meta.lock().await;
            for guest in [9, 20] {
                let run = image.alloc_run(&mut meta, 1).await.unwrap();
                let host = run.cluster * CLUSTER;
                let secret = vec![66u8; CLUSTER as usize];
                write(image.file.node(), host, secret.len(), 66)
                    .await
                    .unwrap();
                image
                    .set_entry(&mut meta, guest, L2Entry::one_word(host | OFLAG_COPIED))
                    .await
                    .unwrap();
            }
        }
        node.truncate(TruncateRequest::to(32 * CLUSTER))
            .await
            .unwrap();
        let all = read_all(&node).await;
        assert!(all[8 * CLUSTER as usize..].iter().all(|&b| b == 0));
        node.driver().close().await.unwrap();
        assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
    }
}

// A header may give a length that is no multiple of a sector: the rest is not part of the disk.
#[tokio::test]
async fn an_odd_length_is_cut_to_whole_sectors() {
    let mut bytes = fresh_image(Shape::small(2 * CLUSTER));
    bytes[24..32].copy_from_slice(&5000u64.to_be_bytes());
    let (node, _image) = open_on(CrashDriver::new(bytes), Some(vec![3; 8192])).await;
    assert_eq!(node.length(), 4608);
    node.pwrite_zeroes(4096, 512, WriteFlags::empty())
        .await
        .unwrap();
    node.pdiscard(0, 4608).await.unwrap();
    assert_eq!(read_all(&node).await, vec![0; 4608]);
}
