// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images that QEMU can make and we cannot use yet, and images that nobody should make: refused with an error that names the
//! reason, exit code 1, and not a byte of the file changed. Random damage never ends in a panic, a signal or a hang.
//!
//! QEMU accepts most of what is refused here, so these are no golden scripts: they run on our tools alone.

use std::path::Path;
use std::process::Output;

use blocklayer_tests::tools::{self, Tools};

use crate::support::{Bench, Random, both};

/// The tool's whole complaint, lower case, for looking up words in.
fn complaint(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stderr),
        String::from_utf8_lossy(&output.stdout)
    )
    .to_lowercase()
}

/// Runs a tool of ours that must refuse with exit code 1 and a message that holds every one of `words`.
fn refuses(bench: &Bench, program: &Path, arguments: &[&str], words: &[&str]) {
    let output = bench.output(program, arguments);
    let text = complaint(&output);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
    for word in words {
        assert!(text.contains(word), "{arguments:?}: no '{word}' in: {text}");
    }
    assert!(!text.contains("panicked"), "{arguments:?}: {text}");
}

#[test]
fn features_that_we_lack_are_refused_by_name_and_nothing_is_written() {
    let Some((ours, qemu)) = both("refused features") else {
        return;
    };
    let bench = Bench::new();
    let secret = "--object secret,id=key,data=open-sesame";
    let makes: [(&str, String, &[&str]); 2] = [
        (
            "luks.qcow2",
            format!(
                "create -q {secret} -f qcow2 \
                 -o encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10 luks.qcow2 1M"
            ),
            &["encrypt"],
        ),
        (
            "aes.qcow2",
            format!(
                "create -q {secret} -f qcow2 -o encrypt.format=aes,encrypt.key-secret=key aes.qcow2 1M"
            ),
            &["encrypt"],
        ),
    ];
    for (image, make, words) in makes {
        bench.img(&qemu, &make.split_whitespace().collect::<Vec<_>>());
        let before = bench.read(image);
        refuses(
            &bench,
            &ours.qemu_io,
            &["-f", "qcow2", "-c", "write 0 512", image],
            words,
        );
        refuses(
            &bench,
            &ours.qemu_io,
            &["-r", "-f", "qcow2", "-c", "read 0 512", image],
            words,
        );
        refuses(
            &bench,
            &ours.qemu_img,
            &["convert", "-f", "qcow2", "-O", "raw", image, "out.raw"],
            words,
        );
        refuses(
            &bench,
            &ours.qemu_img,
            &["resize", "-f", "qcow2", image, "2M"],
            words,
        );
        assert!(bench.read(image) == before, "{image} was changed");
    }
}

#[test]
fn calls_that_we_lack_are_refused_by_name() {
    let ours = our_tools();
    let bench = Bench::new();
    bench.img(&ours, &["create", "-q", "-f", "qcow2", "t.qcow2", "1M"]);
    let before = bench.read("t.qcow2");
    for (line, words) in [
        (
            "create -f qcow2 -o encrypt.format=luks out.qcow2 1M",
            ["encrypt"],
        ),
        ("commit t.qcow2", ["commit"]),
        ("rebase -b t.qcow2 t.qcow2", ["rebase"]),
        ("measure -O qcow2 t.qcow2", ["measure"]),
        ("dd if=t.qcow2 of=out.raw", ["dd"]),
    ] {
        refuses(
            &bench,
            &ours.qemu_img,
            &line.split(' ').collect::<Vec<_>>(),
            &words,
        );
        assert!(
            bench.read("t.qcow2") == before,
            "{line}: the image was changed"
        );
        assert!(
            !bench.path("out.qcow2").exists(),
            "{line} left something behind"
        );
    }
}

