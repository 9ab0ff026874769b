// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rule: no poll of a request waits for the host, whatever request and engine it is; so none takes as long as the slowest disk does.
//!
//! The method: every call that may wait says so ([`may_wait`](super::may_wait)), and every such call that a thread of the runtime's pool makes takes some milliseconds.
//! Every kind of request is made on a runtime whose one thread polls all futures, and all tasks that work for them. It must come by no such call; that is no
//! matter of time, so a machine that is busy changes nothing. That calls are noted where they are made is seen on the pool's threads: each has been there.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use blockcore::{
    Backend, IoBuf, NodeFlags, OpenOptions, Options, Preallocation, Registry, StatusMode,
    TruncateRequest, WriteFlags,
};
use futures::FutureExt;
use tokio::runtime::Builder;

/// The name of threads whose calls take their time.
const SLOW: &str = "slow disk";
const DELAY: Duration = Duration::from_millis(2);

thread_local! {
    /// The calls of this thread, if it is one that must make none.
    static CALLS: RefCell<Option<Vec<&'static str>>> = const { RefCell::new(None) };
}

/// The calls of slow threads.
static SLOW_CALLS: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());

pub(crate) fn note(call: &'static str) {
    CALLS.with_borrow_mut(|calls| calls.iter_mut().for_each(|calls| calls.push(call)));
    if thread::current().name() == Some(SLOW) {
        SLOW_CALLS.lock().unwrap().insert(call);
        thread::sleep(DELAY);
    }
}

/// Runs a future, and gives back what calls the thread has made that polled it, and all tasks beside it.
fn calls_of_polls(future: impl Future<Output = ()>) -> Vec<&'static str> {
    let mut builder = Builder::new_current_thread();
    let runtime = builder.enable_all().thread_name(SLOW).build().unwrap();
    CALLS.set(Some(Vec::new()));
    runtime.block_on(future);
    CALLS.take().unwrap()
}

fn registry() -> Registry {
    let mut registry = Registry::new();
    registry.register(crate::FileFactory);
    registry.register(crate::HostDeviceFactory);
    registry.register(crate::RawFactory);
    registry
}

async fn truncate(disk: &Backend, bytes: u64, preallocation: Preallocation) {
    let request = TruncateRequest {
        preallocation,
        ..TruncateRequest::to(bytes)
    };
    disk.truncate(request).await.unwrap();
}

/// Makes every kind of request, one at a time, some at a time, and some that are dropped.
async fn every_request(dir: &Path, aio: &str, direct: bool) {
    let registry = registry();
    let name = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    for (file, preallocation) in [("disk", "off"), ("other", "full"), ("third", "falloc")] {
        let options = Options::new()
            .with("size", "4M")
            .with("preallocation", preallocation);
        let file = name(file);
        let created = registry.create("raw", &file, options, Default::default());
        created.await.unwrap();
    }
    let open = |file: &str| {
        let options = OpenOptions::new().option("file.aio", aio).direct(direct);
        let (registry, name) = (registry.clone(), name(file));
        async move { options.format("raw").open(&registry, &name).await }
    };
    let disk = match open("disk").await {
        Ok(disk) => disk,
        Err(e) if direct || aio == "io_uring" => return println!("{aio}, direct {direct}: {e}"),
        Err(e) => panic!("{e}"),
    };
    let none = WriteFlags::empty();
    let data = |bytes: usize| IoBuf::from(vec![7; bytes]);
    for bytes in [512, 4096, 300 << 10] {
        let writes = (0..4u64).map(|i| disk.pwritev(i << 19, data(bytes), none));
        futures::future::try_join_all(writes).await.unwrap();
        let reads = (0..4u64).map(|i| disk.read(i << 19, bytes));
        futures::future::try_join_all(reads).await.unwrap();
        disk.read(700, 1000).await.unwrap();
    }
    disk.pwritev(0, data(4096), WriteFlags::FUA).await.unwrap();
    for flags in [none, WriteFlags::MAY_UNMAP, WriteFlags::NO_FALLBACK] {
        let _ = disk.pwrite_zeroes(1 << 20, 1 << 16, flags).await;
    }
    let _ = disk.pdiscard(1 << 20, 1 << 16).await;
    let _ = disk.root().driver().reserve_storage(1 << 20, 4096).await;
    for mode in [StatusMode::Precise, StatusMode::AllocationOnly] {
        disk.block_status(0, 2 << 20, mode).await.unwrap();
        disk.chain_status(3 << 20, 1 << 20, mode).await.unwrap();
    }
    disk.flush().await.unwrap();
    for request in [
        disk.pwritev(0, data(4096), none).map(drop).boxed(),
        disk.read(0, 8192).map(drop).boxed(),
        disk.flush().map(drop).boxed(),
    ] {
        assert!(request.now_or_never().is_none(), "it is slow");
    }
    disk.flush().await.unwrap();
    truncate(&disk, 5 << 20, Preallocation::Off).await;
    truncate(&disk, 6 << 20, Preallocation::Falloc).await;
    truncate(&disk, 7 << 20, Preallocation::Full).await;
    truncate(&disk, 3 << 20, Preallocation::Off).await;
    disk.root().refresh_length().await.unwrap();
    disk.root().driver().allocated_size().await.unwrap();
    let other = open("other").await.unwrap();
    let copied = disk
        .root()
        .driver()
        .copy_range_from(other.root(), 0, 0, 1 << 16);
    let _ = copied.await;
    other.close().await.unwrap();
    for read_only in [true, false] {
        let flags = NodeFlags {
            read_only,
            direct,
            ..NodeFlags::default()
        };
        disk.reopen(flags, false, Options::new()).await.unwrap();
    }
    disk.close().await.unwrap();
    blockcore::DriverFactory::delete(&crate::FileFactory, &name("third"))
        .await
        .unwrap();
}

#[test]
fn no_poll_makes_a_call_that_may_wait() {
    for (aio, direct) in [
        ("threads", false),
        ("threads", true),
        ("io_uring", false),
        ("io_uring", true),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let calls = calls_of_polls(every_request(dir.path(), aio, direct));
        assert_eq!(calls, [""; 0], "aio {aio}, direct {direct}");
    }
    let seen = SLOW_CALLS.lock().unwrap();
    for call in [
        "copy_file_range",
        "fallocate",
        "fcntl",
        "fdatasync",
        "fstat",
        "ftruncate",
        "ioctl",
        "lseek",
        "openat",
        "preadv",
        "pwritev",
        "stat",
        "unlink",
    ] {
        assert!(seen.contains(call), "{call}: {seen:?}");
    }
}

#[test]
fn a_poll_that_makes_one_is_seen() {
    let calls = calls_of_polls(async {
        tokio::spawn(async { note("fstat") }).await.unwrap();
    });
    assert_eq!(calls, ["fstat"]);
}
