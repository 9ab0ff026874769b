// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask VERB`: the project's own commands. It depends on nothing but the standard library, so that it builds in a moment
//! on a fresh checkout.
//!
//! One file per concern: `run` starts processes, `checks` holds the verbs that call cargo, `tidy` the rules that no compiler
//! checks, `demo` the walk through a real backing chain, `long` the random tests that run for as long as one likes,
//! `plant` the faults that the tests have to find.

mod checks;
mod demo;
mod long;
mod plant;
mod run;
mod tidy;

use std::process::ExitCode;

const HELP: &str = "\
Usage: cargo xtask VERB

  test                      build the tools and run every test, golden scripts and doc tests included
  golden [--record] [NAME]  run the golden scripts (those whose name contains NAME), or record their
                            outputs anew from the installed QEMU tools
  crash [--seed N] [--count N]
                            cut the power at 60 places in each of N random runs
  fault [--seed N] [--count N]
                            let every request to the file fail, and those at every named point; cut the
                            power N times after each
  drop [--seed N] [--seconds N | --count N]
                            drop requests at every await point, then at random on four threads for N
                            seconds (60), or in N runs
  diff [--seed N] [--count N]
                            run N random scripts on our tools and on the installed QEMU tools
  interop [--seed N] [--only NAME]
                            hand images of every feature and pair of features to and fro between our tools
                            and the installed QEMU tools (those whose name contains NAME)
  fuzz [--seed N] [--count N]
                            N damaged images of each kind, in an ordinary process
  fuzz --target open|ops [--seconds N]
                            the same under libFuzzer (needs cargo-fuzz)
  bench [--rounds N] [--quick] [--only NAME]
                            measure us beside QEMU's tools, imago and qcow2-rs; results in target/bench
  plant [RULE]              take each rule of docs/INVARIANTS.md (those whose id contains RULE) out of a copy of
                            the code, and see the tests fail
  demo [--keep]             build a real backing chain, drive it through qemu-io, map and check it
  tidy                      the project's own rules: headers, file sizes, invariants, golden scripts
  docs                      build the documentation, warnings denied
  ci                        format check, clippy, docs, tidy, test
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["test"] => checks::test(),
        ["golden", rest @ ..] => checks::golden(rest),
        ["crash", rest @ ..] => long::crash(rest),
        ["fault", rest @ ..] => long::fault(rest),
        ["drop", rest @ ..] => long::drop(rest),
        ["fuzz", rest @ ..] => long::fuzz(rest),
        ["diff", rest @ ..] => long::diff(rest),
        ["interop", rest @ ..] => long::interop(rest),
        ["bench", rest @ ..] => long::bench(rest),
        ["plant", rest @ ..] => plant::plant(rest),
        ["demo"] => demo::demo(false),
        ["demo", "--keep"] => demo::demo(true),
        ["tidy"] => tidy::tidy(),
        ["docs"] => checks::docs(),
        ["ci"] => checks::ci(),
        ["help" | "--help" | "-h"] | [] => {
            print!("{HELP}");
            Ok(())
        }
        _ => Err(format!(
            "no such command: cargo xtask {}\n\n{HELP}",
            words.join(" ")
        )),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("xtask: {why}");
            ExitCode::FAILURE
        }
    }
}
