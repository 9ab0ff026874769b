// SPDX-License-Identifier: MIT OR Apache-2.0
//! `check`: counts who refers to each host cluster, compares that with the refcounts, and repairs what can be repaired.
//!
//! Works on the file alone, whatever an open image has in memory: `live` sees to it that the two agree, `only` is the driver of an image that is open for a
//! check and nothing else. Memory is a few bytes per cluster of the file that is in use, and some around it. The messages are those of QEMU's check, line by
//! line, since people and scripts read them.
//!
//! # The order of a repair
//!
//! Whatever happens in the middle, an error or a power cut, the image is at least as readable as it was, and another repair goes on from there.
//!
//! | step | what | where |
//! |---|---|---|
//! | 1 | the snapshot table is read, as far as it makes sense | `snapshots` |
//! | 2 | references are counted; entries of zero clusters that name an impossible place lose it, *fdatasync* | `count`, `mend` |
//! | 3 | counted references and refcounts are compared | `compare` |
//! | 4 | refcounts are raised, *fdatasync*; or all of them are written anew elsewhere, *fdatasync*, and the header names them, *fdatasync* | `refcounts`, `rebuild` |
//! | 5 | the snapshot table, if it was not whole, is written anew elsewhere, as in step 4 | `snapshots` |
//! | 6 | refcounts are lowered, *fdatasync* | `refcounts` |
//! | 7 | `COPIED` flags are set right, *fdatasync* | `copied` |
//! | 8 | the header says that the image is sound, *fdatasync*; what has become free gets holes | `finish` |
//!
//! INV QCOW2-REPAIR-1 is this order. Three rules keep a repair from doing harm where damage can't be understood:
//!
//! * What is written anew goes where nothing lies that anybody refers to (INV QCOW2-REPAIR-2).
//! * A table is changed in place only if its cluster is nothing else as well (INV QCOW2-REPAIR-3): an L1 entry that was hit by a bit flip may name guest data.
//! * While there are entries that name impossible places, what they once meant is among what nobody seems to refer to. So then nothing is freed, and nothing
//!   is written over (INV QCOW2-REPAIR-4).

mod cluster_map;
mod compare;
mod copied;
mod count;
mod extensions;
mod finish;
mod live;
mod mend;
mod only;
mod rebuild;
mod refcounts;
mod snapshots;

use std::collections::{HashMap, HashSet};
use std::ops::{AddAssign, Range};

use blockcore::{
    BlockError, CheckAborted, CheckFix, CheckResult, Child, IoBuf, IoBufMut, ReadFlags, Result,
    SECTOR_BYTES, WriteFlags,
};

use crate::header::{Header, Incompatible};
use crate::image::be_words;
use cluster_map::ClusterMap;
use count::Use;
use snapshots::Snapshots;

pub(crate) use extensions::encryption_header;
pub(crate) use only::open;

/// The most clusters that a check counts: a gigabyte of counters, if all of them are in use.
const CLUSTERS_MAX: u64 = 1 << 28;
/// How many clusters behind the end of the file are looked after (see `Checker::beyond`), and so how many a repair can make the file longer by.
const BEYOND_CLUSTERS_MAX: u64 = 1 << 20;
/// The most lines that a check says: a damaged image must not fill the memory with them.
const MESSAGES_MAX: usize = 100_000;

/// Checks an image, and repairs what `fix` allows. What the header says may be different afterwards.
///
/// # Errors
/// Those of the file where the check can't go on at all, and of repairs that can't be made, with what was found till then
/// ([`CheckAborted`]). What is wrong with the image is in the result.
pub async fn check(header: &Header, file: &Child, fix: CheckFix) -> Result<CheckResult> {
    check_beside(header, file, fix, &[]).await
}

/// As [`check`], while `held` clusters are somebody's although no table says so.
///
/// # Errors
/// As [`check`].
pub(crate) async fn check_beside(
    header: &Header,
    file: &Child,
    fix: CheckFix,
    held: &[Range<u64>],
) -> Result<CheckResult> {
    let mut checker = Checker::new(header, file, fix, held)?;
    match checker.run().await {
        Ok(()) => Ok(checker.result),
        Err(e) => Err(e.caused_by(CheckAborted(checker.result))),
    }
}

