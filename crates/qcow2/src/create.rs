// SPDX-License-Identifier: MIT OR Apache-2.0
//! Creating images. An empty image of length 0 is written by hand: header, refcount table, refcount block. The rest is growing it, by the same code
//! that grows any image, so that there is one way to allocate.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockcore::{
    BackingName, BlockError, Child, ChildRole, CreateContext, CreateOption, ErrorKind, IoBuf,
    MAX_LENGTH_BYTES, OptionKind, Options, Preallocation, Result, SECTOR_BYTES, TruncateRequest,
    WriteFlags,
};
use luks::MadeVolume;

use crate::crypto::{CryptMethod, Crypto, NewCrypto};
use crate::data_file::DataFile;
use crate::extension::{self, Extension};
use crate::format::{
    Geometry, MAX_BACKING_NAME_BYTES, MAX_CLUSTER_BITS, MAX_L1_BYTES, MIN_CLUSTER_BITS,
    MIN_EXTENDED_CLUSTER_BITS, V3_HEADER_BYTES,
};
use crate::header::{Compatible, CompressionType, Header, Incompatible};
use crate::open::open_image;
use crate::refcount::set_refcount;

/// Images with larger clusters than this carry the names of features.
const FEATURE_NAMES_ABOVE_BYTES: u64 = 4096;

pub(crate) const fn option(
    name: &'static str,
    kind: OptionKind,
    help: &'static str,
    default: Option<&'static str>,
) -> CreateOption {
    CreateOption {
        name,
        kind,
        help,
        default,
    }
}

/// What `create` knows, in the order in which tools show it.
pub fn create_options() -> &'static [CreateOption] {
    const OPTIONS: &[CreateOption] = &[
        option(
            "encryption",
            OptionKind::Bool,
            "As encrypt.format=aes (deprecated)",
            None,
        ),
        option(
            "encrypt.format",
            OptionKind::String,
            "How to encrypt: luks, or aes, which is easily broken",
            None,
        ),
        option(
            "encrypt.key-secret",
            OptionKind::String,
            "Id of the secret that is the password",
            None,
        ),
        option(
            "encrypt.cipher-alg",
            OptionKind::String,
            "Cipher with its key length: aes-256 if not given",
            None,
        ),
        option(
            "encrypt.cipher-mode",
            OptionKind::String,
            "How the blocks of a sector are chained: xts if not given",
            None,
        ),
        option(
            "encrypt.ivgen-alg",
            OptionKind::String,
            "Where initialisation vectors come from: plain64 if not given",
            None,
        ),
        option(
            "encrypt.ivgen-hash-alg",
            OptionKind::String,
            "Hash of the key for essiv: sha256 if not given",
            None,
        ),
        option(
            "encrypt.hash-alg",
            OptionKind::String,
            "Hash that passwords go through: sha256 if not given",
            None,
        ),
        option(
            "encrypt.iter-time",
            OptionKind::Number,
            "Milliseconds that it takes to try a password: 2000 if not given",
            None,
        ),
        option(
            "cluster_size",
            OptionKind::Size,
            "Bytes in a cluster",
            Some("65536"),
        ),
        option(
            "extended_l2",
            OptionKind::Bool,
            "Divide clusters into 32 subclusters",
            Some("off"),
        ),
        option(
            "preallocation",
            OptionKind::String,
            "What to allocate at once: off, metadata, falloc, full",
            None,
        ),
        option(
            "compression_type",
            OptionKind::String,
            "How compressed clusters are compressed: zlib, zstd",
            Some("zlib"),
        ),
        option("size", OptionKind::Size, "Length of the disk", None),
        option(
            "compat",
            OptionKind::String,
            "Format version: v2 (0.10) or v3 (1.1)",
            None,
        ),
        option(
            "backing_file",
            OptionKind::String,
            "Name of the image that shows through",
            None,
        ),
        option(
            "backing_fmt",
            OptionKind::String,
            "Format of that image",
            None,
        ),
        option(
            "data_file",
            OptionKind::String,
            "File that the data goes to",
            None,
        ),
        option(
            "data_file_raw",
            OptionKind::Bool,
            "Keep that file valid as a raw image",
            None,
        ),
        option(
            "lazy_refcounts",
            OptionKind::Bool,
            "Let refcounts be written late",
            Some("off"),
        ),
        option(
            "refcount_bits",
            OptionKind::Number,
            "Bits in a refcount",
            Some("16"),
        ),
    ];
    OPTIONS
}

