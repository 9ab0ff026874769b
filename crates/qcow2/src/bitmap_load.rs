// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reading persistent bitmaps when an image is opened: [`Bitmaps`], what an open image knows of them.
//!
//! Nothing is believed: sizes are bounded before anything is read by them, and as tables and clusters of bits are each there for one bitmap alone, they fit into
//! the file together, so that a small file can't ask for much memory or time. A cluster of equal bits takes none (`blockcore::HBitmap`).
//!
//! An image that was changed by a program that doesn't know bitmaps has the autoclear bit cleared: then they are worth nothing, and are not even looked at.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use blockcore::{
    BlockError, Child, Diagnostics, DirtyBitmap, DirtyBitmaps, ErrorKind, HBitmap, IoBufMut,
    ReadFlags, Result, SECTOR_BYTES,
};

use crate::bitmap::{self, BitmapFlags, BitmapsExtension, DirectoryEntry, TableEntry};
use crate::extension::{self, Extension};
use crate::header::{AUTOCLEAR_BITMAPS, Header};
use crate::image::{Image, Owner};
use crate::open;

/// A bitmap that the image holds, right or not.
#[derive(Clone, Debug)]
pub(crate) struct StoredBitmap {
    pub entry: DirectoryEntry,
    /// Byte offsets of its clusters of bits.
    pub data: Vec<u64>,
    /// The bitmap that it is a copy of, as long as nobody removes that.
    pub of: Weak<DirtyBitmap>,
}

/// What the image holds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stored {
    /// Byte offset and bytes of the directory, if there is one.
    pub directory: Option<(u64, u64)>,
    /// In the order of the directory.
    pub bitmaps: Vec<StoredBitmap>,
}

/// The bitmaps of an open image.
#[derive(Debug, Default)]
pub(crate) struct Bitmaps {
    /// Shared with the node.
    pub set: Arc<DirtyBitmaps>,
    /// Held while copies are marked or written. Comes before the metadata lock.
    pub storing: tokio::sync::Mutex<()>,
    /// The copies on disk may say that they are in use although `stored` doesn't: to say so has begun, and nobody knows how it went. Changed by who holds `storing`.
    pub may_be_in_use: AtomicBool,
    /// Changed by who holds `storing`. Not held over an await.
    stored: Mutex<Stored>,
}

impl Bitmaps {
    /// What the image holds.
    pub fn stored(&self) -> MutexGuard<'_, Stored> {
        self.stored
            .lock()
            .expect("no code panics while it holds this lock")
    }
}

/// The extension's bytes, where there is one that counts.
pub(crate) fn extension_data(header: &Header) -> Option<&[u8]> {
    let extension = header
        .extensions
        .iter()
        .find(|e| e.kind == extension::BITMAPS)?;
    let counts = header.version >= 3 && header.autoclear & AUTOCLEAR_BITMAPS != 0;
    counts.then_some(&extension.data)
}

/// Whether there are bitmaps that don't count.
pub(crate) fn has_stale(header: &Header) -> bool {
    let is_bitmaps = |e: &Extension| e.kind == extension::BITMAPS;
    extension_data(header).is_none() && header.extensions.iter().any(is_bitmaps)
}

/// Says that the bitmaps of an image are worthless, if they are: a program that knows nothing of them has changed it.
fn warn_of_stale(header: &Header, diagnostics: &Diagnostics) {
    if !has_stale(header) {
        return;
    }
    let what = match header.version {
        2 => {
            "This qcow2 v2 image contains bitmaps, but they may have been modified by a program without persistent bitmap support; so now they must all be considered inconsistent"
        }
        _ => {
            "a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent"
        }
    };
    diagnostics.warn(&format!("warning: {what}"));
    diagnostics
        .warn("Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix.");
}

/// The length of the disk that bitmaps are for: whole sectors.
fn disk_bytes(header: &Header) -> u64 {
    header.size / SECTOR_BYTES * SECTOR_BYTES
}

