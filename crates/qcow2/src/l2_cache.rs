// SPDX-License-Identifier: MIT OR Apache-2.0
//! The cache of L2 tables, in slices of a few kilobytes.
//!
//! Slices are found by guest address (slice number = guest cluster / entries per slice), so that a lookup needs no L1 table, and a copied L2 table
//! takes its slices along. Reading an entry takes a shared lock on one of several maps for a few nanoseconds and waits for nothing; only a miss
//! reads the disk.
//!
//! INV QCOW2-PAIR-1: the two words of an extended L2 entry are seen together. A slice counts its changes, up before and up after each; who reads the
//! entry looks at the count before and after, and again if it was odd, or has moved. That is for entries of two words alone.
//!
//! A slice that somebody is about to change, that is dirty, or that is being written back is *pinned* and never evicted: the copy in memory is
//! the only true one. Who changes entries holds the metadata lock; see `image`.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use blockcore::Result;

use crate::l2_entry::L2Entry;

/// How many maps the slices are spread over.
const SHARDS: usize = 16;

/// A slice was used since the last look of the eviction.
const REFERENCED: u8 = 1 << 0;
/// A slice was used since the last cleaning.
const RECENT: u8 = 1 << 1;

/// A hash for small whole numbers: one multiplication.
#[derive(Default)]
pub(crate) struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(b.into());
        }
    }

    fn write_u64(&mut self, n: u64) {
        self.0 = (self.0 ^ n)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

pub(crate) type NumberMap<V> = HashMap<u64, V, BuildHasherDefault<NumberHasher>>;

/// Some consecutive entries of one L2 table, in host byte order.
#[derive(Debug)]
pub(crate) struct L2Slice {
    words: Box<[AtomicU64]>,
    /// Words in an entry.
    entry_words: usize,
    /// How often an entry of two words began to change, or ended to.
    changes: AtomicU64,
    /// [`REFERENCED`], [`RECENT`].
    used: AtomicU8,
    pins: AtomicU32,
}

impl L2Slice {
    fn new(words: Vec<u64>, entry_words: usize) -> L2Slice {
        L2Slice {
            words: words.into_iter().map(AtomicU64::new).collect(),
            entry_words,
            changes: AtomicU64::new(0),
            used: AtomicU8::new(REFERENCED | RECENT),
            pins: AtomicU32::new(0),
        }
    }

    /// Notes that somebody uses it.
    fn touch(&self) {
        const USED: u8 = REFERENCED | RECENT;
        if self.used.load(Ordering::Relaxed) != USED {
            self.used.store(USED, Ordering::Relaxed);
        }
    }

    /// How many entries it has.
    fn entries(&self) -> usize {
        self.words.len() / self.entry_words
    }

    /// An entry, by its place in the slice.
    pub fn get(&self, index: usize) -> L2Entry {
        if self.entry_words == 1 {
            return L2Entry::one_word(self.words[index].load(Ordering::Acquire));
        }
        self.get_two(index)
    }

    /// INV QCOW2-PAIR-1. Whoever sees a new word sees the count that was set before, too, and then looks again.
    fn get_two(&self, index: usize) -> L2Entry {
        loop {
            let before = self.changes.load(Ordering::Acquire);
            let entry = L2Entry {
                word: self.words[2 * index].load(Ordering::Acquire),
                bitmap: self.words[2 * index + 1].load(Ordering::Acquire),
            };
            if before.is_multiple_of(2) && self.changes.load(Ordering::Acquire) == before {
                return entry;
            }
            // The change is a few stores long, unless who makes it has lost its turn on the processor.
            std::thread::yield_now();
        }
    }

    /// Changes an entry. Only under the metadata lock, on a pinned slice.
    pub fn set(&self, index: usize, entry: L2Entry) {
        debug_assert!(
            self.pins.load(Ordering::Relaxed) > 0,
            "change of a slice that may be evicted"
        );
        if self.entry_words == 1 {
            debug_assert_eq!(entry.bitmap, 0);
            return self.words[index].store(entry.word, Ordering::Release);
        }
        self.changes.fetch_add(1, Ordering::AcqRel);
        self.words[2 * index].store(entry.word, Ordering::Release);
        self.words[2 * index + 1].store(entry.bitmap, Ordering::Release);
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// The slice as it goes to disk. Only under the metadata lock.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words
            .iter()
            .flat_map(|e| e.load(Ordering::Acquire).to_be_bytes())
            .collect()
    }
}

/// Keeps a slice in the cache. Cloning makes one more pin.
#[derive(Debug)]
pub(crate) struct PinnedSlice(Arc<L2Slice>);

impl PinnedSlice {
    fn new(slice: &Arc<L2Slice>) -> PinnedSlice {
        slice.pins.fetch_add(1, Ordering::AcqRel);
        PinnedSlice(slice.clone())
    }
}

impl Clone for PinnedSlice {
    fn clone(&self) -> PinnedSlice {
        PinnedSlice::new(&self.0)
    }
}

impl std::ops::Deref for PinnedSlice {
    type Target = L2Slice;

    fn deref(&self) -> &L2Slice {
        &self.0
    }
}

impl Drop for PinnedSlice {
    fn drop(&mut self) {
        self.0.pins.fetch_sub(1, Ordering::AcqRel);
    }
}

#[derive(Debug, Default)]
struct Shard {
    slices: RwLock<NumberMap<Arc<L2Slice>>>,
    /// Held while a slice of this shard is read from disk, so that nobody reads it twice.
    loading: tokio::sync::Mutex<()>,
}

impl Shard {
    fn read(&self) -> RwLockReadGuard<'_, NumberMap<Arc<L2Slice>>> {
        self.slices
            .read()
            .expect("no code panics while it holds this lock")
    }

    fn write(&self) -> RwLockWriteGuard<'_, NumberMap<Arc<L2Slice>>> {
        self.slices
            .write()
            .expect("no code panics while it holds this lock")
    }
}

