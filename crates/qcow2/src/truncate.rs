// SPDX-License-Identifier: MIT OR Apache-2.0
//! Changing the length of the disk; making it shorter is `shrink`. What appears reads as zero: also where the last cluster, or a longer backing node, has something else there.
//!
//! All of that is done before the header says the new length, so that a power cut leaves the old disk or the new one (INV QCOW2-ORD-2).

use std::sync::Arc;

use blockcore::{
    BlockError, DebugEvent, IoBuf, IoBufMut, MAX_LENGTH_BYTES, Preallocation, Result,
    TruncateRequest, WriteFlags,
};

use crate::alloc::{Freed, Meta, Run};
use crate::commit::Growth;
use crate::format::MAX_L1_BYTES;
use crate::image::{Image, Intent, Owner};
use crate::l2_table::Mapping;
use crate::remap::Remap;

/// How many clusters are preallocated under one hold of the metadata lock.
const PREALLOCATION_CLUSTERS: u64 = 512;
/// The most zeroes that one write carries, in bytes.
const ZERO_WRITE_BYTES: u64 = 1 << 20;

impl Image {
    /// Changes the length of the disk.
    ///
    /// # Errors
    /// `Unsupported` for version 2 images with snapshots; `InvalidArgument` for a length that is no multiple of a sector, or too
    /// large for the cluster size; those of metadata I/O.
    pub async fn truncate(self: &Arc<Self>, request: TruncateRequest) -> Result<()> {
        self.check_sound()?;
        if !request.bytes.is_multiple_of(512) {
            return Err(BlockError::invalid(
                "The new size must be a multiple of 512",
            ));
        }
        let old = self.size();
        let snapshots = self.header().nb_snapshots;
        if self.version() < 3 && snapshots > 0 {
            return Err(BlockError::unsupported(
                "Can't resize a v2 image which has snapshots",
            ));
        }
        if request.bytes < old {
            if request.preallocation != Preallocation::Off {
                let text = "Preallocation can't be used for shrinking an image";
                return Err(BlockError::invalid(text));
            }
            let work = move |image: Arc<Image>| async move { image.resize(request).await };
            return self.spawn(request.bytes, MAX_LENGTH_BYTES, work).await;
        }
        if request.bytes == old {
            return Ok(());
        }
        self.check_bitmaps_fit(request.bytes)?;
        let whole_clusters = old.next_multiple_of(self.cluster_size()) < request.bytes;
        let shows_backing = self.backing.as_ref().is_some_and(|b| b.length() > old);
        if self.version() < 3 && whole_clusters && shows_backing {
            // What appears would show the backing node, and version 2 has no zero clusters to hide it.
            let text = "Failed to zero out new clusters: Operation not supported";
            return Err(BlockError::unsupported(text));
        }
        // All behind the end: no two growths at a time.
        self.spawn(old, MAX_LENGTH_BYTES, move |image| async move {
            image.resize(request).await
        })
        .await
    }

    /// Changes the length. The caller holds `changing` over all behind the lesser of the old end and the new one.
    async fn resize(self: Arc<Self>, request: TruncateRequest) -> Result<()> {
        // Looked at only now: a change that nobody waits for any more may have come before this one.
        match request.bytes.cmp(&self.size()) {
            std::cmp::Ordering::Less => self.shrink(request.bytes).await,
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => self.grow(request).await,
        }
    }

    async fn grow(self: &Arc<Self>, mut request: TruncateRequest) -> Result<()> {
        let (old, new) = (self.size(), request.bytes);
        if self.header().is_data_file_raw() && request.preallocation == Preallocation::Off {
            // What reads as the disk does is the disk: every cluster of it is in use.
            request.preallocation = Preallocation::Metadata;
        }
        let table_bytes = 1u64 << (self.l2_bits() + self.cluster_bits);
        let l1_entries = new.div_ceil(table_bytes);
        if l1_entries * 8 > MAX_L1_BYTES {
            let text = "Failed to grow the L1 table";
            return Err(BlockError::from_errno(libc::EFBIG).context(text));
        }
        {
            let _epoch = self.epochs.enter();
            self.grow_l1(l1_entries as usize).await?;
            self.resize_data(old, new, request.preallocation).await?;
            self.zero_new_area(old, new).await?;
            if request.preallocation != Preallocation::Off {
                self.preallocate(old, new, request.preallocation).await?;
            }
        }
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
        self.size.store(new, std::sync::atomic::Ordering::Release);
        Ok(())
    }

