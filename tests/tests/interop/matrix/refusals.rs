// SPDX-License-Identifier: MIT OR Apache-2.0
//! What can't be had together, and in which words that is said.

use blocklayer_tests::tools::Side;

/// Something that the tools refuse when two features meet; in these words.
pub struct Refusal {
    /// Beginnings of the names of the two features.
    pub pair: [&'static str; 2],
    pub message: &'static str,
    /// Who refuses it; both sides do where there is none.
    pub by: Option<Side>,
}

const fn refused(one: &'static str, two: &'static str, message: &'static str) -> Refusal {
    Refusal {
        pair: [one, two],
        message,
        by: None,
    }
}

const fn refused_by(
    side: Side,
    one: &'static str,
    two: &'static str,
    message: &'static str,
) -> Refusal {
    Refusal {
        pair: [one, two],
        message,
        by: Some(side),
    }
}

pub const REFUSED: &[Refusal] = &[
    refused(
        "v2",
        "extended-l2",
        "Extended L2 entries are only supported with compatibility level 1.1",
    ),
    refused(
        "v2",
        "zstd",
        "Non-zlib compression type is only supported with compatibility level 1.1",
    ),
    refused(
        "v2",
        "data-file",
        "External data files are only supported with compatibility level 1.1",
    ),
    refused(
        "v2",
        "lazy-refcounts",
        "Lazy refcounts only supported with compatibility level 1.1",
    ),
    refused(
        "v2",
        "refcounts-",
        "Different refcount widths than 16 bits require compatibility level 1.1",
    ),
    refused(
        "v2",
        "amend-refcounts",
        "Refcount widths other than 16 bits require compatibility level 1.1",
    ),
    refused(
        "v2",
        "amend-lazy",
        "Lazy refcounts only supported with compatibility level 1.1",
    ),
    refused(
        "extended-l2",
        "clusters-512",
        "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
    ),
    refused(
        "extended-l2",
        "amend-compat",
        "Cannot downgrade an image with incompatible features 0x10 set",
    ),
    refused(
        "zstd",
        "amend-compat",
        "Cannot downgrade an image with zstd compression type and existing compressed clusters",
    ),
    refused(
        "converted",
        "metadata",
        "Compression and preallocation not supported at the same time",
    ),
    refused(
        "converted",
        "falloc",
        "Compression and preallocation not supported at the same time",
    ),
    refused(
        "converted",
        "full",
        "Compression and preallocation not supported at the same time",
    ),
    refused("data-file", "zlib", "write failed: Operation not supported"),
    refused("data-file", "zstd", "write failed: Operation not supported"),
    refused("data-file", "converted", "error while writing at byte"),
    refused("data-file", "snapshots", "Could not create snapshot"),
    refused(
        "data-file",
        "amend-compat",
        "Cannot downgrade an image with a data file",
    ),
    refused(
        "data-file-raw",
        "backing-",
        "Backing file and data-file-raw cannot be used at the same time",
    ),
    refused("refcounts-1", "snapshots", "Could not create snapshot"),
    refused("refcounts-1", "vm-state", "Could not create snapshot"),
    refused(
        "backing-",
        "metadata",
        "Backing file and preallocation can only be used at the same time if extended_l2",
    ),
    refused(
        "backing-",
        "falloc",
        "Backing file and preallocation can only be used at the same time if extended_l2",
    ),
    refused(
        "backing-",
        "full",
        "Backing file and preallocation can only be used at the same time if extended_l2",
    ),
    refused(
        "refcounts-",
        "amend-compat",
        "compat=0.10 requires refcount_bits=16",
    ),
    refused(
        "amend-refcounts",
        "amend-compat",
        "Refcount widths other than 16 bits require compatibility level 1.1",
    ),
    refused(
        "amend-lazy",
        "amend-compat",
        "Lazy refcounts only supported with compatibility level 1.1",
    ),
    refused(
        "v2",
        "bitmaps",
        "Cannot store dirty bitmaps in qcow2 v2 files",
    ),
    // A snapshot is another disk than the one that the bitmaps tell of.
    refused("bitmaps", "snapshots", "Device has active dirty bitmaps"),
    refused("bitmaps", "vm-state", "Device has active dirty bitmaps"),
    refused("killed", "bitmaps", "is inconsistent and cannot be used"),
    refused(
        "lazy-refcounts",
        "bitmaps",
        "is inconsistent and cannot be used",
    ),
    refused(
        "amend-lazy",
        "bitmaps",
        "is inconsistent and cannot be used",
    ),
    refused(
        "converted",
        "luks",
        "Compression and encryption not supported at the same time",
    ),
    refused(
        "converted",
        "aes",
        "Compression and encryption not supported at the same time",
    ),
    // QEMU writes what is compressed as it is.
    refused_by(
        Side::Ours,
        "zlib",
        "luks",
        "write failed: Operation not supported",
    ),
    refused_by(
        Side::Ours,
        "zlib",
        "aes",
        "write failed: Operation not supported",
    ),
    refused_by(
        Side::Ours,
        "zstd",
        "luks",
        "write failed: Operation not supported",
    ),
    refused_by(
        Side::Ours,
        "zstd",
        "aes",
        "write failed: Operation not supported",
    ),
    refused("aes", "", "Only LUKS encryption options can be amended"),
    refused("amend-backing", "", "Cannot amend the backing file"),
    // QEMU looks at the length of the file, and not at what is free at its end.
    refused_by(
        Side::Qemu,
        "grow",
        "",
        "Cannot use preallocation for shrinking files",
    ),
];

/// Pairs that are left out, by the beginnings of their names.
pub const LEFT_OUT: &[[&str; 2]] = &[
    // QEMU writes the VM state behind the end of the data file. Here there is none.
    ["data-file", "vm-state"],
    // The one without its amendments reads as the disk does; the other one doesn't, from some time on.
    ["data-file-raw", "data-file-raw-amend"],
    // What is made by `convert` is opened without options, and so without a password for what lies below.
    ["backing-luks", "copied"],
    ["backing-luks", "converted"],
    // QEMU fills the zero clusters of an encrypted image with zeroes that nobody encrypts when it downgrades it: they read as noise.
    ["luks", "amend-compat"],
    ["aes", "amend-compat"],
    // QEMU leaves bitmaps in an image that it downgrades, can't read them any more, and warns of them in every command.
    ["bitmaps", "amend-compat"],
    // To change bitmaps, QEMU opens an image without its backing file, and then takes no password for that.
    ["backing-luks", "bitmaps"],
    // QEMU takes minutes to change the width of refcounts in clusters of that size.
    ["clusters-2M", "amend-refcounts"],
];
