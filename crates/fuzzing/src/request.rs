// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is asked of an open image. Errors are as good as answers.

use blocklayer::{
    Backend, CheckFix, IoBuf, IoBufMut, NewBitmap, NodeFlags, Options, Preallocation,
    SnapshotRequest, SnapshotSelector, TruncateRequest, WriteFlags,
};

use crate::host::{ROOM_BYTES, SECRETS};
use crate::input::Input;
use crate::repair::repair_open;
use crate::run::{REQUEST_BYTES, look};

/// Names of snapshots and bitmaps: few, so that they meet again.
const NAMES: [&str; 4] = ["a", "b", "c", "name that is longer than others"];

fn name(input: &mut Input<'_>) -> &'static str {
    NAMES[input.byte() as usize % NAMES.len()]
}

/// A range of the disk, and data for it.
struct Place {
    offset: u64,
    bytes: u64,
    byte: u8,
}

impl Place {
    fn of(disk: &Backend, byte: u8, input: &mut Input<'_>) -> Place {
        let length = disk.length();
        let unit = 1u64 << (input.byte() % 17);
        let offset = (input.number(3) * unit).min(length);
        let bytes = (1 + input.number(2) * unit.min(512)).min(REQUEST_BYTES);
        Place {
            offset,
            bytes: bytes.min(length - offset),
            byte,
        }
    }

    fn data(&self) -> IoBuf {
        IoBuf::from(vec![self.byte | 1; self.bytes as usize])
    }
}

/// One request.
pub async fn request(disk: &Backend, input: &mut Input<'_>) {
    let kind = input.byte();
    let place = Place::of(disk, kind, input);
    let is_high = kind & 0x80 != 0;
    match kind & 0x1f {
        0..16 => guest(disk, kind, &place, input).await,
        16 | 17 => snapshot(disk, input).await,
        18 | 19 => bitmap(disk, is_high, input).await,
        20 => {
            let fix = [CheckFix::Leaks, CheckFix::All][usize::from(is_high)];
            repair_open(disk, fix).await;
        }
        21 => amend(disk, input).await,
        22..24 => compressed(disk, &place).await,
        24 => shrink(disk, &place).await,
        25 | 26 => vm_state(disk, &place, is_high).await,
        27 => {
            let options = reopen_options(input);
            let _any = disk.reopen(disk.root().flags(), false, options).await;
        }
        28 => beside(disk, &place, input).await,
        _ => {
            let flags = WriteFlags::FUA;
            let _any = disk.pwritev(place.offset, place.data(), flags).await;
        }
    }
}

/// What a guest asks for.
async fn guest(disk: &Backend, kind: u8, place: &Place, input: &mut Input<'_>) {
    let (offset, bytes, length) = (place.offset, place.bytes, disk.length());
    let none = WriteFlags::empty();
    let flags = match kind & 0x80 {
        0 => none,
        _ => WriteFlags::MAY_UNMAP,
    };
    match kind & 0xf {
        0..3 => {
            let _any = disk.pwritev(offset, place.data(), none).await;
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
            let write = disk.pwritev(offset, place.data(), none);
            let rounds = u32::from(input.byte() % 8);
            let _any = blocklayer::testing::given_up_after(rounds, write).await;
        }
        _ => {
            let zero = disk.pwrite_zeroes(offset, length - offset, flags);
            let write = disk.pwritev(offset, place.data(), none);
            let _any = futures::future::join(zero, write).await;
        }
    }
}

async fn snapshot(disk: &Backend, input: &mut Input<'_>) {
    let (kind, name) = (input.byte(), name(input));
    let which = || SnapshotSelector::IdOrName(name.to_owned());
    let root = disk.root();
    let _any = match kind % 5 {
        0 | 1 => {
            let request = SnapshotRequest {
                vm_state_size: u64::from(kind >> 4) << 9,
                ..SnapshotRequest::now(name)
            };
            root.snapshot_create(request).await
        }
        2 => root.snapshot_goto(which()).await,
        3 => root.snapshot_delete(which()).await,
        _ => root.snapshot_load(which()).await,
    };
}

async fn bitmap(disk: &Backend, persistent: bool, input: &mut Input<'_>) {
    let (kind, name, other) = (input.byte(), name(input), name(input));
    let root = disk.root();
    let _any = match kind % 8 {
        0 | 1 => {
            let new = NewBitmap {
                granularity: Some(512 << (kind >> 4)),
                persistent,
                enabled: kind & 8 == 0,
                ..NewBitmap::new(name)
            };
            root.add_dirty_bitmap(new).await.map(drop)
        }
        2 => root.remove_dirty_bitmap(name).await,
        3 => root.clear_dirty_bitmap(name).await,
        4 => root.enable_dirty_bitmap(name, kind & 8 == 0).await,
        5 | 6 => match root.dirty_bitmap(other) {
            Ok(from) => root.merge_dirty_bitmap(name, &from).await,
            Err(e) => Err(e),
        },
        _ => root.freeze_dirty_bitmap(name).await.map(|frozen| {
            assert!(frozen.ranges().all(|r| r.start < r.end));
            if kind & 8 == 0 {
                frozen.done();
            }
        }),
    };
}

async fn amend(disk: &Backend, input: &mut Input<'_>) {
    let kind = input.byte();
    let options = match kind % 8 {
        0 => Options::new().with("compat", "0.10"),
        1 => Options::new().with("compat", "1.1"),
        2 => {
            let bits = 1 << (kind >> 3 & 7);
            Options::new().with("refcount_bits", bits.to_string())
        }
        3 => Options::new().with("lazy_refcounts", ["off", "on"][usize::from(kind & 8 == 0)]),
        4 => Options::new().with("data_file_raw", "off"),
        // Ids are looked at, and slots changed, as far as the method has any. Measuring how long a round takes is what takes longest.
        5 => Options::new()
            .with("encrypt.state", "active")
            .with("encrypt.new-secret", SECRETS[usize::from(kind & 8 == 0)])
            .with("encrypt.iter-time", "1"),
        6 => Options::new()
            .with("encrypt.state", "inactive")
            .with("encrypt.keyslot", (kind >> 3 & 7).to_string()),
        _ => {
            let bytes = input.number(2) << 9;
            Options::new().with("size", bytes.to_string())
        }
    };
    let _any = disk.root().amend(options).await;
}

/// Compressed data takes whole clusters.
async fn compressed(disk: &Backend, place: &Place) {
    let info = disk.root().driver().info().await;
    let cluster = info.map_or(65536, |i| i.cluster_size).clamp(512, 2 << 20);
    let offset = place.offset / cluster * cluster;
    let bytes = cluster.min(disk.length() - offset);
    let mut data = vec![place.byte | 1; bytes as usize];
    for (i, byte) in data.iter_mut().enumerate().take(place.bytes as usize) {
        *byte = ((i * 31) >> 3) as u8;
    }
    let _any = disk.pwritev_compressed(offset, IoBuf::from(data)).await;
}

async fn shrink(disk: &Backend, place: &Place) {
    let _any = disk
        .truncate(TruncateRequest::to(place.offset / 512 * 512))
        .await;
}

/// The VM state lies behind the end of the disk, where no guest reads.
async fn vm_state(disk: &Backend, place: &Place, save: bool) {
    let driver = disk.root().driver();
    let offset = place.offset / 512 * 512;
    let bytes = place.bytes.next_multiple_of(512);
    if save {
        let data = IoBuf::from(vec![place.byte | 1; bytes as usize]);
        let _any = driver.save_vmstate(offset, data).await;
    } else {
        let buffer = IoBufMut::zeroed(bytes as usize);
        let _any = driver.load_vmstate(offset, buffer).await;
    }
}

fn reopen_options(input: &mut Input<'_>) -> Options {
    let kind = input.byte();
    let value = ["off", "on"][usize::from(kind & 8 == 0)];
    match kind % 6 {
        0 => Options::new().with("l2-cache-size", (u64::from(kind) << 9).to_string()),
        1 => Options::new().with("refcount-cache-size", (u64::from(kind) << 9).to_string()),
        2 => Options::new().with("lazy-refcounts", value),
        3 => Options::new().with("discard-no-unref", value),
        4 => Options::new().with(
            "overlap-check",
            ["none", "cached"][usize::from(kind & 8 == 0)],
        ),
        _ => Options::new().with("pass-discard-other", value),
    }
}

/// A write, and something that concerns all of the image, at the same time.
async fn beside(disk: &Backend, place: &Place, input: &mut Input<'_>) {
    let write = disk.pwritev(place.offset, place.data(), WriteFlags::empty());
    match input.byte() % 4 {
        0 => drop(futures::future::join(write, snapshot(disk, input)).await),
        1 => drop(futures::future::join(write, amend(disk, input)).await),
        2 => drop(futures::future::join(write, bitmap(disk, true, input)).await),
        _ => drop(futures::future::join(write, shrink(disk, place)).await),
    }
}