/// What one step found, and mended.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    corruptions: u64,
    leaks: u64,
    errors: u64,
    corruptions_fixed: u64,
    leaks_fixed: u64,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.corruptions += other.corruptions;
        self.leaks += other.leaks;
        self.errors += other.errors;
        self.corruptions_fixed += other.corruptions_fixed;
        self.leaks_fixed += other.leaks_fixed;
    }
}

impl Tally {
    fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.errors == 0
    }
}

struct Checker<'a> {
    /// As it is on disk.
    header: Header,
    file: &'a Child,
    fix: CheckFix,
    /// Clusters that are somebody's although no table says so.
    held: &'a [Range<u64>],
    /// Bytes in a cluster.
    cluster: u64,
    references: ClusterMap<u32>,
    /// What each cluster is used as. Empty if nothing is to be repaired.
    uses: ClusterMap<Use>,
    /// The refcount table.
    table: Vec<u64>,
    /// The active L1 table.
    l1: Vec<u64>,
    snapshots: Snapshots,
    /// The refcount block that was read last.
    block: Option<(u64, Vec<u8>)>,
    /// A refcount block at an impossible place was met, and said.
    block_said: bool,
    /// Entries that name impossible places, and so what they once referred to is not known.
    lost: u64,
    /// Clusters not far behind the end of the file that entries name. They read as zero, and have to go on doing so.
    beyond: HashSet<u64>,
    /// The refcounts can't be set right where they are.
    needs_rebuild: bool,
    /// Refcounts are lower than they should be.
    undercounted: bool,
    /// Places of L2 entries that can do without the impossible place that they name.
    mendable: Vec<u64>,
    /// The entries that were mended, and the impossible host offsets that they named.
    mended: HashMap<u64, u64>,
    /// Clusters of refcount structures that are no longer in use. Nothing is written there.
    retired: HashSet<u64>,
    /// Host clusters that have become free: start and end.
    freed: Vec<Range<u64>>,
    /// What the step that is being done has found.
    tally: Tally,
    result: CheckResult,
}

