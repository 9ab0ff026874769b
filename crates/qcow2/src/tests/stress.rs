// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rule: requests that touch different bytes never harm each other, however close they lie, and whichever of them are dropped half way. The method: several
//! tasks on a multi-thread runtime own every n-th sector, so that each cluster belongs to all of them; each writes, zeroes, discards and reads back its own
//! sectors, and flushes; one task writes, discards and packs clusters that nobody else uses, so that clusters are freed and handed out again; and one takes
//! and deletes snapshots, saves VM state, changes refcounts and the length, and checks.
//!
//! Of every kind of request about a third are dropped a little after they have begun (INV REQ-DROP-1): by who polls them, or by another task, on whatever thread that
//! is. The file takes its time, so that most are under way then: how many were, is counted, and it must be a third at least.
//!
//! `BLOCKLAYER_STRESS_RUNS` says how many runs, `BLOCKLAYER_STRESS_SECONDS` for how long there are new ones (`cargo xtask drop`).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blockcore::testing::{CrashDriver, DelayDriver, Rng, given_up_after};
use blockcore::{
    CheckFix, ErrorKind, IoBufMut, Node, NodeFlags, Options, Result, SnapshotRequest,
    SnapshotSelector, StatusFlags, StatusMode, TruncateRequest, WriteFlags, chain_status,
};

use super::{Shape, findings, fresh_image, open_on, open_over, read_all};
use crate::crypto::CryptMethod;

const OWNERS: u64 = 7;
const SECTOR: u64 = 512;
/// Bytes of what the owners share, and of what is the discarder's, which comes after it. What lies behind that is nobody's.
const HALF: u64 = 256 << 10;

/// Where on the disk the clusters lie that are used.
#[derive(Clone, Copy)]
struct Layout {
    /// In bytes.
    cluster: u64,
    /// Of so many clusters one is used.
    gap: u64,
}

impl Layout {
    /// The place of a byte of those that are used.
    fn place(self, byte: u64) -> u64 {
        byte / self.cluster * self.cluster * self.gap + byte % self.cluster
    }

    fn end(self) -> u64 {
        self.place(2 * HALF)
    }
}

