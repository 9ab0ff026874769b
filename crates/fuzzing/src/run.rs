// SPDX-License-Identifier: MIT OR Apache-2.0
//! One case: an image, and what is done to it.

use blocklayer::{Backend, CheckFix, ErrorKind, SnapshotSelector, StatusMode};

use crate::host::{Host, How, ROOM_BYTES, block_on};
use crate::input::Input;
use crate::repair::{Bitmaps, repair_at_rest};
use crate::request::request;
use crate::seeds::{self, Seed};

/// The most bytes that one request moves.
pub(crate) const REQUEST_BYTES: u64 = 256 << 10;
/// The most status answers that are asked for.
const STATUS_STEPS: u32 = 200;
/// The most snapshots that are looked at.
const SNAPSHOTS: usize = 3;
/// The length of the data file beside any bytes that claim to have one, in bytes.
const DATA_BYTES: usize = 300 << 10;

/// Any bytes as an image: opened read-only and looked at. What is answered is nobody's business, but nothing may be changed.
pub fn open(image: &[u8]) {
    if image.len() as u64 > ROOM_BYTES {
        return;
    }
    block_on(async {
        let host = Host::new(image.to_vec(), vec![0xd; DATA_BYTES]);
        for how in [How::ReadOnly, How::ForCheck] {
            if let Ok(disk) = host.open(how).await {
                look(&disk).await;
                let all = disk.root().snapshots().await.unwrap_or_default();
                for snapshot in all.iter().take(SNAPSHOTS) {
                    let which = SnapshotSelector::IdOrName(snapshot.id.clone());
                    let _any = disk.root().snapshot_load(which).await;
                    look(&disk).await;
                }
                let _any = disk.close().await;
            }
        }
        assert!(
            *host.disk.lock() == image,
            "an image that is open read-only was changed"
        );
        assert!(
            host.data.lock().iter().all(|b| *b == 0xd),
            "its data file was changed"
        );
    });
}

/// Asks everything that can be asked without changing anything. Errors are as good as answers.
pub(crate) async fn look(disk: &Backend) {
    let driver = disk.root().driver();
    let _any = driver.info().await;
    let _any = driver.specific_info().await;
    let _any = driver.snapshots().await;
    let _any = driver.backing_name();
    let _any = disk.root().check(CheckFix::None).await;
    for bitmap in disk.root().dirty_bitmaps() {
        let most = bitmap.length().next_multiple_of(bitmap.granularity());
        assert!(bitmap.dirty_bytes() <= most, "{bitmap:?}");
    }
    let length = disk.length();
    let mut at = 0;
    for _ in 0..STATUS_STEPS {
        if at >= length {
            break;
        }
        let step = driver.block_status(at, length - at, StatusMode::Precise);
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

/// The image that [`operations`] begins with.
struct Start<'a> {
    seed: &'static Seed,
    image: Vec<u8>,
    /// How many words of it were changed.
    changes: u8,
    /// It is repaired first, and then again looked at as it was.
    is_repaired: bool,
    /// What is left for requests.
    input: Input<'a>,
}

impl Start<'_> {
    fn new(bytes: &[u8]) -> Start<'_> {
        let mut input = Input::new(bytes);
        let seeds = seeds::all();
        let seed = &seeds[input.byte() as usize % seeds.len()];
        let mut image = seed.bytes.clone();
        let plan = input.byte();
        for _ in 0..plan % 8 {
            damage(&mut image, &seed.words, &mut input);
        }
        Start {
            seed,
            image,
            changes: plan % 8,
            is_repaired: plan & 0x80 != 0,
            input,
        }
    }
}

/// What kind of image [`operations`] begins with, and the image, for whoever wants to look at one that fails.
pub fn damaged(bytes: &[u8]) -> (String, Vec<u8>) {
    let start = Start::new(bytes);
    (start.seed.name.clone(), start.image)
}

/// A seed, changes of its metadata, and requests.
pub fn operations(bytes: &[u8]) {
    let Start {
        seed,
        image,
        changes,
        is_repaired,
        mut input,
    } = Start::new(bytes);
    block_on(async {
        if is_repaired {
            repair_at_rest(image.clone(), seed.data.clone(), &seed.name).await;
        }
        let host = Host::new(image, seed.data.clone());
        let disk = match host.open(How::Writable).await {
            Ok(disk) => disk,
            Err(_) => match host.open(How::ReadOnly).await {
                Ok(disk) => disk,
                Err(_) => return,
            },
        };
        while !input.is_empty() {
            request(&disk, &mut input).await;
        }
        if changes == 0 && !disk.root().is_read_only() {
            close_sound(host, disk, &seed.name).await;
        } else {
            let _any = disk.close().await;
        }
    });
}

/// An image that was never damaged is sound when it is closed, and its bitmaps say what they said.
async fn close_sound(host: Host, disk: Backend, name: &str) {
    disk.drain().await;
    let bitmaps = Bitmaps::of(&disk);
    let told = disk.close().await.map_err(|e| e.kind());
    assert!(
        matches!(told, Ok(()) | Err(ErrorKind::NoSpace)),
        "{name}: {told:?}"
    );
    // The password may be another one by now.
    let again = match host.open(How::ForCheck).await {
        Ok(again) => again,
        Err(e) => {
            assert!(name.contains("luks"), "{name}: it was open before: {e}");
            return;
        }
    };
    if again.root().format_name() == "qcow2" {
        let found = again.root().check(CheckFix::None).await;
        let found = found.expect("the image is sound");
        assert_eq!(found.corruptions, 0, "{name}: {:?}", found.messages);
    }
    let _any = again.close().await;
    // Version 2 has no bitmaps: those of an image that becomes one are gone.
    let is_version_2 = host.disk.lock().get(7) == Some(&2);
    if told.is_ok()
        && !is_version_2
        && let Ok(again) = host.open(How::ReadOnly).await
    {
        let now = Bitmaps::of(&again);
        assert_eq!(now, bitmaps, "{name}: bitmaps after closing and opening");
        let _any = again.close().await;
    }
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
