// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rule: an error from below never harms an image. Whatever fails, once or for ever: who asked is told, nothing is corrupt, everything else reads as it
//! should, a power cut right after finds what was flushed, and when the errors are over the image works.
//!
//! The method: a plan that comes by every named point that this writer has, done again for each point, its first, second and every passing, and each
//! errno; and once for every single request that reaches the file. `BLOCKLAYER_FAULT_CUTS` says how many power cuts follow each (`cargo xtask fault`); their
//! places, and what they leave, are the seed's.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use blockcore::testing::Rng;
use blockcore::testing::fault::Rule;
use blockcore::{CheckFix, DebugEvent, Preallocation, WriteFlags};

use super::torture::{Op, Plan, Step};
use super::{Backing, DataFileKind, Shape};
use crate::crypto::CryptMethod;

/// The points that no request passes here: what they stand for is not done (yet), or is a part of another step.
const NOT_PASSED: &[DebugEvent] = &[
    // Written together with the data.
    DebugEvent::CowWrite,
    // Refcount blocks are written in the commit, in parts and new ones alike; the table's entries are `refblock_alloc_hookup`.
    DebugEvent::RefblockUpdate,
    DebugEvent::RefblockAllocWrite,
    DebugEvent::RefblockAllocWriteBlocks,
    DebugEvent::ReftableUpdate,
    // No emptying, no copy-on-read yet.
    DebugEvent::EmptyImagePrepare,
    DebugEvent::CorWrite,
    DebugEvent::ClusterAllocSpace,
    DebugEvent::None,
];

/// Comes by every point that has to do with tables: clusters are small, so tables are, too, and the file below takes only whole 4 KiB.
fn tables() -> Plan {
    let shape = Shape {
        // 600 clusters, so ten L2 tables.
        size: 600 * 512,
        cluster_bits: 9,
        version: 3,
        refcount_order: 6,
        extended_l2: false,
        encryption: CryptMethod::None,
    };
    let step = |op: Op| vec![Step::new(op)];
    let write = |first: usize, count: usize, value: u8| Op::Write(first..first + count, value);
    let unmap = WriteFlags::MAY_UNMAP;
    let none = WriteFlags::empty();
    let steps = [
        // Reads: data, compressed, backing, nothing.
        Op::Read(0..600),
        // Over shared clusters and shared L2 tables.
        write(3, 2, 1),
        write(70, 5, 2),
        write(199, 3, 3),
        Op::Flush,
        // In place.
        write(3, 1, 4),
        // Over a compressed cluster.
        write(300, 1, 5),
        Op::Pack(310..318, 30),
        write(312, 1, 31),
        // Zeroes: kept clusters, freed clusters.
        Op::Zero(70..74, none),
        Op::Zero(199..201, unmap),
        write(71, 1, 6),
        Op::Discard(3..5),
        Op::Flush,
        Op::Flush,
        // Clusters that were freed are used again.
        write(400, 4, 7),
        write(500, 3, 8),
        Op::Flush,
        // A snapshot, changes, the way back; another one, which goes away.
        Op::Snapshot(1),
        write(70, 2, 21),
        Op::Goto(1),
        write(72, 2, 22),
        Op::Snapshot(2),
        write(500, 2, 23),
        Op::Delete(1),
        Op::Flush,
        // A longer L1 table: twice.
        Op::Resize(660),
        write(640, 3, 9),
        Op::Flush,
        Op::Resize(5000),
        write(4990, 2, 10),
        // More clusters than the refcount table has room for, so that it moves.
        write(700, 4280, 11),
        Op::Flush,
        Op::Discard(3000..3200),
        Op::Flush,
        Op::Flush,
        Op::Resize(400),
        Op::Read(0..400),
        Op::Resize(5000),
        Op::Read(0..5000),
    ];
    let raw = (0..450).flat_map(|s| [200 + (s % 50) as u8; 512]);
    Plan {
        backing: Backing::from(Some(raw.collect())),
        filled: vec![(0..10, 100), (64..80, 101), (200..202, 102)],
        compressed: vec![(300, 110), (301, 111)],
        snapshot: true,
        file_alignment: 4096,
        // Opened and closed once more: what is read at opening is a point, too.
        sessions: vec![
            steps.into_iter().flat_map(step).collect(),
            step(write(20, 1, 13)),
        ],
        ..Plan::over(shape)
    }
}

