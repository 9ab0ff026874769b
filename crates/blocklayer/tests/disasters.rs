// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images that a stranger made on purpose. Each test plays one of the disasters of `docs/SECURITY.md`, through the interface that programs use and with
//! the standard drivers; a driver `spy` stands for all that the host has and the stranger wants: it notes whenever something is opened in it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use blocklayer::{
    Backend, BlockDriver, BlockError, DriverFactory, ErrorKind, IoBuf, IoBufMut, OpenContext,
    OpenOptions, OpenPolicy, Options, ReadFlags, Registry, Result, StatusMode, TruncateRequest,
    WriteFlags, registry,
};

/// A protocol and format that counts how often something is opened in it, and opens nothing.
#[derive(Clone, Default)]
struct Spy(Arc<AtomicUsize>);

#[async_trait]
impl DriverFactory for Spy {
    fn format_name(&self) -> &'static str {
        "spy"
    }

    fn protocol_name(&self) -> Option<&'static str> {
        Some("spy")
    }

    async fn open(
        &self,
        _ctx: &OpenContext<'_>,
        _options: &mut Options,
    ) -> Result<Box<dyn BlockDriver>> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Err(BlockError::unsupported("spy"))
    }
}

fn spied() -> (Registry, Spy) {
    let (mut registry, spy) = (registry(), Spy::default());
    registry.register(spy.clone());
    (registry, spy)
}

/// Makes an empty qcow2 image of `size`, with clusters of 64 KiB, and gives its bytes.
async fn fresh(dir: &Path, size: &str) -> Vec<u8> {
    let path = dir.join("fresh.qcow2");
    let options = Options::new().with("size", size);
    registry()
        .create("qcow2", path.to_str().unwrap(), options, Default::default())
        .await
        .unwrap();
    std::fs::read(path).unwrap()
}

/// Header extensions begin here in what `fresh` makes.
const EXTENSIONS: usize = 112;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const DATA_FILE: u32 = 0x4441_5441;

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Replaces the header extensions of an image.
fn put_extension(image: &mut [u8], kind: u32, data: &str) {
    put(image, EXTENSIONS, &[0; 1024]);
    put(image, EXTENSIONS, &kind.to_be_bytes());
    put(image, EXTENSIONS + 4, &(data.len() as u32).to_be_bytes());
    put(image, EXTENSIONS + 8, data.as_bytes());
}

/// Makes an image name a backing file.
fn put_backing(image: &mut [u8], name: &str, format: &str) {
    assert!(name.len() <= 1023);
    put_extension(image, BACKING_FORMAT, format);
    put(image, 8, &4096u64.to_be_bytes());
    put(image, 16, &(name.len() as u32).to_be_bytes());
    put(image, 4096, name.as_bytes());
}

