// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rule: an image reads as a plain byte vector that went through the same operations. The method: seeded random operations, several in flight,
//! over random geometries and backing lengths; the whole disk is compared now and then, and after opening the image again.

use blockcore::testing::{CrashDriver, Rng};
use blockcore::{Preallocation, TruncateRequest, WriteFlags};

use super::{Shape, findings, fresh_image, open_on, read_all};
use crate::crypto::CryptMethod;

/// One run of a seed.
async fn run(seed: u64) {
    let mut rng = Rng::new(seed);
    let version = 2 + rng.below(2) as u32;
    let extended_l2 = version == 3 && rng.chance(50);
    let cluster_bits = match extended_l2 {
        true => 14 + rng.below(3) as u32,
        false => 9 + rng.below(6) as u32,
    };
    let refcount_order = if version == 2 { 4 } else { rng.below(7) as u32 };
    let size = (1 + rng.below(200)) * 512 + rng.below(4) * (1 << cluster_bits);
    let shape = Shape {
        size,
        cluster_bits,
        version,
        refcount_order,
        extended_l2,
        encryption: CryptMethod::None,
    };
    let backing: Option<Vec<u8>> = rng.chance(60).then(|| {
        let len = rng.below(size + 20 * 512) as usize;
        // Stretches of zeroes and of data, and an end anywhere.
        let mut fill = 0;
        (0..len)
            .map(|i| {
                if i % 1536 == 0 {
                    fill = rng.next_u64() as u8 & (rng.below(2) as u8 * 255);
                    fill
                } else {
                    fill
                }
            })
            .collect()
    });
    println!(
        "seed {seed}: {shape:?} backing {:?}",
        backing.as_ref().map(Vec::len)
    );
    let disk = CrashDriver::new(fresh_image(shape));
    let (node, mut image) = open_on(disk.clone(), backing.clone()).await;
    let mut node = node;
    let mut model = vec![0; size as usize];
    if let Some(b) = &backing {
        let n = b.len().min(model.len());
        model[..n].copy_from_slice(&b[..n]);
    }
    for step in 0..60 {
        let length = model.len() as u64;
        let offset = rng.below(length);
        let bytes = (1 + rng.below(3 << cluster_bits)).min(length - offset);
        let (offset, bytes) = if rng.chance(50) {
            (
                offset / 512 * 512,
                bytes.next_multiple_of(512).min(length - offset / 512 * 512),
            )
        } else {
            (offset, bytes)
        };
        let range = offset as usize..(offset + bytes) as usize;
        match rng.below(10) {
            0..4 => {
                let fill = rng.next_u64() as u8 | 1;
                model[range].fill(fill);
                let data = vec![fill; bytes as usize];
                node.pwritev(offset, data.into(), WriteFlags::empty())
                    .await
                    .unwrap();
            }
            4..6 => {
                let flags = if rng.chance(50) {
                    WriteFlags::MAY_UNMAP
                } else {
                    WriteFlags::empty()
                };
                model[range].fill(0);
                node.pwrite_zeroes(offset, bytes, flags).await.unwrap();
            }
            6 => {
                node.pdiscard(offset, bytes).await.unwrap();
                // What is discarded reads as zero or as before.
                let now = read_all(&node).await;
                for i in range {
                    assert!(
                        now[i] == model[i] || now[i] == 0,
                        "seed {seed} step {step}: byte {i} after a discard"
                    );
                }
                let outside = |i: &usize| *i < offset as usize || *i >= (offset + bytes) as usize;
                assert!(
                    (0..model.len()).filter(outside).all(|i| now[i] == model[i]),
                    "seed {seed} step {step}"
                );
                model = now;
            }
            7 => node.flush().await.unwrap(),
            8 => {
                let grown = length + rng.below(5) * 512;
                let preallocation = if rng.chance(20) {
                    Preallocation::Metadata
                } else {
                    Preallocation::Off
                };
                let request = TruncateRequest {
                    bytes: grown,
                    preallocation,
                    ..Default::default()
                };
                let hidden = backing
                    .as_ref()
                    .is_some_and(|b| b.len().next_multiple_of(512) as u64 > length);
                let grew = node.truncate(request).await;
                let whole_clusters = length.next_multiple_of(1 << cluster_bits) < grown;
                if version == 2 && hidden && whole_clusters {
                    // What would appear is the backing disk's, and version 2 can't hide it but by writing, in the last cluster.
                    assert!(grew.is_err());
                } else {
                    grew.unwrap();
                    model.resize(grown as usize, 0);
                }
            }
            _ => {
                // Two clusters' neighbours at once: the same clusters change from several sides.
                let half = model.len() / 2;
                let fills = [rng.next_u64() as u8 | 1, rng.next_u64() as u8 | 1];
                let at = [half.saturating_sub(700), half];
                let n = 600.min(model.len() - half);
                let writes = [0, 1].map(|i| {
                    model[at[i]..at[i] + n.min(half - at[0].min(half)).max(1)].fill(fills[i]);
                    let len = n.min(half - at[0].min(half)).max(1);
                    node.pwritev(
                        at[i] as u64,
                        vec![fills[i]; len].into(),
                        WriteFlags::empty(),
                    )
                });
                for result in futures::future::join_all(writes).await {
                    result.unwrap();
                }
            }
        }
        if step % 5 == 0 {
            let now = read_all(&node).await;
            if let Some(at) = (0..model.len()).find(|&i| now[i] != model[i]) {
                panic!(
                    "seed {seed} step {step}: byte {at:#x} is {} and should be {}",
                    now[at], model[at]
                );
            }
        }
        if step % 17 == 16 {
            blockcore::BlockDriver::close(node.driver()).await.unwrap();
            assert_eq!(
                findings(disk.snapshot()).await,
                Vec::<String>::new(),
                "seed {seed} step {step}"
            );
            (node, image) = open_on(disk.clone(), backing.clone()).await;
            assert_eq!(
                read_all(&node).await,
                model,
                "seed {seed} step {step}: opened again"
            );
        }
    }
    assert_eq!(image.tasks.count(), 0);
}

#[tokio::test]
async fn an_image_reads_as_the_bytes_that_were_written() {
    let seed = Rng::seed_from_env();
    for i in 0..40 {
        run(seed.wrapping_add(i)).await;
    }
}
