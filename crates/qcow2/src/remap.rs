// SPDX-License-Identifier: MIT OR Apache-2.0
//! Zero writes and discards: changes of mappings without data. The seed of this project is [`Image::write_zeroes`].
//!
//! A zero write that covers a cluster only in part makes it a zero cluster all the same when the rest of it reads as zero already. At the end of a disk
//! whose length is no multiple of the cluster size, what lies past the end counts as zero; and where the backing node is shorter than the overlay, what
//! lies past *its* end does too. With extended L2 entries all of that holds for subclusters instead of clusters. Where any byte that the cluster exposes is not zero, the answer is `Unsupported`, and the request path writes zeroes.
//!
//! The look and the change happen while the cluster is entered in `changing`, so no allocating write slips between. A write in place can't matter: it
//! needs data, and where there is data nothing is widened.
//!
//! Discards are of whole clusters, with subclusters too, as in QEMU.

use std::ops::Range;
use std::sync::Arc;

use blockcore::{BlockError, Child, Result, WriteFlags, chain_is_zero};

use crate::image::{Image, Intent};
use crate::l2_entry::L2Entry;
use crate::l2_table::Mapping;

/// What becomes of one L2 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Remap {
    /// Nothing.
    Keep,
    /// A new entry that keeps the host cluster of the old one.
    Set(L2Entry),
    /// A new entry; the host cluster of the old one is freed.
    Replace(L2Entry),
}

/// Host clusters that keep their place (`discard-no-unref`).
#[derive(Debug, Default)]
struct Kept(std::sync::Mutex<Vec<u64>>);

impl Kept {
    fn note(&self, host: u64) {
        let mut clusters = self
            .0
            .lock()
            .expect("no code panics while it holds this lock");
        clusters.push(host);
    }

    fn into_clusters(self) -> Vec<u64> {
        let clusters = self.0.into_inner();
        clusters.expect("no code panics while it holds this lock")
    }
}

fn not_supported<T>() -> Result<T> {
    Err(BlockError::from_errno(libc::EOPNOTSUPP))
}

/// Gives storage back that entries on disk may still name: what is there instead is zero. (What a device has there after a discard, nobody knows.)
pub(crate) async fn make_hole(file: &Child, offset: u64, bytes: u64) {
    let flags = WriteFlags::MAY_UNMAP | WriteFlags::NO_FALLBACK;
    if file.flags().unmap
        && let Err(e) = file.pwrite_zeroes(offset, bytes, flags).await
    {
        tracing::debug!("no hole at {offset:#x}: {e}");
    }
}

impl Image {
    /// Makes a range read as zero without writing zeroes. The range is whole subclusters, or lies within one. (Without extended L2 entries a cluster counts
    /// as one subcluster.)
    ///
    /// # Errors
    /// `Unsupported` where zeroes have to be written; those of metadata I/O.
    pub async fn write_zeroes(
        self: &Arc<Self>,
        offset: u64,
        bytes: u64,
        flags: WriteFlags,
    ) -> Result<()> {
        self.check_sound()?;
        self.check_end(offset + bytes)?;
        if self.version() < 3 && self.may_show_backing() {
            // Version 2 has no zero clusters, and an unallocated one would show the backing node.
            return not_supported();
        }
        self.spawn(offset, offset + bytes, move |image| async move {
            image.write_zeroes_now(offset, bytes, flags).await
        })
        .await
    }

    /// As [`write_zeroes`](Image::write_zeroes). The caller holds `changing`.
    async fn write_zeroes_now(
        self: Arc<Self>,
        offset: u64,
        bytes: u64,
        flags: WriteFlags,
    ) -> Result<()> {
        let _epoch = self.epochs.enter();
        let size = self.subcluster_size();
        let range = offset..offset + bytes;
        let whole = offset / size * size..range.end.next_multiple_of(size);
        // At the end of the disk the subcluster is covered to its end: nothing is exposed behind.
        let has_tail = range.end != whole.end && range.end != self.size();
        if (range.start != whole.start || has_tail) && !self.may_widen(&range, &whole).await? {
            return not_supported();
        }
        self.zero_raw_data(offset, bytes, flags).await?;
        let unmap = flags.contains(WriteFlags::MAY_UNMAP);
        let clusters = self.zero_edges(whole).await?;
        let (version, entries) = (self.version(), self.entries());
        let keeps = self.runtime().discard_no_unref && version >= 3;
        let kept = Kept::default();
        self.remap(
            clusters.start,
            clusters.end,
            unmap,
            |mapping, entry| match mapping {
                _ if version < 3 => match mapping {
                    Mapping::Unallocated => Remap::Keep,
                    _ => Remap::Replace(L2Entry::default()),
                },
                Mapping::ZeroPlain => Remap::Keep,
                Mapping::Compressed(_) => Remap::Replace(entries.zero()),
                Mapping::ZeroAllocated { host, copied: true }
                | Mapping::Data { host, copied: true }
                    if unmap && keeps =>
                {
                    kept.note(host);
                    Remap::Set(entries.zeroed(entry))
                }
                Mapping::ZeroAllocated { .. } | Mapping::Data { .. } if unmap => {
                    Remap::Replace(entries.zero())
                }
                Mapping::ZeroAllocated { .. } => Remap::Keep,
                _ => Remap::Set(entries.zeroed(entry)),
            },
        )
        .await?;
        self.punch_kept(kept).await;
        if unmap && self.in_cluster(offset) == 0 {
            self.discard_data(offset, bytes).await;
        }
        Ok(())
    }

