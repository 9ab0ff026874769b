// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rule (INV REQ-DROP-1): a request may be dropped at any await point. What it asked for is done or not, and that is settled before anything that is
//! asked for later; nothing leaks, nothing hangs, and other requests come out right.
//!
//! The method: every kind of request is dropped after 0, 1, 2 ... rounds of the scheduler until it ends by itself, so at every place at which it, or the task
//! that works for it, can be found; alone and between other requests, which come after it to the same clusters or are under way beside it. Then the same with
//! the whole runtime: it ends at every request that reaches the file, and the image is used on in another one.
//!
//! `BLOCKLAYER_DROP_STEP`: on a disk that takes its time (at most 200 ms for a request), how many milliseconds lie between two places (`cargo xtask drop`).

use blockcore::testing::fault::{Event, Rule};
use blockcore::testing::{CrashDriver, FaultDriver, MemoryDriver, Rng, given_up_after};
use blockcore::{
    CheckFix, IoBufMut, Preallocation, ReadFlags, SnapshotRequest, SnapshotSelector,
    TruncateRequest, WriteFlags,
};

use super::torture::{BitmapOp, Drop, Op, Plan, Step};
use super::{
    Backing, DataFileKind, READ_ONLY, Shape, fresh_image, image_over, node_over, open_on, read_all,
};
use crate::crypto::CryptMethod;

const UNMAP: WriteFlags = WriteFlags::MAY_UNMAP;

fn write(first: usize, count: usize, value: u8) -> Op {
    Op::Write(first..first + count, value)
}

