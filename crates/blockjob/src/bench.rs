// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`Bench`]: many equal requests, a number of them in flight at once. `QEMU: img_bench`.
//!
//! One slot is one buffer, used over and over. A read first tries to be done on the spot, which needs no future and no allocation; only what has to
//! wait becomes a future. So what is measured is the block layer, not the bench.

use std::fmt;

use blockcore::{Backend, BlockError, IoBuf, IoBufMut, ReadFlags, Result, WriteFlags};
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{FuturesUnordered, StreamExt};

use crate::progress::Job;

/// How many requests are done on the spot before other tasks get a turn.
const YIELD_EVERY: u64 = 64;

/// Reads or writes.
#[derive(Clone, Debug)]
pub enum Direction {
    /// Reads.
    Read,
    /// Writes of this byte.
    Write {
        /// The byte.
        pattern: u8,
        /// A flush after every so many requests; 0: none.
        flush_interval: u64,
        /// Before a flush, wait for the requests in flight.
        drain_on_flush: bool,
    },
}

/// What to do.
#[derive(Clone, Debug)]
pub struct Bench {
    /// How many requests.
    pub count: u64,
    /// How many of them at once.
    pub depth: usize,
    /// Bytes in each.
    pub request_bytes: usize,
    /// Where the first begins, in bytes.
    pub offset: u64,
    /// How much further each next one begins, in bytes. At the end of the disk it goes on at the beginning.
    pub step: u64,
    /// Reads or writes.
    pub direction: Direction,
}

/// What failed.
#[derive(Debug)]
pub enum BenchFailure {
    /// A read or write.
    Request(BlockError),
    /// A flush.
    Flush(BlockError),
}

impl fmt::Display for BenchFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BenchFailure::Request(e) => write!(f, "Failed request: {}", e.strerror()),
            BenchFailure::Flush(e) => write!(f, "Failed flush request: {}", e.strerror()),
        }
    }
}

impl std::error::Error for BenchFailure {}

enum Done {
    Read(IoBufMut),
    Write,
    Flush,
}

type InFlight<'a> = FuturesUnordered<BoxFuture<'a, Result<Done, BenchFailure>>>;

impl Bench {
    /// Does it.
    ///
    /// *If the future is dropped*: requests in flight are done or not.
    ///
    /// # Errors
    /// The first request or flush that failed.
    pub async fn run(&self, disk: &Backend, job: &Job) -> Result<(), BenchFailure> {
        job.begin(self.count);
        match self.direction {
            Direction::Read => self.reads(disk, job).await,
            Direction::Write {
                pattern,
                flush_interval,
                drain_on_flush,
            } => {
                let data = IoBuf::from(vec![pattern; self.request_bytes]);
                self.writes(disk, job, data, flush_interval, drain_on_flush)
                    .await
            }
        }
    }

    /// Where the request after the one at `at` begins.
    fn next_offset(&self, at: u64, length: u64) -> u64 {
        at.saturating_add(self.step)
            .checked_rem(length)
            .unwrap_or(0)
    }

    async fn reads(&self, disk: &Backend, job: &Job) -> Result<(), BenchFailure> {
        let length = disk.length();
        let align = (disk.root().limits().mem_alignment as usize).max(4096);
        let mut made = 0;
        let mut free: Vec<IoBufMut> = Vec::new();
        let mut waiting = InFlight::new();
        let mut at = self.offset;
        let mut left = self.count;
        while left > 0 {
            job.check().map_err(BenchFailure::Request)?;
            let mut burst = left.min(YIELD_EVERY);
            while burst > 0 {
                let mut buf = match free.pop() {
                    Some(buf) => buf,
                    None if made < self.depth => {
                        made += 1;
                        IoBufMut::zeroed_aligned(self.request_bytes, align)
                    }
                    None => break,
                };
                let here = at;
                at = self.next_offset(at, length);
                burst -= 1;
                left -= 1;
                if buf
                    .as_mut_slice()
                    .is_some_and(|b| disk.read_nowait(here, b))
                {
                    free.push(buf);
                    continue;
                }
                let read = disk.preadv(here, buf, ReadFlags::empty());
                waiting.push(
                    read.map(|r| r.map(Done::Read).map_err(BenchFailure::Request))
                        .boxed(),
                );
            }
            if waiting.is_empty() {
                tokio::task::yield_now().await;
                continue;
            }
            // One has to end before there is room for another; take along all that have.
            let mut next = if free.is_empty() && made == self.depth {
                waiting.next().await
            } else {
                waiting.next().now_or_never().flatten()
            };
            while let Some(done) = next {
                if let Done::Read(buf) = done? {
                    free.push(buf);
                }
                next = waiting.next().now_or_never().flatten();
            }
        }
        while let Some(done) = waiting.next().await {
            done?;
        }
        job.advance(self.count);
        Ok(())
    }

    async fn writes(
        &self,
        disk: &Backend,
        job: &Job,
        data: IoBuf,
        flush_interval: u64,
        drain_on_flush: bool,
    ) -> Result<(), BenchFailure> {
        let length = disk.length();
        let mut waiting = InFlight::new();
        let (mut at, mut left, mut in_flight, mut ended) = (self.offset, self.count, 0, 0);
        while left > 0 || in_flight > 0 {
            job.check().map_err(BenchFailure::Request)?;
            // With draining, the requests of one interval end before the flush, and the flush before the next interval.
            let interval_left = match (drain_on_flush, flush_interval) {
                (true, n) if n > 0 => n - (self.count - left) % n,
                _ => u64::MAX,
            };
            let mut room = interval_left.min(left);
            if drain_on_flush
                && flush_interval > 0
                && interval_left == flush_interval
                && ended < self.count - left
            {
                room = 0;
            }
            while room > 0 && in_flight < self.depth {
                let write = disk.pwritev(at, data.clone(), WriteFlags::empty());
                waiting.push(
                    write
                        .map(|r| r.map(|()| Done::Write).map_err(BenchFailure::Request))
                        .boxed(),
                );
                at = self.next_offset(at, length);
                left -= 1;
                room -= 1;
                in_flight += 1;
            }
            let Some(done) = waiting.next().await else {
                break;
            };
            if !matches!(done?, Done::Write) {
                continue;
            }
            in_flight -= 1;
            ended += 1;
            if flush_interval > 0 && ended % flush_interval == 0 {
                if drain_on_flush {
                    disk.flush().await.map_err(BenchFailure::Flush)?;
                } else {
                    let flush = disk.flush();
                    waiting.push(
                        flush
                            .map(|r| r.map(|()| Done::Flush).map_err(BenchFailure::Flush))
                            .boxed(),
                    );
                }
            }
        }
        while let Some(done) = waiting.next().await {
            done?;
        }
        job.advance(self.count);
        Ok(())
    }
}
