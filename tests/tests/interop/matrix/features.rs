// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table of features of the matrix, what each adds to an image's life, and the list of what can't be had together.
//!
//! A new feature is a row in [`FEATURES`]; its pairs with all others follow from that. Persistent bitmaps and encryption get their rows (and steps) here.

use blocklayer_tests::tools::Side;

/// What one feature makes of an image.
pub struct Feature {
    pub name: &'static str,
    /// Creation options. Two features that give one option different values make no pair.
    pub options: &'static [(&'static str, &'static str)],
    pub source: Source,
    /// What is done apart from ordinary requests, and in which turn: one's own (0), the other side's (1), and so on.
    pub steps: &'static [(usize, Step)],
}

/// Where the image comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// `create`, and nothing below.
    Empty,
    /// `create` over a raw file whose length is odd, and less than the disk's.
    BackingRaw,
    /// `create` over a qcow2 image that is longer than the disk, and has a raw file below.
    BackingChain,
    /// `convert -c` of a raw file.
    Converted,
}

/// What the side whose turn it is does to the image.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// `write -c`, some times.
    Compress,
    /// `snapshot -c`, `-a`, `-d`.
    Snapshot(&'static str),
    Apply(&'static str),
    Delete(&'static str),
    /// `write -b`: a VM state, which both sides then read, and a snapshot of this name keeps.
    SaveState(&'static str),
    /// Goes back to a snapshot of this name, and both sides read the VM state.
    LoadState(&'static str),
    /// `resize` with a preallocation mode, by a random length.
    Grow(&'static str),
    /// `resize --shrink` to a random length.
    Shrink,
    /// `amend -o` with these options.
    Amend(&'static str),
    /// Unused clusters are counted as used; `check` sees that, and `check -r leaks` ends it.
    Leak,
    /// Used clusters are counted as unused; `check` sees that, and `check -r all` ends it.
    Uncount,
    /// The process is killed after a flush, and the other side goes on.
    Crash,
}

use Source::{BackingChain, BackingRaw, Converted, Empty};
use Step::{
    Amend, Apply, Compress, Crash, Delete, Grow, Leak, LoadState, SaveState, Shrink, Snapshot,
    Uncount,
};

/// A feature that is nothing but creation options.
const fn made_with(
    name: &'static str,
    options: &'static [(&'static str, &'static str)],
) -> Feature {
    Feature {
        name,
        options,
        source: Empty,
        steps: &[],
    }
}

/// A feature that is nothing but what happens to the image.
const fn treated_with(name: &'static str, steps: &'static [(usize, Step)]) -> Feature {
    Feature {
        name,
        options: &[],
        source: Empty,
        steps,
    }
}

const fn from(name: &'static str, source: Source) -> Feature {
    Feature {
        name,
        options: &[],
        source,
        steps: &[],
    }
}

const COMPRESS: &[(usize, Step)] = &[(0, Compress), (1, Compress), (2, Compress), (3, Compress)];

pub const FEATURES: &[Feature] = &[
    made_with("plain", &[]),
    made_with("v2", &[("compat", "0.10")]),
    made_with("extended-l2", &[("extended_l2", "on")]),
    Feature {
        name: "zlib",
        options: &[("compression_type", "zlib")],
        source: Empty,
        steps: COMPRESS,
    },
    Feature {
        name: "zstd",
        options: &[("compression_type", "zstd")],
        source: Empty,
        steps: COMPRESS,
    },
    from("converted", Converted),
    treated_with(
        "snapshots",
        &[
            (0, Snapshot("one")),
            (1, Snapshot("two")),
            (2, Apply("one")),
            (2, Snapshot("three")),
            (3, Delete("one")),
            (3, Apply("two")),
            (4, Delete("two")),
            (5, Delete("three")),
        ],
    ),
    treated_with(
        "vm-state",
        &[
            (0, SaveState("s")),
            (2, LoadState("s")),
            (3, SaveState("t")),
            (4, LoadState("t")),
        ],
    ),
    made_with("data-file", &[("data_file", "t.data")]),
    made_with(
        "data-file-raw",
        &[("data_file", "t.data"), ("data_file_raw", "on")],
    ),
    Feature {
        name: "lazy-refcounts",
        options: &[("lazy_refcounts", "on")],
        source: Empty,
        steps: &[(1, Crash), (2, Crash)],
    },
    treated_with("killed", &[(0, Crash), (3, Crash)]),
    made_with("refcounts-1", &[("refcount_bits", "1")]),
    made_with("refcounts-8", &[("refcount_bits", "8")]),
    made_with("refcounts-64", &[("refcount_bits", "64")]),
    made_with("clusters-512", &[("cluster_size", "512")]),
    made_with("clusters-2M", &[("cluster_size", "2M")]),
    from("backing-raw", BackingRaw),
    from("backing-chain", BackingChain),
    made_with("metadata", &[("preallocation", "metadata")]),
    made_with("falloc", &[("preallocation", "falloc")]),
    made_with("full", &[("preallocation", "full")]),
    treated_with(
        "grow",
        &[
            (0, Grow("off")),
            (1, Grow("metadata")),
            (2, Grow("falloc")),
            (3, Grow("full")),
            (4, Grow("off")),
            (5, Grow("metadata")),
        ],
    ),
    treated_with("shrink", &[(1, Shrink), (2, Shrink), (3, Grow("off"))]),
    treated_with(
        "amend-compat",
        &[
            (1, Amend("compat=0.10")),
            (2, Amend("compat=1.1")),
            (4, Amend("compat=0.10")),
        ],
    ),
    treated_with(
        "amend-refcounts",
        &[
            (1, Amend("refcount_bits=32")),
            (2, Amend("refcount_bits=4")),
            (3, Amend("refcount_bits=16")),
        ],
    ),
    treated_with(
        "amend-lazy",
        &[
            (1, Amend("lazy_refcounts=on")),
            (1, Crash),
            (2, Amend("lazy_refcounts=off")),
            (2, Crash),
        ],
    ),
    treated_with("repair-leaks", &[(1, Leak), (2, Leak)]),
    treated_with("repair-all", &[(1, Uncount), (2, Uncount)]),
];

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
    refused(
        "data-file",
        "converted",
        "error while writing at byte 0: Operation not supported",
    ),
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
    // Ours would have to change zero clusters of a snapshot.
    refused_by(
        Side::Ours,
        "snapshots",
        "amend-compat",
        "has zero clusters, which compat=0.10 has not",
    ),
    refused_by(
        Side::Ours,
        "vm-state",
        "amend-compat",
        "has zero clusters, which compat=0.10 has not",
    ),
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
    // QEMU takes minutes to change the width of refcounts in clusters of that size.
    ["clusters-2M", "amend-refcounts"],
];
