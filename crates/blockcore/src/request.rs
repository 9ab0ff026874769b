// SPDX-License-Identifier: MIT OR Apache-2.0
//! The request path of reads and writes on a node. `QEMU: bdrv_co_preadv_part`, `bdrv_co_pwritev_part` and what lies below them.
//!
//! What comes in is any range of bytes; what a driver sees keeps to its limits. In between:
//!
//! * *bounds*: ranges end below `i64::MAX`; whether a request may reach past the end is the [`Backend`](crate::Backend)'s business, since a
//!   format's file grows by being written to;
//! * *padding*: a range that is not aligned to `request_alignment` is widened, with what is there read first and written back
//!   (read-modify-write) as a serialising request, see `tracked`;
//! * *the end*: what a read wants past the end is zero, and the driver isn't asked;
//! * *splitting* at `max_transfer`;
//! * *FUA* by a flush, where the driver has no better way.

use crate::buffer::{IoBuf, IoBufMut};
use crate::debug::DebugEvent;
use crate::driver::{ReadFlags, WriteFlags};
use crate::error::{BlockError, ErrorKind, Op, Result};
use crate::limits::{MAX_LENGTH_BYTES, MAX_REQUEST_BYTES};
use crate::node::Node;
use std::sync::atomic::Ordering;

/// A range widened to an alignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Padding {
    /// Bytes in front of the range.
    pub head: u64,
    /// Bytes behind the range.
    pub tail: u64,
}

impl Padding {
    /// What `offset..offset + bytes` lacks to be aligned.
    pub fn new(offset: u64, bytes: u64, align: u64) -> Padding {
        let end = offset + bytes;
        Padding {
            head: offset % align,
            tail: end.next_multiple_of(align) - end,
        }
    }

    pub fn is_none(self) -> bool {
        self.head == 0 && self.tail == 0
    }
}

/// Counts a change as made, however the request ends: done, failed, or dropped half way.
pub(crate) struct WrittenOnDrop<'a>(pub &'a Node);

impl Drop for WrittenOnDrop<'_> {
    fn drop(&mut self) {
        self.0.mark_written();
    }
}

impl Node {
    /// What requests to the driver are aligned to, in bytes.
    pub fn align(&self) -> u64 {
        self.request_alignment.load(Ordering::Acquire).into()
    }

    pub(crate) fn check_range(&self, offset: u64, bytes: u64, op: Op) -> Result<()> {
        match offset.checked_add(bytes) {
            Some(end) if end <= MAX_LENGTH_BYTES => Ok(()),
            _ => Err(BlockError::from_errno(libc::EIO)
                .during(op)
                .on_node(self.name())
                .at(offset)),
        }
    }

    fn max_transfer(&self, align: u64) -> u64 {
        let max = self.limits().max_transfer;
        let max = if max == 0 {
            MAX_REQUEST_BYTES
        } else {
            max.min(MAX_REQUEST_BYTES)
        };
        max / align * align
    }

    /// Reads without waiting, if that is possible: see [`BlockDriver::read_nowait`](crate::BlockDriver::read_nowait).
    ///
    /// `false` means: use [`preadv`](Node::preadv). What is in `buf` then is of no meaning.
    pub fn read_nowait(&self, offset: u64, buf: &mut [u8]) -> bool {
        let bytes = buf.len() as u64;
        let align = self.align();
        let Some(end) = offset.checked_add(bytes) else {
            return false;
        };
        if bytes == 0 || end > self.length() || (offset | bytes) & (align - 1) != 0 {
            return false;
        }
        if self.orphans.any() {
            return false;
        }
        self.driver().read_nowait(offset, buf)
    }

    /// INV REQ-DROP-1: waits for changes of the whole node that nobody else waits for any more, as far as they concern `start..end`. Not for those who are in
    /// flight themselves: such a change may wait for them.
    pub(crate) async fn settle_orphans(&self, start: u64, end: u64) {
        if self.orphans.any() {
            // INV REQ-PARK-1: not for writes, which may never be polled again.
            self.changes.settled(start, end).await;
        }
    }

    /// Reads `buf.len()` bytes at `offset`; what lies past the end reads as zero.
    ///
    /// # Errors
    /// The driver's; `Io` for a range that can't be addressed. The buffer is freed.
    pub async fn preadv(
        &self,
        offset: u64,
        mut buf: IoBufMut,
        flags: ReadFlags,
    ) -> Result<IoBufMut> {
        let bytes = buf.len() as u64;
        self.check_range(offset, bytes, Op::Read)?;
        if bytes == 0 {
            return Ok(buf);
        }
        self.settle_orphans(offset, offset + bytes).await;
        let align = self.align();
        let padding = Padding::new(offset, bytes, align);
        let result = if padding.is_none() {
            self.read_aligned(offset, buf, flags, align).await
        } else {
            let padded = IoBufMut::zeroed((padding.head + bytes + padding.tail) as usize);
            let read = self
                .read_aligned(offset - padding.head, padded, flags, align)
                .await;
            read.map(|padded| {
                let mut at = padding.head as usize;
                for piece in buf.segments_mut() {
                    padded.copy_to_slice(at, piece);
                    at += piece.len();
                }
                buf
            })
        };
        result.map_err(|e| e.during(Op::Read).on_node(self.name()).at(offset))
    }