/// All slices in memory.
#[derive(Debug)]
pub(crate) struct L2Cache {
    shards: [Shard; SHARDS],
    /// The most slices that a shard keeps, pinned ones aside.
    shard_capacity: AtomicUsize,
    /// A slice has `1 << slice_bits` entries. Changes only while nothing is in flight.
    slice_bits: AtomicU32,
    entry_words: usize,
}

impl L2Cache {
    /// A cache of at most `bytes` bytes of slices with `1 << slice_bits` entries of `entry_words` words.
    pub fn new(bytes: usize, slice_bits: u32, entry_words: usize) -> L2Cache {
        let cache = L2Cache {
            shards: Default::default(),
            shard_capacity: AtomicUsize::new(0),
            slice_bits: AtomicU32::new(slice_bits),
            entry_words,
        };
        cache.set_size(bytes);
        cache
    }

    /// Holds at most `bytes` bytes from now on. What is too much goes when something comes.
    pub fn set_size(&self, bytes: usize) {
        let slices = bytes / self.slice_bytes() as usize;
        let capacity = (slices / SHARDS).max(2);
        self.shard_capacity.store(capacity, Ordering::Relaxed);
    }

    /// Slices have `1 << slice_bits` entries from now on. Nothing is in flight, and no slice has changes.
    pub fn set_slice_bits(&self, slice_bits: u32) {
        for shard in &self.shards {
            let mut slices = shard.write();
            let pinned = |s: &Arc<L2Slice>| s.pins.load(Ordering::Acquire) > 0;
            debug_assert!(!slices.values().any(pinned), "a slice that is in use");
            slices.clear();
        }
        self.slice_bits.store(slice_bits, Ordering::Release);
    }

    fn slice_bits(&self) -> u32 {
        self.slice_bits.load(Ordering::Relaxed)
    }

    /// The slice of a guest cluster, and the place of its entry there.
    pub fn locate(&self, guest_cluster: u64) -> (u64, usize) {
        let bits = self.slice_bits();
        (
            guest_cluster >> bits,
            (guest_cluster & ((1 << bits) - 1)) as usize,
        )
    }

    /// The number of entries in a slice.
    pub fn slice_entries(&self) -> u64 {
        1 << self.slice_bits()
    }

    /// The length of a slice on disk, in bytes.
    pub fn slice_bytes(&self) -> u64 {
        self.slice_entries() * self.entry_words as u64 * 8
    }

