// SPDX-License-Identifier: MIT OR Apache-2.0
//! Making an image one of version 2 or 3. Called by `amend`.
//!
//! Version 2 has no zero clusters. Those that have a host cluster are filled with zeroes and become data; the others become unallocated, or data where a backing
//! file would show through. In the active layer these are ordinary changes. The tables of snapshots are never changed where they are: an [`Overhaul`] writes them
//! anew. Each step leaves an image that reads as before, whose header says version 3 until the last one.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockcore::{BlockError, ErrorKind, IoBuf, MAX_LENGTH_BYTES, Result, WriteFlags};

use crate::amend::Steps;
use crate::bitmap_load::Stored;
use crate::extension::{self, Extension};
use crate::format::{L1E_OFFSET_MASK, L2E_OFFSET_MASK, OFLAG_COMPRESSED, OFLAG_ZERO};
use crate::header::{Compatible, CompressionType, Header, Incompatible};
use crate::image::{Image, Intent, Owner};
use crate::l2_entry::L2Entry;
use crate::l2_table::Mapping;
use crate::overhaul::Overhaul;
use crate::remap::Remap;
use crate::snapshot::{self, Snapshot, SnapshotTable};
use crate::snapshot_ops::{Count, words_to_bytes};

/// The most zeroes that one write carries, in bytes.
const ZERO_WRITE_BYTES: u64 = 1 << 20;

fn is_zero_entry(entry: u64) -> bool {
    entry & (OFLAG_ZERO | OFLAG_COMPRESSED) == OFLAG_ZERO
}

impl Image {
    /// Makes the image one of another version.
    ///
    /// # Errors
    /// `Unsupported` for what version 2 has no words for; those of metadata I/O.
    pub(crate) async fn change_version(
        self: &Arc<Self>,
        version: u32,
        steps: &Steps,
    ) -> Result<()> {
        let steps = steps.clone();
        let work = move |image: Arc<Image>| async move {
            match version {
                2 => {
                    image.check_downgrade().await?;
                    image.replace_zero_clusters(&steps).await?;
                }
                _ => {
                    steps.tell(0, 2);
                    image.complete_snapshots().await?;
                    steps.tell(1, 2);
                }
            }
            image.commit().await?;
            image
                .rewrite_header(|header| set_version(header, version))
                .await?;
            image.format_version.store(version, Ordering::Release);
            if version == 2 {
                return image.free_unnamed_bitmaps().await;
            }
            steps.tell(2, 2);
            Ok(())
        };
        self.spawn_alone(0, MAX_LENGTH_BYTES, work).await
    }

    /// Version 3 wants to know of each snapshot how long the disk was. In version 2 it can't have had another length than now. The caller holds `changing`
    /// over all.
    async fn complete_snapshots(self: &Arc<Self>) -> Result<()> {
        let before = self.header().clone();
        let mut table = snapshot::read_table(&before, &self.file).await?;
        if table.snapshots.iter().all(|s| s.is_complete) {
            return Ok(());
        }
        for s in &mut table.snapshots {
            s.disk_size.get_or_insert(self.size());
        }
        let mut overhaul = Overhaul::begin(self).await?;
        // As it is now, and not as it was before what was waiting to be written.
        let mut header = self.header().clone();
        overhaul.write_snapshots(&mut header, &table).await?;
        overhaul.finish(header, self.l1.to_vec()).await
    }

