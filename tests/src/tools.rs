// SPDX-License-Identifier: MIT OR Apache-2.0
//! The two tool sets that tests compare: ours and the installed QEMU's.
//!
//! Called by `golden` and by the interop tests. Ours are found through `QEMU_IO_BIN` and `QEMU_IMG_BIN`, or beside
//! the running test binary in the target directory; the installed ones are found in `/usr/bin` or through
//! `BLOCKLAYER_QEMU_DIR`. Comparing with QEMU means version 10: [`installed_qemu`] says why when it cannot be used, and
//! [`qemu_required`] says whether that is a failure. Nothing here builds anything: `cargo xtask` does.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The QEMU major version that outputs are recorded from and compared with.
pub const QEMU_MAJOR: &str = "10";

/// Which of the two tool sets a test runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The binaries of this workspace.
    Ours,
    /// The installed QEMU tools.
    Qemu,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Ours => "ours",
            Side::Qemu => "qemu",
        })
    }
}

/// A `qemu-io` and a `qemu-img` that belong together.
#[derive(Clone, Debug)]
pub struct Tools {
    /// Which set this is.
    pub side: Side,
    /// Path of the `qemu-io` binary.
    pub qemu_io: PathBuf,
    /// Path of the `qemu-img` binary.
    pub qemu_img: PathBuf,
}

impl Tools {
    /// Makes `dir` hold the two tools under their bare names and returns a `PATH` value that finds them first.
    ///
    /// # Errors
    /// When `dir` cannot be created or the links cannot be made.
    pub fn link_into(&self, dir: &Path) -> io::Result<OsString> {
        std::fs::create_dir_all(dir)?;
        std::os::unix::fs::symlink(&self.qemu_io, dir.join("qemu-io"))?;
        std::os::unix::fs::symlink(&self.qemu_img, dir.join("qemu-img"))?;
        let mut path = OsString::from(dir);
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into()));
        // The ext4 tools live here, and a plain user's PATH often lacks it.
        path.push(":/usr/sbin:/sbin");
        Ok(path)
    }
}

/// Our own binaries.
///
/// # Errors
/// A sentence that names the missing binary and how to build it.
pub fn our_tools() -> Result<Tools, String> {
    Ok(Tools {
        side: Side::Ours,
        qemu_io: our_binary("QEMU_IO_BIN", "qemu-io")?,
        qemu_img: our_binary("QEMU_IMG_BIN", "qemu-img")?,
    })
}

fn our_binary(variable: &str, name: &str) -> Result<PathBuf, String> {
    let path = match std::env::var_os(variable) {
        Some(path) => PathBuf::from(path),
        None => profile_dir()?.join(name),
    };
    if !path.is_file() {
        return Err(format!(
            "{} is missing: build it with `cargo build -p qemu-io -p qemu-img` or run `cargo xtask test`, \
             or name another one in {variable}",
            path.display()
        ));
    }
    path.canonicalize()
        .map_err(|e| format!("{}: {e}", path.display()))
}

/// The directory that holds the binaries of the profile this test binary was built in (`target/debug`).
fn profile_dir() -> Result<PathBuf, String> {
    let exe = std::env::current_exe().map_err(|e| format!("cannot find the test binary: {e}"))?;
    exe.parent()
        .and_then(Path::parent)
        .map(Path::to_path_buf)
        .ok_or_else(|| format!("{} lies in no target directory", exe.display()))
}

/// The installed QEMU tools, when they are of the version that outputs are compared with.
///
/// # Errors
/// A sentence that says what is missing or which version was found.
pub fn installed_qemu() -> Result<Tools, String> {
    let dir = std::env::var_os("BLOCKLAYER_QEMU_DIR").map_or("/usr/bin".into(), PathBuf::from);
    let tools = Tools {
        side: Side::Qemu,
        qemu_io: dir.join("qemu-io"),
        qemu_img: dir.join("qemu-img"),
    };
    for tool in [&tools.qemu_io, &tools.qemu_img] {
        let version = tool_version(tool)?;
        if version.split('.').next() != Some(QEMU_MAJOR) {
            return Err(format!(
                "{} is version {version}, and comparisons need version {QEMU_MAJOR}",
                tool.display()
            ));
        }
    }
    Ok(tools)
}

fn tool_version(tool: &Path) -> Result<String, String> {
    let output = Command::new(tool)
        .arg("--version")
        .output()
        .map_err(|e| format!("{}: {e}", tool.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.split_whitespace()
        .skip_while(|word| *word != "version")
        .nth(1)
        .map(str::to_owned)
        .ok_or_else(|| format!("{} --version names no version", tool.display()))
}

/// Whether a missing or differing QEMU is a failure (`CI=true` or `BLOCKLAYER_REQUIRE_QEMU=1`) or a reason to skip.
#[must_use]
pub fn qemu_required() -> bool {
    std::env::var("CI").is_ok_and(|v| v == "true")
        || std::env::var("BLOCKLAYER_REQUIRE_QEMU").is_ok_and(|v| v == "1")
}

/// The installed tools for a test that cannot do without them, or `None` (with a line that says so) when it is to be
/// skipped.
///
/// # Panics
/// When the tools cannot be used and [`qemu_required`] says that they must be there.
#[must_use]
pub fn installed_qemu_or_skip(test: &str) -> Option<Tools> {
    match installed_qemu() {
        Ok(tools) => Some(tools),
        Err(why) if qemu_required() => panic!("{test} needs the installed QEMU tools: {why}"),
        Err(why) => {
            eprintln!("SKIPPED {test}: {why}");
            None
        }
    }
}