/// Its name, what comes before it, and the request.
type Kind = (&'static str, Vec<Op>, Op);

/// Every kind of request, and what comes before it, so that it finds what its name says. The disk is that of [`plan`].
fn kinds() -> Vec<Kind> {
    vec![
        ("read of data", vec![], Op::Read(0..8)),
        ("read of backing data", vec![], Op::Read(40..90)),
        ("read of a compressed cluster", vec![], Op::Read(398..408)),
        ("read of everything", vec![], Op::Read(0..800)),
        (
            "write in place",
            vec![write(20, 8, 1), Op::Flush],
            write(21, 3, 2),
        ),
        (
            "write in place, in many pieces",
            vec![
                write(40, 4, 1),
                write(20, 20, 2),
                write(44, 16, 3),
                Op::Flush,
            ],
            write(21, 35, 4),
        ),
        ("write to nothing", vec![], write(200, 8, 2)),
        (
            "write to parts of clusters over backing data",
            vec![],
            write(41, 9, 2),
        ),
        ("write to shared clusters", vec![], write(2, 5, 2)),
        ("write to a compressed cluster", vec![], write(401, 1, 2)),
        (
            "compressed write",
            vec![Op::Pack(200..204, 1), Op::Discard(200..204)],
            Op::Pack(200..232, 2),
        ),
        (
            "write to a zero cluster that kept its place",
            vec![
                write(20, 8, 1),
                Op::Zero(20..28, WriteFlags::empty()),
                Op::Flush,
            ],
            write(21, 2, 2),
        ),
        (
            "write to one that was freed",
            vec![write(20, 8, 1), Op::Discard(20..24), Op::Flush, Op::Flush],
            write(21, 9, 2),
        ),
        (
            "zero write of whole clusters",
            vec![],
            Op::Zero(0..12, UNMAP),
        ),
        (
            "zero write that keeps clusters",
            vec![write(20, 8, 1)],
            Op::Zero(20..28, WriteFlags::empty()),
        ),
        (
            "zero write of parts of clusters",
            vec![],
            Op::Zero(1..47, UNMAP),
        ),
        ("discard", vec![write(20, 8, 1)], Op::Discard(16..32)),
        ("flush", vec![write(20, 8, 1)], Op::Flush),
        (
            "flush after a discard",
            vec![write(20, 8, 1), Op::Flush, Op::Discard(20..28), Op::Flush],
            Op::Flush,
        ),
        ("durable write", vec![], Op::WriteDurably(18..30, 2)),
        (
            "write of VM state",
            vec![Op::SaveState(0..8, 1), Op::Snapshot(2)],
            Op::SaveState(2..9, 2),
        ),
        (
            "read of VM state",
            vec![Op::SaveState(0..8, 1)],
            Op::LoadState(0..12),
        ),
        (
            "taking a snapshot with VM state",
            vec![Op::SaveState(0..8, 1)],
            Op::Snapshot(1),
        ),
        ("check", vec![write(20, 8, 1)], Op::Check(CheckFix::All)),
        (
            "upgrade",
            vec![Op::Version(2), Op::SaveState(0..8, 1)],
            Op::Version(3),
        ),
        (
            "growth with preallocation",
            vec![],
            Op::Preallocate(860, Preallocation::Metadata),
        ),
        ("growth", vec![], Op::Resize(820)),
        ("growth with a longer L1 table", vec![], Op::Resize(5000)),
        ("shrinking", vec![write(20, 8, 1)], Op::Resize(402)),
        (
            "shrinking to little",
            vec![Op::Resize(5000), write(4000, 8, 1)],
            Op::Resize(9),
        ),
        ("block status", vec![], Op::Status(0..800)),
        (
            "amendment of a switch",
            vec![write(20, 8, 1)],
            Op::Amend("lazy_refcounts", "on"),
        ),
        (
            "reopening",
            vec![write(20, 8, 1)],
            Op::Reopen { read_only: false },
        ),
        ("other refcounts", vec![write(20, 8, 1)], Op::Width(64)),
        ("taking a snapshot", vec![write(20, 8, 1)], Op::Snapshot(1)),
        (
            "going back to a snapshot",
            vec![Op::Snapshot(1), write(20, 8, 1), Op::Discard(0..8)],
            Op::Goto(1),
        ),
        (
            "deleting a snapshot",
            vec![Op::Snapshot(1), write(2, 1, 1)],
            Op::Delete(1),
        ),
    ]
}

/// As [`kinds`], on the disk of [`plan_of_subclusters`].
fn kinds_of_subclusters() -> Vec<Kind> {
    let none = WriteFlags::empty();
    let mixed = vec![
        write(130, 4, 1),
        Op::Zero(136..138, none),
        write(140, 1, 2),
        Op::Flush,
    ];
    vec![
        (
            "read of subclusters of all kinds",
            mixed.clone(),
            Op::Read(120..170),
        ),
        (
            "write to subclusters of a cluster that is there",
            vec![write(130, 4, 1), Op::Flush],
            write(137, 3, 2),
        ),
        (
            "write to subclusters of all kinds",
            mixed.clone(),
            write(131, 40, 3),
        ),
        (
            "write that moves shared subclusters",
            vec![],
            write(20, 2, 3),
        ),
        (
            "zero write of some subclusters",
            mixed.clone(),
            Op::Zero(132..139, UNMAP),
        ),
        (
            "zero write over clusters' edges",
            mixed.clone(),
            Op::Zero(131..201, UNMAP),
        ),
        (
            "zero write of shared subclusters",
            vec![],
            Op::Zero(3..7, none),
        ),
        (
            "discard of parts of clusters",
            mixed.clone(),
            Op::Discard(120..170),
        ),
        (
            "growth from the middle of a cluster",
            mixed,
            Op::Resize(840),
        ),
        (
            "shrinking to the middle of one",
            vec![write(20, 40, 1)],
            Op::Resize(41),
        ),
        (
            "taking a snapshot of subclusters",
            vec![write(130, 4, 1)],
            Op::Snapshot(1),
        ),
        (
            "going back to a snapshot of subclusters",
            vec![Op::Snapshot(1), write(4, 20, 1), Op::Zero(22..30, none)],
            Op::Goto(1),
        ),
    ]
}

/// The disks, and the kinds of requests that each is for.
fn disks() -> Vec<(Plan, Vec<Kind>)> {
    vec![
        (plan(), kinds()),
        (plan_of_subclusters(), kinds_of_subclusters()),
        (plan_with_data_file(), kinds_with_data_file()),
        (plan().encrypted(CryptMethod::Luks), kinds_of_encrypted()),
        (plan_with_bitmaps(), kinds_with_bitmaps()),
    ]
}

/// As [`kinds`], on the disk of [`plan_with_data_file`].
fn kinds_with_data_file() -> Vec<Kind> {
    vec![
        (
            "write in place in a data file",
            vec![write(20, 8, 1), Op::Flush],
            write(21, 3, 2),
        ),
        ("write to nothing in a data file", vec![], write(199, 11, 2)),
        (
            "zero write that goes to a raw data file",
            vec![write(20, 8, 1)],
            Op::Zero(1..47, UNMAP),
        ),
        (
            "discard in a data file",
            vec![write(20, 8, 1)],
            Op::Discard(16..32),
        ),
        (
            "flush of two files",
            vec![write(20, 8, 1), Op::Discard(12..16)],
            Op::Flush,
        ),
        (
            "growth of two files",
            vec![write(20, 8, 1)],
            Op::Resize(5000),
        ),
        (
            "shrinking of two files",
            vec![write(20, 8, 1)],
            Op::Resize(21),
        ),
    ]
}

/// As [`kinds`], on the disk of [`plan_with_bitmaps`]. The first change says on disk that what the image holds of a bitmap is no longer right.
fn kinds_with_bitmaps() -> Vec<Kind> {
    let ops = [
        ("adding a bitmap", BitmapOp::Add),
        ("removing one", BitmapOp::Remove),
        ("clearing one", BitmapOp::Clear),
        ("disabling one", BitmapOp::Disable),
        ("merging one into another", BitmapOp::Merge),
        ("freezing one", BitmapOp::Freeze { is_done: false }),
        ("freezing one for good", BitmapOp::Freeze { is_done: true }),
    ];
    let kind = |(name, op)| (name, vec![], Op::Bitmap(op));
    let mut kinds: Vec<Kind> = ops.into_iter().map(kind).collect();
    kinds.push(("write that outdates bitmaps", vec![], write(20, 8, 1)));
    kinds.push(("growth with bitmaps", vec![], Op::Resize(5000)));
    kinds
}

/// As [`plan`], with two bitmaps.
fn plan_with_bitmaps() -> Plan {
    Plan {
        bitmap: true,
        ..plan()
    }
}

/// As [`plan`], with a raw data file, and so no snapshot, no compressed clusters, no backing disk.
fn plan_with_data_file() -> Plan {
    Plan {
        data_file: DataFileKind::Raw,
        compressed: Vec::new(),
        snapshot: false,
        backing: Backing::default(),
        ..plan()
    }
}

/// As [`kinds`], on an encrypted disk: those that come by the cipher, or write the header.
fn kinds_of_encrypted() -> Vec<Kind> {
    let names = [
        "read of everything",
        "write in place, in many pieces",
        "write to parts of clusters over backing data",
        "write to shared clusters",
        "zero write of parts of clusters",
        "growth with a longer L1 table",
        "taking a snapshot",
    ];
    let mut kinds = kinds();
    kinds.retain(|(name, _, _)| names.contains(name));
    kinds
}

/// As [`plan`], with clusters of 32 sectors, each of them a subcluster.
fn plan_of_subclusters() -> Plan {
    Plan {
        shape: Shape::extended(802 * 512),
        compressed: vec![(12, 110), (13, 111)],
        ..plan()
    }
}

/// Data, compressed clusters, a snapshot of both, a backing disk that is a bit longer than half of it; clusters of 2 KiB.
fn plan() -> Plan {
    let shape = Shape {
        size: 802 * 512,
        cluster_bits: 11,
        version: 3,
        refcount_order: 4,
        extended_l2: false,
        encryption: CryptMethod::None,
    };
    let raw = (0..450).flat_map(|s| [200 + (s % 50) as u8; 512]);
    Plan {
        backing: Backing::from(Some(raw.collect())),
        filled: vec![(0..10, 100), (64..80, 101)],
        compressed: vec![(100, 110), (101, 111)],
        snapshot: true,
        file_alignment: 512,
        ..Plan::over(shape)
    }
}

/// What comes after a dropped request, and beside it.
#[derive(Clone, Copy, Debug)]
enum Company {
    None,
    After,
    Beside,
}

fn with_company(before: &[Op], target: Step, company: Company) -> Vec<Step> {
    let mut steps: Vec<Step> = before.iter().cloned().map(Step::new).collect();
    let begins = steps.len() as u32;
    steps.push(target);
    let later = [
        Op::Read(0..50),
        write(22, 1, 31),
        write(46, 6, 32),
        Op::Read(0..60),
        Op::Flush,
        Op::Zero(2..7, UNMAP),
        write(402, 3, 33),
        Op::Resize(5100),
        Op::Read(0..800),
    ];
    match company {
        Company::None => {}
        Company::After => steps.extend(later.into_iter().map(Step::new)),
        Company::Beside => {
            let beside = [
                (1, write(23, 1, 21)),
                (1, write(43, 2, 22)),
                (1, Op::Zero(4..9, UNMAP)),
                (1, write(6, 1, 23)),
                (1, Op::Discard(20..44)),
                (2, Op::Read(0..60)),
                (2, Op::Flush),
                (2, write(404, 2, 24)),
                (2, Op::Flush),
            ];
            steps.extend(beside.into_iter().map(|(task, op)| Step {
                task,
                pause: begins,
                ..Step::new(op)
            }));
        }
    }
    steps
}

/// Nothing may be in flight beside a reopening.
fn companies(target: &Op) -> &'static [Company] {
    match target {
        Op::Reopen { .. } => &[Company::None, Company::After],
        _ => &[Company::None, Company::After, Company::Beside],
    }
}