#[test]
fn a_chain_that_loops_is_refused_by_everything_that_follows_it() {
    let ours = our_tools();
    let bench = Bench::new();
    for line in [
        "create -q -f qcow2 a.qcow2 64k",
        "create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2",
        "create -q -f qcow2 -u -b b.qcow2 -F qcow2 a.qcow2 64k",
    ] {
        bench.img(&ours, &line.split(' ').collect::<Vec<_>>());
    }
    let before = (bench.read("a.qcow2"), bench.read("b.qcow2"));
    for options in [&["-r"][..], &["-r", "-U"], &[]] {
        let arguments = [options, &["-c", "read 0 512", "b.qcow2"]].concat();
        refuses(&bench, &ours.qemu_io, &arguments, &["loop", ".qcow2"]);
    }
    for line in [
        "map b.qcow2",
        "check -U b.qcow2",
        "info --backing-chain b.qcow2",
        "convert -O raw b.qcow2 out.raw",
    ] {
        refuses(
            &bench,
            &ours.qemu_img,
            &line.split(' ').collect::<Vec<_>>(),
            &["loop", ".qcow2"],
        );
    }
    assert!(before == (bench.read("a.qcow2"), bench.read("b.qcow2")));
}

#[test]
fn random_damage_ends_in_an_error_or_an_answer_but_never_in_a_panic_a_signal_or_a_hang() {
    let ours = our_tools();
    let mut random = Random::new("random damage");
    let bench = Bench::new();
    for line in [
        "create -q -f raw base.raw 100k",
        "create -q -f qcow2 -o cluster_size=512 -b base.raw -F raw good.qcow2 300000",
    ] {
        bench.img(&ours, &line.split(' ').collect::<Vec<_>>());
    }
    let commands = [
        "write -P 1 0 40000",
        "write -z 50000 20000",
        "write -P 2 290000 10000",
    ];
    bench.io(&ours, &commands.map(str::to_owned), "good.qcow2");
    let good = bench.read("good.qcow2");
    for round in 0..40 {
        let mut bad = good.clone();
        for _ in 0..1 + random.below(4) {
            // Half the damage goes into the header, the rest anywhere.
            let limit = if random.below(2) == 0 { 160 } else { bad.len() };
            let at = random.below(limit);
            bad[at] = match random.below(3) {
                0 => 0xff,
                1 => 0,
                _ => u8::try_from(random.below(256)).expect("below 256"),
            };
        }
        if random.below(5) == 0 {
            bad.truncate(random.below(good.len()));
        }
        for line in [
            "qemu_io -r -f qcow2 -c 'read 0 300000' -c map -c info bad.qcow2",
            "qemu_io -f qcow2 -c 'write 1000 30000' -c 'write -z 60000 9000' -c 'discard 0 20k' bad.qcow2",
            "qemu_img check -f qcow2 bad.qcow2",
            "qemu_img map -f qcow2 --output=json bad.qcow2",
            "qemu_img info -f qcow2 bad.qcow2",
        ] {
            bench.write("bad.qcow2", &bad);
            survive(&bench, &ours, line, &format!("round {round}"));
        }
    }
}

fn our_tools() -> Tools {
    tools::our_tools().unwrap_or_else(|why| panic!("{why}"))
}

/// Runs a line in a shell that allows 2 GiB of address space and 20 seconds; the tool must end by itself, with a status of its own.
fn survive(bench: &Bench, tools: &Tools, line: &str, story: &str) {
    let line = line
        .replacen("qemu_io", &tools.qemu_io.display().to_string(), 1)
        .replacen("qemu_img", &tools.qemu_img.display().to_string(), 1);
    let script = format!("ulimit -v 2097152; exec timeout -s KILL 20 {line}");
    let output = bench.output(Path::new("/bin/bash"), &["-c", &script]);
    let text = complaint(&output);
    let code = output.status.code();
    assert!(
        code.is_some_and(|code| (0..=3).contains(&code)) && !text.contains("panicked"),
        "{story}: {line}: {}\n{text}",
        output.status
    );
}
