// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`HBitmap`]: a set of bit numbers that takes memory only where it is neither empty nor full. Dirty bitmaps are made of it (`dirty_bitmap`).
//!
//! It is a tree in which every block has 64 parts: a leaf is 64 words of 64 bits, a branch is 64 blocks. A block with no bit, or with every bit, is neither,
//! but one word that says so; and a leaf or a branch that becomes uniform becomes such a word at once, so that equal sets are equal trees.
//! A terabyte in steps of 64 KiB takes 2 MiB at worst, and nothing as long as nothing, or all of it, is marked.

use std::ops::Range;

/// Bits of a bit number that choose one of the parts of a block.
const FANOUT_BITS: u32 = 6;
/// Parts of a block, and words of a leaf.
const FANOUT: usize = 1 << FANOUT_BITS;
/// A leaf has `1 << LEAF_BITS` bits.
const LEAF_BITS: u32 = 2 * FANOUT_BITS;
/// Bits in a word.
const WORD_BITS: u64 = 64;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Block {
    /// No bit is set.
    #[default]
    Clear,
    /// Every bit is set.
    Full,
    Leaf(Box<[u64; FANOUT]>),
    Branch(Box<[Block; FANOUT]>),
}

/// A set of bit numbers below a length.
#[derive(Clone, Debug, Default)]
pub struct HBitmap {
    len: u64,
    count: u64,
    /// The root has `1 << root_bits` bits.
    root_bits: u32,
    root: Block,
}

impl PartialEq for HBitmap {
    fn eq(&self, other: &HBitmap) -> bool {
        // One that was longer once may have a higher tree.
        let same_tree = self.root_bits == other.root_bits && self.root == other.root;
        self.len == other.len
            && self.count == other.count
            && (same_tree || self.ranges().eq(other.ranges()))
    }
}

impl Eq for HBitmap {}

/// The bits of `word` from `range`.
fn mask(range: Range<u64>) -> u64 {
    let low = |n: u64| {
        if n >= WORD_BITS {
            u64::MAX
        } else {
            (1 << n) - 1
        }
    };
    low(range.end) & !low(range.start)
}

/// The part of `range` that lies in the `index`th part of a block, as seen from there.
fn within(range: &Range<u64>, index: usize, part_bits: u32) -> Range<u64> {
    let base = (index as u64) << part_bits;
    let size = 1 << part_bits;
    range.start.saturating_sub(base).min(size)..range.end.saturating_sub(base).min(size)
}

/// The parts of a block that a range, which is not empty, touches.
fn parts(range: &Range<u64>, part_bits: u32) -> Range<usize> {
    (range.start >> part_bits) as usize..((range.end - 1) >> part_bits) as usize + 1
}

impl Block {
    fn uniform(value: bool) -> Block {
        if value { Block::Full } else { Block::Clear }
    }

    /// How many bits are set in a block of `1 << bits` bits.
    fn count(&self, bits: u32) -> u64 {
        match self {
            Block::Clear => 0,
            Block::Full => 1 << bits,
            Block::Leaf(words) => words.iter().map(|w| u64::from(w.count_ones())).sum(),
            Block::Branch(blocks) => blocks.iter().map(|b| b.count(bits - FANOUT_BITS)).sum(),
        }
    }

    /// Takes a uniform block apart.
    fn split(&mut self, bits: u32) {
        let value = match self {
            Block::Clear => false,
            Block::Full => true,
            Block::Leaf(_) | Block::Branch(_) => return,
        };
        *self = if bits == LEAF_BITS {
            Block::Leaf(Box::new([if value { u64::MAX } else { 0 }; FANOUT]))
        } else {
            Block::Branch(Box::new(std::array::from_fn(|_| Block::uniform(value))))
        };
    }

    /// Makes one word of a block that has become uniform. Only what was just changed to `value` can have made it so.
    fn join(&mut self, value: bool) {
        let is_uniform = match self {
            Block::Clear | Block::Full => return,
            Block::Leaf(words) => {
                let wanted = if value { u64::MAX } else { 0 };
                words.iter().all(|w| *w == wanted)
            }
            Block::Branch(blocks) => {
                let wanted = Block::uniform(value);
                blocks.iter().all(|b| *b == wanted)
            }
        };
        if is_uniform {
            *self = Block::uniform(value);
        }
    }

