// SPDX-License-Identifier: MIT OR Apache-2.0
//! Repairs beside QEMU's: images that QEMU made, with every feature that it has, get random damage to their metadata; one copy is repaired by ours, one by
//! QEMU.
//!
//! * What QEMU could read before, of the disk and of its snapshots, it reads the same after our repair.
//! * If ours says that all is well, both sides' `check` says so.
//! * If ours says that damage is left, QEMU's repair leaves some, too, or has changed what the image holds.
//!
//! `BLOCKLAYER_REPAIR_ROUNDS` makes it longer.

use std::path::Path;

use blocklayer_tests::tools::Tools;

use super::support::{Bench, Random, both};

const SIZE: u64 = 300_032;

/// How an image is made, and what has to be said to open it.
struct Feature {
    name: &'static str,
    options: &'static str,
    /// Bytes in a cluster.
    cluster: u64,
    /// More tools runs after the first writes; `img` and `io` stand for the tools.
    then: &'static [&'static str],
    is_encrypted: bool,
}

const fn feature(name: &'static str, options: &'static str, cluster: u64) -> Feature {
    Feature {
        name,
        options,
        cluster,
        then: &[],
        is_encrypted: false,
    }
}

const SNAPSHOT: &[&str] = &[
    "img snapshot -c one t.qcow2",
    "io -c 'write -q -P 7 30k 20k' t.qcow2",
];

const FEATURES: &[Feature] = &[
    feature("version 2", "compat=0.10,cluster_size=512", 512),
    feature("version 3", "cluster_size=4096", 4096),
    feature("1 bit", "cluster_size=1024,refcount_bits=1", 1024),
    feature("2 bits", "cluster_size=1024,refcount_bits=2", 1024),
    feature("4 bits", "cluster_size=2048,refcount_bits=4", 2048),
    feature("8 bits", "cluster_size=512,refcount_bits=8", 512),
    feature("32 bits", "cluster_size=4096,refcount_bits=32", 4096),
    feature("64 bits", "cluster_size=512,refcount_bits=64", 512),
    feature(
        "backing",
        "cluster_size=4096,backing_file=base.raw,backing_fmt=raw",
        4096,
    ),
    Feature {
        then: SNAPSHOT,
        ..feature("snapshot", "cluster_size=4096", 4096)
    },
    Feature {
        then: &[
            "img snapshot -c one t.qcow2",
            "io -c 'write -q -P 7 30k 20k' t.qcow2",
            "img snapshot -c two t.qcow2",
            "io -c 'write -q -z 0 20k' t.qcow2",
        ],
        ..feature("snapshots, version 2", "compat=0.10,cluster_size=512", 512)
    },
    Feature {
        then: &[
            "img convert -c -f qcow2 -O qcow2 -o cluster_size=4096 t.qcow2 u.qcow2",
            "mv u.qcow2 t.qcow2",
            "io -c 'write -q -P 9 100k 10k' t.qcow2",
        ],
        ..feature("compressed", "cluster_size=4096", 4096)
    },
    Feature {
        then: &[
            "img convert -c -f qcow2 -O qcow2 -o cluster_size=4096,compression_type=zstd t.qcow2 u.qcow2",
            "mv u.qcow2 t.qcow2",
            "img snapshot -c one t.qcow2",
            "io -c 'write -q -P 9 100k 10k' t.qcow2",
        ],
        ..feature(
            "zstd, snapshot",
            "cluster_size=4096,compression_type=zstd",
            4096,
        )
    },
    Feature {
        then: &[
            "img bitmap --add -g 4096 t.qcow2 one",
            "io -c 'write -q -P 7 30k 20k' t.qcow2",
        ],
        ..feature("bitmap", "cluster_size=4096", 4096)
    },
    feature("subclusters", "cluster_size=16384,extended_l2=on", 16384),
    Feature {
        then: SNAPSHOT,
        ..feature(
            "subclusters, snapshot",
            "cluster_size=16384,extended_l2=on",
            16384,
        )
    },
    feature("data file", "cluster_size=4096,data_file=data.raw", 4096),
    feature(
        "lazy refcounts",
        "cluster_size=4096,lazy_refcounts=on",
        4096,
    ),
    Feature {
        is_encrypted: true,
        ..feature(
            "luks",
            "cluster_size=4096,encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
            4096,
        )
    },
    Feature {
        is_encrypted: true,
        ..feature(
            "aes",
            "cluster_size=4096,encrypt.format=aes,encrypt.key-secret=s",
            4096,
        )
    },
];

