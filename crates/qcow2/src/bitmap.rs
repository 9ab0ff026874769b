// SPDX-License-Identifier: MIT OR Apache-2.0
//! Persistent dirty bitmaps as they lie on disk: header extension, directory, tables. Pure functions and checks; reading is `bitmap_load`, writing `bitmap_store`.
//!
//! The extension names the directory, an entry of the directory names a bitmap's table, an entry of a table names a cluster of bits, or says that they are all
//! alike. Source: the published specification; the limits are QEMU's.

use std::ops::Range;

use blockcore::{BlockError, ErrorKind, Result};
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The most bitmaps.
pub const MAX_BITMAPS: u32 = 65535;
/// The longest directory, in bytes.
pub const MAX_DIRECTORY_BYTES: u64 = 1024 * MAX_BITMAPS as u64;
/// The most bits of one bitmap, in bytes on disk.
pub const MAX_BITMAP_BYTES: u64 = 512 << 20;
/// The longest name, in bytes.
pub const MAX_NAME_BYTES: usize = 1023;
/// A bit stands for `1 << granularity_bits` bytes, with these at least and at most.
pub const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;

/// The only type of bitmap that there is: one of dirty ranges.
const TYPE_DIRTY: u8 = 1;
/// The host offset in a table entry.
const TABLE_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// In a table entry without host offset: the cluster's bits are all set.
const TABLE_ALL_ONES: u64 = 1;

bitflags::bitflags! {
    /// What a directory entry says of a bitmap.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct BitmapFlags: u32 {
        /// The bits on disk may be out of date: somebody changes them in memory, or could not store them.
        const IN_USE = 1 << 0;
        /// Changes are marked in it.
        const AUTO = 1 << 1;
    }
}

fn bad<T>(text: impl Into<String>) -> Result<T> {
    Err(BlockError::new(ErrorKind::InvalidImage, text))
}

/// The header extension as it lies on disk.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawExtension {
    nb_bitmaps: U32,
    reserved: U32,
    directory_size: U64,
    directory_offset: U64,
}

/// Where the directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// The number of bitmaps, at least one.
    pub nb_bitmaps: u32,
    /// Bytes of the directory.
    pub directory_size: u64,
    /// Byte offset of the directory.
    pub directory_offset: u64,
}

impl BitmapsExtension {
    /// Whether the extension has the right length. This is looked at even where the rest must not be believed.
    ///
    /// # Errors
    /// `InvalidImage`.
    pub fn check_length(data: &[u8]) -> Result<()> {
        if data.len() != size_of::<RawExtension>() {
            return bad("bitmaps_ext: Invalid extension length");
        }
        Ok(())
    }

    /// Reads the extension's bytes.
    ///
    /// # Errors
    /// `InvalidImage` for what can't be.
    pub fn parse(data: &[u8], cluster_bits: u32) -> Result<BitmapsExtension> {
        BitmapsExtension::check_length(data)?;
        let Ok(raw) = RawExtension::read_from_bytes(data) else {
            return bad("bitmaps_ext: Invalid extension length");
        };
        let (count, size) = (raw.nb_bitmaps.get(), raw.directory_size.get());
        if raw.reserved.get() != 0 {
            return bad("bitmaps_ext: Reserved field is not zero");
        }
        if count > MAX_BITMAPS {
            return bad(format!(
                "bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of {MAX_BITMAPS}"
            ));
        }
        if count == 0 {
            return bad("found bitmaps extension with zero bitmaps");
        }
        let offset = raw.directory_offset.get();
        if offset & ((1 << cluster_bits) - 1) != 0 {
            return bad("bitmaps_ext: invalid bitmap directory offset");
        }
        if size > MAX_DIRECTORY_BYTES {
            return bad(format!(
                "bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported size ({MAX_DIRECTORY_BYTES})"
            ));
        }
        if size == 0 {
            return bad("Requested bitmap directory size is zero");
        }
        Ok(BitmapsExtension {
            nb_bitmaps: count,
            directory_size: size,
            directory_offset: offset,
        })
    }

    /// The extension's bytes.
    pub fn encode(self) -> Vec<u8> {
        let raw = RawExtension {
            nb_bitmaps: U32::new(self.nb_bitmaps),
            reserved: U32::ZERO,
            directory_size: U64::new(self.directory_size),
            directory_offset: U64::new(self.directory_offset),
        };
        raw.as_bytes().to_vec()
    }
}

/// The fixed part of a directory entry. Extra data and the name follow, and padding to eight bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    table_offset: U64,
    table_size: U32,
    flags: U32,
    kind: u8,
    granularity_bits: u8,
    name_size: U16,
    extra_data_size: U32,
}

const ENTRY_BYTES: usize = size_of::<RawEntry>();

/// One bitmap in the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// The name: bytes, which need not be text.
    pub name: Vec<u8>,
    /// What is said of it.
    pub flags: BitmapFlags,
    /// A bit stands for `1 << granularity_bits` bytes.
    pub granularity_bits: u8,
    /// Byte offset of its table.
    pub table_offset: u64,
    /// Entries in its table.
    pub table_size: u32,
}

impl DirectoryEntry {
    /// Bytes in the directory.
    pub fn directory_bytes(&self) -> u64 {
        (ENTRY_BYTES + self.name.len()).next_multiple_of(8) as u64
    }