/// Reads all bitmaps of an image.
///
/// # Errors
/// `InvalidImage` for what can't be, with QEMU's words; those of the file.
pub(crate) async fn load(
    file: &Child,
    header: &Header,
    diagnostics: &Diagnostics,
) -> Result<Bitmaps> {
    let Some(data) = extension_data(header) else {
        warn_of_stale(header, diagnostics);
        return Ok(Bitmaps::default());
    };
    let stored = read_stored(file, header, data).await?;
    let mut reader = Reader {
        file,
        cluster_bits: header.cluster_bits,
        disk_bytes: disk_bytes(header),
        data_left: file.length().next_multiple_of(1 << header.cluster_bits),
    };
    let mut names = std::collections::HashSet::new();
    let (mut all, mut loaded) = (Vec::new(), Vec::new());
    for entry in stored.1 {
        if !names.insert(entry.name()) {
            let text = format!("Bitmap already exists: {}", entry.name());
            return Err(BlockError::new(ErrorKind::InvalidImage, text));
        }
        let (stored, bitmap) = reader.read(entry).await?;
        all.push(stored);
        loaded.push(bitmap);
    }
    let set = Arc::new(DirtyBitmaps::loaded(loaded));
    for (stored, bitmap) in all.iter_mut().zip(set.list()) {
        stored.of = Arc::downgrade(&bitmap);
    }
    Ok(Bitmaps {
        set,
        storing: tokio::sync::Mutex::default(),
        may_be_in_use: AtomicBool::new(false),
        stored: Mutex::new(Stored {
            directory: Some(stored.0),
            bitmaps: all,
        }),
    })
}

/// Reads the directory: where it is, how long it is, and its entries.
///
/// # Errors
/// `InvalidImage` for what can't be, with QEMU's words; those of the file.
pub(crate) async fn read_stored(
    file: &Child,
    header: &Header,
    data: &[u8],
) -> Result<((u64, u64), Vec<DirectoryEntry>)> {
    let bits = header.cluster_bits;
    let extension = BitmapsExtension::parse(data, bits)?;
    let (offset, size) = (extension.directory_offset, extension.directory_size);
    let there = file.length().saturating_sub(offset).min(size);
    let read = file.preadv(offset, IoBufMut::zeroed(there as usize), ReadFlags::empty());
    let bytes = read
        .await
        .map_err(|e| e.context("Failed to read bitmap directory"))?
        .to_vec();
    let entries = bitmap::parse_directory(&extension, &bytes, disk_bytes(header), bits)?;
    let total: u64 = entries.iter().map(DirectoryEntry::table_bytes).sum();
    if total > file.length() {
        let text = format!("The tables of the bitmaps have {total} bytes, more than the file");
        return Err(BlockError::new(ErrorKind::InvalidImage, text));
    }
    Ok(((offset, size), entries))
}

/// Reads the table of a bitmap.
///
/// # Errors
/// `InvalidArgument` for an entry that makes no sense; those of the file.
pub(crate) async fn read_entries(
    file: &Child,
    cluster_bits: u32,
    entry: &DirectoryEntry,
) -> Result<Vec<TableEntry>> {
    let words = open::read_table(file, entry.table_offset, entry.table_size as usize).await?;
    let decode = |w: &u64| TableEntry::decode(*w, cluster_bits);
    let table: Option<Vec<TableEntry>> = words.iter().map(decode).collect();
    table.ok_or_else(|| BlockError::from_errno(libc::EINVAL))
}

struct Reader<'a> {
    file: &'a Child,
    cluster_bits: u32,
    disk_bytes: u64,
    /// So many bytes of the file can still be bits.
    data_left: u64,
}