impl<'a> Checker<'a> {
    fn new(
        header: &Header,
        file: &'a Child,
        fix: CheckFix,
        held: &'a [Range<u64>],
    ) -> Result<Checker<'a>> {
        let cluster = 1u64 << header.cluster_bits;
        let clusters = file.length().div_ceil(cluster);
        if clusters > CLUSTERS_MAX {
            return Err(BlockError::unsupported(format!(
                "A file of {clusters} clusters is too long to be checked"
            )));
        }
        Ok(Checker {
            header: header.clone(),
            file,
            fix,
            held,
            cluster,
            references: ClusterMap::new(0),
            uses: ClusterMap::new(0),
            table: Vec::new(),
            l1: Vec::new(),
            snapshots: Snapshots::default(),
            block: None,
            block_said: false,
            lost: 0,
            beyond: HashSet::new(),
            needs_rebuild: false,
            undercounted: false,
            mendable: Vec::new(),
            mended: HashMap::new(),
            retired: HashSet::new(),
            freed: Vec::new(),
            tally: Tally::default(),
            result: CheckResult {
                total_clusters: (header.size / SECTOR_BYTES * SECTOR_BYTES).div_ceil(cluster),
                ..CheckResult::default()
            },
        })
    }

    /// The whole check, step by step.
    async fn run(&mut self) -> Result<()> {
        let mut found = self.read_snapshots().await?;
        let mut said = self.result.messages.len();
        let mut counted = self.count_references().await?;
        if self.fix != CheckFix::None {
            self.check_header_is_only()?;
            self.clear_unknown_features().await?;
        }
        if self.fix == CheckFix::All && self.distrusts_snapshots() {
            self.result.messages.clear();
            found = self.read_snapshots().await?;
            said = self.result.messages.len();
            counted = self.count_references().await?;
        }
        if self.fix == CheckFix::All && self.mend_entries().await? {
            counted = self.recount_after_mending(said).await?;
        }
        let mut compared = self.compare(false).await?;
        match (self.needs_rebuild, self.fix) {
            (_, CheckFix::None) => {}
            (true, CheckFix::Leaks) => {
                self.say("ERROR need to rebuild refcount structures".to_owned());
                return Err(BlockError::from_errno(libc::EIO));
            }
            (true, CheckFix::All) => {
                self.say("Rebuilding refcount structure".to_owned());
                self.rebuild().await?;
                let mut before = counted;
                before += compared;
                counted = self.count_references().await?;
                compared = self.compare(true).await?;
                self.raise_refcounts(&compared).await?;
                found += Tally {
                    corruptions_fixed: before.corruptions_fixed
                        + (before.corruptions)
                            .saturating_sub(counted.corruptions + compared.corruptions),
                    leaks_fixed: before.leaks.saturating_sub(compared.leaks),
                    ..Tally::default()
                };
                // What the old structure took up was no leak before.
                compared.leaks_fixed = 0;
            }
            (false, _) => {
                let before = found.corruptions + counted.corruptions + compared.corruptions;
                if before + compared.leaks > 0 {
                    compared = self.compare(true).await?;
                    self.raise_refcounts(&compared).await?;
                }
            }
        }
        found += counted;
        found += compared;
        if self.fix == CheckFix::All {
            self.write_snapshots().await?;
        }
        self.lower_refcounts().await?;
        found += self.settle_copied(&found).await?;
        self.finish(&found).await
    }

    /// INV QCOW2-REPAIR-3: a repair writes fields of the header, which must not be entries of a table at the same time. That the refcount table seems to
    /// lie there is no obstacle: refcounts are written anew, elsewhere, before anything else is.
    fn check_header_is_only(&mut self) -> Result<()> {
        let uses = self.uses.get(0);
        if uses == Use::HEADER || uses == Use::HEADER | Use::REFCOUNTS {
            return Ok(());
        }
        self.say("ERROR the header is something else as well; nothing is repaired".to_owned());
        Err(BlockError::from_errno(libc::EIO))
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
        self.tally.corruptions += 1;
        self.say(line);
    }

    /// A corruption that is being mended, or not. The line lacks its first word.
    fn corruption_or_repair(&mut self, is_repaired: bool, line: &str) {
        if is_repaired {
            self.tally.corruptions_fixed += 1;
            self.say(format!("Repairing {line}"));
        } else {
            self.corruption(format!("ERROR {line}"));
        }
    }

    /// Words in an L2 entry.
    fn entry_words(&self) -> usize {
        let extended = self.header.incompatible.contains(Incompatible::EXTENDED_L2);
        1 + usize::from(extended)
    }

    fn has_data_file(&self) -> bool {
        self.header.incompatible.contains(Incompatible::DATA_FILE)
    }

    /// How many clusters the file has, the last one in part.
    fn file_clusters(&self) -> u64 {
        self.file.length().div_ceil(self.cluster)
    }

    /// `count` words at `offset`, but for those that lie past the end of the file, and so are zero.
    async fn words(&self, offset: u64, count: u64) -> Result<Vec<u64>> {
        let there = self.file.length().saturating_sub(offset).div_ceil(8);
        if count.min(there) == 0 {
            return Ok(Vec::new());
        }
        let buf = IoBufMut::zeroed(count.min(there) as usize * 8);
        let bytes = self.file.preadv(offset, buf, ReadFlags::empty()).await?;
        Ok(be_words(&bytes.to_vec()))
    }

    async fn write(&self, offset: u64, bytes: Vec<u8>) -> Result<()> {
        let (flags, end) = (WriteFlags::empty(), self.file.length());
        // INV QCOW2-REPAIR-4: entries may name what the file grows over, and it reads as zero.
        if offset > end && !self.file.driver().grows_zeroed() {
            self.file.pwrite_zeroes(end, offset - end, flags).await?;
            self.file.flush().await?;
        }
        self.file.pwritev(offset, IoBuf::from(bytes), flags).await
    }

    /// Writes the words `changed` of a table at `offset`, and those that share a sector with them.
    async fn write_words(&self, offset: u64, table: &[u64], changed: Range<usize>) -> Result<()> {
        const SECTOR_WORDS: usize = SECTOR_BYTES as usize / 8;
        let start = changed.start / SECTOR_WORDS * SECTOR_WORDS;
        let end = changed.end.next_multiple_of(SECTOR_WORDS).min(table.len());
        let bytes = table[start..end].iter().flat_map(|w| w.to_be_bytes());
        self.write(offset + start as u64 * 8, bytes.collect()).await
    }
}

#[cfg(test)]
mod tests;
