// SPDX-License-Identifier: MIT OR Apache-2.0
//! Repairs of an image that is in use. The rule: what is in memory is right afterwards, so that the image can be used on; or it says that it has to be opened
//! again. The method: the damaged images of `repair`, opened for writing as far as that goes, repaired, written to and read back; errors in the middle;
//! writers that don't stop for it; readers that still look at what was freed.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockcore::testing::fault::{Event, Rule};
use blockcore::testing::{CrashDriver, FaultDriver, MemoryDriver, Rng, given_up_after};
use blockcore::{CheckFix, ErrorKind, IoBufMut, Node, NodeFlags, Result, WriteFlags};

use futures::FutureExt;

use super::repair::{Subject, check_bytes};
use super::{
    READ_ONLY, Shape, findings, fresh_image, image_over, image_with, node_over, open_on, open_over,
};
use super::{read_all, write};
use crate::format::OFLAG_COPIED;
use crate::image::{Image, Intent};

/// What the disk holds, sector by sector; nothing where it can't be read.
async fn sectors(node: &Node) -> Vec<Option<Vec<u8>>> {
    let mut all = Vec::new();
    for at in (0..node.length()).step_by(512) {
        let read = node.preadv(at, IoBufMut::zeroed(512), Default::default());
        all.push(read.await.ok().map(|b| b.to_vec()));
    }
    all
}

/// Writes here and there, and notes it. What says that the image can't be written any more ends it.
async fn use_it(node: &Node, model: &mut [Option<Vec<u8>>], rng: &mut Rng) -> Result<()> {
    for value in 1..20u8 {
        let first = rng.below(model.len() as u64) as usize;
        let count = (1 + rng.below(20) as usize).min(model.len() - first);
        let (offset, bytes) = (first as u64 * 512, count as u64 * 512);
        let (result, value) = match rng.below(4) {
            0 => {
                let zeroes = node.pwrite_zeroes(offset, bytes, WriteFlags::MAY_UNMAP);
                (zeroes.await, 0)
            }
            _ => (write(node, offset, bytes as usize, value).await, value),
        };
        // What failed may have been done in part.
        let sector_is = result.is_ok().then(|| vec![value; 512]);
        for sector in &mut model[first..first + count] {
            *sector = sector_is.clone();
        }
        result?;
    }
    Ok(())
}

/// The guest clusters that change with something else: guest data that is metadata, too; and in a data file, where nobody counts, guest data that lies where
/// other guest data does or would, with that.
async fn shared_clusters(image: &Arc<Image>) -> Vec<usize> {
    let cluster_size = image.cluster_size();
    let mut shared = Vec::new();
    for cluster in 0..image.size().div_ceil(cluster_size) {
        let mapping = image.mapping(cluster, Intent::Read).await;
        let place = mapping.ok().and_then(|m| m.referenced(cluster_size));
        let Some((host, bytes)) = place else {
            continue;
        };
        if image.has_data_file() {
            if host != cluster * cluster_size {
                shared.extend([cluster, host / cluster_size]);
            }
        } else if image.owner_in(host, bytes).is_some() {
            shared.push(cluster);
        }
    }
    shared.into_iter().map(|c| c as usize).collect()
}

fn forget(model: &mut [Option<Vec<u8>>], image: &Image, clusters: &[usize]) {
    let sectors = (image.cluster_size() / 512) as usize;
    for cluster in clusters {
        if let Some(sectors) = model.chunks_mut(sectors).nth(*cluster) {
            sectors.fill(None);
        }
    }
}

fn assert_reads_as(node: &[Option<Vec<u8>>], model: &[Option<Vec<u8>>], story: &str) {
    for (i, (is, was)) in node.iter().zip(model).enumerate() {
        assert!(was.is_none() || is == was, "{story}: sector {i}");
    }
}

