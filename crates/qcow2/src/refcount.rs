// SPDX-License-Identifier: MIT OR Apache-2.0
//! Refcounts: the table in memory, and a cache of refcount blocks.
//!
//! Part of the metadata (`alloc::Meta`), so everything here is behind the metadata lock. Changes stay in memory until `commit` writes them, in the
//! order of docs/INVARIANTS.md. A block that has changes, or whose changes are being written, is not evicted.

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use blockcore::{BlockError, Child, DebugEvent, ErrorKind, IoBufMut, ReadFlags, Result};

use crate::format::{MAX_REFCOUNT_TABLE_BYTES, REFT_OFFSET_MASK};
use crate::l2_cache::NumberMap;

/// The granularity in which changes of a block are written, in bytes.
const WRITE_GRAIN_BYTES: usize = 512;

/// One refcount block, as on disk.
#[derive(Clone, Debug)]
struct Block {
    bytes: Vec<u8>,
    /// What was changed since it was last handed to a write-back.
    dirty: Option<Range<usize>>,
    /// A write-back of it is under way.
    writing: bool,
    last_use: u64,
}

impl Block {
    /// Notes that bytes have changed, and says whether they are the first.
    fn touch(&mut self, bytes: Range<usize>) -> bool {
        let before = self.dirty.take();
        let is_first = before.is_none();
        self.dirty = Some(match before {
            None => bytes,
            Some(d) => d.start.min(bytes.start)..d.end.max(bytes.end),
        });
        is_first
    }
}

/// A piece of a refcount block that is to be written.
#[derive(Debug)]
pub(crate) struct BlockWrite {
    pub block: u64,
    pub host: u64,
    pub range: Range<usize>,
    pub bytes: Vec<u8>,
}

/// The refcount table and the blocks in memory.
#[derive(Clone, Debug)]
pub(crate) struct Refcounts {
    order: u32,
    cluster_bits: u32,
    /// Host offsets of the blocks; 0: none, all its refcounts are 0. May be longer than what is on disk until `needs_move` is dealt with.
    table: Vec<u64>,
    /// Where the table lies.
    pub table_offset: u64,
    /// How many clusters it has there.
    pub table_clusters: u32,
    /// Entries that are not on disk yet.
    pub dirty_entries: BTreeSet<usize>,
    blocks: NumberMap<Block>,
    /// How many of `blocks` have changes.
    dirty_blocks: usize,
    /// Blocks that have a place and count nothing yet, neither in memory nor on disk.
    promised: BTreeSet<u64>,
    clock: u64,
    /// What `clock` was at the last cleaning.
    cleaned_at: u64,
    /// What is kept beside changed blocks, in bytes; at least four blocks. It may change at any time.
    pub cache_bytes: Arc<AtomicUsize>,
}

impl Refcounts {
    /// Over a table that was read from `table_offset`.
    pub fn new(
        order: u32,
        cluster_bits: u32,
        table: Vec<u64>,
        table_offset: u64,
        table_clusters: u32,
        cache_bytes: Arc<AtomicUsize>,
    ) -> Refcounts {
        Refcounts {
            order,
            cluster_bits,
            table: table.into_iter().map(|e| e & REFT_OFFSET_MASK).collect(),
            table_offset,
            table_clusters,
            dirty_entries: BTreeSet::new(),
            blocks: NumberMap::default(),
            dirty_blocks: 0,
            promised: BTreeSet::new(),
            clock: 0,
            cleaned_at: 0,
            cache_bytes,
        }
    }

    /// The largest refcount that fits.
    pub fn max_refcount(&self) -> u64 {
        if self.order == 6 {
            u64::MAX
        } else {
            (1 << (1 << self.order)) - 1
        }
    }

    /// Refcounts in a block.
    pub fn block_entries(&self) -> u64 {
        1 << (self.cluster_bits + 3 - self.order)
    }

    /// The table, for checks and for writing it.
    pub fn table(&self) -> &[u64] {
        &self.table
    }

