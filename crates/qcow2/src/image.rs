// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`Image`]: one open qcow2 image, and how a guest offset is looked up in it.
//!
//! # Locks, from the outside in
//!
//! 1. `changing`: guest clusters whose mapping some request is about to change. Held over guest data I/O: it is what makes two allocating writes to a
//!    cluster follow each other. Requests that change no mapping (reads, writes in place) never take it.
//! 2. `commits`: one write-back of metadata at a time; see `commit`.
//! 3. `meta`: refcounts, what is dirty, what is freed. Never held over guest data I/O, only over metadata I/O.
//! 4. the shards of the L2 cache, the L1 table, `owned`: for nanoseconds, never over an await.
//!
//! Whoever looks up a host offset and uses it is inside an epoch (`epoch`) until it is done with it.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, RwLock, RwLockReadGuard};

use blockcore::orphan::Orphans;
use blockcore::tracked::TrackedRequests;
use blockcore::{
    BlockError, Child, DebugEvent, Diagnostics, ErrorKind, InFlight, IoBuf, IoBufMut, ReadFlags,
    Result, WriteFlags,
};

use crate::alloc::Meta;
use crate::bitmap_load::Bitmaps;
use crate::commit::CommitState;
use crate::crypto::Crypto;
use crate::data_file::DataFile;
use crate::epoch::Epochs;
use crate::format::{L1E_OFFSET_MASK, L2E_OFFSET_MASK, OFLAG_ZERO};
use crate::header::{Header, Incompatible};
use crate::inflated::Inflated;
use crate::l2_cache::{L2Cache, NumberMap, PinnedSlice};
use crate::l2_entry::{EntryFormat, L2Entry};
use crate::l2_table::{BadEntry, L1Table, Mapping};
use crate::runtime::RuntimeOptions;

/// Byte offset of the incompatible feature bits in the header.
pub(crate) const INCOMPATIBLE_OFFSET: u64 = 72;

/// A number in hex as C's `%#x` shows it: zero has no prefix.
pub(crate) struct Hex(pub u64);

impl std::fmt::Display for Hex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0 == 0 {
            f.write_str("0")
        } else {
            write!(f, "{:#x}", self.0)
        }
    }
}

/// A request's task ended with its runtime.
pub(crate) fn cancelled() -> BlockError {
    BlockError::from_errno(libc::ECANCELED).message("The request was cancelled")
}

/// Words as they lie on disk.
pub(crate) fn be_words(bytes: &[u8]) -> Vec<u64> {
    let word = |c: &[u8]| u64::from_be_bytes(c.try_into().expect("eight bytes"));
    bytes.chunks_exact(8).map(word).collect()
}

/// What a mapping is looked up for: a wrong entry is described in other words to a reader than to a writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Intent {
    Read,
    Write,
}

/// What a host cluster of metadata holds. INV QCOW2-META-1 is checked against this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Header,
    L1,
    L2,
    RefcountTable,
    RefcountBlock,
    SnapshotTable,
    InactiveL1,
    InactiveL2,
    EncryptionHeader,
    BitmapDirectory,
    BitmapTable,
    BitmapData,
    /// Two structures claim it: nothing may be written there.
    Disputed,
}

impl Owner {
    fn describe(self) -> &'static str {
        match self {
            Owner::Header => "qcow2_header",
            Owner::L1 => "active L1 table",
            Owner::L2 => "active L2 table",
            Owner::RefcountTable => "refcount table",
            Owner::RefcountBlock => "refcount block",
            Owner::SnapshotTable => "snapshot table",
            Owner::InactiveL1 => "inactive L1 table",
            Owner::InactiveL2 => "inactive L2 table",
            Owner::EncryptionHeader => "encryption header",
            Owner::BitmapDirectory => "bitmap directory",
            Owner::BitmapTable => "bitmap table",
            Owner::BitmapData => "bitmap",
            Owner::Disputed => "disputed metadata",
        }
    }
}

