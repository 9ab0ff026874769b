// SPDX-License-Identifier: MIT OR Apache-2.0
//! Allocation of host clusters, and what becomes of freed ones: [`Meta`], everything behind the metadata lock.
//!
//! A cluster goes through these stations:
//!
//! 1. *allocated*: its refcount is 1 in memory; nothing points at it. If the request fails or is given up now, the refcount goes back to 0
//!    at once (at worst the disk says 1 after a crash: a leak).
//! 2. *linked*: a table entry points at it, in memory. `commit` makes the refcount durable first (INV QCOW2-ORD-1), then the entry.
//! 3. *freed*: no entry in memory points at it any more, but an entry on disk may.
//! 4. *in limbo*: the commit that took the entry away is durable (INV QCOW2-ORD-3); requests that looked it up before may still be under way.
//! 5. *free*: those are over, and its hole is punched if the guest asked for that; the refcount goes down, and it can be allocated (INV QCOW2-ORD-4).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use blockcore::{BlockError, DebugEvent, ErrorKind, IoBufMut, ReadFlags, Result, WriteFlags};

use crate::commit::{Growth, MovedTable};
use crate::format::{L1E_OFFSET_MASK, L2E_OFFSET_MASK, OFLAG_COPIED};
use crate::image::{Hex, Image, Intent, Owner};
use crate::l2_cache::PinnedSlice;
use crate::l2_entry::L2Entry;
use crate::l2_table::Mapping;
use crate::refcount::Refcounts;

/// So many changed slices are written back without being asked for.
const DIRTY_SLICES_MAX: u64 = 1024;
/// So many bytes of them are, too.
const DIRTY_BYTES_MAX: u64 = 4 << 20;
/// So many freed runs are made available without being asked for.
const FREED_RUNS_MAX: usize = 4096;
/// So many freed clusters are, too: 64 MiB of the usual size.
const FREED_CLUSTERS_MAX: u64 = 1024;

/// So many used clusters behind the end of the file are stepped over in a search for a free one; 256 GiB of the usual size. Sound images have next to none.
const USED_BEHIND_END_MAX: u64 = 1 << 22;

/// Consecutive host clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// The index of the first.
    pub cluster: u64,
    pub count: u64,
    /// They lie past everything ever used in the file, and read as zero until written.
    pub fresh: bool,
}

/// Host clusters that lost one reference each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Freed {
    pub cluster: u64,
    pub count: u64,
    /// The guest said that it doesn't need the data: the host may have the storage back.
    pub punch: bool,
}

/// Everything behind the metadata lock.
#[derive(Debug)]
pub(crate) struct Meta {
    pub refcounts: Refcounts,
    /// Slices with changes that are not on disk.
    pub dirty_slices: BTreeMap<u64, PinnedSlice>,
    /// L1 entries with changes that are not on disk.
    pub dirty_l1: BTreeSet<usize>,
    /// Station 3.
    pub freed: Vec<Freed>,
    /// Station 4, with the epoch that has to pass.
    pub limbo: VecDeque<(u64, Freed)>,
    /// Where the search for free clusters begins. Below it lie at most holes that were too short for what was looked for.
    pub next_free: u64,
    /// No cluster from this index on was ever used.
    pub fresh_from: u64,
    /// Where the next compressed cluster goes: a host cluster that has references, and how many of its bytes are taken.
    pub packed: Option<(u64, u64)>,
    /// The file reaches at least this far once the next commit is done, in bytes: L2 tables and data clusters are there whole, though
    /// what is zero in fresh ones was never written.
    pub needed_length: u64,
    /// Host ranges, start and end in bytes, that belong to data clusters and were never written, because they are zero. The next commit reserves
    /// storage for them: a cluster that is allocated has room on the host, as users of the format expect.
    pub unwritten: Vec<(u64, u64)>,
    /// Where the L1 table lies, in bytes.
    pub l1_offset: u64,
    /// The refcount table is on its way to a new place.
    pub moving_table: Option<MovedTable>,
    /// The disk is on its way to a greater length.
    pub growth: Option<Growth>,
}

impl Meta {
    /// Notes that the file has to reach to the end of a run.
    pub fn needs_file_to(&mut self, run: Run, cluster_bits: u32) {
        self.needed_length = self
            .needed_length
            .max((run.cluster + run.count) << cluster_bits);
    }