    /// The numbers of the blocks that have changes, and of the others.
    pub fn block_numbers(&self) -> (Vec<u64>, Vec<u64>) {
        let is_dirty = |n: &u64| self.blocks.get(n).is_some_and(|b| b.dirty.is_some());
        let there = (0..self.table.len() as u64).filter(|&n| self.table[n as usize] != 0);
        there.partition(is_dirty)
    }

    /// The clusters that a block counts; none where there is no such block.
    pub fn counted_by(&self, number: u64) -> std::ops::Range<u64> {
        let entries = self.block_entries();
        match self.table[number as usize] {
            0 => 0..0,
            _ => number * entries..(number + 1) * entries,
        }
    }

    /// Whether each block has a place of its own. One that the table names again and again would be copied as often.
    ///
    /// # Errors
    /// `Corrupt` if not.
    pub fn check_places(&self) -> Result<()> {
        let mut places = HashSet::new();
        let all = self.table.iter().filter(|&&place| place != 0);
        match all.copied().find(|&place| !places.insert(place)) {
            None => Ok(()),
            Some(place) => {
                let text = format!("The refcount table names the block at {place:#x} twice");
                Err(BlockError::corrupt(text))
            }
        }
    }

    /// The numbers of all blocks there are.
    pub fn existing_blocks(&self) -> Vec<u64> {
        let all = 0..self.table.len() as u64;
        all.filter(|&n| self.table[n as usize] != 0).collect()
    }

    /// Whether a block counts nothing, but perhaps the cluster `own`: then, whether it does.
    ///
    /// # Errors
    /// As [`get`](Refcounts::get).
    pub async fn is_empty_but(
        &mut self,
        file: &Child,
        number: u64,
        own: u64,
    ) -> Result<Option<bool>> {
        let (order, entries) = (self.order, self.block_entries());
        let block = self.block(file, number).await?;
        let mut counts_itself = false;
        for index in 0..entries {
            if get_refcount(&block.bytes, order, index) == 0 {
                continue;
            }
            if number * entries + index != own {
                return Ok(None);
            }
            counts_itself = true;
        }
        Ok(Some(counts_itself))
    }

    /// Takes a block out of the table, from which it is gone on disk.
    pub fn drop_block(&mut self, number: u64) {
        let gone = self.blocks.remove(&number);
        self.dirty_blocks -= usize::from(gone.is_some_and(|b| b.dirty.is_some()));
        self.promised.remove(&number);
        self.table[number as usize] = 0;
        self.dirty_entries.remove(&(number as usize));
    }

    /// Gives a block another place, where all of it is still to be written, and returns the old one.
    ///
    /// # Errors
    /// As [`get`](Refcounts::get).
    pub async fn move_block(&mut self, file: &Child, number: u64, host: u64) -> Result<u64> {
        let block = self.block(file, number).await?;
        let is_first = block.touch(0..block.bytes.len());
        self.dirty_blocks += usize::from(is_first);
        Ok(std::mem::replace(&mut self.table[number as usize], host))
    }

    /// Bytes of blocks that have changes.
    pub fn dirty_bytes(&self) -> usize {
        self.dirty_blocks << self.cluster_bits
    }

    /// Whether the table has outgrown its place on disk.
    pub fn needs_move(&self) -> bool {
        self.table.len() as u64 * 8 > u64::from(self.table_clusters) << self.cluster_bits
    }

    /// Whether there is a block for a host cluster.
    pub fn has_block(&self, cluster: u64) -> bool {
        let block = cluster / self.block_entries();
        self.table.get(block as usize).is_some_and(|&o| o != 0)
    }

    /// The refcount of a host cluster.
    ///
    /// # Errors
    /// Those of reading the block; `Corrupt` for a block at an impossible place.
    pub async fn get(&mut self, file: &Child, cluster: u64) -> Result<u64> {
        let entries = self.block_entries();
        let (number, index) = (cluster / entries, cluster % entries);
        if !self.has_block(cluster) {
            return Ok(0);
        }
        let order = self.order;
        let block = self.block(file, number).await?;
        Ok(get_refcount(&block.bytes, order, index))
    }

