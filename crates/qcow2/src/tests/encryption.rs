// SPDX-License-Identifier: MIT OR Apache-2.0
//! Encrypted images, single rules (INV QCOW2-CRYPT-1): what goes to the file is what the cipher makes of it, by the number that the method wants; and a hole of the
//! host is noise to a reader, so nothing that has to read as zero, or that a power cut may bring back, is one.

use std::sync::Arc;

use blockcore::testing::{CrashDriver, Faults, Rng};
use blockcore::{Preallocation, Secret, StatusFlags, StatusMode, TruncateRequest, WriteFlags};
use luks::SectorCipher;

use super::{
    Backing, DataFileKind, Shape, findings, fresh_image, open_on, read_all, set_data_file, write,
};
use crate::crypto::CryptMethod;
use crate::image::{Image, Intent, Owner};

const CLUSTER: u64 = 4096;

/// The methods, the one that takes host offsets first.
const METHODS: [CryptMethod; 2] = [CryptMethod::Luks, CryptMethod::Aes];

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
    for method in METHODS {
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

/// Others have to find what they expect, so this is not asked of our own way back.
#[tokio::test]
async fn a_sector_is_numbered_by_its_host_offset_with_luks_and_by_its_guest_offset_with_aes() {
    let cipher = SectorCipher::legacy(&Secret::new("a password")).unwrap();
    for method in METHODS {
        let disk = encrypted(method);
        let (node, image) = open_on(disk.clone(), None).await;
        let guest = 17 * CLUSTER;
        write(&node, guest, CLUSTER as usize, 1).await.unwrap();
        let mapping = image.mapping(17, Intent::Read).await.unwrap();
        let (host, _) = mapping.referenced(CLUSTER).unwrap();
        assert_ne!(host, guest);
        let number = match method {
            CryptMethod::Luks => host / 512,
            _ => guest / 512,
        };
        let mut wanted = vec![1; CLUSTER as usize];
        cipher.encrypt(number, &mut wanted);
        let found = &disk.snapshot()[host as usize..][..CLUSTER as usize];
        assert!(found == wanted, "{method:?}");
        // All ways back.
        let mut now = vec![0; 512];
        assert!(node.read_nowait(guest + 512, &mut now));
        assert_eq!(now, [1; 512]);
        assert_eq!(read_all(&node).await[guest as usize..][..512], [1; 512]);
    }
}

#[tokio::test]
async fn what_a_write_leaves_of_a_cluster_or_a_subcluster_reads_as_zero() {
    for shape in [
        Shape::small(64 * CLUSTER),
        Shape {
            // Subclusters of 8 KiB: what is left of one is so much that the host could be asked to make zeroes of it.
            cluster_bits: 18,
            ..Shape::extended(4 << 18)
        },
    ] {
        let encryption = CryptMethod::Luks;
        let disk = CrashDriver::new(fresh_image(Shape {
            encryption,
            ..shape
        }));
        let (node, _image) = open_on(disk, None).await;
        // Not even whole sectors; the second where the first has left its cluster.
        write(&node, 1000, 300, 1).await.unwrap();
        write(&node, 2000, 10, 1).await.unwrap();
        let all = read_all(&node).await;
        let wanted = |at: usize| u8::from((1000..1300).contains(&at) || at / 10 == 200);
        let wrong = all.iter().enumerate().position(|(i, b)| *b != wanted(i));
        assert_eq!(wrong, None, "{shape:?}");
    }
}

#[tokio::test]
async fn preallocated_clusters_read_as_zero() {
    for method in METHODS {
        for mode in [
            Preallocation::Metadata,
            Preallocation::Falloc,
            Preallocation::Full,
        ] {
            let disk = encrypted(method);
            let (node, image) = open_on(disk.clone(), None).await;
            let request = TruncateRequest {
                preallocation: mode,
                ..TruncateRequest::to(80 * CLUSTER)
            };
            node.truncate(request).await.unwrap();
            let mapping = image.mapping(70, Intent::Read).await.unwrap();
            assert!(mapping.referenced(CLUSTER).is_some());
            assert!(read_all(&node).await.iter().all(|b| *b == 0), "{mode:?}");
            write(&node, 70 * CLUSTER, 512, 1).await.unwrap();
            assert_eq!(read_all(&node).await[70 * 4096 + 512..71 * 4096], [0; 3584]);
        }
        // Version 2 has no zero clusters.
        let disk = CrashDriver::new(fresh_image(Shape {
            version: 2,
            encryption: method,
            ..Shape::small(64 * CLUSTER)
        }));
        let (node, _image) = open_on(disk, None).await;
        let request = TruncateRequest {
            preallocation: Preallocation::Metadata,
            ..TruncateRequest::to(80 * CLUSTER)
        };
        assert_eq!(
            node.truncate(request).await.unwrap_err().text(),
            "Preallocation of encrypted images needs compatibility level 1.1 and above"
        );
    }
}

// INV QCOW2-CRYPT-1: the mapping alone says that something is zero.
#[tokio::test]
async fn no_byte_of_an_encrypted_data_file_changes_but_by_writes() {
    for kind in [DataFileKind::Outside, DataFileKind::Raw] {
        let mut bytes = encrypted(CryptMethod::Luks).snapshot();
        set_data_file(&mut bytes, kind);
        let disk = CrashDriver::new(bytes);
        let data = disk.beside(vec![0; 64 * CLUSTER as usize], 1);
        let backing = Backing {
            data: Some((data.clone(), Faults::default())),
            ..Backing::default()
        };
        let (node, _image) = open_on(disk, &backing).await;
        write(&node, 0, 8 * CLUSTER as usize, 1).await.unwrap();
        node.flush().await.unwrap();
        let before = data.snapshot();
        let none = WriteFlags::empty();
        node.pwrite_zeroes(0, CLUSTER, none).await.unwrap();
        node.pwrite_zeroes(CLUSTER, 2 * CLUSTER, WriteFlags::MAY_UNMAP)
            .await
            .unwrap();
        node.pdiscard(4 * CLUSTER, CLUSTER).await.unwrap();
        node.flush().await.unwrap();
        assert!(data.snapshot() == before, "{kind:?}");
        let all = read_all(&node).await;
        for (cluster, wanted) in [0, 0, 0, 1, 0, 1].into_iter().enumerate() {
            let found = &all[cluster * CLUSTER as usize..][..CLUSTER as usize];
            assert!(found.iter().all(|b| *b == wanted), "{kind:?} {cluster}");
        }
    }
}

#[tokio::test]
async fn nobody_is_sent_to_the_file_for_what_only_the_image_can_read() {
    let disk = encrypted(CryptMethod::Luks);
    let (node, image) = open_on(disk.clone(), None).await;
    write(&node, 0, CLUSTER as usize, 1).await.unwrap();
    let status = node.block_status(0, CLUSTER, StatusMode::Precise);
    let flags = status.await.unwrap().flags;
    assert!(flags.contains(StatusFlags::DATA));
    assert!(!flags.intersects(StatusFlags::OFFSET_VALID | StatusFlags::RECURSE));
    // Nor is anything put there that nobody would decrypt.
    let packed = vec![0x77; CLUSTER as usize].into();
    let packed = node.pwritev_compressed(CLUSTER, packed).await;
    assert_eq!(packed.unwrap_err().errno(), libc::ENOTSUP);
    assert_eq!(findings(disk.snapshot()).await, Vec::<String>::new());
    // Nor over the keys.
    let owner = (0..disk.snapshot().len() as u64 / CLUSTER)
        .find(|c| image.owner_in(c * CLUSTER, 1) == Some(Owner::EncryptionHeader));
    let keys = owner.expect("the keys lie somewhere") * CLUSTER;
    assert!(image.check_data_write(keys, 512).is_err());
}
