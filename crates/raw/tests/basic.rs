// SPDX-License-Identifier: MIT OR Apache-2.0
//! A raw image over a file: what goes in comes out, and the file on the host is the image.

use blockcore::{
    IoBuf, OpenOptions, Options, StatusFlags, StatusMode, TruncateRequest, WriteFlags,
};

mod common;
use common::registry;

#[tokio::test]
async fn what_is_written_is_read_and_lies_in_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let name = path.to_str().unwrap();
    let registry = registry();
    registry
        .create(
            "raw",
            name,
            Options::new().with("size", "1M"),
            Default::default(),
        )
        .await
        .unwrap();
    let disk = OpenOptions::new()
        .format("raw")
        .open(&registry, name)
        .await
        .unwrap();
    assert_eq!(disk.length(), 1 << 20);
    disk.pwritev(5000, IoBuf::from(vec![7; 3000]), WriteFlags::empty())
        .await
        .unwrap();
    assert_eq!(disk.read(4999, 3).await.unwrap().to_vec(), [0, 7, 7]);
    disk.pwrite_zeroes(6000, 100, WriteFlags::MAY_UNMAP)
        .await
        .unwrap();
    assert_eq!(disk.read(6099, 2).await.unwrap().to_vec(), [0, 7]);
    let status = disk
        .block_status(512 * 1024, 1000, StatusMode::Precise)
        .await
        .unwrap();
    assert!(status.is_zero() && status.flags.contains(StatusFlags::OFFSET_VALID));
    assert!(status.file.is_some());
    disk.truncate(TruncateRequest {
        bytes: 2 << 20,
        exact: true,
        ..Default::default()
    })
    .await
    .unwrap();
    assert_eq!(disk.length(), 2 << 20);
    disk.close().await.unwrap();
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes.len(), 2 << 20);
    assert_eq!(&bytes[4999..5002], [0, 7, 7]);
}

#[tokio::test]
async fn a_file_that_is_not_there_is_named() {
    let err = OpenOptions::new()
        .format("raw")
        .open(&registry(), "no/such/file")
        .await
        .unwrap_err();
    assert_eq!(
        err.text(),
        "Could not open 'no/such/file': No such file or directory"
    );
}

#[tokio::test]
async fn a_pipe_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&path).status();
    assert!(made.unwrap().success());
    let name = path.to_str().unwrap();
    let err = OpenOptions::new()
        .format("raw")
        .read_only(true)
        .open(&registry(), name)
        .await
        .unwrap_err();
    let text = format!("'file' driver requires '{name}' to be a regular file");
    assert_eq!(err.text(), text);
}