    /// Sets the refcount of a host cluster, whose block is there.
    ///
    /// # Errors
    /// As [`get`](Refcounts::get).
    pub async fn set(&mut self, file: &Child, cluster: u64, refcount: u64) -> Result<()> {
        debug_assert!(refcount <= self.max_refcount());
        let entries = self.block_entries();
        let (number, index) = (cluster / entries, cluster % entries);
        let order = self.order;
        let block = self.block(file, number).await?;
        set_refcount(&mut block.bytes, order, index, refcount);
        let at = ((index << order) / 8) as usize;
        let grain = at / WRITE_GRAIN_BYTES * WRITE_GRAIN_BYTES;
        let is_first = block.touch(grain..grain + WRITE_GRAIN_BYTES);
        self.dirty_blocks += usize::from(is_first);
        Ok(())
    }

    /// Whether the table can be made long enough for block `number`.
    ///
    /// # Errors
    /// `NoSpace` if it would outgrow the format's limit.
    pub fn check_room(&self, number: u64) -> Result<()> {
        if (number + 1) * 8 > MAX_REFCOUNT_TABLE_BYTES {
            let text = "The refcount table of the image can't grow further";
            return Err(BlockError::new(ErrorKind::NoSpace, text).errno_is(libc::EFBIG));
        }
        Ok(())
    }

    /// Makes the (missing) block `number`, for which [there is room](Refcounts::check_room), one that lies at `host`, with no references yet.
    pub fn add_block(&mut self, number: u64, host: u64) {
        self.promise_block(number, host);
        self.make_promised(number);
    }

    /// As [`add_block`](Refcounts::add_block), but the block takes no memory before it is used.
    pub fn promise_block(&mut self, number: u64, host: u64) {
        let index = number as usize;
        if index >= self.table.len() {
            // Half as much again, so that growing stays rare.
            let wanted = (index + 1).max(self.table.len() * 3 / 2);
            let per_cluster = (1 << self.cluster_bits) / 8;
            let max = (MAX_REFCOUNT_TABLE_BYTES / 8) as usize;
            self.table.resize(
                wanted.next_multiple_of(per_cluster).min(max.max(index + 1)),
                0,
            );
        }
        debug_assert_eq!(self.table[index], 0);
        self.table[index] = host;
        self.dirty_entries.insert(index);
        self.promised.insert(number);
    }

    /// Makes one of the promised blocks that nobody has used yet, so that it is written. Says whether there was one.
    pub fn make_next_promised(&mut self) -> bool {
        let first = self.promised.first().copied();
        first.is_some_and(|number| self.make_promised(number))
    }

    fn make_promised(&mut self, number: u64) -> bool {
        if !self.promised.remove(&number) {
            return false;
        }
        let bytes = vec![0; 1 << self.cluster_bits];
        let dirty = Some(0..bytes.len());
        self.dirty_blocks += 1;
        self.clock += 1;
        self.evict();
        self.blocks.insert(
            number,
            Block {
                bytes,
                dirty,
                writing: false,
                last_use: self.clock,
            },
        );
        true
    }

    async fn block(&mut self, file: &Child, number: u64) -> Result<&mut Block> {
        self.clock += 1;
        let clock = self.clock;
        if !self.blocks.contains_key(&number) && !self.make_promised(number) {
            let host = self.table.get(number as usize).copied().unwrap_or(0);
            if host == 0 || host & ((1 << self.cluster_bits) - 1) != 0 {
                let text =
                    format!("Refblock offset {host:#x} unaligned (reftable index: {number:#x})");
                return Err(BlockError::corrupt(text));
            }
            file.debug_event(DebugEvent::RefblockLoad).await;
            let buf = IoBufMut::zeroed(1 << self.cluster_bits);
            let bytes = file.preadv(host, buf, ReadFlags::empty()).await?.to_vec();
            self.evict();
            self.blocks.insert(
                number,
                Block {
                    bytes,
                    dirty: None,
                    writing: false,
                    last_use: clock,
                },
            );
        }
        let block = self
            .blocks
            .get_mut(&number)
            .expect("it was there, or has just been put there");
        block.last_use = clock;
        Ok(block)
    }

