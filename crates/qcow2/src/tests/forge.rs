// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images with what this writer doesn't make yet: snapshots and compressed clusters. Made by hand out of open images.

use std::io::Write;

use blockcore::testing::CrashDriver;
use blockcore::{IoBuf, WriteFlags};

use super::{Backing, open_image_read_only, open_on, read_all};
use crate::format::{L1E_OFFSET_MASK, OFLAG_COMPRESSED, OFLAG_COPIED};
use crate::image::Image;
use crate::l2_entry::L2Entry;
use crate::l2_table::Mapping;

fn word(image: &[u8], at: u64) -> u64 {
    let at = at as usize;
    u64::from_be_bytes(image[at..at + 8].try_into().unwrap())
}

fn put(image: &mut Vec<u8>, at: u64, bytes: &[u8]) {
    let (start, end) = (at as usize, at as usize + bytes.len());
    if image.len() < end {
        image.resize(end, 0);
    }
    image[start..end].copy_from_slice(bytes);
}

/// Makes a guest cluster that holds `value` everywhere a compressed one.
pub(crate) async fn compressed(bytes: Vec<u8>, guest_cluster: u64, value: u8) -> Vec<u8> {
    let disk = CrashDriver::new(bytes);
    let (node, image) = open_on(disk.clone(), &Backing::default()).await;
    let mut deflater = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    let cluster = vec![value; image.cluster_size() as usize];
    deflater.write_all(&cluster).unwrap();
    let deflated = deflater.finish().unwrap();
    assert!(deflated.len() <= 512);
    {
        let mut meta = image.meta.lock().await;
        let l1_index = image.l1_index(guest_cluster);
        image.ensure_l2_table(&mut meta, l1_index).await.unwrap();
        let run = image.alloc_run(&mut meta, 1).await.unwrap();
        let host = run.cluster << image.cluster_bits;
        let write = image
            .file
            .pwritev(host, IoBuf::from(deflated), WriteFlags::empty());
        write.await.unwrap();
        // One sector, so no further ones.
        let entry = L2Entry::one_word(host | OFLAG_COMPRESSED);
        let old = image
            .set_entry(&mut meta, guest_cluster, entry)
            .await
            .unwrap();
        assert_eq!(old, Mapping::Unallocated);
        meta.needs_file_to(run, image.cluster_bits);
    }
    node.driver().close().await.unwrap();
    disk.snapshot()
}

/// Takes an internal snapshot: every cluster that is in use is shared afterwards.
pub(crate) async fn snapshot(bytes: Vec<u8>) -> Vec<u8> {
    let disk = CrashDriver::new(bytes);
    let (node, image) = open_on(disk.clone(), &Backing::default()).await;
    let cluster = image.cluster_size();
    let l1: Vec<u64> = (0..image.l1.len()).map(|i| image.l1.get(i)).collect();
    let (l1_at, table_at) = {
        let mut meta = image.meta.lock().await;
        let clusters = (l1.len() as u64 * 8).div_ceil(cluster);
        let l1_copy = image.alloc_run(&mut meta, clusters).await.unwrap();
        let table = image.alloc_run(&mut meta, 1).await.unwrap();
        for host in shared_clusters(&image, &l1).await {
            let references = meta.refcounts.get(&image.file, host).await.unwrap();
            let more = meta.refcounts.set(&image.file, host, references + 1);
            more.await.unwrap();
        }
        (l1_copy.cluster * cluster, table.cluster * cluster)
    };
    node.driver().close().await.unwrap();
    let mut out = disk.snapshot();
    // No entry of the active tables is alone any more.
    let (l1_offset, size) = (word(&out, 40), word(&out, 24));
    for i in 0..l1.len() as u64 {
        let entry = word(&out, l1_offset + i * 8) & !OFLAG_COPIED;
        put(&mut out, l1_offset + i * 8, &entry.to_be_bytes());
        put(&mut out, l1_at + i * 8, &entry.to_be_bytes());
        let table = entry & L1E_OFFSET_MASK;
        let entry_bytes = image.entries().words() * 8;
        for at in (table..table + cluster)
            .step_by(entry_bytes)
            .filter(|_| table != 0)
        {
            let entry = word(&out, at) & !OFLAG_COPIED;
            put(&mut out, at, &entry.to_be_bytes());
        }
    }
    let mut entry = l1_at.to_be_bytes().to_vec();
    entry.extend((l1.len() as u32).to_be_bytes());
    entry.extend([0, 1, 0, 4]);
    for n in [0u32, 0, 0, 0, 0, 16] {
        entry.extend(n.to_be_bytes());
    }
    entry.extend([0u64, size].iter().flat_map(|w| w.to_be_bytes()));
    entry.extend(*b"1snap");
    put(&mut out, table_at, &entry);
    put(&mut out, 60, &1u32.to_be_bytes());
    put(&mut out, 64, &table_at.to_be_bytes());
    out.resize(out.len().next_multiple_of(cluster as usize), 0);
    out
}

/// The host clusters that the L2 tables and their entries refer to, once for each reference.
async fn shared_clusters(image: &std::sync::Arc<Image>, l1: &[u64]) -> Vec<u64> {
    let mut clusters = Vec::new();
    for (i, entry) in l1.iter().enumerate() {
        let table = entry & L1E_OFFSET_MASK;
        if table == 0 {
            continue;
        }
        clusters.push(table >> image.cluster_bits);
        let per_table = 1 << image.l2_bits();
        for guest in i as u64 * per_table..(i as u64 + 1) * per_table {
            let mapping = image.mapping(guest, crate::image::Intent::Read);
            let Some((host, bytes)) = mapping.await.unwrap().referenced(image.cluster_size())
            else {
                continue;
            };
            let end = (host + bytes).div_ceil(image.cluster_size());
            clusters.extend(host >> image.cluster_bits..end);
        }
    }
    clusters
}

/// What the (one) snapshot of an image holds.
pub(crate) async fn snapshot_contents(mut bytes: Vec<u8>, backing: &Backing) -> Vec<u8> {
    let table = word(&bytes, 64);
    let (l1_offset, l1_size) = (word(&bytes, table), word(&bytes, table + 8) >> 32);
    let size = word(&bytes, table + 48);
    put(&mut bytes, 24, &size.to_be_bytes());
    put(&mut bytes, 36, &(l1_size as u32).to_be_bytes());
    put(&mut bytes, 40, &l1_offset.to_be_bytes());
    let node = open_image_read_only(bytes, backing).await;
    read_all(&node).await
}
