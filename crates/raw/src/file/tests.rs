// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rule: a change whose future was dropped never lands after a later one to the same bytes, and a flush waits for it.
//!
//! ```text
//! dropped write   |--poll--x     (pool thread sleeps)        writes 1
//! later write                |-- waits ....................... | writes 2
//! ```

use std::path::Path;
use std::time::Duration;

use super::*;
use crate::file_open::{OpenMode, open_host};

const DELAY: Duration = Duration::from_millis(100);

fn driver(path: &Path, direct: bool, aio: Aio) -> FileDriver {
    let name = path.to_str().unwrap().to_owned();
    let mode = OpenMode {
        read_only: false,
        direct,
        aio,
    };
    let host = open_host(&name, mode).unwrap();
    FileDriver::new("file", name, aio, true, host)
}

/// Begins a write of `byte` that a pool thread makes only after a while, and drops it.
async fn drop_a_slow_write(driver: &FileDriver, byte: u8) {
    let slow = driver.change(Takes::ItsTime, 0, 4096, move |host| {
        std::thread::sleep(DELAY);
        host.write(0, &IoBuf::from(vec![byte; 4096]))
    });
    let mut slow = Box::pin(slow);
    assert!(futures::poll!(slow.as_mut()).is_pending());
}

// INV REQ-DROP-1
#[tokio::test]
async fn a_dropped_write_does_not_land_after_a_later_one() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let driver = driver(file.path(), false, Aio::Threads);
    drop_a_slow_write(&driver, 1).await;
    driver
        .pwritev(512, IoBuf::from(vec![2; 512]), WriteFlags::empty())
        .await
        .unwrap();
    std::thread::sleep(2 * DELAY);
    let bytes = std::fs::read(file.path()).unwrap();
    assert_eq!((bytes[511], bytes[512], bytes[1024]), (1, 2, 1));
}

// INV REQ-DROP-1
#[tokio::test]
async fn reads_and_flushes_and_close_wait_for_a_dropped_write() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let driver = driver(file.path(), false, Aio::Threads);
    driver
        .pwritev(0, IoBuf::from(vec![9; 8192]), WriteFlags::empty())
        .await
        .unwrap();
    drop_a_slow_write(&driver, 1).await;
    assert!(!driver.read_nowait(0, &mut [0; 512]));
    // Other bytes are not held up.
    let start = std::time::Instant::now();
    let buf = IoBufMut::zeroed(512);
    let other = driver.preadv(4096, buf, ReadFlags::empty()).await.unwrap();
    assert_eq!(other.to_vec(), [9; 512]);
    assert!(start.elapsed() < DELAY);
    let buf = IoBufMut::zeroed(512);
    let same = driver.preadv(0, buf, ReadFlags::empty()).await.unwrap();
    assert_eq!(same.to_vec(), [1; 512]);

    drop_a_slow_write(&driver, 2).await;
    driver.flush().await.unwrap();
    assert_eq!(std::fs::read(file.path()).unwrap()[0], 2);

    drop_a_slow_write(&driver, 3).await;
    driver.close().await.unwrap();
    assert_eq!(std::fs::read(file.path()).unwrap()[0], 3);
}

// INV REQ-DROP-1
#[tokio::test]
async fn a_dropped_write_in_the_ring_does_not_land_after_a_later_one() {
    if uring_is_missing() {
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4 << 20).unwrap();
    let driver = driver(file.path(), true, Aio::Uring);
    let mut dropped_under_way = 0;
    for round in 0..50u8 {
        let large = IoBuf::from(vec![255; 2 << 20]);
        let mut dropped = driver.pwritev(0, large, WriteFlags::empty());
        dropped_under_way += u32::from(futures::poll!(dropped.as_mut()).is_pending());
        drop(dropped);
        let at = (1 << 20) + u64::from(round) * 4096;
        let small = IoBuf::from(vec![round; 4096]);
        driver
            .pwritev(at, small, WriteFlags::empty())
            .await
            .unwrap();
        let buf = IoBufMut::zeroed(4096);
        let read = driver.preadv(at, buf, ReadFlags::empty()).await.unwrap();
        assert_eq!(read.to_vec(), vec![round; 4096], "round {round}");
    }
    assert!(dropped_under_way > 0, "every write was over at once");
    driver.close().await.unwrap();
}

fn uring_is_missing() -> bool {
    let missing = crate::engine::uring::available().is_err();
    if missing {
        eprintln!("skipped: the kernel grants no io_uring");
    }
    missing
}

// After a sync has failed, nothing is known about what was dirty: a second sync that finds nothing to do must not say that all is well.
#[tokio::test]
async fn a_failed_sync_stays_failed() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let driver = driver(file.path(), false, Aio::Threads);
    driver.flush().await.unwrap();
    driver
        .state
        .host()
        .sync_fails
        .store(true, Ordering::Relaxed);
    for _ in 0..2 {
        assert_eq!(driver.flush().await.unwrap_err().errno(), libc::EIO);
    }
}

// A preallocation syncs what it has written, and with it what guests have: that this failed must not be forgotten.
#[tokio::test]
async fn a_sync_that_fails_in_a_preallocation_stays_failed() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let driver = driver(file.path(), false, Aio::Threads);
    driver
        .state
        .host()
        .sync_fails
        .store(true, Ordering::Relaxed);
    let request = TruncateRequest {
        bytes: 1 << 16,
        preallocation: Preallocation::Full,
        ..TruncateRequest::default()
    };
    let told = driver.truncate(request).await.unwrap_err();
    assert_eq!(
        told.to_string(),
        "Could not flush file to disk: Input/output error"
    );
    assert_eq!(driver.length().await.unwrap(), 0);
    assert_eq!(driver.flush().await.unwrap_err().errno(), libc::EIO);
}
