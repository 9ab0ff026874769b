// SPDX-License-Identifier: MIT OR Apache-2.0
//! What header extensions refer to: the encryption header, and persistent bitmaps (directory, tables, data).

use blockcore::{BlockError, Child, ErrorKind, IoBufMut, ReadFlags, Result, SECTOR_BYTES};

use super::Checker;
use super::count::Use;
use crate::extension;
use crate::header::{AUTOCLEAR_BITMAPS, Header};
use crate::image::be_words;

/// Bytes of the extension that names the encryption header: offset, length.
const ENCRYPTION_BYTES: usize = 16;
/// Bytes of the extension that names the bitmap directory: number of bitmaps, 4 reserved bytes, length, offset.
const BITMAPS_BYTES: usize = 24;
/// The most bitmaps.
const MAX_BITMAPS: u32 = 65535;
/// Bytes of the fixed part of a directory entry.
const ENTRY_BYTES: usize = 24;
/// The longest name of a bitmap.
const MAX_NAME_BYTES: usize = 1023;
/// The longest directory: all entries as long as they get.
const MAX_DIRECTORY_BYTES: u64 = MAX_BITMAPS as u64 * (ENTRY_BYTES as u64 + 1024);
/// The most bytes that a bitmap has in the file.
const MAX_BITMAP_BYTES: u64 = 512 << 20;
/// The flags that the format has: in use, enabled, and that unknown extra data does no harm.
const KNOWN_FLAGS: u32 = 7;
/// See [`BitmapTable::is_in_use`].
const FLAG_IN_USE: u32 = 1;
/// The only type of bitmaps.
const DIRTY_TRACKING: u8 = 1;
/// The log2 of how many bytes a bit stands for.
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// The host offset in an entry of a bitmap's table.
const TABLE_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of it that have no meaning.
const TABLE_RESERVED: u64 = 0xff00_0000_0000_01fe;

/// How an encryption header begins: the magic bytes of LUKS, version 1.
const LUKS_MAGIC: &[u8] = b"LUKS\xba\xbe\x00\x01";
/// Byte offset of the payload's offset in it, in sectors; all keys lie before that.
const LUKS_PAYLOAD_FIELD: usize = 104;
/// What has to be read of it for that.
const LUKS_HEAD_BYTES: u64 = 112;

/// A bitmap, and where its table lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BitmapTable {
    name: String,
    offset: u64,
    entries: u32,
    /// A writer did not get round to storing it: it means nothing any more.
    is_in_use: bool,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn bad<T>(text: impl Into<String>) -> Result<T> {
    Err(BlockError::new(ErrorKind::InvalidImage, text))
}

fn find(header: &Header, kind: u32) -> Option<&[u8]> {
    let extension = header.extensions.iter().find(|e| e.kind == kind)?;
    Some(&extension.data)
}

/// Offset and length of the encryption header.
///
/// # Errors
/// `InvalidImage` for an extension that makes no sense.
pub(crate) fn encryption_header(header: &Header) -> Result<Option<(u64, u64)>> {
    let Some(data) = find(header, extension::ENCRYPTION) else {
        return Ok(None);
    };
    if data.len() != ENCRYPTION_BYTES {
        return bad(format!(
            "CRYPTO header extension size {}, but expected size {ENCRYPTION_BYTES}",
            data.len()
        ));
    }
    let (offset, length) = (long(data, 0), long(data, 8));
    let cluster = 1u64 << header.cluster_bits;
    if !offset.is_multiple_of(cluster) {
        return bad(format!(
            "Encryption header offset '{offset}' is not a multiple of cluster size '{cluster}'"
        ));
    }
    Ok(Some((offset, length)))
}

