// SPDX-License-Identifier: MIT OR Apache-2.0
//! Checks and repairs of an image that is in use, and the repair of an image whose last writer did not close it.
//!
//! What is in memory goes to disk first; afterwards, everything that the image has in memory of its metadata is read again ([`Image::reload`]).

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockcore::{BlockError, CheckAborted, CheckFix, CheckResult, ErrorKind, Result};

use super::{check, check_beside};
use crate::alloc::Meta;
use crate::header::{Header, Incompatible};
use crate::header_rewrite::Uncertain;
use crate::image::Image;
use crate::open::read_table;
use crate::refcount::Refcounts;

impl Image {
    /// Checks the image, and repairs what `fix` allows. The node sees to it that no change is in flight meanwhile.
    ///
    /// # Errors
    /// Those of the check. `Corrupt` for repairs of an image that was found corrupt while it was open: what it has in memory can't be trusted, so it has to
    /// be closed, and opened for a check.
    pub async fn check(self: &Arc<Self>, fix: CheckFix) -> Result<CheckResult> {
        let header = self.header().clone();
        if !self.writable.load(Ordering::Acquire) {
            return match fix {
                CheckFix::None => check(&header, &self.file, fix).await,
                _ => Err(BlockError::new(ErrorKind::ReadOnly, "Node is read-only")),
            };
        }
        // INV REQ-DROP-1: what a dropped write has taken and not yet linked is none of a repair's leaks; nor are bitmaps that are being stored.
        let _all = self.changing.begin(0, u64::MAX, true).await;
        let _no_bitmaps = self.bitmaps.storing.lock().await;
        let _no_commits = self.commits.none().await;
        match self.check_sound() {
            Ok(()) => self.commit_now().await?,
            Err(_) if fix == CheckFix::None => {}
            Err(e) => return Err(e),
        }
        if fix != CheckFix::None {
            // A repair takes the end of the file for the end of what is in use.
            self.cut_ahead().await;
        }
        let header = self.header().clone();
        let mut meta = self.meta.lock().await;
        // INV QCOW2-ORD-4: what waits to become free may still be looked at by a reader.
        let waiting = meta.limbo.iter().map(|(_, freed)| freed);
        let held: Vec<Range<u64>> = waiting
            .map(|freed| freed.cluster..freed.cluster + freed.count)
            .collect();
        if fix == CheckFix::None {
            return check_beside(&header, &self.file, fix, &held).await;
        }
        // Until it has been read again; the runtime may end before.
        let uncertain = Uncertain::about(self);
        let result = check_beside(&header, &self.file, fix, &held).await;
        match self.reload_all(&mut meta).await {
            Ok(()) => uncertain.resolve(),
            Err(e) => return result.and(Err(e)),
        }
        result
    }

    /// An image whose last writer did not close it, and let refcounts be written late (`lazy_refcounts`): sets them right before anything is allocated by
    /// them (INV QCOW2-ORD-1 does not hold in such an image until then), with all that a repair can.
    ///
    /// # Errors
    /// Those of the repair.
    pub async fn repair_if_dirty(&self) -> Result<()> {
        if !self.header().incompatible.contains(Incompatible::DIRTY) {
            return Ok(());
        }
        // A repair that has failed before may have changed what the header says.
        let header = Header::read(&self.file).await?;
        let result = check(&header, &self.file, CheckFix::All).await;
        let found = match &result {
            Ok(found) => Some(found),
            Err(e) => CheckAborted::found_before(e),
        };
        for line in found.iter().flat_map(|found| &found.messages) {
            self.diagnostics.warn(line);
        }
        let failed = |e: BlockError| e.context("Could not repair dirty image");
        let found = result.map_err(failed)?;
        if found.check_errors > 0 {
            return Err(failed(BlockError::from_errno(libc::EIO)));
        }
        let mut meta = self.meta.lock().await;
        self.reload(&mut meta).await
    }

    async fn reload_all(&self, meta: &mut Meta) -> Result<()> {
        self.reload(meta).await?;
        let header = self.header().clone();
        let checks = self.runtime().overlap_checks;
        self.find_owners(&header, meta, checks).await
    }

    /// Reads again what is in memory of an image's metadata, which a repair has changed on disk. Nothing is waiting to be written.
    async fn reload(&self, meta: &mut Meta) -> Result<()> {
        let header = Header::read(&self.file).await?;
        let (l1_offset, l1_entries) = (header.l1_table_offset, header.l1_size as usize);
        let l1 = read_table(&self.file, l1_offset, l1_entries).await?;
        let (offset, clusters) = (header.refcount_table_offset, header.refcount_table_clusters);
        let entries = (clusters as usize) << (self.cluster_bits - 3);
        let table = read_table(&self.file, offset, entries).await?;
        let order = header.refcount_order;
        let cache = self.refcount_cache_bytes.clone();
        meta.refcounts = Refcounts::new(order, self.cluster_bits, table, offset, clusters, cache);
        meta.l1_offset = l1_offset;
        meta.next_free = 0;
        meta.packed = None;
        let end = self.file.length().div_ceil(self.cluster_size());
        meta.fresh_from = meta.fresh_from.max(end);
        self.l1.replace(l1);
        self.l2.clear().await;
        self.corrupt.store(header.is_corrupt(), Ordering::Release);
        *self.header() = header;
        Ok(())
    }
}
