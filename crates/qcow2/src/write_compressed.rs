// SPDX-License-Identifier: MIT OR Apache-2.0
//! Writing compressed clusters. Called by `driver`.
//!
//! Compressed data takes up as many bytes as it has, and several of them share a host cluster, which has one reference for each. They lie behind each other
//! as they come: `Meta::packed` says where the next one goes. The clusters of a request are compressed in parallel on the blocking pool, and what ends up
//! side by side is written as one.
//!
//! The order on disk is that of any other new cluster (`write`): data before the L2 entry in memory, refcounts before L2 entries on disk. Bytes of a host
//! cluster that were used once are not used again before all of the cluster is free (INV QCOW2-ORD-4).

use std::sync::Arc;

use blockcore::{BlockError, DebugEvent, ErrorKind, IoBuf, Result, SECTOR_BYTES, WriteFlags};
use futures::stream::{FuturesOrdered, StreamExt};

use crate::alloc::{Meta, Run};
use crate::compressed;
use crate::format::CompressedDescriptor;
use crate::image::{Image, Intent};
use crate::l2_entry::L2Entry;
use crate::l2_table::Mapping;

/// How many clusters of one request are compressed at the same time.
const PARALLEL: usize = 8;

/// A compressed cluster that has its place.
#[derive(Debug)]
struct Packed {
    guest_cluster: u64,
    host: u64,
    data: Vec<u8>,
}

impl Image {
    /// Writes whole clusters, compressed. What doesn't get shorter is written as it is.
    ///
    /// # Errors
    /// `InvalidArgument` for parts of clusters; `Unsupported` in encrypted images; `Io` where a cluster is allocated already, as QEMU has it; otherwise as [`write`](Image::write).
    pub async fn write_compressed(self: &Arc<Self>, offset: u64, buf: IoBuf) -> Result<()> {
        if self.is_encrypted() {
            // Nobody would decrypt it: it would have to lie there for everybody to read.
            return Err(BlockError::from_errno(libc::ENOTSUP));
        }
        self.check_sound()?;
        self.check_no_data_file()?;
        let end = offset + buf.len() as u64;
        self.check_end(end)?;
        let is_whole =
            self.in_cluster(offset) == 0 && (self.in_cluster(end) == 0 || end == self.size());
        if !is_whole {
            return Err(BlockError::from_errno(libc::EINVAL));
        }
        self.spawn(offset, end, move |image| async move {
            image.write_compressed_now(offset, buf).await
        })
        .await
    }

    /// As [`write_compressed`](Image::write_compressed). The caller holds `changing`.
    async fn write_compressed_now(self: Arc<Self>, offset: u64, buf: IoBuf) -> Result<()> {
        let _epoch = self.epochs.enter();
        let size = self.cluster_size() as usize;
        let clusters = buf.len().div_ceil(size);
        let first = offset >> self.cluster_bits;
        let part = |i: usize| buf.slice(i * size..((i + 1) * size).min(buf.len()));
        let mut working = FuturesOrdered::new();
        let mut next = 0;
        let mut packed = Vec::new();
        for i in 0..clusters {
            while next < clusters && working.len() < PARALLEL {
                let kind = self.header().compression_type;
                working.push_back(compressed::compress(kind, part(next), size));
                next += 1;
            }
            let guest_cluster = first + i as u64;
            let result = match working.next().await {
                Some(Ok(Some(data))) => self.pack(guest_cluster, data).await.map(Some),
                Some(Ok(None)) => Ok(None),
                Some(Err(e)) => Err(e),
                None => unreachable!("one was begun for each cluster"),
            };
            match result {
                Ok(Some(one)) => packed.push(one),
                Ok(None) => {
                    // In the order of the disk: an error leaves what came before it.
                    self.finish_packed(std::mem::take(&mut packed)).await?;
                    let at = guest_cluster << self.cluster_bits;
                    self.write_plain(at, part(i)).await?;
                }
                Err(e) => return self.finish_packed(packed).await.and(Err(e)),
            }
        }
        self.finish_packed(packed).await
    }

    /// Finds a place for a compressed cluster.
    async fn pack(self: &Arc<Self>, guest_cluster: u64, data: Vec<u8>) -> Result<Packed> {
        match self.mapping(guest_cluster, Intent::Write).await? {
            Mapping::Unallocated | Mapping::ZeroPlain => {}
            // Compressed data never takes the place of other data.
            _ => return Err(BlockError::from_errno(libc::EIO)),
        }
        let mut meta = self.meta.lock().await;
        // Before its data, as for any other cluster.
        let l1_index = self.l1_index(guest_cluster);
        self.ensure_l2_table(&mut meta, l1_index).await?;
        let host = self.alloc_bytes(&mut meta, data.len() as u64).await?;
        drop(meta);
        if host + data.len() as u64 > CompressedDescriptor::end_max(self.cluster_bits) {
            let text = "The image file can't grow further";
            return Err(BlockError::new(ErrorKind::NoSpace, text).errno_is(libc::EFBIG));
        }
        self.inflated.forget(host);
        Ok(Packed {
            guest_cluster,
            host,
            data,
        })
    }

