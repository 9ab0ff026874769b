// SPDX-License-Identifier: MIT OR Apache-2.0
//! What runtime options do to an open image: its caches are cleaned, its slices get another size, it looks at more before it writes.

use std::sync::Arc;
use std::time::Duration;

use blockcore::testing::CrashDriver;
use blockcore::{Node, Options, ReopenRequest, SnapshotRequest, SnapshotSelector, WriteFlags};

use super::{Backing, Shape, corruptions, findings, fresh_image, open_on, read_all, write};
use crate::crypto::CryptMethod;
use crate::image::Image;

const CLUSTER: usize = 4096;

async fn reopen(node: &Node, options: &str) -> Result<(), String> {
    let mut request = ReopenRequest {
        read_only: false,
        direct: false,
        options: Options::from_dotted(options).unwrap(),
    };
    let prepared = node.driver().reopen_prepare(&mut request).await;
    let prepared = prepared.map_err(|e| e.text())?;
    assert!(request.options.is_empty(), "an option that nobody took");
    prepared.commit();
    Ok(())
}

fn some_slices(image: &Image) -> Vec<bool> {
    let first_entries = (0..4).map(|i| i * image.l2.slice_entries());
    first_entries
        .map(|cluster| image.l2.pinned_now(image.l2.locate(cluster).0).is_some())
        .collect()
}

/// A disk of four slices with data in each.
async fn with_data() -> (CrashDriver, Arc<Node>, Arc<Image>) {
    let disk = CrashDriver::new(fresh_image(Shape::small(8 << 20)));
    let (node, image) = open_on(disk.clone(), None).await;
    for i in 0..4 {
        let offset = i * 512 * CLUSTER as u64;
        write(&node, offset, CLUSTER, 1 + i as u8).await.unwrap();
    }
    node.flush().await.unwrap();
    (disk, node, image)
}

async fn check_data(node: &Node) {
    let all = read_all(node).await;
    for i in 0..4 {
        let at = i * 512 * CLUSTER;
        assert!(all[at..at + CLUSTER].iter().all(|&b| b == 1 + i as u8));
    }
}

