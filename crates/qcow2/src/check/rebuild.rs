// SPDX-License-Identifier: MIT OR Apache-2.0
//! Writing all refcounts anew, from what was counted: where blocks are gone, lie at impossible places, or are something else as well.
//!
//! INV QCOW2-REPAIR-2: the new table and its blocks go where nothing lies that anybody refers to, the old refcount structure included. They are complete and
//! durable before the header names them; then nobody looks at the old ones any more.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::Range;

use blockcore::{BlockError, ErrorKind, Result};

use super::cluster_map::PAGE_CLUSTERS;
use super::count::Use;
use super::{BEYOND_CLUSTERS_MAX, Checker};
use crate::format::{MAX_REFCOUNT_TABLE_BYTES, REFT_OFFSET_MASK};
use crate::refcount::set_refcount;

/// Byte offset of the refcount table's offset in the header; its length in clusters follows.
const REFCOUNT_TABLE_FIELD: u64 = 48;

/// A refcount structure that is being made.
struct Layout {
    /// The clusters of the blocks, by number.
    blocks: BTreeMap<u64, u64>,
    /// The clusters of the table.
    table: Range<u64>,
    /// Clusters below this one count as used, whether anybody refers to them or not.
    kept_below: u64,
}

impl Checker<'_> {
    /// Writes a table and blocks that say what was counted, and has the header name them. The old ones are counted, too: they have to be lowered later.
    pub(super) async fn rebuild(&mut self) -> Result<()> {
        self.retire_table();
        let layout = self.lay_out()?;
        for (&number, &cluster) in &layout.blocks {
            let block = self.new_block(number, layout.kept_below).await;
            self.write(cluster * self.cluster, block).await?;
        }
        let entries = layout.table.end - layout.table.start;
        let mut table = vec![0u64; (entries * self.cluster / 8) as usize];
        for (&number, &cluster) in &layout.blocks {
            table[number as usize] = cluster * self.cluster;
        }
        let offset = layout.table.start * self.cluster;
        let bytes = table.iter().flat_map(|e| e.to_be_bytes()).collect();
        self.write(offset, bytes).await?;
        self.file.flush().await?;
        let mut fields = offset.to_be_bytes().to_vec();
        fields.extend((entries as u32).to_be_bytes());
        self.write(REFCOUNT_TABLE_FIELD, fields).await?;
        self.file.flush().await?;
        self.header.refcount_table_offset = offset;
        self.header.refcount_table_clusters = entries as u32;
        self.table = table;
        self.block = None;
        Ok(())
    }

    /// Notes where the refcounts lie that are about to be replaced.
    fn retire_table(&mut self) {
        let first = self.header.refcount_table_offset / self.cluster;
        let clusters = u64::from(self.header.refcount_table_clusters);
        self.retired.extend(first..first + clusters);
        for &entry in self.table.iter().filter(|&&e| e != 0) {
            let offset = entry & REFT_OFFSET_MASK;
            // One off the boundaries lies in two clusters.
            let end = offset.saturating_add(self.cluster).div_ceil(self.cluster);
            self.retired.extend(offset / self.cluster..end);
        }
    }

    /// Finds places for the new structure, and counts them: blocks count themselves and each other.
    fn lay_out(&mut self) -> Result<Layout> {
        let entries = self.header.geometry().block_entries();
        let end = self.file_clusters();
        // INV QCOW2-REPAIR-4: what may have been meant by entries that make no sense stays in use, and nothing is written over it. What the file grows over
        // on the way may be named by such entries, too.
        let (kept, first_free) = match self.lost {
            0 => (0, 1),
            _ => (end, end),
        };
        let mut wanted = self.blocks_wanted(kept);
        let mut layout = Layout {
            blocks: BTreeMap::new(),
            table: 0..0,
            kept_below: 0,
        };
        let taken: HashSet<u64> = self.retired.union(&self.beyond).copied().collect();
        let mut cursor = first_free;
        loop {
            while let Some(number) = wanted.pop_first() {
                if layout.blocks.contains_key(&number) {
                    continue;
                }
                cursor = self.find_free(cursor, 1, &taken);
                self.take(cursor..cursor + 1);
                layout.blocks.insert(number, cursor);
                wanted.insert(cursor / entries);
            }
            let numbers = layout.blocks.last_key_value().map_or(1, |(n, _)| n + 1);
            if numbers * 8 > MAX_REFCOUNT_TABLE_BYTES {
                let text = "The refcount table of the image can't grow further";
                return Err(BlockError::new(ErrorKind::NoSpace, text).errno_is(libc::EFBIG));
            }
            let clusters = (numbers * 8).div_ceil(self.cluster);
            if layout.table.end - layout.table.start >= clusters {
                let reached = self.references.len();
                if reached > end + BEYOND_CLUSTERS_MAX {
                    let text = "The image file can't grow further";
                    return Err(BlockError::new(ErrorKind::NoSpace, text).errno_is(libc::EFBIG));
                }
                if kept == 0 {
                    return Ok(layout);
                }
                // What ends less than a cluster behind the end of a file counts as being in it.
                layout.kept_below = reached + 1;
                let blocks = 0..layout.kept_below.div_ceil(entries);
                wanted.extend(blocks.filter(|number| !layout.blocks.contains_key(number)));
                if wanted.is_empty() {
                    return Ok(layout);
                }
                continue;
            }
            self.untake(layout.table);
            let first = self.find_free(first_free, clusters, &taken);
            layout.table = first..first + clusters;
            self.take(layout.table.clone());
            wanted.extend(first / entries..=(first + clusters - 1) / entries);
        }
    }

    /// The numbers of the blocks that have anything to say.
    fn blocks_wanted(&self, kept_below: u64) -> BTreeSet<u64> {
        let entries = self.header.geometry().block_entries();
        let mut wanted: BTreeSet<u64> = (0..kept_below.div_ceil(entries)).collect();
        let mut cluster = 0;
        while cluster < self.references.len() {
            if cluster.is_multiple_of(PAGE_CLUSTERS) && self.references.is_untouched(cluster) {
                cluster += PAGE_CLUSTERS;
                continue;
            }
            if self.references.get(cluster) > 0 {
                wanted.insert(cluster / entries);
            }
            cluster += 1;
        }
        wanted
    }

    /// The first of `count` consecutive clusters that nobody refers to, and none of which is in `taken`.
    pub(super) fn find_free(&self, from: u64, count: u64, taken: &HashSet<u64>) -> u64 {
        let mut first = from.max(1);
        let mut cluster = first;
        while cluster < first + count {
            if self.references.get(cluster) > 0 || taken.contains(&cluster) {
                first = cluster + 1;
            }
            cluster += 1;
        }
        first
    }

    /// Counts clusters that are written anew.
    pub(super) fn take(&mut self, clusters: Range<u64>) {
        self.references.grow(clusters.end);
        self.uses.grow(clusters.end);
        for cluster in clusters {
            if let Some(n) = self.references.get_mut(cluster) {
                *n += 1;
            }
            if let Some(used) = self.uses.get_mut(cluster) {
                *used |= Use::OTHER;
            }
        }
    }

    fn untake(&mut self, clusters: Range<u64>) {
        for cluster in clusters {
            if let Some(n) = self.references.get_mut(cluster) {
                *n -= 1;
            }
        }
    }

    /// What a block says.
    async fn new_block(&mut self, number: u64, kept_below: u64) -> Vec<u8> {
        let entries = self.header.geometry().block_entries();
        let order = self.header.refcount_order;
        let mut block = vec![0; self.cluster as usize];
        for index in 0..entries {
            let cluster = number * entries + index;
            let mut refcount = self.wanted(cluster);
            if cluster < kept_below {
                // INV QCOW2-REPAIR-4: references that can't be found are not taken away.
                let old = self.refcount(cluster).await.unwrap_or(1);
                refcount = refcount.max(old).max(1);
            }
            if refcount > 0 {
                set_refcount(&mut block, order, index, refcount);
            }
        }
        block
    }
}