impl Reader<'_> {
    async fn read(&mut self, entry: DirectoryEntry) -> Result<(StoredBitmap, DirtyBitmap)> {
        let granularity = 1u64 << entry.granularity_bits;
        let bitmap = DirtyBitmap::new(entry.name(), granularity, self.disk_bytes)?
            .enabled(entry.flags.contains(BitmapFlags::AUTO))
            .persistent(true);
        if entry.is_in_use() {
            // What can't be read of it is lost when it is removed, and that is all.
            let table = read_entries(self.file, self.cluster_bits, &entry).await;
            let table = table.unwrap_or_default();
            let data = data_offsets(&table);
            return Ok((StoredBitmap::new(entry, data), bitmap.inconsistent()));
        }
        let name = entry.name();
        let table = read_entries(self.file, self.cluster_bits, &entry).await;
        let table = table.map_err(|e| {
            e.context(format!(
                "Could not read bitmap_table table from image for bitmap '{name}'"
            ))
        })?;
        let read = self.read_bits(&entry, &table).await;
        let bits =
            read.map_err(|e| e.context(format!("Could not read bitmap '{name}' from image")))?;
        let data = data_offsets(&table);
        Ok((StoredBitmap::new(entry, data), bitmap.with_bits(bits)))
    }

    async fn read_bits(&mut self, entry: &DirectoryEntry, table: &[TableEntry]) -> Result<HBitmap> {
        let cluster = 1u64 << self.cluster_bits;
        let granularity_bits = u32::from(entry.granularity_bits);
        let bytes = bitmap::bitmap_bytes(self.disk_bytes, granularity_bits);
        if table.len() as u64 != bytes.div_ceil(cluster).max(1) {
            return Err(BlockError::from_errno(libc::EINVAL));
        }
        let mut bits = HBitmap::new(self.disk_bytes.div_ceil(1 << granularity_bits));
        for (i, entry) in table.iter().enumerate() {
            let (first_byte, first_bit) = (i as u64 * cluster, i as u64 * cluster * 8);
            match *entry {
                TableEntry::Zeroes => {}
                TableEntry::Ones => bits.set(first_bit..first_bit + cluster * 8),
                TableEntry::Data(offset) => {
                    let Some(left) = self.data_left.checked_sub(cluster) else {
                        let text = "The bitmaps have more bytes than the file";
                        return Err(BlockError::new(ErrorKind::InvalidImage, text));
                    };
                    self.data_left = left;
                    let want = bytes.saturating_sub(first_byte).min(cluster) as usize;
                    let buf = IoBufMut::zeroed(want);
                    let read = self.file.preadv(offset, buf, ReadFlags::empty()).await?;
                    bits.set_bytes(first_bit, &read.to_vec());
                }
            }
        }
        Ok(bits)
    }
}

/// Where the bits of a table lie.
pub(crate) fn data_offsets(table: &[TableEntry]) -> Vec<u64> {
    let offset = |e: &TableEntry| match *e {
        TableEntry::Data(offset) => Some(offset),
        TableEntry::Zeroes | TableEntry::Ones => None,
    };
    table.iter().filter_map(offset).collect()
}

impl Stored {
    /// Everything that bitmaps occupy: byte offset, bytes, and what it is.
    pub fn places(&self) -> impl Iterator<Item = (u64, u64, Owner)> {
        let directory = self.directory.iter();
        let directory = directory.map(|&(offset, bytes)| (offset, bytes, Owner::BitmapDirectory));
        let of_bitmaps = self.bitmaps.iter().flat_map(StoredBitmap::places);
        directory.chain(of_bitmaps)
    }
}

impl StoredBitmap {
    fn new(entry: DirectoryEntry, data: Vec<u64>) -> StoredBitmap {
        StoredBitmap {
            entry,
            data,
            of: Weak::new(),
        }
    }

    /// What this bitmap occupies; of a cluster of bits, its first byte.
    pub fn places(&self) -> impl Iterator<Item = (u64, u64, Owner)> {
        let table = (
            self.entry.table_offset,
            self.entry.table_bytes(),
            Owner::BitmapTable,
        );
        let data = self.data.iter().map(|&host| (host, 1, Owner::BitmapData));
        std::iter::once(table).chain(data)
    }
}

impl Image {
    /// Notes where bitmaps lie, for INV QCOW2-META-1.
    pub fn own_bitmaps(&self) {
        for (host, bytes, owner) in self.bitmaps.stored().places() {
            self.own(host, bytes, owner);
        }
    }
}