/// How many milliseconds lie between two places.
fn millis_step() -> u64 {
    let step = std::env::var("BLOCKLAYER_DROP_STEP").ok();
    step.and_then(|n| n.parse().ok()).unwrap_or(150)
}

/// Has a plan drop something ever later, until it has ended by then: on a quick disk, and on one that takes its time. How many places there were on each.
async fn places(what: &str, cuts: u64, plan: impl Fn(Drop) -> Plan) -> [u32; 2] {
    let step = millis_step();
    let mut places = [0; 2];
    for (rounds, delays) in places.iter_mut().zip([None, Some(1)]) {
        loop {
            // A disk that takes its time stands still while others run, so there it is the time that is cut short.
            let drop = match delays {
                None => Drop::Rounds(*rounds),
                Some(_) => Drop::Millis(u64::from(*rounds) * step),
            };
            let plan = Plan {
                delays,
                ..plan(drop)
            };
            let seen = plan.run(cuts, &mut Rng::new((*rounds).into())).await;
            let seen =
                seen.unwrap_or_else(|why| panic!("{what}, {drop:?}, delays {delays:?}: {why}"));
            if seen.dropped == 0 {
                break;
            }
            *rounds += 1;
        }
    }
    places
}

#[tokio::test(start_paused = true)]
async fn a_request_may_be_dropped_at_every_await_point() {
    let step = millis_step();
    let mut lines = String::new();
    let mut all = Vec::new();
    for (mut disk, kinds) in disks() {
        disk.prepare().await;
        all.extend(kinds.into_iter().map(|kind| (disk.clone(), kind)));
    }
    for (disk, (name, before, target)) in all {
        let mut points = Vec::new();
        for &company in companies(&target) {
            let what = format!("{name}, {company:?}");
            let plan = |drop| {
                let target = Step {
                    drop,
                    ..Step::new(target.clone())
                };
                Plan {
                    sessions: vec![with_company(&before, target, company)],
                    ..disk.clone()
                }
            };
            points.extend(places(&what, 1, plan).await);
        }
        lines += &format!("{name}: {points:?}\n");
    }
    println!(
        "alone, others after it, others beside it; without delays (await points) and with them (each {step} ms)\n{lines}"
    );
}

