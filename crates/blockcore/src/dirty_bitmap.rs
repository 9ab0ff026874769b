// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dirty bitmaps: which parts of a node were changed since a point in time. [`DirtyBitmap`] is one, [`DirtyBitmaps`] are those of a node. What a program does
//! with them are methods of [`Node`](crate::Node), in `bitmap_ops`. `QEMU: BdrvDirtyBitmap`.
//!
//! # How nothing is missed
//!
//! A change is marked *before* the driver is asked to make it (INV REQ-DIRTY-1): it counts whether it is done, fails, or is dropped half way. Who changes what
//! is marked (a new bitmap, one that is enabled, cleared or frozen) does so first, and then waits for the changes that were in flight: they either are marked
//! after all, or have been made before anybody goes on and reads.
//!
//! Where nobody has bitmaps, all that this costs a change is one relaxed load ([`DirtyBitmaps::is_watching`]). It is enough: the load comes after the change
//! was entered as a tracked request, and who adds a bitmap looks at the tracked requests after adding it, both under one lock.
//!
//! # Copies on disk
//!
//! A driver may keep bitmaps in its image: it fills the set when it opens, and stores it when it closes. In between, its copies are worth nothing as soon as a
//! bitmap changes, and they must say so durably before that. [`DirtyBitmaps::copies_are_current`] says whether they still claim to be right.
//!
//! Lock order: the set's lock, then a bitmap's. None is held across an await.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::error::{BlockError, ErrorKind, Result};
use crate::hbitmap::HBitmap;

/// The finest granularity, in bytes.
pub const MIN_GRANULARITY_BYTES: u64 = 512;
/// The coarsest granularity, in bytes.
pub const MAX_GRANULARITY_BYTES: u64 = 1 << 31;

/// One dirty bitmap: one bit for every `granularity` bytes of a node.
#[derive(Debug)]
pub struct DirtyBitmap {
    name: String,
    granularity: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// The length of the disk in bytes.
    length: u64,
    bits: HBitmap,
    /// What a backup works on, while `bits` takes what changes meanwhile.
    frozen: Option<Arc<HBitmap>>,
    enabled: bool,
    persistent: bool,
    inconsistent: bool,
}

impl State {
    fn mark(&mut self, range: Range<u64>, granularity: u64) {
        if range.end > self.length {
            // A file that grows by being written to.
            self.set_length(range.end, granularity);
        }
        let bits = range.start / granularity..range.end.div_ceil(granularity);
        self.bits.set(bits);
    }

    fn set_length(&mut self, length: u64, granularity: u64) {
        self.length = length;
        self.bits.set_len(length.div_ceil(granularity));
    }

    /// See [`DirtyBitmap::check_usable`].
    fn check_usable(&self, name: &str) -> Result<()> {
        if self.frozen.is_some() {
            let text = format!(
                "Bitmap '{name}' is currently in use by another operation and cannot be used"
            );
            return Err(BlockError::invalid(text));
        }
        self.check_consistent(name)
    }

    /// See [`DirtyBitmap::check_consistent`].
    fn check_consistent(&self, name: &str) -> Result<()> {
        if self.inconsistent {
            let text = format!("Bitmap '{name}' is inconsistent and cannot be used");
            let hint = "Try block-dirty-bitmap-remove to delete this bitmap from disk";
            return Err(BlockError::invalid(text).hint(hint));
        }
        Ok(())
    }

    /// Everything that counts as dirty, with what a backup has taken.
    fn all_bits(&self) -> HBitmap {
        let mut bits = self.bits.clone();
        for range in self.frozen.iter().flat_map(|f| f.ranges()) {
            bits.set(range);
        }
        bits
    }
}

/// Dirty bytes of a set of bits.
fn byte_ranges(bits: &HBitmap, granularity: u64, length: u64) -> impl Iterator<Item = Range<u64>> {
    let in_bytes = move |r: Range<u64>| r.start * granularity..(r.end * granularity).min(length);
    bits.ranges().map(in_bytes)
}

impl DirtyBitmap {
    /// An empty bitmap that is enabled, for a disk of `length` bytes.
    ///
    /// # Errors
    /// `InvalidArgument` for a granularity that is no power of two from 512 bytes to 2 GiB, and for an empty name.
    pub fn new(name: impl Into<String>, granularity: u64, length: u64) -> Result<DirtyBitmap> {
        let name = name.into();
        if name.is_empty() {
            return Err(BlockError::invalid("Bitmap name cannot be empty"));
        }
        let possible = MIN_GRANULARITY_BYTES..=MAX_GRANULARITY_BYTES;
        if !granularity.is_power_of_two() || !possible.contains(&granularity) {
            let text = "Granularity must be power of 2 and at least 512";
            return Err(BlockError::invalid(text));
        }
        Ok(DirtyBitmap {
            name,
            granularity,
            state: Mutex::new(State {
                length,
                bits: HBitmap::new(length.div_ceil(granularity)),
                frozen: None,
                enabled: true,
                persistent: false,
                inconsistent: false,
            }),
        })
    }