#[tokio::test]
async fn an_image_in_use_is_repaired_and_used_on() {
    let seed = Rng::seed_from_env();
    let (mut used, mut refused) = (0, 0);
    for i in 0..150 {
        let seed = seed.wrapping_add(i);
        let story = format!("seed {seed}");
        let mut rng = Rng::new(seed);
        let mut subject = Subject::new(&mut rng).await;
        subject.damage(&mut rng);
        let mut disk = MemoryDriver::new(subject.bytes.clone());
        // Damaged entries name places far away.
        disk.room = Some(64 << 20);
        let driver = FaultDriver::new(Box::new(disk.clone()));
        let faults = driver.faults();
        let file = driver.into_node(NodeFlags::default()).await.unwrap();
        let Ok((node, image)) = open_over(file, &subject.backing).await else {
            refused += 1;
            continue;
        };
        if node.length() == 0 {
            continue;
        }
        let mut model = sectors(&node).await;
        if rng.chance(50) {
            let rule = Rule::fail_all(libc::EIO);
            let nth = rng.below(40) as u32;
            faults.add(match rng.chance(50) {
                true => rule.only(nth),
                false => rule.not_before(nth),
            });
        }
        let result = node.check(CheckFix::All).await;
        faults.clear();
        assert_reads_as(&sectors(&node).await, &model, &story);
        let is_sound = matches!(&result, Ok(r) if r.corruptions + r.check_errors == 0);
        let shared = shared_clusters(&image).await;
        let usage = use_it(&node, &mut model, &mut rng).await;
        forget(&mut model, &image, &shared);

        let closed = node.driver().close().await;
        if !is_sound || image.uncertain.load(Ordering::Acquire) {
            // What is still damaged may show at any time.
            continue;
        }
        used += 1;
        // A cluster with two references may be a table and guest data, or compressed and not: no check says which is wrong, but neither is written, and it
        // is said.
        // In a data file, an entry may name a place far away.
        if let Err(e) = usage.and(closed) {
            let is_far = image.has_data_file() && e.kind() == ErrorKind::NoSpace;
            let is_told = is_far || e.kind() == ErrorKind::Corrupt;
            assert!(is_told, "{story}: {e:?}, {result:?}");
            continue;
        }
        // What two tables share may be found again, and what was counted behind the end of the file. What the disk holds is right.
        let file = MemoryDriver::new(disk.snapshot());
        let file = file.into_node(READ_ONLY).await.unwrap();
        let data = subject.backing.open_data().await.unwrap();
        let again = image_with(file, subject.backing.clone().open().await, data).await;
        let node = node_over(again.unwrap(), READ_ONLY).await;
        assert_reads_as(&sectors(&node).await, &model, &story);
    }
    println!("{used} used on after a repair, {refused} not opened for writing");
    assert!(used > 20, "only {used} were of any use");
}

/// An image with one leak, one cluster that two entries share, and a wrong flag; its guest clusters 0 to 2 hold 1, 1, 3.
async fn with_faults_of_three_kinds() -> CrashDriver {
    let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
    let (node, image) = open_on(disk.clone(), None).await;
    for i in 0..4 {
        write(&node, 4096 * i, 4096, 1 + i as u8).await.unwrap();
    }
    let first = image.l2.entry_now(0).unwrap();
    let mut meta = image.meta.lock().await;
    image.set_entry(&mut meta, 1, first).await.unwrap();
    let mut third = image.l2.entry_now(2).unwrap();
    third.word &= !OFLAG_COPIED;
    image.set_entry(&mut meta, 2, third).await.unwrap();
    drop(meta);
    node.driver().close().await.unwrap();
    assert_eq!(findings(disk.snapshot()).await.len(), 3);
    disk
}