/// Where the bitmap directory lies, how long it is, and how many entries it has. `None` where there is none, or a writer that knew nothing of it has made
/// it meaningless.
fn bitmap_directory(header: &Header) -> Result<Option<(u64, u64, u32)>> {
    let Some(data) = find(header, extension::BITMAPS) else {
        return Ok(None);
    };
    if header.autoclear & AUTOCLEAR_BITMAPS == 0 {
        return Ok(None);
    }
    if data.len() != BITMAPS_BYTES {
        return bad("bitmaps_ext: Invalid extension length");
    }
    let (count, bytes, offset) = (word(data, 0), long(data, 8), long(data, 16));
    if word(data, 4) != 0 {
        return bad("bitmaps_ext: Reserved field is not zero");
    }
    if count > MAX_BITMAPS {
        return bad(format!(
            "bitmaps_ext: image has {count} bitmaps, exceeding the QEMU supported maximum of {MAX_BITMAPS}"
        ));
    }
    if count == 0 {
        return bad("found bitmaps extension with zero bitmaps");
    }
    if !offset.is_multiple_of(1 << header.cluster_bits) {
        return bad("bitmaps_ext: invalid bitmap directory offset");
    }
    if bytes > MAX_DIRECTORY_BYTES {
        return bad(format!(
            "bitmaps_ext: bitmap directory size ({bytes}) exceeds the maximum supported size ({MAX_DIRECTORY_BYTES})"
        ));
    }
    if bytes == 0 {
        return bad("Requested bitmap directory size is zero");
    }
    Ok(Some((offset, bytes, count)))
}

/// Where the tables of an image's bitmaps lie.
///
/// # Errors
/// `InvalidImage` for a directory that makes no sense; those of the file.
pub(super) async fn bitmap_tables(header: &Header, file: &Child) -> Result<Vec<BitmapTable>> {
    let Some((offset, bytes, count)) = bitmap_directory(header)? else {
        return Ok(Vec::new());
    };
    let buf = IoBufMut::zeroed(bytes as usize);
    let read = file.preadv(offset, buf, ReadFlags::empty()).await?;
    parse_directory(&read.to_vec(), count, header.cluster_bits)
}

fn parse_directory(directory: &[u8], count: u32, cluster_bits: u32) -> Result<Vec<BitmapTable>> {
    let mut tables = Vec::new();
    let mut rest = directory;
    while !rest.is_empty() {
        if rest.len() < ENTRY_BYTES {
            return bad("Broken bitmap directory");
        }
        if tables.len() == count as usize {
            return bad("More bitmaps found than specified in header extension");
        }
        let name_bytes = usize::from(u16::from_be_bytes([rest[18], rest[19]]));
        let extra_bytes = word(rest, 20) as usize;
        let length = (ENTRY_BYTES + name_bytes).saturating_add(extra_bytes);
        let Some(name) = rest.get(length - name_bytes..length) else {
            return bad("Broken bitmap directory");
        };
        let flags = word(rest, 12);
        let table = BitmapTable {
            name: String::from_utf8_lossy(name).into_owned(),
            offset: long(rest, 0),
            entries: word(rest, 8),
            is_in_use: flags & FLAG_IN_USE != 0,
        };
        let is_good = extra_bytes == 0
            && (1..=MAX_NAME_BYTES).contains(&name_bytes)
            && table.offset != 0
            && table.offset.is_multiple_of(1 << cluster_bits)
            && table.entries != 0
            && u64::from(table.entries) << cluster_bits <= MAX_BITMAP_BYTES
            && flags & !KNOWN_FLAGS == 0
            && rest[16] == DIRTY_TRACKING
            && GRANULARITY_BITS.contains(&rest[17]);
        if !is_good {
            let name = table.name;
            return bad(format!("Bitmap '{name}' doesn't satisfy the constraints"));
        }
        tables.push(table);
        rest = rest.get(length.next_multiple_of(8)..).unwrap_or(&[]);
    }
    if tables.len() < count as usize {
        return bad("Less bitmaps found than specified in header extension");
    }
    Ok(tables)
}

/// The host clusters that hold the bits of a bitmap.
///
/// # Errors
/// `InvalidArgument` for an entry that makes no sense; those of the file.
async fn bitmap_clusters(header: &Header, file: &Child, table: &BitmapTable) -> Result<Vec<u64>> {
    // What lies past the end of the file is zero, and so says nothing.
    let there = file.length().saturating_sub(table.offset).div_ceil(8);
    let entries = u64::from(table.entries).min(there);
    if entries == 0 {
        return Ok(Vec::new());
    }
    let buf = IoBufMut::zeroed(entries as usize * 8);
    let read = file.preadv(table.offset, buf, ReadFlags::empty()).await?;
    let mut clusters = Vec::new();
    for entry in be_words(&read.to_vec()) {
        let host = entry & TABLE_OFFSET_MASK;
        let is_good = entry & TABLE_RESERVED == 0
            && host.is_multiple_of(1 << header.cluster_bits)
            && (host == 0 || entry == host);
        if !is_good {
            return Err(BlockError::from_errno(libc::EINVAL));
        }
        if host != 0 {
            clusters.push(host);
        }
    }
    Ok(clusters)
}

