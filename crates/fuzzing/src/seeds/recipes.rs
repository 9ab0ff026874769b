// SPDX-License-Identifier: MIT OR Apache-2.0
//! How the seeds are made.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use blocklayer::testing::MemoryFactory;
use blocklayer::{
    Backend, Diagnostics, IoBuf, NewBitmap, OpenOptions, Options, Registry, Result, Secret,
    SnapshotRequest, TruncateRequest, WriteFlags, luks::LuksFactory, qcow2::Qcow2Factory,
};

use super::Seed;
use crate::host::{PASSWORD, SECRETS};

/// What becomes of one of our images after some writes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Treatment {
    None,
    Compressed,
    Snapshots,
    Bitmaps,
    /// Bitmaps that a process had in use which is gone.
    BitmapsInUse,
    VmState,
    Resized,
}

/// Few rounds, and keys of half the length: a password is tried in milliseconds, and the header takes half a MiB.
const LUKS: &str = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=1,encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc";

const OURS: &[(&str, Treatment)] = &[
    ("cluster_size=512", Treatment::None),
    ("cluster_size=512,refcount_bits=64", Treatment::Resized),
    ("cluster_size=4k,refcount_bits=1", Treatment::None),
    ("cluster_size=4k,compat=0.10", Treatment::Snapshots),
    ("cluster_size=64k", Treatment::None),
    ("cluster_size=4k,preallocation=metadata", Treatment::None),
    ("cluster_size=4k,lazy_refcounts=on", Treatment::None),
    ("cluster_size=16k,extended_l2=on", Treatment::Snapshots),
    (
        "cluster_size=16k,extended_l2=on,preallocation=metadata",
        Treatment::None,
    ),
    ("cluster_size=4k", Treatment::Compressed),
    ("cluster_size=16k,extended_l2=on", Treatment::Compressed),
    (
        "cluster_size=4k,compression_type=zstd",
        Treatment::Compressed,
    ),
    ("cluster_size=512,refcount_bits=4", Treatment::Snapshots),
    ("cluster_size=512", Treatment::Bitmaps),
    ("cluster_size=64k", Treatment::BitmapsInUse),
    ("cluster_size=4k", Treatment::VmState),
    ("cluster_size=4k,data_file=memory:data", Treatment::Bitmaps),
    (
        "cluster_size=16k,extended_l2=on,data_file=memory:data,data_file_raw=on",
        Treatment::None,
    ),
    ("cluster_size=4k,LUKS", Treatment::Snapshots),
    ("cluster_size=512,LUKS,compat=0.10", Treatment::Resized),
    (
        "cluster_size=16k,extended_l2=on,encrypt.format=aes,encrypt.key-secret=key",
        Treatment::Bitmaps,
    ),
];

/// Images of this writer.
///
/// # Errors
/// None that anybody has to expect.
pub async fn ours() -> Result<Vec<Seed>> {
    let mut out = Vec::new();
    for (options, treatment) in OURS {
        out.push(our_image(options, *treatment).await?);
    }
    out.push(our_volume().await?);
    Ok(out)
}

struct Factory {
    memory: Arc<MemoryFactory>,
    registry: Registry,
}

impl Factory {
    fn new() -> Result<Factory> {
        let memory = Arc::new(MemoryFactory::default());
        let mut registry = Registry::new();
        registry.register_shared(memory.clone());
        registry.register(Qcow2Factory);
        registry.register(LuksFactory);
        let password = Secret::new(PASSWORD.as_bytes());
        registry.secrets().add(SECRETS[0], password)?;
        Ok(Factory { memory, registry })
    }

    fn seed(&self, name: String) -> Seed {
        let bytes = self.memory.disk("image").snapshot();
        Seed::new(name, bytes, self.memory.disk("data").snapshot())
    }
}

