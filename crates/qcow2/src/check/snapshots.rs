// SPDX-License-Identifier: MIT OR Apache-2.0
//! The snapshot table in a check. A repair reads as much of it as makes sense, completes entries that lack fields, and drops what is too much: extra data
//! of an entry above what the format allows, and snapshots at the end above what may be in a table.

use std::ops::Range;

use blockcore::{BlockError, CheckFix, ErrorKind, Result, SECTOR_BYTES};

use super::count::Use;
use super::{Checker, Tally};
use crate::format::{MAX_SNAPSHOT_TABLE_BYTES, MAX_SNAPSHOTS};
use crate::snapshot::{self, EntryReader, MAX_EXTRA_BYTES, SnapshotTable};

/// Byte offset of the number of snapshots in the header; the offset of their table follows.
const SNAPSHOTS_FIELD: u64 = 60;

/// What is said of a table that a repair leaves alone.
const DISTRUSTED: &str = "ERROR the snapshot table is damaged beyond repair; it is left as it is";

/// The snapshots as the check goes on with them.
#[derive(Default)]
pub(super) struct Snapshots {
    /// Its length is that of what lies on disk.
    pub table: SnapshotTable,
    /// Entries differ from those on disk.
    is_changed: bool,
    /// There are fewer than on disk.
    is_shortened: bool,
    /// An entry says that it reaches past the end of the file.
    is_garbled: bool,
    /// Where the table seems to lie, if it is something else as well, or ends behind the file, so that what looks like entries may be none. It stays as it is, and
    /// nothing that it says is believed.
    distrusted: Option<Range<u64>>,
}

impl Snapshots {
    /// Whether the table is left as it is because it may be none.
    pub fn is_distrusted(&self) -> bool {
        self.distrusted.is_some()
    }

    /// The bytes that such a table takes, or seems to take.
    pub fn distrusted(&self) -> Option<Range<u64>> {
        self.distrusted.clone()
    }
}

