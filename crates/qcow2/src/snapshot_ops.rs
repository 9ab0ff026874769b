// SPDX-License-Identifier: MIT OR Apache-2.0
//! Taking, applying, deleting and showing internal snapshots. Each but the last is an [`Overhaul`]: there as a whole after a power cut, or not at all.
//!
//! A snapshot is an L1 table that is kept. What it reaches is counted once more, by every way that leads there: a data cluster has as many references as there
//! are pairs of L1 and L2 entries that name it. `COPIED` is set exactly where the active layer's reference is the only one (INV QCOW2-META-2); in tables that a
//! snapshot reaches it is set nowhere.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockcore::{
    BlockError, ErrorKind, MAX_LENGTH_BYTES, Result, SECTOR_BYTES, SnapshotRequest,
    SnapshotSelector,
};

use crate::format::{
    CompressedDescriptor, L1E_OFFSET_MASK, L2E_OFFSET_MASK, MAX_SNAPSHOTS, OFLAG_COMPRESSED,
    OFLAG_COPIED,
};
use crate::header::Header;
use crate::image::{Image, Owner};
use crate::overhaul::Overhaul;
use crate::snapshot::{self, Snapshot, SnapshotTable};

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Count {
    /// One reference more.
    Up,
    /// One reference less.
    Down,
}

impl Image {
    /// Takes a snapshot.
    ///
    /// # Errors
    /// `Unsupported` for images with an external data file; `InvalidArgument` where refcounts are too narrow; `InvalidImage` at the format's limits.
    pub async fn snapshot_create(self: &Arc<Self>, request: SnapshotRequest) -> Result<()> {
        self.check_sound()?;
        self.check_no_data_file()?;
        self.vm_state_range(0, request.vm_state_size)?;
        let work = |image: Arc<Image>| async move { image.snapshot_create_now(request).await };
        self.spawn_alone(0, MAX_LENGTH_BYTES, work).await
    }

    /// Makes the disk what it was when a snapshot was taken.
    ///
    /// # Errors
    /// `NotFound`; as [`snapshot_create`](Image::snapshot_create).
    pub async fn snapshot_goto(self: &Arc<Self>, which: &SnapshotSelector) -> Result<()> {
        self.check_sound()?;
        self.check_no_data_file()
            .map_err(|e| e.context("Failed to load snapshot"))?;
        let which = which.clone();
        let work = |image: Arc<Image>| async move { image.snapshot_goto_now(which).await };
        self.spawn_alone(0, MAX_LENGTH_BYTES, work).await
    }

    /// Deletes a snapshot.
    ///
    /// # Errors
    /// As [`snapshot_goto`](Image::snapshot_goto).
    pub async fn snapshot_delete(self: &Arc<Self>, which: &SnapshotSelector) -> Result<()> {
        self.check_sound()?;
        self.check_no_data_file()?;
        let which = which.clone();
        let work = |image: Arc<Image>| async move { image.snapshot_delete_now(which).await };
        self.spawn_alone(0, MAX_LENGTH_BYTES, work).await
    }

