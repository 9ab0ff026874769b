// SPDX-License-Identifier: MIT OR Apache-2.0
//! `check`: counts who refers to each host cluster, and compares that with the refcounts.
//!
//! Works on the file alone; the driver writes back what it has in memory first. Memory is one counter per cluster of the file that is in use, and some
//! around it. The messages are those of QEMU's check, line by line, since people and scripts read them.

use blockcore::{
    BlockError, CheckFix, CheckResult, Child, IoBufMut, ReadFlags, Result, SECTOR_BYTES,
};

use crate::format::{
    CompressedDescriptor, L1E_OFFSET_MASK, L2E_OFFSET_MASK, OFLAG_COMPRESSED, OFLAG_COPIED,
    OFLAG_ZERO, REFT_OFFSET_MASK,
};
use crate::header::Header;
use crate::image::Hex;
use crate::refcount::get_refcount;
use crate::snapshot::{self, SnapshotTable};

/// Bits of an L1 entry that have no meaning.
const L1E_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Bits of an uncompressed L2 entry that have no meaning.
const L2E_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Bits of a refcount table entry that have no meaning.
const REFT_RESERVED: u64 = 0x1ff;
/// The most clusters that a check counts: a gigabyte of counters, if all of them are in use.
const CLUSTERS_MAX: u64 = 1 << 28;
/// The most lines that a check says: a damaged image must not fill the memory with them.
const MESSAGES_MAX: usize = 100_000;

/// What is said below a reference that does not fit into the refcount.
const OVERFLOW_HINT: &str = "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy if the image \
    cannot be opened for writing";

/// How many counters are made at a time. Few, so that forged entries which point far apart don't make many.
const PAGE_COUNTERS: u64 = 128;

/// How often each host cluster is referred to, up to the end of the file. Holes, which a file of a few bytes may have any number of, take up next to
/// nothing.
#[derive(Debug)]
pub struct RefcountMap {
    pages: Vec<Option<Box<[u32]>>>,
    len: u64,
}

impl RefcountMap {
    fn new(len: u64) -> RefcountMap {
        let mut map = RefcountMap {
            pages: Vec::new(),
            len: 0,
        };
        map.grow(len);
        map
    }

    /// The number of clusters of the file.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.len
    }

    fn grow(&mut self, len: u64) {
        self.len = self.len.max(len);
        let pages = self.len.div_ceil(PAGE_COUNTERS) as usize;
        self.pages.resize_with(pages, || None);
    }

    fn page(&self, cluster: u64) -> Option<&[u32]> {
        self.pages
            .get((cluster / PAGE_COUNTERS) as usize)?
            .as_deref()
    }

    /// The references of a cluster; 0 past the end of the file.
    pub fn get(&self, cluster: u64) -> u64 {
        self.page(cluster)
            .map_or(0, |page| page[(cluster % PAGE_COUNTERS) as usize])
            .into()
    }

    /// The counter of a cluster; `None` past the end of the file.
    fn counter(&mut self, cluster: u64) -> Option<&mut u32> {
        if cluster >= self.len {
            return None;
        }
        let page = self.pages[(cluster / PAGE_COUNTERS) as usize]
            .get_or_insert_with(|| vec![0; PAGE_COUNTERS as usize].into());
        Some(&mut page[(cluster % PAGE_COUNTERS) as usize])
    }
}

/// Checks an image.
///
/// # Errors
/// `Unsupported` for repairs; those of the file where the check can't go on at all. What is wrong with the image is in the result.
pub async fn check(header: &Header, file: &Child, fix: CheckFix) -> Result<CheckResult> {
    if fix != CheckFix::None {
        return Err(BlockError::unsupported(
            "Repairing qcow2 images is not supported yet",
        ));
    }
    let mut checker = Checker::new(header, file)?;
    checker.count_references().await?;
    checker.compare().await?;
    checker.check_copied(Counted::OnDisk).await?;
    Ok(checker.result)
}

/// Counts all references of an image, as `check` does; for repairs. An entry that says `COPIED` of a cluster with several references is a corruption of
/// the result, whatever the refcounts on disk say.
///
/// # Errors
/// As [`check`].
pub async fn compute_refcounts(
    header: &Header,
    file: &Child,
) -> Result<(RefcountMap, CheckResult)> {
    let mut checker = Checker::new(header, file)?;
    checker.count_references().await?;
    checker.check_copied(Counted::ByThis).await?;
    Ok((checker.map, checker.result))
}

/// Whose count `COPIED` is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counted {
    /// The refcounts on disk.
    OnDisk,
    /// What this check has counted. Then a missing flag is no fault: it costs a copy, and no data.
    ByThis,
}