/// How many requests of each kind were to be dropped, and how many of them were under way then.
#[derive(Default)]
struct Tally(Mutex<BTreeMap<&'static str, (u32, u32)>>);

impl Tally {
    fn add(&self, kind: &'static str, dropped: bool) {
        let mut all = self.0.lock().unwrap();
        let (tried, were_under_way) = all.entry(kind).or_default();
        *tried += 1;
        *were_under_way += u32::from(dropped);
    }

    /// Says what was dropped, and that it was enough.
    fn check(&self) {
        let all = self.0.lock().unwrap();
        let sum = |of: fn(&(u32, u32)) -> u32| all.values().map(of).sum::<u32>();
        let (tried, dropped) = (sum(|n| n.0), sum(|n| n.1));
        println!("requests that were to be dropped, and those of them that were under way:");
        println!("all: {tried}, {dropped}");
        for (kind, (tried, dropped)) in &*all {
            println!("{kind}: {tried}, {dropped}");
        }
        assert!(3 * dropped >= tried, "{dropped} of {tried} were under way");
    }
}

/// Who makes requests, and drops some.
struct Worker {
    node: Arc<Node>,
    layout: Layout,
    rng: Rng,
    tally: Arc<Tally>,
}

impl Worker {
    /// Makes a request. `None`: it was dropped.
    async fn request<T: Send + 'static>(
        &mut self,
        kind: &'static str,
        request: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Option<Result<T>> {
        if !self.rng.chance(33) {
            return Some(request.await);
        }
        let has_begun = Arc::new(AtomicBool::new(false));
        let begun = has_begun.clone();
        let request = async move {
            begun.store(true, Ordering::Relaxed);
            request.await
        };
        // Rather early than late.
        let turns = self.rng.below(16);
        let turns = self.rng.below(1 + turns);
        let done = if self.rng.chance(50) {
            given_up_after(1 + turns as u32, request).await
        } else {
            let task = tokio::spawn(request);
            while !has_begun.load(Ordering::Relaxed) {
                tokio::task::yield_now().await;
            }
            for _ in 0..turns {
                tokio::task::yield_now().await;
            }
            task.abort();
            match task.await {
                Err(e) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
                done => done.ok(),
            }
        };
        self.tally.add(kind, done.is_none());
        done
    }

    /// The same, where nothing can go wrong.
    async fn sound<T: Send + 'static>(
        &mut self,
        kind: &'static str,
        request: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Option<T> {
        self.request(kind, request).await.map(Result::unwrap)
    }

    /// The value of a range that belongs to this task, on the spot if that is possible.
    async fn value(&self, offset: u64, bytes: u64) -> u8 {
        let mut data = vec![0xee; bytes as usize];
        if !self.node.read_nowait(offset, &mut data) {
            let buf = IoBufMut::zeroed(bytes as usize);
            let read = self.node.preadv(offset, buf, Default::default());
            data = read.await.unwrap().to_vec();
        }
        assert!(data.iter().all(|b| *b == data[0]), "torn at {offset:#x}");
        data[0]
    }

    /// What a range holds after a request that would have made `new` of it, and may not have: that is settled, and stays.
    async fn settled(&self, (offset, bytes): (u64, u64), known: u8, new: u8) -> u8 {
        let now = self.value(offset, bytes).await;
        assert!(
            now == known || now == new,
            "{now} at {offset:#x}, where {known} was and {new} may be"
        );
        now
    }

    /// Does something to a sector, or cluster, of this task's that reads `known`; gives back how it reads now.
    async fn change_or_look(&mut self, place: (u64, u64), known: u8, new: u8) -> u8 {
        let (offset, bytes) = place;
        let node = self.node.clone();
        let data = vec![new; bytes as usize];
        let zero_flags = [WriteFlags::empty(), WriteFlags::MAY_UNMAP][self.rng.below(2) as usize];
        let (value, done) = match self.rng.below(12) {
            0..4 => {
                let flags = [WriteFlags::empty(), WriteFlags::FUA];
                let flags = flags[usize::from(self.rng.chance(10))];
                let write = async move { node.pwritev(offset, data.into(), flags).await };
                (new, self.sound("write", write).await)
            }
            4..7 => {
                let zero = async move { node.pwrite_zeroes(offset, bytes, zero_flags).await };
                (0, self.sound("zero write", zero).await)
            }
            7 => {
                let discard = async move { node.pdiscard(offset, bytes).await };
                self.sound("discard", discard).await;
                // Done or not: it is a hint.
                (0, None)
            }
            8 => {
                let flush = async move { node.flush().await };
                self.sound("flush", flush).await;
                (known, Some(()))
            }
            9 => {
                let status = async move {
                    chain_status(&node, None, offset, bytes, StatusMode::Precise).await
                };
                if let Some(found) = self.sound("block status", status).await {
                    let is_zero = found.status.flags.contains(StatusFlags::ZERO);
                    assert!(!is_zero || known == 0, "{known} at {offset:#x} is no zero");
                }
                (known, Some(()))
            }
            _ => {
                let buf = IoBufMut::zeroed(bytes as usize);
                let read = async move { node.preadv(offset, buf, Default::default()).await };
                if let Some(read) = self.sound("read", read).await {
                    assert_eq!(read.to_vec(), vec![known; bytes as usize], "{offset:#x}");
                }
                (known, Some(()))
            }
        };
        match done {
            Some(()) => value,
            None => self.settled(place, known, value).await,
        }
    }

    /// Writes a cluster compressed, where nothing is.
    async fn pack(&mut self, place: (u64, u64), known: u8, new: u8) -> u8 {
        let (offset, bytes) = place;
        let node = self.node.clone();
        let discard = async move { node.pdiscard(offset, bytes).await };
        let is_free = self.sound("discard", discard).await.is_some();
        let known = self.settled(place, known, 0).await;
        let node = self.node.clone();
        let data = vec![new; bytes as usize].into();
        let pack = async move { node.pwritev_compressed(offset, data).await };
        match self.request("compressed write", pack).await {
            Some(Ok(())) => new,
            None => self.settled(place, known, new).await,
            // Compressed data never takes the place of other data.
            Some(Err(e)) if e.errno() == libc::EIO && !is_free => known,
            Some(Err(e)) => panic!("{e}"),
        }
    }
}

/// What ranges of the disk should hold at the end.
type Expected = Vec<(u64, u64, u8)>;

/// Uses clusters of the second half.
async fn free_and_take(mut worker: Worker) -> Expected {
    let layout = worker.layout;
    let cluster = layout.cluster;
    let at = |index: u64| layout.place(HALF + index * cluster);
    let mut values = vec![0u8; (HALF / cluster) as usize];
    for step in 0..150u8 {
        let index = worker.rng.below(values.len() as u64);
        let place = (at(index), cluster);
        let known = &mut values[index as usize];
        *known = match worker.rng.chance(25) {
            true => worker.pack(place, *known, step + 1).await,
            false => worker.change_or_look(place, *known, step + 1).await,
        };
    }
    let place = |(i, v): (usize, u8)| (at(i as u64), cluster, v);
    values.into_iter().enumerate().map(place).collect()
}

/// Changes the image as a whole.
async fn change_all(mut worker: Worker) {
    for number in 0..12u8 {
        let node = worker.node.clone();
        match worker.rng.below(6) {
            0 => {
                let bits = ["16", "32", "64"][worker.rng.below(3) as usize];
                let options = Options::new().with("refcount_bits", bits);
                let amend = async move { node.amend(options).await };
                worker.sound("amendment", amend).await;
            }
            1 => {
                let check = async move { node.check(CheckFix::All).await };
                if let Some(found) = worker.sound("check", check).await {
                    // What dropped requests have left behind may be unused.
                    let harm = found.corruptions + found.check_errors;
                    assert_eq!(harm, 0, "{:?}", found.messages);
                }
            }
            2 => {
                let state = vec![number; 3000];
                let data = state.clone().into();
                let save = async move { node.save_vmstate(100, data).await };
                let saved = worker.sound("write of VM state", save).await;
                let node = worker.node.clone();
                let load = async move { node.load_vmstate(100, IoBufMut::zeroed(3000)).await };
                let loaded = worker.sound("read of VM state", load).await;
                if let (Some(()), Some(loaded)) = (saved, loaded) {
                    assert!(loaded.to_vec() == state);
                }
            }
            3 => {
                let bytes = worker.layout.end() + worker.rng.below(100) * SECTOR;
                let resize = async move { node.truncate(TruncateRequest::to(bytes)).await };
                if worker.sound("change of length", resize).await.is_some() {
                    assert_eq!(worker.node.length(), bytes);
                }
            }
            _ => {
                let request = SnapshotRequest::now(format!("s{number}"));
                let create = async move { node.snapshot_create(request).await };
                worker.sound("taking a snapshot", create).await;
            }
        }
        tokio::time::sleep(Duration::from_millis(worker.rng.below(3))).await;
        let all = worker.node.snapshots().await.unwrap();
        if let Some(first) = all.first().filter(|_| worker.rng.chance(60)) {
            let (node, which) = (
                worker.node.clone(),
                SnapshotSelector::IdOrName(first.id.clone()),
            );
            let delete = async move { node.snapshot_delete(which).await };
            match worker.request("deleting a snapshot", delete).await {
                None | Some(Ok(())) => {}
                // It was on its way when the list was made: who dropped it doesn't know.
                Some(Err(e)) if e.kind() == ErrorKind::NotFound => {}
                Some(Err(e)) => panic!("{e}"),
            }
        }
    }
}

async fn own_sectors(mut worker: Worker, owner: u64) -> Expected {
    let mut values = vec![0u8; (HALF / SECTOR / OWNERS) as usize];
    let layout = worker.layout;
    let at = |index: u64| layout.place((index * OWNERS + owner) * SECTOR);
    for step in 0..400u32 {
        let index = worker.rng.below(values.len() as u64);
        let known = &mut values[index as usize];
        let new = (step % 255) as u8 + 1;
        *known = worker
            .change_or_look((at(index), SECTOR), *known, new)
            .await;
    }
    let place = |(i, v): (usize, u8)| (at(i as u64), SECTOR, v);
    values.into_iter().enumerate().map(place).collect()
}

async fn run(seed: u64, tally: &Arc<Tally>) {
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let extended_l2 = rng.chance(40);
    let smallest = if extended_l2 { 14 } else { 10 };
    let cluster_bits = smallest + rng.below(5) as u32;
    let layout = Layout {
        cluster: 1 << cluster_bits,
        gap: [1, 64][rng.below(2) as usize],
    };
    let shape = Shape {
        size: layout.end(),
        cluster_bits,
        version: 3,
        refcount_order: 4,
        extended_l2,
        encryption: CryptMethod::None,
    };
    let backing = rng.chance(50).then(|| vec![0u8; (HALF / 2) as usize]);
    let disk = CrashDriver::new(fresh_image(shape));
    // Now and then one that is quick, and may be read without a wait.
    let turns = [1, 8, 24, 24][rng.below(4) as usize];
    let file = match turns {
        1 => disk.clone().into_node(NodeFlags::default()).await,
        _ => {
            let slow = DelayDriver::by_turns(Box::new(disk.clone()), seed, turns);
            slow.into_node(NodeFlags::default()).await
        }
    };
    let (node, image) = open_over(file.unwrap(), backing.clone()).await.unwrap();
    if rng.chance(60) {
        // Tables have to be read again and again, the more so where clusters lie far from each other.
        let mut runtime = image.runtime().clone();
        (runtime.slice_bytes_bits, runtime.l2_cache_bytes) = (9, 1024);
        image.prepare_runtime(&runtime).await.unwrap();
        image.set_runtime(runtime);
    }
    let worker = |number: u64| Worker {
        node: node.clone(),
        layout,
        rng: Rng::new(seed ^ (number << 32)),
        tally: tally.clone(),
    };
    let mut workers: Vec<_> = (0..OWNERS)
        .map(|owner| tokio::spawn(own_sectors(worker(owner + 1), owner)))
        .collect();
    workers.push(tokio::spawn(free_and_take(worker(OWNERS + 1))));
    let manager = rng.chance(70);
    let manager = manager.then(|| tokio::spawn(change_all(worker(OWNERS + 2))));
    let mut expected = Vec::new();
    for worker in workers {
        expected.extend(worker.await.unwrap());
    }
    if let Some(manager) = manager {
        manager.await.unwrap();
    }
    let all = read_all(&node).await;
    for &(offset, bytes, value) in &expected {
        let range = &all[offset as usize..(offset + bytes) as usize];
        assert!(
            range.iter().all(|b| *b == value),
            "seed {seed}: what is at {offset:#x} should be {value}"
        );
    }
    blockcore::BlockDriver::close(node.driver()).await.unwrap();
    assert_eq!(image.tasks.count(), 0);
    assert_eq!(
        findings(disk.snapshot()).await,
        Vec::<String>::new(),
        "seed {seed}"
    );
    let (again, _image) = open_on(disk, backing).await;
    assert_eq!(read_all(&again).await, all, "seed {seed}: opened again");
}

fn from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn neighbours_in_one_cluster_never_harm_each_other() {
    let seed = Rng::seed_from_env();
    let end = from_env("BLOCKLAYER_STRESS_SECONDS").map(Duration::from_secs);
    let runs = match (from_env("BLOCKLAYER_STRESS_RUNS"), end) {
        (Some(runs), _) => runs,
        (None, Some(_)) => u64::MAX,
        (None, None) => 20,
    };
    let (begin, tally) = (Instant::now(), Arc::default());
    let mut done = 0;
    while done < runs && end.is_none_or(|end| begin.elapsed() < end) {
        run(seed.wrapping_add(done), &tally).await;
        done += 1;
    }
    println!("{done} runs");
    tally.check();
}