/// Comes by every point that has to do with parts of clusters.
fn parts() -> Plan {
    let shape = Shape {
        size: 800 * 512,
        cluster_bits: 11,
        version: 3,
        refcount_order: 3,
        extended_l2: false,
        encryption: CryptMethod::None,
    };
    let write = |first: usize, count: usize, value: u8| Op::Write(first..first + count, value);
    let steps = [
        Op::Read(0..800),
        Op::Pack(480..520, 30),
        Op::Discard(480..492),
        Op::Pack(480..488, 31),
        Op::Flush,
        // Copies of backing data, of a shared cluster, of a compressed one.
        write(41, 2, 1),
        write(6, 1, 2),
        write(402, 1, 3),
        write(42, 6, 4),
        Op::Flush,
        Op::Zero(44..60, WriteFlags::MAY_UNMAP),
        Op::Zero(81..82, WriteFlags::empty()),
        Op::Discard(40..44),
        Op::Flush,
        Op::Flush,
        Op::Width(16),
        Op::SaveState(0..10, 40),
        Op::Snapshot(2),
        Op::SaveState(2..5, 41),
        Op::LoadState(0..12),
        write(42, 1, 21),
        Op::Snapshot(1),
        Op::WriteDurably(43..45, 22),
        Op::Delete(1),
        Op::Check(CheckFix::All),
        // A new L2 table in a place that was used before.
        Op::Preallocate(900, Preallocation::Metadata),
        Op::Resize(5000),
        write(4200, 30, 5),
        Op::Flush,
        write(4202, 1, 6),
        Op::Zero(4204..4212, WriteFlags::empty()),
        write(4206, 3, 7),
        Op::Flush,
        Op::Read(0..5000),
    ];
    let raw = (0..450).flat_map(|s| [200 + (s % 50) as u8; 512]);
    Plan {
        backing: Backing::from(Some(raw.collect())),
        filled: vec![(0..10, 100), (64..80, 101)],
        compressed: vec![(100, 110), (101, 111)],
        snapshot: true,
        bitmap: true,
        file_alignment: 512,
        sessions: vec![steps.into_iter().map(Step::new).collect()],
        ..Plan::over(shape)
    }
}

/// Comes by every point that has to do with subclusters.
fn subclusters() -> Plan {
    let none = WriteFlags::empty();
    let write = |first: usize, count: usize, value: u8| Op::Write(first..first + count, value);
    let steps = [
        Op::Read(0..802),
        // New clusters, and further subclusters of them: of nothing, of backing data, of zeroes.
        write(130, 4, 1),
        write(140, 3, 2),
        Op::Flush,
        write(132, 12, 3),
        Op::Zero(134..150, none),
        write(145, 2, 4),
        Op::Flush,
        // Over shared ones, and a compressed cluster.
        write(20, 2, 5),
        Op::Zero(3..5, none),
        write(390, 1, 6),
        Op::Zero(420..430, none),
        Op::Flush,
        Op::Zero(131..201, WriteFlags::MAY_UNMAP),
        Op::Discard(0..96),
        Op::Flush,
        Op::Flush,
        // Clusters that were freed are used again, in part.
        write(520, 2, 7),
        write(620, 40, 8),
        Op::Snapshot(1),
        write(525, 1, 9),
        Op::Goto(1),
        write(526, 1, 10),
        Op::Delete(1),
        Op::Resize(401),
        Op::Resize(1000),
        write(410, 2, 11),
        Op::Flush,
        Op::Read(0..1000),
    ];
    Plan {
        // With one there is no way back to a snapshot.
        bitmap: false,
        shape: Shape::extended(802 * 512),
        compressed: vec![(12, 110), (13, 111)],
        sessions: vec![steps.into_iter().map(Step::new).collect()],
        ..parts()
    }
}

/// Zero clusters of all kinds, in snapshots that share tables, too, become those of version 2.
fn downgrades() -> Plan {
    let none = WriteFlags::empty();
    let write = |first: usize, count: usize, value: u8| Op::Write(first..first + count, value);
    let steps = [
        write(20, 40, 1),
        Op::Zero(24..44, none),
        Op::Zero(100..140, WriteFlags::MAY_UNMAP),
        Op::Snapshot(2),
        Op::Snapshot(3),
        write(26, 3, 2),
        Op::Zero(44..52, none),
        Op::Version(2),
        Op::Version(3),
        Op::Read(0..800),
        Op::Zero(104..120, none),
        Op::Zero(4..12, none),
        Op::Snapshot(4),
        Op::Delete(2),
        Op::Version(2),
        Op::Version(3),
        Op::Goto(3),
        Op::Version(2),
        Op::Version(3),
        Op::Flush,
        Op::Read(0..800),
    ];
    let raw = (0..450).flat_map(|s| [200 + (s % 50) as u8; 512]);
    Plan {
        backing: Backing::from(Some(raw.collect())),
        filled: vec![(0..10, 100), (64..80, 101)],
        compressed: vec![(150, 110)],
        snapshot: true,
        sessions: vec![steps.into_iter().map(Step::new).collect()],
        ..Plan::over(Shape {
            cluster_bits: 11,
            ..Shape::small(800 * 512)
        })
    }
}