/// One open image.
pub(crate) struct Image {
    pub file: Child,
    pub backing: Option<Child>,
    pub data: DataFile,
    /// How guest data is encrypted, if it is.
    pub crypto: Option<Crypto>,
    pub header: Mutex<Header>,
    /// 2 or 3; `amend` changes it.
    pub format_version: AtomicU32,
    pub cluster_bits: u32,
    /// What L2 entries look like, but for the version: see [`Image::entries`].
    pub entry_format: EntryFormat,
    /// The length of the disk in bytes.
    pub size: AtomicU64,
    pub l1: L1Table,
    pub l2: L2Cache,
    /// What refcount blocks may take up in memory, in bytes.
    pub refcount_cache_bytes: Arc<AtomicUsize>,
    /// The caches will be looked at once `cache-clean-interval` is over, if there is one.
    pub is_to_be_cleaned: AtomicBool,
    pub meta: tokio::sync::Mutex<Meta>,
    /// Which host clusters hold metadata. Empty for images that are open read-only.
    pub owned: RwLock<NumberMap<Owner>>,
    pub changing: TrackedRequests,
    pub epochs: Epochs,
    /// Compressed clusters that were read lately.
    pub inflated: Inflated,
    pub commits: CommitState,
    /// Work that goes on when its future is dropped.
    pub tasks: Arc<InFlight>,
    /// Changes whose future was dropped, and that are still going on.
    pub orphans: Orphans,
    pub corrupt: AtomicBool,
    /// Corruption was found since the image was opened, and somebody was told.
    pub corruption_said: AtomicBool,
    pub writable: AtomicBool,
    /// How this writer works.
    pub runtime: RwLock<RuntimeOptions>,
    /// What the header on disk says is not known: see `overhaul`. Nothing is written any more.
    pub uncertain: AtomicBool,
    /// The tables in memory are those of a snapshot: see `snapshot_load`.
    pub shows_snapshot: AtomicBool,
    pub diagnostics: Diagnostics,
    pub bitmaps: Bitmaps,
    /// See `map`.
    pub metadata_preallocated: OnceLock<bool>,
    /// Host clusters from this offset on were not in the file when it was opened, and read as zero until written. `u64::MAX`: none do.
    pub zero_from: u64,
    /// The file may have been made longer than it has to be.
    pub extended_ahead: AtomicBool,
}