    /// The bitmap with these bits set. There are as many bits as the disk's length asks for.
    pub fn with_bits(mut self, bits: HBitmap) -> DirtyBitmap {
        let state = self.state_mut();
        assert_eq!(bits.len(), state.bits.len(), "one bit for each granule");
        state.bits = bits;
        self
    }

    /// The bitmap, enabled or not.
    pub fn enabled(mut self, on: bool) -> DirtyBitmap {
        self.state_mut().enabled = on;
        self
    }

    /// The bitmap, stored with the image or not.
    pub fn persistent(mut self, on: bool) -> DirtyBitmap {
        self.state_mut().persistent = on;
        self
    }

    /// The bitmap as one that was not stored well: nobody knows what it should hold, so that it can only be removed.
    pub fn inconsistent(mut self) -> DirtyBitmap {
        let state = self.state_mut();
        (state.inconsistent, state.bits) = (true, HBitmap::new(0));
        self
    }

    fn state_mut(&mut self) -> &mut State {
        self.state
            .get_mut()
            .expect("no code panics while it holds this lock")
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("no code panics while it holds this lock")
    }

    /// The name, unique on its node.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes that one bit stands for: a power of two.
    pub fn granularity(&self) -> u64 {
        self.granularity
    }

    /// The length of the disk that it covers, in bytes.
    pub fn length(&self) -> u64 {
        self.state().length
    }

    /// Whether changes are marked in it.
    pub fn is_enabled(&self) -> bool {
        self.state().enabled
    }

    /// Whether it is stored with the image.
    pub fn is_persistent(&self) -> bool {
        self.state().persistent
    }

    /// Whether it was not stored well, so that nobody knows what it should hold.
    pub fn is_inconsistent(&self) -> bool {
        self.state().inconsistent
    }

    /// Whether a backup works with it.
    pub fn is_busy(&self) -> bool {
        self.state().frozen.is_some()
    }

    /// Whether it can be used: it isn't busy, and not inconsistent.
    ///
    /// # Errors
    /// `InvalidArgument` that says which.
    pub fn check_usable(&self) -> Result<()> {
        self.state().check_usable(&self.name)
    }

    /// Whether it is not inconsistent.
    ///
    /// # Errors
    /// `InvalidArgument`.
    pub fn check_consistent(&self) -> Result<()> {
        self.state().check_consistent(&self.name)
    }

    /// How many bytes are dirty, in whole granules; what a backup has taken is among them.
    pub fn dirty_bytes(&self) -> u64 {
        let state = self.state();
        let count = match state.frozen {
            None => state.bits.count(),
            Some(_) => state.all_bits().count(),
        };
        count * self.granularity
    }

    /// The first dirty range that begins, or goes on, at `offset` or behind it, as it is now. What a backup has taken is not looked at.
    pub fn next_dirty(&self, offset: u64) -> Option<Range<u64>> {
        let state = self.state();
        let first = state.bits.next_set(offset / self.granularity)?;
        let end = state.bits.next_clear(first).unwrap_or(state.bits.len());
        let end = (end * self.granularity).min(state.length);
        let start = (first * self.granularity).max(offset);
        (start < end).then_some(start..end)
    }

    /// A copy of the bits, one for each granule; what a backup has taken is among them.
    pub fn bits(&self) -> HBitmap {
        self.state().all_bits()
    }

    /// Marks what is dirty in `other`, whatever its granularity.
    pub(crate) fn merge(&self, other: &DirtyBitmap) -> Result<()> {
        // Both of one moment: the other disk may change its length.
        let (bits, length) = {
            let other = other.state();
            (other.all_bits(), other.length)
        };
        let mut state = self.state();
        if state.length != length {
            let text = format!(
                "Bitmaps are of different sizes (destination size is {}, source size is {length}) and can't be merged",
                state.length
            );
            return Err(BlockError::invalid(text));
        }
        if self.granularity == other.granularity {
            state.bits.merge(&bits);
        } else {
            for range in byte_ranges(&bits, other.granularity, length) {
                state.mark(range, self.granularity);
            }
        }
        Ok(())
    }

    pub(crate) fn clear(&self) {
        let mut state = self.state();
        state.bits = HBitmap::new(state.bits.len());
    }

    /// Puts what is dirty aside, for a backup.
    pub(crate) fn freeze(self: &Arc<Self>) -> Result<FrozenBitmap> {
        // Looked at again under the lock: of two backups that begin at once, one would take what the other has.
        let mut state = self.state();
        state.check_usable(&self.name)?;
        let empty = HBitmap::new(state.bits.len());
        let bits = Arc::new(std::mem::replace(&mut state.bits, empty));
        state.frozen = Some(bits.clone());
        Ok(FrozenBitmap {
            bitmap: self.clone(),
            bits,
            length: state.length,
        })
    }
}