    /// Gives the bits of a range a value, and says how many had the other.
    fn set(&mut self, bits: u32, range: Range<u64>, value: bool) -> u64 {
        if *self == Block::uniform(value) || range.is_empty() {
            return 0;
        }
        if range == (0..1 << bits) {
            let count = self.count(bits);
            *self = Block::uniform(value);
            return if value { (1 << bits) - count } else { count };
        }
        self.split(bits);
        let part_bits = bits - FANOUT_BITS;
        let mut changed = 0;
        match self {
            Block::Leaf(words) => {
                for i in parts(&range, part_bits) {
                    let mask = mask(within(&range, i, part_bits));
                    let word = &mut words[i];
                    let before = *word;
                    *word = if value { before | mask } else { before & !mask };
                    changed += u64::from((before ^ *word).count_ones());
                }
            }
            Block::Branch(blocks) => {
                for i in parts(&range, part_bits) {
                    changed += blocks[i].set(part_bits, within(&range, i, part_bits), value);
                }
            }
            Block::Clear | Block::Full => unreachable!("it was just taken apart"),
        }
        self.join(value);
        changed
    }

    /// Sets the bits that are set in a word, whose first bit is `bit`, too, and says how many that were.
    fn merge_word(&mut self, bits: u32, bit: u64, word: u64) -> u64 {
        if word == 0 || *self == Block::Full {
            return 0;
        }
        self.split(bits);
        let part_bits = bits - FANOUT_BITS;
        let index = (bit >> part_bits) as usize;
        let added = match self {
            Block::Leaf(words) => {
                let added = word & !words[index];
                words[index] |= word;
                u64::from(added.count_ones())
            }
            Block::Branch(blocks) => {
                let within = bit & ((1 << part_bits) - 1);
                blocks[index].merge_word(part_bits, within, word)
            }
            Block::Clear | Block::Full => unreachable!("it was just taken apart"),
        };
        self.join(true);
        added
    }

    /// Sets the bits that are set in `other`, a block of the same size, too, and says how many that were.
    fn merge(&mut self, bits: u32, other: &Block) -> u64 {
        match (&*self, other) {
            (_, Block::Clear) | (Block::Full, _) => return 0,
            (_, Block::Full) => return self.set(bits, 0..1 << bits, true),
            (Block::Clear, _) => {
                *self = other.clone();
                return other.count(bits);
            }
            _ => {}
        }
        let part_bits = bits - FANOUT_BITS;
        let mut added = 0;
        match (&mut *self, other) {
            (Block::Leaf(words), Block::Leaf(others)) => {
                for (word, other) in words.iter_mut().zip(others.iter()) {
                    added += u64::from((other & !*word).count_ones());
                    *word |= other;
                }
            }
            (Block::Branch(blocks), Block::Branch(others)) => {
                for (block, other) in blocks.iter_mut().zip(others.iter()) {
                    added += block.merge(part_bits, other);
                }
            }
            _ => unreachable!("blocks of the same size are of the same kind"),
        }
        self.join(true);
        added
    }

    /// The first bit of a range that has a value.
    fn find(&self, bits: u32, range: Range<u64>, value: bool) -> Option<u64> {
        if range.is_empty() {
            return None;
        }
        let part_bits = bits - FANOUT_BITS;
        match self {
            Block::Clear | Block::Full => (*self == Block::uniform(value)).then_some(range.start),
            Block::Leaf(words) => parts(&range, part_bits).find_map(|i| {
                let word = if value { words[i] } else { !words[i] };
                let wanted = word & mask(within(&range, i, part_bits));
                (wanted != 0).then(|| i as u64 * WORD_BITS + u64::from(wanted.trailing_zeros()))
            }),
            Block::Branch(blocks) => parts(&range, part_bits).find_map(|i| {
                let found = blocks[i].find(part_bits, within(&range, i, part_bits), value);
                found.map(|at| ((i as u64) << part_bits) + at)
            }),
        }
    }

    /// The word that holds a bit.
    fn word(&self, bits: u32, bit: u64) -> u64 {
        let part_bits = bits - FANOUT_BITS;
        let index = (bit >> part_bits) as usize;
        match self {
            Block::Clear => 0,
            Block::Full => u64::MAX,
            Block::Leaf(words) => words[index],
            Block::Branch(blocks) => blocks[index].word(part_bits, bit & ((1 << part_bits) - 1)),
        }
    }
}

impl HBitmap {
    /// No bits of `len`. At most `1 << 60` make sense.
    pub fn new(len: u64) -> HBitmap {
        let mut bitmap = HBitmap {
            root_bits: LEAF_BITS,
            ..HBitmap::default()
        };
        bitmap.set_len(len);
        bitmap
    }