async fn our_image(options: &str, treatment: Treatment) -> Result<Seed> {
    let factory = Factory::new()?;
    let mut create = Options::new().with("size", "300k");
    for pair in options.replace("LUKS", LUKS).split(',') {
        let (key, value) = pair.split_once('=').expect("a pair");
        create = create.with(key, value);
    }
    let registry = &factory.registry;
    registry
        .create("qcow2", "memory:image", create, Diagnostics::default())
        .await?;
    let mut open = OpenOptions::new().format("qcow2");
    if options.contains("data_file") {
        open = open.option("data-file.driver", "memory");
        open = open.option("data-file.filename", "data");
    }
    if options.contains("LUKS") || options.contains("encrypt") {
        open = open.option("encrypt.key-secret", SECRETS[0]);
    }
    let disk = open.open(registry, "memory:image").await?;
    let none = WriteFlags::empty();
    if treatment == Treatment::Bitmaps || treatment == Treatment::BitmapsInUse {
        add_bitmaps(&disk).await?;
    }
    disk.pwritev(3000, vec![1; 9000].into(), none).await?;
    disk.pwritev(200_000, vec![2; 3000].into(), none).await?;
    disk.pwrite_zeroes(65536, 8192, none).await?;
    disk.pwrite_zeroes(0, 512, none).await?;
    disk.pdiscard(4096, 4096).await?;
    treat(&disk, treatment).await?;
    let mut name = format!("ours,{}", options.replace("LUKS", "luks"));
    if treatment == Treatment::BitmapsInUse {
        // Nothing is stored by a process that goes without closing.
        disk.close().await?;
        let disk = OpenOptions::new().format("qcow2");
        let disk = disk.open(registry, "memory:image").await?;
        disk.pwritev(0, vec![3; 512].into(), none).await?;
        disk.flush().await?;
        name += ",in use";
        return Ok(factory.seed(name));
    }
    disk.close().await?;
    Ok(factory.seed(name))
}

async fn add_bitmaps(disk: &Backend) -> Result<()> {
    for (name, granularity, enabled) in [("a", 512, true), ("b", 65536, true), ("c", 4096, false)] {
        let new = NewBitmap {
            granularity: Some(granularity),
            persistent: true,
            enabled,
            ..NewBitmap::new(name)
        };
        disk.root().add_dirty_bitmap(new).await?;
    }
    Ok(())
}

async fn treat(disk: &Backend, treatment: Treatment) -> Result<()> {
    let root = disk.root();
    match treatment {
        Treatment::None | Treatment::Bitmaps | Treatment::BitmapsInUse => {}
        Treatment::Compressed => {
            let cluster = root.driver().info().await?.cluster_size;
            for number in [6, 7, 9] {
                let data: Vec<u8> = (0..cluster).map(|i| ((i * number) >> 5) as u8).collect();
                let data = IoBuf::from(data);
                disk.pwritev_compressed(number * cluster, data).await?;
            }
        }
        Treatment::Snapshots => {
            for name in ["a", "b"] {
                root.snapshot_create(SnapshotRequest::now(name)).await?;
                let data = vec![name.as_bytes()[0]; 9000];
                disk.pwritev(4096, data.into(), WriteFlags::empty()).await?;
            }
        }
        Treatment::VmState => {
            let state = IoBuf::from(vec![7; 20_480]);
            root.driver().save_vmstate(0, state).await?;
            let request = SnapshotRequest {
                vm_state_size: 20_480,
                ..SnapshotRequest::now("a")
            };
            root.snapshot_create(request).await?;
        }
        Treatment::Resized => {
            disk.truncate(TruncateRequest::to(100 << 10)).await?;
            disk.truncate(TruncateRequest::to(500 << 10)).await?;
        }
    }
    Ok(())
}

/// A LUKS volume that is no qcow2 image.
async fn our_volume() -> Result<Seed> {
    let factory = Factory::new()?;
    let mut create = Options::new().with("size", "100k");
    for pair in LUKS.split(',').skip(1) {
        let (key, value) = pair.split_once('=').expect("a pair");
        create = create.with(key.trim_start_matches("encrypt."), value);
    }
    let registry = &factory.registry;
    registry
        .create("luks", "memory:image", create, Diagnostics::default())
        .await?;
    Ok(factory.seed("ours,luks volume".to_owned()))
}