    /// Shows a snapshot instead of the active layer. The image is open read-only, and nothing is in flight.
    ///
    /// # Errors
    /// `NotFound`; `InvalidImage` for a snapshot whose L1 table can't be; those of the file.
    pub async fn snapshot_load(&self, which: &SnapshotSelector) -> Result<()> {
        let header = self.header().clone();
        let table = snapshot::read_entries(&header, &self.file).await?;
        let snapshot = find(&table, which)?;
        let l1 = self.snapshot_l1(&table.snapshots[snapshot]).await?;
        let size = self.snapshot_size(&table.snapshots[snapshot])?;
        self.shows_snapshot.store(true, Ordering::Release);
        self.l1.replace(l1);
        self.l2.clear().await;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// The length of the disk in a snapshot, which its L1 table covers.
    fn snapshot_size(&self, snapshot: &Snapshot) -> Result<u64> {
        let size = snapshot.disk_size.unwrap_or(self.size()) / SECTOR_BYTES * SECTOR_BYTES;
        let table_bytes = u128::from(self.cluster_size()) << self.l2_bits();
        if size > MAX_LENGTH_BYTES || u128::from(snapshot.l1_size) * table_bytes < size.into() {
            let text = format!(
                "The L1 table of snapshot '{}' is too short for its {size} bytes",
                snapshot.name
            );
            return Err(BlockError::new(ErrorKind::InvalidImage, text));
        }
        Ok(size)
    }

    pub(crate) async fn snapshot_l1(&self, snapshot: &Snapshot) -> Result<Vec<u64>> {
        if let Some(fault) = snapshot.l1_fault(self.cluster_size()) {
            return Err(BlockError::new(ErrorKind::InvalidImage, fault));
        }
        self.read_words(snapshot.l1_table_offset, snapshot.l1_size as usize * 8)
            .await
    }

    /// The host clusters that an L2 entry has a reference to.
    fn entry_clusters(&self, entry: u64) -> Result<Range<u64>> {
        let bits = self.cluster_bits;
        if entry & OFLAG_COMPRESSED != 0 {
            let d = CompressedDescriptor::decode(entry, bits);
            let end = d.host_offset + d.host_bytes;
            return Ok(d.host_offset >> bits..end.div_ceil(1 << bits));
        }
        let host = entry & L2E_OFFSET_MASK;
        if host & (self.cluster_size() - 1) != 0 {
            let text = format!("Cluster allocation offset {host:#x} unaligned");
            return Err(BlockError::corrupt(text).at(host));
        }
        let first = host >> bits;
        Ok(first..first + u64::from(host != 0))
    }

    async fn snapshot_create_now(self: Arc<Self>, request: SnapshotRequest) -> Result<()> {
        let mut overhaul = Overhaul::begin(&self).await?;
        let mut header = self.header().clone();
        let mut table = snapshot::read_table(&header, &self.file).await?;
        if table.snapshots.len() as u64 >= MAX_SNAPSHOTS.into() {
            return Err(BlockError::from_errno(libc::EFBIG));
        }
        let mut l1 = self.l1.to_vec();
        overhaul.share_tables(&mut l1).await?;
        let l1_size = l1.len() as u32;
        let kept = match l1_size {
            0 => 0,
            _ => {
                let bytes = words_to_bytes(&l1);
                overhaul.write_new(Owner::InactiveL1, bytes).await?
            }
        };
        if request.vm_state_size > 0 {
            // It belongs to the snapshot alone.
            let area = self.l1_index(self.vm_state_offset() >> self.cluster_bits);
            l1.iter_mut().skip(area).for_each(|entry| *entry = 0);
        }
        overhaul.count_tree(&l1, Count::Up).await?;
        let ids = table
            .snapshots
            .iter()
            .filter_map(|s| s.id.parse::<u64>().ok());
        let id = ids.max().unwrap_or(0).saturating_add(1);
        let entry = Snapshot::new(id, &request, (kept, l1_size), self.size());
        table.snapshots.push(entry);
        overhaul.write_snapshots(&mut header, &table).await?;
        overhaul.write_l1(&mut header, &l1).await?;
        overhaul.finish(header, l1).await
    }

    async fn snapshot_goto_now(self: Arc<Self>, which: SnapshotSelector) -> Result<()> {
        let mut overhaul = Overhaul::begin(&self).await?;
        let mut header = self.header().clone();
        let table = snapshot::read_table(&header, &self.file).await?;
        let snapshot = &table.snapshots[find(&table, &which)?];
        let mut l1 = self.snapshot_l1(snapshot).await?;
        header.size = self.snapshot_size(snapshot)?;
        overhaul.count_tree(&l1, Count::Up).await?;
        overhaul.count_tree(&self.l1.to_vec(), Count::Down).await?;
        l1.resize(l1.len().max(self.l1.len()), 0);
        overhaul.settle_flags(&mut l1).await?;
        overhaul.write_l1(&mut header, &l1).await?;
        overhaul.finish(header, l1).await
    }

    async fn snapshot_delete_now(self: Arc<Self>, which: SnapshotSelector) -> Result<()> {
        let mut overhaul = Overhaul::begin(&self).await?;
        let mut header = self.header().clone();
        let mut table = snapshot::read_table(&header, &self.file).await?;
        let snapshot = table.snapshots.remove(find(&table, &which)?);
        let gone = self.snapshot_l1(&snapshot).await?;
        overhaul.count_tree(&gone, Count::Down).await?;
        overhaul.leave_table(snapshot.l1_table_offset, gone.len() as u64 * 8);
        let mut l1 = self.l1.to_vec();
        overhaul.settle_flags(&mut l1).await?;
        overhaul.write_snapshots(&mut header, &table).await?;
        overhaul.write_l1(&mut header, &l1).await?;
        overhaul.finish(header, l1).await
    }
}

fn find(table: &SnapshotTable, which: &SnapshotSelector) -> Result<usize> {
    let all = table.snapshots.iter();
    which
        .find(all.map(|s| (s.id.as_str(), s.name.as_str())))
        .ok_or_else(|| BlockError::from_errno(libc::ENOENT))
}

pub(crate) fn words_to_bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_be_bytes()).collect()
}

