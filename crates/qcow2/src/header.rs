// SPDX-License-Identifier: MIT OR Apache-2.0
//! The image header: `RawHeader` is what is on disk, [`Header`] is what has been checked.
//!
//! Nothing here is believed before it was looked at: sizes and offsets are bounded before anything is read or allocated by them. Features that
//! this release can't handle are refused by name.

use blockcore::{BackingName, BlockError, Child, ErrorKind, IoBufMut, ReadFlags, Result};
use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::crypto::CryptMethod;
use crate::extension::{self, Extension};
use crate::format::{
    Geometry, MAGIC, MAX_BACKING_NAME_BYTES, MAX_CLUSTER_BITS, MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES, MAX_SNAPSHOTS, MIN_CLUSTER_BITS, MIN_EXTENDED_CLUSTER_BITS,
    SUBCLUSTERS_BITS, V2_HEADER_BYTES, V3_HEADER_BYTES,
};

bitflags::bitflags! {
    /// Feature bits that a program must know to open the image at all.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Incompatible: u64 {
        /// Refcounts may be wrong.
        const DIRTY = 1 << 0;
        /// Metadata is wrong; the image must not be written.
        const CORRUPT = 1 << 1;
        /// Guest data lies in another file.
        const DATA_FILE = 1 << 2;
        /// The compression type is not zlib.
        const COMPRESSION = 1 << 3;
        /// L2 entries have two words.
        const EXTENDED_L2 = 1 << 4;
    }
}

bitflags::bitflags! {
    /// Feature bits that a program may ignore.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Compatible: u64 {
        /// Refcounts may be written late.
        const LAZY_REFCOUNTS = 1 << 0;
    }
}

/// The autoclear bit that says that the persistent bitmaps are consistent.
pub const AUTOCLEAR_BITMAPS: u64 = 1 << 0;
/// The autoclear bit that says that the external data file reads as the disk does.
pub const AUTOCLEAR_DATA_FILE_RAW: u64 = 1 << 1;

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompressionType {
    /// Raw deflate.
    Zlib,
    /// Zstandard.
    Zstd,
}

impl CompressionType {
    /// Its name in options and in `info`.
    pub fn name(self) -> &'static str {
        match self {
            CompressionType::Zlib => "zlib",
            CompressionType::Zstd => "zstd",
        }
    }
}

/// The header as it lies on disk, with the version 3 fields.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    version: U32,
    backing_file_offset: U64,
    backing_file_size: U32,
    cluster_bits: U32,
    size: U64,
    crypt_method: U32,
    l1_size: U32,
    l1_table_offset: U64,
    refcount_table_offset: U64,
    refcount_table_clusters: U32,
    nb_snapshots: U32,
    snapshots_offset: U64,
    incompatible_features: U64,
    compatible_features: U64,
    autoclear_features: U64,
    refcount_order: U32,
    header_length: U32,
    compression_type: u8,
    padding: [u8; 7],
}

/// Bytes of [`RawHeader`]: what a new version 3 image has.
const RAW_HEADER_BYTES: usize = size_of::<RawHeader>();

/// Byte offset of the first of [`Header::tree_fields`].
pub const TREE_FIELDS: u64 = 24;
/// The end of the last of them in version 3.
const REFCOUNT_ORDER_END: usize = 100;

/// What an image is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// Reading and writing.
    Use,
    /// Looking for damage, and repairing it. Features that are in the way of reading and writing are in nobody's way then, nor are faults that a repair
    /// mends.
    Check,
}