    /// Notes that a fresh run was written only in part.
    pub fn reserve_later(&mut self, run: Run, cluster_bits: u32) {
        let (start, end) = (
            run.cluster << cluster_bits,
            (run.cluster + run.count) << cluster_bits,
        );
        match self.unwritten.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => self.unwritten.push((start, end)),
        }
    }

    /// Clusters lose a reference: no more compressed data goes there. From here on their holes may be punched, and they may be handed out to others
    /// (INV QCOW2-ORD-4).
    fn close_packed(&mut self, cluster: u64, count: u64) {
        let losing = cluster..cluster + count;
        if self.packed.is_some_and(|(c, _)| losing.contains(&c)) {
            self.packed = None;
        }
    }

    /// Notes that clusters lost a reference.
    pub fn free_later(&mut self, cluster: u64, count: u64, punch: bool) {
        self.close_packed(cluster, count);
        if let Some(last) = self.freed.last_mut()
            && last.punch == punch
            && last.cluster + last.count == cluster
        {
            last.count += count;
            return;
        }
        self.freed.push(Freed {
            cluster,
            count,
            punch,
        });
    }

    /// Whether enough has piled up that it should be written back unasked.
    pub fn wants_commit(&self, slice_bytes: u64) -> bool {
        let slices = self.dirty_slices.len() as u64;
        slices >= DIRTY_SLICES_MAX
            || slices * slice_bytes >= DIRTY_BYTES_MAX
            || self.freed.len() >= FREED_RUNS_MAX
            || self.freed.iter().map(|f| f.count).sum::<u64>() >= FREED_CLUSTERS_MAX
    }
}

impl Image {
    /// Takes `want` consecutive free clusters. Their refcount is 1 afterwards, in memory.
    ///
    /// # Errors
    /// Those of reading refcount blocks; `NoSpace` at the limits of the format; `Corrupt` where a free cluster holds metadata.
    pub async fn alloc_run(&self, meta: &mut Meta, want: u64) -> Result<Run> {
        self.check_sound()?;
        self.file.debug_event(DebugEvent::ClusterAlloc).await;
        let mut cluster = self.find_free(meta, want).await?;
        let mut taken = want;
        if self.missing_blocks(meta, cluster, want).next().is_some() {
            // The new blocks go right behind the run, so that a run may be longer than what one block counts. They count themselves, too.
            let blocks_max = want / (meta.refcounts.block_entries() - 1) + 3;
            cluster = self.find_free(meta, want + blocks_max).await?;
            taken = want + self.blocks_for(meta, cluster, want);
        }
        if (cluster + taken) << self.cluster_bits > L2E_OFFSET_MASK {
            let text = "The image file can't grow further";
            return Err(BlockError::new(ErrorKind::NoSpace, text).errno_is(libc::EFBIG));
        }
        let (host, bytes) = (cluster << self.cluster_bits, taken << self.cluster_bits);
        // INV QCOW2-META-1: a cluster that is counted free and holds metadata all the same is never handed out.
        if let Some(owner) = self.owner_in(host, bytes) {
            return Err(self.refuse_overlap(host, owner));
        }
        let missing: Vec<u64> = self.missing_blocks(meta, cluster, taken).collect();
        if let Some(&last) = missing.last() {
            self.file.debug_event(DebugEvent::RefblockAlloc).await;
            meta.refcounts.check_room(last)?;
        }
        // What can fail comes first: a new block that is in the table has to be counted (INV QCOW2-ORD-1). Clusters that are counted in vain leak.
        let mut counted_in_new = Vec::new();
        for c in cluster..cluster + taken {
            match meta.refcounts.has_block(c) {
                true => meta.refcounts.set(&self.file, c, 1).await?,
                false => counted_in_new.push(c),
            }
        }
        for (block, place) in missing.into_iter().zip(cluster + want..) {
            meta.refcounts.add_block(block, place << self.cluster_bits);
            self.own(
                place << self.cluster_bits,
                self.cluster_size(),
                Owner::RefcountBlock,
            );
        }
        for c in counted_in_new {
            meta.refcounts.set(&self.file, c, 1).await?;
        }
        meta.next_free = cluster + taken;
        let run = self.use_run(meta, cluster, taken);
        Ok(Run { count: want, ..run })
    }

    fn use_run(&self, meta: &mut Meta, cluster: u64, count: u64) -> Run {
        let fresh = cluster >= meta.fresh_from && cluster << self.cluster_bits >= self.zero_from;
        meta.fresh_from = meta.fresh_from.max(cluster + count);
        Run {
            cluster,
            count,
            fresh,
        }
    }

