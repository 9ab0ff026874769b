// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sound images to begin with: our own, and those that the installed QEMU tools make, of every kind that the format has.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use blocklayer::testing::MemoryFactory;
use blocklayer::{
    NewBitmap, OpenOptions, Options, Registry, Result, Secret, WriteFlags, qcow2::Qcow2Factory,
};

/// The id of the secret that opens the encrypted ones.
pub(crate) const SECRET: &str = "s";

/// Gives a registry the secret.
pub(crate) fn add_secret(registry: &Registry) {
    let added = registry.secrets().add(SECRET, Secret::new("a password"));
    added.expect("a new registry has no secrets");
}

/// A sound image, and where its metadata lies.
#[derive(Clone, Debug)]
pub struct Seed {
    /// What it is.
    pub name: String,
    /// The image.
    pub bytes: Vec<u8>,
    /// Byte offsets of words worth changing.
    pub words: Vec<usize>,
}

impl Seed {
    /// Looks for the words of metadata in an image.
    pub fn new(name: impl Into<String>, bytes: Vec<u8>) -> Seed {
        Seed {
            name: name.into(),
            words: words(&bytes),
            bytes,
        }
    }
}

fn word(image: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    let bytes = at.checked_add(8).and_then(|end| image.get(at..end));
    bytes.map_or(0, |b| {
        u64::from_be_bytes(b.try_into().expect("eight bytes"))
    })
}

/// The header and what follows it, and the first entries of every table.
fn words(image: &[u8]) -> Vec<usize> {
    let mut out: Vec<usize> = (0..256).step_by(4).collect();
    let cluster = 1u64 << ((word(image, 20) >> 32) as u32).min(21);
    let mut table = |at: u64, entries: u64| -> Vec<u64> {
        let places = (0..entries).map(|i| at + i * 8);
        let used: Vec<u64> = places.filter(|&p| word(image, p) != 0).take(24).collect();
        out.extend(used.iter().map(|&p| p as usize));
        used
    };
    let host = |entry: u64| entry & 0x00ff_ffff_ffff_fe00;
    for entry in table(word(image, 40), (word(image, 36) >> 32).min(64)) {
        table(host(word(image, entry)), cluster / 8);
    }
    for entry in table(word(image, 48), cluster / 8) {
        table(host(word(image, entry)), cluster / 8);
    }
    // The snapshot table and whatever begins a cluster (bitmap directories, key slots).
    table(word(image, 64), 16);
    for at in (0..image.len() as u64).step_by(cluster as usize).take(32) {
        table(at, 2);
    }
    out.retain(|&at| at + 8 <= image.len());
    out
}

/// Images of this writer.
///
/// # Errors
/// None that anybody has to expect.
pub async fn ours() -> Result<Vec<Seed>> {
    let mut out = Vec::new();
    let shapes = [
        "cluster_size=512",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=4k,refcount_bits=1",
        "cluster_size=4k,compat=0.10",
        "cluster_size=64k",
        "cluster_size=4k,preallocation=metadata",
        "cluster_size=4k,lazy_refcounts=on",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=16k,extended_l2=on,preallocation=metadata",
        "cluster_size=4k,encrypt.format=aes",
        "cluster_size=64k,encrypt.format=luks,encrypt.iter-time=1,encrypt.cipher-alg=aes-128",
    ];
    for shape in shapes {
        let factory = std::sync::Arc::new(MemoryFactory::default());
        let mut registry = Registry::new();
        registry.register_shared(factory.clone());
        registry.register(Qcow2Factory);
        add_secret(&registry);
        let mut options = Options::new().with("size", "300k");
        for pair in shape.split(',') {
            let (key, value) = pair.split_once('=').expect("a pair");
            options = options.with(key, value);
        }
        let mut open = OpenOptions::new().format("qcow2");
        if shape.contains("encrypt") {
            options = options.with("encrypt.key-secret", SECRET);
            open = open.option("encrypt.key-secret", SECRET);
        }
        registry
            .create("qcow2", "memory:image", options, Default::default())
            .await?;
        let disk = open.open(&registry, "memory:image").await?;
        if shape.contains("cluster_size=64k") {
            // One that is marked, and one that holds nothing.
            for name in ["b", "c"] {
                let new = NewBitmap {
                    persistent: true,
                    enabled: name == "b",
                    ..NewBitmap::new(name)
                };
                disk.root().add_dirty_bitmap(new).await?;
            }
        }
        let none = WriteFlags::empty();
        disk.pwritev(3000, vec![1; 9000].into(), none).await?;
        disk.pwritev(200_000, vec![2; 3000].into(), none).await?;
        disk.pwrite_zeroes(65536, 8192, none).await?;
        disk.pwrite_zeroes(0, 512, none).await?;
        disk.pdiscard(4096, 4096).await?;
        disk.close().await?;
        let bytes = factory.disk("image").snapshot();
        out.push(Seed::new(format!("ours,{shape}"), bytes));
    }
    Ok(out)
}