/// Options that have been checked.
struct Request {
    size: u64,
    preallocation: Preallocation,
    header: Header,
    data_file: Option<String>,
    crypto: Option<NewCrypto>,
}

fn invalid<T>(text: impl Into<String>) -> Result<T> {
    Err(BlockError::invalid(text))
}

/// Makes an image.
///
/// # Errors
/// `InvalidArgument` for options that make no sense, `Unsupported` for those of later releases, both before anything is written; those of the file.
pub async fn create(ctx: &CreateContext<'_>, filename: &str, mut options: Options) -> Result<()> {
    let mut request = check_options(&mut options)?;
    let volume = match request.crypto.take() {
        Some(crypto) => crypto.make(ctx.registry()).await?,
        None => None,
    };
    // What is left is the file's (`nocow` ...); it refuses what it doesn't know.
    options.set("size", "0");
    let file = ctx.create_file(filename, options).await?;
    let written = write_both(&file, &request, volume.as_ref(), ctx).await;
    let closed = file.close().await;
    let created = written.and(closed);
    if created.is_err() {
        ctx.delete_file(filename).await;
    }
    created
}

/// Reads all options and then checks them; that order, and the order within, decides which of several mistakes is told.
fn check_options(options: &mut Options) -> Result<Request> {
    let cluster_size = options.take_size("cluster_size")?.unwrap_or(65536);
    let extended_l2 = options.take_bool("extended_l2")?.unwrap_or(false);
    let lazy = options.take_bool("lazy_refcounts")?.unwrap_or(false);
    let refcount_bits = options.take_number("refcount_bits")?.unwrap_or(16);
    let data_file = options.take_str("data_file");
    let data_file_raw = options.take_bool("data_file_raw")?.unwrap_or(false);
    let size = options.take_size("size")?.unwrap_or(0);
    let version = match options.take_str("compat").as_deref() {
        None | Some("1.1" | "v3") => 3,
        Some("0.10" | "v2") => 2,
        Some(other) => return not_accepted("version", other),
    };
    let backing = options.take_str("backing_file").filter(|b| !b.is_empty());
    let backing_format = options.take_str("backing_fmt");
    let crypto = NewCrypto::take(options)?;
    let preallocation = match options.take_str("preallocation") {
        None => Preallocation::Off,
        Some(name) => match Preallocation::from_name(&name) {
            Some(mode) => mode,
            None => return not_accepted("preallocation", &name),
        },
    };
    let compression_type = match options.take_str("compression_type").as_deref() {
        None | Some("zlib") => CompressionType::Zlib,
        Some("zstd") => CompressionType::Zstd,
        Some(other) => return not_accepted("compression-type", other),
    };

    let needs_v3 = |what: &str| {
        invalid(format!(
            "{what} compatibility level 1.1 and above (use version=v3 or greater)"
        ))
    };
    if extended_l2 && version < 3 {
        return needs_v3("Extended L2 entries are only supported with");
    }
    if !cluster_size.is_power_of_two()
        || !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_size.trailing_zeros())
    {
        return invalid("Cluster size must be a power of two between 512 and 2048k");
    }
    if extended_l2 && cluster_size < 1 << MIN_EXTENDED_CLUSTER_BITS {
        return invalid(format!(
            "Extended L2 entries are only supported with cluster sizes of at least {} bytes",
            1 << MIN_EXTENDED_CLUSTER_BITS
        ));
    }
    if backing.is_some() && preallocation != Preallocation::Off && !extended_l2 {
        return invalid(
            "Backing file and preallocation can only be used at the same time if extended_l2 is on",
        );
    }
    if backing_format.is_some() && backing.is_none() {
        return invalid("Backing format cannot be used without backing file");
    }
    if data_file_raw && data_file.is_none() {
        return invalid("data-file-raw requires data-file");
    }
    if data_file.is_some() && version < 3 {
        return needs_v3("External data files are only supported with");
    }
    if data_file_raw && backing.is_some() {
        return invalid("Backing file and data-file-raw cannot be used at the same time");
    }
    if lazy && version < 3 {
        return needs_v3("Lazy refcounts only supported with");
    }
    if !refcount_bits.is_power_of_two() || refcount_bits > 64 {
        return invalid("Refcount width must be a power of two and may not exceed 64 bits");
    }
    if refcount_bits != 16 && version < 3 {
        let text = "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)";
        return invalid(text);
    }
    if compression_type != CompressionType::Zlib && version < 3 {
        return needs_v3("Non-zlib compression type is only supported with");
    }
    let geometry = Geometry {
        cluster_bits: cluster_size.trailing_zeros(),
        refcount_order: refcount_bits.trailing_zeros(),
        extended_l2,
    };
    let header = fresh_header(
        version,
        geometry,
        compression_type,
        lazy,
        backing.map(|filename| BackingName {
            filename,
            format: backing_format,
        }),
    )?;
    let mut header = header;
    if let Some(crypto) = &crypto {
        header.set_crypt_method(crypto.method());
    }
    if let Some(name) = &data_file {
        header.set_data_file(name, data_file_raw);
    }
    Ok(Request {
        size: check_size(size, geometry)?,
        preallocation,
        header,
        data_file,
        crypto,
    })
}