    /// How many refcount blocks a run of `want` clusters lacks, when they follow right behind it.
    fn blocks_for(&self, meta: &Meta, cluster: u64, want: u64) -> u64 {
        let mut blocks = 0;
        loop {
            let lacking = self.missing_blocks(meta, cluster, want + blocks).count() as u64;
            if lacking == blocks {
                return blocks;
            }
            blocks = lacking;
        }
    }

    /// The first of `want` consecutive clusters with refcount 0, from the cursor on.
    ///
    /// # Errors
    /// Those of reading refcount blocks; `Corrupt` where the refcounts claim so much behind the end of the file that it can only have been made up:
    /// one block that the refcount table names a million times would keep the search busy for days.
    async fn find_free(&self, meta: &mut Meta, want: u64) -> Result<u64> {
        let file_end = self.file.length() >> self.cluster_bits;
        let mut behind_end = 0;
        let mut first = meta.next_free;
        let mut cluster = first;
        while cluster < first + want {
            if !meta.refcounts.has_block(cluster) {
                // A whole block's worth of free clusters.
                let entries = meta.refcounts.block_entries();
                cluster = (cluster / entries + 1) * entries;
            } else if meta.refcounts.get(&self.file, cluster).await? == 0 {
                cluster += 1;
            } else {
                behind_end += u64::from(cluster > file_end);
                if behind_end > USED_BEHIND_END_MAX {
                    return Err(BlockError::corrupt(format!(
                        "More than {USED_BEHIND_END_MAX} clusters behind the end of the file are counted as used"
                    )));
                }
                cluster += 1;
                first = cluster;
            }
        }
        Ok(first)
    }

    /// The numbers of the refcount blocks that a range of clusters lacks.
    fn missing_blocks(&self, meta: &Meta, cluster: u64, count: u64) -> impl Iterator<Item = u64> {
        let entries = meta.refcounts.block_entries();
        let blocks = cluster / entries..=(cluster + count - 1) / entries;
        blocks.filter(move |b| !meta.refcounts.has_block(b * entries))
    }

    /// Takes places for the data of guest clusters. In an external data file each has its own.
    ///
    /// # Errors
    /// As [`alloc_run`](Image::alloc_run).
    pub async fn alloc_data(&self, meta: &mut Meta, guest_cluster: u64, count: u64) -> Result<Run> {
        if !self.has_data_file() {
            return self.alloc_run(meta, count).await;
        }
        Ok(Run {
            cluster: guest_cluster,
            count,
            fresh: false,
        })
    }

    /// Gives back what [`alloc_data`](Image::alloc_data) took.
    ///
    /// # Errors
    /// As [`unalloc_run`](Image::unalloc_run).
    pub async fn unalloc_data(&self, meta: &mut Meta, run: Run) -> Result<()> {
        match self.has_data_file() {
            true => Ok(()),
            false => self.unalloc_run(meta, run).await,
        }
    }

    /// Gives back clusters that nothing ever pointed at. They can be handed out again at once.
    ///
    /// # Errors
    /// Those of reading refcount blocks; then the clusters leak.
    pub async fn unalloc_run(&self, meta: &mut Meta, run: Run) -> Result<()> {
        for cluster in run.cluster..run.cluster + run.count {
            meta.refcounts.set(&self.file, cluster, 0).await?;
            meta.close_packed(cluster, 1);
        }
        meta.next_free = meta.next_free.min(run.cluster);
        Ok(())
    }

    /// Takes one reference from each cluster of the first run in limbo, and the run out of it. The caller has seen to INV QCOW2-ORD-3 and QCOW2-ORD-4.
    ///
    /// # Errors
    /// Those of reading refcount blocks, with what is left to do still in limbo; `Corrupt` where there was no reference.
    pub async fn release_first(&self, meta: &mut Meta) -> Result<()> {
        while let Some((_, freed)) = meta.limbo.front_mut() {
            if freed.count == 0 {
                meta.limbo.pop_front();
                break;
            }
            let cluster = freed.cluster;
            let references = meta.refcounts.get(&self.file, cluster).await?;
            if references == 0 {
                let host = cluster << self.cluster_bits;
                let text = format!("Cluster at offset {host:#x} was freed, but had no references");
                return Err(self.signal_corruption(&text, host));
            }
            meta.refcounts
                .set(&self.file, cluster, references - 1)
                .await?;
            if let Some((_, freed)) = meta.limbo.front_mut() {
                freed.cluster += 1;
                freed.count -= 1;
            }
            if references == 1 {
                self.disown(cluster);
                meta.next_free = meta.next_free.min(cluster);
            }
        }
        Ok(())
    }

