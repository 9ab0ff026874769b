// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sessions as an embedding program uses them: commands on a disk in memory or on files of a scratch directory, their typed outcomes and their text.
//!
//! What the program prints is compared with the installed tool by the golden scripts; here are the rules that need no other tool to be seen.

use blocklayer::testing::MemoryFactory;
use blocklayer::{ErrorKind, Options, Registry};
use qemu_io::{Completion, Done, Failed, Session};

/// A session with a disk of `size` in memory.
async fn memory(size: &str) -> Session {
    let mut registry = Registry::new();
    registry.register(MemoryFactory::default());
    let options = Options::new().with("size", size);
    registry
        .create("memory", "memory:disk", options, Default::default())
        .await
        .unwrap();
    let mut session = Session::captured(registry);
    let opened = session.run("open -o driver=memory memory:disk").await;
    assert_eq!(opened.result, Ok(Done::Nothing), "{}", opened.stderr);
    session
}

/// Runs `line`, which must fail as `failed` and print these two texts.
async fn refused(session: &mut Session, line: &str, stdout: &str, stderr: &str) {
    let outcome = session.run(line).await;
    assert_eq!(outcome.result, Err(Failed::Refused), "{line}");
    assert_eq!(
        (&*outcome.stdout, &*outcome.stderr),
        (stdout, stderr),
        "{line}"
    );
}

#[tokio::test]
async fn outcomes_tell_what_was_done_and_why_it_was_not() {
    let mut session = memory("1M").await;
    let io = |offset, bytes| Ok(Done::Io { offset, bytes });
    assert_eq!(session.run("write -P 7 3 10").await.result, io(3, 10));
    assert_eq!(session.run("read -P 7 3 10").await.result, io(3, 10));
    let mismatch = session.run("read -q -P 7 3 11").await;
    assert_eq!(mismatch.result, Err(Failed::Mismatch));
    assert_eq!(
        mismatch.stdout,
        "Pattern verification failed at offset 3, 11 bytes\n"
    );
    let past = session.run("writev 1M 1 1").await;
    let (kind, errno) = (ErrorKind::Io, libc::EIO);
    assert_eq!(past.result, Err(Failed::Error { kind, errno }));
    assert_eq!(past.stdout, "writev failed: Input/output error\n");
    assert_eq!(
        session.run("length").await.result,
        Ok(Done::Length(1 << 20))
    );
    let counted = session.run("alloc 1023k 4k").await.result;
    assert!(
        matches!(counted, Ok(Done::Allocated { of: 1024, .. })),
        "{counted:?}"
    );
    assert_eq!(session.run("q whatever").await.result, Ok(Done::Quit));
    assert_eq!(session.run("   ").await.result, Ok(Done::Nothing));
    session.close().await;
}

#[tokio::test]
async fn requests_in_flight_are_reported_when_the_program_waits_and_not_before() {
    let mut session = memory("1M").await;
    for line in [
        "aio_write -P 1 0 64k",
        "aio_read -qP 2 64k 512 512",
        "aio_write 2M 1",
    ] {
        let started = session.run(line).await;
        assert_eq!(started.result, Ok(Done::Started));
        assert_eq!(
            (started.stdout.as_str(), started.completions.len()),
            ("", 0)
        );
    }
    let flushed = session.run("aio_flush").await;
    assert_eq!(flushed.result, Ok(Done::Nothing));
    let mut ended = flushed.completions;
    ended.sort_by_key(|c| c.offset);
    let completion = |is_write, offset, bytes, result| Completion {
        is_write,
        offset,
        bytes,
        result,
    };
    let (kind, errno) = (ErrorKind::Io, libc::EIO);
    assert_eq!(
        ended,
        [
            completion(true, 0, 65536, Ok(())),
            completion(false, 65536, 1024, Err(Failed::Mismatch)),
            completion(true, 2 << 20, 1, Err(Failed::Error { kind, errno })),
        ]
    );
    assert!(
        flushed
            .stdout
            .contains("wrote 65536/65536 bytes at offset 0\n64 KiB, 1 ops; ")
    );
    assert!(
        flushed
            .stdout
            .contains("Pattern verification failed at offset 65536, 1024 bytes\n")
    );
    assert!(
        flushed
            .stdout
            .contains("aio_write failed: Input/output error\n")
    );
    assert!(session.run("aio_flush").await.completions.is_empty());
    session.close().await;
}