    /// What version 2 has no words for, in QEMU's order. The caller holds `changing` over all.
    async fn check_downgrade(self: &Arc<Self>) -> Result<()> {
        let unsupported = |text: String| Err(BlockError::new(ErrorKind::Unsupported, text));
        let header = self.header().clone();
        if header.refcount_order != 4 {
            return Err(BlockError::invalid("compat=0.10 requires refcount_bits=16"));
        }
        if header.incompatible.contains(Incompatible::DATA_FILE) {
            return unsupported("Cannot downgrade an image with a data file".to_owned());
        }
        let snapshots = snapshot::read_table(&header, &self.file).await?.snapshots;
        let is_new = |s: &Snapshot| {
            s.vm_state_size > u64::from(u32::MAX)
                || s.disk_size.is_some_and(|size| size != self.size())
        };
        if snapshots.iter().any(is_new) {
            return unsupported("Internal snapshots prevent downgrade of image".to_owned());
        }
        let others = header.incompatible - Incompatible::COMPRESSION;
        if !others.is_empty() {
            let bits = others.bits();
            return unsupported(format!(
                "Cannot downgrade an image with incompatible features {bits:#x} set"
            ));
        }
        if header.compression_type != CompressionType::Zlib {
            self.commit().await?;
            let mut has_compressed = self.has_compressed(&self.l1.to_vec()).await?;
            for s in &snapshots {
                has_compressed |= self.has_compressed(&self.snapshot_l1(s).await?).await?;
            }
            if has_compressed {
                return unsupported(
                    "Cannot downgrade an image with zstd compression type and existing compressed clusters"
                        .to_owned(),
                );
            }
        }
        Ok(())
    }

