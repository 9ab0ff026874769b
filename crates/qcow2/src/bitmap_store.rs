// SPDX-License-Identifier: MIT OR Apache-2.0
//! Writing persistent bitmaps: copies on disk are marked as outdated before the first change, and written anew when the image is closed or becomes read-only.
//!
//! # The order on disk (INV QCOW2-BITMAP-1)
//!
//! A copy that doesn't say `IN_USE` covers every change that a power cut may leave in the image:
//!
//! 1. Before anything changes, be it data, the length, or a bitmap, `IN_USE` is set in every entry of the directory, in place, and *fdatasync*.
//! 2. When nothing changes any more, bits, tables and directory are written to new clusters. What the directory on disk names stays as it is.
//! 3. A commit: they and their refcounts are durable (INV QCOW2-ORD-1), and with them all that has changed.
//! 4. The header names the new directory (`header_rewrite`, INV QCOW2-ORD-6), *fdatasync*.
//! 5. The old directory, tables and bits are freed, as all that is freed.
//!
//! So after a power cut there is the old directory, all in use, or the new one, with everything in it durable. Bitmaps that are inconsistent keep their tables, and go from
//! directory to directory until somebody removes them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockcore::{BlockError, DirtyBitmap, Result, SECTOR_BYTES};

use crate::alloc::Run;
use crate::bitmap::{
    self, BitmapFlags, BitmapsExtension, DirectoryEntry, MAX_BITMAP_BYTES, MAX_BITMAPS,
    MAX_DIRECTORY_BYTES, MAX_NAME_BYTES, TableEntry,
};
use crate::bitmap_load::{self, Stored, StoredBitmap};
use crate::extension::{self, Extension};
use crate::header::{AUTOCLEAR_BITMAPS, Header};
use crate::image::{Image, Owner, cancelled};

/// A bitmap that belongs on disk.
struct Wanted {
    bitmap: Arc<DirtyBitmap>,
    /// Which of the stored ones is its copy.
    place: Option<usize>,
}

/// Clusters that were taken for new copies. Nothing names them before the header does.
#[derive(Debug, Default)]
struct Made(Vec<Run>);

impl Image {
    /// Whether a new bitmap could be stored.
    ///
    /// # Errors
    /// `Unsupported` in version 2; `InvalidArgument` at the format's limits, and QEMU's.
    pub fn check_bitmap(&self, name: &str, granularity: u64) -> Result<()> {
        if self.version() < 3 {
            let text = "Cannot store dirty bitmaps in qcow2 v2 files";
            return Err(BlockError::unsupported(text));
        }
        if name.len() > MAX_NAME_BYTES {
            let text = format!("Name length exceeds maximum ({MAX_NAME_BYTES} characters)");
            return Err(BlockError::invalid(text));
        }
        if name.contains('\0') {
            return Err(BlockError::invalid("Name contains a zero byte"));
        }
        check_space(self.size(), granularity)?;
        let all = self.bitmaps.set.list();
        // It may be among them already.
        let is_other = |b: &&Arc<DirtyBitmap>| b.is_persistent() && b.name() != name;
        let stored = all.iter().filter(is_other);
        if stored.clone().count() >= MAX_BITMAPS as usize {
            let text = "Maximum number of persistent bitmaps is already reached";
            return Err(BlockError::invalid(text));
        }
        let names = stored.map(|b| b.name()).chain([name]);
        let directory: u64 = names.map(|n| entry_for(n).directory_bytes()).sum();
        if directory > MAX_DIRECTORY_BYTES {
            let text = "Not enough space in the bitmap directory";
            return Err(BlockError::invalid(text));
        }
        Ok(())
    }

    /// Whether a disk of so many bytes can have the bitmaps that are stored.
    ///
    /// # Errors
    /// `InvalidArgument` with the name of one that would be too long.
    pub fn check_bitmaps_fit(&self, disk_bytes: u64) -> Result<()> {
        let all = self.bitmaps.set.list();
        let mut stored = all.iter().filter(|b| b.is_persistent());
        stored.try_for_each(|b| check_fits(b, disk_bytes))
    }

    /// Makes it durable that the copies on disk are outdated. INV QCOW2-BITMAP-1.
    ///
    /// # Errors
    /// The file's.
    pub async fn outdate_bitmaps(self: &Arc<Self>) -> Result<()> {
        self.check_sound()?;
        // In a task: many may wait for it, and whoever came first may never be polled again (INV REQ-PARK-1).
        self.bitmap_task(|image| async move { image.outdate_bitmaps_now().await })
            .await
    }