/// Without what a data file rules out: snapshots and compressed clusters.
fn data_file(kind: DataFileKind, of: Plan) -> Plan {
    let is_possible = |step: &Step| {
        let op = &step.op;
        !matches!(
            op,
            Op::Pack(..)
                | Op::Snapshot(_)
                | Op::Goto(_)
                | Op::Delete(_)
                | Op::SaveState(..)
                | Op::LoadState(_)
        )
    };
    let mut plan = Plan {
        data_file: kind,
        compressed: Vec::new(),
        snapshot: false,
        ..of
    };
    if kind == DataFileKind::Raw {
        plan.backing = Backing::default();
    }
    for session in &mut plan.sessions {
        session.retain(is_possible);
    }
    plan
}

/// All plans, by name.
fn plans() -> [(&'static str, Plan); 7] {
    use DataFileKind::{Outside, Raw};
    [
        ("tables", tables()),
        ("parts", parts()),
        ("subclusters", subclusters()),
        ("data file", data_file(Outside, parts())),
        ("raw data file, subclusters", data_file(Raw, subclusters())),
        ("encrypted", parts().encrypted(CryptMethod::Luks)),
        ("downgrades", downgrades()),
    ]
}

fn from_env(name: &str, default: u64) -> u64 {
    let value = std::env::var(name).ok();
    value.and_then(|n| n.parse().ok()).unwrap_or(default)
}

/// Power cuts after each error.
fn cuts() -> u64 {
    from_env("BLOCKLAYER_FAULT_CUTS", 1)
}

/// What the cuts go by.
static SEED: LazyLock<u64> = LazyLock::new(Rng::seed_from_env);

/// Does the plan with an error, and says how many requests were told of one.
async fn with_fault(plan: &Plan, rule: Rule, what: &str) -> usize {
    let mut rng = Rng::new(*SEED);
    let mut plan = plan.clone();
    plan.faults.push(rule);
    match plan.run(cuts(), &mut rng).await {
        Ok(seen) => seen.errors.len(),
        Err(why) => panic!("{what}: {why}"),
    }
}

#[tokio::test(start_paused = true)]
async fn errors_at_any_point_harm_nothing() {
    let mut never = DebugEvent::ALL.to_vec();
    let mut lines = String::new();
    for (name, mut plan) in plans() {
        plan.prepare().await;
        let seen = plan.run(cuts(), &mut Rng::new(*SEED)).await.unwrap();
        let passed: BTreeMap<DebugEvent, u32> = seen.faults.passed();
        never.retain(|e| !passed.contains_key(e));
        for (&point, times) in &passed {
            let mut told = Vec::new();
            for errno in [libc::EIO, libc::ENOSPC] {
                let fail = || Rule::fail_after(point, errno);
                for (rule, which) in [
                    (fail().only(0), "first"),
                    (fail().only(1), "second"),
                    (fail(), "every"),
                ] {
                    let what = format!("{name}: {which} {point}, errno {errno}");
                    told.push(with_fault(&plan, rule, &what).await);
                }
            }
            lines += &format!("{name}: {point}: passed {times} times; errors told {told:?}\n");
        }
    }
    never.retain(|e| !NOT_PASSED.contains(e));
    assert!(never.is_empty(), "no request passes {never:?}");
    println!("first, second, every passing; EIO, ENOSPC\n{lines}");
}

#[tokio::test(start_paused = true)]
async fn an_error_of_any_single_request_harms_nothing() {
    // The quick run looks at some of them.
    let every = from_env("BLOCKLAYER_FAULT_EVERY", 23);
    let only = std::env::var("BLOCKLAYER_FAULT_PLAN").ok();
    for (name, mut plan) in plans() {
        if only.as_ref().is_some_and(|only| only != name) {
            continue;
        }
        plan.prepare().await;
        let seen = plan.run(0, &mut Rng::new(1)).await.unwrap();
        let requests = seen.faults.requests();
        for nth in (*SEED % every..requests).step_by(every as usize) {
            let once = Rule::fail_all(libc::EIO).only(nth as u32);
            with_fault(&plan, once, &format!("{name}: request {nth}")).await;
            let from_then_on = Rule::fail_all(libc::ENOSPC).not_before(nth as u32);
            with_fault(
                &plan,
                from_then_on,
                &format!("{name}: requests from {nth} on"),
            )
            .await;
        }
        println!("{name}: {requests} requests, one in {every} looked at");
    }
}