    /// The name as text.
    pub fn name(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    /// Whether nobody knows what the bitmap should hold.
    pub fn is_in_use(&self) -> bool {
        self.flags.contains(BitmapFlags::IN_USE)
    }

    /// Bytes of its table.
    pub fn table_bytes(&self) -> u64 {
        u64::from(self.table_size) * 8
    }

    fn parse(
        raw: RawEntry,
        name: &[u8],
        disk_bytes: u64,
        cluster_bits: u32,
    ) -> Result<DirectoryEntry> {
        let flags = BitmapFlags::from_bits(raw.flags.get());
        let (offset, size) = (raw.table_offset.get(), raw.table_size.get());
        let bytes = u64::from(size) << cluster_bits;
        let name_is_good = (1..=MAX_NAME_BYTES).contains(&name.len()) && !name.contains(&0);
        let table_is_good = offset != 0
            && offset & ((1 << cluster_bits) - 1) == 0
            && size > 0
            && bytes <= MAX_BITMAP_BYTES;
        let entry = flags.map(|flags| DirectoryEntry {
            name: name.to_vec(),
            flags,
            granularity_bits: raw.granularity_bits,
            table_offset: offset,
            table_size: size,
        });
        let covers = |e: &DirectoryEntry| {
            // One that is in use may be for a disk of another length.
            e.is_in_use() || u128::from(bytes * 8) << e.granularity_bits >= disk_bytes.into()
        };
        let is_good = raw.kind == TYPE_DIRTY
            && GRANULARITY_BITS.contains(&raw.granularity_bits)
            && name_is_good
            && table_is_good;
        match entry {
            Some(entry) if is_good && covers(&entry) => Ok(entry),
            _ => {
                let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
                let name = String::from_utf8_lossy(&name[..end]).into_owned();
                bad(format!("Bitmap '{name}' doesn't satisfy the constraints"))
            }
        }
    }
}

/// Reads the entries of a directory of `size` bytes. `bytes` are as many of them as the file has; the rest is zero.
///
/// # Errors
/// `InvalidImage` for what can't be.
pub fn parse_directory(
    extension: &BitmapsExtension,
    bytes: &[u8],
    disk_bytes: u64,
    cluster_bits: u32,
) -> Result<Vec<DirectoryEntry>> {
    let size = extension.directory_size as usize;
    let piece = |range: Range<usize>| {
        let there = bytes.get(range.start..range.end.min(bytes.len()));
        let mut piece = there.unwrap_or(&[]).to_vec();
        piece.resize(range.len(), 0);
        piece
    };
    let mut entries = Vec::new();
    let mut at = 0;
    while at < size {
        let fixed = at..at + ENTRY_BYTES;
        let Some(raw) = (fixed.end <= size)
            .then(|| RawEntry::read_from_bytes(&piece(fixed.clone())).ok())
            .flatten()
        else {
            return bad("Broken bitmap directory");
        };
        if entries.len() as u64 >= extension.nb_bitmaps.into() {
            return bad("More bitmaps found than specified in header extension");
        }
        let extra = u64::from(raw.extra_data_size.get());
        let name_bytes = usize::from(raw.name_size.get());
        let end = (fixed.end as u64 + extra + name_bytes as u64).next_multiple_of(8);
        if end > size as u64 {
            return bad("Broken bitmap directory");
        }
        if extra != 0 {
            return bad("Bitmap extra data is not supported");
        }
        let name = piece(fixed.end..fixed.end + name_bytes);
        entries.push(DirectoryEntry::parse(raw, &name, disk_bytes, cluster_bits)?);
        at = end as usize;
    }
    if (entries.len() as u64) < extension.nb_bitmaps.into() {
        return bad("Less bitmaps found than specified in header extension");
    }
    Ok(entries)
}

/// The bytes of a directory.
pub fn encode_directory<'a>(entries: impl IntoIterator<Item = &'a DirectoryEntry>) -> Vec<u8> {
    let mut out = Vec::new();
    for e in entries {
        let raw = RawEntry {
            table_offset: U64::new(e.table_offset),
            table_size: U32::new(e.table_size),
            flags: U32::new(e.flags.bits()),
            kind: TYPE_DIRTY,
            granularity_bits: e.granularity_bits,
            name_size: U16::new(e.name.len() as u16),
            extra_data_size: U32::ZERO,
        };
        out.extend(raw.as_bytes());
        out.extend(&e.name);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out
}

/// What a table entry says of a cluster of bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableEntry {
    /// None is set.
    Zeroes,
    /// All are set.
    Ones,
    /// They are here, in bytes.
    Data(u64),
}

impl TableEntry {
    /// Reads a table entry. `None`: it makes no sense.
    pub fn decode(entry: u64, cluster_bits: u32) -> Option<TableEntry> {
        let offset = entry & TABLE_OFFSET_MASK;
        match (offset, entry & !TABLE_OFFSET_MASK) {
            (0, 0) => Some(TableEntry::Zeroes),
            (0, TABLE_ALL_ONES) => Some(TableEntry::Ones),
            (_, 0) if offset & ((1 << cluster_bits) - 1) == 0 => Some(TableEntry::Data(offset)),
            _ => None,
        }
    }

    /// The entry as it lies on disk.
    pub fn encode(self) -> u64 {
        match self {
            TableEntry::Zeroes => 0,
            TableEntry::Ones => TABLE_ALL_ONES,
            TableEntry::Data(offset) => offset,
        }
    }
}

/// Bytes that the bits of a disk take up on disk, without what rounds them up to clusters.
pub fn bitmap_bytes(disk_bytes: u64, granularity_bits: u32) -> u64 {
    disk_bytes.div_ceil(1 << granularity_bits).div_ceil(8)
}

#[cfg(test)]
mod tests;
