// SPDX-License-Identifier: MIT OR Apache-2.0
//! Locks, against the installed qemu-io: who keeps whom out, with which words, and that a reopen never lets go in between.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Stdio};

use blockcore::{
    Backend, ErrorKind, NodeFlags, OpenOptions, Options, Permissions, Result, TruncateRequest,
};
use common::{Disk, qemu_io, registry};

/// Opens the file as a format would that writes to it, or only reads.
async fn open_as_format(disk: &Disk, read_only: bool) -> Result<Backend> {
    let backend = OpenOptions::new()
        .format("file")
        .read_only(read_only)
        .force_share(false)
        .option("locking", "auto")
        .open(&registry(), disk.name())
        .await?;
    let wanted = Permissions::storage(!read_only);
    if let Err(e) = backend.root().driver().set_permissions(wanted).await {
        backend.close().await?;
        return Err(e);
    }
    Ok(backend)
}

/// A qemu-io that holds the image open.
struct Holder(Child);

impl Holder {
    fn start(disk: &Disk, args: &[&str]) -> Option<Holder> {
        let mut command = qemu_io()?;
        let mut child = command
            .args(args)
            .arg(disk.name())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Once it answers, it has its locks.
        child
            .stdin
            .as_mut()
            .unwrap()
            .write_all(b"length\n")
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        Some(Holder(child))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

/// What qemu-io says when it opens the image as qcow2; a lock is looked at before the header is.
fn qemu_says(disk: &Disk, args: &[&str]) -> Option<String> {
    let out = qemu_io()?
        .args(args)
        .args(["-c", "quit"])
        .arg(disk.name())
        .output()
        .unwrap();
    Some(String::from_utf8(out.stderr).unwrap())
}

#[tokio::test]
async fn qemu_keeps_us_out_and_the_words_are_its_own() {
    let disk = Disk::create("1M").await;
    let made = std::process::Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", disk.name(), "1M"])
        .status();
    if !made.is_ok_and(|s| s.success()) {
        eprintln!("skipped: no qemu-img here");
        return;
    }
    let Some(holder) = Holder::start(&disk, &["-f", "qcow2"]) else {
        return;
    };
    let err = open_as_format(&disk, false).await.unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Locked);
    assert_eq!(err.text(), "Failed to get \"write\" lock");
    let hint = format!("Is another process using the image [{}]?", disk.name());
    assert_eq!(err.hint_text(), Some(hint.as_str()));
    let err = open_as_format(&disk, true).await.unwrap_err();
    assert_eq!(err.text(), "Failed to get shared \"write\" lock");
    drop(holder);

    let holder = Holder::start(&disk, &["-r", "-f", "qcow2"]);
    open_as_format(&disk, true)
        .await
        .unwrap()
        .close()
        .await
        .unwrap();
    let err = open_as_format(&disk, false).await.unwrap_err();
    assert_eq!(err.text(), "Failed to get \"write\" lock");
    drop(holder);
    open_as_format(&disk, false)
        .await
        .unwrap()
        .close()
        .await
        .unwrap();
}

#[tokio::test]
async fn we_keep_qemu_out_until_closed() {
    let disk = Disk::create("1M").await;
    let ours = open_as_format(&disk, false).await.unwrap();
    let Some(said) = qemu_says(&disk, &["-f", "qcow2"]) else {
        return;
    };
    assert!(said.contains("Failed to get \"write\" lock"), "{said}");
    let said = qemu_says(&disk, &["-r", "-f", "raw"]).unwrap();
    assert!(said.is_empty(), "a raw reader lets us write: {said}");
    ours.close().await.unwrap();
    let said = qemu_says(&disk, &["-f", "qcow2"]).unwrap();
    assert!(said.contains("not in qcow2 format"), "{said}");
}

#[tokio::test]
async fn the_bytes_are_those_that_qemu_locks() {
    use std::os::unix::fs::MetadataExt;
    let disk = Disk::create("1M").await;
    let inode = std::fs::metadata(&disk.path).unwrap().ino();
    let bytes = || {
        let locks = std::fs::read_to_string("/proc/locks").unwrap();
        let of_file = |l: &&str| l.contains(&format!(":{inode} "));
        let mut ranges: Vec<String> = locks
            .lines()
            .filter(of_file)
            .map(|l| l.split_whitespace().skip(6).collect::<Vec<_>>().join("-"))
            .collect();
        ranges.sort();
        ranges.join(" ")
    };
    let format = open_as_format(&disk, false).await.unwrap();
    assert_eq!(bytes(), "100-101 103-103 201-201 203-203");
    format.close().await.unwrap();
    assert_eq!(bytes(), "");
    for (options, want) in [
        (OpenOptions::new(), "100-101"),
        (OpenOptions::new().read_only(true), "100-100"),
        (OpenOptions::new().option("size", "4k"), "100-101 203-203"),
        (OpenOptions::new().option("file.locking", "off"), ""),
        (
            OpenOptions::new().read_only(true).force_share(true),
            "100-100",
        ),
    ] {
        let ours = disk.open(options).await;
        assert_eq!(bytes(), want);
        ours.close().await.unwrap();
    }
    let reopened = open_as_format(&disk, true).await.unwrap();
    assert_eq!(bytes(), "100-100 201-201 203-203");
    reopened
        .reopen(NodeFlags::default(), false, Options::new())
        .await
        .unwrap();
    assert_eq!(bytes(), "100-101 103-103 201-201 203-203");
    let flags = NodeFlags {
        read_only: true,
        direct: true,
        ..NodeFlags::default()
    };
    reopened.reopen(flags, false, Options::new()).await.unwrap();
    assert_eq!(bytes(), "100-100 201-201 203-203");
    reopened.close().await.unwrap();
    assert_eq!(bytes(), "");
}

#[tokio::test]
async fn a_reopen_for_writing_is_refused_while_somebody_reads() {
    let disk = Disk::create("1M").await;
    let first = open_as_format(&disk, true).await.unwrap();
    let second = open_as_format(&disk, true).await.unwrap();
    let refused = first
        .reopen(NodeFlags::default(), false, Options::new())
        .await
        .unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Locked);
    assert!(first.root().is_read_only());
    second.close().await.unwrap();
    first
        .reopen(NodeFlags::default(), false, Options::new())
        .await
        .unwrap();
    first.close().await.unwrap();
}