    /// Takes `bytes` bytes, no more than a cluster, behind those that were taken last, and returns where they are.
    ///
    /// # Errors
    /// As [`alloc_run`](Image::alloc_run).
    async fn alloc_bytes(&self, meta: &mut Meta, bytes: u64) -> Result<u64> {
        self.file.debug_event(DebugEvent::ClusterAllocBytes).await;
        let cluster_size = self.cluster_size();
        if let Some((cluster, taken)) = meta.packed {
            let at = (cluster << self.cluster_bits) + taken;
            let room = cluster_size - taken;
            let references = meta.refcounts.get(&self.file, cluster).await?;
            if references > 0 && references < meta.refcounts.max_refcount() {
                if bytes <= room {
                    self.refer_packed(meta, cluster, references).await?;
                    return Ok(self.packed_to(meta, at, bytes));
                }
                let run = self.alloc_run(meta, 1).await?;
                if run.cluster == cluster + 1 {
                    self.refer_packed(meta, cluster, references).await?;
                    return Ok(self.packed_to(meta, at, bytes));
                }
                return Ok(self.packed_to(meta, run.cluster << self.cluster_bits, bytes));
            }
        }
        let run = self.alloc_run(meta, 1).await?;
        Ok(self.packed_to(meta, run.cluster << self.cluster_bits, bytes))
    }

    async fn refer_packed(&self, meta: &mut Meta, cluster: u64, references: u64) -> Result<()> {
        meta.refcounts
            .set(&self.file, cluster, references + 1)
            .await
    }

    fn packed_to(&self, meta: &mut Meta, host: u64, bytes: u64) -> u64 {
        let end = host + bytes;
        let taken = self.in_cluster(end);
        meta.packed = (taken != 0).then_some((end >> self.cluster_bits, taken));
        host
    }

    /// Gives back bytes that nothing points at.
    async fn unalloc_bytes(&self, meta: &mut Meta, host: u64, bytes: u64) -> Result<()> {
        for cluster in host >> self.cluster_bits..(host + bytes).div_ceil(self.cluster_size()) {
            let references = meta.refcounts.get(&self.file, cluster).await?;
            if references == 1 {
                let run = Run {
                    cluster,
                    count: 1,
                    fresh: false,
                };
                self.unalloc_run(meta, run).await?;
            } else if references > 1 {
                let fewer = references - 1;
                meta.refcounts.set(&self.file, cluster, fewer).await?;
            }
        }
        Ok(())
    }

    /// Writes compressed clusters to their places, what lies side by side as one, and points the L2 entries at them.
    async fn finish_packed(self: &Arc<Self>, packed: Vec<Packed>) -> Result<()> {
        let written = self.write_packed(&packed).await;
        let mut meta = self.meta.lock().await;
        for one in packed {
            let bytes = one.data.len() as u64;
            if written.is_err() {
                self.unalloc_bytes(&mut meta, one.host, bytes).await?;
                continue;
            }
            let l1_index = self.l1_index(one.guest_cluster);
            self.ensure_l2_table(&mut meta, l1_index).await?;
            // No further: what is compressed is to be short.
            let end = (one.host + bytes).next_multiple_of(SECTOR_BYTES);
            meta.needed_length = meta.needed_length.max(end);
            self.file.debug_event(DebugEvent::L2UpdateCompressed).await;
            let entry = CompressedDescriptor::encode(one.host, bytes, self.cluster_bits);
            let entry = L2Entry::one_word(entry);
            let old = self.set_entry(&mut meta, one.guest_cluster, entry).await?;
            self.free_mapping(&mut meta, &old, false)?;
        }
        written
    }

    async fn write_packed(&self, packed: &[Packed]) -> Result<()> {
        let mut rest = packed;
        while let Some(first) = rest.first() {
            let mut all = Vec::new();
            while let Some(one) = rest.first()
                && one.host == first.host + all.len() as u64
            {
                all.extend(&one.data);
                rest = &rest[1..];
            }
            self.check_data_write(first.host, all.len() as u64)?;
            self.file.debug_event(DebugEvent::WriteCompressed).await;
            let data = IoBuf::from(all);
            self.file
                .pwritev(first.host, data, WriteFlags::empty())
                .await?;
        }
        Ok(())
    }

    /// Writes one cluster, or the part of it that the disk has, as it is.
    async fn write_plain(self: &Arc<Self>, at: u64, buf: IoBuf) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let rest = buf.slice(done..);
            done += self.write_some(at + done as u64, rest).await? as usize;
        }
        Ok(())
    }
}