    /// Forgets the blocks without changes that nobody has used since the last time, and says how many are left.
    pub fn clean(&mut self) -> usize {
        let cleaned_at = std::mem::replace(&mut self.cleaned_at, self.clock);
        self.blocks
            .retain(|_, b| b.dirty.is_some() || b.writing || b.last_use > cleaned_at);
        self.blocks.shrink_to_fit();
        self.blocks.len()
    }

    /// How many blocks are in memory.
    #[cfg(test)]
    pub fn cached(&self) -> usize {
        self.blocks.len()
    }

    fn evict(&mut self) {
        let bytes = self.cache_bytes.load(Ordering::Relaxed);
        let capacity = (bytes >> self.cluster_bits).max(4);
        while self.blocks.len() >= capacity {
            let idle = self
                .blocks
                .iter()
                .filter(|(_, b)| b.dirty.is_none() && !b.writing);
            let Some(oldest) = idle.min_by_key(|(_, b)| b.last_use).map(|(&n, _)| n) else {
                return;
            };
            self.blocks.remove(&oldest);
        }
    }

    /// The bytes of changed table entries, by host offset, in rounds: what a round writes has to be durable before the next one begins.
    ///
    /// A new block may be counted in another new block. The entry of the one that counts comes first: else a power cut leaves a block in use that is
    /// counted nowhere (INV QCOW2-ORD-1). Neighbours are written as one.
    pub fn table_rounds(&self, entries: &[usize]) -> Vec<Vec<(u64, Vec<u8>)>> {
        let mut left: BTreeSet<usize> = entries.iter().copied().collect();
        let counted_in = |i: usize| (self.table[i] >> self.cluster_bits) / self.block_entries();
        let mut rounds = Vec::new();
        while !left.is_empty() {
            let waits = |&i: &usize| {
                let by = counted_in(i) as usize;
                by != i && left.contains(&by)
            };
            let (later, mut now): (BTreeSet<_>, BTreeSet<_>) = left.iter().partition(|i| waits(i));
            left = later;
            if now.is_empty() {
                // Blocks that count each other in a circle. Allocation makes none, so they come from a damaged table; nothing is lost by their order.
                now = std::mem::take(&mut left);
            }
            let mut writes: Vec<(u64, Vec<u8>)> = Vec::new();
            for i in now {
                let at = self.table_offset + i as u64 * 8;
                let bytes = self.table[i].to_be_bytes();
                match writes.last_mut() {
                    Some((start, all)) if *start + all.len() as u64 == at => all.extend(bytes),
                    _ => writes.push((at, bytes.to_vec())),
                }
            }
            rounds.push(writes);
        }
        rounds
    }

    /// Takes a copy of everything that is to be written. The blocks stay in memory until [`written`](Refcounts::written).
    pub fn take_dirty(&mut self) -> Vec<BlockWrite> {
        let mut writes = Vec::new();
        for (&number, block) in &mut self.blocks {
            if let Some(range) = block.dirty.take() {
                self.dirty_blocks -= 1;
                block.writing = true;
                let bytes = block.bytes[range.clone()].to_vec();
                writes.push(BlockWrite {
                    block: number,
                    host: self.table[number as usize],
                    range,
                    bytes,
                });
            }
        }
        writes.sort_by_key(|w| w.host);
        writes
    }

    /// What [`take_dirty`](Refcounts::take_dirty) gave has been written, or has to be written again.
    pub fn written(&mut self, writes: &[BlockWrite], ok: bool) {
        for w in writes {
            if let Some(block) = self.blocks.get_mut(&w.block) {
                block.writing = false;
                if !ok {
                    self.dirty_blocks += usize::from(block.touch(w.range.clone()));
                }
            }
        }
    }
}

