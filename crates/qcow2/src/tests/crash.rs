// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rule: after a power cut at any point, every sector reads as one of the values it had since the last completed flush, and the image has leaks at
//! most. The method: random operations over a disk that logs writes and flushes; for many cuts, images that the cut could leave are opened, checked and
//! compared with what each sector may hold.
//!
//! Each test of an ordering rule is this one: INV QCOW2-ORD-1, INV QCOW2-ORD-2, INV QCOW2-ORD-3, INV QCOW2-ORD-4, INV QCOW2-ORD-5. See docs/TESTING.md for
//! how each was seen to fail.

use std::collections::BTreeSet;

use blockcore::WriteFlags;
use blockcore::testing::{CrashDriver, Rng};

use super::{Shape, corruptions, fresh_image, open_on, read_all};

const SECTOR: usize = 512;

/// What each sector held, and when. Sectors are filled with one byte value.
struct History {
    /// For each sector: (number of the operation, entries in the log when it began, value).
    values: Vec<Vec<(usize, usize, u8)>>,
    /// Numbers of flushes, and the entries in the log when they had ended.
    flushes: Vec<(usize, usize)>,
}

impl History {
    /// The values that a sector may read as after a cut at `cut`.
    fn allowed(&self, sector: usize, cut: usize) -> BTreeSet<u8> {
        // Everything before the last flush that ended before the cut is settled.
        let settled = self
            .flushes
            .iter()
            .filter(|(_, ended)| *ended <= cut)
            .map(|(number, _)| *number)
            .max()
            .unwrap_or(0);
        let values = &self.values[sector];
        let last_settled = values
            .iter()
            .rposition(|(number, _, _)| *number < settled)
            .unwrap_or(0);
        values[last_settled..]
            .iter()
            .filter(|(_, begun, _)| *begun <= cut)
            .map(|(_, _, v)| *v)
            .collect()
    }
}

async fn run(seed: u64) {
    let mut rng = Rng::new(seed);
    let cluster_bits = 9 + rng.below(4) as u32;
    let sectors = 24 + rng.below(100) as usize;
    let shape = Shape {
        size: (sectors * SECTOR) as u64,
        cluster_bits,
        version: 3,
        refcount_order: 4,
    };
    let backing = rng.chance(60).then(|| {
        let len = rng.below(sectors as u64 + 1) as usize;
        (0..len)
            .flat_map(|s| [200 + (s % 50) as u8; SECTOR])
            .collect::<Vec<u8>>()
    });
    let disk = CrashDriver::new(fresh_image(shape));
    let (node, _image) = open_on(disk.clone(), backing.clone()).await;
    let base = |s: usize| {
        backing
            .as_ref()
            .and_then(|b| b.get(s * SECTOR))
            .copied()
            .unwrap_or(0)
    };
    let mut history = History {
        values: (0..sectors).map(|s| vec![(0, 0, base(s))]).collect(),
        flushes: Vec::new(),
    };
    for step in 1..40u8 {
        let number = usize::from(step);
        let first = rng.below(sectors as u64) as usize;
        let count = (1 + rng.below(2 << (cluster_bits - 9)) as usize).min(sectors - first);
        let (offset, bytes) = ((first * SECTOR) as u64, (count * SECTOR) as u64);
        let begun = disk.log_len();
        let value = match rng.below(10) {
            0..5 => {
                let value = step;
                node.pwritev(
                    offset,
                    vec![value; bytes as usize].into(),
                    WriteFlags::empty(),
                )
                .await
                .unwrap();
                Some(value)
            }
            5..7 => {
                node.pwrite_zeroes(offset, bytes, WriteFlags::MAY_UNMAP)
                    .await
                    .unwrap();
                Some(0)
            }
            7 => {
                node.pdiscard(offset, bytes).await.unwrap();
                None
            }
            _ => {
                node.flush().await.unwrap();
                history.flushes.push((number, disk.log_len()));
                continue;
            }
        };
        let now = read_all(&node).await;
        for (s, values) in history.values.iter_mut().enumerate() {
            let inside = s >= first && s < first + count;
            match value {
                Some(value) if inside => values.push((number, begun, value)),
                None if inside && now[s * SECTOR] == 0 => values.push((number, begun, 0)),
                _ => {}
            }
        }
    }
    for _ in 0..60 {
        let cut = rng.below(disk.log_len() as u64 + 1) as usize;
        let keep = [0, 30, 50, 90, 100][rng.below(5) as usize];
        let image = disk.image_after(cut, keep, &mut rng);
        assert_eq!(
            corruptions(image.clone()).await,
            Vec::<String>::new(),
            "seed {seed} cut {cut} keep {keep}"
        );
        let (left, _) = open_on(CrashDriver::new(image), backing.clone()).await;
        let now = read_all(&left).await;
        for s in 0..sectors {
            let sector = &now[s * SECTOR..(s + 1) * SECTOR];
            let allowed = history.allowed(s, cut);
            assert!(
                sector.iter().all(|b| *b == sector[0]) && allowed.contains(&sector[0]),
                "seed {seed} cut {cut} keep {keep}: sector {s} reads {} and may read {allowed:?}",
                sector[0]
            );
        }
    }
}

#[tokio::test]
async fn a_power_cut_loses_nothing_that_was_flushed_and_shows_nothing_foreign() {
    let seed = Rng::seed_from_env();
    for i in 0..60 {
        run(seed.wrapping_add(i)).await;
    }
}
