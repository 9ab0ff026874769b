// SPDX-License-Identifier: MIT OR Apache-2.0
//! `crash`: a disk in memory that keeps a log of every change and every flush, and rebuilds what a power cut could leave.
//!
//! # Fault model
//!
//! * What was written before a completed flush began is there.
//! * Of what was written since, any subset is there, in any order, each write torn at sector boundaries: every sector holds what one of the writes
//!   to it put there, or what was there before.
//! * A change of length behaves like a write: it may be there or not. What was never written reads as zero.
//! * Disks that share a log ([`CrashDriver::beside`]) lose power together. A flush of one says nothing about the others.

use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;

use super::memory::MemoryDriver;
use super::rng::Rng;
use crate::buffer::{IoBuf, IoBufMut};
use crate::driver::{BlockDriver, ReadFlags, TruncateRequest, WriteFlags};
use crate::error::Result;
use crate::node::{Node, NodeConfig, NodeFlags, SECTOR_BYTES};

/// One entry of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogEntry {
    /// These bytes were written, zeroed or discarded at this offset.
    Write {
        /// Byte offset.
        offset: u64,
        /// What the bytes became.
        data: Vec<u8>,
    },
    /// The length became this many bytes.
    Length(u64),
    /// A flush has ended: of the first so many entries of the log, those of this disk are durable. What was written while it ran may not be.
    Flush(usize),
}

/// What happened to which of the disks that share a log.
type Log = Vec<(usize, LogEntry)>;

/// A disk in memory with a log. Clones share both.
#[derive(Clone, Debug)]
pub struct CrashDriver {
    disk: MemoryDriver,
    base: Arc<Vec<u8>>,
    /// Which of the disks of the log this is.
    number: usize,
    log: Arc<Mutex<Log>>,
}

impl CrashDriver {
    /// A disk with these bytes on it, all of them durable.
    pub fn new(bytes: Vec<u8>) -> CrashDriver {
        let mut disk = MemoryDriver::new(bytes.clone());
        disk.nowait = true;
        CrashDriver {
            disk,
            base: Arc::new(bytes),
            number: 0,
            log: Arc::default(),
        }
    }

    /// Another disk that loses power at the same time: it shares the log. `number` is not 0, and no other disk's of this log.
    pub fn beside(&self, bytes: Vec<u8>, number: usize) -> CrashDriver {
        CrashDriver {
            number,
            log: self.log.clone(),
            ..CrashDriver::new(bytes)
        }
        .growing_with(self.disk.grows_with)
    }

    /// The same, but bytes that appear when the disk becomes longer hold this until they are written, as when the disk lies encrypted in something else.
    pub fn growing_with(mut self, byte: u8) -> CrashDriver {
        self.disk.grows_with = byte;
        self
    }

    /// The same with room for so many bytes: what would make the disk longer fails with ENOSPC.
    pub fn with_room(mut self, bytes: u64) -> CrashDriver {
        self.disk.room = Some(bytes);
        self
    }

    /// The bytes as they are now.
    pub fn snapshot(&self) -> Vec<u8> {
        self.disk.snapshot()
    }

    /// The number of entries in the log, those of all its disks: the places where the power can be cut are `0..=log_len()`.
    pub fn log_len(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log
            .lock()
            .expect("no code panics while it holds this lock")
    }

    fn note(&self, entry: LogEntry) {
        self.lock().push((self.number, entry));
    }

    /// A node over this disk.
    ///
    /// # Errors
    /// None that a test has to expect.
    pub async fn into_node(self, flags: NodeFlags) -> Result<Arc<Node>> {
        Node::new(
            Box::new(self),
            NodeConfig {
                filename: "crash".to_owned(),
                flags,
                ..NodeConfig::default()
            },
        )
        .await
    }

    /// Whether the log has a flush at this place.
    pub fn is_flush(&self, at: usize) -> bool {
        matches!(self.lock().get(at), Some((_, LogEntry::Flush(_))))
    }

    /// What a power cut after the first `cut` log entries could leave, chosen by `rng`. `keep_percent` of the sectors that were not flushed survive, and the order of
    /// writes is any; with 100 it is what was there at that moment, all of it and nothing else.
    pub fn image_after(&self, cut: usize, keep_percent: u64, rng: &mut Rng) -> Vec<u8> {
        let log = self.lock();
        let own = || (log[..cut].iter().enumerate()).filter(|(_, (disk, _))| *disk == self.number);
        let covered = |(_, (_, e)): (usize, &(usize, LogEntry))| match e {
            LogEntry::Flush(covered) => Some(*covered),
            _ => None,
        };
        let flushed = own().filter_map(covered).max().unwrap_or(0);
        let mut image = (*self.base).clone();
        for (_, (_, entry)) in own().take_while(|(at, _)| *at < flushed) {
            apply(&mut image, entry, self.disk.grows_with, |_| true);
        }
        // Any order: sectors are applied in the order of the log or against it, write by write.
        let rest = own().skip_while(|(at, _)| *at < flushed);
        let mut rest: Vec<&LogEntry> = rest.map(|(_, (_, entry))| entry).collect();
        for i in (1..rest.len()).rev() {
            if keep_percent < 100 && rng.chance(30) {
                rest.swap(i, rng.below(i as u64 + 1) as usize);
            }
        }
        for entry in rest {
            apply(&mut image, entry, self.disk.grows_with, |_| {
                rng.chance(keep_percent)
            });
        }
        image
    }
}

