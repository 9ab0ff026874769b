// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every engine, with and without O_DIRECT, gives the same bytes: a random sequence of unaligned, scattered requests against a byte vector.

mod common;

use blockcore::buffer::BufferPool;
use blockcore::{IoBuf, IoBufMut, OpenOptions, ReadFlags, WriteFlags};
use bytes::Bytes;
use common::Disk;
use futures::future::try_join_all;

/// A small generator of random numbers, so that a seed says everything.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

const DISK_BYTES: u64 = 1 << 20;

/// Bytes in several pieces whose addresses are aligned to nothing.
fn scattered(bytes: &[u8], rng: &mut Rng) -> IoBuf {
    let mut out = IoBuf::default();
    let mut rest = bytes;
    while !rest.is_empty() {
        let n = (1 + rng.below(9000) as usize).min(rest.len());
        let mut piece = vec![0; 3];
        piece.extend(&rest[..n]);
        out.push(Bytes::from(piece).slice(3..));
        rest = &rest[n..];
    }
    out
}

async fn random_requests(aio: &'static str, direct: bool, seed: u64) {
    eprintln!("aio {aio} direct {direct} seed {seed}");
    let disk = Disk::create("1M").await;
    let options = OpenOptions::new()
        .option("file.aio", aio)
        .direct(direct)
        .unmap(true);
    let backend = disk.open(options).await;
    let mut rng = Rng(seed);
    let mut model = vec![0u8; DISK_BYTES as usize];
    for step in 0..300 {
        let at = rng.below(DISK_BYTES);
        let n = 1 + rng.below((DISK_BYTES - at).min(60_000));
        let range = at as usize..(at + n) as usize;
        match rng.below(5) {
            0 | 1 => {
                // Several at a time go another way than one alone.
                let data = vec![1 + (step % 250) as u8; n as usize];
                let piece = n.div_ceil(1 + rng.below(4)) as usize;
                let writes: Vec<_> = (at..)
                    .step_by(piece)
                    .zip(data.chunks(piece))
                    .map(|(at, data)| {
                        backend.pwritev(at, scattered(data, &mut rng), WriteFlags::empty())
                    })
                    .collect();
                try_join_all(writes).await.unwrap();
                model[range].fill(data[0]);
            }
            2 => {
                let flags = match rng.below(2) {
                    0 => WriteFlags::empty(),
                    _ => WriteFlags::MAY_UNMAP,
                };
                backend.pwrite_zeroes(at, n, flags).await.unwrap();
                model[range].fill(0);
            }
            3 => backend.flush().await.unwrap(),
            _ => {
                let mut buf = IoBufMut::from(vec![9; n as usize / 2]);
                buf.append(IoBufMut::from(vec![9; n as usize - n as usize / 2]));
                let read = backend.preadv(at, buf, ReadFlags::empty()).await.unwrap();
                assert!(read.to_vec() == model[range], "step {step} at {at} + {n}");
            }
        }
    }
    let blocks = (0..DISK_BYTES / 4096).map(|i| backend.read(i * 4096, 4096));
    let all = try_join_all(blocks).await.unwrap();
    backend.close().await.unwrap();
    let all: Vec<u8> = all.iter().flat_map(IoBufMut::to_vec).collect();
    assert!(all == model, "read back");
    assert!(
        std::fs::read(&disk.path).unwrap() == model,
        "the host's file"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_engines_agree_with_a_model() {
    for (aio, direct) in [
        ("threads", false),
        ("threads", true),
        ("io_uring", false),
        ("io_uring", true),
        ("native", true),
    ] {
        random_requests(aio, direct, 0x5eed_1234).await;
    }
}

/// The same where the runtime works the ring itself.
#[tokio::test]
async fn a_runtime_of_one_thread_can_work_the_ring() {
    raw::use_this_runtime().unwrap();
    random_requests("io_uring", true, 0x5eed_5678).await;
    random_requests("io_uring", false, 0x5eed_5679).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_runtime_of_several_threads_can_work_the_ring() {
    raw::use_this_runtime().unwrap();
    let some = (0..4).map(|i| tokio::spawn(random_requests("io_uring", true, 0x5eed_9abc + i)));
    try_join_all(some).await.unwrap();
}

/// A runtime that shuts down with requests in the kernel waits for them: their memory is its own till then.
#[test]
fn a_runtime_that_works_the_ring_can_shut_down_in_the_middle() {
    for round in 0..20 {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let disk = runtime.block_on(async {
            raw::use_this_runtime().unwrap();
            let disk = Disk::create("4M").await;
            let backend = disk.open(OpenOptions::new().direct(true)).await;
            for i in 0..4 {
                let data = IoBuf::from(vec![7u8; 1 << 20]);
                let write = backend.pwritev(i << 20, data, WriteFlags::empty());
                let mut write = std::pin::pin!(write);
                assert!(futures::poll!(write.as_mut()).is_pending());
            }
            if round % 2 == 0 {
                tokio::task::yield_now().await;
            }
            disk
        });
        drop(runtime);
        drop(disk);
    }
}

/// The file ends inside a block of O_DIRECT: reads stop there, and what is behind is zero.
#[tokio::test]
async fn a_file_that_ends_inside_a_block_reads_as_zeroes_behind_its_end() {
    for aio in ["threads", "io_uring"] {
        let disk = Disk::create("0").await;
        std::fs::write(&disk.path, vec![5u8; 1000]).unwrap();
        for direct in [false, true] {
            let backend = disk
                .open(OpenOptions::new().option("file.aio", aio).direct(direct))
                .await;
            assert_eq!(backend.length(), 1024);
            let mut want = vec![5u8; 1000];
            want.extend([0; 24]);
            assert_eq!(backend.read(0, 1024).await.unwrap().to_vec(), want);
            backend.close().await.unwrap();
        }
    }
}

#[tokio::test]
async fn native_aio_without_direct_is_refused() {
    let disk = Disk::create("1M").await;
    let opened = OpenOptions::new()
        .format("raw")
        .option("file.aio", "native")
        .open(&common::registry(), disk.name())
        .await;
    assert_eq!(
        opened.unwrap_err().text(),
        "aio=native was specified, but it requires cache.direct=on, which was not specified."
    );
}

/// A dropped read leaves its memory to the kernel; what is written to the file meanwhile, and later reads, are right.
#[tokio::test]
async fn dropped_reads_harm_nobody() {
    let disk = Disk::create("16M").await;
    let backend = disk.open(OpenOptions::new().direct(true)).await;
    let data = IoBuf::from(vec![7u8; 1 << 20]);
    for i in 0..16 {
        backend
            .pwritev(i << 20, data.clone(), WriteFlags::empty())
            .await
            .unwrap();
    }
    let mut dropped_under_way = 0;
    for round in 0..200u64 {
        let read = backend.read((round % 16) << 20, 1 << 20);
        let mut read = std::pin::pin!(read);
        dropped_under_way += u32::from(futures::poll!(read.as_mut()).is_pending());
    }
    assert!(dropped_under_way > 0, "every read was over at once");
    assert_eq!(
        backend.read(3 << 20, 4096).await.unwrap().to_vec(),
        vec![7; 4096]
    );
    backend.close().await.unwrap();
}

/// Writes to the page cache that are given up, several at a time, are over before a later one to the same bytes.
#[tokio::test]
async fn dropped_writes_never_come_after_later_ones() {
    const BYTES: u64 = 64 << 10;
    let disk = Disk::create("1M").await;
    let backend = disk.open(OpenOptions::new()).await;
    let mut given_up = 0;
    for round in 0..100u8 {
        let write = |i: u64, byte: u8| {
            let data = IoBuf::from(vec![byte; BYTES as usize]);
            backend.pwritev(i * BYTES, data, WriteFlags::empty())
        };
        {
            let mut old: Vec<_> = (0..8).map(|i| Box::pin(write(i, 1))).collect();
            for write in &mut old {
                given_up += u32::from(futures::poll!(write.as_mut()).is_pending());
            }
        }
        try_join_all((0..8).map(|i| write(i, 2 + round)))
            .await
            .unwrap();
        let all = backend.read(0, 8 * BYTES as usize).await.unwrap().to_vec();
        assert!(all.iter().all(|b| *b == 2 + round), "round {round}");
    }
    assert!(given_up > 0, "every write was over at once");
    backend.close().await.unwrap();
}

/// Memory that comes back from a read that was given up has come back for good: whoever has it next finds in it what he puts there, whatever the kernel is still doing.
#[tokio::test]
async fn memory_that_came_back_is_no_longer_written_to() {
    const BYTES: usize = 1 << 20;
    let disk = Disk::create("16M").await;
    let plain = disk.open(OpenOptions::new()).await;
    let data = IoBuf::from(vec![7u8; 16 * BYTES]);
    plain.pwritev(0, data, WriteFlags::empty()).await.unwrap();
    plain.close().await.unwrap();
    for (aio, direct) in [("threads", false), ("threads", true), ("io_uring", true)] {
        let options = OpenOptions::new().option("file.aio", aio).direct(direct);
        let backend = disk.open(options).await;
        let pool = BufferPool::new(BYTES);
        let mut given_up = 0;
        let mut mine = Vec::new();
        for round in 0..64u64 {
            {
                let read = backend.preadv((round % 16) << 20, pool.take(BYTES), ReadFlags::empty());
                let mut read = std::pin::pin!(read);
                given_up += u32::from(futures::poll!(read.as_mut()).is_pending());
            }
            let mut next = pool.take(BYTES);
            next.fill(0xab);
            mine.push(next);
            if round % 8 == 7 {
                // Time for the kernel to do harm.
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                for buffer in mine.drain(..) {
                    assert!(buffer.to_vec().iter().all(|b| *b == 0xab), "aio {aio}");
                }
            }
        }
        assert!(given_up > 0, "aio {aio}: every read was over at once");
        backend.close().await.unwrap();
    }
}