    async fn bitmap_task<F>(self: &Arc<Self>, work: impl FnOnce(Arc<Image>) -> F) -> Result<()>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let guard = self.tasks.enter_owned();
        let work = work(self.clone());
        let task = tokio::spawn(async move {
            let _guard = guard;
            work.await
        });
        task.await.unwrap_or_else(|_| Err(cancelled()))
    }

    async fn outdate_bitmaps_now(&self) -> Result<()> {
        let _one = self.bitmaps.storing.lock().await;
        if !self.bitmaps.set.copies_are_current() {
            return Ok(());
        }
        let mut outdated = self.bitmaps.stored().clone();
        let Some((offset, _)) = outdated.directory else {
            unreachable!("copies are named by a directory");
        };
        for stored in &mut outdated.bitmaps {
            stored.entry.flags |= BitmapFlags::IN_USE;
        }
        let entries = outdated.bitmaps.iter().map(|b| &b.entry);
        let bytes = bitmap::encode_directory(entries);
        // From here on an error, or a runtime that ends, leaves what closing has to set right.
        self.bitmaps.may_be_in_use.store(true, Ordering::Release);
        self.write_metadata(Owner::BitmapDirectory, offset, bytes)
            .await?;
        self.file.flush().await?;
        *self.bitmaps.stored() = outdated;
        self.bitmaps.set.set_copies_are_current(false);
        Ok(())
    }

    /// Brings the bitmaps on disk up to date. The caller has seen to it that nothing changes meanwhile.
    ///
    /// # Errors
    /// Those of allocating and of metadata I/O. Then the image has the copies that it had.
    pub async fn store_bitmaps(self: &Arc<Self>) -> Result<()> {
        self.bitmap_task(|image| async move { image.store_bitmaps_now().await })
            .await
    }

    async fn store_bitmaps_now(self: Arc<Self>) -> Result<()> {
        let _one = self.bitmaps.storing.lock().await;
        let stored = self.bitmaps.stored().clone();
        let wanted = self.bitmaps_to_store(&stored);
        if self.is_stored(&stored, &wanted) {
            return Ok(());
        }
        self.check_sound()?;
        let mut made = Made::default();
        let new = match self.write_bitmaps(&stored, &wanted, &mut made).await {
            Ok(new) => new,
            Err(e) => {
                self.unmake(made).await;
                return Err(e);
            }
        };
        let named = self.rewrite_header(|header| new.name_in(header)).await;
        if let Err(e) = named {
            // Where nobody knows which directory the header names, both stay.
            if !self.uncertain.load(Ordering::Acquire) {
                self.unmake(made).await;
            }
            return Err(e.context("Failed to update bitmap extension"));
        }
        self.free_bitmaps(&stored, &new).await;
        let is_current = new.bitmaps.iter().any(|b| !b.entry.is_in_use());
        *self.bitmaps.stored() = new;
        self.bitmaps.may_be_in_use.store(false, Ordering::Release);
        self.bitmaps.set.set_copies_are_current(is_current);
        self.commit().await
    }

    /// The bitmaps that belong on disk: those that are there in their order, then the new ones, the newest first.
    fn bitmaps_to_store(&self, stored: &Stored) -> Vec<Wanted> {
        if self.version() < 3 {
            return Vec::new();
        }
        let of = |b: &StoredBitmap| b.of.as_ptr();
        let places: HashMap<_, _> = (stored.bitmaps.iter().zip(0..))
            .map(|(b, i)| (of(b), i))
            .collect();
        let all = self.bitmaps.set.list().into_iter().rev();
        let stored = all.filter(|b| b.is_persistent());
        let mut wanted: Vec<Wanted> = stored
            .map(|bitmap| Wanted {
                place: places.get(&Arc::as_ptr(&bitmap)).copied(),
                bitmap,
            })
            .collect();
        wanted.sort_by_key(|w| w.place.unwrap_or(usize::MAX));
        wanted
    }

    fn is_stored(&self, stored: &Stored, wanted: &[Wanted]) -> bool {
        let places = (0..stored.bitmaps.len()).map(Some);
        let are_current = self.bitmaps.set.copies_are_current()
            && !self.bitmaps.may_be_in_use.load(Ordering::Acquire);
        places.eq(wanted.iter().map(|w| w.place))
            && (are_current || wanted.iter().all(|w| w.bitmap.is_inconsistent()))
    }

    /// Writes everything that the header is to name, and makes it durable.
    async fn write_bitmaps(
        self: &Arc<Self>,
        stored: &Stored,
        wanted: &[Wanted],
        made: &mut Made,
    ) -> Result<Stored> {
        let bitmaps = wanted.iter().map(|w| &w.bitmap);
        for bitmap in bitmaps.filter(|b| !b.is_inconsistent()) {
            self.check_length(bitmap)?;
        }
        let mut new = Stored::default();
        for Wanted { bitmap, place } in wanted {
            let old = place.and_then(|i| stored.bitmaps.get(i));
            new.bitmaps.push(match old {
                Some(old) if bitmap.is_inconsistent() => old.clone(),
                _ => self.write_bitmap(bitmap, old, made).await?,
            });
        }
        if !new.bitmaps.is_empty() {
            let entries = new.bitmaps.iter().map(|b| &b.entry);
            let directory = bitmap::encode_directory(entries);
            let bytes = directory.len() as u64;
            let write = self.write_clusters(Owner::BitmapDirectory, directory, made);
            let offset = write
                .await
                .map_err(|e| e.context("Failed to write the bitmap directory"))?;
            new.directory = Some((offset, bytes));
        }
        // INV QCOW2-ORD-1, INV QCOW2-BITMAP-1: refcounts, what was written above, and the changes that it tells of.
        self.commit().await?;
        Ok(new)
    }

    /// Whether a bitmap is as long as readers want it to be: an image with another one is opened by nobody any more.
    fn check_length(&self, bitmap: &DirtyBitmap) -> Result<()> {
        if bitmap.length() != self.size() {
            // A change of the length whose runtime has ended half way.
            let name = bitmap.name();
            let text = format!("Bitmap '{name}' is for a disk of another length");
            return Err(BlockError::invalid(text));
        }
        check_fits(bitmap, self.size())
    }

    /// Writes a bitmap's bits and table.
    async fn write_bitmap(
        &self,
        bitmap: &Arc<DirtyBitmap>,
        old: Option<&StoredBitmap>,
        made: &mut Made,
    ) -> Result<StoredBitmap> {
        let name = bitmap.name();
        let cluster = self.cluster_size();
        let bits = bitmap.bits();
        let bits_of = |i: u64| i * cluster * 8..(i + 1) * cluster * 8;
        // A disk without bytes has a table, too.
        let clusters = bits.len().div_ceil(cluster * 8).max(1);
        let mixed: Vec<u64> = (0..clusters)
            .filter(|i| bits.uniform(bits_of(*i)).is_none())
            .collect();
        let failed =
            |e: BlockError, what: &str| e.context(format!("Failed to {what} bitmap '{name}'"));
        let run = self
            .take_clusters(mixed.len() as u64, Owner::BitmapData, made)
            .await;
        let run = run.map_err(|e| failed(e, "allocate clusters for"))?;
        let mut data = Vec::new();
        for (&i, place) in mixed.iter().zip(run.cluster..) {
            let host = place << self.cluster_bits;
            let end = bits_of(i).end.min(bits.len());
            let bytes = (end - bits_of(i).start).div_ceil(8);
            let bytes = bits.to_bytes(bits_of(i).start, bytes as usize);
            let written = self.write_filled(Owner::BitmapData, host, bytes, run).await;
            written.map_err(|e| failed(e, "write"))?;
            data.push(host);
        }
        let mut hosts = data.iter();
        let entries = (0..clusters).map(|i| match bits.uniform(bits_of(i)) {
            Some(false) => TableEntry::Zeroes,
            Some(true) => TableEntry::Ones,
            None => TableEntry::Data(hosts.next().copied().unwrap_or_default()),
        });
        let table: Vec<u8> = entries.flat_map(|e| e.encode().to_be_bytes()).collect();
        let written = self.write_clusters(Owner::BitmapTable, table, made).await;
        let table_offset = written.map_err(|e| failed(e, "write the table of"))?;
        let mut flags = BitmapFlags::empty();
        flags.set(BitmapFlags::AUTO, bitmap.is_enabled());
        Ok(StoredBitmap {
            entry: DirectoryEntry {
                // What was no text when it was read stays what it was.
                name: old.map_or_else(|| name.as_bytes().to_vec(), |b| b.entry.name.clone()),
                flags,
                granularity_bits: bitmap.granularity().trailing_zeros() as u8,
                table_offset,
                table_size: clusters as u32,
            },
            data,
            of: Arc::downgrade(bitmap),
        })
    }

    /// Takes so many consecutive clusters.
    async fn take_clusters(&self, count: u64, owner: Owner, made: &mut Made) -> Result<Run> {
        if count == 0 {
            return Ok(Run {
                cluster: 0,
                count: 0,
                fresh: true,
            });
        }
        let mut meta = self.meta.lock().await;
        let run = self.alloc_run(&mut meta, count).await?;
        made.0.push(run);
        let bits = self.cluster_bits;
        self.own(run.cluster << bits, run.count << bits, owner);
        Ok(run)
    }

    /// Writes something to clusters of its own.
    async fn write_clusters(&self, owner: Owner, bytes: Vec<u8>, made: &mut Made) -> Result<u64> {
        let clusters = (bytes.len() as u64).div_ceil(self.cluster_size());
        let run = self.take_clusters(clusters, owner, made).await?;
        let host = run.cluster << self.cluster_bits;
        self.write_filled(owner, host, bytes, run).await?;
        Ok(host)
    }

    /// Writes something to where a cluster of `run` begins. What it leaves of the last cluster is zero.
    async fn write_filled(
        &self,
        owner: Owner,
        host: u64,
        mut bytes: Vec<u8>,
        run: Run,
    ) -> Result<()> {
        let unit = match run.fresh {
            true => SECTOR_BYTES,
            false => self.cluster_size(),
        };
        bytes.resize(bytes.len().next_multiple_of(unit as usize), 0);
        self.write_metadata(owner, host, bytes).await
    }

    /// Gives back what nothing names.
    async fn unmake(&self, made: Made) {
        let mut meta = self.meta.lock().await;
        for run in made.0 {
            for cluster in run.cluster..run.cluster + run.count {
                self.disown(cluster);
            }
            if let Err(e) = self.unalloc_run(&mut meta, run).await {
                tracing::debug!("clusters of bitmaps leak: {e}");
            }
        }
    }

    /// Frees what `new` has no use for.
    async fn free_bitmaps(&self, old: &Stored, new: &Stored) {
        let kept: std::collections::HashSet<u64> = new.places().map(|p| p.0).collect();
        let mut meta = self.meta.lock().await;
        for (host, bytes, owner) in old.places().filter(|p| !kept.contains(&p.0)) {
            let first = host >> self.cluster_bits;
            for cluster in first..first + bytes.div_ceil(self.cluster_size()) {
                // INV QCOW2-META-1: what something else claims, too, is not freed.
                if self.owner_in(cluster << self.cluster_bits, 1) == Some(owner) {
                    meta.free_later(cluster, 1, false);
                }
            }
        }
    }

    /// Gives back what the header doesn't name any more, since the image is of version 2 now: a check takes it for leaks.
    ///
    /// # Errors
    /// Those of metadata I/O.
    pub async fn free_unnamed_bitmaps(self: &Arc<Self>) -> Result<()> {
        let _one = self.bitmaps.storing.lock().await;
        let stored = std::mem::take(&mut *self.bitmaps.stored());
        self.free_bitmaps(&stored, &Stored::default()).await;
        self.bitmaps.set.set_copies_are_current(false);
        self.commit().await
    }

    /// Takes an extension out of the header that was outdated by a program that doesn't know it, as the specification wants. Its clusters are leaked.
    ///
    /// # Errors
    /// Those of metadata I/O.
    pub async fn drop_stale_bitmaps(&self) -> Result<()> {
        if bitmap_load::has_stale(&self.header().clone()) {
            return self
                .rewrite_header(|header| Stored::default().name_in(header))
                .await;
        }
        Ok(())
    }
}

