// SPDX-License-Identifier: MIT OR Apache-2.0
//! Block status: what `qemu-img map` and the walk down a chain see.

use blockcore::{BlockStatus, Result, StatusFlags, StatusMode};

use crate::image::{Image, Intent};
use crate::l2_table::Mapping;

impl Image {
    /// What a range that starts at `offset` holds.
    ///
    /// # Errors
    /// Those of reading L2 tables.
    pub async fn status(&self, offset: u64, bytes: u64, mode: StatusMode) -> Result<BlockStatus> {
        let _epoch = self.epochs.enter();
        let (mapping, covered) = self.run(offset, bytes, Intent::Read).await?;
        let file = || self.file.node().clone();
        let within = self.in_cluster(offset);
        Ok(match mapping {
            Mapping::Unallocated => BlockStatus::new(StatusFlags::empty(), covered),
            Mapping::ZeroPlain => BlockStatus::new(StatusFlags::ZERO, covered),
            Mapping::ZeroAllocated { host, .. } => {
                BlockStatus::mapped(StatusFlags::ZERO, covered, host + within, file())
            }
            Mapping::Compressed(_) => {
                BlockStatus::new(StatusFlags::DATA | StatusFlags::COMPRESSED, covered)
            }
            Mapping::Data { host, .. } => {
                let mut flags = StatusFlags::DATA;
                if mode == StatusMode::Precise && self.is_metadata_preallocated().await? {
                    // Clusters that were allocated and never written: the host knows that they are holes.
                    flags |= StatusFlags::RECURSE;
                }
                BlockStatus::mapped(flags, covered, host + within, file())
            }
        })
    }

    /// Whether far more clusters are allocated than the file has storage for: `preallocation=metadata`. Found out once.
    /// `QEMU: qcow2_detect_metadata_preallocation`.
    async fn is_metadata_preallocated(&self) -> Result<bool> {
        if let Some(&known) = self.metadata_preallocated.get() {
            return Ok(known);
        }
        let found = match self.file.driver().allocated_size().await? {
            None => false,
            Some(bytes) => {
                let real = bytes >> self.cluster_bits;
                let threshold = (real * 10 / 9).max(real + 2);
                let clusters = self.file.length().div_ceil(self.cluster_size());
                let mut meta = self.meta.lock().await;
                let mut counted = 0;
                for cluster in 0..clusters {
                    counted += u64::from(meta.refcounts.get(&self.file, cluster).await? > 0);
                    if counted >= threshold {
                        break;
                    }
                }
                counted >= threshold
            }
        };
        Ok(*self.metadata_preallocated.get_or_init(|| found))
    }
}