    /// Forgets the slices that nobody has used since the last time, and says how many are left.
    pub fn clean(&self) -> usize {
        let mut left = 0;
        for shard in &self.shards {
            let mut slices = shard.write();
            slices.retain(|_, s| {
                s.pins.load(Ordering::Acquire) > 0
                    || s.used.fetch_and(!RECENT, Ordering::Relaxed) & RECENT != 0
            });
            slices.shrink_to_fit();
            left += slices.len();
        }
        left
    }

    fn shard(&self, slice: u64) -> &Shard {
        &self.shards[slice as usize % SHARDS]
    }

    /// The L2 entry of a guest cluster, if it is in memory.
    pub fn entry_now(&self, guest_cluster: u64) -> Option<L2Entry> {
        let (number, index) = self.locate(guest_cluster);
        let slices = self.shard(number).read();
        let slice = slices.get(&number)?;
        slice.touch();
        Some(slice.get(index))
    }

    /// Shows the L2 entries from a guest cluster on, to the end of their slice, until one `goes_on` no further. Says whether all did; `None`: the slice is not
    /// in memory.
    pub fn all_now(
        &self,
        guest_cluster: u64,
        mut goes_on: impl FnMut(L2Entry) -> bool,
    ) -> Option<bool> {
        let (number, index) = self.locate(guest_cluster);
        let slices = self.shard(number).read();
        let slice = slices.get(&number)?;
        slice.touch();
        Some((index..slice.entries()).all(|i| goes_on(slice.get(i))))
    }

    /// A slice, if it is in memory.
    pub fn pinned_now(&self, number: u64) -> Option<PinnedSlice> {
        // The pin is set under the lock that the eviction takes, so a slice that was found stays.
        let slices = self.shard(number).read();
        let slice = slices.get(&number)?;
        slice.touch();
        Some(PinnedSlice::new(slice))
    }

    /// A slice, read by `load` if it isn't in memory. `load` answers at once, without waiting: `None` if it can't, or somebody else is loading.
    pub fn load_now(
        &self,
        number: u64,
        load: impl FnOnce() -> Option<Vec<u64>>,
    ) -> Option<PinnedSlice> {
        let shard = self.shard(number);
        let _loading = shard.loading.try_lock().ok()?;
        if let Some(slice) = self.pinned_now(number) {
            return Some(slice);
        }
        Some(self.insert(number, load()?))
    }

    /// A slice, read by `load` if it isn't in memory. To be called in a task of its own: who is given up while he loads holds up everybody else.
    ///
    /// # Errors
    /// Those of `load`.
    pub async fn pinned(
        &self,
        number: u64,
        load: impl Future<Output = Result<Vec<u64>>>,
    ) -> Result<PinnedSlice> {
        if let Some(slice) = self.pinned_now(number) {
            return Ok(slice);
        }
        let shard = self.shard(number);
        let _loading = shard.loading.lock().await;
        if let Some(slice) = self.pinned_now(number) {
            return Ok(slice);
        }
        Ok(self.insert(number, load.await?))
    }

    /// Puts in a slice that isn't there. The caller has the right to load.
    fn insert(&self, number: u64, words: Vec<u64>) -> PinnedSlice {
        let shard = self.shard(number);
        let slice = Arc::new(L2Slice::new(words, self.entry_words));
        let mut slices = shard.write();
        let capacity = self.shard_capacity.load(Ordering::Relaxed);
        if slices.len() >= capacity {
            Self::evict(&mut slices, capacity);
        }
        slices.insert(number, slice.clone());
        PinnedSlice::new(&slice)
    }

    /// Forgets all slices, none of which has changes. Those that are being loaded are forgotten once they are there.
    pub async fn clear(&self) {
        self.forget(0..u64::MAX).await;
    }

    /// Forgets slices, which have no changes: at once, and those that are being loaded once they are there.
    pub async fn forget(&self, numbers: std::ops::Range<u64>) {
        let forget = |shard: &Shard| shard.write().retain(|number, _| !numbers.contains(number));
        self.shards.iter().for_each(forget);
        for shard in &self.shards {
            let _loading = shard.loading.lock().await;
            forget(shard);
        }
    }