impl Overhaul<'_> {
    /// Counts everything that an L1 table reaches.
    async fn count_tree(&mut self, l1: &[u64], count: Count) -> Result<()> {
        let (words, bits) = (self.image.entries().words(), self.image.cluster_bits);
        for &entry in l1.iter().filter(|&&e| e & L1E_OFFSET_MASK != 0) {
            let table = self.l2_table(entry).await?;
            for &entry in table.iter().step_by(words) {
                for cluster in self.image.entry_clusters(entry)? {
                    self.count(cluster, count, true).await?;
                }
            }
            self.count((entry & L1E_OFFSET_MASK) >> bits, count, false)
                .await?;
        }
        Ok(())
    }

    /// One reference to a cluster more or less.
    ///
    /// # Errors
    /// `Corrupt` for one that holds other metadata than an L2 table, or with `is_data` any; as [`refer`](Overhaul::refer) and [`unrefer`](Overhaul::unrefer).
    pub async fn count(&mut self, cluster: u64, count: Count, is_data: bool) -> Result<()> {
        // INV QCOW2-META-1: an entry that points at metadata must not make that metadata free, or a hole.
        let owner = self.image.owner_in(cluster << self.image.cluster_bits, 1);
        let is_table = |o| matches!(o, Owner::L2 | Owner::InactiveL2);
        if let Some(owner) = owner.filter(|&o| is_data || !is_table(o)) {
            let host = cluster << self.image.cluster_bits;
            return Err(self.image.refuse_overlap(host, owner));
        }
        match count {
            Count::Up => self.refer(cluster).await,
            Count::Down => self.unrefer(cluster, is_data).await,
        }
    }

    /// Makes the L2 tables of the active L1 table fit to be shared with a snapshot: no entry says `COPIED` any more, and no L1 entry does.
    async fn share_tables(&mut self, l1: &mut [u64]) -> Result<()> {
        let words = self.image.entries().words();
        for entry in l1.iter_mut().filter(|e| **e & L1E_OFFSET_MASK != 0) {
            let mut table = self.l2_table(*entry).await?;
            let is_copied = |e: u64| e & (OFLAG_COPIED | OFLAG_COMPRESSED) == OFLAG_COPIED;
            if table.iter().step_by(words).any(|&e| is_copied(e)) {
                for e in table.iter_mut().step_by(words).filter(|e| is_copied(**e)) {
                    *e &= !OFLAG_COPIED;
                }
                *entry = self.replace_table(*entry, &table).await?;
            }
            *entry &= !OFLAG_COPIED;
        }
        Ok(())
    }

    /// Sets `COPIED` in the active L1 table and its L2 tables exactly where the only reference is this one (INV QCOW2-META-2).
    ///
    /// # Errors
    /// Those of metadata I/O.
    pub async fn settle_flags(&mut self, l1: &mut [u64]) -> Result<()> {
        let (words, bits) = (self.image.entries().words(), self.image.cluster_bits);
        for entry in l1.iter_mut().filter(|e| **e & L1E_OFFSET_MASK != 0) {
            let mut table = self.l2_table(*entry).await?;
            let mut is_changed = false;
            for e in table.iter_mut().step_by(words) {
                if *e & OFLAG_COMPRESSED != 0 || *e & L2E_OFFSET_MASK == 0 {
                    continue;
                }
                let alone = self.references((*e & L2E_OFFSET_MASK) >> bits).await? == 1;
                let wanted = *e & !OFLAG_COPIED | if alone { OFLAG_COPIED } else { 0 };
                is_changed |= wanted != *e;
                *e = wanted;
            }
            if is_changed {
                *entry = self.replace_table(*entry, &table).await?;
            }
            let alone = self.references((*entry & L1E_OFFSET_MASK) >> bits).await? == 1;
            *entry = *entry & !OFLAG_COPIED | if alone { OFLAG_COPIED } else { 0 };
        }
        Ok(())
    }

    /// Puts another L2 table in place of that which an L1 entry names, and returns the new entry, which says that it is this L1 table's alone.
    async fn replace_table(&mut self, l1_entry: u64, table: &[u64]) -> Result<u64> {
        let host = self.write_new(Owner::L2, words_to_bytes(table)).await?;
        let old = (l1_entry & L1E_OFFSET_MASK) >> self.image.cluster_bits;
        self.unrefer(old, false).await?;
        Ok(host | OFLAG_COPIED)
    }

    /// Writes the active L1 table to a new place.
    ///
    /// # Errors
    /// Those of allocating and of metadata I/O.
    pub async fn write_l1(&mut self, header: &mut Header, l1: &[u64]) -> Result<()> {
        self.leave_table(header.l1_table_offset, u64::from(header.l1_size) * 8);
        header.l1_size = l1.len() as u32;
        header.l1_table_offset = match l1 {
            [] => 0,
            _ => self.write_new(Owner::L1, words_to_bytes(l1)).await?,
        };
        Ok(())
    }

    /// Writes the snapshot table to a new place.
    pub async fn write_snapshots(
        &mut self,
        header: &mut Header,
        table: &SnapshotTable,
    ) -> Result<()> {
        if header.nb_snapshots > 0 {
            self.leave_table(header.snapshots_offset, table.bytes);
        }
        let bytes = table.encode()?;
        header.nb_snapshots = table.snapshots.len() as u32;
        header.snapshots_offset = match bytes.len() {
            0 => 0,
            _ => self.write_new(Owner::SnapshotTable, bytes).await?,
        };
        Ok(())
    }
}
