// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rule: requests that touch different bytes never harm each other, however close they lie. The method: several tasks on a multi-thread runtime own
//! every n-th sector, so that each cluster belongs to all of them; each writes, zeroes and reads back its own sectors, some requests are dropped
//! half way, one task flushes all the time, one discards clusters that nobody else uses, so that clusters are freed and handed out again.
//!
//! `BLOCKLAYER_STRESS_RUNS` says how many runs (`cargo xtask drop --count N`).

use std::sync::Arc;
use std::time::Duration;

use blockcore::testing::{CrashDriver, Rng};
use blockcore::{IoBufMut, Node, WriteFlags};

use super::{Shape, findings, fresh_image, open_on, read_all};
use crate::crypto::CryptMethod;

const OWNERS: u64 = 7;
const SECTOR: u64 = 512;
/// The disk's first half is shared by the owners, the second is the discarder's.
const HALF: u64 = 256 << 10;

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
                let read = node.preadv(
                    offset,
                    IoBufMut::zeroed(SECTOR as usize),
                    Default::default(),
                );
                assert_eq!(
                    read.await.unwrap().to_vec(),
                    vec![*known; SECTOR as usize],
                    "sector at {offset:#x}"
                );
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
                let read = node.preadv(
                    offset,
                    IoBufMut::zeroed(SECTOR as usize),
                    Default::default(),
                );
                let now = read.await.unwrap().to_vec();
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
    let helper = {
        let (node, mut rng) = (node.clone(), Rng::new(seed ^ 1));
        tokio::spawn(async move {
            let cluster = 1 << shape.cluster_bits;
            for step in 0..150u64 {
                let offset = HALF + rng.below(HALF / cluster) * cluster;
                match step % 3 {
                    0 => node
                        .pwritev(
                            offset,
                            vec![9; cluster as usize].into(),
                            WriteFlags::empty(),
                        )
                        .await
                        .unwrap(),
                    1 => node.pdiscard(offset, cluster).await.unwrap(),
                    _ => node.flush().await.unwrap(),
                }
            }
        })
    };
    let mut expected = Vec::new();
    for owner in owners {
        expected.extend(owner.await.unwrap());
    }
    helper.await.unwrap();
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