#[tokio::test]
async fn what_is_in_memory_is_right_after_a_repair() {
    let disk = with_faults_of_three_kinds().await;
    let (node, _image) = open_on(disk.clone(), None).await;
    assert_eq!(
        read_all(&node).await[4096],
        1,
        "and the tables are in memory"
    );
    let found = node.check(CheckFix::All).await.unwrap();
    assert_eq!((found.leaks_fixed, found.corruptions_fixed), (1, 4));
    // The flags that were in memory said that this is a write in place.
    write(&node, 0, 4096, 9).await.unwrap();
    assert_eq!(read_all(&node).await[4096], 1, "the neighbour was written");
    node.driver().close().await.unwrap();
    let left = check_bytes(disk.snapshot()).await.unwrap();
    assert_eq!(left.leaks, 0, "{:?}", left.messages);
}

#[tokio::test]
async fn writers_need_not_stop_for_a_repair() {
    let seed = Rng::seed_from_env();
    let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
    let (node, _image) = open_on(disk.clone(), None).await;
    let writer = |task: u64, node: Arc<Node>| async move {
        let mut rng = Rng::new(seed ^ task);
        // Each has every fourth cluster.
        let mut model = vec![0u8; 64];
        for value in 1..60u8 {
            let slot = rng.below(64);
            let offset = (slot * 4 + task) * 4096;
            if rng.chance(25) {
                node.pdiscard(offset, 4096).await.unwrap();
                model[slot as usize] = 0;
            } else {
                write(&node, offset, 4096, value).await.unwrap();
                model[slot as usize] = value;
            }
        }
        model
    };
    let writers: Vec<_> = (0..4)
        .map(|t| tokio::spawn(writer(t, node.clone())))
        .collect();
    let checker = tokio::spawn({
        let node = node.clone();
        async move {
            for i in 0..20 {
                let fix = [CheckFix::None, CheckFix::Leaks, CheckFix::All][i % 3];
                let found = node.check(fix).await.unwrap();
                assert_eq!(found.messages, [""; 0], "{fix:?}");
            }
        }
    });
    checker.await.unwrap();
    let mut models = Vec::new();
    for writer in writers {
        models.push(writer.await.unwrap());
    }
    let all = read_all(&node).await;
    for (task, model) in models.iter().enumerate() {
        for (slot, value) in model.iter().enumerate() {
            assert_eq!(all[(slot * 4 + task) * 4096], *value);
        }
    }
    node.driver().close().await.unwrap();
    assert_eq!(findings(disk.snapshot()).await, [""; 0]);
}

// INV QCOW2-ORD-4: a cluster that a reader may still look at is not freed because no table refers to it.
#[tokio::test]
async fn a_repair_leaves_freed_clusters_to_their_readers() {
    let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
    let (node, image) = open_on(disk.clone(), None).await;
    write(&node, 0, 4096, 1).await.unwrap();
    write(&node, 4096, 4096, 2).await.unwrap();
    node.flush().await.unwrap();
    let host = image.l2.entry_now(0).unwrap().word & !OFLAG_COPIED;
    let reader = image.epochs.enter();
    node.pdiscard(0, 4096).await.unwrap();
    node.flush().await.unwrap();
    let found = node.check(CheckFix::All).await.unwrap();
    assert_eq!(found.messages, [""; 0]);
    for i in 2..8 {
        write(&node, 4096 * i, 4096, 7).await.unwrap();
    }
    node.flush().await.unwrap();
    let byte = disk.snapshot()[host as usize];
    assert_eq!(byte, 1, "somebody else's data lies there now");
    drop(reader);
    node.flush().await.unwrap();
    node.driver().close().await.unwrap();
    assert_eq!(findings(disk.snapshot()).await, [""; 0]);
}

#[tokio::test]
async fn what_can_not_be_repaired_in_use_says_so() {
    let disk = with_faults_of_three_kinds().await;
    let file = MemoryDriver::new(disk.snapshot())
        .into_node(READ_ONLY)
        .await;
    let image = image_over(file.unwrap(), None).await.unwrap();
    let node = node_over(image, READ_ONLY).await;
    let error = node.check(CheckFix::Leaks).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    assert_eq!(node.check(CheckFix::None).await.unwrap().leaks, 1);
    // One that was found corrupt while it was open has to be closed: what it has in memory can't be trusted.
    let (node, image) = open_on(disk.clone(), None).await;
    image.signal_corruption("as a test says", 0);
    let before = disk.snapshot();
    let error = node.check(CheckFix::All).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert_eq!(node.check(CheckFix::None).await.unwrap().leaks, 1);
    assert!(disk.snapshot() == before);
}