    /// Whether there are compressed clusters beneath an L1 table, which has no extended entries.
    async fn has_compressed(&self, l1: &[u64]) -> Result<bool> {
        for table in l1.iter().map(|entry| entry & L1E_OFFSET_MASK) {
            if table != 0 {
                let words = self.read_words(table, self.cluster_size() as usize).await?;
                if words.iter().any(|entry| entry & OFLAG_COMPRESSED != 0) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Does without zero clusters, in the active layer and in the snapshots. The caller holds `changing` over all.
    async fn replace_zero_clusters(self: &Arc<Self>, steps: &Steps) -> Result<()> {
        let header = self.header().clone();
        let table = snapshot::read_table(&header, &self.file).await?;
        let in_snapshots = table.snapshots.iter().map(|s| u64::from(s.l1_size));
        let total = self.l1.len() as u64 + in_snapshots.sum::<u64>();
        let mut done = 0;
        for l1_index in 0..self.l1.len() {
            self.replace_active_zeroes(l1_index).await?;
            done += 1;
            steps.tell(done, total);
        }
        if self.has_zeroes_in_snapshots(&table).await? {
            let tell = |n: u64| steps.tell(done + n, total);
            self.replace_snapshot_zeroes(table, tell).await?;
        } else if total > done {
            steps.tell(total, total);
        }
        Ok(())
    }

    /// Does without zero clusters beneath an L1 entry of the active layer. The caller holds `changing` over all.
    async fn replace_active_zeroes(self: &Arc<Self>, l1_index: usize) -> Result<()> {
        if self.l1.get(l1_index) & L1E_OFFSET_MASK == 0 {
            return Ok(());
        }
        let _epoch = self.epochs.enter();
        let table_bytes = 1u64 << (self.l2_bits() + self.cluster_bits);
        let start = l1_index as u64 * table_bytes;
        let end = start.saturating_add(table_bytes);
        let disk_end = self.size().clamp(start, end);
        let mut at = start;
        while at < disk_end {
            let (mapping, bytes) = self.run(at, disk_end - at, Intent::Write).await?;
            match mapping {
                Mapping::ZeroAllocated { host, copied: true } if !self.is_encrypted() => {
                    self.zero_clusters(host, bytes).await?;
                }
                Mapping::ZeroAllocated { .. } => self.write_zero_data(at, bytes).await?,
                Mapping::ZeroPlain if self.may_show_backing() => {
                    self.write_zero_data(at, bytes).await?;
                }
                _ => {}
            }
            at += bytes;
        }
        let clusters = |end: u64| end.div_ceil(self.cluster_size());
        self.remap(
            clusters(start),
            clusters(disk_end),
            false,
            |mapping, entry| {
                match mapping {
                    // INV QCOW2-ORD-2: the zeroes are in the file.
                    Mapping::ZeroAllocated { .. } => {
                        Remap::Set(L2Entry::one_word(entry.word & !OFLAG_ZERO))
                    }
                    Mapping::ZeroPlain => Remap::Replace(L2Entry::default()),
                    _ => Remap::Keep,
                }
            },
        )
        .await?;
        // Behind the end of the disk, where VM state lies, nothing shows through.
        self.remap(
            clusters(disk_end),
            clusters(end),
            false,
            |mapping, _| match mapping {
                Mapping::ZeroPlain | Mapping::ZeroAllocated { .. } => {
                    Remap::Replace(L2Entry::default())
                }
                _ => Remap::Keep,
            },
        )
        .await
    }

    /// Fills the host clusters of zero clusters with zeroes, the last one as a whole.
    async fn zero_clusters(&self, host: u64, bytes: u64) -> Result<()> {
        let bytes = bytes.next_multiple_of(self.cluster_size());
        self.check_data_write(host, bytes)?;
        let flags = WriteFlags::empty();
        self.file.pwrite_zeroes(host, bytes, flags).await
    }

    async fn write_zero_data(self: &Arc<Self>, offset: u64, bytes: u64) -> Result<()> {
        let mut done = 0;
        while done < bytes {
            let n = (bytes - done).min(ZERO_WRITE_BYTES);
            let zeroes = IoBuf::zeroes(n as usize);
            done += self.write_some(offset + done, zeroes).await?;
            self.commit_if_wanted().await?;
        }
        Ok(())
    }

    async fn has_zeroes_in_snapshots(&self, table: &SnapshotTable) -> Result<bool> {
        for s in &table.snapshots {
            for entry in self.snapshot_l1(s).await? {
                let at = entry & L1E_OFFSET_MASK;
                if at != 0 {
                    let words = self.read_words(at, self.cluster_size() as usize).await?;
                    if words.iter().any(|&e| is_zero_entry(e)) {
                        return Ok(true);
                    }
                }
            }
        }
        Ok(false)
    }

    /// Gives snapshots tables without zero clusters. `tell` is told of each L1 entry that is done. The caller holds `changing` over all.
    async fn replace_snapshot_zeroes(
        self: &Arc<Self>,
        mut table: SnapshotTable,
        tell: impl Fn(u64),
    ) -> Result<()> {
        let mut overhaul = Overhaul::begin(self).await?;
        // As it is now: what was waiting to be written may have moved the refcount table.
        let mut header = self.header().clone();
        let mut replaced = HashMap::new();
        let mut done = 0;
        for snapshot in &mut table.snapshots {
            let mut l1 = self.snapshot_l1(snapshot).await?;
            let old = l1.clone();
            for (l1_index, entry) in l1.iter_mut().enumerate() {
                *entry = overhaul
                    .without_zeroes(*entry, l1_index, &mut replaced)
                    .await?;
                done += 1;
                tell(done);
            }
            if l1 != old {
                overhaul.leave_table(snapshot.l1_table_offset, l1.len() as u64 * 8);
                let bytes = words_to_bytes(&l1);
                snapshot.l1_table_offset = overhaul.write_new(Owner::InactiveL1, bytes).await?;
            }
        }
        let mut l1 = self.l1.to_vec();
        overhaul.settle_flags(&mut l1).await?;
        overhaul.write_snapshots(&mut header, &table).await?;
        overhaul.write_l1(&mut header, &l1).await?;
        overhaul.finish(header, l1).await
    }
}

fn set_version(header: &mut Header, version: u32) {
    let names = |e: &Extension| e.kind == extension::FEATURE_NAMES;
    header.version = version;
    if version < 3 {
        header.compatible = Compatible::empty();
        header.incompatible.remove(Incompatible::COMPRESSION);
        header.compression_type = CompressionType::Zlib;
        header.autoclear = 0;
        header.extensions.retain(|e| !names(e));
        Stored::default().name_in(header);
    } else if !header.extensions.iter().any(names) {
        header.extensions.push(extension::feature_names());
    }
}

/// An L2 table that has been written anew.
struct Replaced {
    /// Byte offset of the new one.
    table: u64,
    /// The host clusters that it names and the old one did not.
    added: Vec<Range<u64>>,
    /// The host clusters that the old one named and it does not.
    dropped: Vec<u64>,
}

impl Overhaul<'_> {
    /// The L1 entry of a snapshot as it is when the L2 table that it names has no zero clusters. `replaced`: the tables that were written anew, by their old place.
    /// Every way that leads to a cluster is counted, so each L1 entry that names a table counts all that is in it.
    async fn without_zeroes(
        &mut self,
        l1_entry: u64,
        l1_index: usize,
        replaced: &mut HashMap<u64, Option<Replaced>>,
    ) -> Result<u64> {
        let old = l1_entry & L1E_OFFSET_MASK;
        if old == 0 {
            return Ok(l1_entry);
        }
        let bits = self.image.cluster_bits;
        let is_new = !replaced.contains_key(&old);
        if is_new {
            let made = self.replace_zero_table(l1_entry, l1_index).await?;
            replaced.insert(old, made);
        }
        let Some(Some(new)) = replaced.get(&old) else {
            return Ok(l1_entry);
        };
        if !is_new {
            self.refer(new.table >> bits).await?;
            for cluster in new.added.iter().cloned().flatten() {
                self.refer(cluster).await?;
            }
        }
        for &cluster in &new.dropped {
            self.count(cluster, Count::Down, true).await?;
        }
        self.count(old >> bits, Count::Down, false).await?;
        Ok(new.table)
    }

    /// Writes a table anew that has zero clusters.
    async fn replace_zero_table(
        &mut self,
        l1_entry: u64,
        l1_index: usize,
    ) -> Result<Option<Replaced>> {
        let mut table = self.l2_table(l1_entry).await?;
        let bits = self.image.cluster_bits;
        let has_backing = self.image.may_show_backing();
        let first = (l1_index as u64) << self.image.l2_bits();
        if !table.iter().any(|&entry| is_zero_entry(entry)) {
            return Ok(None);
        }
        let place = |entry: u64| entry & L2E_OFFSET_MASK;
        let wants_data = |entry: u64| is_zero_entry(entry) && (has_backing || place(entry) != 0);
        let (mut added, mut dropped) = (Vec::new(), Vec::new());
        let mut index = 0;
        while index < table.len() {
            let rest = table[index..].iter();
            let count = rest.take_while(|&&entry| wants_data(entry)).count();
            if count == 0 {
                if is_zero_entry(table[index]) {
                    table[index] = 0;
                }
                index += 1;
                continue;
            }
            let guest = (first + index as u64) << bits;
            let run = self.write_zero_clusters(guest, count as u64).await?;
            for (entry, cluster) in table[index..].iter_mut().zip(run.clone()) {
                let old = std::mem::replace(entry, cluster << bits);
                dropped.extend((place(old) != 0).then_some(place(old) >> bits));
            }
            added.push(run);
            index += count;
        }
        let table = self.write_new(Owner::L2, words_to_bytes(&table)).await?;
        Ok(Some(Replaced {
            table,
            added,
            dropped,
        }))
    }

    /// Takes consecutive clusters for guest data that is zero.
    async fn write_zero_clusters(&mut self, guest: u64, count: u64) -> Result<Range<u64>> {
        let run = self.alloc_data(count).await?;
        let image = self.image;
        let (host, bytes) = (run.start << image.cluster_bits, count << image.cluster_bits);
        if !image.is_encrypted() {
            image
                .file
                .pwrite_zeroes(host, bytes, WriteFlags::empty())
                .await?;
            return Ok(run);
        }
        let mut done = 0;
        while done < bytes {
            let n = (bytes - done).min(ZERO_WRITE_BYTES);
            let zeroes = IoBuf::zeroes(n as usize);
            image.write_data(guest + done, host + done, zeroes).await?;
            done += n;
        }
        Ok(run)
    }
}
