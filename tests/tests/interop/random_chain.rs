// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random reads, writes, zero writes and discards on chains that the other side made.
//!
//! Method: every layer is driven in turn, from the lowest up. Its model is what the judge (the side that does not drive)
//! reads from it beforehand. Batches of `qemu-io` commands change image and model alike; reads within a batch are
//! compared with the model, and after every batch the whole layer, read by the judge, is. A discard ends its batch, for it
//! may leave each whole cluster as it was or make it zero; which of the two, the judge's reading tells.

use blocklayer_tests::tools::Tools;

use crate::support::{Bench, Random, both, first_difference};

const BATCHES: usize = 12;
const COMMANDS: usize = 10;

/// One qcow2 layer of a chain under test.
struct Layer {
    image: &'static str,
    cluster: usize,
    /// An internal snapshot that must keep what it holds.
    snapshot: Option<&'static str>,
}

#[test]
fn a_chain_made_by_qemu_and_driven_by_ours_is_sound_and_its_snapshot_untouched() {
    let test = "chain made by qemu";
    let Some((ours, qemu)) = both(test) else {
        return;
    };
    let mut random = Random::new(test);
    let bench = Bench::new();
    make_base(&bench, &mut random);
    let img = |arguments: &[&str]| bench.img(&qemu, arguments);
    let create = ["create", "-q", "-f", "qcow2"];

    // The lowest layer: version 2, with compressed clusters.
    img(&[
        &create[..],
        &["-b", "base.raw", "-F", "raw", "plain.qcow2", "1600000"],
    ]
    .concat());
    let text: Vec<u8> = (0..40_000u32)
        .flat_map(|i| format!("{i} ").into_bytes())
        .collect();
    bench.write("text", &text[..200_000]);
    let commands = [
        "write -s text 300000 200000".to_owned(),
        "write -P 7 1550000 50000".to_owned(),
    ];
    bench.io(&qemu, &commands, "plain.qcow2");
    let convert =
        "convert -c -f qcow2 -O qcow2 -o compat=0.10 -B base.raw -F raw plain.qcow2 one.qcow2";
    img(&convert.split(' ').collect::<Vec<_>>());
    let map = img(&["map", "--output=json", "one.qcow2"]);
    assert!(map.contains("\"compressed\": true"), "{map}");

    // The middle one: with an internal snapshot, and changed since.
    img(&[
        &create[..],
        &[
            "-o",
            "cluster_size=4k",
            "-b",
            "one.qcow2",
            "-F",
            "qcow2",
            "two.qcow2",
            "1400320",
        ],
    ]
    .concat());
    let commands = [
        "write -P 1 0 400000".to_owned(),
        "write -z 500000 70000".to_owned(),
    ];
    bench.io(&qemu, &commands, "two.qcow2");
    img(&["snapshot", "-c", "before", "two.qcow2"]);
    bench.io(&qemu, &["write -P 2 100000 100000".to_owned()], "two.qcow2");

    img(&[
        &create[..],
        &[
            "-o",
            "cluster_size=16k",
            "-b",
            "two.qcow2",
            "-F",
            "qcow2",
            "top.qcow2",
            "1700352",
        ],
    ]
    .concat());

    let layers = [
        Layer {
            image: "one.qcow2",
            cluster: 65_536,
            snapshot: None,
        },
        Layer {
            image: "two.qcow2",
            cluster: 4_096,
            snapshot: Some("before"),
        },
        Layer {
            image: "top.qcow2",
            cluster: 16_384,
            snapshot: None,
        },
    ];
    drive_all(&bench, &layers, &ours, &qemu, &mut random);
}

#[test]
fn a_chain_made_by_ours_and_driven_by_qemu_is_sound() {
    let test = "chain made by ours";
    let Some((ours, qemu)) = both(test) else {
        return;
    };
    let mut random = Random::new(test);
    let bench = Bench::new();
    make_base(&bench, &mut random);
    for line in [
        "create -q -f qcow2 -o compat=0.10,cluster_size=512 -b base.raw -F raw one.qcow2 1600000",
        "create -q -f qcow2 -o refcount_bits=1,cluster_size=8k -b one.qcow2 -F qcow2 two.qcow2 1400320",
        "create -q -f qcow2 -o refcount_bits=64 -b two.qcow2 -F qcow2 top.qcow2 1700352",
    ] {
        bench.img(&ours, &line.split(' ').collect::<Vec<_>>());
    }
    let layers = [
        Layer {
            image: "one.qcow2",
            cluster: 512,
            snapshot: None,
        },
        Layer {
            image: "two.qcow2",
            cluster: 8_192,
            snapshot: None,
        },
        Layer {
            image: "top.qcow2",
            cluster: 65_536,
            snapshot: None,
        },
    ];
    // Ours first, so that QEMU meets what we allocated.
    drive_all(&bench, &layers, &ours, &qemu, &mut random);
    drive_all(&bench, &layers, &qemu, &ours, &mut random);
}

