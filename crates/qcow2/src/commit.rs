// SPDX-License-Identifier: MIT OR Apache-2.0
//! Writing metadata back, in the one order that survives a power cut. This is what `flush` is.
//!
//! A commit takes a copy of all changes in memory, under the metadata lock, and then writes it without the lock:
//!
//! | step | what | why then |
//! |---|---|---|
//! | 1 | the file is made long enough; storage for what was written in part is reserved; changed refcount blocks | nothing refers to new ones yet |
//! | 2 | *fdatasync*, then new refcount table entries; for a moved table *fdatasync*, and the header that names it | they must not point at garbage |
//! | 3 | *fdatasync* | INV QCOW2-ORD-1: refcounts; INV QCOW2-ORD-2: guest data and COW that finished before the copy was taken |
//! | 4 | changed L2 slices, changed L1 entries | everything they point at is durable |
//! | 5 | *fdatasync* | INV QCOW2-ORD-5 |
//! | 5a | the header's size and L1 fields, if the disk has grown, and *fdatasync* | the L1 table they name is durable |
//! | 6 | freed clusters go to limbo; those whose users are gone lose their hole and their refcount | INV QCOW2-ORD-3, QCOW2-ORD-4 |
//!
//! Step 2 happens once in gigabytes. What changes while a commit runs is in the next one: an L2 entry that is set after the copy was taken is
//! not in the copy, though its slice is.
//!
//! Commits run one at a time, in a task of their own: who waits for one may go away. Several waiters share one (group commit): a commit that *began*
//! after a flush was called does for that flush.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use blockcore::{DebugEvent, IoBuf, Result, WriteFlags};

use crate::alloc::{Freed, Meta};
use crate::crypto::CryptMethod;
use crate::image::{Image, Owner, cancelled};
use crate::l2_cache::PinnedSlice;
use crate::refcount::BlockWrite;

/// L1 entries are written in pieces of this many bytes.
const L1_WRITE_BYTES: usize = 512;

/// Which commits have begun and ended.
#[derive(Debug, Default)]
pub(crate) struct CommitState {
    lock: tokio::sync::Mutex<()>,
    begun: AtomicU64,
    /// The number of the last commit that ended well.
    done: AtomicU64,
    /// What a commit has taken and not yet settled. Its runtime may end meanwhile: then the next commit, in another one, finds it here.
    unsettled: Mutex<Option<Arc<Plan>>>,
}

impl CommitState {
    /// Keeps commits from beginning, once the one that runs has ended.
    pub async fn none(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.lock.lock().await
    }

    fn unsettled(&self) -> MutexGuard<'_, Option<Arc<Plan>>> {
        self.unsettled
            .lock()
            .expect("no code panics while it holds this lock")
    }
}

/// A copy of everything that is to be written.
#[derive(Debug, Default)]
struct Plan {
    blocks: Vec<BlockWrite>,
    /// Pieces of the refcount table in rounds (see `Refcounts::table_rounds`), or the whole table at its new place.
    table: Vec<Vec<(u64, Vec<u8>)>>,
    table_entries: Vec<usize>,
    /// The refcount table has moved here: the header has to say so.
    moved_table: Option<MovedTable>,
    slices: Vec<(u64, PinnedSlice, u64, Vec<u8>)>,
    l1: BTreeMap<usize, Vec<u8>>,
    l1_entries: Vec<usize>,
    l1_offset: u64,
    /// The header's size and L1 fields, if they change.
    growth: Option<PlannedGrowth>,
    freed: Vec<Freed>,
    /// The file has to reach this far, in bytes.
    needed_length: u64,
    /// Host ranges to reserve storage for.
    unwritten: Vec<(u64, u64)>,
}

/// A refcount table on its way to a new place. Until the header that names it is durable, both places are in use.
#[derive(Clone, Debug)]
pub(crate) struct MovedTable {
    offset: u64,
    clusters: u32,
    /// The places it had before.
    old: Vec<Freed>,
    /// The header may name the new place already: from now on it is changed entry by entry, as every table is.
    named: Arc<AtomicBool>,
}

