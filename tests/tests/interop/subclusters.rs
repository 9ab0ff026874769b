// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images with subclusters that change hands: each side makes some (over a backing file or not, compressed, preallocated), then both change them in turn, with
//! snapshots and growth among it. After every hand-over the image holds what a byte vector says, `check` is clean and `map` the same on both sides, and the
//! snapshots hold what they held.

use blocklayer_tests::tools::Tools;

use crate::support::{Bench, Random, both, first_difference};

const HAND_OVERS: usize = 6;
const COMMANDS: usize = 8;

/// How an image is made, and its cluster size in bytes.
const KINDS: &[(&str, usize)] = &[
    (
        "create -q -f qcow2 -o extended_l2=on,cluster_size=16k t.qcow2 500224",
        16 << 10,
    ),
    (
        "create -q -f qcow2 -o extended_l2=on -b base.qcow2 -F qcow2 t.qcow2 900608",
        64 << 10,
    ),
    (
        "create -q -f qcow2 -o extended_l2=on,cluster_size=2M,refcount_bits=64 -b base.qcow2 -F qcow2 t.qcow2 3000320",
        2 << 20,
    ),
    (
        "create -q -f qcow2 -o extended_l2=on,preallocation=metadata -b base.qcow2 -F qcow2 t.qcow2 700416",
        64 << 10,
    ),
    (
        "create -q -f qcow2 -o extended_l2=on,cluster_size=32k,preallocation=full t.qcow2 400384",
        32 << 10,
    ),
    (
        "convert -c -O qcow2 -o extended_l2=on,compression_type=zstd base.qcow2 t.qcow2",
        64 << 10,
    ),
    (
        "convert -c -O qcow2 -o extended_l2=on,cluster_size=16k base.qcow2 t.qcow2",
        16 << 10,
    ),
];

/// A range of the disk, aligned to something.
fn range(random: &mut Random, length: usize, cluster: usize) -> (usize, usize) {
    let unit = [1, 512, cluster / 32, cluster][random.below(4)];
    let most = [4 * cluster / 32, 3 * cluster][random.below(2)];
    let offset = random.below(length) / unit * unit;
    let bytes = ((1 + random.below(most)) / unit * unit).max(unit);
    (offset, bytes.min(length - offset))
}

/// Commands that change the disk, and `model` with it.
pub fn commands(random: &mut Random, model: &mut [u8], cluster: usize) -> Vec<String> {
    let mut commands = Vec::new();
    for _ in 0..COMMANDS {
        let (offset, bytes) = range(random, model.len(), cluster);
        let end = offset + bytes;
        let pattern = 1 + random.below(255);
        commands.push(match random.below(8) {
            0..4 => {
                model[offset..end].fill(u8::try_from(pattern).expect("below 256"));
                format!("write -P {pattern} {offset} {bytes}")
            }
            4 => {
                // Whole clusters, those that reach to the end of the disk included, read as zero afterwards.
                let first = offset.next_multiple_of(cluster);
                let last = match end == model.len() {
                    true => end,
                    false => end / cluster * cluster,
                };
                if first < last {
                    model[first..last].fill(0);
                }
                format!("discard {offset} {bytes}")
            }
            kind => {
                model[offset..end].fill(0);
                let flags = if kind == 5 { "-zu" } else { "-z" };
                format!("write {flags} {offset} {bytes}")
            }
        });
    }
    commands
}

/// Both sides see in an image what it holds.
fn compare(bench: &Bench, sides: [&Tools; 2], model: &[u8], story: &str) {
    let maps = sides.map(|side| bench.img(side, &["map", "--output=json", "t.qcow2"]));
    assert_eq!(maps[0], maps[1], "{story}");
    for side in sides {
        bench.check(side, "t.qcow2");
        let actual = bench.contents(side, "t.qcow2", None);
        if let Some(difference) = first_difference(&actual, model) {
            panic!("{difference} for {} after {story}", side.side);
        }
    }
}

fn hand_over(bench: &Bench, sides: [&Tools; 2], make: &str, cluster: usize, random: &mut Random) {
    bench.img(sides[0], &make.split(' ').collect::<Vec<_>>());
    let mut model = bench.contents(sides[1], "t.qcow2", None);
    let mut story = format!("{}: {make}", sides[0].side);
    let mut kept = Vec::new();
    for turn in 0..HAND_OVERS {
        let side = sides[(turn + 1) % 2];
        if turn == 2 {
            bench.img(side, &["snapshot", "-c", "kept", "t.qcow2"]);
            kept.clone_from(&model);
        }
        let commands = commands(random, &mut model, cluster);
        story += &format!("\n{}: {}", side.side, commands.join("; "));
        bench.io(side, &commands, "t.qcow2");
        if turn > 3 {
            let bytes = model.len() + 512 * (1 + random.below(300));
            let length = bytes.to_string();
            bench.img(side, &["resize", "-q", "t.qcow2", &length]);
            model.resize(bytes, 0);
            story += &format!("; resize {length}");
        }
        compare(bench, sides, &model, &story);
        if turn >= 2 {
            let now = bench.contents(sides[turn % 2], "t.qcow2", Some("kept"));
            // QEMU shows as much of it as the disk is long now.
            assert!(now.starts_with(&kept), "the snapshot has changed: {story}");
        }
    }
    bench.img(sides[0], &["snapshot", "-d", "kept", "t.qcow2"]);
    compare(bench, sides, &model, &story);
}

#[test]
fn images_with_subclusters_change_hands() {
    let test = "subclusters";
    let Some((ours, qemu)) = both(test) else {
        return;
    };
    let mut random = Random::new(test);
    let bench = Bench::new();
    bench.img(
        &qemu,
        &["create", "-q", "-f", "qcow2", "base.qcow2", "800256"],
    );
    let fill = [
        "write -P 1 0 300000",
        "write -P 2 400k 200k",
        "write -z 450k 30k",
    ];
    bench.io(&qemu, &fill.map(str::to_owned), "base.qcow2");
    for &(make, cluster) in KINDS {
        hand_over(&bench, [&ours, &qemu], make, cluster, &mut random);
        hand_over(&bench, [&qemu, &ours], make, cluster, &mut random);
    }
}
