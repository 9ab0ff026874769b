// SPDX-License-Identifier: MIT OR Apache-2.0
//! Golden scripts: `golden/NAME/cmd`, a bash script that drives the tools, and `golden/NAME/out`, what the installed
//! QEMU tools printed for it.
//!
//! Called by the `golden` test binary: [`load_all`] finds the scripts, [`Script::check`] runs one on a tool set and compares,
//! [`Script::record`] writes `out` anew, from the installed tools only. One rule stands above the comparison: an
//! output that holds "Pattern verification failed" fails, recorded or checked, unless the script says by
//! `# expects: pattern-failure` that this is what it shows. A test that reads back the wrong thing cannot hide in its
//! reference output.

use std::fs;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use crate::filters::{Filters, OptIn};
use crate::tools::{Side, Tools};

/// How long a script may run before it counts as hung.
const TIME_LIMIT: Duration = Duration::from_secs(120);

/// What the tools print when a read did not find the bytes that it was told to expect.
const PATTERN_FAILURE: &str = "Pattern verification failed";

/// One golden script, as its directory and header lines describe it.
pub struct Script {
    /// The directory's name.
    pub name: String,
    dir: PathBuf,
    filters: Vec<OptIn>,
    expects_pattern_failure: bool,
    needs_qemu: bool,
}

/// The directory of golden scripts.
#[must_use]
pub fn scripts_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

/// All scripts, ordered by name.
///
/// # Errors
/// When a directory cannot be read or a script's header makes no sense; the message names the script.
pub fn load_all() -> Result<Vec<Script>, String> {
    let dir = scripts_dir();
    let entries = fs::read_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let mut scripts = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| format!("{}: {e}", dir.display()))?;
        scripts.push(Script::load(&entry.path())?);
    }
    scripts.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(scripts)
}

impl Script {
    fn load(dir: &Path) -> Result<Script, String> {
        let name = dir
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        let cmd = dir.join("cmd");
        let text = fs::read_to_string(&cmd).map_err(|e| format!("{}: {e}", cmd.display()))?;
        Script::parse(name, dir.to_path_buf(), &text)
    }

    /// Reads the header: the comment lines at the top of the script. The first one says what the script is for.
    fn parse(name: String, dir: PathBuf, text: &str) -> Result<Script, String> {
        if !text.starts_with("# ") {
            return Err(format!(
                "{name}/cmd does not start with a comment that says its purpose"
            ));
        }
        let mut script = Script {
            name,
            dir,
            filters: Vec::new(),
            expects_pattern_failure: false,
            needs_qemu: false,
        };
        for line in text.lines().take_while(|line| line.starts_with('#')) {
            if let Some(names) = line.strip_prefix("# filter: ") {
                for name in names.split_whitespace() {
                    let filter = OptIn::from_name(name).ok_or_else(|| {
                        format!("{}/cmd asks for an unknown filter: {name}", script.name)
                    })?;
                    script.filters.push(filter);
                }
            } else if let Some(what) = line.strip_prefix("# expects: ") {
                if what != "pattern-failure" {
                    return Err(format!(
                        "{}/cmd expects an unknown thing: {what}",
                        script.name
                    ));
                }
                script.expects_pattern_failure = true;
            } else if line == "# needs: qemu" {
                script.needs_qemu = true;
            }
        }
        if script.name.starts_with("seed-") && script.expects_pattern_failure {
            return Err(format!(
                "{}/cmd is a seed scenario, and those never expect a pattern failure",
                script.name
            ));
        }
        Ok(script)
    }

    /// Whether the script prepares images with the installed QEMU tools, whichever tools it then tests.
    #[must_use]
    pub fn needs_qemu(&self) -> bool {
        self.needs_qemu
    }

    fn out_path(&self) -> PathBuf {
        self.dir.join("out")
    }

    /// Runs the script on `tools`, in a fresh directory beneath `scratch`, and compares with the recorded output.
    ///
    /// # Errors
    /// A unified diff, or a sentence that says what else went wrong.
    pub fn check(&self, tools: &Tools, scratch: &Path) -> Result<(), String> {
        let recorded = self.out_path();
        let expected = fs::read_to_string(&recorded).map_err(|e| {
            format!(
                "{}: {e}; record it with `cargo xtask golden --record {}`",
                recorded.display(),
                self.name
            )
        })?;
        self.refuse_pattern_failure(&expected, "the recorded output")?;
        let actual = self.run(tools, None, scratch)?;
        self.refuse_pattern_failure(&actual, "the output")?;
        if actual == expected {
            return Ok(());
        }
        let from = format!("{}/out, recorded from QEMU", self.name);
        let to = format!("{} tools", tools.side);
        Err(diff(&expected, &actual, &from, &to))
    }

    /// Runs the script twice on the installed tools and writes what it printed as the output to expect.
    ///
    /// # Errors
    /// When `tools` are not the installed ones, when two runs differ, or when the output holds an undeclared pattern failure.
    pub fn record(&self, tools: &Tools, scratch: &Path) -> Result<(), String> {
        if tools.side != Side::Qemu {
            return Err("golden outputs are recorded from the installed QEMU only".to_owned());
        }
        let first = self.run(tools, None, scratch)?;
        let second = self.run(tools, None, scratch)?;
        if first != second {
            let text = diff(&first, &second, "first run", "second run");
            return Err(format!("the output differs from run to run\n{text}"));
        }
        self.refuse_pattern_failure(&first, "the output")?;
        fs::write(self.out_path(), first).map_err(|e| format!("{}: {e}", self.out_path().display()))
    }

