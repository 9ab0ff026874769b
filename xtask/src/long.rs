// SPDX-License-Identifier: MIT OR Apache-2.0
//! The verbs that run a random test for as long as one likes. Each has a short run among the ordinary tests.

use crate::run::{build_tools, cargo, root, run};

/// Power cuts. `--count` is the number of seeds, each with 60 cuts; `--seed` is the first one.
pub fn crash(words: &[&str]) -> Result<(), String> {
    let wishes = Wishes::parse(words, 500)?;
    let mut command = optimised_test("qcow2", "tests::crash");
    command.env("BLOCKLAYER_CRASH_SEEDS", wishes.count.to_string());
    wishes.run(command)
}

/// Errors from below: at every named point, and of every request. `--count` is the number of power cuts after each, `--seed` what they go by.
pub fn fault(words: &[&str]) -> Result<(), String> {
    let wishes = Wishes::parse(words, 10)?;
    let mut command = optimised_test("qcow2", "tests::faults");
    command
        .env("BLOCKLAYER_FAULT_CUTS", wishes.count.to_string())
        .env("BLOCKLAYER_FAULT_EVERY", "1");
    wishes.run(command)
}

/// Dropped requests: at every await point, and at random on several threads for `--seconds`. `--count`: for so many random runs instead, with seeds
/// that follow on `--seed`.
pub fn drop(words: &[&str]) -> Result<(), String> {
    let (mut numbers, mut seconds) = (Vec::new(), None);
    for pair in words.chunks(2) {
        match *pair {
            ["--seconds", n] => {
                let n: u64 = n.parse().map_err(|_| format!("{n} is no number"))?;
                seconds = Some(n);
            }
            _ => numbers.extend(pair),
        }
    }
    let has_count = numbers.contains(&"--count");
    let wishes = Wishes::parse(&numbers, 0)?;
    let mut command = optimised_test("qcow2", "tests::dropped");
    command
        .arg("tests::stress")
        .env("BLOCKLAYER_DROP_STEP", "5");
    if has_count {
        command.env("BLOCKLAYER_STRESS_RUNS", wishes.count.to_string());
    }
    if let Some(seconds) = seconds.or((!has_count).then_some(60)) {
        command.env("BLOCKLAYER_STRESS_SECONDS", seconds.to_string());
    }
    wishes.run(command)
}

/// Random scripts on our tools and on the installed ones. `--count` is the number of scripts.
pub fn diff(words: &[&str]) -> Result<(), String> {
    let wishes = Wishes::parse(words, 500)?;
    build_tools()?;
    let mut command = interop_test("twin");
    command.env("BLOCKLAYER_TWIN_SCRIPTS", wishes.count.to_string());
    wishes.run(command)
}

/// Images of every feature and pair of features change hands between our tools and the installed ones. `--only` leaves those whose name contains a word.
pub fn interop(words: &[&str]) -> Result<(), String> {
    let (mut numbers, mut only) = (Vec::new(), None);
    for pair in words.chunks(2) {
        match *pair {
            ["--only", name] => only = Some(name),
            _ => numbers.extend(pair),
        }
    }
    if numbers.contains(&"--count") {
        return Err("interop has no option --count".to_owned());
    }
    let wishes = Wishes::parse(&numbers, 0)?;
    build_tools()?;
    let mut command = interop_test("matrix");
    command.env("BLOCKLAYER_MATRIX", "all");
    if let Some(only) = only {
        command.env("BLOCKLAYER_MATRIX_ONLY", only);
    }
    wishes.run(command)
}

