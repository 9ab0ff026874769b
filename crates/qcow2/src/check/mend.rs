// SPDX-License-Identifier: MIT OR Apache-2.0
//! Mending L2 entries: those of zero clusters that keep a host cluster at an impossible place. Nothing was ever read from there.

use blockcore::Result;

use super::count::Use;
use super::{Checker, Tally};
use crate::format::{L2E_OFFSET_MASK, OFLAG_ZERO};

impl Checker<'_> {
    /// Takes the impossible place out of the entries that were found while counting, and says whether there were any. Their guest clusters read as zero
    /// afterwards, or as what shows through; nothing else changes, so the order of these writes and of all others doesn't matter, but
    /// for the marks in the header: they go when this is durable (INV QCOW2-REPAIR-5).
    pub(super) async fn mend_entries(&mut self) -> Result<bool> {
        for at in std::mem::take(&mut self.mendable) {
            let table = at / self.cluster * self.cluster;
            if !self.is_only(table, self.cluster, Use::L2) {
                continue;
            }
            let words = self.entry_words();
            let old = self.words(at, words as u64).await?;
            let new = match old[..] {
                // Subclusters that read as zero go on doing so.
                [_, bitmap] => vec![0, bitmap & !u64::from(u32::MAX)],
                _ => vec![OFLAG_ZERO],
            };
            let bytes = new.iter().flat_map(|w| w.to_be_bytes()).collect();
            self.write(at, bytes).await?;
            self.mended.insert(at, old[0] & L2E_OFFSET_MASK);
        }
        if self.mended.is_empty() {
            return Ok(false);
        }
        self.file.flush().await?;
        Ok(true)
    }

    /// Counts once more, since there are fewer references now.
    pub(super) async fn recount_after_mending(&mut self, said_before: usize) -> Result<Tally> {
        self.result.messages.truncate(said_before);
        let counted = self.count_references().await?;
        self.mended.clear();
        Ok(counted)
    }
}