#[tokio::test]
async fn tables_that_nobody_uses_leave_the_memory_and_come_back() {
    let (disk, node, image) = with_data().await;
    assert_eq!(some_slices(&image), [true; 4]);
    let mut runtime = image.runtime().clone();
    runtime.cache_clean_interval = Some(Duration::from_millis(20));
    image.set_runtime(runtime);
    let mut waited = 0;
    while image.l2.clean() > 0 || image.meta.lock().await.refcounts.cached() > 0 {
        assert!(waited < 500, "the caches are never empty");
        waited += 1;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    check_data(&node).await;
    write(&node, 9 * CLUSTER as u64, CLUSTER, 9).await.unwrap();
    node.flush().await.unwrap();
    assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
}

#[tokio::test]
async fn a_slice_with_changes_is_not_cleaned() {
    let (disk, node, image) = with_data().await;
    write(&node, 9 * CLUSTER as u64, CLUSTER, 9).await.unwrap();
    for _ in 0..3 {
        image.l2.clean();
        image.meta.lock().await.refcounts.clean();
    }
    assert_eq!(some_slices(&image), [true, false, false, false]);
    node.flush().await.unwrap();
    check_data(&node).await;
    assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
}

#[tokio::test]
async fn a_reopening_gives_slices_another_size() {
    for extended_l2 in [false, true] {
        let shape = match extended_l2 {
            false => Shape::small(8 << 20),
            true => Shape::extended(8 << 20),
        };
        let disk = CrashDriver::new(fresh_image(shape));
        let (node, image) = open_on(disk.clone(), None).await;
        let before = image.l2.slice_bytes();
        for (round, bytes) in [512u64, 2048, 4096, 1024].into_iter().enumerate() {
            // What was changed and not yet written must not be lost.
            let value = 1 + round as u8;
            write(&node, round as u64 * 1_000_448, 70_000, value)
                .await
                .unwrap();
            let option = format!("l2-cache-entry-size={bytes}");
            reopen(&node, &option).await.unwrap();
            assert_eq!(image.l2.slice_bytes(), bytes);
            let all = read_all(&node).await;
            for old in 0..=round {
                let at = old * 1_000_448;
                let part = &all[at..at + 70_000];
                assert!(part.iter().all(|&b| b == 1 + old as u8), "{round}: {old}");
            }
        }
        assert!(reopen(&node, "l2-cache-entry-size=3000").await.is_err());
        reopen(&node, "cache-size=1M").await.unwrap();
        assert_eq!(image.l2.slice_bytes(), 1024, "what isn't said stays");
        let error = reopen(&node, "cache-size=1M,l2-cache-size=2M").await;
        assert_eq!(
            error.unwrap_err(),
            "l2-cache-size may not exceed cache-size"
        );
        // What was said of the whole does not hold for a part of which something else is said now.
        reopen(&node, "l2-cache-size=2M").await.unwrap();
        assert_eq!(image.runtime().l2_cache_bytes, 2 << 20);
        reopen(&node, "overlap-check=none").await.unwrap();
        reopen(&node, "overlap-check.template=all").await.unwrap();
        assert_eq!(before, 4096);
        node.driver().close().await.unwrap();
        assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
    }
}

// INV QCOW2-META-1
#[tokio::test]
async fn all_overlap_checks_know_the_tables_of_snapshots_and_leave_them_usable() {
    let (disk, node, image) = with_data().await;
    let snapshot = |name: &str| SnapshotRequest::now(name);
    node.snapshot_create(snapshot("one")).await.unwrap();
    write(&node, 0, CLUSTER, 7).await.unwrap();
    node.snapshot_create(snapshot("two")).await.unwrap();
    write(&node, 0, CLUSTER, 8).await.unwrap();
    node.driver().close().await.unwrap();
    drop((node, image));
    let (node, image) = open_on(disk.clone(), None).await;
    let header = image.header().clone();
    let table = crate::snapshot::read_table(&header, &image.file)
        .await
        .unwrap();
    let l1 = image.snapshot_l1(&table.snapshots[0]).await.unwrap();
    let place = l1[0] & crate::format::L1E_OFFSET_MASK;
    assert!(image.check_data_write(place, 1).is_ok());
    reopen(&node, "overlap-check=all").await.unwrap();
    assert!(image.owner_in(place, 1).is_some());
    let which = |name: &str| SnapshotSelector::name(name);
    node.snapshot_goto(which("one")).await.unwrap();
    check_data(&node).await;
    node.snapshot_delete(which("one")).await.unwrap();
    node.snapshot_delete(which("two")).await.unwrap();
    check_data(&node).await;
    node.driver().close().await.unwrap();
    assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
}

// INV QCOW2-CRYPT-1: a hole is no zeroes where data is encrypted.
#[tokio::test]
async fn a_cluster_that_keeps_its_place_in_an_encrypted_image_gets_no_hole() {
    for encryption in [CryptMethod::None, CryptMethod::Luks, CryptMethod::Aes] {
        let shape = Shape {
            encryption,
            ..Shape::small(1 << 20)
        };
        let disk = CrashDriver::new(fresh_image(shape));
        let (node, image) = open_on(disk.clone(), None).await;
        write(&node, 0, CLUSTER, 5).await.unwrap();
        node.flush().await.unwrap();
        let option = "discard-no-unref=on";
        reopen(&node, option).await.unwrap();
        let flags = WriteFlags::MAY_UNMAP;
        node.pwrite_zeroes(0, CLUSTER as u64, flags).await.unwrap();
        assert!(image.runtime().discard_no_unref);
        // The power goes before the mapping is durable.
        let disk = CrashDriver::new(disk.snapshot());
        let (node, _image) = open_on(disk.clone(), Backing::default()).await;
        let first = read_all(&node).await[0];
        assert!(first == 0 || first == 5, "{encryption:?}: {first}");
        assert_eq!(corruptions(disk.snapshot()).await, Vec::<String>::new());
    }
}
