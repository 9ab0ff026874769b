// SPDX-License-Identifier: MIT OR Apache-2.0
//! The request path of zero writes and discards. `QEMU: bdrv_co_do_pwrite_zeroes`, `bdrv_co_pdiscard`.
//!
//! A zero write is cut at the driver's `pwrite_zeroes_alignment`: the aligned middle goes in one piece, heads and tails go as requests of
//! their own, so that a driver can refuse those alone. What a driver refuses with `Unsupported` is written as zeroes, unless the request
//! says `NO_FALLBACK`.
//!
//! Whether a partly covered cluster may become a zero cluster is the format's to find out (the seed of this project is that rule, in `qcow2`):
//! the piece arrives there whole, within one cluster, and the format excludes racing writes to that cluster itself.

use crate::buffer::IoBuf;
use crate::debug::DebugEvent;
use crate::driver::WriteFlags;
use crate::error::{Op, Result};
use crate::limits::MAX_REQUEST_BYTES;
use crate::node::Node;
use crate::request::{Padding, WrittenOnDrop};

/// The most zeroes that are written in one request, in bytes.
const ZERO_FALLBACK_BYTES: u64 = 1 << 20;

/// The pieces of `offset..offset + bytes`: each lies between two multiples of `align`, or is aligned to it and at most `max` long (0: any).
fn pieces(offset: u64, bytes: u64, align: u64, max: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset + bytes;
    let max = if max == 0 { MAX_REQUEST_BYTES } else { max };
    let max = (max / align).max(1) * align;
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let next = if !at.is_multiple_of(align) {
            end.min(at.next_multiple_of(align))
        } else {
            let whole = (end - at) / align * align;
            if whole > 0 { at + whole.min(max) } else { end }
        };
        let piece = (at, next - at);
        at = next;
        Some(piece)
    })
}

impl Node {
    /// Makes a range read as zero. `NO_FALLBACK` fails with `Unsupported` where zeroes would have to be written.
    ///
    /// # Errors
    /// `ReadOnly`, `Unsupported` as above, the driver's.
    pub async fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> Result<()> {
        self.check_writable(Op::WriteZeroes)?;
        self.check_range(offset, bytes, Op::WriteZeroes)?;
        if bytes == 0 {
            return Ok(());
        }
        let mut flags = flags;
        if !self.flags().unmap {
            flags.remove(WriteFlags::MAY_UNMAP);
        }
        let align = self.align();
        let padding = Padding::new(offset, bytes, align);
        if flags.contains(WriteFlags::NO_FALLBACK) && !padding.is_none() {
            // The blocks at the edges would have to be written.
            let err = crate::BlockError::from_errno(libc::ENOTSUP);
            return Err(err.during(Op::WriteZeroes).on_node(self.name()).at(offset));
        }
        let (start, end) = (offset - padding.head, offset + bytes + padding.tail);
        let _tracked = self.tracked.begin(start, end, !padding.is_none()).await;
        let _written = WrittenOnDrop(self);
        let zeroed = async {
            self.note_change(offset, bytes).await?;
            self.zero_padded(offset, bytes, flags, align).await
        };
        zeroed
            .await
            .map_err(|e| e.during(Op::WriteZeroes).on_node(self.name()).at(offset))
    }

    /// Writes the blocks that are covered in part, and zeroes the rest. The caller tracks the range.
    async fn zero_padded(
        &self,
        offset: u64,
        bytes: u64,
        flags: WriteFlags,
        align: u64,
    ) -> Result<()> {
        let growing = self.growing_to(offset + bytes);
        for (at, n) in pieces(offset, bytes, align, 0) {
            let padding = Padding::new(at, n, align);
            if padding.is_none() {
                self.zero_aligned(at, n, flags, align).await?;
            } else {
                let buf = self
                    .pad_write(at, IoBuf::zeroes(n as usize), padding, align)
                    .await?;
                self.write_aligned(at - padding.head, buf, flags & WriteFlags::FUA, align)
                    .await?;
            }
        }
        growing.done();
        Ok(())
    }