/// A disk on its way to a greater length.
#[derive(Clone, Debug)]
pub(crate) struct Growth {
    /// The length in bytes that the header is to name.
    pub size: u64,
    /// The places the L1 table had before.
    pub old_l1: Vec<Freed>,
}

impl Meta {
    /// Puts back what a commit took and could not write.
    fn give_back(&mut self, plan: &Plan) {
        self.refcounts.written(&plan.blocks, false);
        self.refcounts.dirty_entries.extend(&plan.table_entries);
        for (number, slice, _, _) in &plan.slices {
            self.dirty_slices
                .entry(*number)
                .or_insert_with(|| slice.clone());
        }
        self.dirty_l1.extend(&plan.l1_entries);
        self.freed.extend(&plan.freed);
        self.unwritten.extend(&plan.unwritten);
    }

    /// Whether the header may name a new place of the refcount table that isn't settled yet.
    #[cfg(test)]
    pub fn header_may_name_moved_table(&self) -> bool {
        let moving = self.moving_table.as_ref();
        moving.is_some_and(|m| m.named.load(Ordering::Acquire))
    }

    /// The header says what was planned. If the disk has begun to grow further meanwhile, that is still to be written.
    fn growth_settled(&mut self, planned: &PlannedGrowth) {
        let Some(growth) = &mut self.growth else {
            return;
        };
        // A newer growth has added its own at the end.
        growth.old_l1.drain(..planned.old_l1.len());
        if growth.size == planned.size && self.l1_offset == planned.l1_offset {
            self.growth = None;
        }
    }
}

/// A [`Growth`] as one commit writes it. Meanwhile the disk may begin to grow further.
#[derive(Debug)]
struct PlannedGrowth {
    size: u64,
    l1_entries: u32,
    l1_offset: u64,
    old_l1: Vec<Freed>,
}

impl PlannedGrowth {
    /// The header from the field `size` to the L1 table's offset; how the image is encrypted lies between them.
    fn header_bytes(&self, crypt_method: CryptMethod) -> Vec<u8> {
        let mut bytes = self.size.to_be_bytes().to_vec();
        bytes.extend(crypt_method.number().to_be_bytes());
        bytes.extend(self.l1_entries.to_be_bytes());
        bytes.extend(self.l1_offset.to_be_bytes());
        bytes
    }
}

/// Byte offset of the disk's length in the header; encryption method, L1 size and L1 offset follow.
const SIZE_FIELD: u64 = 24;

/// Byte offset of the refcount table's offset in the header; its length in clusters follows.
const REFCOUNT_TABLE_OFFSET_FIELD: u64 = 48;

/// The same ranges in their order, with those that touch in one: writes that come together put them down in any order.
fn joined(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    ranges.dedup_by(|next, last| {
        let touches = next.0 <= last.1;
        if touches {
            last.1 = last.1.max(next.1);
        }
        touches
    });
    ranges
}

impl Image {
    /// Makes all completed writes durable, with the metadata that makes them reachable. INV QCOW2-ORD-5.
    ///
    /// # Errors
    /// The file's. What was not written stays to be written.
    pub async fn commit(self: &Arc<Self>) -> Result<()> {
        let needed = self.commits.begun.load(Ordering::Acquire) + 1;
        let image = self.clone();
        let guard = self.tasks.enter_owned();
        let task = tokio::spawn(async move {
            let _guard = guard;
            let _one = image.commits.lock.lock().await;
            if image.commits.done.load(Ordering::Acquire) >= needed {
                return Ok(());
            }
            let number = image.commits.begun.fetch_add(1, Ordering::AcqRel) + 1;
            image.commit_now().await?;
            image.commits.done.store(number, Ordering::Release);
            Ok(())
        });
        task.await.unwrap_or_else(|_| Err(cancelled()))
    }

