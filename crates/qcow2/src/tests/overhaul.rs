// SPDX-License-Identifier: MIT OR Apache-2.0
//! Power cuts in changes of a whole image: INV QCOW2-ORD-6. The method: one change of each kind, cut at every place of the log, with nothing, everything and
//! any part of what was not flushed. What is left is the image before or the image after, whole.

use std::sync::Arc;

use blockcore::testing::{CrashDriver, Rng};
use blockcore::{Node, Options, SnapshotRequest, SnapshotSelector, TruncateRequest};

use super::{Shape, corruptions, fresh_image, open_on, read_all, write};

const CLUSTER: usize = 4096;

/// A change of the whole image.
#[derive(Clone, Copy, Debug)]
enum Change {
    Create,
    Goto,
    Delete,
    Widen,
    Downgrade,
}

impl Change {
    async fn make(self, node: &Arc<Node>) {
        let a = SnapshotSelector::name("a");
        let amend = |name, value| node.amend(Options::new().with(name, value));
        let changed = match self {
            Change::Create => node.snapshot_create(SnapshotRequest::now("b")).await,
            Change::Goto => node.snapshot_goto(a).await,
            Change::Delete => node.snapshot_delete(a).await,
            Change::Widen => amend("refcount_bits", "32").await,
            Change::Downgrade => amend("compat", "0.10").await,
        };
        changed.unwrap();
    }
}

/// An image with a snapshot "a" in which the first two clusters are 1; now the first is 2 and the third zero.
async fn with_snapshot() -> Vec<u8> {
    let disk = CrashDriver::new(fresh_image(Shape::small(16 * CLUSTER as u64)));
    let (node, _image) = open_on(disk.clone(), None).await;
    write(&node, 0, 2 * CLUSTER, 1).await.unwrap();
    node.snapshot_create(SnapshotRequest::now("a"))
        .await
        .unwrap();
    write(&node, 0, CLUSTER, 2).await.unwrap();
    let zero = node.pwrite_zeroes(2 * CLUSTER as u64, CLUSTER as u64, Default::default());
    zero.await.unwrap();
    node.driver().close().await.unwrap();
    disk.snapshot()
}

/// Version and refcount width, then what the disk holds and what each snapshot does: the first byte of each cluster.
type State = (u32, u32, Vec<u8>, Vec<(String, Vec<u8>)>);

async fn state(image: Vec<u8>) -> State {
    let firsts = |all: Vec<u8>| all.chunks(CLUSTER).map(|c| c[0]).collect::<Vec<u8>>();
    let (node, opened) = open_on(CrashDriver::new(image.clone()), None).await;
    let (version, order) = {
        let header = opened.header();
        (header.version, header.refcount_order)
    };
    let active = firsts(read_all(&node).await);
    let mut snapshots = Vec::new();
    for snapshot in node.snapshots().await.unwrap() {
        let (node, opened) = open_on(CrashDriver::new(image.clone()), None).await;
        let name = SnapshotSelector::name(&snapshot.name);
        opened.snapshot_load(&name).await.unwrap();
        snapshots.push((snapshot.name, firsts(read_all(&node).await)));
    }
    (version, order, active, snapshots)
}

// INV QCOW2-ORD-6: what the header names is durable before it names it; it names all of it at once; and that is durable when the change is said to be done.
#[tokio::test]
async fn a_power_cut_leaves_the_image_before_a_change_or_the_one_after() {
    for change in [
        Change::Create,
        Change::Goto,
        Change::Delete,
        Change::Widen,
        Change::Downgrade,
    ] {
        let disk = CrashDriver::new(with_snapshot().await);
        let (node, _image) = open_on(disk.clone(), None).await;
        if matches!(change, Change::Goto) {
            // So that the length is another one, too.
            let longer = TruncateRequest::to(20 * CLUSTER as u64);
            node.truncate(longer).await.unwrap();
        }
        let before = state(disk.snapshot()).await;
        let begun = disk.log_len();
        change.make(&node).await;
        let after = state(disk.snapshot()).await;
        assert_ne!(before, after, "{change:?}");
        for cut in begun..=disk.log_len() {
            let parts = (0..12).map(|seed| (50, seed));
            for (keep, seed) in [(0, 0), (100, 0)].into_iter().chain(parts) {
                let left = disk.image_after(cut, keep, &mut Rng::new(seed));
                let story = format!("{change:?}, cut at {cut}, {keep}% kept, seed {seed}");
                assert_eq!(corruptions(left.clone()).await, [""; 0], "{story}");
                let state = state(left).await;
                assert!(state == before || state == after, "{story}: {state:?}");
                assert!(
                    state == after || cut < disk.log_len(),
                    "{story}: not durable"
                );
            }
        }
    }
}

// INV QCOW2-ORD-6: a cluster that a deleted snapshot shared is written in place. If the header that knows of that is not durable, the snapshot comes back with
// what was written.
#[tokio::test]
async fn what_a_deleted_snapshot_shared_is_written_when_it_is_durably_gone() {
    let disk = CrashDriver::new(with_snapshot().await);
    let (node, _image) = open_on(disk.clone(), None).await;
    let held = state(disk.snapshot()).await.3;
    let begun = disk.log_len();
    Change::Delete.make(&node).await;
    write(&node, CLUSTER as u64, CLUSTER, 9).await.unwrap();
    for cut in begun..=disk.log_len() {
        for seed in 0..12 {
            let left = disk.image_after(cut, 50, &mut Rng::new(seed));
            let snapshots = state(left).await.3;
            let is_well = snapshots.is_empty() || snapshots == held;
            assert!(is_well, "cut at {cut}, seed {seed}: {snapshots:?}");
        }
    }
}