// What a check can not read it does not call sound.
#[tokio::test]
async fn a_check_tells_of_every_read_that_fails() {
    let shape = Shape {
        cluster_bits: 9,
        refcount_order: 6,
        ..Shape::small(1 << 20)
    };
    // So many clusters that there are several refcount blocks.
    let disk = CrashDriver::new(fresh_image(shape));
    for nth in 0.. {
        let driver = FaultDriver::new(Box::new(disk.clone()));
        let faults = driver.faults();
        let file = driver.into_node(NodeFlags::default()).await.unwrap();
        let (node, _image) = open_over(file, None).await.unwrap();
        write(&node, 0, 300 * 512, 1).await.unwrap();
        node.flush().await.unwrap();
        faults.add(Rule::fail(Event::Read, libc::EIO).only(nth));
        let found = node.check(CheckFix::None).await;
        if faults.failed().is_empty() {
            assert!(nth > 3 && found.unwrap().messages.is_empty());
            break;
        }
        let is_told = found.is_err() || found.is_ok_and(|found| found.check_errors > 0);
        assert!(is_told, "read {nth}");
    }
}

// INV REQ-DROP-1: a dropped write that is still going on has clusters that nothing refers to yet, and they are no leaks.
#[tokio::test]
async fn a_repair_waits_for_dropped_writes() {
    for rounds in 0..12 {
        let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
        let driver = FaultDriver::new(Box::new(disk.clone()));
        driver
            .faults()
            .add(Rule::slow(Event::Write, 50).starting_with(7));
        let file = driver.into_node(NodeFlags::default()).await.unwrap();
        let (node, _image) = open_over(file, None).await.unwrap();
        given_up_after(rounds, write(&node, 0, 4096, 7)).await;
        let found = node.check(CheckFix::Leaks).await.unwrap();
        assert_eq!(found.messages, [""; 0], "after {rounds} rounds");
        write(&node, 8192, 4096, 8).await.unwrap();
        node.driver().close().await.unwrap();
        assert_eq!(findings(disk.snapshot()).await, [""; 0]);
    }
}

// A repair whose runtime ends has changed what is on disk, and not what is in memory: the image says that it has to be opened again.
#[test]
fn a_repair_that_ends_with_its_runtime_leaves_nothing_to_be_written() {
    let runtime = || tokio::runtime::Builder::new_current_thread().build();
    let mut changed = 0;
    for nth in 0.. {
        let (first, second) = (runtime().unwrap(), runtime().unwrap());
        let disk = second.block_on(with_faults_of_three_kinds());
        let driver = FaultDriver::new(Box::new(disk.clone()));
        let faults = driver.faults();
        let (node, _image) = second.block_on(async {
            let file = driver.into_node(NodeFlags::default()).await.unwrap();
            open_over(file, None).await.unwrap()
        });
        let before = disk.snapshot();
        faults.add(Rule::hang().only(nth));
        let is_over = first.block_on(async {
            let mut repair = Box::pin(node.check(CheckFix::All));
            while faults.hung() == 0 {
                if repair.as_mut().now_or_never().is_some() {
                    return true;
                }
                tokio::task::yield_now().await;
            }
            false
        });
        drop(first);
        if is_over {
            break;
        }
        faults.clear();
        if disk.snapshot() != before {
            changed += 1;
            let written = second.block_on(write(&node, 0, 4096, 9));
            assert!(written.is_err(), "after {nth} requests");
        }
    }
    assert!(changed > 3, "{changed} places");
}
