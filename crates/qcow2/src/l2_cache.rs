// SPDX-License-Identifier: MIT OR Apache-2.0
//! The cache of L2 tables, in slices of a few kilobytes.
//!
//! Slices are found by guest address (slice number = guest cluster / entries per slice), so that a lookup needs no L1 table, and a copied L2 table
//! takes its slices along. Reading an entry takes a shared lock on one of several maps for a few nanoseconds and waits for nothing; only a miss
//! reads the disk.
//!
//! A slice that somebody is about to change, that is dirty, or that is being written back is *pinned* and never evicted: the copy in memory is
//! the only true one. Who changes entries holds the metadata lock; see `image`.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use blockcore::Result;

/// How many maps the slices are spread over.
const SHARDS: usize = 16;

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
    entries: Box<[AtomicU64]>,
    /// Used since the last look of the eviction.
    referenced: AtomicBool,
    pins: AtomicU32,
}

impl L2Slice {
    fn new(entries: Vec<u64>) -> L2Slice {
        L2Slice {
            entries: entries.into_iter().map(AtomicU64::new).collect(),
            referenced: AtomicBool::new(true),
            pins: AtomicU32::new(0),
        }
    }

    /// An entry, by its place in the slice.
    pub fn get(&self, index: usize) -> u64 {
        self.entries[index].load(Ordering::Acquire)
    }

    /// Changes an entry. Only under the metadata lock, on a pinned slice.
    pub fn set(&self, index: usize, entry: u64) {
        debug_assert!(
            self.pins.load(Ordering::Relaxed) > 0,
            "change of a slice that may be evicted"
        );
        self.entries[index].store(entry, Ordering::Release);
    }

    /// The slice as it goes to disk.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.entries
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
    slice_bits: u32,
}

impl L2Cache {
    /// A cache of at most `bytes` bytes of slices with `1 << slice_bits` entries.
    pub fn new(bytes: usize, slice_bits: u32) -> L2Cache {
        let slices = bytes >> (slice_bits + 3);
        L2Cache {
            shards: Default::default(),
            shard_capacity: AtomicUsize::new((slices / SHARDS).max(2)),
            slice_bits,
        }
    }

    /// Holds at most `bytes` bytes from now on. What is too much goes when something comes.
    pub fn set_size(&self, bytes: usize) {
        let slices = bytes >> (self.slice_bits + 3);
        let capacity = (slices / SHARDS).max(2);
        self.shard_capacity.store(capacity, Ordering::Relaxed);
    }

    /// The slice of a guest cluster, and the place of its entry there.
    pub fn locate(&self, guest_cluster: u64) -> (u64, usize) {
        (
            guest_cluster >> self.slice_bits,
            (guest_cluster & ((1 << self.slice_bits) - 1)) as usize,
        )
    }

    /// The number of entries in a slice.
    pub fn slice_entries(&self) -> u64 {
        1 << self.slice_bits
    }

    fn shard(&self, slice: u64) -> &Shard {
        &self.shards[slice as usize % SHARDS]
    }

    /// The L2 entry of a guest cluster, if it is in memory.
    pub fn entry_now(&self, guest_cluster: u64) -> Option<u64> {
        let (number, index) = self.locate(guest_cluster);
        let slices = self.shard(number).read();
        let slice = slices.get(&number)?;
        if !slice.referenced.load(Ordering::Relaxed) {
            slice.referenced.store(true, Ordering::Relaxed);
        }
        Some(slice.get(index))
    }

    /// A slice, if it is in memory.
    pub fn pinned_now(&self, number: u64) -> Option<PinnedSlice> {
        // The pin is set under the lock that the eviction takes, so a slice that was found stays.
        let slices = self.shard(number).read();
        let slice = slices.get(&number)?;
        slice.referenced.store(true, Ordering::Relaxed);
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
    fn insert(&self, number: u64, entries: Vec<u64>) -> PinnedSlice {
        let shard = self.shard(number);
        let slice = Arc::new(L2Slice::new(entries));
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

    /// Forgets slices, which have no changes. Those that are being loaded are forgotten once they are there.
    pub async fn forget(&self, numbers: std::ops::Range<u64>) {
        for shard in &self.shards {
            let _loading = shard.loading.lock().await;
            shard.write().retain(|number, _| !numbers.contains(number));
        }
    }

    /// Makes room for one more: takes out slices that are neither pinned nor used lately, and forgets which were used.
    fn evict(slices: &mut NumberMap<Arc<L2Slice>>, capacity: usize) {
        for _ in 0..2 {
            let mut surplus = (slices.len() + 1).saturating_sub(capacity);
            slices.retain(|_, s| {
                if surplus == 0
                    || s.pins.load(Ordering::Acquire) > 0
                    || s.referenced.swap(false, Ordering::Relaxed)
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
    use super::*;

    #[tokio::test]
    async fn the_cache_stays_within_its_size_but_keeps_pinned_slices() {
        let cache = L2Cache::new(SHARDS * 4 * 8 * 16, 4);
        let pinned = cache.pinned(0, async { Ok(vec![42; 16]) }).await.unwrap();
        for n in 1..1000 {
            cache.pinned(n, async { Ok(vec![n; 16]) }).await.unwrap();
        }
        let total: usize = cache.shards.iter().map(|s| s.read().len()).sum();
        assert!(total <= SHARDS * 4, "{total} slices");
        assert_eq!(cache.entry_now(3), Some(42));
        drop(pinned);
        for n in 1..200 {
            cache
                .pinned(n * SHARDS as u64, async { Ok(vec![n; 16]) })
                .await
                .unwrap();
        }
        assert_eq!(cache.entry_now(3), None);
    }
}
