// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`L2Entry`]: one word, or two in images with extended L2 entries. What it says ([`Mapping`]), and how new ones are made: [`EntryFormat`].
//!
//! With extended L2 entries a cluster has 32 subclusters. The first word says where the cluster lies, and the second, the bitmap, what each subcluster is.
//! Bit `n` is the data bit of subcluster `n`, bit `n + 32` its zero bit:
//!
//! | data | zero | with a host cluster | without |
//! |---|---|---|---|
//! | 0 | 0 | [`Reserved`](Mapping::Reserved) | [`Unallocated`](Mapping::Unallocated) |
//! | 0 | 1 | [`ZeroAllocated`](Mapping::ZeroAllocated) | [`ZeroPlain`](Mapping::ZeroPlain) |
//! | 1 | 0 | [`Data`](Mapping::Data) | impossible |
//! | 1 | 1 | impossible | impossible |
//!
//! A compressed cluster has no bitmap. The zero flag of the first word has no meaning there.

use std::ops::Range;

use crate::format::{
    L2E_OFFSET_MASK, OFLAG_COMPRESSED, OFLAG_COPIED, OFLAG_ZERO, SUBCLUSTERS_BITS,
};
use crate::l2_table::{BadEntry, Mapping};

/// Subclusters in a cluster.
const SUBCLUSTERS: u32 = 1 << SUBCLUSTERS_BITS;
/// All subclusters of a cluster.
const ALL: u32 = u32::MAX;

/// An L2 entry in host byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct L2Entry {
    /// Where the cluster lies, and its flags.
    pub word: u64,
    /// What its subclusters are. 0 without extended L2 entries.
    pub bitmap: u64,
}

impl L2Entry {
    /// An entry without a bitmap: any of an image without extended L2 entries, or that of a compressed cluster.
    pub fn one_word(word: u64) -> L2Entry {
        L2Entry { word, bitmap: 0 }
    }

    fn new(word: u64, data: u32, zero: u32) -> L2Entry {
        L2Entry {
            word,
            bitmap: u64::from(zero) << SUBCLUSTERS | u64::from(data),
        }
    }

    /// The subclusters that are data.
    fn data(self) -> u32 {
        self.bitmap as u32
    }

    /// The subclusters that are zero.
    fn zero(self) -> u32 {
        (self.bitmap >> SUBCLUSTERS) as u32
    }

    fn is_compressed(self) -> bool {
        self.word & OFLAG_COMPRESSED != 0
    }
}

/// What the L2 entries of an image look like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EntryFormat {
    pub version: u32,
    pub cluster_bits: u32,
    /// Entries have a second word.
    pub is_extended: bool,
    /// Clusters lie in another file: there the place 0 is a place.
    pub has_data_file: bool,
}

impl EntryFormat {
    /// Words in an entry.
    pub fn words(self) -> usize {
        1 + usize::from(self.is_extended)
    }

    /// Entries in a slice of `1 << bytes_bits` bytes, as a power of two.
    pub fn slice_bits(self, bytes_bits: u32) -> u32 {
        bytes_bits - 3 - u32::from(self.is_extended)
    }

    /// The smallest part of a cluster that has a state of its own is `1 << subcluster_bits()` bytes.
    pub fn subcluster_bits(self) -> u32 {
        match self.is_extended {
            true => self.cluster_bits - SUBCLUSTERS_BITS,
            false => self.cluster_bits,
        }
    }

    fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    fn decode(self, word: u64) -> Result<Mapping, BadEntry> {
        if self.has_data_file && word == OFLAG_COPIED {
            let (host, copied) = (0, true);
            return Ok(Mapping::Data { host, copied });
        }
        Mapping::decode(word, self.version, self.cluster_bits)
    }

    /// What a cluster holds from its byte `from` on, and for how many bytes that goes on, to the end of the cluster at most.
    pub fn span(self, entry: L2Entry, from: u64) -> Result<(Mapping, u64), BadEntry> {
        let rest = self.cluster_size() - from;
        if self.is_extended && !entry.is_compressed() {
            return self.subcluster_span(entry, from);
        }
        let mapping = self.decode(entry.word)?;
        Ok((mapping, rest))
    }