/// Whether a bitmap for a disk of so many bytes is no longer than a reader takes.
fn check_space(disk_bytes: u64, granularity: u64) -> Result<()> {
    if bitmap::bitmap_bytes(disk_bytes, granularity.trailing_zeros()) > MAX_BITMAP_BYTES {
        let text = "Too much space will be occupied by the bitmap. Use larger granularity";
        return Err(BlockError::invalid(text));
    }
    Ok(())
}

fn check_fits(bitmap: &DirtyBitmap, disk_bytes: u64) -> Result<()> {
    let name = bitmap.name();
    check_space(disk_bytes, bitmap.granularity())
        .map_err(|e| e.context(format!("Bitmap '{name}' doesn't satisfy the constraints")))
}

/// An entry that has no more than a name, for counting.
fn entry_for(name: &str) -> DirectoryEntry {
    DirectoryEntry {
        name: name.as_bytes().to_vec(),
        flags: BitmapFlags::empty(),
        granularity_bits: 0,
        table_offset: 0,
        table_size: 0,
    }
}

impl Stored {
    /// Makes the header name this directory, or none.
    pub fn name_in(&self, header: &mut Header) {
        let place = header
            .extensions
            .iter()
            .position(|e| e.kind == extension::BITMAPS);
        let named = self.directory.map(|(directory_offset, directory_size)| {
            let named = BitmapsExtension {
                nb_bitmaps: self.bitmaps.len() as u32,
                directory_size,
                directory_offset,
            };
            Extension {
                kind: extension::BITMAPS,
                data: named.encode(),
            }
        });
        header.autoclear &= !AUTOCLEAR_BITMAPS;
        if named.is_some() {
            header.autoclear |= AUTOCLEAR_BITMAPS;
        }
        match (place, named) {
            (Some(place), Some(named)) => header.extensions[place] = named,
            (Some(place), None) => drop(header.extensions.remove(place)),
            (None, Some(named)) => header.extensions.push(named),
            (None, None) => {}
        }
    }
}
