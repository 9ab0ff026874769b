// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sound images to begin with: our own, and those that the installed QEMU tools make, of every kind that the format has (`recipes`).

mod recipes;
mod words;

use std::sync::OnceLock;

pub use recipes::{of_qemu, ours};

/// A sound image, and where its metadata lies.
#[derive(Clone, Debug)]
pub struct Seed {
    /// What it is.
    pub name: String,
    /// The image.
    pub bytes: Vec<u8>,
    /// What its external data file holds, if it has one.
    pub data: Vec<u8>,
    /// Byte offsets of words worth changing.
    pub words: Vec<usize>,
}

impl Seed {
    /// Looks for the words of metadata in an image.
    pub fn new(name: impl Into<String>, bytes: Vec<u8>, data: Vec<u8>) -> Seed {
        Seed {
            name: name.into(),
            words: words::of(&bytes),
            bytes,
            data,
        }
    }
}

/// The largest image that is read from a directory, in bytes: one with a LUKS header of short keys.
const SEED_BYTES_MAX: usize = 1 << 20;
/// What the name of a data file ends with, in such a directory.
pub const DATA_SUFFIX: &str = ".data";

static SEEDS: OnceLock<Vec<Seed>> = OnceLock::new();

/// The seeds of this process: those it was given, else our own and the files in the directory `BLOCKLAYER_FUZZ_SEEDS`.
pub fn all() -> &'static [Seed] {
    SEEDS.get_or_init(|| {
        let mut seeds = crate::host::block_on(ours()).expect("images can be made in memory");
        let dir = std::env::var_os("BLOCKLAYER_FUZZ_SEEDS");
        let files = dir.and_then(|d| std::fs::read_dir(d).ok());
        let mut paths: Vec<_> = files.into_iter().flatten().flatten().collect();
        paths.sort_by_key(std::fs::DirEntry::path);
        for file in paths {
            let name = file.file_name().to_string_lossy().into_owned();
            // Larger ones make every case slow and show nothing else.
            if !name.ends_with(DATA_SUFFIX)
                && let Ok(bytes) = std::fs::read(file.path())
                && bytes.len() <= SEED_BYTES_MAX
            {
                let mut beside = file.path().into_os_string();
                beside.push(DATA_SUFFIX);
                let data = std::fs::read(beside).unwrap_or_default();
                seeds.push(Seed::new(name, bytes, data));
            }
        }
        seeds
    })
}

/// Takes these for the seeds of this process, before anybody has asked for them.
pub fn use_these(seeds: Vec<Seed>) {
    // Who came first has decided.
    let _first = SEEDS.set(seeds);
}
