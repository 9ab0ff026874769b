// SPDX-License-Identifier: MIT OR Apache-2.0
//! Counting: who refers to each host cluster, and as what.

use blockcore::{CheckFix, Result};

use super::cluster_map::ClusterMap;
use super::{BEYOND_CLUSTERS_MAX, Checker, Tally};
use crate::format::{
    CompressedDescriptor, L1E_OFFSET_MASK, L2E_OFFSET_MASK, OFLAG_COMPRESSED, OFLAG_COPIED,
    OFLAG_ZERO, REFT_OFFSET_MASK,
};

/// Bits of an L1 entry that have no meaning.
const L1E_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Bits of an uncompressed L2 entry that have no meaning.
const L2E_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Bits of a refcount table entry that have no meaning.
const REFT_RESERVED: u64 = 0x1ff;

/// What is said below a reference that does not fit into the refcount.
pub(super) const OVERFLOW_HINT: &str = "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy if the image \
    cannot be opened for writing";

bitflags::bitflags! {
    /// What a cluster is used as.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(super) struct Use: u8 {
        const HEADER = 1 << 0;
        const L1 = 1 << 1;
        const SNAPSHOT_L1 = 1 << 2;
        const L2 = 1 << 3;
        const REFCOUNTS = 1 << 4;
        /// The snapshot table, bitmaps, the encryption header.
        const OTHER = 1 << 5;
        const DATA = 1 << 6;
    }
}

/// The largest refcount of a width that a counter here can reach.
pub(super) fn max_refcount(order: u32) -> u64 {
    match order {
        0..=4 => (1 << (1 << order)) - 1,
        _ => u32::MAX.into(),
    }
}

/// The words of an L2 entry, and where it is.
#[derive(Clone, Copy)]
struct L2Entry {
    /// Byte offset in the file.
    at: u64,
    index: usize,
    entry: u64,
    /// Which subclusters are allocated (low half) and which read as zero (high half). 0 in images without subclusters.
    bitmap: u64,
}

/// Which table an L2 table is counted for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layer {
    /// The active one: its guest clusters go into the statistics.
    Active,
    Snapshot,
}