    async fn read_aligned(
        &self,
        offset: u64,
        mut buf: IoBufMut,
        flags: ReadFlags,
        align: u64,
    ) -> Result<IoBufMut> {
        let bytes = buf.len() as u64;
        let readable = self
            .known_length()
            .await?
            .next_multiple_of(align)
            .saturating_sub(offset)
            .min(bytes);
        let mut past_end = buf.split_off(readable as usize);
        let max = self.max_transfer(align);
        let mut done = IoBufMut::default();
        let mut at = offset;
        while !buf.is_empty() {
            let n = max.min(buf.len() as u64) as usize;
            let part = if n == buf.len() {
                std::mem::take(&mut buf)
            } else {
                buf.split_to(n)
            };
            let part = self.driver().preadv(at, part, flags).await?;
            assert_eq!(
                part.len(),
                n,
                "{} gave back another buffer",
                self.format_name()
            );
            at += n as u64;
            done.append(part);
        }
        past_end.fill(0);
        done.append(past_end);
        Ok(done)
    }

    /// Writes `buf` at `offset`.
    ///
    /// # Errors
    /// `ReadOnly`, the driver's; `Io` for a range that can't be addressed.
    pub async fn pwritev(&self, offset: u64, buf: IoBuf, flags: WriteFlags) -> Result<()> {
        self.check_writable(Op::Write)?;
        let bytes = buf.len() as u64;
        self.check_range(offset, bytes, Op::Write)?;
        if bytes == 0 {
            return Ok(());
        }
        let align = self.align();
        let padding = Padding::new(offset, bytes, align);
        let (start, end) = (offset - padding.head, offset + bytes + padding.tail);
        let _tracked = self.tracked.begin(start, end, !padding.is_none()).await;
        let _written = WrittenOnDrop(self);
        let result = async {
            self.note_change(offset, bytes).await?;
            let buf = if padding.is_none() {
                buf
            } else {
                self.pad_write(offset, buf, padding, align).await?
            };
            self.write_aligned(start, buf, flags, align).await
        };
        result
            .await
            .map_err(|e| e.during(Op::Write).on_node(self.name()).at(offset))
    }

    /// Reads what lies around an unaligned range and puts `buf` between. The caller holds a serialising tracked request.
    pub(crate) async fn pad_write(
        &self,
        offset: u64,
        buf: IoBuf,
        padding: Padding,
        align: u64,
    ) -> Result<IoBuf> {
        let end = offset + buf.len() as u64;
        let none = ReadFlags::empty();
        let mut out = IoBuf::default();
        let (head, tail) = (padding.head as usize, padding.tail as usize);
        let block_at = async |at: u64, before: DebugEvent, after: DebugEvent| {
            self.debug_event(before).await;
            let block = IoBufMut::zeroed(align as usize);
            let block = self.read_aligned(at, block, none, align).await?;
            self.debug_event(after).await;
            Ok::<_, BlockError>(block.freeze())
        };
        let first_block_start = offset - padding.head;
        let head_block = match head {
            0 => None,
            _ => {
                let (before, after) = (DebugEvent::PwritevRmwHead, DebugEvent::PwritevRmwAfterHead);
                Some(block_at(first_block_start, before, after).await?)
            }
        };
        let last_block_start = end + padding.tail - align;
        let tail_block = match (&head_block, tail) {
            (_, 0) => None,
            (Some(block), _) if last_block_start == first_block_start => Some(block.clone()),
            _ => {
                let (before, after) = (DebugEvent::PwritevRmwTail, DebugEvent::PwritevRmwAfterTail);
                Some(block_at(last_block_start, before, after).await?)
            }
        };
        if let Some(block) = head_block {
            out.append(block.slice(..head));
        }
        out.append(buf);
        if let Some(block) = tail_block {
            out.append(block.slice(align as usize - tail..));
        }
        Ok(out)
    }

    /// Writes an aligned range. The caller tracks it.
    pub(crate) async fn write_aligned(
        &self,
        offset: u64,
        buf: IoBuf,
        flags: WriteFlags,
        align: u64,
    ) -> Result<()> {
        let end = offset + buf.len() as u64;
        let supported = self.driver().supported_write_flags();
        let growing = self.growing_to(end);
        let max = self.max_transfer(align);
        let mut at = offset;
        let mut left = buf;
        while !left.is_empty() {
            let n = max.min(left.len() as u64) as usize;
            let (part, rest) = if n == left.len() {
                (left, IoBuf::default())
            } else {
                (left.slice(..n), left.slice(n..))
            };
            self.debug_event(DebugEvent::Pwritev).await;
            self.driver().pwritev(at, part, flags & supported).await?;
            at += n as u64;
            left = rest;
        }
        self.debug_event(DebugEvent::PwritevDone).await;
        growing.done();
        if flags.contains(WriteFlags::FUA) && !supported.contains(WriteFlags::FUA) {
            self.mark_written();
            self.flush_now().await?;
        }
        Ok(())
    }

    /// Writes data that is to be stored compressed.
    ///
    /// # Errors
    /// `Unsupported` where the format can't; otherwise as [`pwritev`](Node::pwritev).
    pub async fn pwritev_compressed(&self, offset: u64, buf: IoBuf) -> Result<()> {
        self.check_writable(Op::Write)?;
        if !self
            .driver()
            .supported_write_flags()
            .contains(WriteFlags::COMPRESSED)
        {
            return Err(
                BlockError::new(ErrorKind::Unsupported, "Operation not supported")
                    .during(Op::Write),
            );
        }
        let bytes = buf.len() as u64;
        self.check_range(offset, bytes, Op::Write)?;
        let end = offset + bytes;
        let _tracked = self.tracked.begin(offset, end, false).await;
        let _written = WrittenOnDrop(self);
        self.note_change(offset, bytes).await?;
        self.driver()
            .pwritev(offset, buf, WriteFlags::COMPRESSED)
            .await
            .map_err(|e| e.during(Op::Write).on_node(self.name()).at(offset))
    }
}
