// SPDX-License-Identifier: MIT OR Apache-2.0
//! Changes of a whole image at one stroke: [`Overhaul`]. Called by `snapshot_ops` and `amend`.
//!
//! To take a snapshot, every refcount goes up and every `COPIED` flag goes away. Done in place, as QEMU does it, a power cut in the middle leaves refcounts
//! and flags that contradict each other. Here everything that changes is written to a *new* place: refcount blocks and table, L2 tables, L1 tables, the
//! snapshot table. What the header on disk reaches stays as it is. Then one write of one sector of the header names all that is new:
//!
//! | step | what |
//! |---|---|
//! | 1 | nothing else changes the image, commits included; all changes in memory are committed |
//! | 2 | new metadata is written to free clusters, in any order |
//! | 3 | *fdatasync* |
//! | 4 | the header (INV QCOW2-ORD-6), *fdatasync* |
//! | 5 | memory takes over what is new; what only the old tree referred to is freed as after any other change |
//!
//! So a power cut leaves the image before or the image after; of what is freed in step 5, or was written in step 2, it may leave leaks, or nothing at all.
//! An error before step 4 leaves memory and disk as they were. One in step 4 is undone by writing the old header again. If that fails too, or the runtime
//! ends in the middle, nobody knows what the disk says: both trees are whole, and so nothing is written any more until the image is opened again.

use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockcore::{BlockError, IoBuf, Result, WriteFlags};

use crate::alloc::{Freed, Meta};
use crate::amend::Steps;
use crate::format::L1E_OFFSET_MASK;
use crate::header::{Header, TREE_FIELDS};
use crate::image::{Hex, Image, Owner};
use crate::refcount::Refcounts;

/// So many bytes of changed refcount blocks are written at a time.
const SPILL_BYTES: usize = 4 << 20;

/// How far an overhaul has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The header on disk is the old one.
    Building,
    /// It is the old one or the new one.
    Switching,
    /// Memory and disk agree.
    Over,
}

/// An image that is being changed as a whole. Dropping it before [`finish`](Overhaul::finish) leaves everything as it was.
pub(crate) struct Overhaul<'a> {
    pub image: &'a Arc<Image>,
    _no_commits: tokio::sync::MutexGuard<'a, ()>,
    meta: tokio::sync::MutexGuard<'a, Meta>,
    /// What was in limbo before.
    limbo: VecDeque<(u64, Freed)>,
    /// The refcounts as the header on disk has them.
    before: Refcounts,
    /// `Meta::next_free` then.
    next_free: u64,
    /// New metadata, start and length in bytes.
    made: Vec<(u64, u64)>,
    /// What only the old tree refers to. Freed at the end.
    gone: Vec<Freed>,
    stage: Stage,
}