fn not_accepted<T>(parameter: &str, value: &str) -> Result<T> {
    invalid(format!(
        "Parameter '{parameter}' does not accept value '{value}'"
    ))
}

/// Rounds a length up to whole sectors, and refuses what can't be addressed.
fn check_size(size: u64, geometry: Geometry) -> Result<u64> {
    let Some(size) = size
        .checked_next_multiple_of(SECTOR_BYTES)
        .filter(|&s| s <= i64::MAX as u64)
    else {
        return invalid("Could not resize image: Image size cannot be negative");
    };
    if size > MAX_LENGTH_BYTES {
        return invalid(format!(
            "Could not resize image: offset({size}) exceeds maximum({MAX_LENGTH_BYTES})"
        ));
    }
    if geometry.l1_entries(size) * 8 > MAX_L1_BYTES {
        let text =
            "The image size is too large for file format 'qcow2' (try using a larger cluster size)";
        return Err(BlockError::from_errno(libc::EFBIG).message(text));
    }
    Ok(size)
}

/// The header of an image of length 0. That it can be read again is certain afterwards: names that no reader takes are refused.
fn fresh_header(
    version: u32,
    geometry: Geometry,
    compression_type: CompressionType,
    lazy: bool,
    backing: Option<BackingName>,
) -> Result<Header> {
    let mut extensions = Vec::new();
    if let Some(format) = backing.as_ref().and_then(|b| b.format.as_ref()) {
        if format.len() >= extension::BACKING_FORMAT_BYTES_MAX {
            return not_accepted("backing-fmt", format);
        }
        extensions.push(Extension {
            kind: extension::BACKING_FORMAT,
            data: format.clone().into_bytes(),
        });
    }
    // The names take up 392 bytes; in small clusters that room is left to longer names of backing files.
    if version >= 3 && geometry.cluster_size() > FEATURE_NAMES_ABOVE_BYTES {
        extensions.push(extension::feature_names());
    }
    let mut incompatible = Incompatible::empty();
    incompatible.set(
        Incompatible::COMPRESSION,
        compression_type != CompressionType::Zlib,
    );
    incompatible.set(Incompatible::EXTENDED_L2, geometry.extended_l2);
    let mut compatible = Compatible::empty();
    compatible.set(Compatible::LAZY_REFCOUNTS, lazy);
    let header = Header {
        version,
        cluster_bits: geometry.cluster_bits,
        size: 0,
        l1_size: 0,
        l1_table_offset: 0,
        refcount_table_offset: geometry.cluster_size(),
        refcount_table_clusters: 1,
        nb_snapshots: 0,
        snapshots_offset: 0,
        incompatible,
        compatible,
        autoclear: 0,
        refcount_order: geometry.refcount_order,
        header_length: V3_HEADER_BYTES,
        compression_type,
        crypt_method: CryptMethod::None,
        backing,
        extensions,
        unknown_fields: Vec::new(),
    };
    let Some(backing) = &header.backing else {
        return Ok(header);
    };
    let kind = if backing.filename.len() as u64 > MAX_BACKING_NAME_BYTES.into() {
        ErrorKind::InvalidArgument
    } else if header.encode().is_err() {
        ErrorKind::NoSpace
    } else {
        return Ok(header);
    };
    let format = match &backing.format {
        Some(format) => format!(" with format '{format}'"),
        None => String::new(),
    };
    let what = format!(
        "Could not assign backing file '{}'{format}",
        backing.filename
    );
    let err = BlockError::new(kind, "");
    let text = format!("{what}: {}", err.strerror());
    Err(err.message(text))
}