#[tokio::test]
async fn closing_waits_for_requests_in_flight() {
    let mut session = memory("1M").await;
    session.run("aio_write -P 9 0 1M").await;
    let closed = session.run("close").await;
    assert_eq!(closed.completions.len(), 1);
    refused(
        &mut session,
        "length",
        "",
        "no file open, try 'help open'\n",
    )
    .await;
    let opened = session.run("open -o driver=memory memory:disk").await;
    assert_eq!(opened.result, Ok(Done::Nothing), "{}", opened.stderr);
    assert!(session.run("read -q -P 9 0 1M").await.result.is_ok());
    session.close().await;
}

#[tokio::test]
async fn of_several_mistakes_the_first_in_the_order_of_checks_is_reported() {
    let mut session = memory("1M").await;
    let s = &mut session;
    refused(s, "rite 0", "", "command \"rite\" not found\n").await;
    let count = "bad argument count 1 to r, expected at least 2 arguments\n";
    refused(s, "r -x", "", count).await;
    let usage = session.run("read -x -P 999 0").await;
    assert_eq!(usage.result, Err(Failed::Refused));
    assert_eq!(usage.stderr, "read: invalid option -- 'x'\n");
    assert!(usage.stdout.starts_with("read [-abCqrv] [-P pattern"));
    let s = &mut session;
    refused(
        s,
        "read -P 999 -x 0",
        "999 is not a valid pattern byte\n",
        "",
    )
    .await;
    let both = "Only one of -z, -P, and -s can be specified at the same time\n";
    refused(s, "write -z -P 1 x y", both, "").await;
    let parse = "Parsing error: non-numeric argument, or extraneous/unrecognized suffix";
    refused(s, "write x y", &format!("{parse} -- x\n"), "").await;
    refused(s, "truncate -m off y", &format!("{parse} -- -m\n"), "").await;
    let range = "pattern verification range exceeds end of read data\n";
    refused(s, "read -P 0 -s 1 -l 512 0 512", range, "").await;
    session.close().await;
}

#[tokio::test]
async fn options_may_follow_the_words_and_be_joined() {
    let mut session = memory("1M").await;
    session.run("write 0 16 -qP0x41").await;
    let read = session.run("read 0 -v 4 -P 65").await;
    assert!(
        read.stdout
            .starts_with("00000000:  41 41 41 41  AAAA\nread 4/4"),
        "{}",
        read.stdout
    );
    session.close().await;
}

#[tokio::test]
async fn a_long_dump_is_whole_and_its_lines_go_on_from_piece_to_piece() {
    let mut session = memory("1M").await;
    let dump = session.run("read -v 5 10000").await.stdout;
    let lines: Vec<&str> = dump.lines().collect();
    assert_eq!(lines.len(), 10000 / 16 + 2);
    for (i, line) in lines[..625].iter().enumerate() {
        assert!(line.starts_with(&format!("{:08x}:  00 ", 5 + i * 16)));
    }
    session.close().await;
}

#[tokio::test]
async fn a_read_only_image_refuses_writers_before_it_looks_at_their_words() {
    let mut session = memory("1M").await;
    session.run("close").await;
    session.run("open -r -o driver=memory memory:disk").await;
    let s = &mut session;
    for line in ["write x y", "aio_write 0 1", "discard 0 1", "truncate z"] {
        refused(s, line, "", "qemu-io: Block node is read-only\n").await;
    }
    assert!(s.run("read -q 0 1").await.result.is_ok());
    session.close().await;
}

#[tokio::test]
async fn a_snapshot_takes_the_writes_and_the_image_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, vec![5; 65536]).unwrap();
    let mut session = Session::captured(blocklayer::registry());
    let opened = session
        .run(&format!("open -s -o driver=raw {}", path.display()))
        .await;
    assert_eq!(opened.result, Ok(Done::Nothing), "{}", opened.stderr);
    assert!(session.run("write -q -P 6 0 64k").await.result.is_ok());
    assert!(session.run("read -q -P 6 0 64k").await.result.is_ok());
    session.close().await;
    assert_eq!(std::fs::read(&path).unwrap(), vec![5; 65536]);
}
