// SPDX-License-Identifier: MIT OR Apache-2.0
//! Raw images whose format was guessed, and the options `offset` and `size`.

mod common;

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use blockcore::{
    BlockDriver, Diagnostics, DriverFactory, IoBuf, OpenContext, OpenOptions, Options, Registry,
    Result, TruncateRequest, WriteFlags,
};
use common::{Disk, registry};

/// A format that recognises a magic number and opens nothing.
struct Magic;

#[async_trait]
impl DriverFactory for Magic {
    fn format_name(&self) -> &'static str {
        "magic"
    }

    fn probe(&self, head: &[u8]) -> u32 {
        // Some formats have their mark further behind.
        let far = head.get(1024..).unwrap_or(&[]);
        let found = head.starts_with(b"MAGIC") || far.starts_with(b"MAGIC");
        if found { 100 } else { 0 }
    }

    async fn open(
        &self,
        _ctx: &OpenContext<'_>,
        _options: &mut Options,
    ) -> Result<Box<dyn BlockDriver>> {
        Err(blockcore::BlockError::unsupported("magic"))
    }
}

fn with_magic() -> Registry {
    let mut registry = registry();
    registry.register(Magic);
    registry
}

#[tokio::test]
async fn a_guest_cannot_turn_a_guessed_raw_image_into_another_format() {
    let disk = Disk::create("1M").await;
    let said = Arc::new(Mutex::new(Vec::new()));
    let for_sink = said.clone();
    let sink = Diagnostics::new(move |line| for_sink.lock().unwrap().push(line.to_owned()));
    let backend = OpenOptions::new()
        .probe(true)
        .diagnostics(sink)
        .open(&with_magic(), disk.name())
        .await
        .unwrap();
    assert_eq!(
        *said.lock().unwrap(),
        [
            format!(
                "WARNING: Image format was not specified for '{}' and probing guessed raw.",
                disk.name()
            ),
            "         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.".to_owned(),
            "         Specify the 'raw' format explicitly to remove the restrictions.".to_owned(),
        ]
    );
    let write = |at, data: &[u8]| {
        let data = IoBuf::from(data.to_vec());
        backend.pwritev(at, data, WriteFlags::empty())
    };
    let err = write(0, b"MAGIC").await.unwrap_err();
    assert_eq!(err.errno(), libc::EPERM);
    // Nor in two steps.
    write(1, b"AGIC").await.unwrap();
    assert_eq!(write(0, b"M").await.unwrap_err().errno(), libc::EPERM);
    write(0, b"harmless").await.unwrap();
    write(512, b"MAGIC").await.unwrap();
    backend.close().await.unwrap();

    let named = OpenOptions::new()
        .format("raw")
        .open(&with_magic(), disk.name())
        .await
        .unwrap();
    let magic = IoBuf::from(b"MAGIC".to_vec());
    named.pwritev(0, magic, WriteFlags::empty()).await.unwrap();
    named.close().await.unwrap();
}

// What a guest of a guessed image may write must not count when it is guessed again: guard and guess look at the same bytes.
#[tokio::test]
async fn nothing_that_the_guard_lets_pass_changes_the_next_guess() {
    let disk = Disk::create("1M").await;
    let open = || {
        let quiet = Diagnostics::new(|_| {});
        let options = OpenOptions::new().probe(true).diagnostics(quiet);
        async { options.open(&with_magic(), disk.name()).await }
    };
    let mut passed = 0;
    for at in [0, 4, 500, 512, 1024, 2048] {
        let backend = open().await.unwrap();
        let magic = IoBuf::from(b"MAGIC".to_vec());
        let answer = backend.pwritev(at, magic, WriteFlags::empty()).await;
        passed += usize::from(answer.is_ok());
        backend.close().await.unwrap();
        let again = open().await.expect("it is still raw");
        assert_eq!(again.root().format_name(), "raw");
        again.close().await.unwrap();
    }
    assert_eq!(passed, 5);
}

// The first sector of a file that has no whole one.
#[tokio::test]
async fn a_guest_cannot_turn_a_short_file_into_another_format_either() {
    let disk = Disk::create("1M").await;
    for length in [1, 5, 100, 511] {
        std::fs::write(&disk.path, vec![0; length]).unwrap();
        let quiet = Diagnostics::new(|_| {});
        let options = OpenOptions::new().probe(true).diagnostics(quiet);
        let backend = options.open(&with_magic(), disk.name()).await.unwrap();
        let mut data = b"MAGIC".to_vec();
        data.truncate(backend.length().min(5) as usize);
        let is_magic = data.len() == 5;
        let answer = backend
            .pwritev(0, IoBuf::from(data), WriteFlags::empty())
            .await;
        if is_magic {
            assert_eq!(answer.unwrap_err().errno(), libc::EPERM, "{length}");
        }
        backend.close().await.unwrap();
        assert!(!std::fs::read(&disk.path).unwrap().starts_with(b"MAGIC"));
    }
}

#[tokio::test]
async fn offset_and_size_choose_a_part_of_the_file() {
    let disk = Disk::create("1M").await;
    let open = |offset: &str, size: Option<&str>| {
        let mut options = OpenOptions::new().format("raw").option("offset", offset);
        if let Some(size) = size {
            options = options.option("size", size);
        }
        let name = disk.name().to_owned();
        async move { options.open(&registry(), &name).await }
    };
    let part = open("1k", Some("2k")).await.unwrap();
    assert_eq!(part.length(), 2048);
    let data = IoBuf::from(vec![3; 2048]);
    part.pwritev(0, data, WriteFlags::empty()).await.unwrap();
    let request = TruncateRequest {
        bytes: 4096,
        ..TruncateRequest::default()
    };
    let err = part.truncate(request).await.unwrap_err();
    assert_eq!(err.text(), "Cannot resize fixed-size raw disks");
    part.close().await.unwrap();
    let bytes = std::fs::read(&disk.path).unwrap();
    let threes: Vec<usize> = (0..bytes.len()).filter(|i| bytes[*i] == 3).collect();
    assert_eq!((threes.len(), threes[0]), (2048, 1024));

    let open_ended = open("512", None).await.unwrap();
    assert_eq!(open_ended.length(), (1 << 20) - 512);
    open_ended.close().await.unwrap();
    for (offset, size, text) in [
        (
            "2M",
            None,
            "Offset (2097152) cannot be greater than size of the containing file (1048576)",
        ),
        (
            "512",
            Some("1M"),
            "The sum of offset (512) and size (1048576) has to be smaller or equal to the  actual size of the containing file (1048576)",
        ),
        ("0", Some("100"), "Specified size is not multiple of 512"),
        (
            "-1",
            None,
            "Value '-1' is out of range for parameter 'offset'",
        ),
    ] {
        assert_eq!(open(offset, size).await.unwrap_err().text(), text);
    }
}
