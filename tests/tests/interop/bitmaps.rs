// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images with persistent bitmaps that change hands: each side makes some, then both change them in turn, with bitmaps switched off, merged and cleared, and growth
//! among it. After every hand-over both sides see as dirty what a model says, `info` tells the same on both sides, and `check` is clean on both.

use blocklayer_tests::tools::Tools;

use crate::dirty::{self, Dirty, bits};
use crate::support::{Bench, Random, both};

const HAND_OVERS: usize = 6;
const WRITES: usize = 6;
/// Bytes that a bit of the bitmap that is looked at stands for.
const GRANULARITY: usize = 4096;

fn words(line: &str) -> Vec<&str> {
    line.split(' ').collect()
}

/// What `info` tells of bitmaps.
fn told(bench: &Bench, tools: &Tools) -> serde_json::Value {
    let info = bench.img(tools, &["info", "--output=json", "t.qcow2"]);
    let mut info: serde_json::Value = serde_json::from_str(&info).expect("info prints JSON");
    info["format-specific"]["data"]["bitmaps"].take()
}

fn compare(bench: &Bench, sides: [&Tools; 2], qemu: &Tools, model: &Dirty, story: &str) {
    for side in sides {
        bench.check(side, "t.qcow2");
    }
    assert_eq!(told(bench, sides[0]), told(bench, sides[1]), "{story}");
    let image = ["-f", "qcow2", "t.qcow2"];
    let seen = dirty::seen_by_qemu(bench, qemu, &image, "all", GRANULARITY);
    assert_eq!(seen, *model, "{story}");
    let seen = dirty::seen_by_ours(bench, "t.qcow2", "all");
    assert_eq!(seen, *model, "{story}");
}

/// Changes of the disk, and of `model` with it.
fn changes(random: &mut Random, model: &mut Dirty, length: usize) -> Vec<String> {
    let change = |_| {
        let offset = random.below(length / 512) * 512;
        let bytes = ((1 + random.below(60)) * 512).min(length - offset);
        model.extend(bits(offset..offset + bytes, GRANULARITY));
        let command = ["write", "write -z", "write -zu", "discard"][random.below(4)];
        format!("{command} {offset} {bytes}")
    };
    (0..WRITES).map(change).collect()
}

fn hand_over(bench: &Bench, sides: [&Tools; 2], qemu: &Tools, cluster: &str, random: &mut Random) {
    let mut length = 1_000_448;
    let bitmap = |side: &Tools, line: &str| bench.img(side, &words(&format!("bitmap {line}")));
    let make = format!("create -q -f qcow2 -o cluster_size={cluster} t.qcow2 {length}");
    bench.img(sides[0], &words(&make));
    bitmap(sides[0], "--add -g 4k t.qcow2 all");
    bitmap(sides[0], "--add -g 64k --disable t.qcow2 off");
    let (mut model, mut story) = (Dirty::new(), format!("{}: {make}", sides[0].side));
    for turn in 0..HAND_OVERS {
        let side = sides[(turn + 1) % 2];
        let commands = changes(random, &mut model, length);
        story += &format!("\n{}: {}", side.side, commands.join("; "));
        bench.io(side, &commands, "t.qcow2");
        compare(bench, sides, qemu, &model, &story);
        match turn {
            1 => {
                bitmap(side, "--clear t.qcow2 all");
                model.clear();
            }
            2 => {
                bitmap(side, "--disable t.qcow2 all");
                bench.io(side, &["write 0 512k".to_owned()], "t.qcow2");
                bitmap(side, "--enable t.qcow2 all");
            }
            3 => drop(bitmap(side, "--add --merge all -g 512 t.qcow2 copy")),
            4 => {
                length += 512 * (1 + random.below(3000));
                story += &format!("; resize {length}");
                bench.img(side, &["resize", "-q", "t.qcow2", &length.to_string()]);
            }
            _ => {}
        }
        compare(bench, sides, qemu, &model, &story);
    }
    let (copy, last) = (sides[0], sides[1]);
    bitmap(copy, "--merge copy t.qcow2 all");
    compare(bench, sides, qemu, &model, &story);
    bitmap(last, "--remove t.qcow2 copy");
    bitmap(copy, "--remove t.qcow2 off");
    compare(bench, sides, qemu, &model, &story);
}

#[test]
fn images_with_bitmaps_change_hands() {
    let test = "bitmaps";
    let Some((ours, qemu)) = both(test) else {
        return;
    };
    let mut random = Random::new(test);
    let bench = Bench::new();
    for cluster in ["512", "4k", "64k"] {
        hand_over(&bench, [&ours, &qemu], &qemu, cluster, &mut random);
        hand_over(&bench, [&qemu, &ours], &qemu, cluster, &mut random);
    }
}