/// A header whose every field has been checked.
#[derive(Clone, Debug)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// A cluster is `1 << cluster_bits` bytes.
    pub cluster_bits: u32,
    /// The length of the disk in bytes.
    pub size: u64,
    /// Entries in the active L1 table.
    pub l1_size: u32,
    /// Byte offset of the active L1 table.
    pub l1_table_offset: u64,
    /// Byte offset of the refcount table.
    pub refcount_table_offset: u64,
    /// Clusters in the refcount table.
    pub refcount_table_clusters: u32,
    /// The number of internal snapshots.
    pub nb_snapshots: u32,
    /// Byte offset of the snapshot table.
    pub snapshots_offset: u64,
    /// Features that must be known.
    pub incompatible: Incompatible,
    /// Features that may be ignored.
    pub compatible: Compatible,
    /// Features whose bits a writer clears that doesn't know them.
    pub autoclear: u64,
    /// A refcount is `1 << refcount_order` bits.
    pub refcount_order: u32,
    /// Bytes of the header itself.
    pub header_length: u32,
    /// How compressed clusters are compressed.
    pub compression_type: CompressionType,
    /// How guest data is encrypted.
    pub crypt_method: CryptMethod,
    /// The backing file, and its format from the header extension.
    pub backing: Option<BackingName>,
    /// The header extensions, all of them.
    pub extensions: Vec<Extension>,
    /// Header fields of later releases, which are kept.
    pub unknown_fields: Vec<u8>,
}

fn bad<T>(text: impl Into<String>) -> Result<T> {
    Err(BlockError::new(ErrorKind::InvalidImage, text))
}

fn not_yet<T>(text: impl Into<String>) -> Result<T> {
    Err(BlockError::unsupported(text))
}

impl Header {
    /// Reads and checks the header of an image.
    ///
    /// # Errors
    /// `InvalidImage` and `Unsupported` with a text that names the field or the feature; those of the file.
    pub async fn read(file: &Child) -> Result<Header> {
        Header::read_for(Purpose::Use, file).await
    }

    /// Reads the header of an image that is to be checked, and no more. There may be no refcount table, too many snapshots, or a snapshot table at an
    /// impossible place.
    ///
    /// # Errors
    /// As [`read`](Header::read).
    pub(crate) async fn read_for_check(file: &Child) -> Result<Header> {
        Header::read_for(Purpose::Check, file).await
    }

