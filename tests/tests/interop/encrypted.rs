// SPDX-License-Identifier: MIT OR Apache-2.0
//! Encrypted qcow2 images that change hands: each side makes some (LUKS and the old method, over a backing file or not, with subclusters, in version 2), then both
//! change them in turn, with a snapshot, growth and new passwords among it. After every hand-over the image holds what a byte vector says, `check` is clean and
//! `map` the same on both sides, the snapshot holds what it held, and no sector of the file is one that was written.

use blocklayer_tests::tools::Tools;

use crate::subclusters::commands;
use crate::support::{Bench, Random, both, first_difference};

const HAND_OVERS: usize = 5;

/// Three passwords, by their ids.
const SECRETS: [&str; 3] = [
    "secret,id=s0,data=the first",
    "secret,id=s1,data=the second",
    "secret,id=s2,data=the third",
];

/// How an image is made besides its encryption, and its cluster size in bytes.
const KINDS: &[(&str, &str, usize)] = &[
    ("luks", "cluster_size=4k", 4 << 10),
    (
        "luks",
        "extended_l2=on,cluster_size=16k,backing_file=base.qcow2,backing_fmt=qcow2",
        16 << 10,
    ),
    ("luks", "compat=0.10", 64 << 10),
    (
        "aes",
        "cluster_size=512,backing_file=base.qcow2,backing_fmt=qcow2",
        512,
    ),
    ("luks", "data_file=t.data", 64 << 10),
];

/// An image with the id of the secret that opens it.
struct Encrypted<'a> {
    bench: &'a Bench,
    secret: &'static str,
}

impl Encrypted<'_> {
    fn options(&self) -> String {
        format!(
            "driver=qcow2,file.filename=t.qcow2,encrypt.key-secret={}",
            self.secret
        )
    }

    fn secrets() -> Vec<&'static str> {
        SECRETS.iter().flat_map(|s| ["--object", *s]).collect()
    }

    /// Runs a `qemu-img` subcommand on the image, with more arguments before and behind its name.
    fn img(&self, side: &Tools, command: &str, before: &[&str], behind: &[&str]) -> String {
        let options = self.options();
        let mut arguments = vec![command];
        arguments.extend(Self::secrets());
        arguments.extend(before);
        arguments.extend(["--image-opts", &options]);
        arguments.extend(behind);
        self.bench.img(side, &arguments)
    }

    fn io(&self, side: &Tools, commands: &[String]) {
        let options = self.options();
        let mut arguments = Self::secrets();
        arguments.extend(["--image-opts", &options]);
        for command in commands {
            arguments.extend(["-c", command]);
        }
        self.bench.run(&side.qemu_io, &arguments);
    }

    fn contents(&self, side: &Tools, snapshot: &[&str]) -> Vec<u8> {
        let before = [&["-O", "raw"], snapshot].concat();
        self.img(side, "convert", &before, &["contents.raw"]);
        self.bench.read("contents.raw")
    }

    /// Both sides see in the image what it holds, and the host sees nothing of it.
    fn compare(&self, sides: [&Tools; 2], model: &[u8], story: &str) {
        let maps = sides.map(|side| self.img(side, "map", &["--output=json"], &[]));
        assert_eq!(maps[0], maps[1], "{story}");
        for side in sides {
            let text = self.img(side, "check", &[], &[]);
            assert!(
                text.starts_with("No errors were found"),
                "{text} after {story}"
            );
            if let Some(difference) = first_difference(&self.contents(side, &[]), model) {
                panic!("{difference} for {} after {story}", side.side);
            }
        }
        for file in ["t.qcow2", "t.data"] {
            if !self.bench.path(file).exists() {
                continue;
            }
            let bytes = self.bench.read(file);
            let is_plain = |s: &[u8]| s[0] != 0 && s.iter().all(|b| *b == s[0]);
            let plain = bytes.chunks(512).position(is_plain);
            assert_eq!(
                plain, None,
                "a sector of {file} is not encrypted after {story}"
            );
        }
    }

    /// Gives the image another password and takes the old one away: `one` adds, `other` erases.
    fn change_password(&mut self, one: &Tools, other: &Tools, new: &'static str) {
        let add = format!("encrypt.state=active,encrypt.new-secret={new},encrypt.iter-time=1");
        self.img(one, "amend", &["-o", &add], &[]);
        let old = std::mem::replace(&mut self.secret, new);
        let erase = format!("encrypt.state=inactive,encrypt.old-secret={old}");
        self.img(other, "amend", &["-o", &erase], &[]);
    }
}

