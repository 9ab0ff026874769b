// SPDX-License-Identifier: MIT OR Apache-2.0
//! What one side encrypts the other decrypts: images of the format `luks` with every cipher, mode, IV generator and hash.
//!
//! Method: one side makes an image and writes to it, the other reads that and writes elsewhere, and the first reads both. Every write begins and ends within a
//! sector, so that it is read, modified and written.

use blocklayer_tests::tools::Tools;

use crate::subclusters::commands;
use crate::support::{Bench, Random, both, first_difference};

const SECRET: &str = "secret,id=s,data=a password";

/// How an image is encrypted: the values of `-o`, without the secret.
#[derive(Clone, Debug)]
struct Combination {
    cipher: &'static str,
    mode: &'static str,
    iv_gen: &'static str,
    iv_hash: Option<&'static str>,
    hash: &'static str,
}

impl Combination {
    fn options(&self) -> String {
        let Combination {
            cipher,
            mode,
            iv_gen,
            hash,
            ..
        } = self;
        let iv_hash = match self.iv_hash {
            Some(hash) => format!(",ivgen-hash-alg={hash}"),
            None => String::new(),
        };
        format!(
            "key-secret=s,iter-time=1,cipher-alg={cipher},cipher-mode={mode},ivgen-alg={iv_gen}{iv_hash},hash-alg={hash}"
        )
    }
}

/// Every cipher in every mode; IV generators and hashes come by in turn.
fn combinations() -> Vec<Combination> {
    let ciphers = [
        "aes-128",
        "aes-192",
        "aes-256",
        "cast5-128",
        "serpent-128",
        "serpent-192",
        "serpent-256",
        "twofish-128",
        "twofish-192",
        "twofish-256",
    ];
    let hashes = [
        "sha256",
        "sha1",
        "sha224",
        "sha384",
        "sha512",
        "ripemd160",
        "md5",
        "sm3",
    ];
    let mut all = Vec::new();
    for cipher in ciphers {
        for mode in ["xts", "cbc", "ctr", "ecb"] {
            let too_short_blocks = cipher == "cast5-128" && mode == "xts";
            // Key material that is no whole sectors: QEMU's tool can't have it.
            let no_whole_sectors = cipher.ends_with("192") && mode != "xts";
            if too_short_blocks || no_whole_sectors {
                continue;
            }
            let (iv_gen, iv_hash) = match (all.len() % 3, cipher) {
                (0, _) => ("plain64", None),
                (1, _) => ("plain", None),
                (_, "cast5-128") => ("essiv", Some("md5")),
                (_, _) => ("essiv", Some("sha256")),
            };
            all.push(Combination {
                cipher,
                mode,
                iv_gen,
                iv_hash,
                hash: hashes[all.len() % hashes.len()],
            });
        }
    }
    all
}

fn io(bench: &Bench, tools: &Tools, image: &str, commands: &[&str]) {
    let options = format!("driver=luks,key-secret=s,file.filename={image}");
    let mut arguments = vec!["--object", SECRET, "--image-opts", &options];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    let text = bench.run(&tools.qemu_io, &arguments);
    assert!(
        !text.contains("verification failed"),
        "{} {image}: {text}",
        tools.side
    );
}

/// `maker` makes an image, and the two write and read by turns.
fn hand_over(bench: &Bench, maker: &Tools, other: &Tools, combination: &Combination) {
    println!("made by {}: {combination:?}", maker.side);
    let options = combination.options();
    let create = [
        "create", "-q", "-f", "luks", "--object", SECRET, "-o", &options, "t.luks", "256k",
    ];
    bench.img(maker, &create);
    io(bench, maker, "t.luks", &["write -P 1 1000 50000"]);
    io(
        bench,
        other,
        "t.luks",
        &["read -P 1 1000 50000", "write -P 2 30001 70001"],
    );
    io(
        bench,
        maker,
        "t.luks",
        &[
            "read -P 1 1000 29001",
            "read -P 2 30001 70001",
            "write -z 512 512",
        ],
    );
    io(
        bench,
        other,
        "t.luks",
        &["read -P 0 512 512", "read -P 1 1024 28977"],
    );
    let info = ["info", "t.luks"];
    assert_eq!(bench.img(maker, &info), bench.img(other, &info));
}

