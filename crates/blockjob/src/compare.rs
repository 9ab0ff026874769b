// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`compare`]: whether two disks read the same. `QEMU: img_compare`.
//!
//! Ranges that both say are zero are not read. Where one disk is longer, what lies past the other's end has to read as zero.

use std::fmt;

use blockcore::buffer::BufferPool;
use blockcore::{
    Backend, BlockError, ChainStatus, IoBufMut, ReadFlags, Result, SECTOR_BYTES, StatusFlags,
    StatusMode,
};

use crate::progress::Job;

/// The most that is read at once from each disk, in bytes.
const CHUNK_BYTES: u64 = 2 << 20;

/// What a comparison found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All bytes are equal.
    Identical,
    /// The sector at this byte offset differs.
    ContentDiffers(u64),
    /// Strict: at this byte offset one is allocated, or zero, in another way than the other.
    StatusDiffers(u64),
    /// Strict: the lengths differ.
    LengthDiffers,
}

/// One of the two disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The first.
    First,
    /// The second.
    Second,
}

/// Why a comparison could not be finished.
#[derive(Debug)]
pub enum CompareFailure {
    /// A disk could not say what it holds.
    Status(Side, BlockError),
    /// A disk could not be read at this byte offset.
    Read(Side, u64, BlockError),
    /// The job was cancelled.
    Cancelled,
}

impl fmt::Display for CompareFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CompareFailure::Status(side, e) => write!(f, "block status of the {side:?} disk: {e}"),
            CompareFailure::Read(side, at, e) => {
                write!(f, "reading the {side:?} disk at {at:#x}: {e}")
            }
            CompareFailure::Cancelled => f.write_str("cancelled"),
        }
    }
}

impl std::error::Error for CompareFailure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            CompareFailure::Status(_, e) | CompareFailure::Read(_, _, e) => Some(e),
            CompareFailure::Cancelled => None,
        }
    }
}

/// Compares two disks. `strict`: the lengths, and what is allocated and zero, have to be equal too. `on_tail` is called when all that both have is
/// equal, and one goes on.
///
/// *If the future is dropped*: nothing has changed.
///
/// # Errors
/// [`CompareFailure`].
pub async fn compare(
    first: &Backend,
    second: &Backend,
    strict: bool,
    job: &Job,
    on_tail: impl FnOnce(),
) -> Result<Outcome, CompareFailure> {
    let (len1, len2) = (first.length(), second.length());
    let (common, longest) = (len1.min(len2), len1.max(len2));
    job.begin(longest);
    if strict && len1 != len2 {
        return Ok(Outcome::LengthDiffers);
    }
    let buffers = BufferPool::new(CHUNK_BYTES as usize);
    let mut at = 0;
    while at < common {
        job.check().map_err(|_| CompareFailure::Cancelled)?;
        let status1 = status(first, Side::First, at, len1 - at).await?;
        let status2 = status(second, Side::Second, at, len2 - at).await?;
        let (flags1, flags2) = (status1.status.flags, status2.status.flags);
        let mut chunk = status1.status.bytes.min(status2.status.bytes);
        if strict && flags1 != flags2 {
            return Ok(Outcome::StatusDiffers(at));
        }
        if !(flags1 & flags2).contains(StatusFlags::ZERO) {
            let held1 = flags1.contains(StatusFlags::ALLOCATED);
            let held2 = flags2.contains(StatusFlags::ALLOCATED);
            chunk = chunk.min(CHUNK_BYTES);
            let differs = match (held1, held2) {
                (false, false) => None,
                (true, true) => {
                    let read1 = read(first, Side::First, at, buffers.take(chunk as usize));
                    let read2 = read(second, Side::Second, at, buffers.take(chunk as usize));
                    let (buf1, buf2) = futures::try_join!(read1, read2)?;
                    first_difference(&buf1, &buf2)
                }
                (true, false) => {
                    let buf = buffers.take(chunk as usize);
                    first_data(&read(first, Side::First, at, buf).await?)
                }
                (false, true) => {
                    let buf = buffers.take(chunk as usize);
                    first_data(&read(second, Side::Second, at, buf).await?)
                }
            };
            if let Some(sector) = differs {
                return Ok(Outcome::ContentDiffers(at + sector));
            }
        }
        at += chunk;
        job.advance(chunk);
    }
    let (longer, side) = if len1 > len2 {
        (first, Side::First)
    } else {
        (second, Side::Second)
    };
    if at < longest {
        on_tail();
    }
    while at < longest {
        job.check().map_err(|_| CompareFailure::Cancelled)?;
        let found_here = status(longer, side, at, longest - at).await?.status;
        let mut chunk = found_here.bytes;
        if found_here.is_allocated() && !found_here.is_zero() {
            chunk = chunk.min(CHUNK_BYTES);
            let buf = read(longer, side, at, buffers.take(chunk as usize)).await?;
            if let Some(sector) = first_data(&buf) {
                return Ok(Outcome::ContentDiffers(at + sector));
            }
        }
        at += chunk;
        job.advance(chunk);
    }
    Ok(Outcome::Identical)
}

async fn status(
    disk: &Backend,
    side: Side,
    at: u64,
    bytes: u64,
) -> Result<ChainStatus, CompareFailure> {
    disk.chain_status(at, bytes, StatusMode::Precise)
        .await
        .map_err(|e| CompareFailure::Status(side, e))
}

async fn read(
    disk: &Backend,
    side: Side,
    at: u64,
    buf: IoBufMut,
) -> Result<IoBufMut, CompareFailure> {
    disk.preadv(at, buf, ReadFlags::empty())
        .await
        .map_err(|e| CompareFailure::Read(side, at, e))
}

/// The offset of the first sector that differs.
fn first_difference(a: &IoBufMut, b: &IoBufMut) -> Option<u64> {
    if let (Some(a), Some(b)) = (a.as_slice(), b.as_slice()) {
        return differing_sector(a, b);
    }
    differing_sector(&a.to_vec(), &b.to_vec())
}

fn differing_sector(a: &[u8], b: &[u8]) -> Option<u64> {
    if a == b {
        return None;
    }
    let sector = SECTOR_BYTES as usize;
    let index = a
        .chunks(sector)
        .zip(b.chunks(sector))
        .position(|(a, b)| a != b)?;
    Some(index as u64 * SECTOR_BYTES)
}

/// The offset of the first sector that is not zero.
fn first_data(buf: &IoBufMut) -> Option<u64> {
    let mut start = 0;
    for piece in buf.segments() {
        if !blockcore::buffer::slice_is_zero(piece) {
            let byte = piece.iter().position(|&b| b != 0)? as u64;
            return Some((start + byte) / SECTOR_BYTES * SECTOR_BYTES);
        }
        start += piece.len() as u64;
    }
    None
}
