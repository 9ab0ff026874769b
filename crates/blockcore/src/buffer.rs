// SPDX-License-Identifier: MIT OR Apache-2.0
//! Owned request buffers: [`IoBufMut`] is where a read puts its bytes, [`IoBuf`] is what a write takes them from.
//!
//! A request future can be dropped while the kernel still works on its memory, so no request borrows memory: it
//! *owns* its buffer until the kernel is done with it, and a read gives it back with the result. Both types are
//! lists of segments (most have one), so that guest memory that lies scattered needs no copy, and both can be
//! split into disjoint parts that different drivers work on at once.
//!
//! This file and the engines in the `raw` crate are the only places with `unsafe`. The invariant everything here
//! rests on: *the byte ranges of all live `MutSegment`s over one allocation are disjoint*. A range is only ever
//! made by allocating it or by splitting a range in two.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::fmt;
use std::ops::{Bound, RangeBounds};
use std::ptr::NonNull;
use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;

mod pool;

pub use pool::BufferPool;

/// Bytes in a page, and the alignment of buffers of a page and more.
pub const PAGE_BYTES: usize = 4096;
/// The alignment of buffers smaller than a page, in bytes.
const SMALL_ALIGN_BYTES: usize = 512;
/// The size of the shared block of zeroes, in bytes.
const ZERO_BLOCK_BYTES: usize = 64 * 1024;

#[repr(align(4096))]
struct ZeroBlock([u8; ZERO_BLOCK_BYTES]);
static ZERO_BLOCK: ZeroBlock = ZeroBlock([0; ZERO_BLOCK_BYTES]);

/// The memory behind one or more segments. Freed when the last segment over it is gone.
enum Allocation {
    /// Memory from the global allocator.
    Heap { base: NonNull<u8>, layout: Layout },
    /// A block of a pool, which it goes back to.
    Pooled {
        base: NonNull<u8>,
        home: Arc<pool::Blocks>,
    },
    /// Somebody else's memory, valid as long as the value lives.
    Foreign {
        _keep_alive: Box<dyn Any + Send + Sync>,
    },
}

// SAFETY: `Allocation` is only an owner. `base` is never read through it, only freed in `drop`, which needs
// exclusive access; `_keep_alive` is itself `Send + Sync`.
unsafe impl Send for Allocation {}
// SAFETY: as above; a shared reference to an `Allocation` gives access to nothing.
unsafe impl Sync for Allocation {}

impl Drop for Allocation {
    fn drop(&mut self) {
        match self {
            Allocation::Heap { base, layout } => {
                // SAFETY: `base` came from `alloc_zeroed` with this very layout, and `drop` runs once, after the last
                // segment (each holds an `Arc` of this allocation) has gone.
                unsafe { dealloc(base.as_ptr(), *layout) }
            }
            // As above: no segment is left.
            Allocation::Pooled { base, home } => home.give_back(*base),
            Allocation::Foreign { .. } => {}
        }
    }
}