const SECRET: &str = "--object secret,id=s,data=topsecret";

impl Feature {
    /// Runs a shell line in which `img` and `io` are tools.
    fn shell(&self, bench: &Bench, tools: &Tools, line: &str) -> (i32, String) {
        let script = format!(
            "img() {{ '{}' \"$@\"; }}; io() {{ '{}' \"$@\"; }}; {line} 2>&1",
            tools.qemu_img.display(),
            tools.qemu_io.display()
        );
        let output = bench.output(Path::new("/bin/bash"), &["-c", &script]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.code().unwrap_or(-1), text)
    }

    fn must(&self, bench: &Bench, tools: &Tools, line: &str) {
        let (status, text) = self.shell(bench, tools, line);
        assert_eq!(status, 0, "{}: {line}: {text}", self.name);
    }

    /// What follows a subcommand to name an image.
    fn image(&self, name: &str) -> String {
        match self.is_encrypted {
            false => format!("-f qcow2 {name}"),
            true => format!(
                "{SECRET} --image-opts driver=qcow2,file.filename={name},encrypt.key-secret=s"
            ),
        }
    }

    fn make(&self, bench: &Bench, qemu: &Tools, random: &mut Random) {
        let _none = std::fs::remove_file(bench.path("t.qcow2"));
        let options = self.options;
        let secret = if self.is_encrypted { SECRET } else { "" };
        self.must(
            bench,
            qemu,
            &format!("img create -q {secret} -f qcow2 -o {options} t.qcow2 {SIZE}"),
        );
        let mut commands = String::new();
        for value in 1..2 + random.below(4) {
            let at = random.below(SIZE as usize / 512 - 100) * 512;
            let bytes = (1 + random.below(80)) * 512;
            let zero = if random.below(4) == 0 { "-z" } else { "-P" };
            let value = if zero == "-z" {
                String::new()
            } else {
                value.to_string()
            };
            commands += &format!(" -c 'write -q {zero} {value} {at} {bytes}'");
        }
        let image = self.image("t.qcow2");
        self.must(bench, qemu, &format!("io {commands} {image}"));
        for line in self.then {
            self.must(bench, qemu, line);
        }
        let (status, text) = self.shell(bench, qemu, &format!("img check {image}"));
        assert_eq!(status, 0, "{}: {text}", self.name);
    }

    /// What QEMU can read of an image: of the disk, then of its snapshots; none of those that it can't open. What can't be read is zero.
    fn contents(&self, bench: &Bench, qemu: &Tools, name: &str) -> Vec<Option<Vec<u8>>> {
        let mut all = Vec::new();
        for snapshot in ["", "-l snapshot.name=one", "-l snapshot.name=two"] {
            // A copy: not even a mark may be set in what is looked at.
            std::fs::copy(bench.path(name), bench.path("look.qcow2")).expect("there is room");
            let image = self.image("look.qcow2");
            let line = format!("img convert --salvage {snapshot} -O raw {image} look.raw");
            let (status, _text) = self.shell(bench, qemu, &line);
            all.push((status == 0).then(|| bench.read("look.raw")));
        }
        all
    }
}

fn word(image: &[u8], at: u64) -> u64 {
    let bytes = image.get(at as usize..at as usize + 8);
    bytes.map_or(0, |b| {
        u64::from_be_bytes(b.try_into().expect("eight bytes"))
    })
}

const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// The place of some word of metadata.
fn some_word(image: &[u8], cluster: u64, random: &mut Random) -> u64 {
    let mut entry = |table: u64, words: u64| table + 8 * random.below(words as usize) as u64;
    let places = [
        entry(word(image, 48), 2),
        entry(word(image, word(image, 48)) & OFFSET, 10),
        entry(word(image, word(image, 48)) & OFFSET, 10),
        entry(word(image, 40), 2),
        entry(word(image, word(image, 40)) & OFFSET, cluster / 8),
        entry(word(image, word(image, 40)) & OFFSET, 40.min(cluster / 8)),
        entry(word(image, word(image, 40)) & OFFSET, 40.min(cluster / 8)),
    ];
    let snapshots = word(image, 64);
    match random.below(9) {
        n if n < places.len() => places[n],
        _ if snapshots == 0 => places[1],
        7 => snapshots + 8 * random.below(7) as u64,
        _ => (word(image, word(image, snapshots)) & OFFSET) + 8 * random.below(20) as u64,
    }
}