    /// One commit. The caller sees to it that there is only one at a time.
    pub(crate) async fn commit_now(&self) -> Result<()> {
        self.mark_corrupt_on_disk().await?;
        self.check_sound()?;
        let plan = {
            let mut meta = self.meta.lock().await;
            if let Some(cut_off) = self.commits.unsettled().take() {
                meta.give_back(&cut_off);
            }
            let plan = Arc::new(self.take_plan(&mut meta).await?);
            *self.commits.unsettled() = Some(plan.clone());
            plan
        };
        let result = self.write_plan(&plan).await;
        {
            let mut meta = self.meta.lock().await;
            match &result {
                Ok(()) => self.settle(&mut meta, &plan),
                // Nothing is lost: what may not have reached the disk goes into the next commit.
                Err(_) => meta.give_back(&plan),
            }
            self.commits.unsettled().take();
        }
        result?;
        self.empty_limbo().await
    }

    /// Copies all changes, and takes them for written. What can fail comes first: what has been taken is in the plan.
    async fn take_plan(&self, meta: &mut Meta) -> Result<Plan> {
        if meta.refcounts.needs_move() {
            self.move_refcount_table(meta).await?;
        }
        let mut plan = Plan {
            l1_offset: meta.l1_offset,
            needed_length: meta.needed_length,
            // Stays set until it has worked: the header may name the new place or the old one.
            moved_table: meta.moving_table.clone(),
            ..Plan::default()
        };
        for (&number, slice) in &meta.dirty_slices {
            let Some(host) = self.slice_offset(number)? else {
                unreachable!("a changed slice has a table")
            };
            let bytes = slice.to_bytes();
            plan.slices.push((number, slice.clone(), host, bytes));
        }
        meta.dirty_slices.clear();
        plan.blocks = meta.refcounts.take_dirty();
        plan.table_entries = std::mem::take(&mut meta.refcounts.dirty_entries)
            .into_iter()
            .collect();
        plan.table = match &plan.moved_table {
            Some(moved) if !moved.named.load(Ordering::Acquire) => {
                let entries = meta.refcounts.table().iter();
                let bytes = entries.flat_map(|e| e.to_be_bytes()).collect();
                vec![vec![(moved.offset, bytes)]]
            }
            _ => meta.refcounts.table_rounds(&plan.table_entries),
        };
        plan.l1_entries = std::mem::take(&mut meta.dirty_l1).into_iter().collect();
        let per_piece = L1_WRITE_BYTES / 8;
        for &i in &plan.l1_entries {
            let piece = i / per_piece;
            let entries = piece * per_piece..((piece + 1) * per_piece).min(self.l1.len());
            plan.l1
                .entry(piece)
                .or_insert_with(|| entries.flat_map(|i| self.l1.get(i).to_be_bytes()).collect());
        }
        plan.growth = meta.growth.as_ref().map(|growth| PlannedGrowth {
            size: growth.size,
            l1_entries: self.l1.len() as u32,
            l1_offset: meta.l1_offset,
            old_l1: growth.old_l1.clone(),
        });
        plan.freed = std::mem::take(&mut meta.freed);
        plan.unwritten = joined(std::mem::take(&mut meta.unwritten));
        Ok(plan)
    }

    /// A plan has been written and is durable.
    fn settle(&self, meta: &mut Meta, plan: &Plan) {
        meta.refcounts.written(&plan.blocks, true);
        let mut freed = plan.freed.clone();
        if let Some(moved) = &plan.moved_table {
            freed.extend(&moved.old);
            meta.moving_table = None;
        }
        if let Some(planned) = &plan.growth {
            freed.extend(&planned.old_l1);
            let mut header = self.header();
            header.size = planned.size;
            header.l1_size = planned.l1_entries;
            header.l1_table_offset = planned.l1_offset;
            meta.growth_settled(planned);
        }
        let stamp = self.epochs.stamp();
        meta.limbo.extend(freed.into_iter().map(|f| (stamp, f)));
    }

