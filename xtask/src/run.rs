// SPDX-License-Identifier: MIT OR Apache-2.0
//! Starting processes, and where things are in the workspace. Called by every verb.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The workspace's root directory.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// A cargo command in the workspace's root; the same cargo that started us.
pub fn cargo() -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(root());
    command
}

/// Runs a command with our streams and fails when it does.
pub fn run(command: &mut Command) -> Result<(), String> {
    let text = shown(command);
    let status = command
        .status()
        .map_err(|e| format!("cannot run {text}: {e}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("{text}: {status}"))
    }
}

/// The command as somebody would type it: the program without its directory, arguments with spaces quoted.
pub fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let mut text = program
        .file_name()
        .unwrap_or(program.as_os_str())
        .to_string_lossy()
        .into_owned();
    for argument in command.get_args() {
        let argument = argument.to_string_lossy();
        text.push(' ');
        if argument.is_empty() || argument.contains([' ', '"', '{']) {
            text.push('\'');
            text.push_str(&argument);
            text.push('\'');
        } else {
            text.push_str(&argument);
        }
    }
    text
}

/// Builds our two tools and returns the directory they are in.
pub fn build_tools() -> Result<PathBuf, String> {
    run(cargo().args(["build", "--quiet", "-p", "qemu-io", "-p", "qemu-img"]))?;
    let exe =
        std::env::current_exe().map_err(|e| format!("cannot find xtask's own binary: {e}"))?;
    let dir = exe
        .parent()
        .ok_or_else(|| format!("{} lies in no directory", exe.display()))?;
    for tool in ["qemu-io", "qemu-img"] {
        if !dir.join(tool).is_file() {
            return Err(format!(
                "cargo built {tool}, but {} does not exist",
                dir.join(tool).display()
            ));
        }
    }
    Ok(dir.to_path_buf())
}

/// The version of the installed QEMU tools, or why they cannot be compared with.
pub fn installed_qemu() -> Result<String, String> {
    let mut found = String::new();
    for tool in ["/usr/bin/qemu-io", "/usr/bin/qemu-img"] {
        let output = Command::new(tool)
            .arg("--version")
            .output()
            .map_err(|e| format!("{tool}: {e}"))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text
            .split_whitespace()
            .skip_while(|word| *word != "version")
            .nth(1)
            .unwrap_or("unknown")
            .to_owned();
        if !version.starts_with("10.") {
            return Err(format!(
                "{tool} is version {version}, and comparisons need version 10"
            ));
        }
        found = version;
    }
    Ok(found)
}
