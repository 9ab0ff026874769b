// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images from strangers on real files: what they cost, and what they leave behind. `disasters.rs` has those that reach for the host.

use std::path::Path;

use blocklayer::{Backend, OpenOptions, OpenPolicy, Options, StatusMode, WriteFlags, registry};

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

async fn create(path: &Path, options: Options) {
    registry()
        .create("qcow2", &text(path), options, Default::default())
        .await
        .unwrap();
}

/// An image whose header names a backing file, with these words and nothing checked.
async fn naming(path: &Path, backing: &str, format: &str) {
    create(path, Options::new().with("size", "64k")).await;
    let mut bytes = std::fs::read(path).unwrap();
    // Behind the header's 112 bytes: one extension, the end of the extensions, the name.
    let mut at = 112;
    let mut put = |words: &[u8]| {
        bytes[at..at + words.len()].copy_from_slice(words);
        at += words.len();
        at - words.len()
    };
    put(&0xe279_2acau32.to_be_bytes());
    put(&(format.len() as u32).to_be_bytes());
    let padded = format.len().next_multiple_of(8);
    let mut word = format.as_bytes().to_vec();
    word.resize(padded, 0);
    put(&word);
    put(&[0; 8]);
    let name_at = put(backing.as_bytes()) as u64;
    bytes[8..16].copy_from_slice(&name_at.to_be_bytes());
    bytes[16..20].copy_from_slice(&(backing.len() as u32).to_be_bytes());
    std::fs::write(path, bytes).unwrap();
}

async fn open(path: &Path, policy: OpenPolicy) -> blocklayer::Result<Backend> {
    OpenOptions::new()
        .format("qcow2")
        .policy(policy)
        .read_only(true)
        .open(&registry(), &text(path))
        .await
}

#[tokio::test]
async fn the_format_of_a_backing_file_is_not_guessed() {
    let dir = tempfile::tempdir().unwrap();
    // A guest has written a header into what its host knows as a raw disk.
    let (raw, image) = (dir.path().join("raw"), dir.path().join("image"));
    naming(&raw, "/etc/passwd", "raw").await;
    naming(&image, &text(&raw), "").await;
    let mut bytes = std::fs::read(&image).unwrap();
    // No extension says the format.
    bytes[112..120].fill(0);
    std::fs::write(&image, bytes).unwrap();
    let err = open(&image, OpenPolicy::Everything).await.err().unwrap();
    assert!(err.to_string().contains("guessing is not allowed"), "{err}");
}

#[tokio::test]
async fn a_disk_of_exbibytes_costs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let options = Options::new()
        .with("size", "1024P")
        .with("cluster_size", "2M");
    create(&image, options).await;
    let disk = open(&image, OpenPolicy::default()).await.unwrap();
    assert_eq!(disk.length(), 1 << 60);
    let last = disk.read((1 << 60) - 4096, 4096).await.unwrap();
    assert!(last.is_zero());
    let status = disk.chain_status(0, 1 << 60, StatusMode::Precise);
    assert_eq!(status.await.unwrap().status.bytes, 1 << 60);
    disk.close().await.unwrap();
}

/// A backing disk of one value, shorter than the overlay by more than a cluster and no multiple of one.
async fn over_backing(dir: &Path, compat: &str) -> Backend {
    let base = dir.join("base");
    std::fs::write(&base, vec![0x11; 200 * 1024 + 512]).unwrap();
    let image = dir.join(format!("image{compat}"));
    let options = Options::new()
        .with("size", "400k")
        .with("compat", compat)
        .with("cluster_size", "64k")
        .with("backing_file", text(&base))
        .with("backing_fmt", "raw");
    create(&image, options).await;
    OpenOptions::new()
        .format("qcow2")
        .policy(OpenPolicy::Everything)
        .open(&registry(), &text(&image))
        .await
        .unwrap()
}

#[tokio::test]
async fn a_discard_brings_no_backing_data_to_light() {
    let dir = tempfile::tempdir().unwrap();
    for compat in ["0.10", "1.1"] {
        let disk = over_backing(dir.path(), compat).await;
        let none = WriteFlags::empty();
        disk.pwritev(0, vec![0x22; 192 * 1024].into(), none)
            .await
            .unwrap();
        disk.flush().await.unwrap();
        disk.pdiscard(0, 128 * 1024).await.unwrap();
        disk.pdiscard(130 * 1024, 1024).await.unwrap();
        disk.flush().await.unwrap();
        let now = disk.read(0, 192 * 1024).await.unwrap().to_vec();
        assert!(
            now.iter().all(|&b| b != 0x11),
            "compat {compat}: backing data"
        );
        assert!(now[128 * 1024..].iter().all(|&b| b == 0x22));
        disk.close().await.unwrap();
    }
}

// The host may hold on to a file for a moment after its last close; that was seen now and then on a busy machine, and not every time that this test runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_open_that_fails_lets_go_of_its_locks_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let again_and_again = |number: u32| {
        let image = dir.path().join(format!("image{number}"));
        async move {
            for _ in 0..100 {
                // Fails if it is still locked.
                naming(&image, "/nowhere", "raw").await;
                assert!(open(&image, OpenPolicy::default()).await.is_err());
            }
        }
    };
    let tasks: Vec<_> = (0..8).map(|n| tokio::spawn(again_and_again(n))).collect();
    for task in tasks {
        task.await.unwrap();
    }
}