fn hand_over(bench: &Bench, sides: [&Tools; 2], kind: (&str, &str, usize), random: &mut Random) {
    let (method, options, cluster) = kind;
    let iterations = if method == "luks" {
        ",encrypt.iter-time=1"
    } else {
        ""
    };
    let options = format!("{options},encrypt.format={method},encrypt.key-secret=s0{iterations}");
    let mut create = vec!["create", "-q", "-f", "qcow2", "-o", &options];
    create.extend(Encrypted::secrets());
    create.extend(["t.qcow2", "500224"]);
    bench.img(sides[0], &create);
    let mut image = Encrypted {
        bench,
        secret: "s0",
    };
    let mut model = image.contents(sides[1], &[]);
    let mut story = format!("{}: {options}", sides[0].side);
    // Version 2 doesn't grow with snapshots.
    let has_snapshot = !["data_file", "compat"].iter().any(|o| options.contains(o));
    let mut kept = Vec::new();
    for turn in 0..HAND_OVERS {
        let (side, other) = (sides[(turn + 1) % 2], sides[turn % 2]);
        if turn == 1 && has_snapshot {
            image.img(side, "snapshot", &["-c", "kept"], &[]);
            kept.clone_from(&model);
        }
        if turn > 1 && method == "luks" {
            image.change_password(side, other, ["s2", "s0", "s1"][turn % 3]);
        }
        let commands = commands(random, &mut model, cluster);
        story += &format!("\n{}: {}", side.side, commands.join("; "));
        image.io(side, &commands);
        if turn > 2 {
            let mut bytes = model.len() + 512 * (1 + random.below(300));
            if options.contains("data_file") {
                // QEMU cuts the ciphertext of the last cluster off where the disk ends, and its next growth shows noise there.
                bytes = bytes.next_multiple_of(cluster);
            }
            let length = bytes.to_string();
            image.img(side, "resize", &["-q"], &[&length]);
            model.resize(bytes, 0);
            story += &format!("; resize {length}");
        }
        image.compare(sides, &model, &story);
        if !kept.is_empty() {
            let now = image.contents(other, &["-l", "kept"]);
            // QEMU shows as much of it as the disk is long now.
            assert!(now.starts_with(&kept), "the snapshot has changed: {story}");
        }
    }
    if has_snapshot {
        image.img(sides[0], "snapshot", &["-d", "kept"], &[]);
    }
    image.compare(sides, &model, &story);
    for file in ["t.qcow2", "t.data"] {
        let _not_all_have_it = std::fs::remove_file(bench.path(file));
    }
}

#[test]
fn encrypted_images_change_hands() {
    let test = "encrypted";
    let Some((ours, qemu)) = both(test) else {
        return;
    };
    let mut random = Random::new(test);
    let bench = Bench::new();
    bench.img(
        &qemu,
        &["create", "-q", "-f", "qcow2", "base.qcow2", "400k"],
    );
    let fill = [
        "write -P 1 0 150000",
        "write -P 2 200k 100k",
        "write -z 230k 30k",
    ];
    bench.io(&qemu, &fill.map(str::to_owned), "base.qcow2");
    for &kind in KINDS {
        hand_over(&bench, [&ours, &qemu], kind, &mut random);
        hand_over(&bench, [&qemu, &ours], kind, &mut random);
    }
}

/// The ciphertext of a cluster that the disk ends in reaches to the cluster's end in a data file, too: who makes the disk longer finds no noise there.
#[test]
fn an_encrypted_data_file_has_the_whole_last_cluster() {
    let Some((ours, qemu)) = both("encrypted-tail") else {
        return;
    };
    let options = "data_file=t.data,encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=1";
    for creator in [&ours, &qemu] {
        for extended in ["", ",extended_l2=on"] {
            let bench = Bench::new();
            let image = Encrypted {
                bench: &bench,
                secret: "s0",
            };
            let options = format!("{options}{extended}");
            let mut create = vec!["create", "-q", "-f", "qcow2", "-o", &options];
            create.extend(Encrypted::secrets());
            create.extend(["t.qcow2", "500224"]);
            bench.img(creator, &create);
            let mut model = vec![0; 500_224];
            image.io(&ours, &["write -P 7 490000 10224".to_owned()]);
            model[490_000..].fill(7);
            for (side, length) in [(&qemu, 524_288), (&ours, 540_160), (&qemu, 600_064)] {
                let text = length.to_string();
                image.img(side, "resize", &["-q"], &[&text]);
                model.resize(length, 0);
                let story = format!("{}{extended}, {} to {length}", creator.side, side.side);
                image.compare([&ours, &qemu], &model, &story);
            }
        }
    }
}
