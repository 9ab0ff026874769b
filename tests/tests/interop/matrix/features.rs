// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table of features of the matrix, and what each adds to an image's life. A new feature is a row in [`FEATURES`]; its pairs with all others follow from that, but for those that
//! `refusals` leaves out.

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
    /// As [`BackingChain`](Source::BackingChain), and the image below is encrypted.
    BackingLuks,
    /// `convert -c` of a raw file.
    Converted,
    /// `convert` of a raw file.
    Copied,
}

impl Source {
    pub fn is_convert(self) -> bool {
        matches!(self, Source::Converted | Source::Copied)
    }
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
    /// `bitmap` with these actions, on the bitmap of this name.
    Bitmap(&'static str, &'static str),
    /// `convert --bitmaps`: the copy holds the same data and the same bitmaps.
    CopyBitmaps,
    /// The password of this id opens the image from now on as well, and is the one that is used.
    AddKey(&'static str),
    /// The password of this id is no good any more.
    EraseKey(&'static str),
    /// The external data file gets this name, and `amend` tells the image.
    NameData(&'static str),
    /// `rebase` with these options, which only QEMU has, and which changes nothing of what a guest sees.
    Rebase(&'static str),
    /// Unused clusters are counted as used; `check` sees that, and `check -r leaks` ends it.
    Leak,
    /// Used clusters are counted as unused; `check` sees that, and `check -r all` ends it.
    Uncount,
    /// The process is killed after a flush, and the other side goes on.
    Crash,
}

use Source::{BackingChain, BackingLuks, BackingRaw, Converted, Copied, Empty};
use Step::{
    AddKey, Amend, Apply, Bitmap, Compress, CopyBitmaps, Crash, Delete, EraseKey, Grow, Leak,
    LoadState, NameData, Rebase, SaveState, Shrink, Snapshot, Uncount,
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

/// An image that is encrypted with LUKS.
macro_rules! luks {
    ($name:literal, $($key:literal = $value:literal),+) => {
        Feature {
            name: $name,
            options: &[
                ("encrypt.format", "luks"),
                ("encrypt.key-secret", "s0"),
                ("encrypt.iter-time", "1"),
                $((concat!("encrypt.", $key), $value)),+
            ],
            source: Empty,
            steps: CHANGE_KEYS,
        }
    };
}

/// Passwords come and go.
const CHANGE_KEYS: &[(usize, Step)] = &[
    (1, AddKey("s1")),
    (2, EraseKey("s0")),
    (3, AddKey("s2")),
    (4, EraseKey("s1")),
    (5, AddKey("s0")),
];

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
    from("copied", Copied),
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
        name: "data-file-raw-amend",
        options: &[("data_file", "t.data"), ("data_file_raw", "on")],
        source: Empty,
        steps: &[
            (1, NameData("another-name-for-t.data")),
            (2, Amend("data_file_raw=off")),
            (3, NameData("t.data")),
        ],
    },
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
    from("backing-luks", BackingLuks),
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
    treated_with(
        "bitmaps",
        &[
            (0, Bitmap("--add -g 4k", "a")),
            (0, Bitmap("--add -g 64k --disable", "off")),
            (1, Bitmap("--add", "own")),
            (1, Bitmap("--clear", "a")),
            (2, Bitmap("--add --merge a -g 512", "copy")),
            (2, Bitmap("--disable", "a")),
            (2, CopyBitmaps),
            (3, Bitmap("--enable", "off")),
            (3, Bitmap("--merge copy --enable", "a")),
            (3, CopyBitmaps),
            (4, Bitmap("--remove", "copy")),
            (4, Bitmap("--add -g 2M --merge own --merge off", "wide")),
            (5, Bitmap("--disable --clear --merge own", "off")),
            (5, Bitmap("--remove", "own")),
        ],
    ),
    luks!("luks", "cipher-alg" = "aes-256"),
    luks!(
        "luks-serpent",
        "cipher-alg" = "serpent-256",
        "cipher-mode" = "cbc",
        "ivgen-alg" = "essiv",
        "ivgen-hash-alg" = "sha256",
        "hash-alg" = "sha512"
    ),
    luks!(
        "luks-twofish",
        "cipher-alg" = "twofish-128",
        "hash-alg" = "sha1"
    ),
    luks!(
        "luks-cast5",
        "cipher-alg" = "cast5-128",
        "cipher-mode" = "cbc",
        "ivgen-alg" = "plain",
        "hash-alg" = "ripemd160"
    ),
    Feature {
        name: "aes",
        options: &[("encrypt.format", "aes"), ("encrypt.key-secret", "s0")],
        source: Empty,
        steps: &[(2, AddKey("s1"))],
    },
    Feature {
        name: "backing-rebase",
        options: &[],
        source: BackingRaw,
        steps: &[
            (1, Rebase("-u -F raw -b another-name-for-base.raw")),
            (3, Rebase("-u -F raw -b base.raw")),
            (4, Rebase("-b ")),
        ],
    },
    treated_with("amend-backing", &[(1, Amend("backing_file=base.raw"))]),
];