/// What the installed QEMU tools are asked for: creation options, and what is done to the image `i`.
const OF_QEMU: &[(&str, &str)] = &[
    (
        "cluster_size=512",
        "$IO -c 'write 3000 9000' -c 'write -z 64k 8k' i",
    ),
    (
        "cluster_size=4k",
        "$IO -c 'write 0 20k' i; $IMG snapshot -c a i; $IO -c 'write 4k 9k' i; $IMG snapshot -c b i",
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
        "cluster_size=16k,extended_l2=on",
        "$IO -c 'write 2k 3k' i; $IMG snapshot -c a i; $IO -c 'write 1k 3k' i",
    ),
    (
        "cluster_size=4k,lazy_refcounts=on",
        "$IO -c 'write 0 20k' -c 'sigraise 9' i",
    ),
    (
        "cluster_size=4k,refcount_bits=2",
        "$IO -c 'write 0 20k' i; $IMG snapshot -c a i",
    ),
    (
        "cluster_size=4k,compat=0.10",
        "$IO -c 'write 0 20k' i; $IMG snapshot -c a i",
    ),
    (
        "cluster_size=4k",
        "$IO -c 'write 0 20k' -c 'write -b 0 8k' i; $IMG snapshot -c a i",
    ),
    (
        "cluster_size=4k",
        "$IMG bitmap --add -g 4k i a; $IMG bitmap --add --disable -g 64k i b; $IO -c 'write 0 20k' i",
    ),
    (
        "cluster_size=512",
        "$IMG bitmap --add -g 512 i a; $IO -c 'write 0 20k' -c 'sigraise 9' i",
    ),
    (
        "cluster_size=4k,data_file=d,data_file_raw=on",
        "$IO -c 'write 0 20k' i",
    ),
    (
        "cluster_size=64k,extended_l2=on,data_file=d",
        "$IMG bitmap --add i a; $IO -c 'write 0 20k' i",
    ),
    ("cluster_size=2M", "$IO -c 'write 0 2k' i"),
    (
        "cluster_size=4k,LUKS",
        "$KEYED -c 'write 0 20k' $OPTS; $IMG snapshot $KEY -c a --image-opts $OPTS; $KEYED -c 'write 0 5k' $OPTS",
    ),
    (
        "cluster_size=4k,compat=0.10,encrypt.format=aes,encrypt.key-secret=key",
        "$KEYED -c 'write 0 20k' $OPTS",
    ),
];

const SCRIPT: &str =
    "KEY=\"--object secret,id=key,data=$(printf %s \"$PASSWORD\" | base64),format=base64\"
OPTS=driver=qcow2,file.filename=i,encrypt.key-secret=key
KEYED=\"$IO $KEY --image-opts\"
";

/// Images of the installed QEMU tools, made in `dir`. Recipes that a version doesn't know give no image.
pub fn of_qemu(tools: &Path, dir: &Path) -> Vec<Seed> {
    let mut out = Vec::new();
    for (number, (options, commands)) in OF_QEMU.iter().enumerate() {
        let dir = dir.join(format!("seed{number}"));
        let creation = options.replace("LUKS", LUKS);
        let script =
            format!("{SCRIPT}$IMG create -q $KEY -f qcow2 -o {creation} i 300k && {commands}");
        let made = std::fs::create_dir_all(&dir).and_then(|()| {
            let mut bash = Command::new("bash");
            bash.args(["-c", &script]).current_dir(&dir);
            bash.env("IO", tools.join("qemu-io"))
                .env("IMG", tools.join("qemu-img"))
                .env("PASSWORD", PASSWORD);
            bash.stdout(Stdio::null()).stderr(Stdio::null()).status()
        });
        if let (Ok(_), Ok(bytes)) = (made, std::fs::read(dir.join("i"))) {
            let data = std::fs::read(dir.join("d")).unwrap_or_default();
            let name = format!("qemu,{}", options.replace("LUKS", "luks"));
            out.push(Seed::new(name, bytes, data));
        }
    }
    out
}
