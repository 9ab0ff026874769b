// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images with persistent bitmaps that change hands: each side makes some, then both change them in turn, with bitmaps switched off, merged and cleared, and growth
//! among it. After every hand-over QEMU's NBD server shows as dirty what a model says, `info` tells the same on both sides, and `check` is clean on both.

use std::collections::BTreeSet;

use blocklayer_tests::tools::Tools;

use crate::support::{Bench, Random, both};

const HAND_OVERS: usize = 6;
const WRITES: usize = 6;
/// Bytes that a bit of the bitmap that is looked at stands for.
const GRANULARITY: usize = 4096;

/// Bits that are set.
type Dirty = BTreeSet<usize>;

fn words(line: &str) -> Vec<&str> {
    line.split(' ').collect()
}

/// What QEMU takes for dirty.
fn dirty(bench: &Bench, qemu: &Tools, name: &str) -> Dirty {
    let server = qemu.qemu_img.with_file_name("qemu-nbd");
    let socket = bench.path("socket").display().to_string();
    let serve = ["--fork", "-r", "-k", &socket, "-f", "qcow2", "-B", name];
    // It ends with its client.
    bench.run(&server, &[&serve[..], &["t.qcow2"]].concat());
    let image = format!(
        "driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
    );
    let map = bench.img(qemu, &["map", "--output=json", "--image-opts", &image]);
    let map: serde_json::Value = serde_json::from_str(&map).expect("map prints JSON");
    let number = |e: &serde_json::Value, key: &str| -> usize {
        let number = e[key].as_u64().expect("places are numbers");
        usize::try_from(number).expect("the disk is short")
    };
    let ranges = map.as_array().expect("map prints a list").iter();
    ranges
        // Through this option, what is dirty shows as what isn't data.
        .filter(|e| e["data"] == false)
        .flat_map(|e| {
            let start = number(e, "start");
            start / GRANULARITY..(start + number(e, "length")).div_ceil(GRANULARITY)
        })
        .collect()
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
    assert_eq!(dirty(bench, qemu, "all"), *model, "{story}");
}

/// Changes of the disk, and of `model` with it.
fn changes(random: &mut Random, model: &mut Dirty, length: usize) -> Vec<String> {
    let change = |_| {
        let offset = random.below(length / 512) * 512;
        let bytes = ((1 + random.below(60)) * 512).min(length - offset);
        model.extend(offset / GRANULARITY..(offset + bytes).div_ceil(GRANULARITY));
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
