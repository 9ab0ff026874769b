// SPDX-License-Identifier: MIT OR Apache-2.0
//! The VM state area: it lies behind the disk, whose end may move, and belongs to snapshots.

use std::sync::Arc;

use blockcore::testing::CrashDriver;
use blockcore::testing::fault::{Event, Rule};
use blockcore::{
    IoBufMut, Node, Options, Preallocation, SnapshotRequest, SnapshotSelector, TruncateRequest,
};

use super::{Shape, findings, forge, fresh_image, open_on, open_with_faults, read_all, write};

const CLUSTER: usize = 4096;

async fn save(node: &Node, offset: usize, bytes: usize, value: u8) {
    let data = vec![value; bytes].into();
    node.save_vmstate(offset as u64, data).await.unwrap();
}

async fn load(node: &Node, bytes: usize) -> Vec<u8> {
    let mut buf = IoBufMut::zeroed(bytes);
    buf.fill(0xee);
    node.load_vmstate(0, buf).await.unwrap().to_vec()
}

// INV QCOW2-META-2: what a write leaves out of a cluster that a snapshot shares goes along, behind the end of the disk, too.
#[tokio::test]
async fn a_write_to_a_part_of_shared_state_keeps_the_rest() {
    for shape in [Shape::small(1 << 20), Shape::extended(1 << 20)] {
        // A longer backing disk is not what lies behind the end.
        for backing in [None, Some(vec![9; 64 << 20])] {
            let disk = CrashDriver::new(fresh_image(shape));
            let (node, _image) = open_on(disk.clone(), backing).await;
            save(&node, 0, 2 * CLUSTER, 1).await;
            node.snapshot_create(SnapshotRequest::now("a"))
                .await
                .unwrap();
            save(&node, 512, 512, 2).await;
            let mut expected = vec![1; 2 * CLUSTER];
            expected[512..1024].fill(2);
            assert!(load(&node, 2 * CLUSTER).await == expected);
            node.snapshot_goto(SnapshotSelector::name("a"))
                .await
                .unwrap();
            assert!(load(&node, 2 * CLUSTER).await == [1; 2 * CLUSTER]);
            save(&node, 3 * CLUSTER + 100, 100, 3).await;
            let all = load(&node, 4 * CLUSTER).await;
            assert!(all[2 * CLUSTER..3 * CLUSTER + 100] == [0; CLUSTER + 100]);
            assert!(all[3 * CLUSTER + 200..] == [0; CLUSTER - 200]);
            node.driver().close().await.unwrap();
            assert_eq!(findings(disk.snapshot()).await, [""; 0]);
        }
    }
}

// State that is saved while the disk grows lies behind the new end, or is forgotten, and never shows in the disk.
#[tokio::test]
async fn state_that_is_saved_while_the_disk_grows_is_not_seen_there() {
    let table = 512 * CLUSTER as u64;
    for yields in 0..60 {
        let disk = CrashDriver::new(fresh_image(Shape::small(table)));
        let (node, _image, faults) = open_with_faults(disk.clone()).await;
        faults.add(Rule::slow(Event::Flush, 30));
        let grow = TruncateRequest {
            preallocation: Preallocation::Metadata,
            ..TruncateRequest::to(table + 8 * CLUSTER as u64)
        };
        let growing = spawn(&node, |node| async move { node.truncate(grow).await });
        for _ in 0..yields {
            tokio::task::yield_now().await;
        }
        save(&node, 0, CLUSTER, 66).await;
        growing.await.unwrap().unwrap();
        let all = read_all(&node).await;
        assert!(all.iter().all(|b| *b == 0), "after {yields} turns");
        let state = load(&node, CLUSTER).await;
        assert!(
            state == [66; CLUSTER] || state == [0; CLUSTER],
            "after {yields} turns"
        );
        node.driver().close().await.unwrap();
        assert_eq!(findings(disk.snapshot()).await, [""; 0]);
    }
}

// State that a snapshot keeps is its own from then on, all of it.
#[tokio::test]
async fn a_snapshot_takes_the_state_along() {
    let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
    let (node, _image) = open_on(disk.clone(), None).await;
    write(&node, 0, CLUSTER, 9).await.unwrap();
    save(&node, 0, 3 * CLUSTER, 1).await;
    let request = SnapshotRequest {
        vm_state_size: 2 * CLUSTER as u64,
        ..SnapshotRequest::now("a")
    };
    node.snapshot_create(request).await.unwrap();
    assert!(load(&node, 3 * CLUSTER).await == [0; 3 * CLUSTER]);
    save(&node, CLUSTER, 100, 2).await;
    node.snapshot_goto(SnapshotSelector::name("a"))
        .await
        .unwrap();
    assert!(load(&node, 2 * CLUSTER).await == [1; 2 * CLUSTER]);
    node.snapshot_delete(SnapshotSelector::name("a"))
        .await
        .unwrap();
    assert!(load(&node, 2 * CLUSTER).await == [1; 2 * CLUSTER]);
    assert_eq!(read_all(&node).await[0], 9);
    node.driver().close().await.unwrap();
    assert_eq!(findings(disk.snapshot()).await, [""; 0]);
    let request = SnapshotRequest {
        vm_state_size: u64::MAX / 2,
        ..SnapshotRequest::now("b")
    };
    node.snapshot_create(request).await.unwrap_err();
    assert!(node.snapshots().await.unwrap().is_empty());
}

// INV QCOW2-ORD-6: an upgrade that completes the snapshot table names the L1 table as it is now, and not as it was before state was saved.
#[tokio::test]
async fn an_upgrade_keeps_the_tables_that_state_has_made_longer() {
    let shape = Shape {
        version: 2,
        ..Shape::small(1 << 20)
    };
    let disk = CrashDriver::new(fresh_image(shape));
    let (node, _image) = open_on(disk.clone(), None).await;
    write(&node, 0, CLUSTER, 1).await.unwrap();
    node.driver().close().await.unwrap();
    // A snapshot as early programs made it: without the length of the disk.
    let mut bytes = forge::snapshot(disk.snapshot()).await;
    let table = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
    bytes[table + 36..table + 40].fill(0);
    bytes[table + 40..table + 45].copy_from_slice(b"1snap");
    let disk = CrashDriver::new(bytes);
    let (node, _image) = open_on(disk.clone(), None).await;
    save(&node, 0, CLUSTER, 5).await;
    node.amend(Options::new().with("compat", "1.1"))
        .await
        .unwrap();
    assert!(load(&node, CLUSTER).await == [5; CLUSTER]);
    // What is free by now is used again.
    write(&node, 8 * CLUSTER as u64, 64 * CLUSTER, 2)
        .await
        .unwrap();
    node.flush().await.unwrap();
    write(&node, 80 * CLUSTER as u64, 64 * CLUSTER, 2)
        .await
        .unwrap();
    node.driver().close().await.unwrap();
    assert_eq!(findings(disk.snapshot()).await, [""; 0]);
    let (again, _image) = open_on(disk, None).await;
    assert!(load(&again, CLUSTER).await == [5; CLUSTER]);
    assert_eq!(read_all(&again).await[..2], [1, 1]);
}

fn spawn<F>(
    node: &Arc<Node>,
    work: impl FnOnce(Arc<Node>) -> F,
) -> tokio::task::JoinHandle<F::Output>
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    tokio::spawn(work(node.clone()))
}
