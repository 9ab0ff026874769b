// SPDX-License-Identifier: MIT OR Apache-2.0
//! What has to hold for a repair: if it says that all is well, that is so; and what could be read before, of the disk and its snapshots, reads the same.

use blocklayer::{Backend, CheckFix, CheckResult, SnapshotSelector};

use crate::host::{Host, How};

/// How much of a disk is compared, in bytes, and in which pieces.
const COMPARED_BYTES: u64 = 1 << 20;
const PIECE_BYTES: u64 = 4096;
/// The most snapshots that are compared.
const SNAPSHOTS: usize = 3;

/// The bits of the persistent bitmaps that can be used, by their names.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Bitmaps(Vec<(String, bool, Vec<[u64; 2]>)>);

impl Bitmaps {
    pub fn of(disk: &Backend) -> Bitmaps {
        let all = disk.root().dirty_bitmaps();
        let stored = all
            .iter()
            .filter(|b| b.is_persistent() && !b.is_inconsistent());
        let dirty = stored.map(|b| {
            let ranges = b.bits().ranges().map(|r| [r.start, r.end]).collect();
            (b.name().to_owned(), b.is_enabled(), ranges)
        });
        let mut dirty: Vec<_> = dirty.collect();
        dirty.sort();
        Bitmaps(dirty)
    }
}

/// What can be read of a disk, piece by piece.
type Layer = Vec<Option<Vec<u8>>>;

async fn layer(disk: &Backend) -> Layer {
    let length = disk.length().min(COMPARED_BYTES);
    let mut pieces = Vec::new();
    for at in (0..length).step_by(PIECE_BYTES as usize) {
        let bytes = PIECE_BYTES.min(length - at) as usize;
        pieces.push(disk.read(at, bytes).await.ok().map(|b| b.to_vec()));
    }
    pieces
}

/// Nothing that could be read reads another way.
fn assert_kept(before: &Layer, after: &Layer, what: &str) {
    for (i, piece) in before.iter().enumerate() {
        let Some(piece) = piece else { continue };
        let now = after.get(i).and_then(Option::as_ref);
        assert!(
            now == Some(piece),
            "{what}: piece {i} was {:?}, is {:?}",
            &piece[..16],
            now.map(|b| &b[..16])
        );
    }
}

fn is_clean(result: &CheckResult) -> bool {
    result.corruptions + result.check_errors == 0
}

/// Repairs an image that is open.
pub(crate) async fn repair_open(disk: &Backend, fix: CheckFix) {
    // What is written before, and by damaged refcounts goes where data is, is not the repair's doing.
    if disk.flush().await.is_err() {
        return;
    }
    let before = layer(disk).await;
    let Ok(repaired) = disk.root().check(fix).await else {
        return;
    };
    if fix == CheckFix::All && is_clean(&repaired) {
        let found = disk.root().check(CheckFix::None).await;
        let found = found.expect("it was repaired a moment ago");
        assert!(is_clean(&found), "told to be sound: {:?}", found.messages);
    }
    assert_kept(&before, &layer(disk).await, "after a repair");
}

/// What an image that is closed holds: the disk, and its snapshots.
async fn readable(host: &Host) -> Vec<(String, Layer)> {
    let mut all = Vec::new();
    let Ok(disk) = host.open(How::ReadOnly).await else {
        return all;
    };
    all.push((String::new(), layer(&disk).await));
    let snapshots = disk.root().snapshots().await.unwrap_or_default();
    for snapshot in snapshots.into_iter().take(SNAPSHOTS) {
        let which = SnapshotSelector::Fields {
            id: Some(snapshot.id.clone()),
            name: Some(snapshot.name.clone()),
        };
        if disk.root().snapshot_load(which).await.is_ok() {
            let name = format!("snapshot {} {}", snapshot.id, snapshot.name);
            all.push((name, layer(&disk).await));
        }
    }
    let _any = disk.close().await;
    all
}

/// Repairs an image that is closed, as a tool does, in both ways.
pub(crate) async fn repair_at_rest(image: Vec<u8>, data: Vec<u8>, name: &str) {
    let untouched = Host::new(image.clone(), data.clone());
    let before = readable(&untouched).await;
    assert!(
        untouched.snapshot() == (image.clone(), data.clone()),
        "{name}: reading has changed it"
    );
    for fix in [CheckFix::Leaks, CheckFix::All] {
        let host = Host::new(image.clone(), data.clone());
        let Ok(disk) = host.open(How::ForRepair).await else {
            continue;
        };
        let repaired = disk.root().check(fix).await;
        let closed = disk.close().await;
        let after = readable(&host).await;
        for (which, before) in &before {
            let after = after.iter().find(|(name, _)| name == which);
            let nothing = Layer::new();
            let after = after.map_or(&nothing, |(_, layer)| layer);
            assert_kept(before, after, &format!("{name}: {which} after {fix:?}"));
        }
        let Ok(repaired) = repaired else { continue };
        if fix == CheckFix::All && is_clean(&repaired) && closed.is_ok() {
            let disk = host.open(How::ForCheck).await;
            let disk = disk.expect("it was repaired a moment ago");
            let found = disk.root().check(CheckFix::None).await;
            let found = found.expect("it was repaired a moment ago");
            // Leaks may stay where something else may have meant them, which is told.
            assert!(
                is_clean(&found) && (found.leaks == 0 || repaired.leaks > 0),
                "{name}: told to be sound: {:?}",
                found.messages
            );
            let _any = disk.close().await;
        }
    }
}