    /// Finds a new place for a refcount table that has outgrown its own.
    async fn move_refcount_table(&self, meta: &mut Meta) -> Result<()> {
        let mut old = meta.moving_table.clone().map(|m| m.old).unwrap_or_default();
        old.push(Freed {
            cluster: meta.refcounts.table_offset >> self.cluster_bits,
            count: meta.refcounts.table_clusters.into(),
            punch: false,
        });
        // Counting the new table's own clusters may need further blocks, and so a longer table.
        let run = loop {
            let clusters = (meta.refcounts.table().len() as u64 * 8).div_ceil(self.cluster_size());
            self.file.debug_event(DebugEvent::ReftableGrow).await;
            let run = self.alloc_run(meta, clusters).await?;
            if meta.refcounts.table().len() as u64 * 8 <= clusters << self.cluster_bits {
                break run;
            }
            self.unalloc_run(meta, run).await?;
        };
        let offset = run.cluster << self.cluster_bits;
        self.own(offset, run.count << self.cluster_bits, Owner::RefcountTable);
        meta.refcounts.table_offset = offset;
        meta.refcounts.table_clusters = run.count as u32;
        meta.moving_table = Some(MovedTable {
            offset,
            clusters: run.count as u32,
            old,
            named: Arc::default(),
        });
        Ok(())
    }

    async fn write_plan(&self, plan: &Plan) -> Result<()> {
        // A cluster that was written only in part at the very end: the file reaches to its end, as other readers expect.
        if !self.file.is_read_only() {
            self.file.extend(plan.needed_length).await?;
        }
        for &(start, end) in &plan.unwritten {
            // A host that has no room, or no such call, is no reason to fail: nothing is lost.
            if let Err(e) = self.file.reserve_storage(start, end - start).await {
                tracing::debug!("no storage reserved at {start:#x}: {e}");
            }
        }
        self.write_blocks(&plan.blocks).await?;
        for round in &plan.table {
            // INV QCOW2-ORD-1: a table entry that names a new block is durable only after the block, and after the entry of the block that counts it.
            self.file.flush().await?;
            let point = match &plan.moved_table {
                Some(_) => DebugEvent::RefblockAllocWriteTable,
                None => DebugEvent::RefblockAllocHookup,
            };
            for (host, bytes) in round {
                self.file.debug_event(point).await;
                self.write_metadata(Owner::RefcountTable, *host, bytes.clone())
                    .await?;
            }
        }
        if let Some(moved) = &plan.moved_table {
            self.file.flush().await?;
            moved.named.store(true, Ordering::Release);
            self.file
                .debug_event(DebugEvent::RefblockAllocSwitchTable)
                .await;
            let mut bytes = moved.offset.to_be_bytes().to_vec();
            bytes.extend(moved.clusters.to_be_bytes());
            self.write_metadata(Owner::Header, REFCOUNT_TABLE_OFFSET_FIELD, bytes)
                .await?;
            let mut header = self.header();
            header.refcount_table_offset = moved.offset;
            header.refcount_table_clusters = moved.clusters;
        }
        // INV QCOW2-ORD-1, QCOW2-ORD-2: what the entries below point at is durable before they are.
        self.file.flush().await?;
        if let Some(data) = self.data.child() {
            data.flush().await?;
        }
        if plan.slices.is_empty() && plan.l1.is_empty() && plan.growth.is_none() {
            return Ok(());
        }
        for (_, _, host, bytes) in &plan.slices {
            self.file.debug_event(DebugEvent::L2Update).await;
            self.write_metadata(Owner::L2, *host, bytes.clone()).await?;
        }
        let moves_l1 = plan.growth.as_ref().is_some_and(|g| !g.old_l1.is_empty());
        for (piece, bytes) in &plan.l1 {
            let point = match moves_l1 {
                true => DebugEvent::L1GrowWriteTable,
                false => DebugEvent::L1Update,
            };
            self.file.debug_event(point).await;
            let at = plan.l1_offset + (piece * L1_WRITE_BYTES) as u64;
            self.write_metadata(Owner::L1, at, bytes.clone()).await?;
        }
        // INV QCOW2-ORD-5
        self.file.debug_event(DebugEvent::FlushToDisk).await;
        self.file.flush().await?;
        if let Some(growth) = &plan.growth {
            self.file.debug_event(DebugEvent::L1GrowActivateTable).await;
            let crypt_method = self.header().crypt_method;
            self.write_metadata(Owner::Header, SIZE_FIELD, growth.header_bytes(crypt_method))
                .await?;
            self.file.flush().await?;
        }
        Ok(())
    }

