// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rule: after a power cut at any point, every sector reads as one of the values it had since the last completed flush, and the image has leaks at
//! most. The method: random plans (`torture`) over a disk that logs writes and flushes: fresh, backed and snapshotted images, several requests at a time,
//! some of them dropped, some meeting with errors, on a disk that takes random times; for many cuts, images that the cut could leave are opened, checked
//! and compared with what each sector may hold. A plan that fails is made as short as it gets, and shown.
//!
//! Each test of an ordering rule is this one: INV QCOW2-ORD-1, INV QCOW2-ORD-2, INV QCOW2-ORD-3, INV QCOW2-ORD-4, INV QCOW2-ORD-5, INV QCOW2-ORD-6. See docs/TESTING.md for
//! how each was seen to fail.
//!
//! `BLOCKLAYER_CRASH_SEEDS` and `BLOCKLAYER_CRASH_CUTS` make it longer: how many runs, and how many cuts in each (`cargo xtask crash`). `BLOCKLAYER_CRASH_TRIES`
//! is how many plans that may be simpler are tried.

use std::ops::Range;

use blockcore::testing::Rng;
use blockcore::testing::fault::{Event, Rule};
use blockcore::{CheckFix, Preallocation, WriteFlags};

use super::history::SECTOR;
use super::torture::{Drop, Op, Plan, Step};
use super::{Backing, DataFileKind, Shape, kept};
use crate::crypto::CryptMethod;

/// How many tasks change the disk at the same time, beside one that flushes.
const WRITERS: u64 = 3;
const STEPS: u64 = 14;

fn some_range(rng: &mut Rng, end: usize, most: usize) -> Range<usize> {
    let first = rng.below(end as u64) as usize;
    let count = 1 + rng.below(most as u64) as usize;
    first..(first + count).min(end)
}

fn some_encryption(rng: &mut Rng) -> CryptMethod {
    match rng.below(8) {
        0 => CryptMethod::Aes,
        1 => CryptMethod::Luks,
        _ => CryptMethod::None,
    }
}

/// A shape of at least some sectors.
fn some_shape(rng: &mut Rng, least: u64) -> Shape {
    let version = if rng.chance(20) { 2 } else { 3 };
    if version == 3 && rng.chance(30) {
        return Shape {
            refcount_order: rng.below(7) as u32,
            cluster_bits: 14 + rng.below(3) as u32,
            encryption: some_encryption(rng),
            ..Shape::extended((least + rng.below(250)) * 512)
        };
    }
    // Small clusters, so that there are many; now and then those that most images have.
    let (cluster_bits, more) = match rng.below(20) {
        0 => (16, 400),
        _ => (9 + rng.below(5) as u32, 100),
    };
    Shape {
        size: (least + rng.below(more)) * 512,
        cluster_bits,
        version,
        refcount_order: if version == 2 { 4 } else { rng.below(7) as u32 },
        extended_l2: false,
        encryption: some_encryption(rng),
    }
}

/// Writes to a disk of so many bytes, in this unit.
fn some_writes(rng: &mut Rng, size: u64, unit: usize, value: u8) -> Vec<(Range<usize>, u8)> {
    let range = |rng: &mut Rng| some_range(rng, size as usize / unit, 30 * SECTOR / unit);
    let count = rng.below(5) as u8;
    (0..count).map(|i| (range(rng), value + i)).collect()
}

/// What lies below a disk of so many bytes. A raw file ends at any place in this unit.
async fn some_backing(rng: &mut Rng, size: u64, unit: usize) -> Backing {
    let mut backing = Backing::default();
    if rng.chance(50) {
        let count = rng.below((size as usize + 10 * SECTOR) as u64 / unit as u64);
        let value = |place: u64| 200 + (place * unit as u64 / SECTOR as u64 % 40) as u8;
        let raw = (0..count).flat_map(|place| vec![value(place); unit]);
        backing.raw = Some(raw.collect());
    }
    for _ in 0..[0, 0, 1, 2][rng.below(4) as usize] {
        let shape = some_shape(rng, 1);
        let layer = Plan {
            backing: backing.clone(),
            filled: some_writes(rng, shape.size, SECTOR, 180),
            ..Plan::over(shape)
        };
        backing.layers.push(layer.prepared().await);
    }
    backing
}