    fn subcluster_span(self, entry: L2Entry, from: u64) -> Result<(Mapping, u64), BadEntry> {
        self.check_subclusters(entry)?;
        let bits = self.subcluster_bits();
        let first = (from >> bits) as u32;
        let (data, zero) = (entry.data() >> first, entry.zero() >> first);
        let copied = entry.word & OFLAG_COPIED != 0;
        let (is_data, is_zero) = (data & 1 != 0, zero & 1 != 0);
        let mapping = match (is_data, is_zero, self.host(entry)) {
            (false, true, None) => Mapping::ZeroPlain,
            (false, true, Some(host)) => Mapping::ZeroAllocated { host, copied },
            (false, false, Some(host)) => Mapping::Reserved { host, copied },
            (true, _, Some(host)) => Mapping::Data { host, copied },
            (_, _, None) => Mapping::Unallocated,
        };
        let count = match (is_data, is_zero) {
            (true, _) => data.trailing_ones(),
            (_, true) => zero.trailing_ones(),
            _ => (data | zero).trailing_zeros(),
        };
        let end = u64::from((first + count).min(SUBCLUSTERS)) << bits;
        Ok((mapping, end - from))
    }

    /// The host cluster of an entry with subclusters.
    fn host(self, entry: L2Entry) -> Option<u64> {
        let host = entry.word & L2E_OFFSET_MASK;
        let is_first = self.has_data_file && entry.word & OFLAG_COPIED != 0;
        (host != 0 || is_first).then_some(host)
    }

    fn check_subclusters(self, entry: L2Entry) -> Result<(), BadEntry> {
        let host = self.host(entry);
        if let Some(host) = host.filter(|h| h & (self.cluster_size() - 1) != 0) {
            return Err(BadEntry::Unaligned(host));
        }
        if entry.data() & entry.zero() != 0 || (host.is_none() && entry.data() != 0) {
            return Err(BadEntry::Subclusters);
        }
        Ok(())
    }

    /// What an entry says of its cluster as a whole, for those who change it or give it back: zero where all of it is, `Data` where it has a host cluster
    /// for anything else, `Unallocated` where there is none.
    pub fn whole(self, entry: L2Entry) -> Result<Mapping, BadEntry> {
        if !self.is_extended || entry.is_compressed() {
            return self.decode(entry.word);
        }
        self.check_subclusters(entry)?;
        let copied = entry.word & OFLAG_COPIED != 0;
        Ok(match (entry.zero() == ALL, self.host(entry)) {
            (true, None) => Mapping::ZeroPlain,
            (true, Some(host)) => Mapping::ZeroAllocated { host, copied },
            (false, None) => Mapping::Unallocated,
            (false, Some(host)) => Mapping::Data { host, copied },
        })
    }

    /// The entry of a cluster that reads as zero and has no host cluster. Version 2 has no such thing.
    pub fn zero(self) -> L2Entry {
        self.zeroed(L2Entry::default())
    }

    /// As `entry`, which is not that of a compressed cluster, but all of the cluster reads as zero.
    pub fn zeroed(self, entry: L2Entry) -> L2Entry {
        debug_assert!(self.version >= 3 && !entry.is_compressed());
        match self.is_extended {
            true => L2Entry::new(entry.word, 0, ALL),
            false => L2Entry::one_word(entry.word | OFLAG_ZERO),
        }
    }

    /// As `entry`, which is not that of a compressed cluster, but `bytes` of the cluster, whole subclusters, read as zero.
    pub fn zeroed_part(self, entry: L2Entry, bytes: Range<u64>) -> L2Entry {
        debug_assert!(self.is_extended && !entry.is_compressed());
        let part = self.subclusters(bytes);
        L2Entry::new(entry.word, entry.data() & !part, entry.zero() | part)
    }

    /// The entry of a cluster at `host`, which no other entry names, and of which `bytes`, whole subclusters, are data. The rest stays what `old` says, but
    /// for data: the caller has seen to it that `bytes` reaches over all of that if `host` is another place.
    pub fn written(self, old: L2Entry, host: u64, bytes: Range<u64>) -> L2Entry {
        let word = host | OFLAG_COPIED;
        if !self.is_extended {
            return L2Entry::one_word(word);
        }
        let part = self.subclusters(bytes);
        if old.is_compressed() {
            debug_assert_eq!(part, ALL);
            return L2Entry::new(word, part, 0);
        }
        debug_assert!(
            old.word & L2E_OFFSET_MASK == host || old.data() & !part == 0,
            "data is left behind"
        );
        L2Entry::new(word, old.data() | part, old.zero() & !part)
    }