    /// How many bits there are, set or not.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether no bit is set.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// How many bits are set.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Gives the bitmap another length. What is cut off is forgotten, what appears is not set.
    pub fn set_len(&mut self, len: u64) {
        self.clear(len..self.len);
        self.len = len;
        while self.root_bits < u64::BITS - FANOUT_BITS && len > 1 << self.root_bits {
            let lower = std::mem::take(&mut self.root);
            if lower != Block::Clear {
                let mut blocks = [const { Block::Clear }; FANOUT];
                blocks[0] = lower;
                self.root = Block::Branch(Box::new(blocks));
            }
            self.root_bits += FANOUT_BITS;
        }
    }

    fn within_len(&self, range: Range<u64>) -> Range<u64> {
        let end = range.end.min(self.len);
        range.start.min(end)..end
    }

    /// Sets the bits of a range; of what lies past the end nothing is kept.
    pub fn set(&mut self, range: Range<u64>) {
        let range = self.within_len(range);
        self.count += self.root.set(self.root_bits, range, true);
    }

    /// Clears the bits of a range.
    pub fn clear(&mut self, range: Range<u64>) {
        let range = self.within_len(range);
        self.count -= self.root.set(self.root_bits, range, false);
    }

    /// Whether a bit is set.
    pub fn get(&self, bit: u64) -> bool {
        bit < self.len && self.root.word(self.root_bits, bit) >> (bit % WORD_BITS) & 1 == 1
    }

    /// Sets every bit that is set in `other`, which has the same length.
    pub fn merge(&mut self, other: &HBitmap) {
        assert_eq!(self.len, other.len, "bitmaps of one length are merged");
        if self.root_bits == other.root_bits {
            self.count += self.root.merge(self.root_bits, &other.root);
        } else {
            other.ranges().for_each(|range| self.set(range));
        }
    }

    /// The first set bit from `from` on.
    pub fn next_set(&self, from: u64) -> Option<u64> {
        let range = self.within_len(from..self.len);
        self.root.find(self.root_bits, range, true)
    }

    /// The first bit from `from` on that is not set.
    pub fn next_clear(&self, from: u64) -> Option<u64> {
        let range = self.within_len(from..self.len);
        self.root.find(self.root_bits, range, false)
    }