impl Checker<'_> {
    /// Reads the snapshot table.
    ///
    /// # Errors
    /// `InvalidArgument` for one at an impossible place. Where nothing is to be repaired: `InvalidImage` for one that is too long.
    pub(super) async fn read_snapshots(&mut self) -> Result<Tally> {
        self.snapshots = Snapshots {
            distrusted: self.snapshots.distrusted.take(),
            ..Snapshots::default()
        };
        if self.snapshots.is_distrusted() {
            self.corruption(DISTRUSTED.to_owned());
            return Ok(std::mem::take(&mut self.tally));
        }
        let (offset, count) = (self.header.snapshots_offset, self.header.nb_snapshots);
        // Each entry of the table has at least 40 bytes.
        let place = self.header.check_place(offset, u64::from(count) * 40, "");
        if place.is_err() {
            let text = "ERROR snapshot table offset invalid";
            return Err(BlockError::invalid(text));
        }
        let may_fix = self.fix == CheckFix::All;
        match may_fix {
            true => self.salvage_snapshots().await?,
            false => self.snapshots.table = self.read_whole_table().await?,
        }
        for index in 0..self.snapshots.table.snapshots.len() {
            if self.snapshots.table.snapshots[index].is_complete {
                continue;
            }
            let line = format!("snapshot table entry {index} is incomplete");
            self.corruption_or_repair(may_fix, &line);
            if may_fix {
                let snapshot = &mut self.snapshots.table.snapshots[index];
                snapshot.is_complete = true;
                snapshot.disk_size = Some(self.header.size / SECTOR_BYTES * SECTOR_BYTES);
                self.snapshots.is_changed = true;
            }
        }
        Ok(std::mem::take(&mut self.tally))
    }

    /// Whether a repair of the snapshot table would make up snapshots, or forget them: the table lies where something else lies, too, or past the end of the
    /// file. Known once references are counted.
    ///
    /// INV QCOW2-REPAIR-4: then what the snapshots hold is among what nobody seems to refer to.
    pub(super) fn distrusts_snapshots(&mut self) -> bool {
        let snapshots = &self.snapshots;
        let (offset, bytes) = (self.header.snapshots_offset, snapshots.table.bytes);
        let is_repaired = snapshots.is_changed || snapshots.is_shortened;
        let is_elsewhere = offset >= self.cluster;
        let is_itself = !is_repaired || self.is_only(offset, bytes, Use::OTHER);
        if !snapshots.is_garbled && (bytes == 0 || is_elsewhere && is_itself) {
            return false;
        }
        self.snapshots.distrusted = Some(offset..offset.saturating_add(bytes));
        true
    }

    async fn read_whole_table(&self) -> Result<SnapshotTable> {
        let count = self.header.nb_snapshots;
        if count > MAX_SNAPSHOTS {
            let hint = format!(
                "You can force-remove all {} overhanging snapshots with qemu-img check -r all",
                count - MAX_SNAPSHOTS
            );
            let text = "ERROR snapshot table too large";
            let error = BlockError::new(ErrorKind::InvalidImage, text).errno_is(libc::EFBIG);
            return Err(error.hint(hint));
        }
        let table = snapshot::read_entries(&self.header, self.file).await;
        table.map_err(|e| e.context("ERROR failed to read the snapshot table"))
    }

    /// Reads what makes sense.
    async fn salvage_snapshots(&mut self) -> Result<()> {
        let mut reader = EntryReader::new(&self.header, self.file);
        let count = self.header.nb_snapshots;
        let at_most = count.min(MAX_SNAPSHOTS);
        if count > at_most {
            let dropped = count - at_most;
            self.discard(dropped, format!("{dropped} overhanging snapshots"));
            self.snapshots.is_shortened = true;
        }
        for index in 0..at_most {
            let entry = reader.next().await?;
            if entry.extra_bytes > MAX_EXTRA_BYTES {
                let what = format!(
                    "too much extra metadata in snapshot table entry {index} ({} > {MAX_EXTRA_BYTES})",
                    entry.extra_bytes
                );
                self.discard(1, what);
                self.snapshots.is_changed = true;
                let end = self.header.snapshots_offset + reader.bytes();
                self.snapshots.is_garbled |=
                    end > self.file.length().next_multiple_of(self.cluster);
            }
            if reader.bytes() > MAX_SNAPSHOT_TABLE_BYTES {
                let dropped = at_most - index;
                let what = format!("{dropped} overhanging snapshots (snapshot table is too big)");
                self.discard(dropped, what);
                self.snapshots.is_shortened = true;
                break;
            }
            self.snapshots.table.snapshots.push(entry.snapshot);
            self.snapshots.table.bytes = reader.bytes();
        }
        Ok(())
    }

    fn discard(&mut self, count: u32, what: String) {
        self.say(format!("Discarding {what}"));
        self.tally.corruptions_fixed += u64::from(count);
    }

    /// Writes down what [`read_snapshots`](Checker::read_snapshots) has changed: entries go to a new place.
    pub(super) async fn write_snapshots(&mut self) -> Result<()> {
        let snapshots = &self.snapshots;
        if !snapshots.is_changed && !snapshots.is_shortened {
            return Ok(());
        }
        let count = snapshots.table.snapshots.len() as u32;
        let mut offset = self.header.snapshots_offset;
        if snapshots.is_changed {
            let mut bytes = snapshots.table.encode()?;
            self.snapshots.table.bytes = bytes.len() as u64;
            bytes.resize(bytes.len().next_multiple_of(self.cluster as usize), 0);
            let clusters = bytes.len() as u64 / self.cluster;
            offset = self.take_counted(clusters).await?.start * self.cluster;
            self.write(offset, bytes).await?;
            // INV QCOW2-REPAIR-2: the header names it below.
            self.file.flush().await?;
        }
        let mut fields = count.to_be_bytes().to_vec();
        fields.extend(offset.to_be_bytes());
        self.write(SNAPSHOTS_FIELD, fields).await?;
        self.file.flush().await?;
        (self.header.nb_snapshots, self.header.snapshots_offset) = (count, offset);
        // The place that it had is free now.
        self.recount_quietly().await
    }

    /// Counts again after a change. Whatever there is to say was said.
    pub(super) async fn recount_quietly(&mut self) -> Result<()> {
        let (said, lost) = (self.result.messages.len(), self.lost);
        self.count_references().await?;
        self.lost = self.lost.max(lost);
        self.result.messages.truncate(said);
        Ok(())
    }

    /// Takes `count` free clusters whose refcounts are 1, durably.
    pub(super) async fn take_counted(&mut self, count: u64) -> Result<Range<u64>> {
        if let Some(run) = self.find_free_with_refcounts(count).await? {
            self.take(run.clone());
            self.raise_all().await?;
            return Ok(run);
        }
        // There is no block for any free place, or whether it is free isn't known. A new structure has one, and what the file grows over is counted.
        let taken = self.retired.union(&self.beyond).copied().collect();
        let first = self.find_free(self.file_clusters(), count, &taken);
        let run = first..first + count;
        self.take(run.clone());
        self.rebuild().await?;
        Ok(run)
    }

    /// Consecutive clusters that nobody refers to, and whose refcounts are there and 0.
    async fn find_free_with_refcounts(&mut self, count: u64) -> Result<Option<Range<u64>>> {
        let entries = self.header.geometry().block_entries();
        let end = self.table.len() as u64 * entries;
        if self.lost > 0 {
            return Ok(None);
        }
        let (mut first, mut cluster) = (1, 1);
        while cluster < end {
            if self.block_offset(cluster / entries) == 0 {
                first = (cluster / entries + 1) * entries;
                cluster = first;
                continue;
            }
            let is_free = self.references.get(cluster) == 0
                && !self.retired.contains(&cluster)
                && self.refcount(cluster).await? == 0;
            cluster += 1;
            if !is_free {
                first = cluster;
            } else if cluster - first == count {
                return Ok(Some(first..cluster));
            }
        }
        Ok(None)
    }
}