fn write_image(dir: &Path, name: &str, bytes: &[u8]) -> String {
    let path = dir.join(name);
    std::fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

fn qcow2() -> OpenOptions {
    OpenOptions::new().format("qcow2").read_only(true)
}

fn drivers(names: &[&str]) -> OpenPolicy {
    OpenPolicy::Drivers(names.iter().map(|&n| n.to_owned()).collect())
}

#[tokio::test]
async fn a_backing_name_reaches_nothing_that_the_policy_does_not_allow() {
    let dir = tempfile::tempdir().unwrap();
    let secret = write_image(dir.path(), "secret", &[7; 65536]);
    let own = dir.path().join("own");
    std::fs::create_dir(&own).unwrap();
    std::os::unix::fs::symlink(&secret, own.join("link")).unwrap();
    let mut image = fresh(dir.path(), "64k").await;
    let strangers = [
        ("spy:anything".to_owned(), "spy"),
        (r#"json:{"driver":"spy"}"#.to_owned(), "spy"),
        (
            r#"json:{"driver":"raw","file":{"driver":"spy"}}"#.to_owned(),
            "raw",
        ),
        (
            r#"json:{"driver":"raw","file.driver":"raw","file.file.driver":"spy"}"#.to_owned(),
            "raw",
        ),
        (
            r#"json:{"driver":"qcow2","file":{"driver":"raw","file.driver":"spy"}}"#.to_owned(),
            "qcow2",
        ),
    ];
    let paths = [
        secret.clone(),
        format!("file:{secret}"),
        "../secret".to_owned(),
        "link".to_owned(),
        "./../own/../secret".to_owned(),
        format!(r#"json:{{"driver":"raw","file":{{"driver":"file","filename":"{secret}"}}}}"#),
    ];
    let no_files = [
        OpenPolicy::Deny,
        OpenPolicy::Beneath(own.clone()),
        drivers(&["raw", "qcow2"]),
    ];
    let no_spy = [
        OpenPolicy::Deny,
        OpenPolicy::Beneath(dir.path().to_path_buf()),
        drivers(&["raw", "qcow2", "file"]),
    ];
    let cases = (strangers.iter().map(|(n, f)| (n.as_str(), *f, &no_spy)))
        .chain(paths.iter().map(|p| (p.as_str(), "raw", &no_files)));
    for (name, format, policies) in cases {
        put_backing(&mut image, name, format);
        let top = write_image(&own, "top.qcow2", &image);
        let (registry, spy) = spied();
        for policy in policies {
            let opened = qcow2().policy(policy.clone()).open(&registry, &top).await;
            let err = opened.expect_err(name);
            assert_eq!(err.kind(), ErrorKind::PermissionDenied, "{name}: {err}");
            assert_eq!(spy.0.load(Ordering::Relaxed), 0, "{name} with {policy:?}");
        }
        // That the names are good ones, and the spy is where they lead.
        let opened = qcow2()
            .policy(OpenPolicy::Everything)
            .open(&registry, &top)
            .await;
        match opened {
            Ok(disk) => {
                assert_eq!(disk.read(0, 512).await.unwrap().to_vec(), [7; 512]);
                disk.close().await.unwrap();
            }
            Err(e) => assert!(spy.0.load(Ordering::Relaxed) > 0, "{name}: {e}"),
        }
    }
}

#[tokio::test]
async fn a_data_file_name_is_a_plain_file_and_followed_only_as_the_policy_allows() {
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join("own");
    std::fs::create_dir(&own).unwrap();
    let secret = write_image(dir.path(), "secret", &[7; 65536]);
    let fresh = fresh(dir.path(), "64k").await;
    let json = format!(r#"json:{{"driver":"file","filename":"{secret}"}}"#);
    let drivers =
        |names: &[&str]| OpenPolicy::Drivers(names.iter().map(|n| n.to_string()).collect());
    for (name, is_path) in [
        ("spy:anything", false),
        (r#"json:{"driver":"spy"}"#, false),
        (&json, false),
        ("../secret", true),
        (&secret, true),
    ] {
        for has_bit in [true, false] {
            let mut image = fresh.clone();
            put_extension(&mut image, DATA_FILE, name);
            image[79] |= u8::from(has_bit) << 2;
            let top = write_image(&own, "top.qcow2", &image);
            for policy in [
                OpenPolicy::Deny,
                OpenPolicy::Beneath(own.clone()),
                drivers(&["qcow2", "raw"]),
                OpenPolicy::Everything,
            ] {
                let (registry, spy) = spied();
                let everything = matches!(policy, OpenPolicy::Everything);
                match qcow2().policy(policy).open(&registry, &top).await {
                    Ok(disk) => {
                        assert!(!has_bit || (is_path && everything), "{name}");
                        assert!(disk.read(0, 65536).await.unwrap().is_zero(), "{name}");
                        disk.close().await.unwrap();
                    }
                    Err(e) => assert!(has_bit && !(is_path && everything), "{name}: {e}"),
                }
                assert_eq!(spy.0.load(Ordering::Relaxed), 0, "{name}");
            }
        }
    }
}

#[tokio::test]
async fn an_image_cannot_ask_for_writing_to_what_it_names() {
    let dir = tempfile::tempdir().unwrap();
    let mut base = fresh(dir.path(), "64k").await;
    // A writer has to clear these bits: so they tell whether there was one.
    put(&mut base, 88, &[0x80; 8]);
    let path = write_image(dir.path(), "base.qcow2", &base);
    let mut image = fresh(dir.path(), "64k").await;
    for option in [
        r#""read-only":false"#,
        r#""read-only":"off""#,
        r#""file.read-only":false,"read-only":false"#,
        r#""file.read-only":"no""#,
    ] {
        let name = format!(
            r#"json:{{"driver":"qcow2",{option},"file":{{"driver":"file","filename":"{path}"}}}}"#
        );
        put_backing(&mut image, &name, "qcow2");
        let top = write_image(dir.path(), "top.qcow2", &image);
        for read_only in [true, false] {
            let open = qcow2().read_only(read_only).policy(OpenPolicy::Everything);
            let err = match open.open(&registry(), &top).await {
                Err(e) => e,
                Ok(disk) => {
                    disk.close().await.unwrap();
                    assert!(std::fs::read(&path).unwrap() == base, "{option}: written");
                    panic!("{option} was accepted");
                }
            };
            assert_eq!(err.kind(), ErrorKind::PermissionDenied, "{option}: {err}");
            assert!(std::fs::read(&path).unwrap() == base, "{option}: written");
        }
    }
}

/// A chain that comes back to its start by other names than before: 200 images deep is the end, within the stack of an ordinary thread.
#[test]
fn a_chain_that_loops_by_link_or_by_json_comes_to_an_end() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(".", dir.path().join("x")).unwrap();
    std::os::unix::fs::symlink("top.qcow2", dir.path().join("link")).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let top = dir.path().join("top.qcow2").to_str().unwrap().to_owned();
    for (name, word) in [
        (top.clone(), "loops"),
        ("top.qcow2".to_owned(), "loops"),
        ("link".to_owned(), "loops"),
        ("./top.qcow2".to_owned(), "longer than 200"),
        ("x/top.qcow2".to_owned(), "symbolic links"),
        (
            format!(r#"json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{top}"}}}}"#),
            "longer than 200",
        ),
    ] {
        let (dir, top) = (dir.path().to_owned(), top.clone());
        let task = runtime.spawn(async move {
            let mut image = fresh(&dir, "64k").await;
            put_backing(&mut image, &name, "qcow2");
            write_image(&dir, "top.qcow2", &image);
            let open = qcow2().policy(OpenPolicy::Everything);
            let err = open.open(&registry(), &top).await.unwrap_err();
            assert!(err.to_string().contains(word), "{name}: {err}");
        });
        let limit = Duration::from_secs(60);
        let ended = runtime.block_on(async { tokio::time::timeout(limit, task).await });
        ended.expect("ends in time").unwrap();
    }
}

/// Everything that a guest and its host do with a disk, whatever comes of it. What was accepted must be answered.
async fn use_all(disk: &Backend) {
    let length = disk.length();
    for at in [
        0,
        65536 - 512,
        length / 2 / 512 * 512,
        length.saturating_sub(512),
    ] {
        let _answer = disk
            .read(at, 1024.min(length.saturating_sub(at)) as usize)
            .await;
        let _answer = disk
            .chain_status(at, length.saturating_sub(at), StatusMode::Precise)
            .await;
        let data = IoBuf::from(vec![1; 512.min(length.saturating_sub(at)) as usize]);
        let _answer = disk.pwritev(at, data, WriteFlags::empty()).await;
        let _answer = disk.pwrite_zeroes(at, 512, WriteFlags::MAY_UNMAP).await;
        let _answer = disk.pdiscard(at, 65536).await;
    }
    let bytes = length.saturating_add(1 << 20);
    let growth = TruncateRequest {
        bytes,
        ..Default::default()
    };
    let _answer = disk.truncate(growth).await;
    let _answer = disk.flush().await;
}

/// Every field of the header and every kind of table entry takes every extreme value, and the image is opened and used. Arithmetic that overflows
/// panics in a build for tests; so do tasks that nobody waits for.
#[tokio::test]
async fn no_field_of_an_image_makes_a_sum_overflow() {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICS.fetch_add(1, Ordering::Relaxed);
        usual(info);
    }));
    let dir = tempfile::tempdir().unwrap();
    let name = write_image(dir.path(), "good.qcow2", &fresh(dir.path(), "1M").await);
    let disk = OpenOptions::new().format("qcow2");
    let disk = disk.open(&registry(), &name).await.unwrap();
    let data = IoBuf::from(vec![1; 65536]);
    disk.pwritev(0, data, WriteFlags::empty()).await.unwrap();
    disk.close().await.unwrap();
    let good = std::fs::read(&name).unwrap();
    let cluster = 65536;
    let registry = registry();
    // Version, backing offset and length, ... up to the header's length; then one entry each of the four tables; then a snapshot.
    let words = [4, 16, 20, 32, 36, 56, 60, 96, 100].map(|at| (at, 4));
    let longs = [8, 24, 40, 48, 64, 72, 80, 88, 104];
    let longs = longs.map(|at| (at, 8));
    let entries = [cluster, 2 * cluster, 3 * cluster, 4 * cluster].map(|at| (at, 8));
    for (at, width) in words.into_iter().chain(longs).chain(entries) {
        for value in extremes() {
            let mut bad = good.clone();
            let value = if width == 4 { value >> 32 } else { value };
            put(&mut bad, at, &value.to_be_bytes()[8 - width..]);
            let bad = write_image(dir.path(), "bad.qcow2", &bad);
            let story = format!("{value:#x} at {at}");
            let using = async {
                let open = OpenOptions::new().format("qcow2");
                if let Ok(disk) = open.open(&registry, &bad).await {
                    use_all(&disk).await;
                    let _answer = disk.close().await;
                }
            };
            let ended = tokio::time::timeout(Duration::from_secs(30), using).await;
            assert!(ended.is_ok(), "{story}: takes too long");
            assert_eq!(PANICS.load(Ordering::Relaxed), 0, "{story}");
        }
    }
}

/// Powers of two and their neighbours where widths, signs and alignments end.
fn extremes() -> Vec<u64> {
    let bits = [0, 8, 9, 16, 31, 32, 47, 55, 56, 61, 62, 63];
    let powers = bits.map(|b| 1u64 << b);
    let mut values = vec![0, u64::MAX, u64::MAX - 511, u64::MAX << 16, i64::MAX as u64];
    values.extend(
        powers
            .iter()
            .flat_map(|&p| [p - 1, p, p | 1 << 63, p | 1 << 62]),
    );
    values.sort();
    values.dedup();
    values
}

/// What a reader gets where there is nothing is zeroes, not what its buffer or the host's memory held before.
#[tokio::test]
async fn a_reader_gets_zeroes_where_there_is_nothing() {
    let dir = tempfile::tempdir().unwrap();
    // A host file that ends in the middle of a sector, below an overlay that is longer.
    write_image(dir.path(), "base.raw", &[7; 70_100]);
    let mut image = fresh(dir.path(), "1M").await;
    put_backing(&mut image, "base.raw", "raw");
    let top = write_image(dir.path(), "top.qcow2", &image);
    let disk = OpenOptions::new()
        .format("qcow2")
        .policy(OpenPolicy::Everything);
    let disk = disk.open(&registry(), &top).await.unwrap();
    let mut expected = vec![0; 1 << 20];
    expected[..70_100].fill(7);
    reads_as(&disk, &expected).await;
    // A write to a part of a cluster copies what is below, and no more than that; beside it, in clusters of zeroes and where data was given back.
    for at in [69_000, 200_000, 262_144 + 5, 400_000] {
        let data = IoBuf::from(vec![9; 100]);
        disk.pwritev(at, data, WriteFlags::empty()).await.unwrap();
        expected[at as usize..at as usize + 100].fill(9);
    }
    let unmap = WriteFlags::MAY_UNMAP;
    disk.pwrite_zeroes(327_680, 131_072, unmap).await.unwrap();
    expected[327_680..458_752].fill(0);
    reads_as(&disk, &expected).await;
    // What the discarded clusters held must not come back in those that take their place.
    disk.pdiscard(0, 262_144).await.unwrap();
    expected[..262_144].fill(0);
    disk.flush().await.unwrap();
    for at in [600_000, 700_000, 800_000, 900_000] {
        let data = IoBuf::from(vec![3; 10]);
        disk.pwritev(at, data, WriteFlags::empty()).await.unwrap();
        expected[at as usize..at as usize + 10].fill(3);
    }
    reads_as(&disk, &expected).await;
    disk.close().await.unwrap();
    let disk = qcow2().policy(OpenPolicy::Everything);
    let disk = disk.open(&registry(), &top).await.unwrap();
    reads_as(&disk, &expected).await;
    disk.close().await.unwrap();
}

/// Reads in pieces of every kind into buffers that held something else.
async fn reads_as(disk: &Backend, expected: &[u8]) {
    for piece in [512, 4096 + 13, 65536, 300_000, 1 << 20] {
        for at in (0..expected.len()).step_by(piece) {
            let expected = &expected[at..expected.len().min(at + piece)];
            let mut buf = IoBufMut::zeroed(expected.len());
            buf.fill(0xee);
            let flags = ReadFlags::empty();
            let got = disk.preadv(at as u64, buf, flags).await.unwrap().to_vec();
            let wrong = got.iter().zip(expected).position(|(a, b)| a != b);
            assert_eq!(wrong.map(|w| at + w), None, "piece of {piece} at {at}");
            let mut there = vec![0xee; expected.len()];
            if disk.read_nowait(at as u64, &mut there) {
                assert!(there == expected, "without waiting: {piece} at {at}");
            }
        }
    }
}