fn some_fault(rng: &mut Rng) -> Rule {
    let errno = [libc::EIO, libc::ENOSPC][rng.below(2) as usize];
    let nth = rng.below(80) as u32;
    match rng.below(6) {
        0 => Rule::fail_all(errno).not_before(nth),
        2 => Rule::tear_all(errno).not_before(nth),
        3 => Rule::tear_all(errno).only(nth),
        1 => Rule::fail(Event::Flush, errno).only(nth / 8),
        _ => Rule::fail_all(errno).only(nth),
    }
}

async fn some_plan(rng: &mut Rng) -> Plan {
    let mut shape = some_shape(rng, 24);
    if rng.below(500) == 0 && !shape.extended_l2 {
        // As large as they get, two of them at most: looking at every sector takes its time.
        shape.cluster_bits = 21;
        shape.size += rng.below(2) << 21;
    }
    let unit = [SECTOR, SECTOR, 128, 64][rng.below(4) as usize];
    let clusters = shape.size >> shape.cluster_bits;
    let mut compressed: Vec<(u64, u8)> = Vec::new();
    let is_encrypted = shape.encryption != CryptMethod::None;
    let has_compressed = !is_encrypted && shape.cluster_bits <= 16;
    for value in 150..150 + rng.below(3) as u8 {
        let cluster = rng.below(clusters.max(1));
        if has_compressed && cluster < clusters && compressed.iter().all(|c| c.0 != cluster) {
            compressed.push((cluster, value));
        }
    }
    let data_file = match rng.below(6) {
        0 if shape.version > 2 => DataFileKind::Outside,
        1 if shape.version > 2 => DataFileKind::Raw,
        _ => DataFileKind::Inside,
    };
    let is_inside = data_file == DataFileKind::Inside;
    if !is_inside {
        compressed.clear();
    }
    let backing = match data_file {
        // What a backing disk shows would have to be in the file, too.
        DataFileKind::Raw => Backing::default(),
        _ => some_backing(rng, shape.size, unit).await,
    };
    let mut plan = Plan {
        backing,
        unit,
        filled: some_writes(rng, shape.size, unit, 120),
        compressed,
        snapshot: is_inside && shape.refcount_order > 0 && rng.chance(40),
        bitmap: shape.version > 2 && rng.chance(30),
        keeps_places: shape.version > 2 && rng.chance(20),
        data_file,
        punches_all: rng.chance(20),
        noise: rng.chance(25),
        nowait: rng.chance(30),
        reopens: rng.chance(40),
        delays: rng.chance(50).then(|| rng.next_u64()),
        file_alignment: [1, 1, 512, 4096][rng.below(4) as usize],
        ..Plan::over(shape)
    };
    if rng.chance(25) {
        plan.faults.push(some_fault(rng));
    }
    let drops = rng.chance(50);
    let mut steps = Steps {
        value: 0,
        end: shape.size as usize / unit,
        snapshots: 1,
    };
    for _ in 0..1 + rng.below(3) {
        let mut session = Vec::new();
        let writers = 1 + rng.below(WRITERS) as usize;
        for task in 0..=writers {
            for _ in 0..STEPS {
                let op = match task == writers {
                    true => Op::Flush,
                    false => steps.some_op(rng, &plan, task),
                };
                let drop = match rng.below(12) {
                    0 if drops => Drop::Rounds(rng.below(12) as u32),
                    1 if drops && plan.delays.is_some() => Drop::Millis(rng.below(300)),
                    _ => Drop::Never,
                };
                let pause = rng.below(6) as u32;
                session.push(Step {
                    task,
                    pause,
                    op,
                    drop,
                });
            }
        }
        plan.sessions.push(session);
    }
    plan
}