impl<'a> Overhaul<'a> {
    /// Begins. The caller has entered all guest clusters in `changing`, and no write in place is under way.
    ///
    /// # Errors
    /// Those of the commit, and of metadata I/O.
    pub async fn begin(image: &'a Arc<Image>) -> Result<Overhaul<'a>> {
        let mut overhaul = Overhaul::prepare(image).await?;
        overhaul.move_refcounts().await?;
        overhaul.drop_given_up().await?;
        Ok(overhaul)
    }

    async fn prepare(image: &'a Arc<Image>) -> Result<Overhaul<'a>> {
        let no_commits = image.commits.none().await;
        image.commit_now().await?;
        image.cut_ahead().await;
        let mut meta = image.meta.lock().await;
        debug_assert!(meta.dirty_slices.is_empty() && meta.dirty_l1.is_empty());
        meta.refcounts.check_places()?;
        meta.packed = None;
        let limbo = meta.limbo.clone();
        let before = meta.refcounts.clone();
        let next_free = meta.next_free;
        Ok(Overhaul {
            image,
            _no_commits: no_commits,
            meta,
            limbo,
            before,
            next_free,
            made: Vec::new(),
            gone: Vec::new(),
            stage: Stage::Building,
        })
    }

    /// As [`begin`](Overhaul::begin), and refcounts are `1 << order` bits wide from here on.
    ///
    /// # Errors
    /// As [`begin`](Overhaul::begin); `InvalidArgument` for a refcount that is too large for that width.
    pub async fn begin_with_order(
        image: &'a Arc<Image>,
        order: u32,
        steps: &Steps,
    ) -> Result<Overhaul<'a>> {
        let mut overhaul = Overhaul::prepare(image).await?;
        overhaul.recount(order, steps).await?;
        overhaul.drop_given_up().await?;
        Ok(overhaul)
    }

    /// Copies every refcount to new blocks, which lie behind all that is in use.
    async fn recount(&mut self, order: u32, steps: &Steps) -> Result<()> {
        let bits = self.image.cluster_bits;
        let mut end = self
            .image
            .file
            .length()
            .div_ceil(1 << bits)
            .max(self.meta.fresh_from);
        let cache_bytes = self.before.cache_bytes.clone();
        let mut after = Refcounts::new(order, bits, Vec::new(), 0, 0, cache_bytes);
        let mut wanted = std::collections::BTreeSet::new();
        // The steps are those of QEMU: two walks over the refcount table.
        let numbers = self.before.table().len() as u64;
        for number in 0..numbers {
            steps.tell(number, 2 * numbers);
            for cluster in self.before.counted_by(number) {
                let references = self.before.get(&self.image.file, cluster).await?;
                if references > after.max_refcount() {
                    let text = format!(
                        "Cannot decrease refcount entry width to {} bits: Cluster at offset {:#x} has a refcount of {references}",
                        1 << order,
                        cluster << bits
                    );
                    return Err(BlockError::invalid(text));
                }
                if references > 0 {
                    wanted.insert(cluster / after.block_entries());
                    end = end.max(cluster + 1);
                }
            }
        }
        // The new blocks count themselves, too.
        let first = end;
        loop {
            let needed = first / after.block_entries()
                ..=(first + wanted.len() as u64) / after.block_entries();
            let before = wanted.len();
            wanted.extend(needed);
            if wanted.len() == before {
                break;
            }
        }
        let count = wanted.len() as u64;
        for (number, place) in wanted.into_iter().zip(first..) {
            after.check_room(number)?;
            after.promise_block(number, place << bits);
        }
        self.make(first << bits, count << bits, Owner::RefcountBlock);
        self.meta.fresh_from = self.meta.fresh_from.max(first + count);
        self.meta.refcounts = after;
        for number in 0..numbers {
            steps.tell(numbers + number, 2 * numbers);
            for cluster in self.before.counted_by(number) {
                let references = self.before.get(&self.image.file, cluster).await?;
                if references > 0 {
                    self.set(cluster, references).await?;
                }
            }
            let old = self.before.table()[number as usize];
            if old != 0 {
                self.leave(old >> bits, 1, false);
            }
        }
        steps.tell(2 * numbers, 2 * numbers);
        for cluster in first..first + count {
            self.set(cluster, 1).await?;
        }
        while self.meta.refcounts.make_next_promised() {
            self.spill(SPILL_BYTES).await?;
        }
        let (offset, clusters) = (self.before.table_offset, self.before.table_clusters);
        self.leave(offset >> bits, clusters.into(), false);
        Ok(())
    }

    /// Gives every refcount block a new place, and writes it there.
    async fn move_refcounts(&mut self) -> Result<()> {
        let bits = self.image.cluster_bits;
        let (dirty, clean) = self.before.block_numbers();
        let existing: HashSet<u64> = dirty.into_iter().chain(clean).collect();
        let count = existing.len() as u64;
        if count > 0 {
            let run = self.image.alloc_run(&mut self.meta, count).await?;
            self.make(run.cluster << bits, run.count << bits, Owner::RefcountBlock);
            // The blocks that count the new places have changes already. They come first, and nothing is written before they have all moved.
            let (dirty, clean) = self.meta.refcounts.block_numbers();
            let mut places = run.cluster..;
            for (numbers, may_spill) in [(dirty, false), (clean, true)] {
                for number in numbers.into_iter().filter(|n| existing.contains(n)) {
                    let place = places.next().unwrap_or_default() << bits;
                    let (file, refcounts) = (&self.image.file, &mut self.meta.refcounts);
                    let moved = refcounts.move_block(file, number, place).await?;
                    self.leave(moved >> bits, 1, false);
                    if may_spill {
                        self.spill(SPILL_BYTES).await?;
                    }
                }
            }
        }
        let (offset, clusters) = (self.before.table_offset, self.before.table_clusters);
        self.leave(offset >> bits, clusters.into(), false);
        Ok(())
    }

    fn make(&mut self, host: u64, bytes: u64, owner: Owner) {
        self.image.own(host, bytes, owner);
        self.made.push((host, bytes));
    }

    /// Notes that clusters, each of which has one reference left, are not reached from the new tree.
    fn leave(&mut self, cluster: u64, count: u64, punch: bool) {
        let punch = punch && self.image.runtime().pass_discard_snapshot;
        match self.gone.last_mut() {
            Some(last) if last.punch == punch && last.cluster + last.count == cluster => {
                last.count += count;
            }
            _ => self.gone.push(Freed {
                cluster,
                count,
                punch,
            }),
        }
    }

    /// Writes changed refcount blocks once there are more than `bytes` bytes of them.
    async fn spill(&mut self, bytes: usize) -> Result<()> {
        if self.meta.refcounts.dirty_bytes() <= bytes {
            return Ok(());
        }
        let writes = self.meta.refcounts.take_dirty();
        let written = self.image.write_blocks(&writes).await;
        self.meta.refcounts.written(&writes, written.is_ok());
        written
    }

    /// Writes new metadata to free clusters, and returns where, in bytes. The rest of the last cluster is zero.
    ///
    /// # Errors
    /// Those of allocating and of metadata I/O.
    pub async fn write_new(&mut self, owner: Owner, mut bytes: Vec<u8>) -> Result<u64> {
        let bits = self.image.cluster_bits;
        let clusters = (bytes.len() as u64).div_ceil(1 << bits);
        let run = self.image.alloc_run(&mut self.meta, clusters).await?;
        let host = run.cluster << bits;
        self.make(host, clusters << bits, owner);
        bytes.resize((clusters << bits) as usize, 0);
        self.image.write_metadata(owner, host, bytes).await?;
        Ok(host)
    }

    /// Takes consecutive clusters for guest data.
    ///
    /// # Errors
    /// Those of allocating.
    pub async fn alloc_data(&mut self, count: u64) -> Result<Range<u64>> {
        let run = self.image.alloc_run(&mut self.meta, count).await?;
        Ok(run.cluster..run.cluster + count)
    }

    /// Notes that metadata at `offset` is not reached from the new tree, but for `table_bytes` of 0.
    pub fn leave_table(&mut self, offset: u64, table_bytes: u64) {
        let clusters = table_bytes.div_ceil(self.image.cluster_size());
        if clusters > 0 {
            self.leave(offset >> self.image.cluster_bits, clusters, false);
        }
    }

    /// The references of a cluster in the new tree, those that are [left](Overhaul::leave_table) included.
    ///
    /// # Errors
    /// Those of reading refcount blocks.
    pub async fn references(&mut self, cluster: u64) -> Result<u64> {
        self.meta.refcounts.get(&self.image.file, cluster).await
    }

    /// Takes the references away that are still counted only because somebody may be reading the cluster: those of clusters in limbo that others use,
    /// too, and that so are handed out to nobody. Else they would make `COPIED` flags wrong once they go.
    async fn drop_given_up(&mut self) -> Result<()> {
        let mut left = VecDeque::new();
        for (stamp, freed) in self.limbo.clone() {
            for cluster in freed.cluster..freed.cluster + freed.count {
                let references = self.references(cluster).await?;
                if references > 1 {
                    self.set(cluster, references - 1).await?;
                    continue;
                }
                let count = 1;
                left.push_back((
                    stamp,
                    Freed {
                        cluster,
                        count,
                        ..freed
                    },
                ));
            }
        }
        self.meta.limbo = left;
        Ok(())
    }

    /// One more reference to a cluster that is in use.
    ///
    /// # Errors
    /// `InvalidArgument` where that doesn't fit into the refcount; `Corrupt` for a cluster that is counted free.
    pub async fn refer(&mut self, cluster: u64) -> Result<()> {
        let references = self.references(cluster).await?;
        if references == 0 {
            return Err(self.uncounted(cluster));
        }
        if references >= self.meta.refcounts.max_refcount() {
            // Said as QEMU says it, for scripts.
            return Err(BlockError::from_errno(libc::EINVAL));
        }
        self.set(cluster, references + 1).await
    }

    /// One reference to a cluster less. One that loses its last keeps it until the new tree is in place.
    ///
    /// # Errors
    /// `Corrupt` for a cluster that is counted free; those of metadata I/O.
    pub async fn unrefer(&mut self, cluster: u64, punch: bool) -> Result<()> {
        match self.references(cluster).await? {
            0 => Err(self.uncounted(cluster)),
            1 => {
                self.leave(cluster, 1, punch);
                Ok(())
            }
            references => self.set(cluster, references - 1).await,
        }
    }

    async fn set(&mut self, cluster: u64, references: u64) -> Result<()> {
        let file = &self.image.file;
        self.meta.refcounts.set(file, cluster, references).await?;
        self.spill(SPILL_BYTES).await
    }

    fn uncounted(&self, cluster: u64) -> BlockError {
        let host = cluster << self.image.cluster_bits;
        let text = format!("Cluster at offset {host:#x} is in use, but its refcount is 0");
        BlockError::corrupt(text).at(host)
    }

    /// The L2 table that an L1 entry names.
    ///
    /// # Errors
    /// `Corrupt` for an impossible place; those of the file.
    pub async fn l2_table(&self, l1_entry: u64) -> Result<Vec<u64>> {
        let cluster = self.image.cluster_size();
        let table = l1_entry & L1E_OFFSET_MASK;
        if table & (cluster - 1) != 0 {
            let text = format!("L2 table offset {} unaligned", Hex(table));
            return Err(BlockError::corrupt(text).at(table));
        }
        self.image.read_words(table, cluster as usize).await
    }

    /// Puts the new tree in place of the old one. `header` is what the header says then, but for the refcount table; `l1` is the active L1 table.
    ///
    /// # Errors
    /// Those of metadata I/O. The image is as it was then, or can't be used any more.
    pub async fn finish(mut self, mut header: Header, l1: Vec<u64>) -> Result<()> {
        let table = self.place_table().await?;
        header.refcount_table_offset = self.meta.refcounts.table_offset;
        header.refcount_table_clusters = self.meta.refcounts.table_clusters;
        self.spill(0).await?;
        let (offset, owner) = (header.refcount_table_offset, Owner::RefcountTable);
        self.image.write_metadata(owner, offset, table).await?;
        // INV QCOW2-ORD-6: all that the header names below is durable before.
        self.image.file.flush().await?;
        self.switch(&header).await?;
        self.adopt(header, l1).await;
        Ok(())
    }

    /// Finds a place for the refcount table, and returns what is to be written there.
    async fn place_table(&mut self) -> Result<Vec<u8>> {
        let bits = self.image.cluster_bits;
        // Counting the new table's own clusters may need further blocks, and so a longer table.
        let run = loop {
            let clusters = (self.meta.refcounts.table().len() as u64 * 8).div_ceil(1 << bits);
            let run = self.image.alloc_run(&mut self.meta, clusters).await?;
            if self.meta.refcounts.table().len() as u64 * 8 <= clusters << bits {
                break run;
            }
            self.image.unalloc_run(&mut self.meta, run).await?;
        };
        let (host, bytes) = (run.cluster << bits, run.count << bits);
        self.make(host, bytes, Owner::RefcountTable);
        let refcounts = &mut self.meta.refcounts;
        (refcounts.table_offset, refcounts.table_clusters) = (host, run.count as u32);
        refcounts.dirty_entries.clear();
        let entries = refcounts.table().iter();
        let mut table: Vec<u8> = entries.flat_map(|e| e.to_be_bytes()).collect();
        table.resize(bytes as usize, 0);
        Ok(table)
    }

    /// INV QCOW2-ORD-6: one write of one sector.
    async fn switch(&mut self, header: &Header) -> Result<()> {
        let old = self.image.header().tree_fields();
        self.stage = Stage::Switching;
        let Err(e) = self.write_fields(header.tree_fields()).await else {
            return Ok(());
        };
        if self.write_fields(old).await.is_ok() {
            self.stage = Stage::Building;
        }
        Err(e)
    }

    async fn write_fields(&self, fields: Vec<u8>) -> Result<()> {
        let file = &self.image.file;
        file.pwritev(TREE_FIELDS, IoBuf::from(fields), WriteFlags::empty())
            .await?;
        file.flush().await
    }

    async fn adopt(mut self, header: Header, l1: Vec<u64>) {
        self.own_tables(&l1);
        self.image.l1.replace(l1);
        self.meta.l1_offset = header.l1_table_offset;
        self.image.size.store(header.size, Ordering::Release);
        *self.image.header() = header;
        let gone = std::mem::take(&mut self.gone);
        self.meta.freed.extend(gone);
        // A slice that was read from an old table must not say `COPIED` of what is shared now. If the runtime ends here, nothing is written any more.
        self.image.l2.clear().await;
        self.stage = Stage::Over;
    }
}

impl Overhaul<'_> {
    /// INV QCOW2-META-1: L2 tables that only a snapshot named so far, and that nobody knew as such, are the active layer's now.
    fn own_tables(&self, l1: &[u64]) {
        let cluster = self.image.cluster_size();
        for table in l1.iter().map(|entry| entry & L1E_OFFSET_MASK) {
            let owner = self.image.owner_in(table, cluster);
            if table != 0 && matches!(owner, None | Some(Owner::InactiveL2)) {
                self.image.disown(table >> self.image.cluster_bits);
                self.image.own(table, cluster, Owner::L2);
            }
        }
    }
}

impl Drop for Overhaul<'_> {
    fn drop(&mut self) {
        match self.stage {
            Stage::Over => return,
            Stage::Building => {}
            Stage::Switching => self.image.uncertain.store(true, Ordering::Release),
        }
        let bits = self.image.cluster_bits;
        let made = self.made.iter();
        let mut unused: Vec<u64> = made
            .flat_map(|&(at, n)| at >> bits..(at + n) >> bits)
            .collect();
        // Blocks that had to be added on the way.
        let old = self.before.table();
        let added = self.meta.refcounts.table().iter().enumerate();
        unused.extend(
            added
                .filter(|(i, e)| **e != 0 && old.get(*i) != Some(e))
                .map(|(_, e)| e >> bits),
        );
        for cluster in unused {
            self.image.disown(cluster);
        }
        self.meta.limbo = std::mem::take(&mut self.limbo);
        std::mem::swap(&mut self.meta.refcounts, &mut self.before);
        // What was taken is free again.
        self.meta.next_free = self.meta.next_free.min(self.next_free);
        self.meta.packed = None;
    }
}