    /// Makes room for L1 entries, at a new place if need be, and notes the new length for the commit.
    pub(crate) async fn grow_l1(&self, entries: usize) -> Result<()> {
        let mut meta = self.meta.lock().await;
        let meta = &mut *meta;
        let have = self.l1.len();
        if entries > have {
            let clusters = (entries as u64 * 8).div_ceil(self.cluster_size());
            self.file.debug_event(DebugEvent::L1GrowAllocTable).await;
            let run = self.alloc_run(meta, clusters).await?;
            let host = run.cluster << self.cluster_bits;
            // Only now, when nothing can fail any more: what an earlier growth has left to do must not be forgotten.
            let mut old_l1 = meta.growth.take().map(|g| g.old_l1).unwrap_or_default();
            if have > 0 {
                let count = (have as u64 * 8).div_ceil(self.cluster_size());
                old_l1.push(Freed {
                    cluster: meta.l1_offset >> self.cluster_bits,
                    count,
                    punch: false,
                });
            }
            self.own(host, clusters << self.cluster_bits, Owner::L1);
            self.l1.grow(entries);
            meta.l1_offset = host;
            meta.dirty_l1.extend(0..entries);
            // The header may name the new place at once, but the new length only when what appears is zero: a flush may come between.
            meta.growth = Some(Growth {
                size: self.size(),
                old_l1,
            });
        }
        Ok(())
    }

    /// Makes `old..new` read as zero where it would not by itself. The caller holds `changing` and an epoch.
    async fn zero_new_area(self: &Arc<Self>, old: u64, new: u64) -> Result<()> {
        let partial_end = old
            .next_multiple_of(self.cluster_size())
            .min(new.next_multiple_of(self.cluster_size()));
        let backing_end = self.backing.as_ref().map_or(0, |b| b.length());
        if old < partial_end {
            self.zero_new_part(old, partial_end, backing_end > old)
                .await?;
        }
        // Entries behind the old end are none of this disk's data: another disk's life has left them.
        let forget = self.entry_for_nothing();
        let cluster = |offset: u64| offset.div_ceil(self.cluster_size());
        let (first, hidden, end) = (
            cluster(partial_end),
            // Where the backing node shows at all, QEMU hides all that appears, also past its end.
            cluster(if backing_end > old { new } else { partial_end }),
            cluster(new),
        );
        self.remap(first, hidden, false, |mapping, _| match mapping {
            Mapping::ZeroPlain => Remap::Keep,
            Mapping::Unallocated => Remap::Set(self.entries().zero()),
            _ => Remap::Replace(self.entries().zero()),
        })
        .await?;
        self.remap(hidden, end, false, |mapping, _| match mapping {
            Mapping::ZeroPlain | Mapping::Unallocated => Remap::Keep,
            _ => Remap::Replace(forget),
        })
        .await
    }

    /// Makes the end of the cluster that the disk ended in read as zero: all of `old..end`. The caller holds `changing` and an epoch.
    async fn zero_new_part(self: &Arc<Self>, old: u64, end: u64, hides: bool) -> Result<()> {
        let (mapping, _) = self.run(old, 1, Intent::Write).await?;
        let (is_shown, written_end) = match mapping {
            // Whoever compressed it has mostly filled it with zeroes.
            Mapping::Compressed(_) => {
                let buf = IoBufMut::zeroed((end - old) as usize);
                let rest = self.read_mapped(mapping, old, buf).await?;
                (!rest.freeze().is_zero(), end)
            }
            Mapping::Data { .. } => (true, old.next_multiple_of(self.subcluster_size())),
            // A zero cluster hides the backing node already. QEMU writes zeroes to it all the same, and `map` shows that.
            _ => (hides, old.next_multiple_of(self.subcluster_size())),
        };
        if is_shown && old < written_end {
            self.write_some(old, IoBuf::zeroes((written_end - old) as usize))
                .await?;
        }
        // Further subclusters: they are hidden, too, and what another disk's life has left in them is forgotten.
        let mut at = written_end;
        while at < end {
            let (mapping, bytes) = self.run(at, end - at, Intent::Write).await?;
            if hides || matches!(mapping, Mapping::Data { .. }) {
                self.zero_part(at..at + bytes).await?;
            }
            at += bytes;
        }
        Ok(())
    }