/// Refuses an image whose bitmaps can't be loaded.
///
/// # Errors
/// As [`bitmap_tables`].
pub(super) async fn check_loadable(header: &Header, file: &Child) -> Result<()> {
    let tables = bitmap_tables(header, file).await?;
    for table in tables.iter().filter(|t| !t.is_in_use) {
        let clusters = bitmap_clusters(header, file, table).await;
        clusters.map_err(|e| {
            let name = &table.name;
            e.context(format!(
                "Could not read bitmap_table table from image for bitmap '{name}'"
            ))
        })?;
    }
    Ok(())
}

impl Checker<'_> {
    /// Counts what header extensions refer to.
    pub(super) async fn count_extensions(&mut self) -> Result<()> {
        if let Some((offset, length)) = encryption_header(&self.header)? {
            self.count(offset, length, Use::OTHER);
            if !self.holds_all_keys(offset, length).await? {
                self.lost += 1;
            }
        }
        let Some((offset, bytes, _)) = bitmap_directory(&self.header)? else {
            return Ok(());
        };
        self.count(offset, bytes, Use::OTHER);
        for table in bitmap_tables(&self.header, self.file).await? {
            self.count_bitmap(table).await?;
        }
        Ok(())
    }

    /// Whether the encryption header is one, and is as long as it says it is. Without the keys in it no guest data can be read ever again, so no part
    /// of it may become free because of a wrong length.
    async fn holds_all_keys(&self, offset: u64, length: u64) -> Result<bool> {
        let head = self.words(offset, LUKS_HEAD_BYTES / 8).await?;
        let head: Vec<u8> = head.iter().flat_map(|w| w.to_be_bytes()).collect();
        if head.len() < LUKS_HEAD_BYTES as usize || !head.starts_with(LUKS_MAGIC) {
            return Ok(false);
        }
        let payload = u64::from(word(&head, LUKS_PAYLOAD_FIELD)) * SECTOR_BYTES;
        Ok(payload <= length)
    }

    async fn count_bitmap(&mut self, table: BitmapTable) -> Result<()> {
        let entries = u64::from(table.entries);
        self.count(table.offset, entries * 8, Use::OTHER);
        for host in bitmap_clusters(&self.header, self.file, &table).await? {
            self.count(host, self.cluster, Use::OTHER);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str) -> Vec<u8> {
        let mut bytes = 0x9_0000u64.to_be_bytes().to_vec();
        bytes.extend(1u32.to_be_bytes());
        bytes.extend(2u32.to_be_bytes());
        bytes.extend([1, 16]);
        bytes.extend((name.len() as u16).to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn a_directory_is_as_long_as_it_says() {
        let both = [entry("a"), entry("0123456789")].concat();
        let tables = parse_directory(&both, 2, 16).unwrap();
        let table = |name: &str| BitmapTable {
            name: name.to_owned(),
            offset: 0x9_0000,
            entries: 1,
            is_in_use: false,
        };
        assert_eq!(tables, [table("a"), table("0123456789")]);
        let text = |bytes: &[u8], count| parse_directory(bytes, count, 16).unwrap_err().text();
        assert_eq!(
            text(&both, 3),
            "Less bitmaps found than specified in header extension"
        );
        assert_eq!(
            text(&both, 1),
            "More bitmaps found than specified in header extension"
        );
        assert_eq!(text(&both[..both.len() - 8], 2), "Broken bitmap directory");
        assert_eq!(text(&both[..40], 2), "Broken bitmap directory");
    }

    #[test]
    fn entries_that_make_no_sense_are_refused() {
        for (at, value) in [
            (6, 1),
            (11, 0),
            (8, 0x7f),
            (15, 8),
            (16, 2),
            (17, 8),
            (17, 32),
        ] {
            let mut bytes = entry("name");
            bytes[at] = value;
            let error = parse_directory(&bytes, 1, 16).map_err(|e| e.text());
            let text = "Bitmap 'name' doesn't satisfy the constraints".to_owned();
            assert_eq!(error, Err(text), "byte {at} is {value}");
        }
    }
}
