// SPDX-License-Identifier: MIT OR Apache-2.0
//! Creating images. An empty image of length 0 is written by hand: header, refcount table, refcount block. The rest is growing it, by the same code
//! that grows any image, so that there is one way to allocate.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockcore::{
    BackingName, BlockError, Child, ChildRole, CreateContext, CreateOption, IoBuf,
    MAX_LENGTH_BYTES, OptionKind, Options, Preallocation, Result, SECTOR_BYTES, TruncateRequest,
    WriteFlags,
};

use crate::extension::{self, Extension};
use crate::format::{Geometry, MAX_CLUSTER_BITS, MAX_L1_BYTES, MIN_CLUSTER_BITS, V3_HEADER_BYTES};
use crate::header::{Compatible, CompressionType, Header, Incompatible};
use crate::open::open_image;
use crate::refcount::set_refcount;

const fn option(
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
            "cluster_size",
            OptionKind::Size,
            "Bytes in a cluster",
            Some("65536"),
        ),
        option(
            "extended_l2",
            OptionKind::Bool,
            "Subclusters (not supported yet)",
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
        option(
            "data_file",
            OptionKind::String,
            "External data file (not supported yet)",
            None,
        ),
        option(
            "data_file_raw",
            OptionKind::Bool,
            "Keep the external data file valid as a raw image (not supported yet)",
            None,
        ),
        option(
            "encryption",
            OptionKind::Bool,
            "Legacy encryption (not supported yet)",
            None,
        ),
        option(
            "encrypt.format",
            OptionKind::String,
            "Encryption format (not supported yet)",
            None,
        ),
    ];
    OPTIONS
}

/// Options that have been checked.
struct Request {
    size: u64,
    preallocation: Preallocation,
    header: Header,
}

fn invalid<T>(text: impl Into<String>) -> Result<T> {
    Err(BlockError::invalid(text))
}

fn not_yet<T>(what: &str) -> Result<T> {
    Err(BlockError::unsupported(format!(
        "{what} is not supported yet"
    )))
}

/// Makes an image.
///
/// # Errors
/// `InvalidArgument` for options that make no sense, `Unsupported` for those of later releases, both before anything is written; those of the file.
pub async fn create(ctx: &CreateContext<'_>, filename: &str, mut options: Options) -> Result<()> {
    let request = check_options(&mut options)?;
    // What is left is the file's (`nocow` ...); it refuses what it doesn't know.
    options.set("size", "0");
    let file = ctx.create_file(filename, options).await?;
    let written = write_image(&file, &request, ctx).await;
    let closed = file.close().await;
    written.and(closed)
}

