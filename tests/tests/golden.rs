// SPDX-License-Identifier: MIT OR Apache-2.0
//! Golden scripts as tests: every script runs on our tools (`NAME::ours`) and on the installed QEMU's (`NAME::qemu`), and
//! both must print what was once recorded from QEMU.
//!
//! With `BLOCKLAYER_GOLDEN_RECORD=1` the outputs are recorded anew instead, from the installed tools
//! (`cargo xtask golden --record`). Without a QEMU 10 the `::qemu` tests are skipped and a last line says so; where
//! `CI=true` or `BLOCKLAYER_REQUIRE_QEMU=1` that is a failure.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use blocklayer_tests::golden::{self, Script};
use blocklayer_tests::tools::{self, Side, Tools};
use libtest_mimic::{Arguments, Failed, Trial};

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let scripts = match golden::load_all() {
        Ok(scripts) => scripts,
        Err(why) => {
            eprintln!("golden scripts: {why}");
            return ExitCode::FAILURE;
        }
    };
    let ours = Arc::new(tools::our_tools());
    let qemu = Arc::new(tools::installed_qemu());
    let record = std::env::var("BLOCKLAYER_GOLDEN_RECORD").is_ok_and(|v| v == "1");

    let mut trials = Vec::new();
    for script in scripts {
        let script = Arc::new(script);
        if record {
            trials.push(trial(&script, &qemu, Side::Qemu, Script::record));
            continue;
        }
        let skip = qemu.is_err() && !tools::qemu_required();
        let ours_skip = skip && script.needs_qemu();
        trials.push(trial(&script, &ours, Side::Ours, Script::check).with_ignored_flag(ours_skip));
        trials.push(trial(&script, &qemu, Side::Qemu, Script::check).with_ignored_flag(skip));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    if let Err(why) = qemu.as_ref()
        && !tools::qemu_required()
        && !arguments.list
    {
        println!("SKIPPED: the comparisons with the installed QEMU tools: {why}");
    }
    conclusion.exit_code()
}

type Action = fn(&Script, &Tools, &Path) -> Result<(), String>;

fn trial(
    script: &Arc<Script>,
    tools: &Arc<Result<Tools, String>>,
    side: Side,
    action: Action,
) -> Trial {
    let name = format!("{}::{side}", script.name);
    let script = Arc::clone(script);
    let tools = Arc::clone(tools);
    Trial::test(name, move || {
        let tools = tools.as_ref().as_ref().map_err(Failed::from)?;
        let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
        action(&script, tools, scratch).map_err(Failed::from)
    })
}
