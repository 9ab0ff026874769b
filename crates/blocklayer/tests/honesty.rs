// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rule: no executor thread ever waits for the disk. The method: the kernel counts how often a thread goes to sleep of its own accord; polls of
//! requests that have to go to the disk (the page cache is bypassed where that can be had) must not add to that count (`testing::Polls`, whose example shows that a poll
//! that does wait is seen). This is the whole of it on a real disk, and sees what waits all the time; that nothing ever waits is shown by `waits` in the crate `raw`, call by
//! call, and by `parked` in `qcow2`, poll by poll.

use std::sync::Arc;

use blocklayer::testing::Polls;
use blocklayer::{IoBuf, OpenOptions, OpenPolicy, Options, WriteFlags, registry};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_go_to_the_disk_put_no_executor_thread_to_sleep() {
    // Beside the sources and not in a memory file system, so that there is a disk to wait for.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let size = Options::new().with("size", "16M");
    registry()
        .create(
            "qcow2",
            &path("base.qcow2"),
            size.clone(),
            Default::default(),
        )
        .await
        .unwrap();
    let backing = size
        .with("backing_file", "base.qcow2")
        .with("backing_fmt", "qcow2");
    registry()
        .create("qcow2", &path("top.qcow2"), backing, Default::default())
        .await
        .unwrap();
    for (engine, direct) in [("io_uring", true), ("threads", true), ("threads", false)] {
        let open = OpenOptions::new()
            .format("qcow2")
            .direct(direct)
            .option("file.aio", engine)
            .policy(OpenPolicy::Everything);
        let Ok(disk) = open.open(&registry(), &path("top.qcow2")).await else {
            // What is written through the page cache goes to the disk with the flushes.
            assert!(direct, "the engine that is always there");
            println!("no {engine} with O_DIRECT here: skipped");
            continue;
        };
        let (disk, count) = (Arc::new(disk), Arc::new(Polls::default()));
        let workers: Vec<_> = (0..32u64)
            .map(|n| {
                let (disk, count) = (disk.clone(), count.clone());
                tokio::spawn(async move {
                    for round in 0..16 {
                        let offset = (round * 32 + n) * 16384;
                        let data = IoBuf::from(vec![n as u8; 16384]);
                        count
                            .watch(disk.pwritev(offset, data, WriteFlags::empty()))
                            .await
                            .unwrap();
                        count.watch(disk.read(offset, 16384)).await.unwrap();
                    }
                    count.watch(disk.flush()).await.unwrap();
                })
            })
            .collect();
        for worker in workers {
            worker.await.unwrap();
        }
        count.watch(disk.close()).await.unwrap();
        let (polls, slept) = (count.count(), count.slept());
        println!("{engine}, direct {direct}: {slept} of {polls} polls slept");
        // Threads may meet at a lock of the pool that is held for nanoseconds, and one of them sleep. A disk wait would be in every poll that
        // starts a request, and that is every second one at least.
        assert!(
            slept * 3 <= polls,
            "{engine}: {slept} of {polls} polls slept"
        );
    }
}