    /// Makes the parts of clusters at both ends of a range of whole subclusters zero, and returns the clusters between. The caller holds `changing`.
    async fn zero_edges(self: &Arc<Self>, range: Range<u64>) -> Result<Range<u64>> {
        let size = self.cluster_size();
        // A cluster that is covered from its start to the end of the disk is a whole one.
        let covers_last = range.end == self.size() && range.start <= range.end / size * size;
        let range = match covers_last {
            true => range.start..range.end.next_multiple_of(size),
            false => range,
        };
        let inner = range.start.next_multiple_of(size)..range.end / size * size;
        if inner.start > inner.end {
            self.zero_part(range).await?;
            return Ok(0..0);
        }
        self.zero_part(range.start..inner.start).await?;
        self.zero_part(inner.end..range.end).await?;
        Ok(inner.start >> self.cluster_bits..inner.end >> self.cluster_bits)
    }

    /// Makes some subclusters of one cluster zero, which keeps its host cluster. The caller holds `changing`.
    ///
    /// # Errors
    /// `Unsupported` for a compressed cluster; those of metadata I/O.
    pub(crate) async fn zero_part(self: &Arc<Self>, range: Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let cluster = range.start >> self.cluster_bits;
        let from = self.in_cluster(range.start);
        let mut meta = self.meta.lock().await;
        let old = self.entry(cluster).await?;
        if let Mapping::Compressed(_) = self.decode(cluster, old, Intent::Write)? {
            return not_supported();
        }
        let part = from..from + (range.end - range.start);
        let new = self.entries().zeroed_part(old, part);
        if new != old {
            self.ensure_l2_table(&mut meta, self.l1_index(cluster))
                .await?;
            self.set_entry(&mut meta, cluster, new).await?;
        }
        Ok(())
    }

    /// Whether what a request leaves out of its one subcluster, `whole`, in front of it and behind it, reads as zero. The caller holds `changing`.
    async fn may_widen(self: &Arc<Self>, range: &Range<u64>, whole: &Range<u64>) -> Result<bool> {
        if whole.end - whole.start > self.subcluster_size() {
            return Ok(false);
        }
        match self.run(range.start, 1, Intent::Write).await?.0 {
            Mapping::ZeroPlain | Mapping::ZeroAllocated { .. } => Ok(true),
            Mapping::Data { .. } | Mapping::Compressed(_) => Ok(false),
            Mapping::Unallocated | Mapping::Reserved { .. } => {
                let Some(backing) = &self.backing else {
                    return Ok(true);
                };
                let head = range.start - whole.start;
                // What lies past the end of the disk is not exposed, whatever the backing node has there.
                let tail = whole.end.min(self.size()).saturating_sub(range.end);
                Ok(chain_is_zero(backing.node(), whole.start, head).await?
                    && chain_is_zero(backing.node(), range.end, tail).await?)
            }
        }
    }

