// SPDX-License-Identifier: MIT OR Apache-2.0
//! Writing guest data: in place where the cluster is this image's alone, else to a new cluster, with what the request doesn't cover copied along.
//!
//! # In place
//!
//! A run of data in `COPIED` clusters that the file already reaches behind is written where it lies, by the caller's own future, without any lock
//! (INV QCOW2-META-2). Not so with a data file that has to read as the disk does: a zero write beside it changes first the file and then the mapping, and must
//! not meet the data in between (INV QCOW2-RAW-1).
//!
//! # To new clusters
//!
//! Runs in a task of its own, since once metadata starts to change, the change finishes whoever stopped listening:
//!
//! 1. the guest clusters are entered in `changing`: other changes of their mapping wait, and this one for those before it;
//! 2. under the metadata lock, clusters are allocated; the lock is let go;
//! 3. what the request leaves out of the first and last cluster is read (COW), and data and COW are written together;
//! 4. under the metadata lock, the L2 entries are set and the old clusters freed.
//!
//! A new cluster that is written only in part makes the file reach over the whole of it, and [somewhat further](Image::extend_ahead): so that what follows is
//! in place, and not every cluster costs a change of the file's length.
//!
//! With subclusters, COW reaches to the edges of those that are written, no further, unless there is data beside them in a cluster that has to move; and a
//! cluster that is this image's alone takes in further subclusters where it lies.
//!
//! So an entry in memory never points at a cluster whose bytes are not in the file, which is half of INV QCOW2-ORD-2; `commit` is the other half.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockcore::{DebugEvent, IoBuf, IoBufMut, Result, WriteFlags};
use futures::stream::{FuturesUnordered, StreamExt};

use crate::alloc::Run;
use crate::image::{Image, Intent, cancelled};
use crate::l2_table::Mapping;

/// So many zeroes around data, in bytes, are asked of the host instead of being written. Fewer never leave a whole block of the host unwritten.
const HOST_ZEROES_MIN: u64 = 4096;

/// The most clusters that one allocation takes at a time, in bytes.
const ALLOCATION_BYTES_MAX: u64 = 64 << 20;

/// The file is made longer by so many bytes at a time.
const EXTEND_BYTES: u64 = 4 << 20;

impl Image {
    /// Writes `buf` at `offset`.
    ///
    /// # Errors
    /// Those of the file and the backing node; `NoSpace`; `Corrupt`.
    pub async fn write(self: &Arc<Self>, offset: u64, buf: IoBuf) -> Result<()> {
        self.check_sound()?;
        let end = offset + buf.len() as u64;
        self.check_end(end)?;
        // INV REQ-DROP-1: while a change is on its way that nobody waits for any more, later writes line up behind it.
        if !self.orphans.any() && !self.reads_raw() {
            let epoch = self.epochs.enter();
            if let Some(runs) = self.runs_in_place(offset, buf.len() as u64).await? {
                return self.write_in_place(offset, &runs, buf).await;
            }
            drop(epoch);
        }
        self.spawn(offset, end, move |image| async move {
            image.write_allocating(offset, buf).await
        })
        .await
    }

