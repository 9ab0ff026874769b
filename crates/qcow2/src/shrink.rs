// SPDX-License-Identifier: MIT OR Apache-2.0
//! Making the disk shorter. Called by `truncate`.
//!
//! The header says the new length first, and that is durable before anything behind it goes: a power cut leaves the old disk or the new one, and what lies
//! behind the end of the new one is none of its data (growing forgets it, see `truncate`). Then the clusters behind the end are freed as by any other
//! change: L2 entries of the table that the new end lies in, and L1 entries of those behind. At last refcount blocks that count nothing any more go, and
//! the file is cut off behind its last used cluster.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockcore::{BlockError, DebugEvent, Preallocation, Result, TruncateRequest};

use crate::alloc::Meta;
use crate::commit::Growth;
use crate::format::L1E_OFFSET_MASK;
use crate::image::{Hex, Image, Intent, Owner};
use crate::l2_entry::L2Entry;
use crate::remap::Remap;

impl Image {
    /// Makes the disk shorter. The caller holds `changing` over all behind the new end.
    ///
    /// # Errors
    /// Those of metadata I/O. The disk has its old length then, or the new one and clusters that are not freed yet.
    pub(crate) async fn shrink(self: &Arc<Self>, new: u64) -> Result<()> {
        let old = self.size();
        self.commit().await?;
        let set_size = async |size: u64| {
            let mut meta = self.meta.lock().await;
            let growth = meta.growth.get_or_insert_with(|| Growth {
                size,
                old_l1: Vec::new(),
            });
            growth.size = size;
        };
        set_size(new).await;
        if let Err(e) = self.commit().await {
            set_size(old).await;
            return Err(e);
        }
        self.size.store(new, Ordering::Release);
        self.free_behind(new).await?;
        self.commit().await?;
        self.drop_empty_blocks().await?;
        // For what that has freed.
        self.commit().await?;
        self.resize_data(old, new, Preallocation::Off).await?;
        self.cut_file(0).await
    }

    /// Frees all clusters behind the end. The caller holds `changing` over them.
    async fn free_behind(self: &Arc<Self>, new: u64) -> Result<()> {
        let epoch = self.epochs.enter();
        let per_table = 1u64 << self.l2_bits();
        let first = new.div_ceil(self.cluster_size());
        let first_table = first.div_ceil(per_table);
        self.remap(first, first_table * per_table, true, |_, entry| {
            match entry == L2Entry::default() {
                true => Remap::Keep,
                false => Remap::Replace(L2Entry::default()),
            }
        })
        .await?;
        drop(epoch);
        for index in first_table as usize..self.l1.len() {
            self.free_table(index).await?;
            self.commit_if_wanted().await?;
        }
        Ok(())
    }

    /// Takes an L2 table with all it points at away from the active layer. Its entries are not changed: a snapshot may share it.
    async fn free_table(self: &Arc<Self>, index: usize) -> Result<()> {
        let _epoch = self.epochs.enter();
        let mut meta = self.meta.lock().await;
        let table = self.l1.get(index) & L1E_OFFSET_MASK;
        if table == 0 {
            return Ok(());
        }
        if table & (self.cluster_size() - 1) != 0 {
            let text = format!("L2 table offset {} unaligned", Hex(table));
            return Err(self.signal_corruption(&text, table));
        }
        self.file
            .debug_event(DebugEvent::L1ShrinkFreeL2Clusters)
            .await;
        // Looked at as a whole before anything changes.
        let per_table = 1u64 << self.l2_bits();
        let first = index as u64 * per_table;
        let mut mappings = Vec::new();
        for cluster in first..first + per_table {
            mappings.push(self.mapping(cluster, Intent::Write).await?);
        }
        let slices = self.slices_per_table();
        let range = index as u64 * slices..(index as u64 + 1) * slices;
        debug_assert_eq!(meta.dirty_slices.range(range.clone()).count(), 0);
        self.file.debug_event(DebugEvent::L1ShrinkWriteTable).await;
        self.l1.set(index, 0);
        meta.dirty_l1.insert(index);
        self.l2.forget(range).await;
        for mapping in &mappings {
            self.free_mapping(&mut meta, mapping, true)?;
        }
        meta.free_later(table >> self.cluster_bits, 1, false);
        Ok(())
    }

    /// Takes refcount blocks out of the table that count nothing, or nothing but themselves.
    ///
    /// INV QCOW2-ORD-4: a block that counts itself is free once it is out of the table in memory, so it is out of the one on disk before.
    async fn drop_empty_blocks(&self) -> Result<()> {
        let _no_commits = self.commits.none().await;
        let mut meta = self.meta.lock().await;
        let meta = &mut *meta;
        if meta.moving_table.is_some() {
            return Ok(());
        }
        let mut empty = Vec::new();
        for number in meta.refcounts.existing_blocks() {
            let own = meta.refcounts.table()[number as usize] >> self.cluster_bits;
            let counts_itself = meta.refcounts.is_empty_but(&self.file, number, own).await?;
            empty.extend(counts_itself.map(|itself| (number, own, itself)));
        }
        if empty.is_empty() {
            return Ok(());
        }
        // If this fails half way, the next commit writes the entries as they were.
        let numbers = empty.iter().map(|&(number, ..)| number as usize);
        meta.refcounts.dirty_entries.extend(numbers);
        for &(number, ..) in &empty {
            let at = meta.refcounts.table_offset + number * 8;
            self.write_metadata(Owner::RefcountTable, at, vec![0; 8])
                .await?;
        }
        self.file.flush().await?;
        for (number, own, counts_itself) in empty {
            meta.refcounts.drop_block(number);
            self.disown(own);
            if !counts_itself {
                meta.free_later(own, 1, false);
            }
        }
        Ok(())
    }

    /// Takes back what the file was made longer than it had to be, and nothing of what it had when it was opened.
    pub(crate) async fn cut_ahead(&self) {
        if self.extended_ahead.swap(false, Ordering::AcqRel)
            && let Err(e) = self.cut_file(self.zero_from).await
        {
            tracing::debug!("the file stays longer than it has to be: {e}");
        }
    }

    /// Cuts the file off behind its last used cluster, but not before `at_least`.
    async fn cut_file(&self, at_least: u64) -> Result<()> {
        let mut meta = self.meta.lock().await;
        let end = self.used_end(&mut meta).await?.max(at_least);
        // What is written meanwhile lies in clusters that are counted as used.
        meta.needed_length = meta.needed_length.min(end);
        if end >= self.file.length() {
            return Ok(());
        }
        let cut = self.file.node().truncate(TruncateRequest::to(end)).await;
        if let Err(e) = cut {
            // The image is right all the same, and only longer than it has to be.
            tracing::debug!("the file can't be cut off at {end:#x}: {e}");
        }
        Ok(())
    }

    /// Where the last used cluster of the file ends, in bytes.
    async fn used_end(&self, meta: &mut Meta) -> Result<u64> {
        let entries = meta.refcounts.block_entries();
        // What was taken in this session may lie behind the end of the file: somebody is still writing it.
        let file_end = self.file.length().div_ceil(self.cluster_size());
        let mut cluster = file_end.max(meta.fresh_from);
        while cluster > 0 {
            let last = cluster - 1;
            if !meta.refcounts.has_block(last) {
                cluster = last / entries * entries;
            } else if meta.refcounts.get(&self.file, last).await? == 0 {
                cluster = last;
            } else {
                break;
            }
        }
        if cluster == 0 {
            return Err(BlockError::corrupt("No cluster of the image is in use"));
        }
        Ok(cluster << self.cluster_bits)
    }
}