    /// Sees to it that there is an L2 table for an L1 entry that this image alone uses (INV QCOW2-META-2): makes one, or copies a shared one.
    ///
    /// A new table's bytes are on disk before the L1 entry changes even in memory, so that no order of later writes can expose what lay there
    /// before; both become durable in the next commit.
    ///
    /// # Errors
    /// Those of allocating and of metadata I/O.
    pub async fn ensure_l2_table(&self, meta: &mut Meta, l1_index: usize) -> Result<()> {
        let entry = self.l1.get(l1_index);
        let old = entry & L1E_OFFSET_MASK;
        if old != 0 && entry & OFLAG_COPIED != 0 {
            return Ok(());
        }
        if old & (self.cluster_size() - 1) != 0 {
            let text = format!(
                "L2 table offset {} unaligned (L1 index: {})",
                Hex(old),
                Hex(l1_index as u64)
            );
            return Err(self.signal_corruption(&text, old));
        }
        let run = self.alloc_run(meta, 1).await?;
        let host = run.cluster << self.cluster_bits;
        let filled = async {
            if old != 0 {
                let buf = IoBufMut::zeroed(self.cluster_size() as usize);
                self.file.debug_event(DebugEvent::L2AllocCowRead).await;
                let bytes = self.file.preadv(old, buf, ReadFlags::empty()).await?;
                self.file.debug_event(DebugEvent::L2AllocWrite).await;
                self.file
                    .pwritev(host, bytes.freeze(), WriteFlags::empty())
                    .await
            } else if !run.fresh {
                self.file.debug_event(DebugEvent::L2AllocWrite).await;
                self.file
                    .pwrite_zeroes(host, self.cluster_size(), WriteFlags::empty())
                    .await
            } else {
                Ok(())
            }
        };
        if let Err(e) = filled.await {
            self.unalloc_run(meta, run).await?;
            return Err(e);
        }
        meta.needs_file_to(run, self.cluster_bits);
        if run.fresh && old == 0 {
            meta.reserve_later(run, self.cluster_bits);
        }
        self.own(host, self.cluster_size(), Owner::L2);
        self.l1.set(l1_index, host | OFLAG_COPIED);
        meta.dirty_l1.insert(l1_index);
        if old != 0 {
            meta.free_later(old >> self.cluster_bits, 1, false);
        }
        Ok(())
    }

    /// Changes the L2 entry of a guest cluster whose table is there and unshared, and returns the old mapping.
    ///
    /// # Errors
    /// Those of reading the table; `Corrupt` for an old entry that makes no sense.
    pub async fn set_entry(
        self: &Arc<Self>,
        meta: &mut Meta,
        guest_cluster: u64,
        entry: L2Entry,
    ) -> Result<Mapping> {
        let (number, index) = self.l2.locate(guest_cluster);
        let Some(slice) = self.slice(number).await? else {
            unreachable!("the caller has made the L2 table");
        };
        let old = self.decode(guest_cluster, slice.get(index), Intent::Write)?;
        slice.set(index, entry);
        meta.dirty_slices.entry(number).or_insert(slice);
        Ok(old)
    }

    /// Notes that the host clusters of a mapping lost the reference of an L2 entry; with `punch`, since the guest doesn't need them.
    ///
    /// # Errors
    /// `Corrupt` where they hold metadata.
    pub fn free_mapping(&self, meta: &mut Meta, old: &Mapping, punch: bool) -> Result<()> {
        if self.has_data_file() {
            // Nothing is counted there.
            return Ok(());
        }
        if let Some((host, bytes)) = old.referenced(self.cluster_size()) {
            // INV QCOW2-META-1: an entry that points at metadata must not make that metadata free, or a hole.
            if let Some(owner) = self.owner_in(host, bytes) {
                return Err(self.refuse_overlap(host, owner));
            }
            let first = host >> self.cluster_bits;
            let end = (host + bytes).div_ceil(self.cluster_size());
            let runtime = self.runtime();
            let passes = match punch {
                true => runtime.pass_discard_request,
                false => runtime.pass_discard_other,
            };
            meta.free_later(first, end - first, passes);
        }
        Ok(())
    }
}