    /// Frees for good what nobody can still be looking at.
    ///
    /// What can't be freed now because of an error stays in limbo, and is tried again by the next commit.
    async fn empty_limbo(&self) -> Result<()> {
        let ready: Vec<Freed> = {
            let meta = self.meta.lock().await;
            // INV QCOW2-ORD-4: not before all who may have looked the cluster up are done.
            let passed = |&&(stamp, _): &&(u64, Freed)| self.epochs.has_passed(stamp);
            meta.limbo.iter().take_while(passed).map(|l| l.1).collect()
        };
        if ready.is_empty() {
            return Ok(());
        }
        self.file.debug_event(DebugEvent::ClusterFree).await;
        for f in ready.iter().filter(|f| f.punch) {
            // INV QCOW2-ORD-4: the hole is punched while nobody can be given the cluster. A host that can't is no reason to fail a flush.
            let (host, bytes) = (f.cluster << self.cluster_bits, f.count << self.cluster_bits);
            if self.is_unshared(f).await?
                && self.owner_in(host, bytes).is_none()
                && let Err(e) = self.file.pdiscard(host, bytes).await
            {
                tracing::debug!("no hole at {host:#x}: {e}");
            }
        }
        let mut meta = self.meta.lock().await;
        let mut result = Ok(());
        for _ in &ready {
            if result.is_ok() {
                result = self.release_first(&mut meta).await;
            }
        }
        // Written, not synced: if the process ends here, the image has no leaks; if the power goes, it may.
        let plan = Arc::new(Plan {
            blocks: meta.refcounts.take_dirty(),
            ..Plan::default()
        });
        *self.commits.unsettled() = Some(plan.clone());
        drop(meta);
        let written = self.write_blocks(&plan.blocks).await;
        let mut meta = self.meta.lock().await;
        meta.refcounts.written(&plan.blocks, written.is_ok());
        self.commits.unsettled().take();
        result.and(written)
    }

    pub(crate) async fn write_blocks(&self, blocks: &[BlockWrite]) -> Result<()> {
        for w in blocks {
            self.file.debug_event(DebugEvent::RefblockUpdatePart).await;
            let at = w.host + w.range.start as u64;
            self.write_metadata(Owner::RefcountBlock, at, w.bytes.clone())
                .await?;
        }
        Ok(())
    }

    /// Whether the last reference of every cluster of a run is the one that goes.
    async fn is_unshared(&self, freed: &Freed) -> Result<bool> {
        let mut meta = self.meta.lock().await;
        for cluster in freed.cluster..freed.cluster + freed.count {
            if meta.refcounts.get(&self.file, cluster).await? != 1 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Rewrites fields of the header in place and makes them durable.
    ///
    /// # Errors
    /// The file's.
    pub async fn write_header_bytes(&self, at: u64, bytes: Vec<u8>) -> Result<()> {
        self.file
            .pwritev(at, IoBuf::from(bytes), WriteFlags::empty())
            .await?;
        self.file.flush().await
    }
}

#[cfg(test)]
mod tests {
    use super::joined;

    #[test]
    fn ranges_that_touch_become_one() {
        let ranges = vec![(40, 50), (0, 10), (20, 30), (10, 15), (25, 40), (60, 70)];
        assert_eq!(joined(ranges), [(0, 15), (20, 50), (60, 70)]);
        assert_eq!(joined(Vec::new()), []);
    }
}
