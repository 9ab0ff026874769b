// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rule: no poll takes as long as a disk wait, the polls of the library's own tasks among them. The method: the real engine over a file that takes 80 ms for a
//! read or a write. QEMU's storage daemon serves it by FUSE, slowed down by its throttle; where it can't, the test says so and is skipped.
//! That no poll makes any call that may wait, however short, is shown by `waits` in the crate `raw`.

use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blocklayer::testing::longest_wait;
use blocklayer::{
    CheckFix, IoBuf, OpenOptions, Options, SnapshotRequest, StatusMode, TruncateRequest,
    WriteFlags, registry,
};
use futures::future::try_join_all;

/// What a request to the file takes, if it isn't the first after a rest.
const REQUEST: Duration = Duration::from_millis(80);
/// A poll that slept for longer has waited for the file. Locks and the allocator put a thread to sleep as well, for much less.
const WAIT: Duration = Duration::from_millis(40);
const CLUSTER: u64 = 64 << 10;

/// A daemon, which ends with the test.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        // Not killed: it takes its mount away.
        let kill = format!("kill {}", self.0.id());
        let _there_or_not = Command::new("sh").args(["-c", &kill]).status();
        let _ended = self.0.wait();
    }
}

/// Serves a file anew, slowly, under another name. `None` where that can't be done.
fn serve_slowly(file: &Path, mountpoint: &Path) -> Option<Daemon> {
    std::fs::write(mountpoint, "").unwrap();
    let requests = 1000 / REQUEST.as_millis();
    let daemon = Command::new("qemu-storage-daemon")
        .args([
            "--object",
            &format!("throttle-group,id=slow,x-iops-total={requests}"),
        ])
        .arg("--blockdev")
        .arg(format!("file,node-name=file,filename={}", file.display()))
        .args([
            "--blockdev",
            "throttle,node-name=throttle,throttle-group=slow,file=file",
        ])
        .arg("--export")
        .arg(format!(
            "fuse,id=export,node-name=throttle,writable=on,growable=on,mountpoint={}",
            mountpoint.display()
        ))
        .spawn();
    let mut daemon = Daemon(daemon.ok()?);
    let length = std::fs::metadata(file).unwrap().len();
    for _ in 0..200 {
        // Whole sectors.
        if std::fs::metadata(mountpoint).ok()?.len() >= length {
            return Some(daemon);
        }
        if daemon.0.try_wait().unwrap().is_some() {
            return None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    None
}

/// Everything that a disk does, several requests at a time, from opening to closing.
async fn use_it(name: &str, engine: &str, direct: bool) {
    let open = OpenOptions::new().format("qcow2").direct(direct);
    let open = open.option("file.aio", engine);
    let disk = Arc::new(open.open(&registry(), name).await.unwrap());
    let root = disk.root().clone();
    // Fresh clusters, and parts of them.
    try_join_all((0..4u64).map(|n| {
        let data = IoBuf::from(vec![n as u8 + 1; 5000]);
        disk.pwritev(n * CLUSTER + 700, data, WriteFlags::empty())
    }))
    .await
    .unwrap();
    disk.flush().await.unwrap();
    let reads = (0..4u64).map(|n| disk.read(n * CLUSTER + 700, 5000));
    for (n, read) in (1u8..).zip(try_join_all(reads).await.unwrap()) {
        assert!(read.to_vec().iter().all(|b| *b == n));
    }
    root.snapshot_create(SnapshotRequest::now("s"))
        .await
        .unwrap();
    // Shared clusters.
    let data = IoBuf::from(vec![9; 512]);
    disk.pwritev(0, data, WriteFlags::FUA).await.unwrap();
    let zeroes = disk.pwrite_zeroes(CLUSTER, 3000, WriteFlags::MAY_UNMAP);
    let discard = disk.pdiscard(2 * CLUSTER, CLUSTER);
    let (zeroes, discard) = futures::join!(zeroes, discard);
    zeroes.and(discard).unwrap();
    disk.chain_status(0, 8 * CLUSTER, StatusMode::Precise)
        .await
        .unwrap();
    let length = disk.length();
    let longer = TruncateRequest::to(length + CLUSTER);
    disk.truncate(longer).await.unwrap();
    let found = root.check(CheckFix::None).await.unwrap();
    assert_eq!(found.corruptions, 0, "{:?}", found.messages);
    disk.close().await.unwrap();
}

#[tokio::test]
async fn no_poll_takes_as_long_as_a_request_to_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for (engine, direct) in [("threads", false), ("threads", true), ("io_uring", false)] {
        let (file, slow) = (path("t.qcow2"), path("slow"));
        let create = Options::new().with("size", "1M");
        let name = file.to_str().unwrap();
        registry()
            .create("qcow2", name, create, Default::default())
            .await
            .unwrap();
        let Some(_daemon) = serve_slowly(&file, &slow) else {
            println!("no storage daemon, or no FUSE: skipped");
            return;
        };
        let begun = Instant::now();
        let (_, longest) = longest_wait(use_it(slow.to_str().unwrap(), engine, direct)).await;
        let all = begun.elapsed();
        println!("{engine}, direct {direct}: {longest:?} at most, of {all:?}");
        assert!(all > 8 * REQUEST, "the file was not slow: {all:?}");
        assert!(longest < WAIT, "{engine}, direct {direct}: {longest:?}");
    }
}