#[test]
fn qemu_reads_and_writes_what_ours_makes_in_every_combination() {
    let Some((ours, qemu)) = both("luks") else {
        return;
    };
    let bench = Bench::new();
    for combination in combinations() {
        hand_over(&bench, &ours, &qemu, &combination);
    }
}

/// Few, since QEMU measures for seconds before it makes an image. `BLOCKLAYER_ALL_CIPHERS=1` takes all.
#[test]
fn ours_reads_and_writes_what_qemu_makes() {
    let Some((ours, qemu)) = both("luks") else {
        return;
    };
    let bench = Bench::new();
    let all = combinations();
    let every = std::env::var_os("BLOCKLAYER_ALL_CIPHERS").map_or(9, |_| 1);
    for combination in all.iter().step_by(every) {
        hand_over(&bench, &qemu, &ours, combination);
    }
}

/// Key material of 192-bit keys is no whole number of sectors. QEMU's tool ends in an assertion then, so it can't be asked.
#[test]
fn ours_has_ciphers_that_qemu_has_no_key_material_for() {
    let Some((ours, _)) = both("luks") else {
        return;
    };
    let combination = Combination {
        cipher: "aes-192",
        mode: "cbc",
        iv_gen: "plain64",
        iv_hash: None,
        hash: "sha256",
    };
    hand_over(&Bench::new(), &ours, &ours, &combination);
}

/// A qcow2 image that lies in a LUKS one grows by noise, which must not show: not around small writes, nor in new tables.
#[test]
fn a_qcow2_image_lies_in_a_luks_one() {
    const CLUSTER: usize = 4 << 10;
    const LUKS: &str = "driver=luks,key-secret=s,file.filename=t.luks";
    const QCOW2: &str = "driver=qcow2,file.driver=luks,file.key-secret=s,file.file.filename=t.luks";
    let test = "qcow2-in-luks";
    let Some((ours, qemu)) = both(test) else {
        return;
    };
    let mut random = Random::new(test);
    let bench = Bench::new();
    let options = format!("cluster_size={CLUSTER}");
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        &options,
        "empty.qcow2",
        "1M",
    ];
    bench.img(&ours, &create);
    let length = bench.read("empty.qcow2").len().to_string();
    let options = "key-secret=s,iter-time=1";
    let create = [
        "create", "-q", "--object", SECRET, "-f", "luks", "-o", options, "t.luks", &length,
    ];
    bench.img(&ours, &create);
    let copy = [
        "convert",
        "-n",
        "--object",
        SECRET,
        "-f",
        "raw",
        "empty.qcow2",
        "--target-image-opts",
        LUKS,
    ];
    bench.img(&ours, &copy);
    let mut model = vec![0; 1 << 20];
    for turn in 0..6 {
        let (side, other) = if turn % 2 == 0 {
            (&ours, &qemu)
        } else {
            (&qemu, &ours)
        };
        let commands = commands(&mut random, &mut model, CLUSTER);
        let mut arguments = vec!["--object", SECRET, "--image-opts", QCOW2];
        arguments.extend(commands.iter().flat_map(|c| ["-c", c]));
        bench.run(&side.qemu_io, &arguments);
        for side in [side, other] {
            bench.img(side, &["check", "--object", SECRET, "--image-opts", QCOW2]);
            let read = [
                "convert",
                "--object",
                SECRET,
                "-O",
                "raw",
                "--image-opts",
                QCOW2,
                "contents.raw",
            ];
            bench.img(side, &read);
            if let Some(difference) = first_difference(&bench.read("contents.raw"), &model) {
                panic!(
                    "{difference} for {} in turn {turn} after {commands:?}",
                    side.side
                );
            }
        }
    }
}
