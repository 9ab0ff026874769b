// SPDX-License-Identifier: MIT OR Apache-2.0
//! The interop matrix: images of every feature, and of every pair of features that goes together, change hands.
//!
//! Method: one side makes an image; then the sides take turns, the maker first, at the steps of its features (`features`, a table) and random requests. After every turn both sides must
//! find the image sound, print the same `map` and `info`, and read what a model of the disk says, from the image and from its snapshots (`disk`, `steps`, `damage`); what is dirty in its
//! bitmaps is what another model says (`bitmaps`); what is encrypted shows nothing to the host (`keys`). So an image with four turns was handed over three times. What the tools refuse is on a list, and both must refuse it in the same words.
//!
//! The ordinary test has each feature alone, and always the same requests; `cargo xtask interop` has the pairs and six turns (`BLOCKLAYER_MATRIX=all`), and `--only NAME` those images whose name
//! contains NAME (`BLOCKLAYER_MATRIX_ONLY`).

mod bitmaps;
mod damage;
mod disk;
mod features;
mod keys;
mod refusals;
mod steps;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use blocklayer_tests::tools::Tools;

use crate::support::{Random, both};
use disk::Disk;
use features::{FEATURES, Feature, Source};
use refusals::{LEFT_OUT, REFUSED};

/// An image of the matrix.
struct Case<'a> {
    features: Vec<&'static Feature>,
    /// Who makes it, and the other one.
    sides: [&'a Tools; 2],
}

impl Case<'_> {
    fn name(&self) -> String {
        let names: Vec<&str> = self.features.iter().map(|feature| feature.name).collect();
        format!("{} by {}", names.join("+"), self.sides[0].side)
    }

    /// Lives through all turns, and returns which refusals it has met.
    fn run(&self, turns: usize, random: Random) -> Vec<usize> {
        let (mut disk, is_made) = Disk::make(&self.features, self.sides, random);
        if is_made {
            for turn in 0..turns {
                for feature in &self.features {
                    for (_, step) in feature.steps.iter().filter(|(when, _)| *when == turn) {
                        disk.step(*step, turn);
                    }
                }
                disk.requests(self.sides[turn % 2]);
                disk.compare();
            }
        }
        disk.met
    }
}

/// Whether two features can be had together: they want nothing that contradicts.
fn go_together(one: &Feature, two: &Feature) -> bool {
    let contradict = |(key, value): &(&str, &str)| {
        let mut others = two.options.iter();
        others.any(|(other, wish)| other == key && wish != value)
    };
    let both_steps = !one.steps.is_empty() && one.steps.len() == two.steps.len();
    let same_steps = both_steps
        && one
            .steps
            .iter()
            .zip(two.steps)
            .all(|(a, b)| format!("{a:?}") == format!("{b:?}"));
    let both_sources = one.source != Source::Empty && two.source != Source::Empty;
    let is_left_out = |[a, b]: &[&str; 2]| {
        let is = |feature: &Feature, beginning| feature.name.starts_with(beginning);
        (is(one, a) && is(two, b)) || (is(one, b) && is(two, a))
    };
    one.name != "plain"
        && two.name != "plain"
        && !one.options.iter().any(contradict)
        && !same_steps
        && !LEFT_OUT.iter().any(is_left_out)
        && (!both_sources || one.source.is_convert() != two.source.is_convert())
}

/// Runs the cases on as many threads as there are cores.
fn run_all(cases: &[Case<'_>], turns: usize, seed: u64, all: bool) {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    let met = Mutex::new(Vec::new());
    let work = || {
        loop {
            let place = next.fetch_add(1, Ordering::Relaxed);
            let Some(case) = cases.get(place) else {
                break;
            };
            if place > 0 && place.is_multiple_of(100) {
                println!("matrix: {place} of {} images begun", cases.len());
            }
            let name = case.name();
            let own = name
                .bytes()
                .fold(seed, |sum, byte| sum.wrapping_mul(31) ^ u64::from(byte));
            let run = AssertUnwindSafe(|| case.run(turns, Random::seeded(own)));
            match catch_unwind(run) {
                Ok(some) => met.lock().expect("no thread panics").extend(some),
                Err(_) => failed.lock().expect("no thread panics").push(name),
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    let failed = failed.into_inner().expect("no thread panics");
    let count = cases.len();
    assert!(
        failed.is_empty(),
        "{} of {count} images of seed {seed} fail: {failed:#?}",
        failed.len()
    );
    let met = met.into_inner().expect("no thread panics");
    println!("matrix: {count} images of {turns} turns, seed {seed}");
    if all {
        for (place, refusal) in REFUSED.iter().enumerate() {
            let (pair, message) = (refusal.pair, refusal.message);
            assert!(
                met.contains(&place),
                "never refused: {pair:?}: {message}: is the list of refusals out of date?"
            );
        }
    }
}

#[test]
fn images_of_every_feature_change_hands() {
    let test = "matrix";
    let Some((ours, qemu)) = both(test) else {
        return;
    };
    let only = std::env::var("BLOCKLAYER_MATRIX_ONLY").ok();
    let has_pairs = std::env::var("BLOCKLAYER_MATRIX").is_ok_and(|what| what == "all");
    let mut sets: Vec<Vec<&'static Feature>> = FEATURES.iter().map(|f| vec![f]).collect();
    if has_pairs {
        for (i, one) in FEATURES.iter().enumerate() {
            let with = FEATURES[i + 1..].iter().filter(|two| go_together(one, two));
            sets.extend(with.map(|two| vec![one, two]));
        }
    }
    let mut cases = Vec::new();
    for features in sets {
        for sides in [[&ours, &qemu], [&qemu, &ours]] {
            let features = features.clone();
            cases.push(Case { features, sides });
        }
    }
    if let Some(only) = &only {
        cases.retain(|case| case.name().contains(only.as_str()));
    }
    let seed = match has_pairs {
        true => Random::new(test).next(),
        false => 1,
    };
    let turns = if has_pairs { 6 } else { 4 };
    run_all(&cases, turns, seed, has_pairs && only.is_none());
}