/// An exclusively owned, contiguous, initialised range of memory.
struct MutSegment {
    owner: Arc<Allocation>,
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a segment owns its byte range exclusively (see the file's invariant) and keeps the allocation alive, so it
// may move to and be dropped on another thread.
unsafe impl Send for MutSegment {}
// SAFETY: `&MutSegment` only allows reading the bytes, and writing needs `&mut`.
unsafe impl Sync for MutSegment {}

impl MutSegment {
    fn zeroed(len: usize, align: usize) -> MutSegment {
        if len == 0 {
            return MutSegment {
                owner: Arc::new(Allocation::Foreign {
                    _keep_alive: Box::new(()),
                }),
                base: NonNull::dangling(),
                len: 0,
            };
        }
        let layout =
            Layout::from_size_align(len, align).expect("buffer size overflows the address space");
        // SAFETY: the layout's size is not zero (checked above).
        let raw = unsafe { alloc_zeroed(layout) };
        let Some(base) = NonNull::new(raw) else {
            handle_alloc_error(layout)
        };
        MutSegment {
            owner: Arc::new(Allocation::Heap { base, layout }),
            base,
            len,
        }
    }

    fn as_slice(&self) -> &[u8] {
        // SAFETY: the range is initialised, kept alive by `owner`, and exclusively owned; writing needs `&mut self`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }

    fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and `&mut self` makes this the only reference into the exclusively owned range.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }

    /// Cuts the segment in two at `at`; `self` keeps the front.
    fn split_off(&mut self, at: usize) -> MutSegment {
        assert!(
            at <= self.len,
            "split at {at} of a segment of {} bytes",
            self.len
        );
        // SAFETY: `at <= len`, so the result points into the same range or one past its end.
        let base = unsafe { self.base.add(at) };
        let tail = MutSegment {
            owner: self.owner.clone(),
            base,
            len: self.len - at,
        };
        self.len = at;
        tail
    }

    fn touches(&self, next: &MutSegment) -> bool {
        Arc::ptr_eq(&self.owner, &next.owner)
            && self.base.as_ptr().wrapping_add(self.len) == next.base.as_ptr()
    }
}

impl AsRef<[u8]> for MutSegment {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

/// A buffer that a read fills: owned, initialised, page-aligned where it is a page or more.
///
/// ```
/// use blockcore::IoBufMut;
/// let mut front = IoBufMut::zeroed(8192);
/// let mut back = front.split_off(4096);
/// back.as_mut_slice().unwrap()[0] = 7;
/// front.append(back);
/// assert_eq!(front.len(), 8192);
/// assert_eq!(front.as_slice().unwrap()[4096], 7);
/// ```
#[derive(Default)]
pub struct IoBufMut {
    segments: SmallVec<[MutSegment; 1]>,
    len: usize,
}

impl IoBufMut {
    /// A buffer of `len` zero bytes.
    pub fn zeroed(len: usize) -> IoBufMut {
        IoBufMut::zeroed_aligned(
            len,
            if len >= PAGE_BYTES {
                PAGE_BYTES
            } else {
                SMALL_ALIGN_BYTES
            },
        )
    }

    /// A buffer of `len` zero bytes whose address is a multiple of `align` (a power of two).
    pub fn zeroed_aligned(len: usize, align: usize) -> IoBufMut {
        let mut segments = SmallVec::new();
        if len > 0 {
            segments.push(MutSegment::zeroed(len, align));
        }
        IoBufMut { segments, len }
    }

    /// A buffer over caller memory, such as a guest's RAM: no copy is made, and `keep_alive` is dropped when the last
    /// part of the buffer is gone.
    ///
    /// # Safety
    ///
    /// `base..base + len` must be valid, initialised memory for as long as `keep_alive` lives, wherever that value is
    /// moved, and nothing else may read or write it until the buffer and all parts split from it are gone.
    pub unsafe fn from_raw_parts(
        base: NonNull<u8>,
        len: usize,
        keep_alive: Box<dyn Any + Send + Sync>,
    ) -> IoBufMut {
        let owner = Arc::new(Allocation::Foreign {
            _keep_alive: keep_alive,
        });
        let mut segments = SmallVec::new();
        segments.push(MutSegment { owner, base, len });
        IoBufMut { segments, len }
    }

    /// The number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes, where they lie in one piece.
    pub fn as_slice(&self) -> Option<&[u8]> {
        match self.segments.as_slice() {
            [] => Some(&[]),
            [one] => Some(one.as_slice()),
            _ => None,
        }
    }

    /// The bytes, where they lie in one piece.
    pub fn as_mut_slice(&mut self) -> Option<&mut [u8]> {
        match self.segments.as_mut_slice() {
            [] => Some(&mut []),
            [one] => Some(one.as_mut_slice()),
            _ => None,
        }
    }

    /// The pieces, in order.
    pub fn segments(&self) -> impl Iterator<Item = &[u8]> {
        self.segments.iter().map(MutSegment::as_slice)
    }

    /// The pieces, in order.
    pub fn segments_mut(&mut self) -> impl ExactSizeIterator<Item = &mut [u8]> {
        self.segments.iter_mut().map(MutSegment::as_mut_slice)
    }

    /// Address and length of each piece, for handing to the kernel. The pointers stay valid while the buffer lives,
    /// also when it moves.
    pub fn raw_segments(&mut self) -> impl ExactSizeIterator<Item = (NonNull<u8>, usize)> {
        self.segments.iter_mut().map(|s| (s.base, s.len))
    }

    /// Whether every piece starts and ends on a multiple of `align` (a power of two).
    pub fn is_aligned(&self, align: usize) -> bool {
        self.segments
            .iter()
            .all(|s| (s.base.as_ptr() as usize | s.len) & (align - 1) == 0)
    }

    /// Cuts the buffer in two at `at`, which must not lie past the end; `self` keeps the front.
    pub fn split_off(&mut self, at: usize) -> IoBufMut {
        assert!(
            at <= self.len,
            "split at {at} of a buffer of {} bytes",
            self.len
        );
        let tail_len = self.len - at;
        let mut tail = SmallVec::new();
        let mut start = 0;
        for i in 0..self.segments.len() {
            let seg_len = self.segments[i].len;
            if at < start + seg_len {
                if at > start {
                    tail.push(self.segments[i].split_off(at - start));
                    tail.extend(self.segments.drain(i + 1..));
                } else {
                    tail.extend(self.segments.drain(i..));
                }
                break;
            }
            start += seg_len;
        }
        self.len = at;
        IoBufMut {
            segments: tail,
            len: tail_len,
        }
    }

    /// Cuts off and returns the first `at` bytes; `self` keeps the rest.
    pub fn split_to(&mut self, at: usize) -> IoBufMut {
        let tail = self.split_off(at);
        std::mem::replace(self, tail)
    }

    /// Puts `next` behind the bytes of `self`. Neighbours of one allocation are joined again.
    pub fn append(&mut self, next: IoBufMut) {
        self.len += next.len;
        for segment in next.segments {
            match self.segments.last_mut() {
                Some(last) if last.touches(&segment) => last.len += segment.len,
                _ if segment.len == 0 => {}
                _ => self.segments.push(segment),
            }
        }
    }

    /// Sets every byte to `byte`.
    pub fn fill(&mut self, byte: u8) {
        for s in self.segments_mut() {
            s.fill(byte);
        }
    }

    /// Sets `len` bytes from `at` to `byte`.
    pub fn fill_range(&mut self, at: usize, len: usize, byte: u8) {
        self.for_each_piece(at, len, |piece, _| piece.fill(byte));
    }

    /// Copies `src` to the bytes from `at` on.
    pub fn copy_from_slice(&mut self, at: usize, src: &[u8]) {
        self.for_each_piece(at, src.len(), |piece, done| {
            piece.copy_from_slice(&src[done..done + piece.len()]);
        });
    }

    /// Copies the bytes from `at` on to `dst`.
    pub fn copy_to_slice(&self, mut at: usize, mut dst: &mut [u8]) {
        assert!(at + dst.len() <= self.len, "copy past the end of a buffer");
        for s in self.segments() {
            if at >= s.len() {
                at -= s.len();
                continue;
            }
            let n = dst.len().min(s.len() - at);
            let (now, later) = dst.split_at_mut(n);
            now.copy_from_slice(&s[at..at + n]);
            dst = later;
            at = 0;
        }
    }

    /// The bytes as one new vector.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.len);
        self.segments().for_each(|s| out.extend_from_slice(s));
        out
    }

    /// Whether all bytes are zero.
    pub fn is_zero(&self) -> bool {
        self.segments().all(slice_is_zero)
    }

    /// Turns the buffer into one that a write can take. No bytes are copied.
    pub fn freeze(self) -> IoBuf {
        let len = self.len;
        IoBuf {
            segments: self.segments.into_iter().map(Bytes::from_owner).collect(),
            len,
        }
    }

    fn for_each_piece(
        &mut self,
        mut at: usize,
        len: usize,
        mut each: impl FnMut(&mut [u8], usize),
    ) {
        assert!(
            at + len <= self.len,
            "{len} bytes at {at} of a buffer of {} bytes",
            self.len
        );
        let mut done = 0;
        for s in self.segments.iter_mut().map(MutSegment::as_mut_slice) {
            if at >= s.len() {
                at -= s.len();
                continue;
            }
            let n = (len - done).min(s.len() - at);
            if n == 0 {
                break;
            }
            each(&mut s[at..at + n], done);
            done += n;
            at = 0;
        }
    }
}

impl From<Vec<u8>> for IoBufMut {
    fn from(mut vec: Vec<u8>) -> IoBufMut {
        let len = vec.len();
        let Some(base) = NonNull::new(vec.as_mut_ptr()) else {
            return IoBufMut::default();
        };
        if len == 0 {
            return IoBufMut::default();
        }
        // SAFETY: the vector's heap block is initialised for `len` bytes, does not move when the vector does, and the
        // vector is dropped, untouched, only with the last part of the buffer.
        unsafe { IoBufMut::from_raw_parts(base, len, Box::new(vec)) }
    }
}

impl fmt::Debug for IoBufMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoBufMut({} bytes in {})", self.len, self.segments.len())
    }
}