fn check_options(options: &mut Options) -> Result<Request> {
    if options.take_bool("encryption")?.unwrap_or(false) || options.has_subtree("encrypt") {
        return not_yet("Encryption");
    }
    let cluster_size = options.take_size("cluster_size")?.unwrap_or(65536);
    if !cluster_size.is_power_of_two()
        || !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_size.trailing_zeros())
    {
        return invalid("Cluster size must be a power of two between 512 and 2048k");
    }
    let cluster_bits = cluster_size.trailing_zeros();
    let preallocation = options
        .take_str("preallocation")
        .unwrap_or_else(|| "off".to_owned());
    let Some(preallocation) = Preallocation::from_name(&preallocation) else {
        return invalid(format!(
            "Parameter 'preallocation' does not accept value '{preallocation}'"
        ));
    };
    let version = match options.take_str("compat").as_deref() {
        None | Some("1.1" | "v3") => 3,
        Some("0.10" | "v2") => 2,
        Some(other) => {
            return invalid(format!(
                "Parameter 'version' does not accept value '{other}'"
            ));
        }
    };
    let needs_v3 = |what: &str| {
        invalid(format!(
            "{what} compatibility level 1.1 and above (use version=v3 or greater)"
        ))
    };
    let compression_type = match options.take_str("compression_type").as_deref() {
        None | Some("zlib") => CompressionType::Zlib,
        Some("zstd") => CompressionType::Zstd,
        Some(other) => {
            return invalid(format!(
                "Parameter 'compression-type' does not accept value '{other}'"
            ));
        }
    };
    if compression_type != CompressionType::Zlib && version < 3 {
        return needs_v3("Non-zlib compression type is only supported with");
    }
    if options.take_bool("extended_l2")?.unwrap_or(false) {
        return not_yet("extended_l2");
    }
    if options.take("data_file").is_some() || options.take_bool("data_file_raw")?.unwrap_or(false) {
        return not_yet("An external data file");
    }
    let backing = options.take_str("backing_file").filter(|b| !b.is_empty());
    let backing_format = options.take_str("backing_fmt");
    if backing.is_none() && backing_format.is_some() {
        return invalid("Backing format cannot be used without backing file");
    }
    if backing.is_some() && preallocation != Preallocation::Off {
        return invalid(
            "Backing file and preallocation can only be used at the same time if extended_l2 is on",
        );
    }
    let lazy = options.take_bool("lazy_refcounts")?.unwrap_or(false);
    if lazy && version < 3 {
        return needs_v3("Lazy refcounts only supported with");
    }
    let refcount_bits = options.take_number("refcount_bits")?.unwrap_or(16);
    if !refcount_bits.is_power_of_two() || refcount_bits > 64 {
        return invalid("Refcount width must be a power of two and may not exceed 64 bits");
    }
    if refcount_bits != 16 && version < 3 {
        let text = "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)";
        return invalid(text);
    }
    let size = options.take_size("size")?.unwrap_or(0);
    let geometry = Geometry {
        cluster_bits,
        refcount_order: refcount_bits.trailing_zeros(),
    };
    if size > i64::MAX as u64 - (SECTOR_BYTES - 1) {
        return invalid("Could not resize image: Image size cannot be negative");
    }
    if size > MAX_LENGTH_BYTES || geometry.l1_entries(size) * 8 > MAX_L1_BYTES {
        let text =
            "The image size is too large for file format 'qcow2' (try using a larger cluster size)";
        return Err(BlockError::from_errno(27).message(text));
    }
    let mut extensions = Vec::new();
    if let Some(format) = backing_format.as_ref().filter(|_| backing.is_some()) {
        extensions.push(Extension {
            kind: extension::BACKING_FORMAT,
            data: format.clone().into_bytes(),
        });
    }
    if version >= 3 {
        extensions.push(extension::feature_names());
    }
    let mut incompatible = Incompatible::empty();
    incompatible.set(
        Incompatible::COMPRESSION,
        compression_type != CompressionType::Zlib,
    );
    let mut compatible = Compatible::empty();
    compatible.set(Compatible::LAZY_REFCOUNTS, lazy);
    let header = Header {
        version,
        cluster_bits,
        size: 0,
        l1_size: 0,
        l1_table_offset: 0,
        refcount_table_offset: cluster_size,
        refcount_table_clusters: 1,
        nb_snapshots: 0,
        snapshots_offset: 0,
        incompatible,
        compatible,
        autoclear: 0,
        refcount_order: geometry.refcount_order,
        header_length: V3_HEADER_BYTES,
        compression_type,
        backing: backing.map(|filename| BackingName {
            filename,
            format: backing_format,
        }),
        extensions,
    };
    Ok(Request {
        size: size.next_multiple_of(SECTOR_BYTES),
        preallocation,
        header,
    })
}

async fn write_image(
    file: &blockcore::Backend,
    request: &Request,
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
    if request.size == 0 {
        return Ok(());
    }
    let child = Child::new("file", ChildRole::File, file.root().clone());
    let image = Arc::new(open_image(child, None, header.clone(), ctx.diagnostics().clone()).await?);
    image.prepare_writing().await?;
    image.writable.store(true, Ordering::Release);
    let grow = TruncateRequest {
        bytes: request.size,
        preallocation: request.preallocation,
        ..Default::default()
    };
    let grown = image.clone().grow(0, grow).await;
    image.tasks.wait_idle().await;
    grown.and(image.file.close().await)
}
