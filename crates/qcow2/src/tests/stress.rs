// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rule: requests that touch different bytes never harm each other, however close they lie. The method: several tasks on a multi-thread runtime own
//! every n-th sector, so that each cluster belongs to all of them; each writes, zeroes and reads back its own sectors, some requests are dropped
//! half way, one task flushes all the time and discards, packs and writes clusters that nobody else uses, so that clusters are freed and handed out again, and one
//! takes and deletes snapshots, saves VM state, changes refcounts and checks.
//!
//! `BLOCKLAYER_STRESS_RUNS` says how many runs (`cargo xtask drop --count N`).

use std::sync::Arc;
use std::time::Duration;

use blockcore::testing::{CrashDriver, Rng};
use blockcore::{CheckFix, IoBufMut, Node, Options, SnapshotRequest, SnapshotSelector, WriteFlags};

use super::{Shape, findings, fresh_image, open_on, read_all};
use crate::crypto::CryptMethod;

const OWNERS: u64 = 7;
const SECTOR: u64 = 512;
/// The disk's first half is shared by the owners, the second is the discarder's.
const HALF: u64 = 256 << 10;

/// On the spot, if that is possible.
async fn read_sector(node: &Node, offset: u64) -> Vec<u8> {
    let mut sector = vec![0xee; SECTOR as usize];
    if node.read_nowait(offset, &mut sector) {
        return sector;
    }
    let buf = IoBufMut::zeroed(SECTOR as usize);
    let read = node.preadv(offset, buf, Default::default());
    read.await.unwrap().to_vec()
}

/// Uses clusters of the disk's second half.
async fn free_and_take(node: Arc<Node>, cluster: u64, seed: u64) {
    let mut rng = Rng::new(seed);
    for step in 0..150u64 {
        let offset = HALF + rng.below(HALF / cluster) * cluster;
        let data = |value| vec![value; cluster as usize].into();
        let done = match step % 4 {
            0 => node.pwritev(offset, data(9), WriteFlags::empty()).await,
            1 => node.pdiscard(offset, cluster).await,
            2 => {
                node.pdiscard(offset, cluster).await.unwrap();
                node.pwritev_compressed(offset, data(8)).await
            }
            _ => node.flush().await,
        };
        done.unwrap();
    }
}

/// Changes the image as a whole.
async fn change_all(node: Arc<Node>, seed: u64) {
    let mut rng = Rng::new(seed);
    for number in 0..8u8 {
        let name = format!("s{number}");
        let request = SnapshotRequest::now(&name);
        let state = vec![number; 3000];
        match rng.below(4) {
            0 => {
                let bits = ["16", "32", "64"][rng.below(3) as usize];
                let options = Options::new().with("refcount_bits", bits);
                node.amend(options).await.unwrap();
            }
            1 => {
                let found = node.check(CheckFix::All).await.unwrap();
                assert_eq!(found.messages, [""; 0]);
            }
            2 => {
                node.save_vmstate(100, state.clone().into()).await.unwrap();
                let read = node.load_vmstate(100, IoBufMut::zeroed(3000));
                assert!(read.await.unwrap().to_vec() == state);
            }
            _ => node.snapshot_create(request).await.unwrap(),
        }
        tokio::time::sleep(Duration::from_millis(rng.below(3))).await;
        let all = node.snapshots().await.unwrap();
        if let Some(first) = all.first().filter(|_| rng.chance(60)) {
            let which = SnapshotSelector::IdOrName(first.id.clone());
            node.snapshot_delete(which).await.unwrap();
        }
    }
}