fn damage(image: &mut [u8], cluster: u64, random: &mut Random) -> String {
    let mut story = String::new();
    for _ in 0..1 + random.below(3) {
        let at = some_word(image, cluster, random);
        let old = word(image, at);
        let near_end = image.len() / cluster as usize + 2;
        let place = cluster * random.below(near_end) as u64;
        let new = match random.below(12) {
            0..3 => 0,
            3..5 => old ^ 1 << random.below(64),
            5..7 => place | COPIED,
            7 => place,
            8 => place | 1,
            9 => (place + 512) | 1,
            10 => old ^ COPIED,
            _ => random.next(),
        };
        if new == 0 && at == word(image, 64) {
            // The L1 table of a snapshot would be the header, and its guest data whatever the header says.
            continue;
        }
        let Some(words) = image.get_mut(at as usize..at as usize + 8) else {
            continue;
        };
        words.copy_from_slice(&new.to_be_bytes());
        story += &format!("at {at:#x}: {old:#x} became {new:#x}\n");
    }
    story
}

#[test]
fn what_ours_repairs_is_sound_to_both_and_reads_as_before() {
    let Some((ours, qemu)) = both("repair") else {
        return;
    };
    let mut random = Random::new("repair");
    let rounds = std::env::var("BLOCKLAYER_REPAIR_ROUNDS").ok();
    let rounds: usize = rounds.and_then(|s| s.parse().ok()).unwrap_or(40);
    let bench = Bench::new();
    bench.write("base.raw", &vec![0x5a; SIZE as usize - 70_000]);
    let (mut sound, mut damaged, mut better) = (0, 0, 0);
    for round in 0..rounds {
        let feature = &FEATURES[round % FEATURES.len()];
        feature.make(&bench, &qemu, &mut random);
        let mut image = bench.read("t.qcow2");
        let story = damage(&mut image, feature.cluster, &mut random);
        let story = format!("round {round}, {}:\n{story}", feature.name);
        for name in ["t.qcow2", "ours.qcow2", "qemu.qcow2"] {
            bench.write(name, &image);
        }
        let before = feature.contents(&bench, &qemu, "t.qcow2");
        let repair = |tools: &Tools, name: &str| {
            let image = match tools.side == ours.side {
                true => format!("-f qcow2 {name}"),
                false => feature.image(name),
            };
            feature.shell(&bench, tools, &format!("img check -r all {image}"))
        };
        let (status, said) = repair(&ours, "ours.qcow2");
        let (their_status, they_said) = repair(&qemu, "qemu.qcow2");
        let story = format!("{story}\nours, {status}: {said}\nqemu, {their_status}: {they_said}");
        assert!((0..=3).contains(&status), "{story}");
        let after = feature.contents(&bench, &qemu, "ours.qcow2");
        for (before, after) in before.iter().zip(&after) {
            assert!(before.is_none() || before == after, "{story}");
        }
        if they_said.contains("cannot unlock any keyslot") {
            // What the damage made of the keys is nobody's to repair, and QEMU looks no further.
            damaged += 1;
        } else if status == 0 {
            bench.check(&ours, "ours.qcow2");
            let image = feature.image("ours.qcow2");
            let (checked, text) = feature.shell(&bench, &qemu, &format!("img check {image}"));
            assert_eq!(checked, 0, "{story}\nafterwards: {text}");
            sound += 1;
            better += usize::from(their_status != 0);
        } else if their_status == 0 {
            let theirs = feature.contents(&bench, &qemu, "qemu.qcow2");
            let image = feature.image("qemu.qcow2");
            let (checked, _text) = feature.shell(&bench, &qemu, &format!("img check {image}"));
            assert!(checked != 0 || theirs != before, "{story}");
            damaged += 1;
        } else {
            damaged += 1;
        }
    }
    println!("{sound} sound, {better} of them not so after QEMU's repair; {damaged} still damaged");
}
