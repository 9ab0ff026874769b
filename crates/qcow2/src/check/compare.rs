// SPDX-License-Identifier: MIT OR Apache-2.0
//! Comparing what was counted with the refcounts on disk.

use blockcore::{BlockError, CheckFix, IoBufMut, ReadFlags, Result};

use super::cluster_map::PAGE_CLUSTERS;
use super::{Checker, Tally};
use crate::format::REFT_OFFSET_MASK;
use crate::image::Hex;
use crate::refcount::get_refcount;

impl Checker<'_> {
    /// The place of a refcount block; 0 where there is none.
    pub(super) fn block_offset(&self, number: u64) -> u64 {
        let entry = self.table.get(number as usize).copied().unwrap_or(0);
        entry & REFT_OFFSET_MASK
    }

    /// The refcount of a cluster on disk.
    pub(super) async fn refcount(&mut self, cluster: u64) -> Result<u64> {
        let entries = self.header.geometry().block_entries();
        let (number, index) = (cluster / entries, cluster % entries);
        let offset = self.block_offset(number);
        if offset == 0 {
            return Ok(0);
        }
        if offset & (self.cluster - 1) != 0 {
            if !std::mem::replace(&mut self.block_said, true) {
                self.say_unaligned_block(offset, number);
            }
            return Err(BlockError::corrupt("A refcount block lies where none can"));
        }
        if self.block.as_ref().is_none_or(|(n, _)| *n != number) {
            let buf = IoBufMut::zeroed(self.cluster as usize);
            let read = self.file.preadv(offset, buf, ReadFlags::empty()).await?;
            self.block = Some((number, read.to_vec()));
        }
        let block = self.block.as_ref().map_or(&[][..], |(_, b)| b);
        Ok(get_refcount(block, self.header.refcount_order, index))
    }

    fn say_unaligned_block(&mut self, offset: u64, number: u64) {
        let what = format!(
            "Refblock offset {} unaligned (reftable index: {})",
            Hex(offset),
            Hex(number)
        );
        self.say(match self.fix {
            CheckFix::None => format!(
                "qcow2: Image is corrupt: {what}; further non-fatal corruption events will be suppressed"
            ),
            _ => format!(
                "qcow2: Marking image as corrupt: {what}; further corruption events will be suppressed"
            ),
        });
    }

    /// Whether the clusters that are counted together from this one on have neither references nor refcounts.
    fn is_unused_page(&self, first: u64) -> bool {
        let entries = self.header.geometry().block_entries();
        let mut blocks = first / entries..=(first + PAGE_CLUSTERS - 1) / entries;
        self.references.is_untouched(first) && blocks.all(|number| self.block_offset(number) == 0)
    }

    /// Whether a repair may lower the refcount of a cluster.
    ///
    /// INV QCOW2-REPAIR-4: not while it may be what an entry at an impossible place once meant.
    pub(super) fn may_lower(&self) -> bool {
        self.fix != CheckFix::None && self.lost == 0
    }

    /// Compares all refcounts. Where they are to be `repaired`, says so; `refcounts` does it.
    pub(super) async fn compare(&mut self, repaired: bool) -> Result<Tally> {
        let mut highest = 0;
        let mut next = 0;
        self.undercounted = false;
        while next < self.references.len() {
            let cluster = next;
            if cluster.is_multiple_of(PAGE_CLUSTERS) && self.is_unused_page(cluster) {
                next += PAGE_CLUSTERS;
                continue;
            }
            next += 1;
            let references = self.wanted(cluster);
            self.undercounted |= u64::from(self.references.get(cluster)) > references;
            let refcount = match self.refcount(cluster).await {
                Ok(n) => n,
                Err(e) => {
                    self.tally.errors += 1;
                    self.undercounted = true;
                    let why = e.strerror();
                    self.say(format!("Can't get refcount for cluster {cluster}: {why}"));
                    continue;
                }
            };
            if refcount > 0 || references > 0 {
                highest = cluster;
            }
            if refcount != references {
                self.tell_difference(cluster, refcount, references, repaired);
            }
        }
        self.result.image_end_offset = (highest + 1) * self.cluster;
        Ok(std::mem::take(&mut self.tally))
    }

    fn tell_difference(&mut self, cluster: u64, refcount: u64, references: u64, repaired: bool) {
        let what = format!("cluster {cluster} refcount={refcount} reference={references}");
        if refcount > references {
            return match (repaired, self.may_lower()) {
                (false, _) => {
                    self.tally.leaks += 1;
                    self.say(format!("Leaked {what}"));
                }
                (true, true) => {
                    self.tally.leaks_fixed += 1;
                    self.say(format!("Repairing {what}"));
                }
                // Told already.
                (true, false) => self.tally.leaks += 1,
            };
        }
        // Somebody lives where nobody is counted: not this refcount alone is wrong.
        self.needs_rebuild |= refcount == 0;
        let is_raised = repaired && self.fix == CheckFix::All;
        self.undercounted |= !is_raised;
        self.corruption_or_repair(is_raised, &what);
    }
}