    async fn read_for(purpose: Purpose, file: &Child) -> Result<Header> {
        let want = RAW_HEADER_BYTES;
        let bytes = file
            .preadv(0, IoBufMut::zeroed(want), ReadFlags::empty())
            .await?
            .to_vec();
        let Ok((raw, _)) = RawHeader::read_from_prefix(&bytes) else {
            return bad("Image is not in qcow2 format");
        };
        if raw.magic.get() != MAGIC {
            return bad("Image is not in qcow2 format");
        }
        let version = raw.version.get();
        if !(2..=3).contains(&version) {
            return not_yet(format!("Unsupported qcow2 version {version}"));
        }
        let cluster_bits = raw.cluster_bits.get();
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            return bad(format!("Unsupported cluster size: 2^{cluster_bits}"));
        }
        let header_length = if version == 2 {
            V2_HEADER_BYTES
        } else {
            raw.header_length.get()
        };
        if version == 3 && header_length < V3_HEADER_BYTES {
            return bad("qcow2 header too short");
        }
        if u64::from(header_length) > 1 << cluster_bits {
            return bad("qcow2 header exceeds cluster size");
        }
        let cluster = 1usize << cluster_bits;
        let head = file
            .preadv(0, IoBufMut::zeroed(cluster), ReadFlags::empty())
            .await?
            .to_vec();
        Header::check(purpose, raw, version, header_length, &head)
    }

    /// The order of the checks decides which of several faults is told; it is QEMU's.
    fn check(
        purpose: Purpose,
        raw: RawHeader,
        version: u32,
        header_length: u32,
        head: &[u8],
    ) -> Result<Header> {
        let cluster_bits = raw.cluster_bits.get();
        let backing_at = raw.backing_file_offset.get();
        if backing_at > 1 << cluster_bits {
            return bad("Invalid backing file offset");
        }
        let area_end = if backing_at != 0 {
            backing_at as usize
        } else {
            head.len()
        };
        let area = head.get(header_length as usize..area_end).unwrap_or(&[]);

        let v3 = version >= 3;
        let v3_bits = |field: U64| if v3 { field.get() } else { 0 };
        let features = v3_bits(raw.incompatible_features);
        let has_type = v3 && header_length as usize >= RAW_HEADER_BYTES;
        let compression_type =
            check_compression(if has_type { raw.compression_type } else { 0 }, features)?;
        // Only the names of features are wanted here; that the extensions are sound is checked below.
        let incompatible = check_incompatible(features, &extension::parse_prefix(area))?;
        if incompatible.contains(Incompatible::EXTENDED_L2)
            && cluster_bits < MIN_EXTENDED_CLUSTER_BITS
        {
            let bytes = (1 << cluster_bits) >> SUBCLUSTERS_BITS;
            return bad(format!("Unsupported subcluster size: {bytes}"));
        }
        let refcount_order = if v3 { raw.refcount_order.get() } else { 4 };
        if refcount_order > 6 {
            return bad("Reference count entry width too large; may not exceed 64 bits");
        }
        let mut header = Header {
            version,
            cluster_bits,
            size: raw.size.get(),
            l1_size: raw.l1_size.get(),
            l1_table_offset: raw.l1_table_offset.get(),
            refcount_table_offset: raw.refcount_table_offset.get(),
            refcount_table_clusters: raw.refcount_table_clusters.get(),
            nb_snapshots: raw.nb_snapshots.get(),
            snapshots_offset: raw.snapshots_offset.get(),
            incompatible,
            compatible: Compatible::from_bits_retain(v3_bits(raw.compatible_features)),
            autoclear: v3_bits(raw.autoclear_features),
            refcount_order,
            header_length,
            compression_type,
            crypt_method: CryptMethod::None,
            backing: None,
            extensions: Vec::new(),
            unknown_fields: (head.get(RAW_HEADER_BYTES..header_length as usize))
                .unwrap_or_default()
                .to_vec(),
        };
        header.check_tables(purpose)?;
        header.extensions = extension::parse(area)?;
        let method = raw.crypt_method.get();
        header.crypt_method = match CryptMethod::from_number(method) {
            Some(method) => method,
            None => return bad(format!("Unsupported encryption method {}", method as i32)),
        };
        if purpose == Purpose::Use {
            header.check_encryption()?;
        }
        let name_bytes = raw.backing_file_size.get();
        header.backing = read_backing(head, backing_at, name_bytes, &header.extensions)?;
        Ok(header)
    }

    /// Checks that tables lie at possible places and have possible sizes.
    fn check_tables(&self, purpose: Purpose) -> Result<()> {
        let clusters = self.refcount_table_clusters;
        if u64::from(clusters) << self.cluster_bits > MAX_REFCOUNT_TABLE_BYTES {
            return bad("Reference count table too large");
        }
        if clusters == 0 && purpose == Purpose::Use {
            return bad("Image does not contain a reference count table");
        }
        self.check_place(
            self.refcount_table_offset,
            u64::from(clusters) << self.cluster_bits,
            "Reference count table",
        )?;
        if purpose == Purpose::Use {
            if self.nb_snapshots > MAX_SNAPSHOTS {
                return bad("Snapshot table too large");
            }
            // Each entry of the table has at least 40 bytes.
            let bytes = u64::from(self.nb_snapshots) * 40;
            self.check_place(self.snapshots_offset, bytes, "Snapshot table")?;
        }
        if u64::from(self.l1_size) * 8 > MAX_L1_BYTES {
            return Err(BlockError::from_errno(libc::EFBIG).message("Active L1 table too large"));
        }
        // A size near the end of the number range counts as none here; the next check but one refuses it.
        let table_bytes = self.geometry().table_bytes();
        let needed = self.size.wrapping_add(table_bytes - 1) / table_bytes;
        if needed > i32::MAX as u64 {
            return Err(BlockError::from_errno(libc::EFBIG).message("Image is too big"));
        }
        if u64::from(self.l1_size) < needed {
            return bad("L1 table is too small");
        }
        if self.size > blockcore::MAX_LENGTH_BYTES {
            return Err(
                BlockError::from_errno(libc::EFBIG).context("Could not refresh total sector count")
            );
        }
        self.check_place(
            self.l1_table_offset,
            u64::from(self.l1_size) * 8,
            "Active L1 table",
        )
    }

    pub(crate) fn check_place(&self, offset: u64, bytes: u64, what: &str) -> Result<()> {
        let aligned = offset & ((1 << self.cluster_bits) - 1) == 0;
        let end = offset
            .checked_add(bytes)
            .filter(|&end| end <= i64::MAX as u64);
        if aligned && end.is_some() {
            Ok(())
        } else {
            bad(format!("{what} offset invalid"))
        }
    }

    /// The sizes that follow from cluster size and refcount width.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            extended_l2: self.has_extended_l2(),
        }
    }

    /// Whether L2 entries have two words, the second for subclusters.
    pub fn has_extended_l2(&self) -> bool {
        self.incompatible.contains(Incompatible::EXTENDED_L2)
    }

    /// Whether the image says that it is corrupt.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible.contains(Incompatible::CORRUPT)
    }

    /// Whether the image may be written.
    ///
    /// # Errors
    /// `Corrupt` for an image that says it is.
    pub fn check_writable(&self) -> Result<()> {
        if self.is_corrupt() {
            return Err(BlockError::corrupt(
                "qcow2: Image is corrupt; cannot be opened read/write",
            )
            .errno_is(libc::EACCES));
        }
        Ok(())
    }

    /// The fields as they lie on disk; the backing file's name has no place yet.
    fn raw(&self) -> RawHeader {
        let compression = match self.compression_type {
            CompressionType::Zlib => 0,
            CompressionType::Zstd => 1,
        };
        RawHeader {
            magic: U32::new(MAGIC),
            version: U32::new(self.version),
            backing_file_offset: U64::ZERO,
            backing_file_size: U32::ZERO,
            cluster_bits: U32::new(self.cluster_bits),
            size: U64::new(self.size),
            crypt_method: U32::new(self.crypt_method.number()),
            l1_size: U32::new(self.l1_size),
            l1_table_offset: U64::new(self.l1_table_offset),
            refcount_table_offset: U64::new(self.refcount_table_offset),
            refcount_table_clusters: U32::new(self.refcount_table_clusters),
            nb_snapshots: U32::new(self.nb_snapshots),
            snapshots_offset: U64::new(self.snapshots_offset),
            incompatible_features: U64::new(self.incompatible.bits()),
            compatible_features: U64::new(self.compatible.bits()),
            autoclear_features: U64::new(self.autoclear),
            refcount_order: U32::new(self.refcount_order),
            header_length: U32::new((RAW_HEADER_BYTES + self.unknown_fields.len()) as u32),
            compression_type: compression,
            padding: [0; 7],
        }
    }

    /// The fields that say where everything is, as they lie on disk from byte [`TREE_FIELDS`] on: the length of the disk, the L1 table, the refcount
    /// table, the snapshots, and in version 3 the features and the refcount width. All in the header's first sector.
    pub fn tree_fields(&self) -> Vec<u8> {
        let end = match self.version {
            2 => V2_HEADER_BYTES as usize,
            _ => REFCOUNT_ORDER_END,
        };
        self.raw().as_bytes()[TREE_FIELDS as usize..end].to_vec()
    }

    /// The header's cluster: header, extensions, backing file name.
    ///
    /// # Errors
    /// `InvalidArgument` if it doesn't fit.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut raw = self.raw();
        let (fields, more) = match self.version {
            2 => (V2_HEADER_BYTES as usize, &[][..]),
            _ => (RAW_HEADER_BYTES, &self.unknown_fields[..]),
        };
        let header_bytes = fields + more.len();
        let name = self
            .backing
            .as_ref()
            .map_or(&b""[..], |b| b.filename.as_bytes());
        let room = (1usize << self.cluster_bits).saturating_sub(header_bytes + name.len());
        let mut extensions = extension::encode(&self.extensions);
        if extensions.len() > room {
            // Names of features are for people; the rest is needed.
            let needed = self
                .extensions
                .iter()
                .filter(|e| e.kind != extension::FEATURE_NAMES)
                .cloned();
            extensions = extension::encode(&needed.collect::<Vec<_>>());
        }
        if extensions.len() > room {
            return Err(BlockError::invalid(
                "The header does not fit into one cluster",
            ));
        }
        let name_at = header_bytes + extensions.len();
        if !name.is_empty() {
            raw.backing_file_offset = U64::new(name_at as u64);
            raw.backing_file_size = U32::new(name.len() as u32);
        }
        let mut out = raw.as_bytes()[..fields].to_vec();
        out.extend(more);
        out.extend(extensions);
        out.extend(name);
        Ok(out)
    }

    /// The header in at most one sector, if it fits there with or without the name of the backing file; else that name is to be written to `name_at`.
    ///
    /// # Errors
    /// `InvalidArgument` if it doesn't fit into the cluster.
    pub fn encode_apart(&self, name_at: usize) -> Result<(Vec<u8>, Option<Vec<u8>>)> {
        let whole = self.encode()?;
        let Some(backing) = self.backing.as_ref().filter(|_| whole.len() > 512) else {
            return Ok((whole, None));
        };
        let name = backing.filename.clone().into_bytes();
        if name_at + name.len() > 1 << self.cluster_bits {
            return Err(BlockError::invalid(
                "The header does not fit into one cluster",
            ));
        }
        let mut head = whole[..whole.len() - name.len()].to_vec();
        head[8..16].copy_from_slice(&(name_at as u64).to_be_bytes());
        Ok((head, Some(name)))
    }
}

