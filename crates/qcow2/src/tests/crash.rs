// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rule: after a power cut at any point, every sector reads as one of the values it had since the last completed flush, and the image has leaks at
//! most. The method: random operations, several at a time, over a disk that logs writes and flushes; for many cuts, images that the cut could leave are
//! opened, checked and compared with what each sector may hold.
//!
//! Each test of an ordering rule is this one: INV QCOW2-ORD-1, INV QCOW2-ORD-2, INV QCOW2-ORD-3, INV QCOW2-ORD-4, INV QCOW2-ORD-5. See docs/TESTING.md for
//! how each was seen to fail.
//!
//! `BLOCKLAYER_CRASH_SEEDS` and `BLOCKLAYER_CRASH_CUTS` make it longer: how many runs, and how many cuts in each (`cargo xtask crash`).

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use blockcore::testing::{CrashDriver, Rng};
use blockcore::{Node, WriteFlags};

use super::{Shape, corruptions, fresh_image, open_on, read_all};

const SECTOR: usize = 512;
/// How many tasks change the disk at the same time, beside one that flushes.
const WRITERS: u64 = 3;
const STEPS: u64 = 14;

/// A change or a flush, with the places in the disk's log at which it was called and had ended.
#[derive(Clone, Copy, Debug)]
struct Event {
    /// Sectors; empty for a flush.
    first: usize,
    end: usize,
    value: u8,
    /// It may also have changed nothing (a discard).
    optional: bool,
    /// Times of call and end, on the test's own clock.
    called: u64,
    ended: u64,
    /// Entries in the log at those times.
    log_called: usize,
    log_ended: usize,
}

impl Event {
    fn touches(&self, sector: usize) -> bool {
        (self.first..self.end).contains(&sector)
    }
}

#[derive(Debug, Default)]
struct History {
    clock: u64,
    changes: Vec<Event>,
    flushes: Vec<Event>,
}

impl History {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// The values that a sector may read as after a cut at `cut`.
    fn allowed(&self, sector: usize, base: u8, cut: usize) -> BTreeSet<u8> {
        // What had ended when the last flush was called that ended before the cut is settled.
        let flushes = self.flushes.iter().filter(|f| f.log_ended <= cut);
        let settled = flushes.map(|f| f.called).max().unwrap_or(0);
        let here: Vec<&Event> = self.changes.iter().filter(|e| e.touches(sector)).collect();
        let covers = |later: &&&Event| later.ended < settled && !later.optional;
        let is_gone = |ended: u64| here.iter().filter(covers).any(|l| ended < l.called);
        let mut values: BTreeSet<u8> = here
            .iter()
            .filter(|e| e.log_called <= cut && !is_gone(e.ended))
            .map(|e| e.value)
            .collect();
        if !is_gone(0) {
            values.insert(base);
        }
        values
    }
}

struct Disk {
    node: Arc<Node>,
    disk: CrashDriver,
    sectors: usize,
    cluster_sectors: u64,
    history: Mutex<History>,
}

impl Disk {
    fn begin(&self, first: usize, end: usize, value: u8) -> Event {
        let called = self.history.lock().unwrap().tick();
        Event {
            first,
            end,
            value,
            optional: false,
            called,
            ended: u64::MAX,
            log_called: self.disk.log_len(),
            log_ended: usize::MAX,
        }
    }

    fn end(&self, event: &mut Event) {
        event.ended = self.history.lock().unwrap().tick();
        event.log_ended = self.disk.log_len();
    }

    async fn change(&self, rng: &mut Rng, value: u8) {
        let first = rng.below(self.sectors as u64) as usize;
        let count = (1 + rng.below(2 * self.cluster_sectors) as usize).min(self.sectors - first);
        let (offset, bytes) = ((first * SECTOR) as u64, (count * SECTOR) as u64);
        let mut event = self.begin(first, first + count, value);
        match rng.below(8) {
            0..5 => {
                let data = vec![value; bytes as usize];
                let none = WriteFlags::empty();
                self.node.pwritev(offset, data.into(), none).await.unwrap();
            }
            5..7 => {
                event.value = 0;
                let unmap = WriteFlags::MAY_UNMAP;
                self.node.pwrite_zeroes(offset, bytes, unmap).await.unwrap();
            }
            _ => {
                (event.value, event.optional) = (0, true);
                self.node.pdiscard(offset, bytes).await.unwrap();
            }
        }
        self.end(&mut event);
        self.history.lock().unwrap().changes.push(event);
    }

