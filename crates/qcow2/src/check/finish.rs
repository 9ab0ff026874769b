// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the header says of an image's state, before and after a repair, and what becomes of clusters that are free now.

use blockcore::{CheckFix, Result};

use super::{Checker, Tally};
use crate::bitmap_load;
use crate::extension::{self, Extension};
use crate::header::{AUTOCLEAR_BITMAPS, Incompatible};
use crate::header_rewrite::Rewrite;
use crate::image::INCOMPATIBLE_OFFSET;

/// Byte offset of the autoclear feature bits in the header.
const AUTOCLEAR_OFFSET: u64 = 88;
/// The external data file can be read as a raw disk.
const AUTOCLEAR_RAW_DATA_FILE: u64 = 1 << 1;
/// The features with an autoclear bit that a repair leaves as good as they were.
const AUTOCLEAR_KEPT: u64 = AUTOCLEAR_BITMAPS | AUTOCLEAR_RAW_DATA_FILE;

/// What is said where clusters that nobody seems to use are left alone.
const LEAKS_KEPT: &str =
    "Leaked clusters are left as they are: entries that name impossible places may have meant them";

impl Checker<'_> {
    /// Clears the autoclear bits of features that this writer doesn't know, as the specification wants before the first change.
    pub(super) async fn clear_unknown_features(&mut self) -> Result<()> {
        let mut kept = self.header.autoclear & AUTOCLEAR_KEPT;
        if !self.has_data_file() {
            // Other programs don't even open such an image.
            kept &= !AUTOCLEAR_RAW_DATA_FILE;
        }
        if self.header.version < 3 || self.header.autoclear == kept {
            return Ok(());
        }
        self.write(AUTOCLEAR_OFFSET, kept.to_be_bytes().to_vec())
            .await?;
        self.header.autoclear = kept;
        self.file.flush().await
    }

    /// Puts the result together, and writes down that the image is sound if it is.
    pub(super) async fn finish(&mut self, found: &Tally) -> Result<()> {
        let result = &mut self.result;
        result.corruptions = found.corruptions;
        result.leaks = found.leaks;
        result.check_errors = found.errors;
        result.corruptions_fixed = found.corruptions_fixed;
        result.leaks_fixed = found.leaks_fixed;
        if self.fix == CheckFix::None {
            return Ok(());
        }
        if self.lost > 0 && found.leaks > 0 {
            self.say(LEAKS_KEPT.to_owned());
        }
        self.clear_marks(found).await?;
        self.drop_stale_bitmaps().await?;
        if found.is_clean() {
            self.punch_holes().await;
        }
        Ok(())
    }

    /// INV QCOW2-REPAIR-5: comes last, when all that was repaired is durable.
    async fn clear_marks(&mut self, found: &Tally) -> Result<()> {
        let mut bits = self.header.incompatible;
        if !self.undercounted {
            bits -= Incompatible::DIRTY;
        }
        if found.is_clean() {
            bits -= Incompatible::CORRUPT;
        }
        if self.header.version < 3 || bits == self.header.incompatible {
            return Ok(());
        }
        let bytes = bits.bits().to_be_bytes().to_vec();
        self.write(INCOMPATIBLE_OFFSET, bytes).await?;
        self.header.incompatible = bits;
        self.file.flush().await
    }

    /// Takes bitmaps out of the header that are worthless: a writer that knew nothing of them has changed the image. Their clusters were leaks.
    async fn drop_stale_bitmaps(&mut self) -> Result<()> {
        if !bitmap_load::has_stale(&self.header) {
            return Ok(());
        }
        let is_bitmaps = |e: &Extension| e.kind == extension::BITMAPS;
        self.header.extensions.retain(|e| !is_bitmaps(e));
        let rewrite = Rewrite::prepare(self.file, &self.header).await?;
        if let Err(e) = rewrite.write(&self.header).await {
            return rewrite.undo().await.and(Err(e));
        }
        Ok(())
    }

    /// Gives the storage of freed clusters back to the host. A host that can't is no reason to fail.
    async fn punch_holes(&mut self) {
        let end = self.file.length();
        for freed in std::mem::take(&mut self.freed) {
            let (start, stop) = (freed.start * self.cluster, freed.end * self.cluster);
            let bytes = stop.min(end).saturating_sub(start);
            // What was freed may have been taken again.
            let is_free = freed.into_iter().all(|c| self.references.get(c) == 0);
            if bytes > 0
                && is_free
                && let Err(e) = self.file.pdiscard(start, bytes).await
            {
                tracing::debug!("no hole at {start:#x}: {e}");
            }
        }
    }
}
