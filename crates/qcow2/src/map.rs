// SPDX-License-Identifier: MIT OR Apache-2.0
//! Block status: what `qemu-img map` and the walk down a chain see.

use std::sync::Arc;

use blockcore::{BlockStatus, IoBufMut, ReadFlags, Result, StatusFlags, StatusMode};

use crate::format::REFT_OFFSET_MASK;
use crate::image::{Image, Intent};
use crate::l2_table::Mapping;
use crate::refcount::get_refcount;

impl Image {
    /// What a range that starts at `offset` holds.
    ///
    /// # Errors
    /// Those of reading L2 tables.
    pub async fn status(
        self: &Arc<Self>,
        offset: u64,
        bytes: u64,
        mode: StatusMode,
    ) -> Result<BlockStatus> {
        self.settle_orphans(offset, bytes).await;
        let _epoch = self.epochs.enter();
        let (mapping, covered) = self.run(offset, bytes, Intent::Read).await?;
        let file = || match self.data.child() {
            Some(data) => data.node().clone(),
            None => self.file.node().clone(),
        };
        let within = self.in_cluster(offset);
        let mapped = |flags, host: u64| match self.is_encrypted() {
            // What lies there is not what the guest reads.
            true => BlockStatus::new(flags, covered),
            false => BlockStatus::mapped(flags, covered, host + within, file()),
        };
        Ok(match mapping {
            Mapping::Unallocated => BlockStatus::new(StatusFlags::empty(), covered),
            Mapping::Reserved { host, .. } => mapped(StatusFlags::empty(), host),
            Mapping::ZeroPlain => BlockStatus::new(StatusFlags::ZERO, covered),
            Mapping::ZeroAllocated { host, .. } => mapped(StatusFlags::ZERO, host),
            Mapping::Compressed(_) => {
                BlockStatus::new(StatusFlags::DATA | StatusFlags::COMPRESSED, covered)
            }
            Mapping::Data { host, .. } => {
                let mut flags = StatusFlags::DATA;
                if mode == StatusMode::Precise && self.is_metadata_preallocated().await? {
                    // Clusters that were allocated and never written: the host knows that they are holes.
                    flags |= StatusFlags::RECURSE;
                }
                mapped(flags, host)
            }
        })
    }

    /// Whether far more clusters are allocated than the file has storage for: `preallocation=metadata`. Found out once, from what is on disk, without
    /// any lock, and from the image's own file even where the data lies elsewhere. `QEMU: qcow2_detect_metadata_preallocation`.
    async fn is_metadata_preallocated(&self) -> Result<bool> {
        if let Some(&known) = self.metadata_preallocated.get() {
            return Ok(known);
        }
        // Where data is encrypted, a hole of the host is noise.
        if self.is_encrypted() {
            return Ok(false);
        }
        let found = match self.file.driver().allocated_size().await? {
            None => false,
            Some(bytes) => {
                let real = bytes >> self.cluster_bits;
                self.has_references((real * 10 / 9).max(real + 2)).await?
            }
        };
        Ok(*self.metadata_preallocated.get_or_init(|| found))
    }

    /// Whether at least `threshold` clusters of the file are referred to.
    ///
    /// Reads no more blocks than the file has storage for, whatever its tables claim: each block counts at least itself or another cluster, but for
    /// a few that were emptied.
    async fn has_references(&self, threshold: u64) -> Result<bool> {
        let (table_offset, table_clusters, order) = {
            let header = self.header();
            (
                header.refcount_table_offset,
                header.refcount_table_clusters,
                header.refcount_order,
            )
        };
        let table_bytes = (table_clusters as usize) << self.cluster_bits;
        let table = self.read_words(table_offset, table_bytes).await?;
        let entries = 1u64 << (self.cluster_bits + 3 - order);
        let clusters = self.file.length().div_ceil(self.cluster_size());
        let (mut counted, mut empty) = (0, 0);
        for (number, entry) in table.iter().enumerate() {
            let (offset, first) = (entry & REFT_OFFSET_MASK, number as u64 * entries);
            if counted >= threshold || first >= clusters || empty > EMPTY_BLOCKS_MAX {
                break;
            }
            if offset == 0 || offset & (self.cluster_size() - 1) != 0 {
                continue;
            }
            let buf = IoBufMut::zeroed(self.cluster_size() as usize);
            let read = self.file.preadv(offset, buf, ReadFlags::empty()).await?;
            let block = read.to_vec();
            let used = (0..entries.min(clusters - first))
                .filter(|&i| get_refcount(&block, order, i) > 0)
                .count() as u64;
            counted += used;
            empty += u64::from(used == 0);
        }
        Ok(counted >= threshold)
    }
}

/// So many refcount blocks without a reference are looked at.
const EMPTY_BLOCKS_MAX: u64 = 64;