    async fn flush(&self) {
        let mut event = self.begin(0, 0, 0);
        self.node.flush().await.unwrap();
        self.end(&mut event);
        self.history.lock().unwrap().flushes.push(event);
    }
}

async fn work(disk: Arc<Disk>, mut rng: Rng, writer: Option<u64>) {
    for step in 0..STEPS {
        for _ in 0..rng.below(6) {
            tokio::task::yield_now().await;
        }
        match writer {
            Some(number) => {
                let value = (1 + number * STEPS + step) as u8;
                disk.change(&mut rng, value).await;
            }
            None => disk.flush().await,
        }
    }
}

async fn run(seed: u64, cuts: u64) {
    let mut rng = Rng::new(seed);
    let cluster_bits = 9 + rng.below(4) as u32;
    let sectors = 24 + rng.below(100) as usize;
    let shape = Shape {
        size: (sectors * SECTOR) as u64,
        cluster_bits,
        version: 3,
        refcount_order: rng.below(7) as u32,
    };
    let backing = rng.chance(60).then(|| {
        let len = rng.below(sectors as u64 + 1) as usize;
        (0..len)
            .flat_map(|s| [200 + (s % 50) as u8; SECTOR])
            .collect::<Vec<u8>>()
    });
    let disk = CrashDriver::new(fresh_image(shape));
    let (node, _image) = open_on(disk.clone(), backing.clone()).await;
    let base = |s: usize| {
        let byte = backing.as_ref().and_then(|b| b.get(s * SECTOR));
        byte.copied().unwrap_or(0)
    };
    let shared = Arc::new(Disk {
        node,
        disk: disk.clone(),
        sectors,
        cluster_sectors: 1 << (cluster_bits - 9),
        history: Mutex::default(),
    });
    let flusher = work(shared.clone(), Rng::new(rng.next_u64()), None);
    let mut tasks = vec![tokio::spawn(flusher)];
    // One writer alone now and then: then every order is the order of the calls.
    for writer in 0..1 + rng.below(WRITERS) {
        let writer = work(shared.clone(), Rng::new(rng.next_u64()), Some(writer));
        tasks.push(tokio::spawn(writer));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let history = std::mem::take(&mut *shared.history.lock().unwrap());
    for _ in 0..cuts {
        let cut = rng.below(disk.log_len() as u64 + 1) as usize;
        let keep = [0, 30, 50, 90, 100][rng.below(5) as usize];
        let image = disk.image_after(cut, keep, &mut rng);
        let at = format!("seed {seed} cut {cut} keep {keep}");
        assert_eq!(
            corruptions(image.clone()).await,
            Vec::<String>::new(),
            "{at}"
        );
        let (left, _) = open_on(CrashDriver::new(image), backing.clone()).await;
        let now = read_all(&left).await;
        for s in 0..sectors {
            let sector = &now[s * SECTOR..(s + 1) * SECTOR];
            let allowed = history.allowed(s, base(s), cut);
            assert!(
                sector.iter().all(|b| *b == sector[0]) && allowed.contains(&sector[0]),
                "{at}: sector {s} reads {} and may read {allowed:?}",
                sector[0]
            );
        }
    }
}

fn from_env(name: &str, default: u64) -> u64 {
    let value = std::env::var(name).ok();
    value.and_then(|v| v.parse().ok()).unwrap_or(default)
}

#[tokio::test]
async fn a_power_cut_loses_nothing_that_was_flushed_and_shows_nothing_foreign() {
    let seed = Rng::seed_from_env();
    let (seeds, cuts) = (
        from_env("BLOCKLAYER_CRASH_SEEDS", 60),
        from_env("BLOCKLAYER_CRASH_CUTS", 60),
    );
    for i in 0..seeds {
        run(seed.wrapping_add(i), cuts).await;
    }
    println!("{} cuts over {seeds} seeds", seeds * cuts);
}