    /// Runs the script `dir/cmd`, which is no part of the collection, on both sides, and compares what they print. `$OTHER` is a directory with the
    /// tools of the other side, for scripts in which an image changes hands.
    ///
    /// # Errors
    /// A unified diff, or a sentence that says what else went wrong.
    pub fn compare(dir: &Path, ours: &Tools, qemu: &Tools, scratch: &Path) -> Result<(), String> {
        let script = Script::load(dir)?;
        let expected = script.run(qemu, Some(ours), scratch)?;
        let actual = script.run(ours, Some(qemu), scratch)?;
        if expected == actual {
            return Ok(());
        }
        Err(diff(&expected, &actual, "qemu", "ours"))
    }

    fn refuse_pattern_failure(&self, text: &str, whose: &str) -> Result<(), String> {
        let found = text.lines().find(|line| line.contains(PATTERN_FAILURE));
        match (found, self.expects_pattern_failure) {
            (Some(line), false) => Err(format!(
                "{whose} holds a failed read-back, which no script may accept silently: {line}"
            )),
            (None, true) => Err(format!(
                "{whose} holds no failed read-back, though the script says that it expects one"
            )),
            _ => Ok(()),
        }
    }

    /// Runs the script and returns its filtered output.
    fn run(&self, tools: &Tools, other: Option<&Tools>, scratch: &Path) -> Result<String, String> {
        let dir = tempfile::Builder::new()
            .prefix("golden-")
            .tempdir_in(scratch)
            .map_err(|e| format!("{}: {e}", scratch.display()))?;
        let root = dir
            .path()
            .canonicalize()
            .map_err(|e| format!("{}: {e}", dir.path().display()))?;
        let raw = self
            .run_in(tools, other, &root)
            .map_err(|e| format!("cannot run {}: {e}", self.name))??;
        let text = String::from_utf8_lossy(&raw)
            .replace(&path_text(&root.join("dir")), "TEST_DIR")
            .replace(&path_text(&root.join("tmp")), "TMP_DIR");
        Ok(Filters::new(&self.filters).apply(&text))
    }

    /// Runs the script with stdout and stderr on one pipe. The outer error is ours, the inner one the script's.
    fn run_in(
        &self,
        tools: &Tools,
        other: Option<&Tools>,
        root: &Path,
    ) -> io::Result<Result<Vec<u8>, String>> {
        let work = root.join("dir");
        let tmp = root.join("tmp");
        fs::create_dir(&work)?;
        fs::create_dir(&tmp)?;
        let path = tools.link_into(&root.join("bin"))?;
        if let Some(other) = other {
            other.link_into(&root.join("other"))?;
        }
        let (mut reader, writer) = io::pipe()?;
        let child = Command::new("bash")
            .arg(self.dir.join("cmd"))
            .current_dir(&work)
            .env("PATH", path)
            .env("OTHER", root.join("other"))
            .env("TMPDIR", &tmp)
            .env("LC_ALL", "C")
            .env_remove("RUST_LOG")
            .env_remove("RUST_BACKTRACE")
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer)
            .process_group(0)
            .spawn()?;
        let mut guard = GroupGuard { child };
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let result = reader.read_to_end(&mut bytes).map(|_| bytes);
            // The receiver is gone only when the script timed out, and then nobody wants this.
            let _ = sender.send(result);
        });
        let Ok(output) = receiver.recv_timeout(TIME_LIMIT) else {
            return Ok(Err(format!(
                "the script did not end within {} seconds",
                TIME_LIMIT.as_secs()
            )));
        };
        guard.child.wait()?;
        output.map(Ok)
    }
}

/// Ends the script's process group when it goes out of scope, so that a hung tool does not outlive its test.
struct GroupGuard {
    child: Child,
}

impl Drop for GroupGuard {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let pid = i32::try_from(self.child.id())
                .ok()
                .and_then(rustix::process::Pid::from_raw);
            if let Some(pid) = pid {
                // Fails only when the group is gone already.
                let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
            }
            let _ = self.child.wait();
        }
    }
}

fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn diff(expected: &str, actual: &str, from: &str, to: &str) -> String {
    similar::TextDiff::from_lines(expected, actual)
        .unified_diff()
        .context_radius(3)
        .header(from, to)
        .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(name: &str, text: &str) -> Result<Script, String> {
        Script::parse(name.to_owned(), PathBuf::new(), text)
    }

    #[test]
    fn a_failed_read_back_is_refused_unless_the_script_declares_it() {
        let text = "ok\nPattern verification failed at offset 0, 512 bytes\n";
        let plain = script("a", "# purpose\n").unwrap();
        assert!(plain.refuse_pattern_failure(text, "out").is_err());
        assert!(plain.refuse_pattern_failure("ok\n", "out").is_ok());
        let declared = script("a", "# purpose\n# expects: pattern-failure\n").unwrap();
        assert!(declared.refuse_pattern_failure(text, "out").is_ok());
        assert!(declared.refuse_pattern_failure("ok\n", "out").is_err());
    }

    #[test]
    fn a_seed_scenario_cannot_declare_a_pattern_failure() {
        assert!(script("seed-x", "# purpose\n# expects: pattern-failure\n").is_err());
    }

    #[test]
    fn a_header_that_makes_no_sense_is_refused() {
        assert!(script("a", "qemu-io\n").is_err());
        assert!(script("a", "# purpose\n# filter: everything\n").is_err());
        assert!(script("a", "# purpose\n# expects: luck\n").is_err());
    }
}