/// What a write takes its bytes from: shared, immutable, cheap to clone and to slice.
///
/// ```
/// use blockcore::IoBuf;
/// let data = IoBuf::from(vec![1u8; 1000]);
/// assert_eq!(data.slice(10..20).len(), 10);
/// assert!(IoBuf::zeroes(1 << 20).is_zero());
/// ```
#[derive(Clone, Default)]
pub struct IoBuf {
    segments: SmallVec<[Bytes; 1]>,
    len: usize,
}

impl IoBuf {
    /// `len` zero bytes. Needs no memory of its own.
    pub fn zeroes(len: usize) -> IoBuf {
        let block = Bytes::from_static(&ZERO_BLOCK.0);
        let mut segments = SmallVec::with_capacity(len.div_ceil(ZERO_BLOCK_BYTES));
        let mut left = len;
        while left > 0 {
            let n = left.min(ZERO_BLOCK_BYTES);
            segments.push(block.slice(..n));
            left -= n;
        }
        IoBuf { segments, len }
    }

    /// The number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces, in order.
    pub fn segments(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.segments.iter().map(|b| &b[..])
    }

    /// The bytes, where they lie in one piece.
    pub fn as_slice(&self) -> Option<&[u8]> {
        match self.segments.as_slice() {
            [] => Some(&[]),
            [one] => Some(one),
            _ => None,
        }
    }