/// What was dirty when a bitmap was frozen, which is what an incremental backup has to copy. See [`Node::freeze_dirty_bitmap`](crate::Node::freeze_dirty_bitmap).
///
/// Dropping it takes the freezing back: what was dirty then is dirty on.
#[derive(Debug)]
pub struct FrozenBitmap {
    bitmap: Arc<DirtyBitmap>,
    bits: Arc<HBitmap>,
    length: u64,
}

impl FrozenBitmap {
    /// The dirty bytes as ranges, in order, none empty and no two adjacent.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        byte_ranges(&self.bits, self.bitmap.granularity, self.length)
    }

    /// How many bytes are dirty, in whole granules.
    pub fn dirty_bytes(&self) -> u64 {
        self.bits.count() * self.bitmap.granularity
    }

    /// The backup is made: only what has changed since the freezing is dirty from now on.
    pub fn done(self) {
        self.bitmap.state().frozen = None;
        // Dropped now, which finds nothing of its own to take back.
    }
}

impl Drop for FrozenBitmap {
    fn drop(&mut self) {
        let mut state = self.bitmap.state();
        let is_own = |frozen: &Arc<HBitmap>| Arc::ptr_eq(frozen, &self.bits);
        if state.frozen.as_ref().is_some_and(is_own) {
            state.bits = state.all_bits();
            state.frozen = None;
        }
    }
}

/// The dirty bitmaps of a node, shared by the node and a driver that stores them.
#[derive(Debug, Default)]
pub struct DirtyBitmaps {
    /// A change has more to do than to go on.
    watching: AtomicBool,
    set: Mutex<Set>,
}

#[derive(Debug, Default)]
struct Set {
    /// In the order in which they were added.
    all: Vec<Arc<DirtyBitmap>>,
    /// The image holds copies that claim to be right.
    copies_are_current: bool,
}

impl DirtyBitmaps {
    /// The bitmaps that an image was opened with. Its copies claim to be right if any of them is not inconsistent.
    pub fn loaded(bitmaps: Vec<DirtyBitmap>) -> DirtyBitmaps {
        let all: Vec<Arc<DirtyBitmap>> = bitmaps.into_iter().map(Arc::new).collect();
        let set = Set {
            copies_are_current: all.iter().any(|b| !b.is_inconsistent()),
            all,
        };
        DirtyBitmaps {
            watching: AtomicBool::new(set.is_watched()),
            set: Mutex::new(set),
        }
    }

    fn set(&self) -> MutexGuard<'_, Set> {
        self.set
            .lock()
            .expect("no code panics while it holds this lock")
    }

    /// Changes the set, or bitmaps of it, and then sees whether anybody still has to look at changes.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut Vec<Arc<DirtyBitmap>>) -> T) -> T {
        let mut set = self.set();
        let result = change(&mut set.all);
        self.watching.store(set.is_watched(), Ordering::Relaxed);
        result
    }

    /// Whether a change has to be noted anywhere. This is all that a change costs where nobody has bitmaps.
    #[inline]
    pub fn is_watching(&self) -> bool {
        self.watching.load(Ordering::Relaxed)
    }

    /// Whether the image holds copies that still claim to be right.
    pub fn copies_are_current(&self) -> bool {
        self.set().copies_are_current
    }

    /// The driver says that its copies claim to be right from now on, or do no longer.
    pub fn set_copies_are_current(&self, current: bool) {
        let mut set = self.set();
        set.copies_are_current = current;
        self.watching.store(set.is_watched(), Ordering::Relaxed);
    }

    /// All bitmaps, in the order in which they were added.
    pub fn list(&self) -> Vec<Arc<DirtyBitmap>> {
        self.set().all.clone()
    }

    /// Marks a range of bytes in every bitmap that is enabled.
    pub(crate) fn mark(&self, range: Range<u64>) {
        for bitmap in &self.set().all {
            let mut state = bitmap.state();
            if state.enabled && !state.inconsistent {
                state.mark(range.clone(), bitmap.granularity);
            }
        }
    }

    /// The disk has another length. What is new is not dirty.
    pub(crate) fn set_length(&self, length: u64) {
        for bitmap in &self.set().all {
            let mut state = bitmap.state();
            if !state.inconsistent {
                state.set_length(length, bitmap.granularity);
            }
        }
    }
}

impl Set {
    fn is_watched(&self) -> bool {
        let tracks = |b: &Arc<DirtyBitmap>| {
            let state = b.state();
            state.enabled && !state.inconsistent
        };
        self.copies_are_current || self.all.iter().any(tracks)
    }
}

impl DirtyBitmap {
    /// The disk has another length than when the bitmap was made.
    pub(crate) fn set_length(&self, length: u64) {
        self.state().set_length(length, self.granularity);
    }

    pub(crate) fn set_enabled(&self, on: bool) {
        self.state().enabled = on;
    }

    /// As [`BlockError`] of a bitmap that isn't there.
    pub(crate) fn not_found(name: &str) -> BlockError {
        let text = format!("Dirty bitmap '{name}' not found");
        BlockError::new(ErrorKind::NotFound, text)
    }
}