/// Makes the data file, if there is to be one, and the image.
async fn write_both(
    file: &blockcore::Backend,
    request: &Request,
    volume: Option<&MadeVolume>,
    ctx: &CreateContext<'_>,
) -> Result<()> {
    let Some(name) = &request.data_file else {
        return write_image(file, None, request, volume, ctx).await;
    };
    let mut options = Options::new();
    options.set("size", "0");
    let data = ctx.create_file(name, options).await?;
    let written = write_image(file, Some(&data), request, volume, ctx).await;
    written.and(data.close().await)
}

async fn write_image(
    file: &blockcore::Backend,
    data: Option<&blockcore::Backend>,
    request: &Request,
    volume: Option<&MadeVolume>,
    ctx: &CreateContext<'_>,
) -> Result<()> {
    let header = &request.header;
    let cluster = 1usize << header.cluster_bits;
    let mut bytes = header.encode()?;
    bytes.resize(3 * cluster, 0);
    bytes[cluster..cluster + 8].copy_from_slice(&(2 * cluster as u64).to_be_bytes());
    for used in 0..3 {
        set_refcount(&mut bytes[2 * cluster..], header.refcount_order, used, 1);
    }
    file.root()
        .pwritev(0, IoBuf::from(bytes), WriteFlags::empty())
        .await?;
    if request.size == 0 && volume.is_none() {
        return Ok(());
    }
    let child = Child::new("file", ChildRole::File, file.root().clone());
    let mut image = open_image(child, None, header.clone(), ctx.diagnostics().clone()).await?;
    if let Some(data) = data {
        let child = Child::new("data-file", ChildRole::Data, data.root().clone());
        image.data = DataFile::Outside(child);
    }
    image.crypto = Crypto::without_key(header.crypt_method);
    let image = Arc::new(image);
    image.prepare_writing().await?;
    image.writable.store(true, Ordering::Release);
    let grow = TruncateRequest {
        bytes: request.size,
        preallocation: request.preallocation,
        ..Default::default()
    };
    let mut grown = image.truncate(grow).await;
    if let (Ok(()), Some(volume)) = (&grown, volume) {
        grown = image.write_encryption_header(volume).await;
    }
    image.tasks.wait_idle().await;
    let closed = match image.data.child() {
        Some(data) => data.close().await,
        None => Ok(()),
    };
    grown.and(image.file.close().await).and(closed)
}

#[cfg(test)]
mod tests;