impl Checker<'_> {
    /// Counts all references, from nothing.
    pub(super) async fn count_references(&mut self) -> Result<Tally> {
        let clusters = self.file_clusters();
        self.references = ClusterMap::new(clusters);
        self.uses = ClusterMap::new(if self.fix == CheckFix::None {
            0
        } else {
            clusters
        });
        self.lost = u64::from(self.snapshots.is_distrusted());
        self.needs_rebuild = false;
        self.beyond.clear();
        self.mendable.clear();
        self.result.allocated_clusters = 0;
        self.result.fragmented_clusters = 0;
        self.result.compressed_clusters = 0;
        for cluster in self.held.iter().flat_map(|held| held.clone()) {
            if let Some(n) = self.references.get_mut(cluster) {
                *n += 1;
            }
        }
        self.count(0, self.cluster, Use::HEADER);
        self.count_tables().await?;
        self.count_refcounts().await?;
        Ok(std::mem::take(&mut self.tally))
    }

    /// Counts everything but the refcounts themselves.
    async fn count_tables(&mut self) -> Result<()> {
        let (offset, entries) = (self.header.l1_table_offset, self.header.l1_size.into());
        self.l1 = self.words(offset, entries).await?;
        self.count(offset, entries * 8, Use::L1);
        let l1 = self.l1.clone();
        self.count_l1(&l1, Layer::Active).await?;
        for index in 0..self.snapshots.table.snapshots.len() {
            let s = &self.snapshots.table.snapshots[index];
            let (offset, entries) = (s.l1_table_offset, u64::from(s.l1_size));
            if let Some(fault) = s.l1_fault(self.cluster) {
                self.corruption(format!("ERROR {fault}"));
                self.lost += 1;
                continue;
            }
            self.count(offset, entries * 8, Use::SNAPSHOT_L1);
            let l1 = self.words(offset, entries).await?;
            self.count_l1(&l1, Layer::Snapshot).await?;
        }
        let (offset, bytes) = (self.header.snapshots_offset, self.snapshots.table.bytes);
        self.count(offset, bytes, Use::OTHER);
        if let Some(table) = self.snapshots.distrusted() {
            // What reads as zero there reads as snapshots.
            self.note_beyond(table.start, table.end);
        }
        self.count_extensions().await
    }

    /// One more reference to each cluster that a range touches. Counters go on where refcounts can't. `as_what` is empty where nothing is lost without it.
    pub(super) fn count(&mut self, offset: u64, bytes: u64, as_what: Use) {
        if bytes == 0 {
            return;
        }
        let end = offset.saturating_add(bytes);
        if end >= self.file.length() + self.cluster {
            if !as_what.is_empty() && as_what != Use::REFCOUNTS {
                self.lost += 1;
                self.note_beyond(offset, end);
            }
            return self.corruption(format!(
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more: \
                 offset {offset:#x} size {bytes:#x}"
            ));
        }
        // The last cluster of a file may be there in part, or not at all yet.
        let clusters = end.div_ceil(self.cluster);
        self.references.grow(clusters);
        let max = max_refcount(self.header.refcount_order);
        for cluster in offset / self.cluster..clusters {
            if let Some(used) = self.uses.get_mut(cluster) {
                *used |= as_what;
            }
            let Some(n) = self.references.get_mut(cluster) else {
                continue;
            };
            let is_overflow = u64::from(*n) >= max;
            *n = n.saturating_add(1);
            if is_overflow {
                let host = cluster * self.cluster;
                self.corruption(format!("ERROR: overflow cluster offset={host:#x}"));
                self.say(OVERFLOW_HINT.to_owned());
            }
        }
    }

    fn note_beyond(&mut self, offset: u64, end: u64) {
        let clusters = self.file_clusters();
        let start = (offset / self.cluster).max(clusters);
        let end = end.div_ceil(self.cluster);
        let end = end.min(clusters + BEYOND_CLUSTERS_MAX);
        if self.fix != CheckFix::None {
            self.beyond.extend(start..end);
        }
    }

    /// The references of a cluster, as far as a refcount can tell.
    pub(super) fn wanted(&self, cluster: u64) -> u64 {
        let references = u64::from(self.references.get(cluster));
        references.min(max_refcount(self.header.refcount_order))
    }

    /// INV QCOW2-REPAIR-3: whether all clusters that a range touches are used as this and nothing else.
    pub(super) fn is_only(&self, offset: u64, bytes: u64, what: Use) -> bool {
        let clusters = offset / self.cluster..offset.saturating_add(bytes).div_ceil(self.cluster);
        offset.is_multiple_of(self.cluster)
            && clusters.into_iter().all(|c| self.uses.get(c) == what)
    }

    async fn count_l1(&mut self, l1: &[u64], layer: Layer) -> Result<()> {
        for &entry in l1.iter().filter(|&&e| e != 0) {
            if entry & L1E_RESERVED != 0 {
                self.corruption(format!(
                    "ERROR found L1 entry with reserved bits set: {entry:x}"
                ));
            }
            let table = entry & L1E_OFFSET_MASK;
            self.count(table, self.cluster, Use::L2);
            if table & (self.cluster - 1) != 0 {
                self.lost += 1;
                self.corruption(format!(
                    "ERROR l2_offset={table:x}: Table is not cluster aligned; L1 entry corrupted"
                ));
            }
            self.count_l2(table, layer).await?;
        }
        Ok(())
    }

    async fn count_l2(&mut self, table: u64, layer: Layer) -> Result<()> {
        let words = self.entry_words();
        // Where the next guest cluster of this table would lie if nothing were fragmented.
        let mut next_contiguous = 0;
        let entries = self.words(table, self.cluster / 8).await?;
        for (index, entry) in entries.chunks(words).enumerate() {
            let entry = L2Entry {
                at: table + (index * words) as u64 * 8,
                index,
                entry: entry[0],
                bitmap: entry.get(1).copied().unwrap_or(0),
            };
            if entry.entry & OFLAG_COMPRESSED != 0 {
                self.count_compressed(entry, layer);
            } else {
                self.count_entry(entry, layer, &mut next_contiguous);
            }
        }
        Ok(())
    }

    /// An L2 entry that is not compressed.
    fn count_entry(&mut self, l2: L2Entry, layer: Layer, next_contiguous: &mut u64) {
        let entry = l2.entry;
        let has_subclusters = self.entry_words() == 2;
        if entry & L2E_RESERVED != 0 {
            self.corruption(format!(
                "ERROR found l2 entry with reserved bits set: {entry:x}"
            ));
        }
        if let Some(&host) = self.mended.get(&l2.at) {
            self.corruption_or_repair(true, &unaligned_line(host, true));
        }
        let host = entry & L2E_OFFSET_MASK;
        // The first cluster of a data file is no less good than others.
        let is_allocated = host != 0 || self.has_data_file() && entry & OFLAG_COPIED != 0;
        let (allocated, zero) = (l2.bitmap as u32, (l2.bitmap >> 32) as u32);
        if !is_allocated {
            if allocated != 0 {
                let line = "ERROR: Unallocated cluster has non-zero subcluster allocation map";
                self.corruption(line.to_owned());
            }
            return;
        }
        if allocated & zero != 0 {
            self.corruption(format!(
                "ERROR offset={host:x}: Allocated cluster has corrupted subcluster allocation bitmap"
            ));
        }
        if layer == Layer::Active {
            self.result.allocated_clusters += 1;
            if *next_contiguous != 0 && host != *next_contiguous {
                self.result.fragmented_clusters += 1;
            }
            *next_contiguous = host + self.cluster;
        }
        let mut as_what = Use::DATA;
        if host & (self.cluster - 1) != 0 {
            // Nothing is read from there: the entry can do without.
            let holds_no_data = match has_subclusters {
                true => allocated == 0,
                false => entry & OFLAG_ZERO != 0,
            };
            if holds_no_data {
                self.mendable.push(l2.at);
                as_what = Use::empty();
            } else {
                self.lost += 1;
            }
            self.corruption(format!("ERROR {}", unaligned_line(host, holds_no_data)));
        }
        if !self.has_data_file() {
            self.count(host, self.cluster, as_what);
        }
    }

    fn count_compressed(&mut self, l2: L2Entry, layer: Layer) {
        let entry = l2.entry;
        let cluster_bits = self.header.cluster_bits;
        let d =
            CompressedDescriptor::decode(entry & !(OFLAG_COPIED | OFLAG_COMPRESSED), cluster_bits);
        if entry & OFLAG_COPIED != 0 {
            let line = format!(
                "ERROR: coffset={:#x}: copied flag must never be set for compressed clusters",
                d.host_offset
            );
            self.corruption(line);
        }
        let entry = entry & !OFLAG_COPIED;
        let misplaced = if self.has_data_file() {
            "data file"
        } else if l2.bitmap != 0 {
            "non-zero subcluster allocation bitmap"
        } else {
            self.count(d.host_offset, d.host_bytes, Use::DATA);
            if layer == Layer::Active {
                self.result.compressed_clusters += 1;
                self.result.allocated_clusters += 1;
                // Nothing that is compressed lies where it would be read in one go.
                self.result.fragmented_clusters += 1;
            }
            return;
        };
        self.lost += 1;
        let line = format!(
            "ERROR compressed cluster {} with {misplaced}, entry=0x{entry:x}",
            l2.index
        );
        self.corruption(line);
    }

    /// Counts the refcount table and its blocks.
    async fn count_refcounts(&mut self) -> Result<()> {
        let offset = self.header.refcount_table_offset;
        let bytes = u64::from(self.header.refcount_table_clusters) * self.cluster;
        self.table = self.words(offset, bytes / 8).await?;
        self.block = None;
        self.count(offset, bytes, Use::REFCOUNTS);
        // INV QCOW2-REPAIR-3: a table that lies in the header can't be set right in place.
        self.needs_rebuild |= bytes > 0 && offset < self.cluster;
        for number in 0..self.table.len() {
            self.count_block(number, self.table[number]);
        }
        Ok(())
    }

    fn count_block(&mut self, number: usize, entry: u64) {
        let offset = entry & REFT_OFFSET_MASK;
        if entry & REFT_RESERVED != 0 {
            self.needs_rebuild = true;
            return self.corruption(format!(
                "ERROR refcount table entry {number} has reserved bits set"
            ));
        }
        if offset & (self.cluster - 1) != 0 {
            self.needs_rebuild = true;
            self.corruption(format!(
                "ERROR refcount block {number} is not cluster aligned; refcount table entry corrupted"
            ));
        } else if offset / self.cluster >= self.references.len() {
            let may_fix = self.fix == CheckFix::All;
            self.needs_rebuild |= may_fix;
            let line = format!("refcount block {number} is outside image");
            self.corruption_or_repair(may_fix, &line);
        } else if offset != 0 {
            self.count(offset, self.cluster, Use::REFCOUNTS);
            // INV QCOW2-REPAIR-3: one that is something else as well can't be set right in place, even where a refcount can't tell.
            self.needs_rebuild |= self.references.get(offset / self.cluster) != 1;
            let references = self.wanted(offset / self.cluster);
            if references != 1 {
                self.corruption(format!(
                    "ERROR refcount block {number} refcount={references}"
                ));
            }
        }
    }
}

/// What is said of an entry that names a place off the cluster boundaries, without the first word.
fn unaligned_line(host: u64, is_zero: bool) -> String {
    let what = if is_zero { "Preallocated" } else { "Data" };
    format!("offset={host:x}: {what} cluster is not properly aligned; L2 entry corrupted.")
}
