// SPDX-License-Identifier: MIT OR Apache-2.0
//! One case: an image, and what is done to it.

use std::time::Duration;

use blocklayer::testing::{MemoryDriver, MemoryFactory};
use blocklayer::{
    Backend, BlockError, CheckFix, Diagnostics, ErrorKind, IoBuf, NewBitmap, NodeFlags,
    OpenOptions, OpenPolicy, OptionValue, Options, Preallocation, Registry, Result, StatusMode,
    TruncateRequest, WriteFlags, qcow2::Qcow2Factory,
};

use crate::input::Input;
use crate::seeds;

/// The room on the disk under an image, in bytes: forged offsets beyond it meet with ENOSPC, as on a host that is full.
pub(crate) const ROOM_BYTES: u64 = 8 << 20;
/// The most bytes that one request moves.
const REQUEST_BYTES: u64 = 256 << 10;
/// The most status answers that are asked for.
const STATUS_STEPS: u32 = 200;

/// How long a key may be derived: a header may ask for four billion rounds, and who has waited long enough gives up.
const KEY_TIME: Duration = Duration::from_secs(2);

/// Byte offset of the encryption method in a header, in four bytes.
const CRYPT_METHOD: usize = 32;

/// Runs a future on this thread.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    runtime.expect("a runtime needs nothing").block_on(future)
}

struct Host {
    registry: Registry,
    disk: MemoryDriver,
    is_encrypted: bool,
}

impl Host {
    fn new(image: &[u8]) -> Host {
        let memory = std::sync::Arc::new(MemoryFactory::with_room(ROOM_BYTES));
        let disk = memory.disk("image");
        *disk.lock() = image.to_vec();
        let mut registry = Registry::new();
        registry.register_shared(memory);
        registry.register(blocklayer::raw::RawFactory);
        registry.register(Qcow2Factory);
        seeds::add_secret(&registry);
        let method = image.get(CRYPT_METHOD..CRYPT_METHOD + 4);
        Host {
            registry,
            disk,
            is_encrypted: method.is_some_and(|m| m != [0; 4]),
        }
    }

    async fn open(&self, read_only: bool) -> Result<Backend> {
        let mut open = OpenOptions::new()
            .format("qcow2")
            .read_only(read_only)
            .option("backing", OptionValue::Null)
            .policy(OpenPolicy::Deny)
            .diagnostics(Diagnostics::new(|_| {}));
        if self.is_encrypted {
            open = open.option("encrypt.key-secret", seeds::SECRET);
        }
        let opened = open.open(&self.registry, "memory:image");
        let in_time = tokio::time::timeout(KEY_TIME, opened).await;
        in_time.unwrap_or_else(|_| Err(BlockError::unsupported("The key takes too long")))
    }
}

/// Any bytes as an image: opened read-only and looked at. What is answered is nobody's business, but nothing may be changed.
pub fn open(image: &[u8]) {
    if image.len() as u64 > ROOM_BYTES {
        return;
    }
    block_on(async {
        let host = Host::new(image);
        if let Ok(disk) = host.open(true).await {
            look(&disk).await;
            let _any = disk.close().await;
        }
        assert!(
            *host.disk.lock() == image,
            "an image that is open read-only was changed"
        );
    });
}

/// Asks everything that can be asked without changing anything. Errors are as good as answers.
async fn look(disk: &Backend) {
    let driver = disk.root().driver();
    let _any = driver.info().await;
    let _any = driver.specific_info().await;
    let _any = driver.snapshots().await;
    let _any = driver.backing_name();
    let _any = driver.check(CheckFix::None).await;
    let length = disk.length();
    let mut at = 0;
    for _ in 0..STATUS_STEPS {
        if at >= length {
            break;
        }
        let step = disk
            .root()
            .driver()
            .block_status(at, length - at, StatusMode::Precise);
        match step.await {
            Ok(status) => {
                assert!(status.bytes > 0, "a status of no bytes at {at:#x}");
                let bytes = status.bytes.min(REQUEST_BYTES) as usize;
                let _any = disk.read(at, bytes).await;
                at += status.bytes;
            }
            Err(_) => at += 1 << 20,
        }
    }
}

/// A seed, changes of its metadata, and requests.
pub fn operations(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let seeds = seeds::all();
    let seed = &seeds[input.byte() as usize % seeds.len()];
    let mut image = seed.bytes.clone();
    let changes = input.byte() % 8;
    for _ in 0..changes {
        damage(&mut image, &seed.words, &mut input);
    }
    block_on(async {
        let host = Host::new(&image);
        let disk = match host.open(false).await {
            Ok(disk) => disk,
            Err(_) => match host.open(true).await {
                Ok(disk) => disk,
                Err(_) => return,
            },
        };
        while !input.is_empty() {
            request(&disk, &mut input).await;
        }
        let was_writable = !disk.root().is_read_only();
        let closed = disk.close().await;
        if changes == 0 && was_writable {
            let told = closed.map_err(|e| e.kind());
            assert!(
                matches!(told, Ok(()) | Err(ErrorKind::NoSpace)),
                "{}: {told:?}",
                seed.name
            );
            let disk = host.open(true).await.expect("it was open before");
            let found = disk.root().driver().check(CheckFix::None).await;
            let found = found.expect("the image is sound");
            assert_eq!(found.corruptions, 0, "{}: {:?}", seed.name, found.messages);
        }
    });
}

