// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`convert`]: copies disks to another one, sparsely and with several requests in flight. `QEMU: img_convert`.
//!
//! Workers take steps off a common plan: a run that reads as zero (never read), a run that the target's backing file has already, or up to
//! [`CHUNK_BYTES`] of data. Data that turn out to be zero become holes too. In order, a step is written only after the one before it: the target's clusters then lie
//! in the order of the disk. The memory used is one chunk for each worker, whatever the images are.

use futures::stream::{FuturesUnordered, TryStreamExt};
use tokio::sync::{Mutex, watch};

use blockcore::buffer::{BufferPool, slice_is_zero};
use blockcore::{
    Backend, BlockError, Diagnostics, IoBuf, IoBufMut, Node, ReadFlags, Result, SECTOR_BYTES,
    StatusFlags, StatusMode, WriteFlags, chain_below, chain_status,
};
use std::sync::Arc;

use crate::progress::Job;

/// The most that is read and written at once, in bytes.
pub const CHUNK_BYTES: u64 = 2 << 20;

/// The most workers that a copy may have.
pub const MAX_PARALLEL: usize = 16;

/// How to copy.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// Runs of zeroes at least this long, in bytes, become holes. 0: everything is written, zeroes too.
    pub sparse_bytes: u64,
    /// How many steps are in flight at most.
    pub parallel: usize,
    /// Write in the order of the disk.
    pub in_order: bool,
    /// The target reads as zero all over, so that zeroes need not be written.
    pub target_is_zero: bool,
    /// The length of the target's backing file, if it has one; it then reads as the backing file of the source does, and only what the
    /// source's top layer holds is copied.
    pub target_backing: Option<u64>,
    /// Look through the sources before anything is copied, so that the job's progress counts only what has to be written. Else it counts the whole
    /// length, holes too.
    pub measure_first: bool,
    /// Write the data compressed, in whole clusters of the target.
    pub compressed: bool,
    /// Sectors that can't be read become zeroes, each with a warning, instead of ending the copy.
    pub salvage: Option<Diagnostics>,
}

impl Default for ConvertOptions {
    fn default() -> ConvertOptions {
        ConvertOptions {
            sparse_bytes: 4096,
            parallel: 8,
            in_order: true,
            target_is_zero: false,
            target_backing: None,
            measure_first: false,
            compressed: false,
            salvage: None,
        }
    }
}

/// Copies `sources`, one behind the other, to the beginning of `target`, which has to be long enough.
///
/// *If the future is dropped*, or the job cancelled: every part of the target holds what it did before or what it was to get. Nothing is flushed.
///
/// # Errors
/// `error while reading at byte N: ...` or `error while writing at byte N: ...`, where N counts through all sources; `Cancelled`.
pub async fn convert(
    sources: &[Backend],
    target: &Backend,
    options: &ConvertOptions,
    job: &Job,
) -> Result<()> {
    let mut starts = Vec::with_capacity(sources.len());
    let mut total = 0;
    for source in sources {
        starts.push(total);
        total += source.length();
    }
    let block = match options.sparse_bytes {
        0 => SECTOR_BYTES,
        n => 1 << n.ilog2(),
    };
    let cluster = match options.compressed {
        true => target.root().driver().info().await?.cluster_size.max(1),
        false => 1,
    };
    let copy = Copy {
        sources,
        starts,
        total,
        target,
        options,
        job,
        cluster,
        zero_block: block.max(target.root().limits().request_alignment.into()),
        plan: Mutex::new(Plan {
            at: 0,
            run_end: 0,
            run: Run::Kept,
        }),
        written: watch::Sender::new(0),
        buffers: BufferPool::new(CHUNK_BYTES as usize),
    };
    job.begin(match options.measure_first {
        true => copy.measure().await?,
        false => total,
    });
    let workers: FuturesUnordered<_> = (0..options.parallel.clamp(1, MAX_PARALLEL))
        .map(|_| copy.work())
        .collect();
    workers.try_collect().await
}

/// What a range of the source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    /// Has to be read.
    Data,
    /// Reads as zero.
    Zero,
    /// The target's backing file has it.
    Kept,
}