    async fn zero_aligned(
        &self,
        offset: u64,
        bytes: u64,
        flags: WriteFlags,
        align: u64,
    ) -> Result<()> {
        let limits = self.limits();
        let driver = self.driver();
        let supported = driver.supported_zero_flags();
        let mut need_flush = false;
        for (at, n) in pieces(
            offset,
            bytes,
            limits.pwrite_zeroes_alignment.into(),
            limits.max_pwrite_zeroes,
        ) {
            // What a driver can't promise to do fast, it is not asked to do: NO_FALLBACK must not end in written zeroes.
            let asks_too_much = flags.contains(WriteFlags::NO_FALLBACK)
                && !supported.contains(WriteFlags::NO_FALLBACK);
            let result = if asks_too_much {
                Err(crate::BlockError::from_errno(libc::ENOTSUP))
            } else {
                self.debug_event(DebugEvent::PwritevZero).await;
                driver.pwrite_zeroes(at, n, flags & supported).await
            };
            match result {
                Ok(()) => {
                    need_flush |=
                        flags.contains(WriteFlags::FUA) && !supported.contains(WriteFlags::FUA);
                }
                Err(e)
                    if e.errno() == libc::ENOTSUP && !flags.contains(WriteFlags::NO_FALLBACK) =>
                {
                    self.write_zero_buffers(at, n, flags & WriteFlags::FUA, align)
                        .await?;
                }
                Err(e) => return Err(e),
            }
        }
        if need_flush {
            self.mark_written();
            self.flush_now().await?;
        }
        Ok(())
    }

    async fn write_zero_buffers(
        &self,
        offset: u64,
        bytes: u64,
        flags: WriteFlags,
        align: u64,
    ) -> Result<()> {
        let mut at = offset;
        let end = offset + bytes;
        while at < end {
            let n = (end - at).min(ZERO_FALLBACK_BYTES);
            self.write_aligned(at, IoBuf::zeroes(n as usize), flags, align)
                .await?;
            at += n;
        }
        Ok(())
    }

    /// Reserves storage for a range within the length; see [`BlockDriver::reserve_storage`](crate::BlockDriver::reserve_storage).
    ///
    /// # Errors
    /// `ReadOnly`, the driver's.
    pub async fn reserve_storage(&self, offset: u64, bytes: u64) -> Result<()> {
        self.check_writable(Op::Write)?;
        let end = (offset + bytes).min(self.length());
        if offset >= end {
            return Ok(());
        }
        self.driver()
            .reserve_storage(offset, end - offset)
            .await
            .map_err(|e| e.during(Op::Write).on_node(self.name()))
    }

    /// Says that what a range holds is no longer needed. Does nothing where the node was opened with `discard=ignore`. Blocks that
    /// are covered in part are the driver's choice.
    ///
    /// # Errors
    /// `ReadOnly`, the driver's; never `Unsupported`.
    pub async fn pdiscard(&self, offset: u64, bytes: u64) -> Result<()> {
        self.check_writable(Op::Discard)?;
        self.check_range(offset, bytes, Op::Discard)?;
        if bytes == 0 || !self.flags().unmap {
            return Ok(());
        }
        let limits = self.limits();
        let align = self.align();
        let _tracked = self.tracked.begin(offset, offset + bytes, false).await;
        let _written = WrittenOnDrop(self);
        self.note_change(offset, bytes).await?;
        for (at, n) in pieces(
            offset,
            bytes,
            limits.pdiscard_alignment.into(),
            limits.max_pdiscard,
        ) {
            // Parts of blocks are offered too: a file can make a hole anywhere. Who can't may say so.
            let is_part = !Padding::new(at, n, align).is_none();
            match self.driver().pdiscard(at, n).await {
                Ok(()) => {}
                Err(e) if e.errno() == libc::ENOTSUP => {}
                Err(e) if is_part && e.errno() == libc::EINVAL => {}
                Err(e) => return Err(e.during(Op::Discard).on_node(self.name()).at(at)),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::pieces;

    #[test]
    fn pieces_are_cut_at_the_alignment_and_cover_the_range() {
        let cut = |o, b, a, m| pieces(o, b, a, m).collect::<Vec<_>>();
        assert_eq!(cut(0, 100, 10, 0), [(0, 100)]);
        assert_eq!(cut(3, 4, 10, 0), [(3, 4)]);
        assert_eq!(cut(3, 10, 10, 0), [(3, 7), (10, 3)]);
        assert_eq!(
            cut(3, 44, 10, 15),
            [(3, 7), (10, 10), (20, 10), (30, 10), (40, 7)]
        );
        assert_eq!(cut(10, 25, 10, 0), [(10, 20), (30, 5)]);
    }
}
