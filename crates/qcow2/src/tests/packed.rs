// SPDX-License-Identifier: MIT OR Apache-2.0
//! Compressed clusters that share a host cluster, and what becomes of that when it is freed.

use std::sync::Arc;

use blockcore::testing::CrashDriver;
use blockcore::testing::fault::{Event, Rule};
use blockcore::{Node, WriteFlags};

use super::{Shape, findings, fresh_image, open_on, open_with_faults, read_all};
use crate::image::{Image, Intent};

const CLUSTER: u64 = 4096;

/// Writes a guest cluster that holds `value` everywhere, compressed.
async fn pack(node: &Node, guest: u64, value: u8) {
    let data = vec![value; CLUSTER as usize].into();
    let written = node.pwritev(guest * CLUSTER, data, WriteFlags::COMPRESSED);
    written.await.unwrap();
}

/// Where the compressed bytes of a guest cluster lie.
async fn host_of(image: &Arc<Image>, guest: u64) -> u64 {
    let mapping = image.mapping(guest, Intent::Read).await.unwrap();
    mapping.referenced(CLUSTER).unwrap().0
}

// INV QCOW2-ORD-4: the cluster that is being packed loses its only reference. What is compressed afterwards goes elsewhere, whether the discard is in memory
// alone, is being made durable, or the host takes its time to punch the hole: that would swallow it.
#[tokio::test]
async fn a_cluster_that_was_freed_is_packed_no_further() {
    for yields in (0..200).step_by(5) {
        let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
        let (node, _image, faults) = open_with_faults(disk.clone()).await;
        pack(&node, 0, 7).await;
        node.flush().await.unwrap();
        node.pdiscard(0, CLUSTER).await.unwrap();
        faults.add(Rule::slow(Event::Discard, 100));
        let packing = async {
            for _ in 0..yields {
                tokio::task::yield_now().await;
            }
            pack(&node, 1, 8).await;
        };
        let (flushed, ()) = tokio::join!(node.flush(), packing);
        flushed.unwrap();
        node.driver().close().await.unwrap();
        assert_eq!(findings(disk.snapshot()).await, [""; 0], "yields {yields}");
        let (again, _image) = open_on(disk, None).await;
        let all = read_all(&again).await;
        let read = all[CLUSTER as usize..][..CLUSTER as usize].to_vec();
        assert!(read == [8; CLUSTER as usize], "yields {yields}");
    }
}

// INV QCOW2-ORD-4: what was inflated is known by its place, and that place is somebody else's now.
#[tokio::test]
async fn what_was_inflated_is_forgotten_when_its_place_is_packed_again() {
    let disk = CrashDriver::new(fresh_image(Shape::small(1 << 20)));
    let (node, image) = open_on(disk, None).await;
    pack(&node, 0, 7).await;
    assert_eq!(read_all(&node).await[0], 7);
    let old = host_of(&image, 0).await;
    node.pdiscard(0, CLUSTER).await.unwrap();
    node.flush().await.unwrap();
    pack(&node, 1, 8).await;
    assert_eq!(host_of(&image, 1).await, old, "the place is free again");
    assert_eq!(read_all(&node).await[CLUSTER as usize], 8);
}