/// Where the next step begins.
struct Plan {
    at: u64,
    /// Up to here the source is as `run` says.
    run_end: u64,
    run: Run,
}

#[derive(Clone, Copy)]
struct Step {
    at: u64,
    bytes: u64,
    run: Run,
}

struct Copy<'a> {
    sources: &'a [Backend],
    /// Where each source begins in the target.
    starts: Vec<u64>,
    total: u64,
    target: &'a Backend,
    options: &'a ConvertOptions,
    job: &'a Job,
    /// Steps begin and end at multiples of this many bytes, or at the end: the target's cluster, if data is to be compressed, else 1.
    cluster: u64,
    /// Zeroes are looked for in blocks of this many bytes, a power of two.
    zero_block: u64,
    plan: Mutex<Plan>,
    /// Everything before this is done; kept only when writing in order.
    written: watch::Sender<u64>,
    /// One for each worker.
    buffers: BufferPool,
}

impl Copy<'_> {
    async fn work(&self) -> Result<()> {
        let mut written = self.written.subscribe();
        while let Some(step) = self.next_step().await? {
            self.job.check()?;
            let data = match step.run {
                Run::Data => Some(self.read(step).await?),
                Run::Zero if self.options.sparse_bytes == 0 => {
                    Some(IoBuf::zeroes(step.bytes as usize))
                }
                Run::Zero | Run::Kept => None,
            };
            if self.options.in_order {
                // The sender lives as long as this call does.
                let _turn = written.wait_for(|&at| at == step.at).await;
            }
            let done = match (data, step.run) {
                (Some(data), _) => self.write(step.at, data).await,
                (None, Run::Zero) => self.zero(step.at, step.bytes).await,
                (None, _) => Ok(()),
            };
            done.map_err(|(at, e)| failed("writing", at, e))?;
            if self.options.in_order {
                self.written.send_replace(step.at + step.bytes);
            }
            if self.is_written(step.run) || !self.options.measure_first {
                self.job.advance(step.bytes);
            }
        }
        Ok(())
    }

    /// Whether a run of this kind has to be written, as far as is known before it is read.
    fn is_written(&self, run: Run) -> bool {
        match run {
            Run::Data => true,
            Run::Zero => self.options.sparse_bytes == 0,
            Run::Kept => false,
        }
    }

    /// How many bytes have to be written.
    async fn measure(&self) -> Result<u64> {
        let (mut at, mut written) = (0, 0);
        while at < self.total {
            self.job.check()?;
            let (run, bytes) = self.status(at).await?;
            if self.is_written(run) {
                written += bytes;
            }
            at += bytes;
        }
        Ok(written)
    }

    /// The source that holds an offset, with where it begins.
    fn source_at(&self, at: u64) -> (&Backend, u64) {
        let after = self.starts.partition_point(|&start| start <= at);
        // Empty sources begin where the next one does: the last one that begins here has the byte.
        (&self.sources[after - 1], self.starts[after - 1])
    }

    async fn next_step(&self) -> Result<Option<Step>> {
        let mut plan = self.plan.lock().await;
        if plan.at >= self.total {
            return Ok(None);
        }
        if plan.at >= plan.run_end {
            let (run, bytes) = self.status(plan.at).await?;
            plan.run = run;
            plan.run_end = plan.at + bytes;
        }
        let mut step = Step {
            at: plan.at,
            bytes: plan.run_end - plan.at,
            run: plan.run,
        };
        if self.is_written(step.run) {
            step.bytes = step.bytes.min(CHUNK_BYTES.max(self.cluster));
        }
        self.in_clusters(&mut step);
        plan.at += step.bytes;
        Ok(Some(step))
    }

    /// Makes a step end at a multiple of `cluster`, or at the end. A cluster that is not all zero, or kept, is data.
    fn in_clusters(&self, step: &mut Step) {
        let end = step.at + step.bytes;
        if end == self.total || end.is_multiple_of(self.cluster) {
            return;
        }
        let whole = end / self.cluster * self.cluster;
        let end = match self.is_written(step.run) {
            false if whole > step.at => whole,
            _ => {
                step.run = Run::Data;
                end.next_multiple_of(self.cluster).min(self.total)
            }
        };
        step.bytes = end - step.at;
    }

    async fn status(&self, at: u64) -> Result<(Run, u64)> {
        let (source, start) = self.source_at(at);
        let top: &Arc<Node> = source.root();
        let mut bytes = source.length() - (at - start);
        let past_backing = match self.options.target_backing {
            Some(length) if at < length => {
                bytes = bytes.min(length - at);
                false
            }
            Some(_) => true,
            None => false,
        };
        let base = self.options.target_backing.and_then(|_| chain_below(top));
        let found =
            match chain_status(top, base.as_ref(), at - start, bytes, StatusMode::Precise).await {
                Ok(found) => found.status,
                Err(e) if self.options.salvage.is_some() => {
                    let warn = self.options.salvage.as_ref();
                    let text = format!(
                        "error while reading block status at offset {at}: {}",
                        e.strerror()
                    );
                    warn.inspect(|w| w.warn(&text));
                    return Ok((Run::Data, SECTOR_BYTES.min(bytes)));
                }
                Err(e) => {
                    let text = format!(
                        "error while reading block status at offset {at}: {}",
                        e.strerror()
                    );
                    return Err(e.message(text));
                }
            };
        let run = if found.is_zero() {
            // Past the end of the target's backing file, its unallocated clusters read as zero.
            if past_backing { Run::Kept } else { Run::Zero }
        } else if found.flags.contains(StatusFlags::DATA) || self.options.target_backing.is_none() {
            Run::Data
        } else {
            Run::Kept
        };
        Ok((run, found.bytes.clamp(1, bytes)))
    }

    /// Reads what may lie in several sources.
    async fn read(&self, step: Step) -> Result<IoBuf> {
        let mut all = IoBuf::default();
        while (all.len() as u64) < step.bytes {
            let at = step.at + all.len() as u64;
            let (source, start) = self.source_at(at);
            let there = source.length() - (at - start);
            let bytes = (step.bytes - all.len() as u64).min(there);
            let part = self.read_source(Step { at, bytes, ..step }).await?;
            if bytes == step.bytes {
                return Ok(part);
            }
            all.append(part);
        }
        Ok(all)
    }

    async fn read_source(&self, step: Step) -> Result<IoBuf> {
        let (source, start) = self.source_at(step.at);
        let from = step.at - start;
        let buf = self.buffers.take(step.bytes as usize);
        match source.preadv(from, buf, ReadFlags::empty()).await {
            Ok(buf) => Ok(buf.freeze()),
            Err(e) => match &self.options.salvage {
                None => Err(failed("reading", step.at, e)),
                Some(warnings) => self.salvage(source, step, from, warnings).await,
            },
        }
    }

    /// Reads sector by sector what can't be read at once.
    async fn salvage(
        &self,
        source: &Backend,
        step: Step,
        from: u64,
        warnings: &Diagnostics,
    ) -> Result<IoBuf> {
        let mut all = IoBufMut::default();
        let mut done = 0;
        while done < step.bytes {
            self.job.check()?;
            let n = SECTOR_BYTES.min(step.bytes - done) as usize;
            match source.read(from + done, n).await {
                Ok(sector) => all.append(sector),
                Err(e) => {
                    warnings.warn(failed("reading", step.at + done, e).text().as_str());
                    all.append(IoBufMut::zeroed(n));
                }
            }
            done += n as u64;
        }
        Ok(IoBuf::from(all.to_vec()))
    }

    /// Writes data, leaving holes where they are zero. The offset goes with an error.
    async fn write(&self, at: u64, data: IoBuf) -> Result<(), (u64, BlockError)> {
        if self.options.compressed {
            return self.write_clusters(at, data).await;
        }
        if self.options.sparse_bytes == 0 {
            return self.write_run(at, data).await;
        }
        let Some(bytes) = data.as_slice() else {
            return self.write_run(at, data).await;
        };
        let mut done = 0;
        while done < bytes.len() {
            let here = at + done as u64;
            let (is_data, n) = next_run(
                &bytes[done..],
                here,
                self.zero_block,
                self.options.sparse_bytes,
            );
            if is_data {
                self.write_run(here, data.slice(done..done + n)).await?;
            } else {
                self.zero(here, n as u64).await?;
            }
            done += n;
        }
        Ok(())
    }

    /// Writes data compressed, leaving out clusters that are zero.
    async fn write_clusters(&self, at: u64, data: IoBuf) -> Result<(), (u64, BlockError)> {
        let bytes = data.len();
        let size = self.cluster as usize;
        let is_zero = |from: usize| {
            let cluster = data.slice(from..(from + size).min(bytes));
            self.options.sparse_bytes > 0 && cluster.is_zero()
        };
        let mut done = 0;
        while done < bytes {
            let zero = is_zero(done);
            let mut end = (done + size).min(bytes);
            while end < bytes && is_zero(end) == zero {
                end = (end + size).min(bytes);
            }
            let here = at + done as u64;
            if zero {
                self.zero(here, (end - done) as u64).await?;
            } else {
                self.write_compressed(here, data.slice(done..end)).await?;
            }
            done = end;
        }
        Ok(())
    }

    async fn write_compressed(&self, at: u64, data: IoBuf) -> Result<(), (u64, BlockError)> {
        let end = at + data.len() as u64;
        let whole = match end == self.target.length() {
            true => data.len(),
            // The sources end in the middle of a cluster of a longer target.
            false => data.len() / self.cluster as usize * self.cluster as usize,
        };
        if whole > 0 {
            let packed = self.target.pwritev_compressed(at, data.slice(..whole));
            packed.await.map_err(|e| (at, e))?;
        }
        if whole < data.len() {
            self.write_run(at + whole as u64, data.slice(whole..))
                .await?;
        }
        Ok(())
    }

    async fn write_run(&self, at: u64, data: IoBuf) -> Result<(), (u64, BlockError)> {
        self.target
            .pwritev(at, data, WriteFlags::empty())
            .await
            .map_err(|e| (at, e))
    }

    async fn zero(&self, at: u64, bytes: u64) -> Result<(), (u64, BlockError)> {
        if self.options.target_is_zero {
            return Ok(());
        }
        self.target
            .pwrite_zeroes(at, bytes, WriteFlags::MAY_UNMAP)
            .await
            .map_err(|e| (at, e))
    }
}