fn check_compression(kind: u8, features: u64) -> Result<CompressionType> {
    let has_bit = features & Incompatible::COMPRESSION.bits() != 0;
    match kind {
        0 if has_bit => bad("qcow2: Compression type incompatible feature bit must not be set"),
        0 => Ok(CompressionType::Zlib),
        1 if has_bit => Ok(CompressionType::Zstd),
        1 => bad("qcow2: Compression type incompatible feature bit must be set"),
        n => not_yet(format!("qcow2: unknown compression type: {n}")),
    }
}

fn check_incompatible(features: u64, extensions: &[Extension]) -> Result<Incompatible> {
    let known = Incompatible::from_bits_truncate(features);
    let unknown = features & !Incompatible::all().bits();
    if unknown != 0 {
        let mut names = Vec::new();
        let mut nameless = 0;
        for bit in (0..64).filter(|b| unknown & (1 << b) != 0) {
            match extension::incompatible_name(extensions, bit) {
                Some(name) => names.push(name),
                None => nameless |= 1u64 << bit,
            }
        }
        if nameless != 0 {
            names.push(format!("Unknown incompatible feature: {nameless:x}"));
        }
        return not_yet(format!(
            "Unsupported qcow2 feature(s): {}",
            names.join(", ")
        ));
    }
    Ok(known)
}

fn read_backing(
    head: &[u8],
    at: u64,
    len: u32,
    extensions: &[Extension],
) -> Result<Option<BackingName>> {
    if at == 0 || len == 0 {
        return Ok(None);
    }
    let room = (head.len() as u64 - at).min(MAX_BACKING_NAME_BYTES.into());
    if u64::from(len) > room {
        return bad("Backing file name too long");
    }
    let text = |bytes: &[u8]| {
        String::from_utf8(bytes.to_vec()).or_else(|_| bad("Backing file name is no valid text"))
    };
    let name = &head[at as usize..at as usize + len as usize];
    // Other programs stop at a zero byte, too.
    let filename = text(name.split(|&b| b == 0).next().unwrap_or_default())?;
    if filename.is_empty() {
        return Ok(None);
    }
    let format = extensions
        .iter()
        .find(|e| e.kind == extension::BACKING_FORMAT);
    let format = format.map(|e| text(&e.data)).transpose()?;
    Ok(Some(BackingName { filename, format }))
}

#[cfg(test)]
mod tests;