    /// Makes room for one more: takes out slices that are neither pinned nor used lately, and forgets which were used.
    fn evict(slices: &mut NumberMap<Arc<L2Slice>>, capacity: usize) {
        for _ in 0..2 {
            let mut surplus = (slices.len() + 1).saturating_sub(capacity);
            slices.retain(|_, s| {
                if surplus == 0
                    || s.pins.load(Ordering::Acquire) > 0
                    || s.used.fetch_and(!REFERENCED, Ordering::Relaxed) & REFERENCED != 0
                {
                    return true;
                }
                surplus -= 1;
                false
            });
            if surplus == 0 {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[tokio::test]
    async fn the_cache_stays_within_its_size_but_keeps_pinned_slices() {
        let cache = L2Cache::new(SHARDS * 4 * 8 * 16, 4, 1);
        let pinned = cache.pinned(0, async { Ok(vec![42; 16]) }).await.unwrap();
        for n in 1..1000 {
            cache.pinned(n, async { Ok(vec![n; 16]) }).await.unwrap();
        }
        let total: usize = cache.shards.iter().map(|s| s.read().len()).sum();
        assert!(total <= SHARDS * 4, "{total} slices");
        assert_eq!(cache.entry_now(3), Some(L2Entry::one_word(42)));
        drop(pinned);
        for n in 1..200 {
            cache
                .pinned(n * SHARDS as u64, async { Ok(vec![n; 16]) })
                .await
                .unwrap();
        }
        assert_eq!(cache.entry_now(3), None);
    }

    #[tokio::test]
    async fn a_cache_that_is_made_smaller_stays_within_its_new_size() {
        for entry_words in [1, 2] {
            let cache = L2Cache::new(SHARDS << 20, 4, entry_words);
            cache.set_size(SHARDS * 4 * 8 * 16);
            for n in 0..1000 {
                let words = vec![n; 16 * entry_words];
                cache.pinned(n, async { Ok(words) }).await.unwrap();
            }
            let total: usize = cache.shards.iter().map(|s| s.read().len()).sum();
            assert!(total <= SHARDS * 4 / entry_words, "{total} slices");
        }
    }

    #[tokio::test]
    async fn a_cleaning_forgets_what_was_not_used_since_the_last_one() {
        let cache = L2Cache::new(1 << 20, 4, 1);
        let pinned = cache.pinned(0, async { Ok(vec![1; 16]) }).await.unwrap();
        for n in 1..10 {
            cache.pinned(n, async { Ok(vec![n; 16]) }).await.unwrap();
        }
        assert_eq!(cache.clean(), 10, "all are new");
        assert!(cache.entry_now(3 << 4).is_some());
        assert_eq!(
            cache.clean(),
            2,
            "the one that is pinned, the one that was read"
        );
        assert!(cache.entry_now(3 << 4).is_some() && cache.entry_now(4 << 4).is_none());
        drop(pinned);
        assert_eq!(cache.clean(), 2, "both were in use lately");
        assert_eq!(cache.clean(), 0);
    }

    #[test]
    fn a_size_counts_both_words_of_an_entry() {
        let cache = L2Cache::new(SHARDS * 8 * 4096, 8, 2);
        let before = cache.shard_capacity.load(Ordering::Relaxed);
        cache.set_size(SHARDS * 8 * 4096);
        assert_eq!(cache.shard_capacity.load(Ordering::Relaxed), before);
        assert_eq!(before, 8);
    }

    // INV QCOW2-PAIR-1: one thread changes an entry, always to a bitmap that is the other word's complement, and others read it meanwhile.
    #[test]
    fn nobody_sees_half_of_an_entry() {
        let slice = Arc::new(L2Slice::new(vec![0, !0, 0, !0], 2));
        let pinned = PinnedSlice::new(&slice);
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !is_over.load(Ordering::Acquire) {
                        let entry = slice.get(1);
                        assert_eq!(entry.word, !entry.bitmap, "halves of two entries");
                    }
                });
            }
            for word in 0..500_000 {
                let bitmap = !word;
                pinned.set(1, L2Entry { word, bitmap });
            }
            is_over.store(true, Ordering::Release);
        });
        assert_eq!(slice.get(0).bitmap, !0);
    }
}