async fn own_sectors(node: Arc<Node>, owner: u64, seed: u64) -> Vec<(u64, u8)> {
    let mut rng = Rng::new(seed);
    let mut values = vec![0u8; (HALF / SECTOR / OWNERS) as usize];
    for step in 0..400u32 {
        let index = rng.below(values.len() as u64);
        let offset = (index * OWNERS + owner) * SECTOR;
        let known = &mut values[index as usize];
        let value = match rng.below(10) {
            0..5 => (step % 255) as u8 + 1,
            5..8 => 0,
            _ => {
                let read = read_sector(&node, offset).await;
                assert_eq!(read, [*known; SECTOR as usize], "sector at {offset:#x}");
                continue;
            }
        };
        let request = async {
            if value == 0 {
                let flags = if rng.chance(50) {
                    WriteFlags::MAY_UNMAP
                } else {
                    WriteFlags::empty()
                };
                node.pwrite_zeroes(offset, SECTOR, flags).await
            } else {
                node.pwritev(
                    offset,
                    vec![value; SECTOR as usize].into(),
                    WriteFlags::empty(),
                )
                .await
            }
        };
        if step % 9 == 8 {
            let dropped = tokio::time::timeout(Duration::from_micros(30), request)
                .await
                .is_err();
            if dropped {
                // Done or not: whatever it is now, it stays.
                let now = read_sector(&node, offset).await;
                assert!(now.iter().all(|b| *b == now[0]) && (now[0] == value || now[0] == *known));
                // A later write settles it for good.
                node.pwritev(
                    offset,
                    vec![value; SECTOR as usize].into(),
                    WriteFlags::empty(),
                )
                .await
                .unwrap();
            }
        } else {
            request.await.unwrap();
        }
        *known = value;
    }
    let place = |(i, v): (usize, u8)| ((i as u64 * OWNERS + owner) * SECTOR, v);
    values.into_iter().enumerate().map(place).collect()
}

async fn run(seed: u64) {
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let extended_l2 = rng.chance(40);
    let smallest = if extended_l2 { 14 } else { 10 };
    let shape = Shape {
        size: 2 * HALF,
        cluster_bits: smallest + rng.below(5) as u32,
        version: 3,
        refcount_order: 4,
        extended_l2,
        encryption: CryptMethod::None,
    };
    let backing = rng.chance(50).then(|| vec![0u8; (HALF / 2) as usize]);
    let disk = CrashDriver::new(fresh_image(shape));
    let (node, image) = open_on(disk.clone(), backing.clone()).await;
    let owners: Vec<_> = (0..OWNERS)
        .map(|o| tokio::spawn(own_sectors(node.clone(), o, seed.wrapping_add(o))))
        .collect();
    let cluster = 1 << shape.cluster_bits;
    let helper = tokio::spawn(free_and_take(node.clone(), cluster, seed ^ 1));
    let manager = rng.chance(50);
    let manager = manager.then(|| tokio::spawn(change_all(node.clone(), seed ^ 2)));
    let mut expected = Vec::new();
    for owner in owners {
        expected.extend(owner.await.unwrap());
    }
    helper.await.unwrap();
    if let Some(manager) = manager {
        manager.await.unwrap();
    }
    let all = read_all(&node).await;
    for &(offset, value) in &expected {
        let sector = &all[offset as usize..(offset + SECTOR) as usize];
        assert!(
            sector.iter().all(|b| *b == value),
            "seed {seed}: sector at {offset:#x} should be {value}"
        );
    }
    blockcore::BlockDriver::close(node.driver()).await.unwrap();
    assert_eq!(image.tasks.count(), 0);
    assert_eq!(
        findings(disk.snapshot()).await,
        Vec::<String>::new(),
        "seed {seed}"
    );
    let (again, _image) = open_on(disk, backing).await;
    assert_eq!(read_all(&again).await, all, "seed {seed}: opened again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn neighbours_in_one_cluster_never_harm_each_other() {
    let seed = Rng::seed_from_env();
    let runs = std::env::var("BLOCKLAYER_STRESS_RUNS").ok();
    let runs: u64 = runs.and_then(|n| n.parse().ok()).unwrap_or(6);
    for i in 0..runs {
        run(seed.wrapping_add(i)).await;
    }
}
