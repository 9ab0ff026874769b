// SPDX-License-Identifier: MIT OR Apache-2.0
//! Zero writes and discards: changes of mappings without data. The seed of this project is [`Image::write_zeroes`].
//!
//! A zero write that covers a cluster only in part makes it a zero cluster all the same when the rest of it reads as zero already. At the end of a disk
//! whose length is no multiple of the cluster size, what lies past the end counts as zero; and where the backing node is shorter than the overlay, what
//! lies past *its* end does too. Where any byte that the cluster exposes is not zero, the answer is `Unsupported`, and the request path writes zeroes.
//!
//! The look and the change happen while the cluster is entered in `changing`, so no allocating write slips between. A write in place can't matter: it
//! needs a data cluster, and a data cluster is never widened.

use std::sync::Arc;

use blockcore::{BlockError, Result, WriteFlags, chain_is_zero};

use crate::format::OFLAG_ZERO;
use crate::image::{Image, Intent};
use crate::l2_table::Mapping;

/// What becomes of one L2 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Remap {
    /// Nothing.
    Keep,
    /// A new entry that keeps the host cluster of the old one.
    Set(u64),
    /// A new entry; the host cluster of the old one is freed.
    Replace(u64),
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

impl Image {
    /// Makes a range read as zero without writing zeroes. The range is whole clusters, or lies within one.
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
        if self.version() < 3 && self.backing.is_some() {
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
        let end = offset + bytes;
        let first = offset >> self.cluster_bits;
        let last = (end - 1) >> self.cluster_bits;
        let _epoch = self.epochs.enter();
        let head = self.in_cluster(offset);
        // At the end of the disk the cluster is covered to its end: nothing is exposed behind.
        let tail = if end == self.size() {
            0
        } else {
            end.next_multiple_of(self.cluster_size()) - end
        };
        if (head > 0 || tail > 0) && !self.may_widen(first, last, offset, head, end, tail).await? {
            return not_supported();
        }
        self.zero_raw_data(offset, bytes, flags).await?;
        let unmap = flags.contains(WriteFlags::MAY_UNMAP);
        let version = self.version();
        let keeps = self.runtime().discard_no_unref && version >= 3;
        let kept = Kept::default();
        self.remap(first, last + 1, unmap, |mapping, entry| match mapping {
            _ if version < 3 => match mapping {
                Mapping::Unallocated => Remap::Keep,
                _ => Remap::Replace(0),
            },
            Mapping::ZeroPlain => Remap::Keep,
            Mapping::Unallocated => Remap::Set(OFLAG_ZERO),
            Mapping::Compressed(_) => Remap::Replace(OFLAG_ZERO),
            Mapping::ZeroAllocated { host, copied: true }
            | Mapping::Data { host, copied: true }
                if unmap && keeps =>
            {
                kept.note(host);
                Remap::Set(entry | OFLAG_ZERO)
            }
            Mapping::ZeroAllocated { .. } | Mapping::Data { .. } if unmap => {
                Remap::Replace(OFLAG_ZERO)
            }
            Mapping::ZeroAllocated { .. } => Remap::Keep,
            Mapping::Data { .. } => Remap::Set(entry | OFLAG_ZERO),
        })
        .await?;
        self.punch_kept(kept).await;
        if unmap && head == 0 {
            self.discard_data(offset, bytes).await;
        }
        Ok(())
    }

    /// Whether what a request leaves out of its one cluster, in front of it and behind it, reads as zero. The caller holds `changing`.
    async fn may_widen(
        self: &Arc<Self>,
        first: u64,
        last: u64,
        offset: u64,
        head: u64,
        end: u64,
        tail: u64,
    ) -> Result<bool> {
        if first != last {
            return Ok(false);
        }
        match self.mapping(first, Intent::Write).await? {
            Mapping::ZeroPlain | Mapping::ZeroAllocated { .. } => Ok(true),
            Mapping::Data { .. } | Mapping::Compressed(_) => Ok(false),
            Mapping::Unallocated => {
                let Some(backing) = &self.backing else {
                    return Ok(true);
                };
                // What lies past the end of the disk is not exposed, whatever the backing node has there.
                let tail = tail.min(self.size().saturating_sub(end));
                Ok(chain_is_zero(backing.node(), offset - head, head).await?
                    && chain_is_zero(backing.node(), end, tail).await?)
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
        let whole =
            self.in_cluster(offset) == 0 && (self.in_cluster(end) == 0 || end == self.size());
        // A discard must never bring to light what the backing node has (version 2 has no way to hide it).
        if !whole || (self.version() < 3 && self.backing.is_some()) {
            return not_supported();
        }
        self.spawn(offset, end, move |image| async move {
            let _epoch = image.epochs.enter();
            image
                .zero_raw_data(offset, bytes, WriteFlags::MAY_UNMAP)
                .await?;
            let first = offset >> image.cluster_bits;
            let last = (end - 1) >> image.cluster_bits;
            let zero = if image.version() < 3 { 0 } else { OFLAG_ZERO };
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
                        Remap::Set(entry | OFLAG_ZERO)
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
    /// That the entries may be durable only later is no harm: the guest said that it needs nothing of this.
    async fn punch_kept(&self, kept: Kept) {
        if self.has_data_file() || !self.runtime().pass_discard_request {
            return;
        }
        for host in kept.into_clusters() {
            if self.owner_in(host, self.cluster_size()).is_none()
                && let Err(e) = self.file.pdiscard(host, self.cluster_size()).await
            {
                tracing::debug!("no hole at {host:#x}: {e}");
            }
        }
    }

    /// Commits if much has piled up. The caller holds no lock.
    ///
    /// # Errors
    /// Those of the commit.
    pub async fn commit_if_wanted(self: &Arc<Self>) -> Result<()> {
        if self.meta.lock().await.wants_commit() {
            return self.commit().await;
        }
        Ok(())
    }

    /// Changes the entries of guest clusters `first..end` as `decide` says, which sees the mapping and the entry. Tables that need no change are
    /// not made. The caller holds `changing` and an epoch.
    pub(crate) async fn remap(
        self: &Arc<Self>,
        first: u64,
        end: u64,
        punch: bool,
        decide: impl Fn(Mapping, u64) -> Remap,
    ) -> Result<()> {
        let entries = self.l2.slice_entries();
        let mut at = first;
        while at < end {
            let (number, _) = self.l2.locate(at);
            let slice_end = ((number + 1) * entries).min(end);
            // One slice under the lock at a time, so that others get their turn.
            let mut meta = self.meta.lock().await;
            let table = self.slice(number).await?;
            if table.is_none() && decide(Mapping::Unallocated, 0) == Remap::Keep {
                // Nothing to do in all of a table that isn't there.
                let table_entries = 1u64 << self.l2_bits();
                at = ((at / table_entries + 1) * table_entries).min(end);
                continue;
            }
            for cluster in at..slice_end {
                let (_, index) = self.l2.locate(cluster);
                let entry = table.as_ref().map_or(0, |t| t.get(index));
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
        }
        Ok(())
    }
}