    /// The bytes of a cluster from its first data to its last. Without subclusters that is always all of it.
    pub fn data_range(self, entry: L2Entry) -> Option<Range<u64>> {
        if !self.is_extended || entry.is_compressed() {
            return Some(0..self.cluster_size());
        }
        let (data, bits) = (entry.data(), self.subcluster_bits());
        let first = u64::from(data.trailing_zeros());
        let end = u64::from(SUBCLUSTERS - data.leading_zeros());
        (data != 0).then_some(first << bits..end << bits)
    }

    /// The subclusters that some bytes of a cluster touch.
    fn subclusters(self, bytes: Range<u64>) -> u32 {
        if bytes.is_empty() {
            return 0;
        }
        let bits = self.subcluster_bits();
        let (first, last) = (bytes.start >> bits, (bytes.end - 1) >> bits);
        debug_assert!(last < SUBCLUSTERS.into());
        ALL >> (u64::from(SUBCLUSTERS) - 1 - (last - first)) << first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXTENDED: EntryFormat = EntryFormat {
        version: 3,
        cluster_bits: 14,
        is_extended: true,
        has_data_file: false,
    };
    const HOST: u64 = 0x50000;

    #[test]
    fn each_pair_of_bits_is_a_state_and_equal_neighbours_are_one_span() {
        let entry = L2Entry::new(HOST | OFLAG_COPIED, 0b0011, 0b1000);
        let kept = |from| EXTENDED.span(entry, from).unwrap();
        let copied = true;
        assert_eq!(kept(0), (Mapping::Data { host: HOST, copied }, 1024));
        assert_eq!(kept(700), (Mapping::Data { host: HOST, copied }, 324));
        assert_eq!(kept(1024), (Mapping::Reserved { host: HOST, copied }, 512));
        let zero = Mapping::ZeroAllocated { host: HOST, copied };
        assert_eq!(kept(1537), (zero, 511));
        let rest = Mapping::Reserved { host: HOST, copied };
        assert_eq!(kept(2048), (rest, (32 - 4) * 512));
        let plain = L2Entry::new(0, 0, 1 << 31);
        let (first, bytes) = EXTENDED.span(plain, 0).unwrap();
        assert_eq!((first, bytes), (Mapping::Unallocated, 31 * 512));
        let last = EXTENDED.span(plain, bytes).unwrap();
        assert_eq!(last, (Mapping::ZeroPlain, 512));
    }

    #[test]
    fn a_bitmap_that_contradicts_itself_or_its_entry_is_refused() {
        for (word, data, zero) in [(HOST, 4, 4), (HOST, 1, 0x8000_0001), (0, 1, 0)] {
            let entry = L2Entry::new(word, data, zero);
            let bad = Err(BadEntry::Subclusters);
            assert_eq!(EXTENDED.span(entry, 8192).map(|s| s.0), bad);
            assert_eq!(EXTENDED.whole(entry), bad);
        }
        let unaligned = L2Entry::new(HOST + 512, 0, 0);
        let bad = Err(BadEntry::Unaligned(HOST + 512));
        assert_eq!(EXTENDED.whole(unaligned), bad);
    }

    #[test]
    fn new_entries_keep_what_is_not_changed() {
        let old = L2Entry::new(HOST, 0b0110, 0b1001);
        let written = EXTENDED.written(old, HOST, 1024..2048);
        let word = HOST | OFLAG_COPIED;
        assert_eq!(written, L2Entry::new(word, 0b1110, 0b0001));
        let zeroed = EXTENDED.zeroed_part(old, 512..1024);
        assert_eq!(zeroed, L2Entry::new(HOST, 0b0100, 0b1011));
        assert_eq!(EXTENDED.zeroed(old), L2Entry::new(HOST, 0, ALL));
        assert_eq!(EXTENDED.data_range(old), Some(512..1536));
        assert_eq!(EXTENDED.data_range(EXTENDED.zero()), None);
        let all = EXTENDED.written(L2Entry::default(), HOST, 0..1 << 14);
        assert_eq!(all, L2Entry::new(word, ALL, 0));
        let none = EXTENDED.written(EXTENDED.zero(), HOST, 0..0);
        assert_eq!(none, L2Entry::new(word, 0, ALL));
    }
}
