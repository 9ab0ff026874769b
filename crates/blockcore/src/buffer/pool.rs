// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`BufferPool`]: buffers of one size that are used again. For work that moves a lot of data through a few large buffers: fresh
//! memory costs a page fault and a zeroed page for every 4 KiB, which is more than copying them.
//!
//! A block comes back when the last segment over it is gone, whoever held that: nobody can have it twice. What is handed out has the bytes of its last
//! use in it, never uninitialised ones.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use smallvec::smallvec;

use super::{Allocation, IoBufMut, MutSegment, PAGE_BYTES};

/// Buffers of one size that are used again. Clones are the same pool. Buffers may outlive it.
///
/// ```
/// use blockcore::buffer::BufferPool;
/// let pool = BufferPool::new(65536);
/// let mut first = pool.take(4096);
/// first.fill(7);
/// drop(first);
/// // The same memory, with what was left in it.
/// assert_eq!(pool.take(10).to_vec(), [7; 10]);
/// ```
#[derive(Clone, Debug)]
pub struct BufferPool(Arc<Blocks>);

/// The blocks that nobody uses.
#[derive(Debug)]
pub(super) struct Blocks {
    layout: Layout,
    free: Mutex<Vec<NonNull<u8>>>,
}

// SAFETY: the pointers are owned blocks that nothing else refers to; they are only reached under the lock.
unsafe impl Send for Blocks {}
// SAFETY: as above.
unsafe impl Sync for Blocks {}

impl Blocks {
    /// Takes a block back. `base` came from this pool, and no segment over it is left.
    pub(super) fn give_back(&self, base: NonNull<u8>) {
        self.free
            .lock()
            .expect("no code panics while it holds this lock")
            .push(base);
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        let free = self
            .free
            .get_mut()
            .expect("no code panics while it holds this lock");
        for base in free.drain(..) {
            // SAFETY: every block came from `alloc_zeroed` with this very layout, and is in the list once.
            unsafe { dealloc(base.as_ptr(), self.layout) }
        }
    }
}

impl BufferPool {
    /// Buffers of up to `len` bytes (not 0), aligned to a page.
    pub fn new(len: usize) -> BufferPool {
        assert!(len > 0, "a pool of empty buffers");
        let layout = Layout::from_size_align(len, PAGE_BYTES)
            .expect("buffer size overflows the address space");
        BufferPool(Arc::new(Blocks {
            layout,
            free: Mutex::default(),
        }))
    }

    /// A buffer of `len` bytes, at most as many as the pool was made for. It holds what its last user left; the first time, zeroes.
    pub fn take(&self, len: usize) -> IoBufMut {
        assert!(
            len <= self.0.layout.size(),
            "{len} bytes of a pool of {} byte buffers",
            self.0.layout.size()
        );
        let known = self
            .0
            .free
            .lock()
            .expect("no code panics while it holds this lock")
            .pop();
        let base = known.unwrap_or_else(|| {
            // SAFETY: the layout's size is not zero (checked in `new`).
            let raw = unsafe { alloc_zeroed(self.0.layout) };
            NonNull::new(raw).unwrap_or_else(|| handle_alloc_error(self.0.layout))
        });
        let owner = Arc::new(Allocation::Pooled {
            base,
            home: self.0.clone(),
        });
        IoBufMut {
            segments: smallvec![MutSegment { owner, base, len }],
            len,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_comes_back_only_with_its_last_part_and_may_outlive_the_pool() {
        let pool = BufferPool::new(8192);
        let mut front = pool.take(8192);
        let back = front.split_off(4096).freeze();
        drop(front);
        assert_eq!(pool.0.free.lock().unwrap().len(), 0);
        let other = pool.take(1);
        drop(back);
        assert_eq!(pool.0.free.lock().unwrap().len(), 1);
        drop(pool);
        assert_eq!(other.to_vec(), [0]);
    }
}