    /// The set bits as ranges, in order, none empty and no two adjacent.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let start = self.next_set(from)?;
            from = self.next_clear(start).unwrap_or(self.len);
            Some(start..from)
        })
    }

    /// The value of a range of bits that all have the same. One that reaches past the end is not full.
    pub fn uniform(&self, range: Range<u64>) -> Option<bool> {
        let value = self.get(range.start);
        let other = match value {
            true => self.next_clear(range.start).unwrap_or(self.len),
            false => self.next_set(range.start).unwrap_or(u64::MAX),
        };
        (other >= range.end).then_some(value)
    }

    /// The bits from `first` on, a multiple of 64, as bytes: bit `n` of them is bit `n % 8` of byte `n / 8`. What lies past the end is not set.
    pub fn to_bytes(&self, first: u64, bytes: usize) -> Vec<u8> {
        debug_assert!(first.is_multiple_of(WORD_BITS));
        let mut out = Vec::with_capacity(bytes.next_multiple_of(8));
        for bit in (first..).step_by(64).take(bytes.div_ceil(8)) {
            let word = if bit < self.len {
                self.root.word(self.root_bits, bit)
            } else {
                0
            };
            out.extend(word.to_le_bytes());
        }
        out.truncate(bytes);
        out
    }

    /// Sets the bits from `first` on, a multiple of 64, that are set in `bytes`, which are as those of [`to_bytes`](HBitmap::to_bytes).
    pub fn set_bytes(&mut self, first: u64, bytes: &[u8]) {
        debug_assert!(first.is_multiple_of(WORD_BITS));
        for (i, bytes) in bytes.chunks(8).enumerate() {
            let bit = first + i as u64 * WORD_BITS;
            if bit >= self.len {
                return;
            }
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            let word = u64::from_le_bytes(word) & mask(0..self.len - bit);
            self.count += self.root.merge_word(self.root_bits, bit, word);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;

    /// What the tree must be at all times: joined where it can be, and counted right.
    fn check(bitmap: &HBitmap, model: &[bool]) {
        fn is_joined(block: &Block) -> bool {
            match block {
                Block::Clear | Block::Full => true,
                Block::Leaf(words) => {
                    words.iter().any(|w| *w != 0) && words.iter().any(|w| *w != u64::MAX)
                }
                Block::Branch(blocks) => {
                    blocks.iter().any(|b| *b != Block::Clear)
                        && blocks.iter().any(|b| *b != Block::Full)
                        && blocks.iter().all(is_joined)
                }
            }
        }
        assert!(is_joined(&bitmap.root));
        assert_eq!(bitmap.len(), model.len() as u64);
        assert_eq!(bitmap.count(), model.iter().filter(|b| **b).count() as u64);
        let mut at = 0;
        for range in bitmap.ranges() {
            let (start, end) = (range.start as usize, range.end as usize);
            assert!(start < end && (at == 0 || at < start));
            assert!(model[at..start].iter().all(|b| !b));
            assert!(model[start..end].iter().all(|b| *b));
            at = end;
        }
        assert!(model[at..].iter().all(|b| !b));
    }

    fn random_range(rng: &mut Rng, len: u64) -> Range<u64> {
        let start = rng.below(len + 1);
        let most = [1, 70, 5000, len][rng.below(4) as usize];
        start..start + rng.below(most + 1)
    }

    #[test]
    fn it_is_what_an_array_of_flags_is() {
        let seed = Rng::seed_from_env();
        for i in 0..20 {
            let mut rng = Rng::new(seed.wrapping_add(i));
            let len = 1 + rng.below(600_000);
            let mut bitmap = HBitmap::new(len);
            let mut model = vec![false; len as usize];
            for _ in 0..60 {
                let range = random_range(&mut rng, bitmap.len());
                let end = range.end.min(bitmap.len()) as usize;
                let value = rng.chance(60);
                model[range.start as usize..end].fill(value);
                match value {
                    true => bitmap.set(range),
                    false => bitmap.clear(range),
                }
                if rng.chance(10) {
                    let len = 1 + rng.below(600_000);
                    bitmap.set_len(len);
                    model.resize(len as usize, false);
                }
                let bit = rng.below(bitmap.len());
                assert_eq!(bitmap.get(bit), model[bit as usize]);
            }
            check(&bitmap, &model);
            let mut other = HBitmap::new(bitmap.len());
            for _ in 0..20 {
                let range = random_range(&mut rng, bitmap.len());
                model[range.start as usize..range.end.min(bitmap.len()) as usize].fill(true);
                other.set(range);
            }
            other.merge(&bitmap);
            check(&other, &model);
            bitmap.merge(&other);
            assert_eq!(bitmap, other);
            // The same, by bytes that are set where some are set already, and by more of them than there are bits.
            let all = bitmap.to_bytes(0, bitmap.len().div_ceil(8) as usize);
            let mut read = HBitmap::new(bitmap.len());
            read.set(random_range(&mut rng, bitmap.len()));
            read.merge(&bitmap);
            let mut some = HBitmap::new(bitmap.len());
            read.ranges().step_by(2).for_each(|r| some.set(r));
            some.set_bytes(0, &all);
            read.ranges().step_by(2).for_each(|r| bitmap.set(r));
            assert_eq!(some, bitmap);
            let mut full = HBitmap::new(bitmap.len());
            full.set_bytes(64, &vec![0xff; all.len() + 9]);
            check(&full, &(0..full.len()).map(|b| b >= 64).collect::<Vec<_>>());
        }
    }

    #[test]
    fn bytes_hold_the_lowest_bit_first() {
        let mut bitmap = HBitmap::new(10_000);
        bitmap.set(64..65);
        bitmap.set(71..81);
        bitmap.set(9_999..10_000);
        assert_eq!(bitmap.to_bytes(64, 3), [0x81, 0xff, 0x01]);
        assert_eq!(bitmap.to_bytes(9_984, 16)[..3], [0, 0x80, 0]);
        let mut again = HBitmap::new(10_000);
        again.set_bytes(0, &bitmap.to_bytes(0, 1250));
        assert_eq!(again, bitmap);
        assert_eq!(bitmap.uniform(0..64), Some(false));
        assert_eq!(bitmap.uniform(72..81), Some(true));
        assert_eq!(bitmap.uniform(72..82), None);
        bitmap.set(0..10_000);
        assert_eq!(bitmap.uniform(0..10_000), Some(true));
        assert_eq!(bitmap.uniform(0..10_001), None);
    }

    #[test]
    fn the_longest_disk_is_marked_and_walked_at_once() {
        let mut bitmap = HBitmap::new(1 << 54);
        bitmap.set(0..1 << 54);
        bitmap.clear(1 << 53..(1 << 53) + 1);
        let ranges: Vec<_> = bitmap.ranges().collect();
        assert_eq!(ranges, [0..1 << 53, (1 << 53) + 1..1 << 54]);
        assert_eq!(bitmap.count(), (1 << 54) - 1);
    }
}