/// A raw image whose length is no multiple of anything, with data, zeroes and holes.
fn make_base(bench: &Bench, random: &mut Random) {
    let mut base = random.bytes(1_500_001);
    for start in (0..1_400_000).step_by(300_000) {
        base[start..start + 90_000].fill(0);
    }
    bench.write("base.raw", &base);
}

fn drive_all(bench: &Bench, layers: &[Layer], driver: &Tools, judge: &Tools, random: &mut Random) {
    for layer in layers {
        let before = layer
            .snapshot
            .map(|name| bench.contents(judge, layer.image, Some(name)));
        drive(bench, layer, driver, judge, random);
        if let Some(before) = before {
            let after = bench.contents(judge, layer.image, layer.snapshot);
            if let Some(difference) = first_difference(&after, &before) {
                panic!("the snapshot in {} changed: {difference}", layer.image);
            }
        }
        for layer in layers {
            bench.check(judge, layer.image);
            bench.check(driver, layer.image);
        }
    }
}

fn drive(bench: &Bench, layer: &Layer, driver: &Tools, judge: &Tools, random: &mut Random) {
    let mut model = bench.contents(judge, layer.image, None);
    for batch in 0..BATCHES {
        let mut commands = Vec::new();
        let mut reads = Vec::new();
        for command in 0..COMMANDS {
            let (offset, bytes) = range(random, model.len(), layer.cluster);
            match random.below(6) {
                0 | 1 => {
                    // A hexdump is long: a few sectors are enough to compare.
                    let bytes = bytes.min(2_000);
                    commands.push(format!("read -v {offset} {bytes}"));
                    reads.push((offset, model[offset..offset + bytes].to_vec()));
                }
                2 => {
                    let byte = u8::try_from(random.below(256)).expect("below 256");
                    commands.push(format!("write -P {byte} {offset} {bytes}"));
                    model[offset..offset + bytes].fill(byte);
                }
                3 => {
                    let name = format!("data-{command}");
                    let data = random.bytes(bytes);
                    bench.write(&name, &data);
                    commands.push(format!("write -s {name} {offset} {bytes}"));
                    model[offset..offset + bytes].copy_from_slice(&data);
                }
                4 => {
                    commands.push(format!("write -z {offset} {bytes}"));
                    model[offset..offset + bytes].fill(0);
                }
                _ => {
                    commands.push(format!("write -z -u {offset} {bytes}"));
                    model[offset..offset + bytes].fill(0);
                }
            }
        }
        let (offset, bytes) = range(random, model.len(), layer.cluster);
        commands.push(format!("discard {offset} {bytes}"));

        let printed = bench.io(driver, &commands, layer.image);
        let story = format!("{} batch {batch}:\n{}", layer.image, commands.join("\n"));
        compare_reads(&printed, &reads, &story);
        let actual = bench.contents(judge, layer.image, None);
        settle_discard(&mut model, &actual, offset, bytes, layer.cluster);
        if let Some(difference) = first_difference(&actual, &model) {
            panic!("{difference} after {story}");
        }
    }
}

/// A range within the image: of any alignment, cluster aligned, or up to the end; short ones more often.
fn range(random: &mut Random, length: usize, cluster: usize) -> (usize, usize) {
    let limit = match random.below(3) {
        0 => 1_000,
        1 => 3 * cluster,
        _ => 150_000,
    };
    let offset = random.below(length);
    let bytes = (1 + random.below(limit)).min(length - offset);
    match random.below(4) {
        0 => {
            let offset = offset / cluster * cluster;
            let bytes = bytes.div_ceil(cluster) * cluster;
            (offset, bytes.min(length - offset))
        }
        1 => (length - bytes, bytes),
        _ => (offset, bytes),
    }
}

/// Takes over into the model what a discard did, as far as it was allowed to: each whole cluster in the range (the last one
/// ends where the image does) may read as zero from now on.
fn settle_discard(model: &mut [u8], actual: &[u8], offset: usize, bytes: usize, cluster: usize) {
    let end = offset + bytes;
    let mut start = offset.div_ceil(cluster) * cluster;
    while start < model.len().min(actual.len()) {
        let stop = (start + cluster).min(model.len());
        if stop > end {
            break;
        }
        if actual[start..stop].iter().all(|byte| *byte == 0) {
            model[start..stop].fill(0);
        }
        start = stop;
    }
}

/// Compares the hexdumps in `qemu-io`'s output with what was to be read, in order.
fn compare_reads(printed: &str, reads: &[(usize, Vec<u8>)], story: &str) {
    let mut dumped = Vec::new();
    let mut expected = reads.iter();
    for line in printed.lines() {
        if let Some((_, after)) = line.split_once(":  ") {
            let hex = after.split("  ").next().unwrap_or_default();
            let parse = |word: &str| u8::from_str_radix(word, 16).expect("a hexdump holds bytes");
            dumped.extend(hex.split(' ').map(parse));
        } else if line.starts_with("read ") {
            let (offset, bytes) = expected.next().expect("no more reports than reads");
            if let Some(difference) = first_difference(&dumped, bytes) {
                panic!("read at {offset}: {difference} in {story}");
            }
            dumped.clear();
        }
    }
    assert!(
        expected.next().is_none(),
        "reads without a report in {story}"
    );
}