    /// Whether every piece starts and ends on a multiple of `align` (a power of two).
    pub fn is_aligned(&self, align: usize) -> bool {
        self.segments
            .iter()
            .all(|s| (s.as_ptr() as usize | s.len()) & (align - 1) == 0)
    }

    /// A part of the buffer, sharing its memory. The range must not reach past the end.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> IoBuf {
        let start = match range.start_bound() {
            Bound::Included(&n) => n,
            Bound::Excluded(&n) => n + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(&n) => n + 1,
            Bound::Excluded(&n) => n,
            Bound::Unbounded => self.len,
        };
        assert!(
            start <= end && end <= self.len,
            "range {start}..{end} of a buffer of {} bytes",
            self.len
        );
        let mut out = IoBuf::default();
        let mut seg_start = 0;
        for s in &self.segments {
            let (from, to) = (start.max(seg_start), end.min(seg_start + s.len()));
            if from < to {
                out.push(s.slice(from - seg_start..to - seg_start));
            }
            seg_start += s.len();
        }
        out
    }

    /// Puts a piece behind the bytes of `self`.
    pub fn push(&mut self, piece: Bytes) {
        self.len += piece.len();
        if !piece.is_empty() {
            self.segments.push(piece);
        }
    }

    /// Puts the pieces of `next` behind the bytes of `self`.
    pub fn append(&mut self, next: IoBuf) {
        self.len += next.len;
        self.segments.extend(next.segments);
    }

    /// Copies the bytes from `at` on to `dst`.
    pub fn copy_to_slice(&self, at: usize, dst: &mut [u8]) {
        let mut done = 0;
        for s in self.slice(at..at + dst.len()).segments() {
            dst[done..done + s.len()].copy_from_slice(s);
            done += s.len();
        }
    }

    /// The bytes as one new vector.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.len);
        self.segments().for_each(|s| out.extend_from_slice(s));
        out
    }

    /// Whether all bytes are zero.
    pub fn is_zero(&self) -> bool {
        self.segments().all(slice_is_zero)
    }
}