/// What random steps go by.
struct Steps {
    /// Of the last write.
    value: u8,
    /// How long the disk is at most, in the plan's unit.
    end: usize,
    /// The number of the last snapshot.
    snapshots: u32,
}

impl Steps {
    fn next_value(&mut self) -> u8 {
        self.value = self.value % 119 + 1;
        self.value
    }

    fn some_op(&mut self, rng: &mut Rng, plan: &Plan, task: usize) -> Op {
        let shape = plan.shape;
        let is_inside = plan.data_file == DataFileKind::Inside;
        let subcluster = shape.subcluster_sectors() as usize * SECTOR;
        let most = [2 << shape.cluster_bits, 3 * subcluster];
        let most = most[rng.below(2) as usize] / plan.unit;
        let range = some_range(rng, self.end, most);
        match rng.below(24) {
            0..10 => match rng.below(6) {
                0 if is_inside && shape.encryption == CryptMethod::None => {
                    Op::Pack(range, self.next_value())
                }
                1 => Op::WriteDurably(range, self.next_value()),
                _ => Op::Write(range, self.next_value()),
            },
            10..14 => {
                let flags = [
                    WriteFlags::MAY_UNMAP,
                    WriteFlags::empty(),
                    WriteFlags::NO_FALLBACK,
                    WriteFlags::NO_FALLBACK | WriteFlags::MAY_UNMAP,
                ];
                Op::Zero(range, flags[rng.below(4) as usize])
            }
            14 => Op::Discard(range),
            15 if task < 2 && is_inside && shape.refcount_order > 0 => match rng.below(4) {
                // With a bitmap there is no way back.
                0 if !plan.bitmap => Op::Goto(1 + rng.below(self.snapshots.into()) as u32),
                1 => Op::Delete(1 + rng.below(self.snapshots.into()) as u32),
                _ => {
                    self.snapshots += 1;
                    Op::Snapshot(self.snapshots)
                }
            },
            16 if task == 0 => self.some_length(rng, plan),
            17 if task == 0 => self.some_change_of_all(rng, plan),
            18 if is_inside => {
                // Encrypted, it can be reached by whole sectors alone.
                let step = match shape.encryption {
                    CryptMethod::None => 1,
                    _ => SECTOR / plan.unit,
                };
                let range = some_range(rng, kept::STATE_BYTES / plan.unit / step, most);
                let range = range.start * step..range.end * step;
                match rng.below(3) {
                    0 => Op::LoadState(range),
                    _ => Op::SaveState(range, self.next_value()),
                }
            }
            19 => Op::Status(range),
            _ => Op::Read(range),
        }
    }

    fn some_length(&mut self, rng: &mut Rng, plan: &Plan) -> Op {
        use Preallocation::{Falloc, Full, Metadata};
        let more = rng.below(60) as usize * SECTOR / plan.unit;
        match rng.below(4) {
            0 if !plan.bitmap => self.end = 1 + rng.below(self.end as u64) as usize,
            1 => {
                self.end += more;
                let mode = [Metadata, Falloc, Full][rng.below(3) as usize];
                return Op::Preallocate(self.end, mode);
            }
            _ => self.end += more,
        }
        Op::Resize(self.end)
    }

    fn some_change_of_all(&mut self, rng: &mut Rng, plan: &Plan) -> Op {
        let fix = [CheckFix::None, CheckFix::Leaks, CheckFix::All];
        match rng.below(8) {
            0..2 => Op::Width([1, 2, 4, 8, 16, 32, 64][rng.below(7) as usize]),
            // Bitmaps, and clusters that keep their place, are none of version 2's.
            2..5 if !plan.bitmap && !plan.keeps_places => Op::Version(2 + rng.below(2) as u32),
            _ => Op::Check(fix[rng.below(3) as usize]),
        }
    }
}

