// SPDX-License-Identifier: MIT OR Apache-2.0
//! The snapshots of a disk under test: what each holds, its VM state included, and when it has to be there. Used by `torture`.

use std::sync::{Mutex, MutexGuard};

use blockcore::testing::CrashDriver;
use blockcore::{IoBufMut, SnapshotSelector};

use super::{Backing, open_on, read_all};

/// How much of the VM state area is looked at, in bytes.
pub(crate) const STATE_BYTES: usize = 24 << 9;

/// What a snapshot, or a disk, holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Contents {
    pub disk: Vec<u8>,
    /// The beginning of its VM state.
    pub state: Vec<u8>,
}

/// A snapshot that was taken.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    pub name: String,
    /// What it holds; a snapshot never changes.
    pub contents: Contents,
    /// The place in the disk's log from which on it has to be there.
    taken: usize,
    /// The place from which on it may be gone, and that from which on it has to be.
    deleting: usize,
    deleted: usize,
}

/// All snapshots that a plan has taken.
#[derive(Debug, Default)]
pub(crate) struct Snapshots(Mutex<Vec<Kept>>);

/// What a snapshot holds, and what else is in the image; `None`: there is no such snapshot.
pub(crate) async fn contents(image: &[u8], backing: &Backing, name: &str) -> Option<Contents> {
    let (node, image) = open_on(CrashDriver::new(image.to_vec()), backing).await;
    let which = SnapshotSelector::name(name);
    image.snapshot_load(&which).await.ok()?;
    node.refresh_length().await.unwrap();
    let state = IoBufMut::zeroed(STATE_BYTES);
    Some(Contents {
        disk: read_all(&node).await,
        state: node.load_vmstate(0, state).await.unwrap().to_vec(),
    })
}

impl Snapshots {
    fn lock(&self) -> MutexGuard<'_, Vec<Kept>> {
        self.0.lock().unwrap()
    }

    /// One was taken, and is durable.
    pub fn taken(&self, name: &str, contents: Contents, log_len: usize) {
        self.lock().push(Kept {
            name: name.to_owned(),
            contents,
            taken: log_len,
            deleting: usize::MAX,
            deleted: usize::MAX,
        });
    }

    /// One by this name.
    pub fn find(&self, name: &str) -> Option<Kept> {
        let all = self.lock();
        all.iter().find(|k| k.name == name).cloned()
    }

    /// One is about to be deleted.
    pub fn deleting(&self, name: &str, log_len: usize) {
        for kept in self.lock().iter_mut().filter(|k| k.name == name) {
            kept.deleting = kept.deleting.min(log_len);
        }
    }

    /// One has been deleted, and that is durable.
    pub fn deleted(&self, name: &str, log_len: usize) {
        for kept in self.lock().iter_mut().filter(|k| k.name == name) {
            kept.deleted = kept.deleted.min(log_len);
        }
    }

    /// Looks at every snapshot of an image as a power cut at `cut` has left it.
    pub async fn check(&self, image: &[u8], backing: &Backing, cut: usize) -> Result<(), String> {
        let all = self.lock().clone();
        for kept in all {
            let now = contents(image, backing, &kept.name).await;
            let name = &kept.name;
            match now {
                None if kept.taken <= cut && cut < kept.deleting => {
                    return Err(format!("snapshot {name} is gone"));
                }
                Some(_) if kept.deleted <= cut => {
                    return Err(format!("snapshot {name} is still there"));
                }
                Some(now) if now != kept.contents => {
                    let before = &kept.contents;
                    let differ = |a: &[u8], b: &[u8]| a.iter().zip(b).position(|(a, b)| a != b);
                    let at = differ(&now.disk, &before.disk);
                    let state_at = differ(&now.state, &before.state);
                    return Err(format!(
                        "snapshot {name} has changed at {at:?}, and its state at {state_at:?}; {} bytes, had {}",
                        now.disk.len(),
                        before.disk.len()
                    ));
                }
                _ => {}
            }
        }
        Ok(())
    }
}