/// A refcount of `1 << order` bits out of a block. The specification counts narrow ones from the least significant bit.
pub(crate) fn get_refcount(block: &[u8], order: u32, index: u64) -> u64 {
    let at = ((index << order) / 8) as usize;
    match order {
        0..=2 => {
            let bits = 1 << order;
            let shift = (index << order) % 8;
            u64::from(block[at] >> shift) & ((1 << bits) - 1)
        }
        _ => {
            let bytes = 1 << (order - 3);
            block[at..at + bytes]
                .iter()
                .fold(0, |n, &b| n << 8 | u64::from(b))
        }
    }
}

/// Changes a refcount in a block.
pub(crate) fn set_refcount(block: &mut [u8], order: u32, index: u64, refcount: u64) {
    let at = ((index << order) / 8) as usize;
    match order {
        0..=2 => {
            let mask = ((1u16 << (1 << order)) - 1) as u8;
            let shift = (index << order) % 8;
            block[at] = block[at] & !(mask << shift) | (refcount as u8 & mask) << shift;
        }
        _ => {
            let bytes = 1 << (order - 3);
            block[at..at + bytes].copy_from_slice(&refcount.to_be_bytes()[8 - bytes..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use blockcore::testing::MemoryDriver;
    use blockcore::{ChildRole, NodeFlags};

    use super::*;

    #[test]
    fn refcounts_of_every_width_are_kept_apart() {
        for order in 0..=6 {
            let mut block = vec![0; 512];
            let entries = (512 * 8) >> order;
            let max = if order == 6 {
                u64::MAX
            } else {
                (1u64 << (1 << order)) - 1
            };
            let value = |i: u64| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 3) & max;
            for i in 0..entries {
                set_refcount(&mut block, order, i, value(i));
            }
            for i in 0..entries {
                assert_eq!(
                    get_refcount(&block, order, i),
                    value(i),
                    "order {order} index {i}"
                );
            }
        }
    }

    #[tokio::test]
    async fn a_promised_block_takes_no_memory_before_it_is_used() {
        let disk = MemoryDriver::new(vec![0xff; 8192]);
        let node = disk.into_node(NodeFlags::default()).await.unwrap();
        let file = Child::new("file", ChildRole::File, node);
        let mut refcounts = Refcounts::new(4, 9, vec![0; 4], 0, 1, Arc::default());
        for number in 0..4 {
            refcounts.promise_block(number, 512 * (number + 1));
        }
        assert_eq!(refcounts.dirty_bytes(), 0);
        refcounts.set(&file, 300, 7).await.unwrap();
        assert_eq!(refcounts.get(&file, 300).await.unwrap(), 7);
        assert_eq!(refcounts.get(&file, 301).await.unwrap(), 0);
        assert_eq!(refcounts.dirty_bytes(), 512);
        while refcounts.make_next_promised() {}
        let written = refcounts.take_dirty();
        assert_eq!(written.len(), 4);
        assert!(written.iter().all(|w| w.range == (0..512)));
    }

    #[tokio::test]
    async fn promised_blocks_that_are_written_leave_the_memory() {
        let disk = MemoryDriver::new(vec![0xff; 512 * 65]);
        let node = disk.into_node(NodeFlags::default()).await.unwrap();
        let file = Child::new("file", ChildRole::File, node);
        let mut refcounts = Refcounts::new(4, 9, vec![0; 64], 0, 1, Arc::default());
        for number in 0..64 {
            refcounts.promise_block(number, 512 * (number + 1));
        }
        for number in 0..64 {
            refcounts.set(&file, number * 256, 1).await.unwrap();
            let writes = refcounts.take_dirty();
            refcounts.written(&writes, true);
            assert!(refcounts.cached() <= 4, "{}", refcounts.cached());
            assert_eq!(refcounts.dirty_bytes(), 0);
        }
    }

    #[test]
    fn the_byte_order_is_that_of_the_specification() {
        let mut block = vec![0; 16];
        set_refcount(&mut block, 0, 1, 1);
        set_refcount(&mut block, 2, 3, 0xa);
        set_refcount(&mut block, 4, 2, 0x1234);
        assert_eq!(block[..6], [0b10, 0xa0, 0, 0, 0x12, 0x34]);
    }
}