/// Plans that are simpler than this one in one respect each, those that are much simpler first.
fn simpler(plan: &Plan) -> Vec<Plan> {
    let mut out = Vec::new();
    let mut with = |change: &dyn Fn(&mut Plan)| {
        let mut simple = plan.clone();
        change(&mut simple);
        out.push(simple);
    };
    for i in 0..plan.sessions.len() {
        let steps = plan.sessions[i].len();
        if plan.sessions.len() > 1 {
            with(&|p| drop(p.sessions.remove(i)));
        }
        let mut chunk = steps.div_ceil(2);
        while chunk > 0 {
            for start in (0..steps).step_by(chunk) {
                let end = (start + chunk).min(steps);
                with(&|p| drop(p.sessions[i].drain(start..end)));
            }
            chunk /= 2;
        }
    }
    if plan.delays.is_some() {
        with(&|p| p.delays = None);
    }
    let switches: [fn(&mut Plan) -> &mut bool; 5] = [
        |p| &mut p.noise,
        |p| &mut p.keeps_places,
        |p| &mut p.punches_all,
        |p| &mut p.nowait,
        |p| &mut p.reopens,
    ];
    for switch in switches {
        if *switch(&mut plan.clone()) {
            with(&|p| *switch(p) = false);
        }
    }
    if plan.data_file != DataFileKind::Inside {
        with(&|p| p.data_file = DataFileKind::Inside);
    }
    if plan.snapshot {
        with(&|p| p.snapshot = false);
    }
    if plan.bitmap {
        with(&|p| p.bitmap = false);
    }
    if plan.keeps_places {
        with(&|p| p.keeps_places = false);
    }
    if !plan.backing.layers.is_empty() || plan.backing.raw.is_some() {
        with(&|p| p.backing = Backing::default());
    }
    if plan.file_alignment > 1 {
        with(&|p| p.file_alignment = 1);
    }
    for i in 0..plan.compressed.len() {
        with(&|p| {
            p.compressed.remove(i);
        });
    }
    for i in 0..plan.filled.len() {
        with(&|p| {
            p.filled.remove(i);
        });
    }
    for i in 0..plan.faults.len() {
        with(&|p| {
            p.faults.remove(i);
        });
    }
    out
}

/// The simplest plan that still fails, and how.
async fn shrunk(mut plan: Plan, mut why: String, cuts: u64) -> (Plan, String) {
    let mut tries = from_env("BLOCKLAYER_CRASH_TRIES", 1500);
    'simpler: loop {
        for candidate in simpler(&plan) {
            let Some(left) = tries.checked_sub(1) else {
                break 'simpler;
            };
            tries = left;
            if let Err(e) = candidate.run(4 * cuts, &mut Rng::new(1)).await {
                (plan, why) = (candidate, e);
                continue 'simpler;
            }
        }
        break;
    }
    (plan, why)
}

fn from_env(name: &str, default: u64) -> u64 {
    let value = std::env::var(name).ok();
    value.and_then(|v| v.parse().ok()).unwrap_or(default)
}

#[tokio::test(start_paused = true)]
async fn a_power_cut_loses_nothing_that_was_flushed_and_shows_nothing_foreign() {
    let seed = Rng::seed_from_env();
    let (seeds, cuts) = (
        from_env("BLOCKLAYER_CRASH_SEEDS", 60),
        from_env("BLOCKLAYER_CRASH_CUTS", 60),
    );
    for i in 0..seeds {
        let seed = seed.wrapping_add(i);
        let mut rng = Rng::new(seed);
        let plan = some_plan(&mut rng).await;
        if let Err(why) = plan.run(cuts, &mut rng).await {
            println!("seed {seed}: {why}; looking for a shorter way");
            let (mut plan, why) = shrunk(plan, why, cuts).await;
            // The bytes of the backing disks say nothing.
            let layers = plan.backing.layers.len();
            let raw = plan.backing.raw.as_ref().map(Vec::len);
            plan.backing = Backing::default();
            panic!("seed {seed}: {why}\nbacking: {raw:?} bytes of raw, {layers} layers\n{plan:#?}");
        }
    }
    println!("{} cuts over {seeds} seeds", seeds * cuts);
}
