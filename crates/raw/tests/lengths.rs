// SPDX-License-Identifier: MIT OR Apache-2.0
//! Creating, truncating, preallocation and copying: lengths, storage and the words for what can't be.

mod common;

use std::os::unix::fs::MetadataExt;

use blockcore::{IoBuf, OpenOptions, Options, Preallocation, TruncateRequest, WriteFlags};
use common::{Disk, registry};

fn storage(disk: &Disk) -> u64 {
    std::fs::metadata(&disk.path).unwrap().blocks() * 512
}

#[tokio::test]
async fn preallocation_takes_the_room_that_it_promises() {
    for (mode, at_least) in [("off", 0), ("falloc", 1 << 20), ("full", 1 << 20)] {
        let disk = Disk::create("0").await;
        let options = Options::new()
            .with("size", "1M")
            .with("preallocation", mode);
        registry()
            .create("raw", disk.name(), options, Default::default())
            .await
            .unwrap();
        let bytes = std::fs::read(&disk.path).unwrap();
        assert_eq!(bytes.len(), 1 << 20, "{mode}");
        assert!(bytes.iter().all(|b| *b == 0), "{mode}");
        assert!(storage(&disk) >= at_least, "{mode}: {}", storage(&disk));
        let backend = disk.open(OpenOptions::new()).await;
        let allocated = backend.root().driver().allocated_size().await.unwrap();
        assert_eq!(allocated, Some(storage(&disk)));
        backend.close().await.unwrap();
    }
}

#[tokio::test]
async fn truncating_gives_zeroes_and_says_what_it_cannot_do() {
    for direct in [false, true] {
        let disk = Disk::create("64k").await;
        let backend = disk.open(OpenOptions::new().direct(direct)).await;
        let truncate = |bytes, preallocation| {
            backend.truncate(TruncateRequest {
                bytes,
                exact: true,
                preallocation,
                zero_new_area: false,
            })
        };
        let data = IoBuf::from(vec![1; 65536]);
        backend.pwritev(0, data, WriteFlags::empty()).await.unwrap();
        truncate(1000, Preallocation::Off).await.unwrap();
        truncate(100_000, Preallocation::Full).await.unwrap();
        assert_eq!(std::fs::metadata(&disk.path).unwrap().len(), 100_000);
        let read = backend.read(0, 65536).await.unwrap().to_vec();
        assert!(read[..1000].iter().all(|b| *b == 1));
        assert!(read[1000..].iter().all(|b| *b == 0));
        truncate(1 << 20, Preallocation::Falloc).await.unwrap();
        assert!(storage(&disk) >= (1 << 20) - 100_000);
        for (bytes, mode, text) in [
            (
                4096,
                Preallocation::Full,
                "Cannot use preallocation for shrinking files",
            ),
            (
                2 << 20,
                Preallocation::Metadata,
                "Unsupported preallocation mode: metadata",
            ),
        ] {
            let err = truncate(bytes, mode).await.unwrap_err();
            assert_eq!(err.text(), text);
        }
        assert_eq!(backend.length(), 1 << 20);
        backend.close().await.unwrap();
    }
}

#[tokio::test]
async fn creating_names_what_is_wrong() {
    let disk = Disk::create("1M").await;
    let create = |name: String, key: &'static str, value: &'static str| async move {
        let options = Options::new().with("size", "1M").with(key, value);
        let registry = registry();
        let made = registry.create("raw", &name, options, Default::default());
        made.await.unwrap_err().text()
    };
    let name = disk.name().to_owned();
    let nowhere = format!("{}/no/such", disk.dir.path().display());
    let dir = disk.dir.path().to_str().unwrap().to_owned();
    for (name, key, value, text) in [
        (
            nowhere.clone(),
            "nocow",
            "off",
            format!("Could not create '{nowhere}': No such file or directory"),
        ),
        (
            dir.clone(),
            "nocow",
            "off",
            format!("Could not create '{dir}': Is a directory"),
        ),
        (
            name.clone(),
            "preallocation",
            "maybe",
            "invalid parameter value: maybe".to_owned(),
        ),
        (
            name.clone(),
            "preallocation",
            "metadata",
            "Unsupported preallocation mode: metadata".to_owned(),
        ),
        (
            name,
            "nocow",
            "maybe",
            "Parameter 'nocow' expects 'on' or 'off'".to_owned(),
        ),
    ] {
        assert_eq!(create(name, key, value).await, text);
    }
}

#[tokio::test]
async fn a_range_is_copied_between_raw_images_on_the_host() {
    let (from, to) = (Disk::create("1M").await, Disk::create("1M").await);
    let source = from.open(OpenOptions::new().option("offset", "4k")).await;
    let target = to.open(OpenOptions::new()).await;
    let data = IoBuf::from(vec![6; 65536]);
    source.pwritev(0, data, WriteFlags::empty()).await.unwrap();
    let copied = target
        .root()
        .driver()
        .copy_range_from(source.root(), 4096, 8192, 32768)
        .await;
    match copied {
        Ok(()) => {
            let read = target.read(8191, 32770).await.unwrap().to_vec();
            assert_eq!((read[0], read[32769]), (0, 0));
            assert!(read[1..32769].iter().all(|b| *b == 6));
        }
        Err(e) if e.errno() == libc::ENOTSUP => eprintln!("skipped: the host can't copy"),
        Err(e) => panic!("{e}"),
    }
    source.close().await.unwrap();
    target.close().await.unwrap();
}