fn apply(
    image: &mut Vec<u8>,
    entry: &LogEntry,
    grows_with: u8,
    mut survives: impl FnMut(u64) -> bool,
) {
    match entry {
        LogEntry::Flush(_) => {}
        LogEntry::Length(bytes) => {
            if survives(*bytes) {
                image.resize(*bytes as usize, grows_with);
            }
        }
        LogEntry::Write { offset, data } => {
            let mut at = *offset;
            let end = offset + data.len() as u64;
            while at < end {
                let next = ((at / SECTOR_BYTES + 1) * SECTOR_BYTES).min(end);
                if survives(at) {
                    if (image.len() as u64) < next {
                        image.resize(next as usize, grows_with);
                    }
                    let part = &data[(at - offset) as usize..(next - offset) as usize];
                    image[at as usize..next as usize].copy_from_slice(part);
                }
                at = next;
            }
        }
    }
}

#[async_trait]
impl BlockDriver for CrashDriver {
    fn format_name(&self) -> &'static str {
        "crash"
    }

    fn is_protocol(&self) -> bool {
        true
    }

    fn grows_zeroed(&self) -> bool {
        self.disk.grows_zeroed()
    }

    async fn length(&self) -> Result<u64> {
        self.disk.length().await
    }

    fn read_nowait(&self, offset: u64, buf: &mut [u8]) -> bool {
        self.disk.read_nowait(offset, buf)
    }

    async fn preadv(&self, offset: u64, buf: IoBufMut, flags: ReadFlags) -> Result<IoBufMut> {
        // A place where other tasks get their turn, as with a real disk.
        tokio::task::yield_now().await;
        self.disk.preadv(offset, buf, flags).await
    }

    async fn pwritev(&self, offset: u64, buf: IoBuf, flags: WriteFlags) -> Result<()> {
        tokio::task::yield_now().await;
        self.disk
            .check_room(offset.saturating_add(buf.len() as u64))?;
        self.note(LogEntry::Write {
            offset,
            data: buf.to_vec(),
        });
        self.disk.pwritev(offset, buf, flags).await
    }

    fn supported_zero_flags(&self) -> WriteFlags {
        WriteFlags::MAY_UNMAP | WriteFlags::NO_FALLBACK
    }

    async fn pwrite_zeroes(&self, offset: u64, bytes: u64, _flags: WriteFlags) -> Result<()> {
        self.disk.check_room(offset.saturating_add(bytes))?;
        self.pwritev(offset, IoBuf::zeroes(bytes as usize), WriteFlags::empty())
            .await
    }

    async fn pdiscard(&self, offset: u64, bytes: u64) -> Result<()> {
        // A hole within the length; it never makes the disk longer.
        let end = (offset + bytes).min(self.disk.length().await?);
        if offset < end {
            let hole = vec![self.disk.grows_with; (end - offset) as usize];
            self.pwritev(offset, hole.into(), WriteFlags::empty())
                .await?;
        }
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        let begun = self.log_len();
        tokio::task::yield_now().await;
        self.note(LogEntry::Flush(begun));
        Ok(())
    }

    async fn truncate(&self, request: TruncateRequest) -> Result<()> {
        self.disk.check_room(request.bytes)?;
        self.note(LogEntry::Length(request.bytes));
        self.disk.truncate(request).await
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_flushed_survives_and_the_rest_may_not() {
        let disk = CrashDriver::new(vec![0; 2048]);
        let node = disk.clone().into_node(NodeFlags::default()).await.unwrap();
        node.pwritev(0, vec![1; 512].into(), WriteFlags::empty())
            .await
            .unwrap();
        node.flush().await.unwrap();
        node.pwritev(0, vec![2; 1024].into(), WriteFlags::empty())
            .await
            .unwrap();
        let mut seen = [false; 4];
        for seed in 0..50 {
            let image = disk.image_after(disk.log_len(), 50, &mut Rng::new(seed));
            assert!(image[0] == 1 || image[0] == 2);
            assert!(image[512] == 0 || image[512] == 2);
            seen[usize::from(image[0] == 2) + 2 * usize::from(image[512] == 2)] = true;
        }
        assert_eq!(seen, [true; 4], "every mixture turns up");
    }

    #[tokio::test]
    async fn a_cut_that_keeps_everything_leaves_what_was_there() {
        let disk = CrashDriver::new(vec![0; 2048]);
        let node = disk.clone().into_node(NodeFlags::default()).await.unwrap();
        let mut was_there = vec![disk.snapshot()];
        for step in 1..8u64 {
            let data = vec![step as u8; 512 * (1 + step as usize % 3)];
            let write = node.pwritev(512 * (step % 2), data.into(), WriteFlags::empty());
            write.await.unwrap();
            was_there.push(disk.snapshot());
        }
        assert_eq!(disk.log_len() + 1, was_there.len());
        for (cut, was_there) in was_there.iter().enumerate() {
            for seed in 0..20 {
                let left = disk.image_after(cut, 100, &mut Rng::new(seed));
                assert_eq!(&left, was_there, "cut {cut}");
            }
        }
    }

    #[tokio::test]
    async fn a_flush_of_one_disk_says_nothing_about_another() {
        let disk = CrashDriver::new(vec![0; 512]);
        let other = disk.beside(vec![0; 512], 1);
        let node = disk.clone().into_node(NodeFlags::default()).await.unwrap();
        let other_node = other.clone().into_node(NodeFlags::default()).await;
        let other_node = other_node.unwrap();
        for node in [&node, &other_node] {
            node.pwritev(0, vec![1; 512].into(), WriteFlags::empty())
                .await
                .unwrap();
        }
        node.flush().await.unwrap();
        assert_eq!(disk.log_len(), 3, "one log of both");
        let rng = &mut Rng::new(1);
        assert_eq!(disk.image_after(3, 0, rng)[0], 1);
        assert_eq!(other.image_after(3, 0, rng)[0], 0);
        assert_eq!(other.image_after(3, 100, rng)[0], 1);
    }
}
