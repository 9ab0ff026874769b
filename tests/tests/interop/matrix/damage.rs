// SPDX-License-Identifier: MIT OR Apache-2.0
//! Refcounts of an image file set to something wrong, by hand.

use crate::support::Random;

/// The fields of a qcow2 header that lead to refcounts.
struct Refcounts {
    cluster: usize,
    bits: usize,
    /// Host offsets of the refcount blocks there are, in the order of what they count.
    blocks: Vec<Option<usize>>,
}

fn number(bytes: &[u8], at: usize, width: usize) -> usize {
    bytes[at..at + width]
        .iter()
        .fold(0, |sum, byte| sum << 8 | usize::from(*byte))
}

/// An offset in a table entry, without its flags.
fn offset(entry: usize) -> Option<usize> {
    let offset = entry & 0x00ff_ffff_ffff_fe00;
    (offset != 0).then_some(offset)
}

impl Refcounts {
    fn of(image: &[u8]) -> Refcounts {
        let cluster = 1 << number(image, 20, 4);
        let bits = match number(image, 4, 4) {
            2 => 16,
            _ => 1 << number(image, 96, 4),
        };
        let (table, clusters) = (number(image, 48, 8), number(image, 56, 4));
        let blocks = (0..clusters * cluster / 8)
            .map(|i| offset(number(image, table + 8 * i, 8)))
            .collect();
        Refcounts {
            cluster,
            bits,
            blocks,
        }
    }

    fn per_block(&self) -> usize {
        self.cluster * 8 / self.bits
    }

    /// Where the refcount of a cluster lies: at which byte, and from which bit of it on.
    fn place(&self, index: usize) -> Option<(usize, usize)> {
        let block = (*self.blocks.get(index / self.per_block())?)?;
        let bit = index % self.per_block() * self.bits;
        Some((block + bit / 8, bit % 8))
    }

    fn get(&self, image: &[u8], index: usize) -> Option<usize> {
        let (byte, bit) = self.place(index)?;
        Some(match self.bits {
            1..8 => usize::from(image[byte]) >> bit & ((1 << self.bits) - 1),
            bits => number(image, byte, bits / 8),
        })
    }

    fn set(&self, image: &mut [u8], index: usize, count: u8) {
        let Some((byte, bit)) = self.place(index) else {
            return;
        };
        match self.bits {
            1..8 => {
                let mask = ((1u8 << self.bits) - 1) << bit;
                image[byte] = image[byte] & !mask | count << bit;
            }
            bits => {
                image[byte..byte + bits / 8].fill(0);
                image[byte + bits / 8 - 1] = count;
            }
        }
    }
}

/// Counts some unused clusters as used: in the middle of the file, or behind its end, and then it grows. (What is counted behind its end is nothing that a
/// check looks at.)
pub fn leak(image: &mut Vec<u8>, random: &mut Random) {
    let refcounts = Refcounts::of(image);
    let clusters = image.len().div_ceil(refcounts.cluster) + 3;
    image.resize(clusters * refcounts.cluster, 0);
    for index in 0..clusters {
        if refcounts.get(image, index) == Some(0) && random.below(2) == 0 {
            refcounts.set(image, index, 1);
        }
    }
}

/// Counts the L1 table and the first L2 table, as far as there are any, as unused.
pub fn uncount(image: &mut [u8]) {
    let refcounts = Refcounts::of(image);
    let l1 = number(image, 40, 8);
    let entries = number(image, 36, 4);
    let l2 = (0..entries).find_map(|i| offset(number(image, l1 + 8 * i, 8)));
    for place in [Some(l1), l2].into_iter().flatten() {
        refcounts.set(image, place / refcounts.cluster, 0);
    }
}