    /// Changes what the clusters of `start..end` (guest bytes) map to. The change runs to its end even if the caller's future is dropped, and has its
    /// place among other changes from the moment of the call: what is asked for later comes later (INV REQ-DROP-1).
    ///
    /// # Errors
    /// Those of the change; `Cancelled` if the runtime shuts down.
    pub async fn spawn<F>(
        self: &Arc<Self>,
        start: u64,
        end: u64,
        change: impl FnOnce(Arc<Image>) -> F,
    ) -> Result<()>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        self.spawn_then(start, end, change, true).await
    }

    /// As [`spawn`](Image::spawn), and no commit follows, however much has piled up: an error is one of the change itself.
    ///
    /// # Errors
    /// As [`spawn`](Image::spawn).
    pub async fn spawn_alone<F>(
        self: &Arc<Self>,
        start: u64,
        end: u64,
        change: impl FnOnce(Arc<Image>) -> F,
    ) -> Result<()>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        self.spawn_then(start, end, change, false).await
    }

    async fn spawn_then<F>(
        self: &Arc<Self>,
        start: u64,
        end: u64,
        change: impl FnOnce(Arc<Image>) -> F,
        may_commit: bool,
    ) -> Result<()>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let in_flight = self.tasks.enter_owned();
        let changing = self.changing.enter(
            start >> self.cluster_bits,
            end.div_ceil(self.cluster_size()),
            true,
        );
        let (done, _unless_dropped) = self.orphans.watch();
        let image = self.clone();
        let work = change(self.clone());
        let task = tokio::spawn(async move {
            let _in_flight = in_flight;
            let _done = done;
            changing.turn().await;
            let result = work.await;
            drop(changing);
            if may_commit {
                return result.and(image.commit_if_wanted().await);
            }
            result
        });
        task.await.unwrap_or_else(|_| Err(cancelled()))
    }

    /// The host ranges of a guest range that can all be written in place.
    async fn runs_in_place(
        self: &Arc<Self>,
        offset: u64,
        bytes: u64,
    ) -> Result<Option<Vec<(u64, u64)>>> {
        // INV REQ-PARK-1: a write to a part of a block, which may hold metadata besides, is not for the caller's own future, since a commit may have to wait.
        let block = self.storage()?.align();
        if block > self.cluster_size() {
            return Ok(None);
        }
        let mut runs = Vec::with_capacity(1);
        let mut at = offset;
        let end = offset + bytes;
        while at < end {
            let (mapping, n) = match self.run_now(at, end - at) {
                Some(found) => found,
                None => self.run(at, end - at, Intent::Write).await?,
            };
            // INV QCOW2-META-2: a cluster that somebody else may see is never written in place.
            let Mapping::Data { host, copied: true } = mapping else {
                return Ok(None);
            };
            let host = host + self.in_cluster(at);
            // INV REQ-PARK-1: a write that makes the file longer is not for the caller's own future, since a commit may have to wait for it.
            let needed = match self.has_data_file() {
                true => host + n,
                false => (host + n).next_multiple_of(self.subcluster_size().max(block)),
            };
            if needed > self.storage()?.length() {
                return Ok(None);
            }
            runs.push((host, n));
            at += n;
        }
        Ok(Some(runs))
    }

    async fn write_in_place(&self, offset: u64, runs: &[(u64, u64)], buf: IoBuf) -> Result<()> {
        if let [(host, bytes)] = *runs {
            self.check_data_write(host, bytes)?;
            self.file.debug_event(DebugEvent::WriteAio).await;
            return self.write_data(offset, host, buf).await;
        }
        let mut writes = FuturesUnordered::new();
        let mut done = 0;
        for &(host, bytes) in runs {
            self.check_data_write(host, bytes)?;
            let part = buf.slice(done..done + bytes as usize);
            self.file.debug_event(DebugEvent::WriteAio).await;
            writes.push(self.write_data(offset + done as u64, host, part));
            done += bytes as usize;
        }
        let mut result = Ok(());
        while let Some(one) = writes.next().await {
            result = result.and(one);
        }
        result
    }

    /// Writes guest data to where it lies, encrypted if it has to be. INV QCOW2-CRYPT-1
    pub(crate) async fn write_data(&self, offset: u64, host: u64, buf: IoBuf) -> Result<()> {
        let data = self.encrypt(offset, host, buf).await?;
        self.storage()?
            .pwritev(host, data, WriteFlags::empty())
            .await
    }

    /// As [`write`](Image::write), whatever the clusters are. The caller holds `changing`.
    pub(crate) async fn write_allocating(self: Arc<Self>, offset: u64, buf: IoBuf) -> Result<()> {
        let _epoch = self.epochs.enter();
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let rest = buf.slice((at - offset) as usize..);
            at += self.write_some(at, rest).await?;
        }
        Ok(())
    }

    /// Writes the first part of `buf` that can be treated in one way, and says how long it was. The caller holds `changing` and an epoch.
    pub(crate) async fn write_some(self: &Arc<Self>, at: u64, buf: IoBuf) -> Result<u64> {
        let (mapping, bytes) = self.run(at, buf.len() as u64, Intent::Write).await?;
        match mapping {
            Mapping::Data { host, copied: true } => {
                self.write_in_place(
                    at,
                    &[(host + self.in_cluster(at), bytes)],
                    buf.slice(..bytes as usize),
                )
                .await?;
                Ok(bytes)
            }
            Mapping::ZeroAllocated { host, copied: true }
            | Mapping::Reserved { host, copied: true } => {
                let count = (self.in_cluster(at) + bytes).div_ceil(self.cluster_size());
                let run = Run {
                    cluster: host >> self.cluster_bits,
                    count,
                    fresh: false,
                };
                let written = self.whole_subclusters(at, at + bytes);
                let buf = buf.slice(..bytes as usize);
                let filled = self.fill_run(at, buf, run, &written).await;
                if filled.is_ok() || self.reads_raw() {
                    // INV QCOW2-RAW-1: whatever has come of it, the file is what the disk reads as.
                    filled.and(self.link_run(written, run, false).await)?;
                    return Ok(bytes);
                }
                filled.map(|()| bytes)
            }
            _ => {
                let bytes = self.needs_allocation(at, buf.len() as u64).await?;
                self.write_new(at, buf.slice(..bytes as usize)).await?;
                Ok(bytes)
            }
        }
    }

    /// For how many bytes from `at` on every cluster needs a new place, within one L2 table.
    async fn needs_allocation(self: &Arc<Self>, at: u64, bytes: u64) -> Result<u64> {
        let table_bytes = 1u64 << (self.l2_bits() + self.cluster_bits);
        let table_end = (at / table_bytes + 1) * table_bytes;
        let end = (at + bytes).min(table_end).min(at + ALLOCATION_BYTES_MAX);
        let mut found = at;
        while found < end {
            match self.run(found, end - found, Intent::Write).await? {
                (
                    Mapping::Data { copied: true, .. }
                    | Mapping::ZeroAllocated { copied: true, .. }
                    | Mapping::Reserved { copied: true, .. },
                    _,
                ) => break,
                (_, n) => found += n,
            }
        }
        Ok(found - at)
    }

    /// The subclusters that a guest range touches.
    fn whole_subclusters(&self, start: u64, end: u64) -> Range<u64> {
        let size = self.subcluster_size();
        start / size * size..end.next_multiple_of(size)
    }

    /// What has to be written when a guest range goes to new clusters: the subclusters that it touches, and all that its clusters hold of data.
    async fn cow_range(self: &Arc<Self>, start: u64, end: u64) -> Result<Range<u64>> {
        let mut range = self.whole_subclusters(start, end);
        for cluster in [start >> self.cluster_bits, (end - 1) >> self.cluster_bits] {
            let guest = cluster << self.cluster_bits;
            if let Some(data) = self.entries().data_range(self.entry(cluster).await?) {
                range.start = range.start.min(guest + data.start);
                range.end = range.end.max(guest + data.end);
            }
        }
        Ok(range)
    }

    async fn write_new(self: &Arc<Self>, at: u64, buf: IoBuf) -> Result<()> {
        let first = at >> self.cluster_bits;
        let bytes = buf.len() as u64;
        let count = (self.in_cluster(at) + buf.len() as u64).div_ceil(self.cluster_size());
        let written = self.cow_range(at, at + bytes).await?;
        let mut run = {
            let mut meta = self.meta.lock().await;
            self.ensure_l2_table(&mut meta, self.l1_index(first))
                .await?;
            self.alloc_data(&mut meta, first, count).await?
        };
        // Subclusters are small enough to be written whole, and the file has to reach no further. Where data is encrypted, what is not written is noise.
        run.fresh &= !self.entries().is_extended && !self.is_encrypted();
        let sparse = run.fresh && (self.in_cluster(at) | bytes) & (self.cluster_size() - 1) != 0;
        let filled = async {
            if sparse {
                // The next commit would do it, too. Until then every write to the rest of the cluster would have to make the file longer.
                let end = (run.cluster + run.count) << self.cluster_bits;
                self.extend_ahead(end).await?;
            }
            self.fill_run(at, buf, run, &written).await
        };
        let filled = filled.await;
        if filled.is_err() && !self.reads_raw() {
            let mut meta = self.meta.lock().await;
            self.unalloc_data(&mut meta, run).await?;
            return filled;
        }
        // INV QCOW2-RAW-1: whatever has come of it, such a file is what the disk reads as.
        filled.and(self.link_run(written, run, sparse).await)
    }

    /// Makes the file reach to `end`, and further, as writes to new clusters come in rows and each would have to do it. What is too much is
    /// [cut off](Image::cut_ahead) when the image is closed.
    async fn extend_ahead(&self, end: u64) -> Result<()> {
        if self.file.length() >= end {
            return Ok(());
        }
        self.extended_ahead.store(true, Ordering::Release);
        // Writes that come together want the same, and the first one does it for all.
        match self.file.extend(end.next_multiple_of(EXTEND_BYTES)).await {
            Ok(()) => Ok(()),
            // The host may have a limit that is nearer.
            Err(_) => self.file.extend(end).await,
        }
    }

    /// Writes `buf` to where it belongs in the host clusters of `run`, with what the guest clusters hold around it: `written` in all.
    async fn fill_run(
        self: &Arc<Self>,
        at: u64,
        buf: IoBuf,
        run: Run,
        written: &Range<u64>,
    ) -> Result<()> {
        let end = at + buf.len() as u64;
        let mut written = written.clone();
        let disk_end = written.end.min(self.size()).max(end);
        if self.has_data_file() && written.end > disk_end {
            // It is as long as the disk, unless a hole would read as noise when the disk grows over it. What a longer file has there is none of the disk's, but
            // where data is encrypted it can only be ciphertext. A device can't be longer than it is.
            let storage = self.storage()?;
            let is_whole = match written.end <= storage.length() {
                true => self.is_encrypted(),
                false => !self.holes_are_zero() && storage.extend(written.end).await.is_ok(),
            };
            written.end = if is_whole { written.end } else { disk_end };
        }
        let host = (run.cluster << self.cluster_bits) + self.in_cluster(written.start);
        self.check_data_write(host, written.end - written.start)?;
        let may_skip = run.fresh || (self.entries().is_extended && !self.is_encrypted());
        let mut head = self.cow_part(written.start..at, may_skip).await?;
        let mut tail = self.cow_part(end..written.end, may_skip).await?;
        if !run.fresh && may_skip {
            let is_all_zero = head.is_none() && tail.is_none();
            let around = (at - written.start) + (written.end - end);
            if !is_all_zero || !self.zero_host(host, &written, around).await? {
                head.get_or_insert_with(|| IoBuf::zeroes((at - written.start) as usize));
                tail.get_or_insert_with(|| IoBuf::zeroes((written.end - end) as usize));
            }
        }
        let from = if head.is_some() { written.start } else { at };
        let start = host + (from - written.start);
        let mut all = head.unwrap_or_default();
        all.append(buf);
        all.append(tail.unwrap_or_default());
        self.file.debug_event(DebugEvent::WriteAio).await;
        self.write_data(from, start, all).await
    }

    /// Has the host make zeroes of all that is going to be written, if there are enough of them `around` the data, and it can.
    async fn zero_host(&self, host: u64, written: &Range<u64>, around: u64) -> Result<bool> {
        if around < HOST_ZEROES_MIN {
            return Ok(false);
        }
        let bytes = written.end - written.start;
        let zeroed = self
            .storage()?
            .pwrite_zeroes(host, bytes, WriteFlags::NO_FALLBACK);
        match zeroed.await {
            Ok(()) => Ok(true),
            Err(e) if e.errno() == libc::ENOTSUP => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// What a guest range inside one cluster reads as. `None`: nothing, or zero, if the caller `may_skip` zeroes.
    ///
    /// What lies past the end of the disk is zero, whatever the backing node has there: it must not show when the disk grows. The VM state behind it is data.
    async fn cow_part(
        self: &Arc<Self>,
        range: Range<u64>,
        may_skip: bool,
    ) -> Result<Option<IoBuf>> {
        if range.is_empty() {
            return Ok(None);
        }
        let is_vm_state = range.start >= self.vm_state_offset();
        let visible_end = match is_vm_state {
            true => range.end,
            false => range.end.min(self.size()),
        };
        let mut part = IoBuf::default();
        let mut is_zero = true;
        let mut at = range.start;
        while at < visible_end {
            let (mapping, n) = self.run(at, visible_end - at, Intent::Write).await?;
            let old = self.cow_read(mapping, at, n).await?;
            is_zero &= old.as_ref().is_none_or(|old| may_skip && old.is_zero());
            part.append(old.unwrap_or_else(|| IoBuf::zeroes(n as usize)));
            at += n;
        }
        if may_skip && is_zero {
            return Ok(None);
        }
        part.append(IoBuf::zeroes((range.end - at) as usize));
        Ok(Some(part))
    }

    /// What a range that one mapping covers reads as; `None` where that is zero without a look.
    async fn cow_read(&self, mapping: Mapping, offset: u64, bytes: u64) -> Result<Option<IoBuf>> {
        let is_zero = match mapping {
            Mapping::ZeroPlain | Mapping::ZeroAllocated { .. } => true,
            Mapping::Unallocated | Mapping::Reserved { .. } => {
                self.backing.as_ref().is_none_or(|b| offset >= b.length())
            }
            Mapping::Data { .. } | Mapping::Compressed(_) => false,
        };
        if is_zero {
            return Ok(None);
        }
        self.file.debug_event(DebugEvent::CowRead).await;
        let buf = IoBufMut::zeroed(bytes as usize);
        let old = self.read_mapped(mapping, offset, buf).await?;
        Ok(Some(old.freeze()))
    }

    /// Says in the L2 entries that `written`, in guest bytes, lies in the host clusters of `run`, and frees what they pointed at before.
    async fn link_run(self: &Arc<Self>, written: Range<u64>, run: Run, sparse: bool) -> Result<()> {
        let first = written.start >> self.cluster_bits;
        let mut meta = self.meta.lock().await;
        self.ensure_l2_table(&mut meta, self.l1_index(first))
            .await?;
        if !self.has_data_file() && !self.entries().is_extended {
            meta.needs_file_to(run, self.cluster_bits);
        }
        if sparse {
            meta.reserve_later(run, self.cluster_bits);
        }
        for i in 0..run.count {
            let host = (run.cluster + i) << self.cluster_bits;
            let guest = (first + i) << self.cluster_bits;
            let end = written.end.min(guest + self.cluster_size());
            let part = written.start.max(guest) - guest..end - guest;
            let old = self.entry(first + i).await?;
            let new = self.entries().written(old, host, part);
            let old = self.set_entry(&mut meta, first + i, new).await?;
            match old.referenced(self.cluster_size()) {
                // The cluster was kept for this.
                Some((kept, _)) if kept == host => {}
                _ => self.free_mapping(&mut meta, &old, false)?,
            }
        }
        Ok(())
    }
}