// Both are the end of what a disk is used for, so nothing comes after them.
#[tokio::test(start_paused = true)]
async fn closing_and_becoming_read_only_may_be_dropped_at_every_await_point() {
    for (mut disk, _) in disks() {
        disk.prepare().await;
        let before = [
            write(20, 8, 1),
            Op::Flush,
            write(30, 40, 2),
            Op::Discard(0..30),
            Op::Zero(64..70, UNMAP),
        ];
        let before: Vec<Step> = before.into_iter().map(Step::new).collect();
        let mut points = Vec::new();
        for is_close in [true, false] {
            let plan = |drop| {
                let mut plan = Plan {
                    sessions: vec![before.clone()],
                    ..disk.clone()
                };
                match is_close {
                    true => plan.close = drop,
                    false => plan.sessions[0].push(Step {
                        drop,
                        ..Step::new(Op::Reopen { read_only: true })
                    }),
                }
                plan
            };
            points.extend(places(&format!("close {is_close}"), 4, plan).await);
        }
        println!("closing and becoming read-only, without delays and with them: {points:?}");
    }
}

// A read whose future was dropped may still be loading a table then.
#[tokio::test]
async fn loading_a_snapshot_may_be_dropped_at_every_await_point() {
    let disk = CrashDriver::new(fresh_image(Shape::small(16 << 20)));
    let (node, _image) = open_on(disk.clone(), None).await;
    // Each in a table of its own.
    let places = [5 << 20, 9 << 20];
    for at in places {
        super::write(&node, at, 4096, 1).await.unwrap();
    }
    let request = SnapshotRequest::now("a");
    node.snapshot_create(request).await.unwrap();
    for at in places {
        super::write(&node, at, 4096, 2).await.unwrap();
    }
    let longer = TruncateRequest::to(20 << 20);
    node.truncate(longer).await.unwrap();
    node.driver().close().await.unwrap();
    let which = || SnapshotSelector::name("a");
    let (mut dropped, mut rounds) = (0, 0);
    loop {
        let file = MemoryDriver::new(disk.snapshot());
        let slow = FaultDriver::new(Box::new(file));
        let faults = slow.faults();
        let file = slow.into_node(READ_ONLY).await.unwrap();
        let node = node_over(image_over(file, None).await.unwrap(), READ_ONLY).await;
        faults.add(Rule::slow(Event::Read, 60).only(0));
        faults.add(Rule::slow(Event::Read, 1));
        let read = node.preadv(places[0], IoBufMut::zeroed(512), ReadFlags::empty());
        assert!(given_up_after(4, read).await.is_none());
        let ended = given_up_after(rounds, node.snapshot_load(which())).await;
        // A read waits for what is still to come, and how long the disk is then is known afterwards.
        let first = node.preadv(0, IoBufMut::zeroed(512), ReadFlags::empty());
        first.await.unwrap();
        let all = read_all(&node).await;
        let shown = (places.map(|at| all[at as usize]), all.len() >> 20);
        match ended {
            Some(loaded) => {
                loaded.unwrap();
                assert_eq!(shown, ([1; 2], 16), "after {rounds} rounds");
                break;
            }
            None => {
                let may_be = [([1; 2], 16), ([2; 2], 20)];
                assert!(may_be.contains(&shown), "{shown:?} after {rounds} rounds");
                dropped += 1;
            }
        }
        node.snapshot_load(which()).await.unwrap();
        assert_eq!(read_all(&node).await.len(), 16 << 20);
        rounds += 1;
    }
    println!("dropped at {dropped} places");
}

#[test]
fn a_runtime_may_end_at_every_request_to_the_file() {
    let mut lines = String::new();
    let disks = disks().into_iter();
    let all = disks.flat_map(|(disk, kinds)| kinds.into_iter().map(move |k| (disk.clone(), k)));
    for (disk, (name, before, target)) in all {
        let is_alone = companies(&target).len() < 3;
        for company in [Company::None, Company::Beside] {
            if is_alone && matches!(company, Company::Beside) {
                continue;
            }
            let plan = Plan {
                sessions: vec![with_company(&before, Step::new(target.clone()), company)],
                ..disk.clone()
            };
            let mut nth = 0;
            while plan
                .run_in_a_runtime_that_ends(nth)
                .unwrap_or_else(|why| panic!("{name}, {company:?}, request {nth}: {why}"))
            {
                nth += 1;
            }
            lines += &format!("{name}, {company:?}: {nth} requests\n");
        }
    }
    println!("{lines}");
}
