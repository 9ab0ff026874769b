// SPDX-License-Identifier: MIT OR Apache-2.0
//! Encrypted images, single rules (INV QCOW2-CRYPT-1): a hole of the host is noise to a reader, so nothing that a power cut may bring back becomes one.

use std::sync::Arc;

use blockcore::WriteFlags;
use blockcore::testing::{CrashDriver, Rng};

use super::{Backing, Shape, fresh_image, open_on, read_all, write};
use crate::crypto::CryptMethod;
use crate::image::Image;

const CLUSTER: u64 = 4096;

fn encrypted(method: CryptMethod) -> CrashDriver {
    CrashDriver::new(fresh_image(Shape {
        encryption: method,
        ..Shape::small(64 * CLUSTER)
    }))
}

/// Clusters that become zero, or are discarded, keep their place.
pub(crate) fn keep_places(image: &Arc<Image>) {
    let mut runtime = image.runtime().clone();
    runtime.discard_no_unref = true;
    image.set_runtime(runtime);
}

// INV QCOW2-CRYPT-1: with `discard-no-unref`, a cluster that the disk may still be shown is no hole.
#[tokio::test]
async fn a_cluster_that_keeps_its_place_is_no_hole_before_its_entry_is_durable() {
    let seed = Rng::seed_from_env();
    for method in [CryptMethod::Luks, CryptMethod::Aes] {
        let disk = encrypted(method);
        let (node, image) = open_on(disk.clone(), None).await;
        keep_places(&image);
        write(&node, 0, 2 * CLUSTER as usize, 1).await.unwrap();
        node.flush().await.unwrap();
        node.pwrite_zeroes(0, CLUSTER, WriteFlags::MAY_UNMAP)
            .await
            .unwrap();
        node.pdiscard(CLUSTER, CLUSTER).await.unwrap();
        let before = disk.log_len();
        node.flush().await.unwrap();
        for cut in [before, disk.log_len()] {
            for keep in [0, 50, 100] {
                let mut rng = Rng::new(seed.wrapping_add(keep));
                let left = CrashDriver::new(disk.image_after(cut, keep, &mut rng));
                let (node, _image) = open_on(left, &Backing::default()).await;
                for (i, sector) in read_all(&node).await.chunks(512).take(16).enumerate() {
                    let is_old_or_zero = sector[0] < 2 && sector.iter().all(|b| *b == sector[0]);
                    assert!(is_old_or_zero, "{method:?}: sector {i} is noise");
                }
            }
        }
    }
}

/// A read that needs no wait may take microseconds, however many pieces it is made of.
#[tokio::test]
async fn a_long_read_is_not_decrypted_on_the_spot_piece_by_piece() {
    let disk = encrypted(CryptMethod::Luks);
    let (node, _image) = open_on(disk, None).await;
    // Backwards, so that no cluster lies behind its neighbour.
    for cluster in (0..16).rev() {
        write(&node, cluster * CLUSTER, CLUSTER as usize, 1)
            .await
            .unwrap();
    }
    let mut buf = vec![0; 16 * CLUSTER as usize];
    let at_once = |buf: &mut [u8]| node.read_nowait(0, buf);
    assert!(at_once(&mut buf[..luks::INLINE_BYTES_MAX]));
    assert!(buf[..luks::INLINE_BYTES_MAX].iter().all(|b| *b == 1));
    assert!(!at_once(&mut buf));
    assert!(read_all(&node).await[..buf.len()].iter().all(|b| *b == 1));
}