impl Image {
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.format_version.load(Ordering::Acquire)
    }

    /// What L2 entries look like.
    pub fn entries(&self) -> EntryFormat {
        EntryFormat {
            version: self.version(),
            ..self.entry_format
        }
    }

    /// Bytes in the smallest part of a cluster that has a state of its own: a subcluster, or without extended L2 entries a cluster.
    pub fn subcluster_size(&self) -> u64 {
        1 << self.entries().subcluster_bits()
    }

    /// Whether what is not allocated may show a backing file: the one that is open, or, where options have put another or none in its place, the one that the
    /// header names.
    pub fn may_show_backing(&self) -> bool {
        self.backing.is_some() || self.header().backing.is_some()
    }

    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// The header as it is in memory. Not to be held over an await.
    pub fn header(&self) -> MutexGuard<'_, Header> {
        self.header
            .lock()
            .expect("no code panics while it holds this lock")
    }

    /// Entries in an L2 table, as a power of two.
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - 3 - u32::from(self.entries().is_extended)
    }

    /// The L1 index of a guest cluster.
    pub fn l1_index(&self, guest_cluster: u64) -> usize {
        (guest_cluster >> self.l2_bits()) as usize
    }

    /// Slices in an L2 table.
    pub fn slices_per_table(&self) -> u64 {
        (1 << self.l2_bits()) / self.l2.slice_entries()
    }

    /// The host offset of a slice, as the L1 table has it now; `None` where there is no L2 table.
    pub fn slice_offset(&self, slice: u64) -> Result<Option<u64>> {
        let per_table = self.slices_per_table();
        let l1_index = (slice / per_table) as usize;
        let table = self.l1.get(l1_index) & L1E_OFFSET_MASK;
        if table == 0 {
            return Ok(None);
        }
        if table & (self.cluster_size() - 1) != 0 {
            let text = format!(
                "L2 table offset {} unaligned (L1 index: {})",
                Hex(table),
                Hex(l1_index as u64)
            );
            return Err(self.signal_corruption(&text, table));
        }
        Ok(Some(table + slice % per_table * self.l2.slice_bytes()))
    }

    /// A slice; `None` where there is no L2 table. The caller is inside an epoch, or holds the metadata lock.
    ///
    /// Reading it from disk is the work of a task, so that a caller who is never polled again holds up nobody else (INV REQ-PARK-1).
    ///
    /// # Errors
    /// Those of the file; `Corrupt` for a table at an impossible place.
    pub async fn slice(self: &Arc<Self>, number: u64) -> Result<Option<PinnedSlice>> {
        if let Some(slice) = self.l2.pinned_now(number) {
            return Ok(Some(slice));
        }
        if self.slice_offset(number)?.is_none() {
            return Ok(None);
        }
        self.note_cached();
        if let Some(slice) = self.l2.load_now(number, || self.read_slice_now(number)) {
            return Ok(Some(slice));
        }
        let image = self.clone();
        // Whoever closes the image waits for this, since what was freed can't be given back as long as somebody may read it.
        let in_flight = self.tasks.enter_owned();
        let load = tokio::spawn(async move {
            let _in_flight = in_flight;
            // The caller's epoch may end before this does.
            let _epoch = image.epochs.enter();
            image.l2.pinned(number, image.read_slice(number)).await
        });
        load.await.unwrap_or_else(|_| Err(cancelled())).map(Some)
    }

    /// A slice's words from disk. The caller has the right to load: who waited for it may have slept through a copy of the table.
    async fn read_slice(&self, number: u64) -> Result<Vec<u64>> {
        let bytes = self.l2.slice_bytes() as usize;
        match self.slice_offset(number)? {
            None => Ok(vec![0; bytes / 8]),
            Some(offset) => {
                self.file.debug_event(DebugEvent::L2Load).await;
                self.read_words(offset, bytes).await
            }
        }
    }

    /// `bytes` bytes of 64-bit entries of metadata.
    pub async fn read_words(&self, offset: u64, bytes: usize) -> Result<Vec<u64>> {
        let buf = IoBufMut::zeroed(bytes);
        let read = self.file.preadv(offset, buf, ReadFlags::empty()).await?;
        Ok(be_words(&read.to_vec()))
    }

    /// As [`read_slice`](Image::read_slice), if the host has it in memory.
    fn read_slice_now(&self, number: u64) -> Option<Vec<u64>> {
        let mut bytes = vec![0; self.l2.slice_bytes() as usize];
        let offset = self.slice_offset(number).ok()??;
        let there = self.file.read_nowait(offset, &mut bytes);
        there.then(|| be_words(&bytes))
    }

    /// What lies at a guest offset, and for how many bytes of its cluster that goes on, if it can be told without reading the disk. `Some(Err)`: the entry
    /// makes no sense.
    fn span_now(&self, offset: u64) -> Option<Result<(Mapping, u64), BadEntry>> {
        let (cluster, within) = (offset >> self.cluster_bits, self.in_cluster(offset));
        match self.l2.entry_now(cluster) {
            Some(entry) => Some(self.entries().span(entry, within)),
            None if self.l1.get(self.l1_index(cluster)) & L1E_OFFSET_MASK == 0 => {
                Some(Ok((Mapping::Unallocated, self.cluster_size() - within)))
            }
            None => None,
        }
    }

    async fn span(self: &Arc<Self>, offset: u64, intent: Intent) -> Result<(Mapping, u64)> {
        if let Some(Ok(span)) = self.span_now(offset) {
            return Ok(span);
        }
        let cluster = offset >> self.cluster_bits;
        let entry = self.entry(cluster).await?;
        let span = self.entries().span(entry, self.in_cluster(offset));
        span.map_err(|bad| self.bad_entry(bad, cluster, entry, intent))
    }

    /// The L2 entry of a guest cluster; an empty one where there is no L2 table.
    ///
    /// # Errors
    /// Those of reading the L2 table.
    pub async fn entry(self: &Arc<Self>, guest_cluster: u64) -> Result<L2Entry> {
        if let Some(entry) = self.l2.entry_now(guest_cluster) {
            return Ok(entry);
        }
        let (number, index) = self.l2.locate(guest_cluster);
        let slice = self.slice(number).await?;
        Ok(slice.map_or(L2Entry::default(), |s| s.get(index)))
    }

    /// The mapping of a guest cluster as a whole (see [`EntryFormat::whole`]).
    ///
    /// # Errors
    /// Those of reading its L2 table; `Corrupt` for an entry that makes no sense.
    pub async fn mapping(self: &Arc<Self>, guest_cluster: u64, intent: Intent) -> Result<Mapping> {
        let entry = self.entry(guest_cluster).await?;
        self.decode(guest_cluster, entry, intent)
    }

    /// Reads an L2 entry as a whole, and marks the image corrupt where it makes no sense.
    pub fn decode(&self, guest_cluster: u64, entry: L2Entry, intent: Intent) -> Result<Mapping> {
        let whole = self.entries().whole(entry);
        whole.map_err(|bad| self.bad_entry(bad, guest_cluster, entry, intent))
    }

    /// An L2 entry makes no sense: marks the image corrupt.
    fn bad_entry(
        &self,
        bad: BadEntry,
        guest_cluster: u64,
        entry: L2Entry,
        intent: Intent,
    ) -> BlockError {
        let l2_index = guest_cluster & ((1 << self.l2_bits()) - 1);
        let table = self.l1.get(self.l1_index(guest_cluster)) & L1E_OFFSET_MASK;
        let at = format!("(L2 offset: {}, L2 index: {})", Hex(table), Hex(l2_index));
        let guest = Hex(guest_cluster << self.cluster_bits);
        let text = match (bad, intent) {
            (BadEntry::ZeroBeforeV3, _) => {
                format!("Zero cluster entry found in pre-v3 image {at}")
            }
            (BadEntry::Subclusters, Intent::Read) => {
                format!("Invalid cluster entry found  {at}")
            }
            (BadEntry::Subclusters, Intent::Write) => format!("Invalid cluster entry found {at}"),
            (BadEntry::Unaligned(host), Intent::Read) => {
                format!("Cluster allocation offset {} unaligned {at}", Hex(host))
            }
            (BadEntry::Unaligned(host), Intent::Write) => {
                let what = if entry.word & OFLAG_ZERO != 0 {
                    "Preallocated zero"
                } else {
                    "Data"
                };
                format!(
                    "{what} cluster offset {} unaligned (guest offset: {guest})",
                    Hex(host)
                )
            }
        };
        self.signal_corruption(&text, entry.word & L2E_OFFSET_MASK)
    }

    /// The mapping at a guest offset and for how many of `bytes` bytes it goes on, if that can be told without reading the disk.
    pub fn run_now(&self, offset: u64, bytes: u64) -> Option<(Mapping, u64)> {
        let (first, covered) = self.span_now(offset)?.ok()?;
        let mut covered = self.covered_now(&first, offset, covered, bytes);
        // What goes on to the end of its cluster may go on where there is no table.
        while covered < bytes && self.in_cluster(offset + covered) == 0 {
            let at = offset + covered;
            let index = (at >> self.cluster_bits) - (offset >> self.cluster_bits);
            match self.span_now(at) {
                Some(Ok((next, n))) if first.continues(index, self.cluster_size(), &next) => {
                    covered = self.covered_now(&first, offset, covered + n, bytes);
                }
                _ => break,
            }
        }
        Some((first, covered.min(bytes)))
    }

    /// How far `first`, the mapping at `offset`, goes on in what is in memory: known are `covered` bytes, of interest `bytes`.
    fn covered_now(&self, first: &Mapping, offset: u64, mut covered: u64, bytes: u64) -> u64 {
        let (entries, size) = (self.entries(), self.cluster_size());
        let cluster = offset >> self.cluster_bits;
        while covered < bytes && self.in_cluster(offset + covered) == 0 {
            let at = (offset + covered) >> self.cluster_bits;
            let mut index = at - cluster;
            let all = self.l2.all_now(at, |entry| match entries.span(entry, 0) {
                Ok((next, n)) if covered < bytes && first.continues(index, size, &next) => {
                    covered += n;
                    index += 1;
                    n == size
                }
                _ => false,
            });
            if all != Some(true) {
                break;
            }
        }
        covered
    }

    /// The mapping at a guest offset, and for how many of `bytes` bytes it goes on.
    ///
    /// # Errors
    /// As [`mapping`](Image::mapping).
    pub async fn run(
        self: &Arc<Self>,
        offset: u64,
        bytes: u64,
        intent: Intent,
    ) -> Result<(Mapping, u64)> {
        let cluster = offset >> self.cluster_bits;
        let (first, covered) = self.span(offset, intent).await?;
        let mut covered = self.covered_now(&first, offset, covered, bytes);
        while covered < bytes && self.in_cluster(offset + covered) == 0 {
            let next = (offset + covered) >> self.cluster_bits;
            if first == Mapping::Unallocated
                && self.l2.entry_now(next).is_none()
                && self.is_table_start(next)
            {
                // A whole table that isn't there is one step, not thousands.
                let table = self.l1_index(next);
                if self.l1.get(table) & L1E_OFFSET_MASK == 0 {
                    covered += 1u64 << (self.l2_bits() + self.cluster_bits);
                    continue;
                }
            }
            let (mapping, n) = self.span(offset + covered, intent).await?;
            if !first.continues(next - cluster, self.cluster_size(), &mapping) {
                break;
            }
            covered = self.covered_now(&first, offset, covered + n, bytes);
        }
        Ok((first, covered.min(bytes)))
    }

    fn is_table_start(&self, guest_cluster: u64) -> bool {
        guest_cluster & ((1 << self.l2_bits()) - 1) == 0
    }

    /// Says that host clusters hold metadata.
    pub fn own(&self, host: u64, bytes: u64, owner: Owner) {
        let mut owned = self
            .owned
            .write()
            .expect("no code panics while it holds this lock");
        for cluster in
            host >> self.cluster_bits..host.saturating_add(bytes).div_ceil(self.cluster_size())
        {
            owned
                .entry(cluster)
                .and_modify(|o| *o = Owner::Disputed)
                .or_insert(owner);
        }
    }

    /// Says that a host cluster holds metadata no longer.
    pub fn disown(&self, cluster: u64) {
        self.owned
            .write()
            .expect("no code panics while it holds this lock")
            .remove(&cluster);
    }

    /// What metadata lies in a range of host bytes, if any.
    pub fn owner_in(&self, host: u64, bytes: u64) -> Option<Owner> {
        let owned = self
            .owned
            .read()
            .expect("no code panics while it holds this lock");
        (host >> self.cluster_bits..host.saturating_add(bytes).div_ceil(self.cluster_size()))
            .find_map(|c| owned.get(&c).copied())
    }

    /// How this writer works. Not to be held over an await.
    pub fn runtime(&self) -> RwLockReadGuard<'_, RuntimeOptions> {
        self.runtime
            .read()
            .expect("no code panics while it holds this lock")
    }

    /// INV QCOW2-META-1: refuses a write of guest data over metadata, and marks the image corrupt.
    pub fn check_data_write(&self, host: u64, bytes: u64) -> Result<()> {
        if self.has_data_file() {
            return Ok(());
        }
        match self.owner_in(host, bytes) {
            Some(owner) if self.runtime().overlap_checks.includes(owner) => {
                Err(self.refuse_overlap(host, owner))
            }
            _ => Ok(()),
        }
    }

    pub fn refuse_overlap(&self, host: u64, owner: Owner) -> BlockError {
        let text = format!(
            "Preventing invalid write on metadata (overlaps with {})",
            owner.describe()
        );
        self.signal_corruption(&text, host)
    }

    /// Writes metadata to where that kind of metadata lies, and nowhere else (INV QCOW2-META-1).
    pub async fn write_metadata(&self, owner: Owner, host: u64, bytes: Vec<u8>) -> Result<()> {
        let length = bytes.len() as u64;
        for cluster in host >> self.cluster_bits..(host + length).div_ceil(self.cluster_size()) {
            let found = self.owner_in(cluster << self.cluster_bits, 1);
            if found != Some(owner) {
                return Err(self.refuse_overlap(host, found.unwrap_or(Owner::Disputed)));
            }
        }
        self.file
            .pwritev(host, IoBuf::from(bytes), WriteFlags::empty())
            .await
    }

    /// The image contradicts itself. Says so once, stops all further changes, and leaves it to `mark_corrupt` to set the bit on disk.
    pub fn signal_corruption(&self, what: &str, offset: u64) -> BlockError {
        self.corrupt.store(true, Ordering::Release);
        if !self.corruption_said.swap(true, Ordering::AcqRel) {
            let line = if self.writable.load(Ordering::Acquire) {
                format!(
                    "qcow2: Marking image as corrupt: {what}; further corruption events will be suppressed"
                )
            } else {
                format!(
                    "qcow2: Image is corrupt: {what}; further non-fatal corruption events will be suppressed"
                )
            };
            self.diagnostics.warn(&line);
        }
        BlockError::corrupt(what).at(offset)
    }

    /// Fails for a change of what lies past the end. Who asks was told that it doesn't, but the disk may have become shorter since, while he waited for
    /// that change.
    pub fn check_end(&self, end: u64) -> Result<()> {
        if end > self.size() {
            return Err(BlockError::from_errno(libc::EIO));
        }
        Ok(())
    }

    /// Fails once the image is known to be corrupt, or not known well enough, so that no change makes it worse.
    pub fn check_sound(&self) -> Result<()> {
        if self.corrupt.load(Ordering::Acquire) {
            return Err(BlockError::new(ErrorKind::Corrupt, "Image is corrupt"));
        }
        if self.uncertain.load(Ordering::Acquire) {
            let text = "An earlier change of the header may or may not have reached the disk; the image has to be opened again";
            return Err(BlockError::from_errno(libc::EIO).message(text));
        }
        Ok(())
    }

    /// Sets the corrupt bit on disk if corruption was found and the image is writable.
    ///
    /// # Errors
    /// The file's.
    pub async fn mark_corrupt_on_disk(&self) -> Result<()> {
        let known = self.corrupt.load(Ordering::Acquire) && self.writable.load(Ordering::Acquire);
        let bits = self.header().incompatible;
        if !known || self.version() < 3 || bits.contains(Incompatible::CORRUPT) {
            return Ok(());
        }
        let bits = bits | Incompatible::CORRUPT;
        self.write_header_bytes(INCOMPATIBLE_OFFSET, bits.bits().to_be_bytes().to_vec())
            .await?;
        self.header().incompatible = bits;
        Ok(())
    }
}
