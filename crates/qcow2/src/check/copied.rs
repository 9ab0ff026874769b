// SPDX-License-Identifier: MIT OR Apache-2.0
//! `COPIED` flags of the active tables, compared with the refcounts on disk. INV QCOW2-META-2: set exactly where the refcount is one.

use std::ops::Range;

use blockcore::{CheckFix, ErrorKind, Result};

use super::count::Use;
use super::{Checker, Tally};
use crate::format::{L1E_OFFSET_MASK, L2E_OFFSET_MASK, OFLAG_COMPRESSED, OFLAG_COPIED};

/// The span of words that were changed.
#[derive(Default)]
struct Changed(Option<Range<usize>>);

/// How an L2 table is changed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum TableFix {
    No,
    InPlace,
    /// INV QCOW2-REPAIR-3: its cluster is something else as well. Guest data to which a damaged L1 entry points, say: that must stay as it is.
    Elsewhere,
}

impl Changed {
    fn note(&mut self, index: usize) {
        let span = self.0.get_or_insert(index..index + 1);
        span.end = index + 1;
    }
}

impl Checker<'_> {
    /// Compares all flags, and sets them right: in any repair if all else is well, else where corruption is to be repaired.
    pub(super) async fn settle_copied(&mut self, found: &Tally) -> Result<Tally> {
        let may_fix = match self.fix {
            CheckFix::None => false,
            CheckFix::Leaks => found.is_clean(),
            CheckFix::All => true,
        };
        let has_moved = self.check_copied(may_fix).await?;
        let settled = std::mem::take(&mut self.tally);
        if has_moved {
            // There are fewer references to the old places now. Whatever there is to say was said.
            let said = self.result.messages.len();
            self.recount_quietly().await?;
            self.lower_refcounts().await?;
            self.check_copied(may_fix).await?;
            self.tally = Tally::default();
            self.result.messages.truncate(said);
        }
        Ok(settled)
    }

    /// One look at all flags. Says whether L2 tables have moved.
    async fn check_copied(&mut self, may_fix: bool) -> Result<bool> {
        let l1_bytes = u64::from(self.header.l1_size) * 8;
        // INV QCOW2-REPAIR-3
        let may_fix_l1 = may_fix && self.is_only(self.header.l1_table_offset, l1_bytes, Use::L1);
        let fixed_before = self.tally.corruptions_fixed;
        let mut l1 = std::mem::take(&mut self.l1);
        let mut changed = Changed::default();
        let mut has_moved = false;
        for (index, entry) in l1.iter_mut().enumerate() {
            let table = *entry & L1E_OFFSET_MASK;
            if table == 0 {
                continue;
            }
            if let Some(refcount) = self.wrong_copied(*entry, table, false).await {
                let line = format!(
                    "OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={refcount}"
                );
                let fixed = may_fix_l1 && self.may_flip(*entry, table);
                self.corruption_or_repair(fixed, &line);
                if fixed {
                    *entry ^= OFLAG_COPIED;
                    changed.note(index);
                }
            }
            let fix = match self.is_only(table, self.cluster, Use::L2) {
                _ if !may_fix => TableFix::No,
                true => TableFix::InPlace,
                false if may_fix_l1 && table.is_multiple_of(self.cluster) => TableFix::Elsewhere,
                false => TableFix::No,
            };
            if let Some(moved) = self.check_l2_copied(table, fix).await? {
                *entry = moved | OFLAG_COPIED;
                changed.note(index);
                has_moved = true;
            }
        }
        if let Some(changed) = changed.0 {
            let offset = self.header.l1_table_offset;
            self.write_words(offset, &l1, changed).await?;
        }
        self.l1 = l1;
        if self.tally.corruptions_fixed > fixed_before {
            self.file.flush().await?;
        }
        Ok(has_moved)
    }

    /// Looks at the flags of an L2 table, and gives back where it has moved.
    async fn check_l2_copied(&mut self, table: u64, fix: TableFix) -> Result<Option<u64>> {
        let step = self.entry_words();
        let mut entries = self.words(table, self.cluster / 8).await?;
        let is_data_elsewhere = self.has_data_file();
        let mut changed = Changed::default();
        for (index, entry) in entries.iter_mut().enumerate().step_by(step) {
            let host = *entry & L2E_OFFSET_MASK;
            let is_nowhere = host == 0 && !(is_data_elsewhere && *entry & OFLAG_COPIED != 0);
            if *entry & OFLAG_COMPRESSED != 0 || is_nowhere {
                continue;
            }
            let Some(refcount) = self.wrong_copied(*entry, host, is_data_elsewhere).await else {
                continue;
            };
            let line = format!("OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}");
            let may_flip = is_data_elsewhere || self.may_flip(*entry, host);
            let fixed = fix != TableFix::No && may_flip;
            self.corruption_or_repair(fixed, &line);
            if fixed {
                *entry ^= OFLAG_COPIED;
                changed.note(index);
            }
        }
        match (changed.0, fix) {
            (None, _) | (_, TableFix::No) => Ok(None),
            (Some(changed), TableFix::InPlace) => {
                self.write_words(table, &entries, changed).await?;
                Ok(None)
            }
            (Some(_), TableFix::Elsewhere) => {
                // INV QCOW2-ORD-1: the new place is counted, and what lies there is durable, before an L1 entry names it.
                let place = self.take_counted(1).await?.start * self.cluster;
                let mut bytes: Vec<u8> = entries.iter().flat_map(|w| w.to_be_bytes()).collect();
                bytes.resize(self.cluster as usize, 0);
                self.write(place, bytes).await?;
                self.file.flush().await?;
                Ok(Some(place))
            }
        }
    }

    /// The refcount that contradicts an entry's `COPIED` flag, if it does. Clusters of a data file are not counted: each has one user.
    async fn wrong_copied(&mut self, entry: u64, host: u64, is_elsewhere: bool) -> Option<u64> {
        let refcount = match is_elsewhere {
            true => 1,
            false => match self.refcount(host / self.cluster).await {
                Ok(n) => n,
                // A block at an impossible place has been told of.
                Err(e) if e.kind() == ErrorKind::Corrupt => return None,
                Err(e) => {
                    self.tally.errors += 1;
                    let (cluster, why) = (host / self.cluster, e.strerror());
                    self.say(format!("Can't get refcount for cluster {cluster}: {why}"));
                    return None;
                }
            },
        };
        let is_copied = entry & OFLAG_COPIED != 0;
        ((refcount == 1) != is_copied).then_some(refcount)
    }

    /// Whether the flag of an entry may be turned round: it is never set where anybody else was counted, whatever the refcount says.
    fn may_flip(&self, entry: u64, host: u64) -> bool {
        entry & OFLAG_COPIED != 0 || self.references.get(host / self.cluster) == 1
    }
}