/// What the installed QEMU tools are asked for: creation options, and what is done to the image `i`.
const RECIPES: &[(&str, &str)] = &[
    (
        "cluster_size=512",
        "$IO -c 'write 3000 9000' -c 'write -z 64k 8k' i",
    ),
    (
        "cluster_size=4k",
        "$IO -c 'write 0 20k' i; $IMG snapshot -c one i; $IO -c 'write 4k 9k' i; $IMG snapshot -c two i",
    ),
    (
        "cluster_size=4k",
        "$IO -c 'write -c 0 4k' -c 'write -c 4k 4k' -c 'write -c 16k 4k' i",
    ),
    (
        "cluster_size=4k,compression_type=zstd",
        "$IO -c 'write -c 0 4k' -c 'write -c 4k 4k' -c 'write 8k 1k' i",
    ),
    (
        "cluster_size=64k,extended_l2=on",
        "$IO -c 'write 2k 3k' -c 'write -z 64k 8k' i",
    ),
    (
        "cluster_size=4k,lazy_refcounts=on",
        "$IO -c 'write 0 20k' -c 'sigraise 9' i",
    ),
    (
        "cluster_size=4k,refcount_bits=2",
        "$IO -c 'write 0 20k' i; $IMG snapshot -c one i",
    ),
    (
        "cluster_size=4k,compat=0.10",
        "$IO -c 'write 0 20k' i; $IMG snapshot -c one i",
    ),
    (
        "cluster_size=4k",
        "$IMG bitmap --add -g 4k i b; $IO -c 'write 0 20k' i",
    ),
    (
        "cluster_size=4k,data_file=d,data_file_raw=on",
        "$IO -c 'write 0 20k' i",
    ),
    ("cluster_size=2M", "$IO -c 'write 0 2k' i"),
];

/// Images of the installed QEMU tools, made in `dir`. Recipes that a version doesn't know give no image.
pub fn of_qemu(tools: &Path, dir: &Path) -> Vec<Seed> {
    let mut out = Vec::new();
    for (number, (options, commands)) in RECIPES.iter().enumerate() {
        let dir = dir.join(format!("seed{number}"));
        let script = format!("$IMG create -q -f qcow2 -o {options} i 300k && {commands}");
        let made = std::fs::create_dir_all(&dir).and_then(|()| {
            let mut bash = Command::new("bash");
            bash.args(["-c", &script]).current_dir(&dir);
            bash.env("IO", tools.join("qemu-io"))
                .env("IMG", tools.join("qemu-img"));
            bash.stdout(Stdio::null()).stderr(Stdio::null()).status()
        });
        if let (Ok(_), Ok(bytes)) = (made, std::fs::read(dir.join("i"))) {
            out.push(Seed::new(format!("qemu,{options}"), bytes));
        }
    }
    out
}

/// The largest image that is read from a directory, in bytes.
const SEED_BYTES_MAX: usize = 512 << 10;

static SEEDS: OnceLock<Vec<Seed>> = OnceLock::new();

/// The seeds of this process: those it was given, else our own and the files in the directory `BLOCKLAYER_FUZZ_SEEDS`.
pub fn all() -> &'static [Seed] {
    SEEDS.get_or_init(|| {
        let mut seeds = crate::run::block_on(ours()).expect("images can be made in memory");
        let dir = std::env::var_os("BLOCKLAYER_FUZZ_SEEDS");
        let files = dir.and_then(|d| std::fs::read_dir(d).ok());
        let mut paths: Vec<_> = files.into_iter().flatten().flatten().collect();
        paths.sort_by_key(std::fs::DirEntry::path);
        for file in paths {
            // Larger ones make every case slow and show nothing else.
            if let Ok(bytes) = std::fs::read(file.path())
                && bytes.len() <= SEED_BYTES_MAX
            {
                seeds.push(Seed::new(file.file_name().to_string_lossy(), bytes));
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