impl From<Bytes> for IoBuf {
    fn from(bytes: Bytes) -> IoBuf {
        let mut out = IoBuf::default();
        out.push(bytes);
        out
    }
}

impl From<Vec<u8>> for IoBuf {
    fn from(vec: Vec<u8>) -> IoBuf {
        IoBuf::from(Bytes::from(vec))
    }
}

impl From<&'static [u8]> for IoBuf {
    fn from(slice: &'static [u8]) -> IoBuf {
        IoBuf::from(Bytes::from_static(slice))
    }
}

impl fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoBuf({} bytes in {})", self.len, self.segments.len())
    }
}

/// Whether all bytes are zero. Looks at 64 bytes a step, and stops at the first step that holds another byte.
pub fn slice_is_zero(slice: &[u8]) -> bool {
    let mut chunks = slice.chunks_exact(64);
    chunks
        .by_ref()
        .all(|c| c.iter().fold(0, |acc, b| acc | b) == 0)
        && chunks.remainder().iter().all(|&b| b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_parts_join_again_to_one_piece() {
        let mut whole = IoBufMut::zeroed(10_000);
        for (i, b) in whole.as_mut_slice().unwrap().iter_mut().enumerate() {
            *b = (i % 251) as u8;
        }
        let expected = whole.to_vec();
        let mut tail = whole.split_off(3000);
        let end = tail.split_off(4000);
        whole.append(tail);
        whole.append(end);
        assert_eq!(whole.as_slice().unwrap(), expected);
    }

    #[test]
    fn split_at_the_edges_of_scattered_segments_keeps_every_byte() {
        for at in 0..=9 {
            let mut buf = IoBufMut::from(vec![1, 2, 3]);
            buf.append(IoBufMut::from(vec![4, 5, 6]));
            buf.append(IoBufMut::from(vec![7, 8, 9]));
            let tail = buf.split_off(at);
            assert_eq!((buf.len(), tail.len()), (at, 9 - at));
            let mut all = buf.to_vec();
            all.extend(tail.to_vec());
            assert_eq!(all, [1, 2, 3, 4, 5, 6, 7, 8, 9]);
        }
    }

    #[test]
    fn pieces_are_addressed_across_segments() {
        let mut buf = IoBufMut::from(vec![0; 4]);
        buf.append(IoBufMut::from(vec![0; 4]));
        buf.copy_from_slice(2, &[1, 2, 3, 4]);
        buf.fill_range(7, 1, 9);
        assert_eq!(buf.to_vec(), [0, 0, 1, 2, 3, 4, 0, 9]);
        let mut mid = [0; 3];
        buf.copy_to_slice(3, &mut mid);
        assert_eq!(mid, [2, 3, 4]);
        assert_eq!(buf.freeze().slice(3..6).to_vec(), [2, 3, 4]);
    }

    #[test]
    fn memory_of_the_caller_lives_as_long_as_the_last_part() {
        let owner = Arc::new(());
        let mut mem = Box::new([5u8; 64]);
        let base = NonNull::from(&mut mem[0]);
        // SAFETY: the box outlives the buffer: it is dropped with the keep-alive, and nobody else touches it.
        let mut buf = unsafe { IoBufMut::from_raw_parts(base, 64, Box::new((mem, owner.clone()))) };
        let tail = buf.split_off(32);
        drop(buf);
        assert_eq!(Arc::strong_count(&owner), 2);
        assert_eq!(tail.freeze().to_vec(), vec![5; 32]);
        assert_eq!(Arc::strong_count(&owner), 1);
    }

    #[test]
    fn zeroes_are_zero_and_a_single_other_byte_is_seen() {
        assert!(IoBuf::zeroes(200_000).is_zero());
        for at in [0, 63, 64, 199] {
            let mut v = vec![0u8; 200];
            v[at] = 1;
            assert!(!slice_is_zero(&v), "byte {at}");
        }
    }
}