    /// Gives back what a range holds. The range is whole clusters, or lies within one.
    ///
    /// # Errors
    /// `Unsupported` for a part of a cluster; those of metadata I/O.
    pub async fn discard(self: &Arc<Self>, offset: u64, bytes: u64) -> Result<()> {
        self.check_sound()?;
        let end = offset + bytes;
        self.check_end(end)?;
        let is_whole = move |image: &Image| {
            image.in_cluster(offset) == 0 && (image.in_cluster(end) == 0 || end == image.size())
        };
        // A discard must never bring to light what the backing node has (version 2 has no way to hide it).
        if !is_whole(self) || (self.version() < 3 && self.may_show_backing()) {
            return not_supported();
        }
        self.spawn(offset, end, move |image| async move {
            // Looked at again: the disk may have grown meanwhile, and what lies behind `end` is somebody's data then.
            if !is_whole(&image) {
                return not_supported();
            }
            let _epoch = image.epochs.enter();
            image
                .zero_raw_data(offset, bytes, WriteFlags::MAY_UNMAP)
                .await?;
            let first = offset >> image.cluster_bits;
            let last = (end - 1) >> image.cluster_bits;
            let zero = image.entry_for_nothing();
            let entries = image.entries();
            let has_backing = image.backing.is_some();
            let keeps = image.runtime().discard_no_unref && image.version() >= 3;
            let kept = Kept::default();
            image
                .remap(first, last + 1, true, |mapping, entry| match mapping {
                    Mapping::ZeroAllocated { host, copied: true }
                    | Mapping::Data { host, copied: true }
                        if keeps =>
                    {
                        kept.note(host);
                        Remap::Set(entries.zeroed(entry))
                    }
                    Mapping::ZeroPlain => Remap::Keep,
                    Mapping::Unallocated if has_backing => Remap::Set(zero),
                    Mapping::Unallocated => Remap::Keep,
                    _ => Remap::Replace(zero),
                })
                .await?;
            image.punch_kept(kept).await;
            image.discard_data(offset, bytes).await;
            Ok(())
        })
        .await
    }

    /// Punches holes where clusters keep their place though they read as zero. The caller holds `changing`, so nobody is given them for new data meanwhile.
    /// The entries may be durable only later, so that a power cut shows what is in the holes: zeroes, which the guest asked for; but where data is encrypted, noise,
    /// and so nothing is given back there (INV QCOW2-CRYPT-1).
    async fn punch_kept(&self, kept: Kept) {
        if self.has_data_file() || self.is_encrypted() || !self.runtime().pass_discard_request {
            return;
        }
        for host in kept.into_clusters() {
            if self.owner_in(host, self.cluster_size()).is_none() {
                make_hole(&self.file, host, self.cluster_size()).await;
            }
        }
    }

    /// Commits if much has piled up. The caller holds no lock.
    ///
    /// # Errors
    /// Those of the commit.
    pub async fn commit_if_wanted(self: &Arc<Self>) -> Result<()> {
        let wants_commit = self.meta.lock().await.wants_commit(self.l2.slice_bytes());
        if wants_commit {
            return self.commit().await;
        }
        Ok(())
    }

    /// The entry of a cluster that holds nothing and hides what lies below, if the version has such a thing.
    pub(crate) fn entry_for_nothing(&self) -> L2Entry {
        match self.version() {
            2 => L2Entry::default(),
            _ => self.entries().zero(),
        }
    }

    /// Changes the entries of guest clusters `first..end` as `decide` says, which sees the mapping of the whole cluster and the entry. Tables that need no change are
    /// not made. The caller holds `changing` and an epoch.
    pub(crate) async fn remap(
        self: &Arc<Self>,
        first: u64,
        end: u64,
        punch: bool,
        decide: impl Fn(Mapping, L2Entry) -> Remap,
    ) -> Result<()> {
        let entries = self.l2.slice_entries();
        let mut at = first;
        while at < end {
            let (number, _) = self.l2.locate(at);
            let slice_end = ((number + 1) * entries).min(end);
            // One slice under the lock at a time, so that others get their turn.
            let mut meta = self.meta.lock().await;
            let table = self.slice(number).await?;
            if table.is_none() && decide(Mapping::Unallocated, L2Entry::default()) == Remap::Keep {
                // Nothing to do in all of a table that isn't there.
                let table_entries = 1u64 << self.l2_bits();
                at = ((at / table_entries + 1) * table_entries).min(end);
                continue;
            }
            for cluster in at..slice_end {
                let (_, index) = self.l2.locate(cluster);
                let entry = table.as_ref().map_or(L2Entry::default(), |t| t.get(index));
                let mapping = self.decode(cluster, entry, Intent::Write)?;
                match decide(mapping, entry) {
                    Remap::Keep => {}
                    Remap::Set(new) => {
                        self.ensure_l2_table(&mut meta, self.l1_index(cluster))
                            .await?;
                        self.set_entry(&mut meta, cluster, new).await?;
                    }
                    Remap::Replace(new) => {
                        self.ensure_l2_table(&mut meta, self.l1_index(cluster))
                            .await?;
                        self.set_entry(&mut meta, cluster, new).await?;
                        self.free_mapping(&mut meta, &mapping, punch)?;
                    }
                }
            }
            at = slice_end;
            let wants_commit = meta.wants_commit(self.l2.slice_bytes());
            drop(meta);
            // A range may be as long as the disk, and its changes more than the memory holds.
            if wants_commit {
                self.commit().await?;
            }
        }
        Ok(())
    }
}