    /// Gives every cluster of `old..new` a host cluster that reads as zero. The caller holds `changing` and an epoch.
    async fn preallocate(self: &Arc<Self>, old: u64, new: u64, mode: Preallocation) -> Result<()> {
        if self.is_encrypted() && self.version() < 3 {
            let text = "Preallocation of encrypted images needs compatibility level 1.1 and above";
            return Err(BlockError::unsupported(text));
        }
        let mut at = old.div_ceil(self.cluster_size());
        let end = new.div_ceil(self.cluster_size());
        if self.entries().is_extended && self.in_cluster(old) != 0 {
            // The cluster that the disk ended in gets its place, too: what it holds doesn't change.
            let mapping = self.mapping(at - 1, Intent::Write).await?;
            at -= u64::from(mapping.referenced(self.cluster_size()).is_none());
        }
        let mut last = None;
        while at < end {
            let table_entries = 1u64 << self.l2_bits();
            let table_end = (at / table_entries + 1) * table_entries;
            let count = (end - at).min(PREALLOCATION_CLUSTERS).min(table_end - at);
            let run = {
                let mut meta = self.meta.lock().await;
                self.ensure_l2_table(&mut meta, self.l1_index(at)).await?;
                self.alloc_data(&mut meta, at, count).await?
            };
            if let Err(e) = self.fill_with_zeroes(run, mode).await {
                let mut meta = self.meta.lock().await;
                self.unalloc_data(&mut meta, run).await?;
                return Err(e);
            }
            let mut meta = self.meta.lock().await;
            self.link_preallocated(&mut meta, at, run).await?;
            drop(meta);
            self.commit_if_wanted().await?;
            at += count;
            last = Some(run);
        }
        if self.has_data_file() {
            return Ok(());
        }
        let (Some(run), Preallocation::Metadata) = (last, mode) else {
            return Ok(());
        };
        let unused = (end << self.cluster_bits) - new;
        let host_end = ((run.cluster + run.count) << self.cluster_bits) - unused;
        if self.entries().is_extended {
            let mut meta = self.meta.lock().await;
            let used_end = host_end.next_multiple_of(self.subcluster_size());
            meta.needed_length = meta.needed_length.max(used_end);
        } else if unused > 0 {
            // What the last cluster has behind the end of the disk is written, so that a later growth finds zeroes there whatever it trusts.
            self.file
                .pwritev(
                    host_end,
                    IoBuf::zeroes(unused as usize),
                    WriteFlags::empty(),
                )
                .await?;
        }
        Ok(())
    }

    async fn fill_with_zeroes(&self, run: Run, mode: Preallocation) -> Result<()> {
        let (host, bytes) = (
            run.cluster << self.cluster_bits,
            run.count << self.cluster_bits,
        );
        if self.has_data_file() {
            // It has been made longer as was asked for.
            return Ok(());
        }
        match mode {
            Preallocation::Off | Preallocation::Metadata
                if run.fresh || self.entries().is_extended =>
            {
                Ok(())
            }
            Preallocation::Full => {
                let mut done = 0;
                while done < bytes {
                    let n = (bytes - done).min(ZERO_WRITE_BYTES);
                    self.file
                        .pwritev(host + done, IoBuf::zeroes(n as usize), WriteFlags::empty())
                        .await?;
                    done += n;
                }
                Ok(())
            }
            _ => {
                self.file
                    .pwrite_zeroes(host, bytes, WriteFlags::empty())
                    .await
            }
        }
    }

    async fn link_preallocated(
        self: &Arc<Self>,
        meta: &mut Meta,
        first: u64,
        run: Run,
    ) -> Result<()> {
        if !self.has_data_file() && !self.entries().is_extended {
            meta.needs_file_to(run, self.cluster_bits);
        }
        for i in 0..run.count {
            let host = (run.cluster + i) << self.cluster_bits;
            let old = self.entry(first + i).await?;
            // Subclusters stay what they are: only their place is kept.
            let mut new = self.entries().written(old, host, 0..0);
            let is_noise = match self.has_data_file() {
                // What reads as the disk does is what the disk reads as.
                true => !self.holes_are_zero() && !self.reads_raw(),
                false => self.is_encrypted(),
            };
            if is_noise && !self.entries().is_extended {
                // What was never written is noise.
                new = self.entries().zeroed(new);
            }
            let old = self.set_entry(meta, first + i, new).await?;
            self.free_mapping(meta, &old, false)?;
        }
        Ok(())
    }
}