/// Who works on a part of a file counts on its length; a resize says so to others, and keeps saying it.
#[tokio::test]
async fn a_file_is_not_resized_under_somebody_who_counts_on_its_length() {
    let disk = Disk::create("1M").await;
    let part = OpenOptions::new().read_only(true).option("size", "4k");
    let part = disk.open(part).await;
    let whole = disk.open(OpenOptions::new()).await;
    let longer = TruncateRequest {
        bytes: 2 << 20,
        ..TruncateRequest::default()
    };
    let refused = whole.truncate(longer).await.unwrap_err();
    assert_eq!(refused.text(), "Failed to get \"resize\" lock");
    assert_eq!(whole.length(), 1 << 20);
    part.close().await.unwrap();
    whole.truncate(longer).await.unwrap();
    let part = OpenOptions::new()
        .format("raw")
        .read_only(true)
        .option("size", "4k")
        .open(&registry(), disk.name())
        .await;
    let refused = part.unwrap_err();
    assert_eq!(refused.text(), "Failed to get shared \"resize\" lock");
    whole.close().await.unwrap();
}

/// A raw node between a format and the file passes on what the format asks for.
#[tokio::test]
async fn raw_over_raw_locks_as_raw_alone() {
    let disk = Disk::create("1M").await;
    let nested = async || {
        OpenOptions::new()
            .format("raw")
            .option("file.driver", "raw")
            .option("file.file.filename", disk.name())
            .open_options(&registry())
            .await
    };
    let first = nested().await.unwrap();
    let strict = Permissions::storage(true);
    first.root().driver().set_permissions(strict).await.unwrap();
    assert_eq!(nested().await.unwrap_err().kind(), ErrorKind::Locked);
    first.close().await.unwrap();
    nested().await.unwrap().close().await.unwrap();
}
