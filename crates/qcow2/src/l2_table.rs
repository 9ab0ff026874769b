// SPDX-License-Identifier: MIT OR Apache-2.0
//! The L1 table in memory, and what an L2 entry means: [`Mapping`].

use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::format::{
    CompressedDescriptor, L2E_OFFSET_MASK, OFLAG_COMPRESSED, OFLAG_COPIED, OFLAG_ZERO,
};

/// Where the bytes of a guest cluster, or of some subclusters of it, are. Each variant tells a reader or writer its next act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// In the backing node; zero where there is none.
    Unallocated,
    /// In the backing node; zero where there is none. A host cluster is kept for later, or for other subclusters; what lies there means nothing.
    Reserved { host: u64, copied: bool },
    /// Zero. No host cluster.
    ZeroPlain,
    /// Zero, with a host cluster kept for later, or for other subclusters; what lies there means nothing.
    ZeroAllocated { host: u64, copied: bool },
    /// At `host`. `copied`: nobody else uses that cluster, so it may be written in place.
    Data { host: u64, copied: bool },
    /// Compressed.
    Compressed(CompressedDescriptor),
}

/// Why an L2 entry can't be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BadEntry {
    /// The zero flag in a version 2 image.
    ZeroBeforeV3,
    /// A host offset that is no multiple of the cluster size.
    Unaligned(u64),
    /// Subclusters that are data and zero at the same time, or data without a host cluster.
    Subclusters,
}

impl Mapping {
    /// Reads an L2 entry of one word.
    pub fn decode(entry: u64, version: u32, cluster_bits: u32) -> Result<Mapping, BadEntry> {
        if entry & OFLAG_COMPRESSED != 0 {
            return Ok(Mapping::Compressed(CompressedDescriptor::decode(
                entry,
                cluster_bits,
            )));
        }
        let host = entry & L2E_OFFSET_MASK;
        let copied = entry & OFLAG_COPIED != 0;
        let zero = entry & OFLAG_ZERO != 0;
        if zero && version < 3 {
            return Err(BadEntry::ZeroBeforeV3);
        }
        if host & ((1 << cluster_bits) - 1) != 0 {
            return Err(BadEntry::Unaligned(host));
        }
        Ok(match (zero, host) {
            (true, 0) => Mapping::ZeroPlain,
            (true, host) => Mapping::ZeroAllocated { host, copied },
            (false, 0) => Mapping::Unallocated,
            (false, host) => Mapping::Data { host, copied },
        })
    }

    /// The host clusters that the entry holds a reference to, as byte offset and length.
    pub fn referenced(&self, cluster_size: u64) -> Option<(u64, u64)> {
        match *self {
            Mapping::Reserved { host, .. }
            | Mapping::ZeroAllocated { host, .. }
            | Mapping::Data { host, .. } => Some((host, cluster_size)),
            Mapping::Compressed(c) => Some((c.host_offset, c.host_bytes)),
            Mapping::Unallocated | Mapping::ZeroPlain => None,
        }
    }

    /// Whether two neighbours can be treated as one range: the same state, and where they have a place, one place.
    pub fn continues(&self, index: u64, cluster_size: u64, next: &Mapping) -> bool {
        let step = index * cluster_size;
        match (*self, *next) {
            (Mapping::Unallocated, Mapping::Unallocated)
            | (Mapping::ZeroPlain, Mapping::ZeroPlain) => true,
            (
                Mapping::Data {
                    host: a,
                    copied: ca,
                },
                Mapping::Data {
                    host: b,
                    copied: cb,
                },
            )
            | (
                Mapping::Reserved {
                    host: a,
                    copied: ca,
                },
                Mapping::Reserved {
                    host: b,
                    copied: cb,
                },
            )
            | (
                Mapping::ZeroAllocated {
                    host: a,
                    copied: ca,
                },
                Mapping::ZeroAllocated {
                    host: b,
                    copied: cb,
                },
            ) => ca == cb && a.checked_add(step) == Some(b),
            _ => false,
        }
    }
}

/// The active L1 table. Entries are read without waiting; they change only under the metadata lock.
#[derive(Debug, Default)]
pub(crate) struct L1Table {
    entries: RwLock<Vec<AtomicU64>>,
}

impl L1Table {
    pub fn new(entries: Vec<u64>) -> L1Table {
        L1Table {
            entries: RwLock::new(entries.into_iter().map(AtomicU64::new).collect()),
        }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Vec<AtomicU64>> {
        self.entries
            .read()
            .expect("no code panics while it holds this lock")
    }

    /// The number of entries.
    pub fn len(&self) -> usize {
        self.read().len()
    }

    /// An entry; 0 past the end.
    pub fn get(&self, index: usize) -> u64 {
        self.read()
            .get(index)
            .map_or(0, |e| e.load(Ordering::Acquire))
    }

    /// Sets an entry. Only under the metadata lock.
    pub fn set(&self, index: usize, entry: u64) {
        if let Some(e) = self.read().get(index) {
            e.store(entry, Ordering::Release);
        }
    }

    /// A copy of all entries.
    pub fn to_vec(&self) -> Vec<u64> {
        let entries = self.read();
        entries.iter().map(|e| e.load(Ordering::Acquire)).collect()
    }

    /// Takes other entries. Only under the metadata lock.
    pub fn replace(&self, entries: Vec<u64>) {
        *self
            .entries
            .write()
            .expect("no code panics while it holds this lock") =
            entries.into_iter().map(AtomicU64::new).collect();
    }

    /// Adds empty entries at the end. Only under the metadata lock.
    pub fn grow(&self, len: usize) {
        let mut entries = self
            .entries
            .write()
            .expect("no code panics while it holds this lock");
        while entries.len() < len {
            entries.push(AtomicU64::new(0));
        }
    }
}
