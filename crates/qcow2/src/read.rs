// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reading guest data.
//!
//! A read looks up each run of clusters and reads it where it lies: in the file, in the backing node, nowhere (zero), or out of a compressed
//! cluster. Lookups of cached L2 entries take no lock worth the name, and no lock is held while data is read; the epoch keeps a cluster that
//! is freed meanwhile from being handed out again.

use std::sync::Arc;

use futures::stream::{FuturesOrdered, StreamExt};

use blockcore::{DebugEvent, IoBufMut, ReadFlags, Result};
use luks::INLINE_BYTES_MAX;

use crate::compressed;
use crate::image::{Image, Intent};
use crate::l2_table::Mapping;

impl Image {
    /// Reads without waiting, if all of it can be told from memory and the host's page cache.
    pub fn read_nowait(&self, offset: u64, buf: &mut [u8]) -> bool {
        if self.orphans.any() {
            return false;
        }
        let _epoch = self.epochs.enter();
        let mut at = offset;
        let mut inline = INLINE_BYTES_MAX;
        let mut left = buf;
        while !left.is_empty() {
            let Some((mapping, bytes)) = self.run_now(at, left.len() as u64) else {
                return false;
            };
            let (part, rest) = left.split_at_mut(bytes as usize);
            let served = match mapping {
                Mapping::Data { host, .. } => {
                    let host = host + self.in_cluster(at);
                    let read =
                        |part: &mut [u8]| self.storage().is_ok_and(|s| s.read_nowait(host, part));
                    self.decrypt_nowait(at, host, part, &mut inline, read)
                }
                Mapping::ZeroPlain | Mapping::ZeroAllocated { .. } => {
                    part.fill(0);
                    true
                }
                Mapping::Unallocated | Mapping::Reserved { .. } => {
                    self.read_backing_nowait(at, part)
                }
                Mapping::Compressed(d) => match self.inflated.get(d.host_offset) {
                    Some(cluster) => {
                        let from = self.in_cluster(at) as usize;
                        part.copy_from_slice(&cluster[from..from + part.len()]);
                        true
                    }
                    None => false,
                },
            };
            if !served {
                return false;
            }
            at += bytes;
            left = rest;
        }
        true
    }

    fn read_backing_nowait(&self, offset: u64, buf: &mut [u8]) -> bool {
        let there = self
            .backing
            .as_ref()
            .map_or(0, |b| b.length().min(self.size()).saturating_sub(offset));
        let (below, past) = buf.split_at_mut(there.min(buf.len() as u64) as usize);
        past.fill(0);
        below.is_empty()
            || self
                .backing
                .as_ref()
                .is_some_and(|b| b.read_nowait(offset, below))
    }

    pub fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// Reads `buf.len()` bytes at `offset`.
    ///
    /// # Errors
    /// Those of the file and the backing node; `Corrupt`.
    pub async fn read(self: &Arc<Self>, offset: u64, mut buf: IoBufMut) -> Result<IoBufMut> {
        self.settle_orphans(offset, buf.len() as u64).await;
        let _epoch = self.epochs.enter();
        let bytes = buf.len() as u64;
        let (mapping, first) = self.run(offset, bytes, Intent::Read).await?;
        if first == bytes {
            return self.read_mapped(mapping, offset, buf).await;
        }
        let mut parts = FuturesOrdered::new();
        let mut done = IoBufMut::default();
        let mut next = (mapping, first);
        let mut at = offset;
        while !buf.is_empty() {
            if parts.len() >= READ_PARALLEL
                && let Some(part) = parts.next().await
            {
                done.append(part?);
            }
            let (mapping, n) = next;
            parts.push_back(self.read_mapped(mapping, at, buf.split_to(n as usize)));
            at += n;
            if !buf.is_empty() {
                next = self.run(at, buf.len() as u64, Intent::Read).await?;
            }
        }
        while let Some(part) = parts.next().await {
            done.append(part?);
        }
        Ok(done)
    }

    /// INV REQ-DROP-1: who looks waits for changes that nobody else waits for any more: what he has seen stays.
    pub async fn settle_orphans(&self, offset: u64, bytes: u64) {
        if self.orphans.any() {
            let first = offset >> self.cluster_bits;
            let end = (offset + bytes).div_ceil(self.cluster_size());
            self.changing.settled(first, end).await;
        }
    }

    /// Reads a range that one mapping covers. The caller is inside the epoch in which it looked the mapping up.
    ///
    /// # Errors
    /// As [`read`](Image::read).
    pub async fn read_mapped(
        &self,
        mapping: Mapping,
        offset: u64,
        mut buf: IoBufMut,
    ) -> Result<IoBufMut> {
        match mapping {
            Mapping::Data { host, .. } => {
                self.file.debug_event(DebugEvent::ReadAio).await;
                let host = host + self.in_cluster(offset);
                let read = self
                    .storage()?
                    .preadv(host, buf, ReadFlags::empty())
                    .await?;
                self.decrypt(offset, host, read).await
            }
            Mapping::ZeroPlain | Mapping::ZeroAllocated { .. } => {
                buf.fill(0);
                Ok(buf)
            }
            Mapping::Unallocated | Mapping::Reserved { .. } => self.read_backing(offset, buf).await,
            Mapping::Compressed(descriptor) => {
                let cluster = self.read_compressed(descriptor).await?;
                let at = self.in_cluster(offset) as usize;
                let n = buf.len();
                buf.copy_from_slice(0, &cluster[at..at + n]);
                Ok(buf)
            }
        }
    }

    /// What lies past the end of the disk is zero: it may have become shorter after the read began, and then the backing node must not show.
    async fn read_backing(&self, offset: u64, mut buf: IoBufMut) -> Result<IoBufMut> {
        let visible = self.size().saturating_sub(offset).min(buf.len() as u64);
        let Some(backing) = self.backing.as_ref().filter(|_| visible > 0) else {
            buf.fill(0);
            return Ok(buf);
        };
        self.file.debug_event(DebugEvent::ReadBackingAio).await;
        let mut past_end = buf.split_off(visible as usize);
        // The node below fills what lies past its own end with zeroes.
        let mut read = backing.preadv(offset, buf, ReadFlags::empty()).await?;
        past_end.fill(0);
        read.append(past_end);
        Ok(read)
    }

    async fn read_compressed(
        &self,
        descriptor: crate::format::CompressedDescriptor,
    ) -> Result<Arc<Vec<u8>>> {
        if let Some(cluster) = self.inflated.get(descriptor.host_offset) {
            return Ok(cluster);
        }
        self.file.debug_event(DebugEvent::ReadCompressed).await;
        let raw = IoBufMut::zeroed(descriptor.host_bytes as usize);
        let raw = self
            .file
            .preadv(descriptor.host_offset, raw, ReadFlags::empty())
            .await?;
        let size = self.cluster_size() as usize;
        let kind = self.header().compression_type;
        let cluster = compressed::decompress(kind, raw.to_vec(), size).await?;
        let cluster = Arc::new(cluster);
        self.inflated.keep(descriptor.host_offset, cluster.clone());
        Ok(cluster)
    }
}

/// How many runs of one request are read at the same time.
const READ_PARALLEL: usize = 16;