fn failed(what: &str, at: u64, e: BlockError) -> BlockError {
    let text = format!("error while {what} at byte {at}: {}", e.strerror());
    e.message(text)
}

/// Whether `bytes`, which lie at `at`, begin with data or with zeroes, and how long that run is. Runs change at multiples of `block` only, and
/// zeroes between data count as data unless there are `min` bytes of them.
fn next_run(bytes: &[u8], at: u64, block: u64, min: u64) -> (bool, usize) {
    let mut blocks = Blocks { bytes, at, block };
    let Some((first_zero, mut len)) = blocks.next() else {
        return (true, bytes.len());
    };
    if first_zero {
        len += blocks
            .take_while(|&(zero, _)| zero)
            .map(|(_, n)| n)
            .sum::<usize>();
        return (false, len);
    }
    let mut zeroes = 0;
    for (zero, n) in blocks {
        if !zero {
            len += zeroes + n;
            zeroes = 0;
            continue;
        }
        zeroes += n;
        if zeroes as u64 >= min {
            return (true, len);
        }
    }
    // Zeroes at the end that are too few, but with nothing behind them here: still a hole, if there are whole blocks of them.
    (true, len)
}

/// The blocks of a range: whether each is zero, and its length. The first and the last may be cut.
struct Blocks<'a> {
    bytes: &'a [u8],
    at: u64,
    block: u64,
}

impl Iterator for Blocks<'_> {
    type Item = (bool, usize);

    fn next(&mut self) -> Option<(bool, usize)> {
        if self.bytes.is_empty() {
            return None;
        }
        let to_end = self.block - self.at % self.block;
        let n = (to_end as usize).min(self.bytes.len());
        let (now, later) = self.bytes.split_at(n);
        self.bytes = later;
        self.at += n as u64;
        Some((slice_is_zero(now), n))
    }
}

#[cfg(test)]
mod tests;