/// Damaged images. `--count N` cases of each kind in an ordinary process, or `--target open|ops` with `--seconds N` under libFuzzer, which finds its way
/// by coverage (`cargo install cargo-fuzz`).
pub fn fuzz(words: &[&str]) -> Result<(), String> {
    if !words.contains(&"--target") {
        let wishes = Wishes::parse(words, 20_000)?;
        let mut command = cargo();
        command
            .args(["test", "--quiet", "--release", "-p", "fuzzing"])
            .args(["--test", "quick", "--", "--nocapture"])
            .env("BLOCKLAYER_FUZZ_CASES", wishes.count.to_string());
        return wishes.run(command);
    }
    let (mut target, mut seconds) = (None, 3600u64);
    for pair in words.chunks(2) {
        match *pair {
            ["--target", name @ ("open" | "ops")] => target = Some(name),
            ["--seconds", n] => seconds = n.parse().map_err(|_| format!("{n} is no number"))?,
            _ => {
                return Err(format!(
                    "no such option, or no such value: {}",
                    pair.join(" ")
                ));
            }
        }
    }
    let target = target.unwrap_or("open");
    let seeds = root().join("fuzz/seeds");
    run(cargo()
        .args([
            "run",
            "--quiet",
            "-p",
            "fuzzing",
            "--example",
            "seeds",
            "--",
        ])
        .arg(&seeds))?;
    // What is fuzzed is safe code, and without a sanitizer there are ten times as many cases. A stable compiler does, if it is told so.
    let mut command = std::process::Command::new("cargo");
    command
        .args(["fuzz", "run", "--sanitizer", "none"])
        .env("RUSTC_BOOTSTRAP", "1");
    let corpus = root().join("fuzz/corpus").join(target);
    std::fs::create_dir_all(&corpus).map_err(|e| format!("{}: {e}", corpus.display()))?;
    command
        .current_dir(root())
        .arg(target)
        .arg(&corpus)
        .args((target == "open").then_some(&seeds))
        .arg("--")
        .args([
            format!("-max_total_time={seconds}"),
            "-dict=fuzz/qcow2.dict".to_owned(),
            // An image, or the bytes that requests are made of.
            format!(
                "-max_len={}",
                if target == "open" { 512 << 10 } else { 512 }
            ),
            "-len_control=0".to_owned(),
            "-timeout=120".to_owned(),
            "-rss_limit_mb=1024".to_owned(),
            "-print_final_stats=1".to_owned(),
            "-print_funcs=0".to_owned(),
        ])
        .env("BLOCKLAYER_FUZZ_SEEDS", &seeds);
    run(&mut command)
}

/// Benchmarks beside QEMU's tools and the other crates. The peers are built by this verb alone.
pub fn bench(words: &[&str]) -> Result<(), String> {
    let target = root().join("target");
    run(cargo().args([
        "build",
        "--quiet",
        "--release",
        "-p",
        "qemu-io",
        "-p",
        "qemu-img",
    ]))?;
    run(cargo()
        .args([
            "run",
            "--quiet",
            "--release",
            "--manifest-path",
            "bench/Cargo.toml",
        ])
        .arg("--target-dir")
        .arg(target.join("bench-build"))
        .arg("--")
        .arg(target.join("release"))
        .arg(target.join("bench"))
        .args(words))
}

/// What the command line asks for.
struct Wishes {
    seed: Option<u64>,
    count: u64,
}

impl Wishes {
    fn parse(words: &[&str], count: u64) -> Result<Wishes, String> {
        let mut wishes = Wishes { seed: None, count };
        for pair in words.chunks(2) {
            let [option, value] = *pair else {
                return Err(format!("{} needs a number", pair[0]));
            };
            let number = value
                .parse()
                .map_err(|_| format!("{option}: {value} is no number"))?;
            match option {
                "--seed" => wishes.seed = Some(number),
                "--count" => wishes.count = number,
                _ => return Err(format!("no such option: {option}")),
            }
        }
        Ok(wishes)
    }

    fn run(self, mut command: std::process::Command) -> Result<(), String> {
        if let Some(seed) = self.seed {
            command.env("BLOCKLAYER_SEED", seed.to_string());
        }
        run(&mut command)
    }
}

/// One of the tests that drive both tool sets.
fn interop_test(name: &str) -> std::process::Command {
    let mut command = cargo();
    command
        .args(["test", "--quiet", "-p", "blocklayer-tests"])
        .args(["--test", "interop", "--", "--nocapture", name]);
    command
}

/// One test with optimisation, in a target directory of its own, so that the ordinary one is not rebuilt.
fn optimised_test(package: &str, name: &str) -> std::process::Command {
    let mut command = cargo();
    command
        .args(["test", "--quiet", "-p", package, "--lib", "--target-dir"])
        .arg(root().join("target/long"))
        .args(["--", "--nocapture", name])
        .env("CARGO_PROFILE_DEV_OPT_LEVEL", "2");
    command
}