/// Changes one word of metadata.
fn damage(image: &mut [u8], words: &[usize], input: &mut Input<'_>) {
    let at = words[input.below(words.len())];
    let kind = input.byte();
    let bytes = if kind & 0x80 != 0 { 8 } else { 4 };
    let Some(place) = image.get_mut(at..at + bytes) else {
        return;
    };
    let old = place.iter().fold(0u64, |n, &b| n << 8 | u64::from(b));
    let cluster = 512u64 << (input.byte() % 13);
    let small = input.number(1);
    let new = match kind & 0xf {
        0 => 0,
        1 => u64::MAX,
        2 => small,
        3 => old ^ 1 << (small % 64),
        4 => old.wrapping_add(small),
        5 => old.wrapping_sub(small),
        6 => cluster * small,
        7 => (cluster * small) | (1 << 63),
        8 => (cluster * small) | 1,
        9 => 1 << (small % 64),
        10 => i64::MAX as u64 - small,
        11 => old | 1 << 62,
        12 => (cluster * small) | (1 << 62) | (small << 54),
        13 => u64::from(u32::MAX) - small,
        14 => old << (small % 64),
        _ => input.number(8),
    };
    place.copy_from_slice(&new.to_be_bytes()[8 - bytes..]);
}

/// One request. Errors are as good as answers.
async fn request(disk: &Backend, input: &mut Input<'_>) {
    let kind = input.byte();
    let length = disk.length();
    let unit = 1u64 << (input.byte() % 17);
    let offset = (input.number(3) * unit).min(length);
    let bytes = (1 + input.number(2) * unit.min(512)).min(REQUEST_BYTES);
    let bytes = bytes.min(length - offset);
    let flags = match kind & 0x80 {
        0 => WriteFlags::empty(),
        _ => WriteFlags::MAY_UNMAP,
    };
    match kind & 0xf {
        0..3 => {
            let data = IoBuf::from(vec![kind | 1; bytes as usize]);
            let _any = disk.pwritev(offset, data, WriteFlags::empty()).await;
        }
        3..5 => {
            let _any = disk.pwrite_zeroes(offset, bytes, flags).await;
        }
        5 => {
            let _any = disk.pdiscard(offset, bytes).await;
        }
        6..8 => {
            let _any = disk.read(offset, bytes as usize).await;
        }
        8 => {
            let _any = disk.flush().await;
        }
        9 => {
            // Preallocated storage is memory here.
            let bytes = (length + (input.number(2) << 9)).min(1 << 40);
            let preallocation = match kind & 0x80 {
                0x80 if bytes < ROOM_BYTES => Preallocation::Metadata,
                _ => Preallocation::Off,
            };
            let request = TruncateRequest {
                preallocation,
                ..TruncateRequest::to(bytes)
            };
            let _any = disk.truncate(request).await;
        }
        10 => look(disk).await,
        11 => {
            let flags = NodeFlags {
                read_only: kind & 0x80 != 0,
                ..NodeFlags::default()
            };
            let _any = disk.reopen(flags, false, Options::new()).await;
        }
        12 => {
            // A request that is dropped half way.
            let data = IoBuf::from(vec![kind | 1; bytes as usize]);
            let write = disk.pwritev(offset, data, WriteFlags::empty());
            let rounds = u32::from(input.byte() % 8);
            let _any = blocklayer::testing::given_up_after(rounds, write).await;
        }
        13 => {
            let _any = change_bitmap(disk, input).await;
        }
        _ => {
            let zero = disk.pwrite_zeroes(offset, length - offset, flags);
            let data = IoBuf::from(vec![kind | 1; bytes as usize]);
            let write = disk.pwritev(offset, data, WriteFlags::empty());
            let _any = futures::future::join(zero, write).await;
        }
    }
}

/// Changes one of three bitmaps. Errors are as good as answers.
async fn change_bitmap(disk: &Backend, input: &mut Input<'_>) -> Result<()> {
    let node = disk.root();
    let kind = input.byte();
    let name = ["b", "c", "d"][input.below(3)];
    match kind & 7 {
        0 | 1 => {
            let new = NewBitmap {
                granularity: Some(512 << (input.byte() % 24)),
                persistent: kind & 0x80 == 0,
                enabled: kind & 0x40 == 0,
                ..NewBitmap::new(name)
            };
            node.add_dirty_bitmap(new).await.map(drop)
        }
        2 => node.remove_dirty_bitmap(name).await,
        3 => node.clear_dirty_bitmap(name).await,
        4 => node.enable_dirty_bitmap(name, kind & 0x80 == 0).await,
        5 | 6 => {
            let source = node.dirty_bitmap(["b", "c", "d"][input.below(3)])?;
            node.merge_dirty_bitmap(name, &source).await
        }
        _ => {
            let taken = node.freeze_dirty_bitmap(name).await?;
            let data = IoBuf::from(vec![kind; 512]);
            let written = disk.pwritev(0, data, WriteFlags::empty()).await;
            for range in taken.ranges() {
                assert!(range.start < range.end);
            }
            if kind & 0x80 != 0 {
                taken.done();
            }
            written
        }
    }
}
