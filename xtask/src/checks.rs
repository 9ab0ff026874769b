// SPDX-License-Identifier: MIT OR Apache-2.0
//! The verbs that call cargo: tests, golden scripts, documentation, and all that continuous integration checks.

use crate::run::{build_tools, cargo, installed_qemu, run};
use crate::tidy;

/// Every test. With nextest where it is installed, which does not run doc tests: those follow.
pub fn test() -> Result<(), String> {
    build_tools()?;
    let nextest = cargo()
        .args(["nextest", "--version"])
        .output()
        .is_ok_and(|output| output.status.success());
    if nextest {
        run(cargo().args(["nextest", "run", "--workspace", "--no-fail-fast"]))?;
        run(cargo().args(["test", "--quiet", "--workspace", "--doc"]))?;
    } else {
        run(cargo().args(["test", "--workspace", "--no-fail-fast"]))?;
    }
    match installed_qemu() {
        Ok(version) => {
            println!("All tests passed, those that compare with QEMU {version} included.");
        }
        Err(why) => println!("All tests passed. SKIPPED: those that compare with QEMU: {why}"),
    }
    Ok(())
}

/// The golden scripts, all or those whose name contains one of the given words.
pub fn golden(words: &[&str]) -> Result<(), String> {
    let record = words.contains(&"--record");
    let mut names: Vec<&str> = words.iter().copied().filter(|w| *w != "--record").collect();
    if let Some(option) = names.iter().find(|name| name.starts_with('-')) {
        return Err(format!("golden has no option {option}"));
    }
    if names.is_empty() {
        names.push("");
    }
    if !record {
        build_tools()?;
    }
    for name in names {
        let mut command = cargo();
        command.args([
            "test",
            "--quiet",
            "-p",
            "blocklayer-tests",
            "--test",
            "golden",
        ]);
        if record {
            command.env("BLOCKLAYER_GOLDEN_RECORD", "1");
        }
        if !name.is_empty() {
            command.args(["--", name]);
        }
        run(&mut command)?;
    }
    Ok(())
}

/// The documentation of every crate, warnings denied.
pub fn docs() -> Result<(), String> {
    run(cargo()
        .args(["doc", "--workspace", "--no-deps"])
        .env("RUSTDOCFLAGS", "-D warnings"))
}

/// All that continuous integration checks, cheapest first.
pub fn ci() -> Result<(), String> {
    run(cargo().args(["fmt", "--all", "--check"]))?;
    tidy::tidy()?;
    run(cargo().args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))?;
    docs()?;
    test()
}