/// The largest refcount of a width that a counter here can reach.
fn max_refcount(order: u32) -> u64 {
    match order {
        0..=4 => (1 << (1 << order)) - 1,
        _ => u32::MAX.into(),
    }
}

struct Checker<'a> {
    header: &'a Header,
    file: &'a Child,
    cluster: u64,
    map: RefcountMap,
    table: Vec<u64>,
    l1: Vec<u64>,
    /// The refcount block that was read last.
    block: Option<(u64, Vec<u8>)>,
    /// A refcount block at an impossible place was met, and said.
    block_said: bool,
    result: CheckResult,
}

impl<'a> Checker<'a> {
    fn new(header: &'a Header, file: &'a Child) -> Result<Checker<'a>> {
        let cluster = 1u64 << header.cluster_bits;
        let clusters = file.length().div_ceil(cluster);
        if clusters > CLUSTERS_MAX {
            return Err(BlockError::unsupported(format!(
                "A file of {clusters} clusters is too long to be checked"
            )));
        }
        Ok(Checker {
            header,
            file,
            cluster,
            map: RefcountMap::new(clusters),
            table: Vec::new(),
            l1: Vec::new(),
            block: None,
            block_said: false,
            result: CheckResult {
                total_clusters: (header.size / SECTOR_BYTES * SECTOR_BYTES).div_ceil(cluster),
                ..CheckResult::default()
            },
        })
    }

    fn say(&mut self, line: String) {
        match self.result.messages.len() {
            n if n < MESSAGES_MAX => self.result.messages.push(line),
            MESSAGES_MAX => self
                .result
                .messages
                .push("(further messages are left out)".to_owned()),
            _ => {}
        }
    }

    fn corruption(&mut self, line: String) {
        self.result.corruptions += 1;
        self.say(line);
    }

    async fn words(&self, offset: u64, count: u64) -> Result<Vec<u64>> {
        let buf = IoBufMut::zeroed(count as usize * 8);
        let bytes = self
            .file
            .preadv(offset, buf, ReadFlags::empty())
            .await?
            .to_vec();
        Ok(bytes
            .chunks_exact(8)
            .map(|c| u64::from_be_bytes(c.try_into().expect("eight bytes")))
            .collect())
    }

    /// The entries of an L2 table, of those that have two words the first.
    async fn l2_entries(&self, table: u64) -> Result<Vec<u64>> {
        let words = self.words(table, self.cluster / 8).await?;
        let entry_words = 1 + usize::from(self.header.has_extended_l2());
        Ok(words.into_iter().step_by(entry_words).collect())
    }

    /// One more reference to each cluster that a range touches.
    fn count(&mut self, offset: u64, bytes: u64) {
        if bytes == 0 {
            return;
        }
        let end = offset.saturating_add(bytes);
        if end >= self.file.length() + self.cluster {
            return self.corruption(format!(
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more: \
                 offset {offset:#x} size {bytes:#x}"
            ));
        }
        // The last cluster of a file may be there in part, or not at all yet.
        let clusters = end.div_ceil(self.cluster);
        self.map.grow(clusters);
        let max = max_refcount(self.header.refcount_order);
        for cluster in offset / self.cluster..clusters {
            match self.map.counter(cluster) {
                Some(n) if u64::from(*n) < max => *n += 1,
                Some(_) => {
                    self.corruption(format!(
                        "ERROR: overflow cluster offset={:#x}",
                        cluster * self.cluster
                    ));
                    self.say(OVERFLOW_HINT.to_owned());
                }
                None => {}
            }
        }
    }

    async fn count_references(&mut self) -> Result<()> {
        let header = self.header;
        let snapshots = self.read_snapshots().await?;
        self.count(0, self.cluster);
        self.l1 = self
            .words(header.l1_table_offset, header.l1_size.into())
            .await?;
        let l1 = self.l1.clone();
        self.count_l1(header.l1_table_offset, &l1, true).await?;
        self.count_snapshots(&snapshots).await?;
        self.table = self
            .words(
                header.refcount_table_offset,
                u64::from(header.refcount_table_clusters) << (header.cluster_bits - 3),
            )
            .await?;
        self.count(
            header.refcount_table_offset,
            u64::from(header.refcount_table_clusters) * self.cluster,
        );
        self.count_blocks();
        Ok(())
    }

    async fn read_snapshots(&mut self) -> Result<SnapshotTable> {
        let table = snapshot::read_entries(self.header, self.file)
            .await
            .map_err(|e| e.context("ERROR failed to read the snapshot table"))?;
        for (i, _) in (table.snapshots.iter().enumerate()).filter(|(_, s)| !s.is_complete) {
            self.corruption(format!("ERROR snapshot table entry {i} is incomplete"));
        }
        Ok(table)
    }

    async fn count_snapshots(&mut self, table: &SnapshotTable) -> Result<()> {
        for s in &table.snapshots {
            if let Some(fault) = s.l1_fault(self.cluster) {
                self.corruption(format!("ERROR {fault}"));
                continue;
            }
            let l1 = self.words(s.l1_table_offset, s.l1_size.into()).await?;
            self.count_l1(s.l1_table_offset, &l1, false).await?;
        }
        self.count(self.header.snapshots_offset, table.bytes);
        Ok(())
    }

    fn count_blocks(&mut self) {
        for i in 0..self.table.len() {
            let entry = self.table[i];
            let offset = entry & REFT_OFFSET_MASK;
            if entry & REFT_RESERVED != 0 {
                self.corruption(format!(
                    "ERROR refcount table entry {i} has reserved bits set"
                ));
                continue;
            }
            if offset & (self.cluster - 1) != 0 {
                let line = format!(
                    "ERROR refcount block {i} is not cluster aligned; refcount table entry corrupted"
                );
                self.corruption(line);
            } else if offset / self.cluster >= self.map.len() {
                self.corruption(format!("ERROR refcount block {i} is outside image"));
            } else if offset != 0 {
                self.count(offset, self.cluster);
                let references = self.map.get(offset / self.cluster);
                if references != 1 {
                    self.corruption(format!("ERROR refcount block {i} refcount={references}"));
                }
            }
        }
    }

    async fn count_l1(&mut self, offset: u64, l1: &[u64], active: bool) -> Result<()> {
        self.count(offset, l1.len() as u64 * 8);
        for &entry in l1 {
            if entry == 0 {
                continue;
            }
            if entry & L1E_RESERVED != 0 {
                self.corruption(format!(
                    "ERROR found L1 entry with reserved bits set: {entry:x}"
                ));
            }
            let table = entry & L1E_OFFSET_MASK;
            self.count(table, self.cluster);
            if table & (self.cluster - 1) != 0 {
                self.corruption(format!(
                    "ERROR l2_offset={table:x}: Table is not cluster aligned; L1 entry corrupted"
                ));
            }
            self.count_l2(table, active).await?;
        }
        Ok(())
    }

    async fn count_l2(&mut self, table: u64, active: bool) -> Result<()> {
        if table >= self.file.length() {
            return Ok(());
        }
        // Where the next guest cluster of this table would lie if nothing were fragmented.
        let mut next_contiguous = 0;
        for entry in self.l2_entries(table).await? {
            if entry & OFLAG_COMPRESSED != 0 {
                self.count_compressed(entry, active);
                continue;
            }
            if entry & L2E_RESERVED != 0 {
                self.corruption(format!(
                    "ERROR found l2 entry with reserved bits set: {entry:x}"
                ));
            }
            let host = entry & L2E_OFFSET_MASK;
            if host == 0 {
                continue;
            }
            if active {
                self.result.allocated_clusters += 1;
                if next_contiguous != 0 && host != next_contiguous {
                    self.result.fragmented_clusters += 1;
                }
                next_contiguous = host + self.cluster;
            }
            if host & (self.cluster - 1) != 0 {
                let what = if entry & OFLAG_ZERO != 0 {
                    "Preallocated"
                } else {
                    "Data"
                };
                let line = format!(
                    "ERROR offset={host:x}: {what} cluster is not properly aligned; L2 entry corrupted."
                );
                self.corruption(line);
            }
            if !self.header.has_data_file() {
                self.count(host, self.cluster);
            }
        }
        Ok(())
    }

    fn count_compressed(&mut self, entry: u64, active: bool) {
        let d = CompressedDescriptor::decode(
            entry & !(OFLAG_COPIED | OFLAG_COMPRESSED),
            self.header.cluster_bits,
        );
        if entry & OFLAG_COPIED != 0 {
            let line = format!(
                "ERROR: coffset={:#x}: copied flag must never be set for compressed clusters",
                d.host_offset
            );
            self.corruption(line);
        }
        self.count(d.host_offset, d.host_bytes);
        if active {
            self.result.compressed_clusters += 1;
            self.result.allocated_clusters += 1;
            // Nothing that is compressed lies where it would be read in one go.
            self.result.fragmented_clusters += 1;
        }
    }

    /// The refcount of a cluster on disk.
    async fn refcount(&mut self, cluster: u64) -> Result<u64> {
        let entries = self.header.geometry().block_entries();
        let (number, index) = (cluster / entries, cluster % entries);
        let offset = self
            .table
            .get(number as usize)
            .map_or(0, |e| e & REFT_OFFSET_MASK);
        if offset == 0 {
            return Ok(0);
        }
        if offset & (self.cluster - 1) != 0 {
            if !std::mem::replace(&mut self.block_said, true) {
                let text = format!(
                    "Refblock offset {} unaligned (reftable index: {})",
                    Hex(offset),
                    Hex(number)
                );
                self.say(format!(
                    "qcow2: Image is corrupt: {text}; further non-fatal corruption events will be suppressed"
                ));
            }
            return Err(BlockError::from_errno(libc::EIO));
        }
        if self.block.as_ref().is_none_or(|(n, _)| *n != number) {
            let buf = IoBufMut::zeroed(self.cluster as usize);
            let bytes = self
                .file
                .preadv(offset, buf, ReadFlags::empty())
                .await?
                .to_vec();
            self.block = Some((number, bytes));
        }
        let block = self.block.as_ref().map_or(&[][..], |(_, b)| b);
        Ok(get_refcount(block, self.header.refcount_order, index))
    }

    /// Whether the clusters that are counted together from this one on have neither references nor refcounts.
    fn is_unused_page(&self, first: u64) -> bool {
        let entries = self.header.geometry().block_entries();
        let mut blocks = first / entries..=(first + PAGE_COUNTERS - 1) / entries;
        let is_there = |number: u64| {
            self.table
                .get(number as usize)
                .is_some_and(|e| e & REFT_OFFSET_MASK != 0)
        };
        self.map.page(first).is_none() && !blocks.any(is_there)
    }

    async fn compare(&mut self) -> Result<()> {
        let mut highest = 0;
        let mut next = 0;
        while next < self.map.len() {
            let cluster = next;
            if cluster.is_multiple_of(PAGE_COUNTERS) && self.is_unused_page(cluster) {
                next += PAGE_COUNTERS;
                continue;
            }
            next += 1;
            let references = self.map.get(cluster);
            let refcount = match self.refcount(cluster).await {
                Ok(n) => n,
                Err(e) => {
                    self.result.check_errors += 1;
                    self.say(format!(
                        "Can't get refcount for cluster {cluster}: {}",
                        e.strerror()
                    ));
                    continue;
                }
            };
            if refcount > 0 || references > 0 {
                highest = cluster;
            }
            if refcount > references {
                self.result.leaks += 1;
                self.say(format!(
                    "Leaked cluster {cluster} refcount={refcount} reference={references}"
                ));
            } else if refcount < references {
                self.corruption(format!(
                    "ERROR cluster {cluster} refcount={refcount} reference={references}"
                ));
            }
        }
        self.result.image_end_offset = (highest + 1) * self.cluster;
        Ok(())
    }

    /// The refcount that contradicts an entry's `COPIED` flag, if it does.
    async fn wrong_copied(&mut self, entry: u64, host: u64, counted: Counted) -> Option<u64> {
        let cluster = host / self.cluster;
        let copied = entry & OFLAG_COPIED != 0;
        let (refcount, harmless) = match counted {
            Counted::OnDisk => (self.refcount(cluster).await.ok()?, false),
            Counted::ByThis => (self.map.get(cluster), !copied),
        };
        ((refcount == 1) != copied && !harmless).then_some(refcount)
    }

    /// INV QCOW2-META-2: `COPIED` is set exactly where the refcount is one.
    async fn check_copied(&mut self, counted: Counted) -> Result<()> {
        for i in 0..self.l1.len() {
            let entry = self.l1[i];
            let table = entry & L1E_OFFSET_MASK;
            if table == 0 {
                continue;
            }
            if let Some(refcount) = self.wrong_copied(entry, table, counted).await {
                let line = format!(
                    "ERROR OFLAG_COPIED L2 cluster: l1_index={i} l1_entry={entry:x} refcount={refcount}"
                );
                self.corruption(line);
            }
            if table >= self.file.length() {
                continue;
            }
            for entry in self.l2_entries(table).await? {
                let host = entry & L2E_OFFSET_MASK;
                if entry & OFLAG_COMPRESSED != 0 || host == 0 || self.header.has_data_file() {
                    continue;
                }
                if let Some(refcount) = self.wrong_copied(entry, host, counted).await {
                    let line = format!(
                        "ERROR OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}"
                    );
                    self.corruption(line);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
