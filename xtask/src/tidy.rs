// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask tidy`: the rules of this project that no compiler checks.
//!
//! Every rule reports all its findings as `path:line: what`; any finding fails the verb. The rules are listed in `tidy`, one
//! function each.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::plant::{PLANTS, planted};
use crate::run::root;

const SPDX: &str = "// SPDX-License-Identifier: MIT OR Apache-2.0";
const LINES_MAX: usize = 800;

/// Crates that programs embed: they bring no command line parser and no log printer along.
const LIBRARY_CRATES: [&str; 7] = [
    "blockcore",
    "raw",
    "luks",
    "qcow2",
    "filters",
    "blockjob",
    "blocklayer",
];
/// Crates of drivers: of this workspace they know `blockcore` alone, and qcow2 the ciphers of `luks`.
const DRIVER_CRATES: [&str; 4] = ["raw", "luks", "qcow2", "filters"];

/// A text file of the workspace.
struct Source {
    /// Path relative to the root, with forward slashes.
    path: String,
    text: String,
}

impl Source {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Where the file's tests begin: a file of tests is one from its first line on.
    fn tests_from_line(&self) -> usize {
        if self.path.contains("/tests/")
            || self.path.starts_with("tests/")
            || self.path.ends_with("/tests.rs")
            || !self.is_rust()
        {
            return 1;
        }
        self.text
            .lines()
            .position(|line| line.trim_start().starts_with("#[cfg(test)]"))
            .map_or(usize::MAX, |index| index + 1)
    }
}

/// Runs every rule over the workspace.
pub fn tidy() -> Result<(), String> {
    let root = root();
    let mut sources = Vec::new();
    collect(&root, &root, &mut sources)?;
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    let mut findings = Vec::new();
    for source in &sources {
        heads_and_size(source, &mut findings);
        words(source, &mut findings);
        unsafe_code(source, &mut findings);
        dependencies(source, &mut findings);
    }
    invariants(&sources, &mut findings);
    plants(&sources, &mut findings);
    named_tests(&sources, &mut findings);
    golden_scripts(&root, &mut findings)?;
    if findings.is_empty() {
        println!("tidy: {} files, nothing to complain about", sources.len());
        return Ok(());
    }
    for finding in &findings {
        println!("{finding}");
    }
    Err(format!("tidy: {} findings", findings.len()))
}

/// All text files beneath `dir`, without what is built, hidden (but for our own settings) or recorded.
fn collect(root: &Path, dir: &Path, sources: &mut Vec<Source>) -> Result<(), String> {
    let entries = fs::read_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    for entry in entries {
        let path = entry.map_err(|e| format!("{}: {e}", dir.display()))?.path();
        let name = path
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        let hidden = name.starts_with('.') && ![".cargo", ".ci"].contains(&name.as_str());
        if hidden || name == "target" {
            continue;
        }
        if path.is_dir() {
            collect(root, &path, sources)?;
            continue;
        }
        let wanted = [".rs", ".md", ".toml"]
            .iter()
            .any(|end| name.ends_with(end))
            || ["cmd", "out", "run"].contains(&name.as_str());
        if wanted {
            let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
            let relative = path.strip_prefix(root).unwrap_or(&path);
            let path = relative.to_string_lossy().into_owned();
            sources.push(Source { path, text });
        }
    }
    Ok(())
}

/// A Rust file says its licence and what it is, and stays of a size that can be read.
fn heads_and_size(source: &Source, findings: &mut Vec<String>) {
    if !source.is_rust() {
        return;
    }
    let path = &source.path;
    let mut lines = source.text.lines();
    if lines.next() != Some(SPDX) {
        findings.push(format!("{path}:1: the first line is not `{SPDX}`"));
    }
    if !lines.next().is_some_and(|line| line.starts_with("//!")) {
        findings.push(format!(
            "{path}:2: no `//!` head that says what the file is"
        ));
    }
    let count = source.text.lines().count();
    if count > LINES_MAX {
        findings.push(format!(
            "{path}:{count}: longer than {LINES_MAX} lines: split it by concern"
        ));
    }
}

/// Words that have no place in what is committed.
fn words(source: &Source, findings: &mut Vec<String>) {
    // Written in halves, so that this file does not find itself.
    let anywhere = [
        (concat!("TO", "DO"), "file an issue instead"),
        (concat!("FIX", "ME"), "file an issue instead"),
        (concat!("// X", "XX"), "file an issue instead"),
        (concat!("# X", "XX"), "file an issue instead"),
        (concat!("dbg", "!("), "left over from debugging"),
        (concat!("/wo", "rk/"), "a path of one machine"),
        (concat!("/ro", "ot/"), "a path of one machine"),
        (concat!("/ho", "me/"), "a path of one machine"),
    ];
    for (number, line) in source.text.lines().enumerate() {
        for (word, why) in anywhere {
            if line.contains(word) {
                findings.push(format!("{}:{}: `{word}`: {why}", source.path, number + 1));
            }
        }
    }
}

/// `unsafe` lives in the I/O engine and the buffers only.
fn unsafe_code(source: &Source, findings: &mut Vec<String>) {
    let allowed = source.path.starts_with("crates/raw/src/")
        || source.path.starts_with("crates/blockcore/src/buffer");
    if allowed || !source.is_rust() {
        return;
    }
    let word = concat!("uns", "afe");
    for (number, line) in source.text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or_default();
        let Some((_, after)) = code.split_once(word) else {
            continue;
        };
        let after = after.trim_start();
        let opens = ["{", "fn ", "impl ", "extern ", "trait "];
        if opens.iter().any(|next| after.starts_with(next)) {
            findings.push(format!(
                "{}:{}: `{word}` belongs in crates/raw/src and crates/blockcore/src/buffer* only",
                source.path,
                number + 1
            ));
        }
    }
}

/// Imports run downwards only, and library crates stay lean.
fn dependencies(source: &Source, findings: &mut Vec<String>) {
    let Some(name) = source
        .path
        .strip_prefix("crates/")
        .and_then(|rest| rest.strip_suffix("/Cargo.toml"))
    else {
        return;
    };
    let mut forbidden: Vec<&str> = Vec::new();
    if LIBRARY_CRATES.contains(&name) {
        forbidden.extend(["clap", "tracing-subscriber", "qemu-io", "qemu-img"]);
    }
    if DRIVER_CRATES.contains(&name) || name == "blockcore" {
        let allowed = |c: &&&str| **c == "blockcore" || (name == "qcow2" && **c == "luks");
        forbidden.extend(LIBRARY_CRATES.iter().filter(|c| !allowed(c)));
    }
    let mut section = "";
    for (number, line) in source.text.lines().enumerate() {
        if line.starts_with('[') {
            section = line.trim();
            continue;
        }
        let key = line
            .split(['=', '.', ' '])
            .next()
            .unwrap_or_default()
            .trim_matches('"');
        let counts = section.ends_with("dependencies]") && !section.contains("dev-dependencies");
        if counts && forbidden.contains(&key) && key != name {
            findings.push(format!(
                "{}:{}: {name} must not depend on {key}",
                source.path,
                number + 1
            ));
        }
    }
}

/// Every invariant of `docs/INVARIANTS.md` is named by the code that keeps it and by a test, and nothing else is.
fn invariants(sources: &[Source], findings: &mut Vec<String>) {
    const DOC: &str = "docs/INVARIANTS.md";
    let Some(doc) = sources.iter().find(|s| s.path == DOC) else {
        findings.push(format!("{DOC}:1: missing"));
        return;
    };
    let mut known: BTreeMap<&str, usize> = BTreeMap::new();
    for (number, line) in doc.text.lines().enumerate() {
        let id = line.strip_prefix("| ").and_then(|l| l.split(' ').next());
        if let Some(id) = id.filter(|id| is_invariant(id)) {
            known.insert(id, number + 1);
        }
    }
    let mut kept: Vec<&str> = Vec::new();
    let mut tested: Vec<&str> = Vec::new();
    // This file cites ids in its own tests, which keep no invariant.
    let own = |s: &&Source| s.path.starts_with("xtask/") || s.path.ends_with(".md");
    for source in sources.iter().filter(|s| !own(s)) {
        let tests_from = source.tests_from_line();
        for (number, line) in source.text.lines().enumerate() {
            for id in cited(line) {
                if !known.contains_key(id) {
                    findings.push(format!(
                        "{}:{}: INV {id} is not in {DOC}",
                        source.path,
                        number + 1
                    ));
                }
                if number + 1 >= tests_from {
                    tested.push(id);
                } else if source.path.starts_with("crates/") {
                    kept.push(id);
                }
            }
        }
    }
    for (id, number) in known {
        if !kept.contains(&id) {
            findings.push(format!("{DOC}:{number}: no code says `INV {id}`"));
        }
        if !tested.contains(&id) {
            findings.push(format!("{DOC}:{number}: no test says `INV {id}`"));
        }
        if !PLANTS.iter().any(|plant| plant.rule == id) {
            findings.push(format!("{DOC}:{number}: no plant breaks {id}"));
        }
    }
}

/// A plant that no longer finds the lines that it changes is one that nobody can run.
fn plants(sources: &[Source], findings: &mut Vec<String>) {
    for plant in PLANTS {
        for (file, code, instead) in plant.edits {
            let source = sources.iter().find(|s| s.path == *file);
            let text = source.map_or("", |s| &s.text);
            if let Err(why) = planted(plant, text, file, code, instead) {
                findings.push(format!("{file}:1: {why}"));
            }
        }
    }
}

/// The ids that a line cites: `INV A-1`, and more after commas and "and".
fn cited(line: &str) -> Vec<&str> {
    let mut ids = Vec::new();
    for after in line.split("INV ").skip(1) {
        for word in after.split_whitespace() {
            let id = word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
            let id = id.trim_start_matches('`');
            if is_invariant(id) {
                ids.push(id);
            } else if word != "and" {
                break;
            }
            let goes_on = word.ends_with(',') || word == "and" || !word.ends_with(['.', ':', ')']);
            if !goes_on {
                break;
            }
        }
    }
    ids
}

/// `AREA-TOPIC-1`: upper case words and a number, joined by dashes.
fn is_invariant(id: &str) -> bool {
    let parts: Vec<&str> = id.split('-').collect();
    let upper = |part: &&str| {
        !part.is_empty()
            && part
                .chars()
                .all(|c| c.is_ascii_uppercase() || c.is_ascii_digit())
    };
    parts.len() >= 3
        && parts.iter().all(upper)
        && parts.last().is_some_and(|part| part.parse::<u32>().is_ok())
}

/// Every test that the last column of `docs/SECURITY.md` names exists: `file::test`, or a golden script, `area-*` for several.
fn named_tests(sources: &[Source], findings: &mut Vec<String>) {
    const DOC: &str = "docs/SECURITY.md";
    let Some(doc) = sources.iter().find(|s| s.path == DOC) else {
        findings.push(format!("{DOC}:1: missing"));
        return;
    };
    let exists = |name: &str| match name.rsplit_once("::") {
        Some((module, test)) => sources.iter().any(|s| {
            let file = module.rsplit("::").next().unwrap_or_default();
            let inline = file == "tests" && s.text.contains("\nmod tests {");
            (inline || s.path.ends_with(&format!("/{file}.rs")))
                && s.text.contains(&format!("fn {test}("))
        }),
        None => {
            let script = format!("tests/golden/{}", name.replace('*', ""));
            let end = if name.ends_with('*') { "" } else { "/cmd" };
            let script = format!("{script}{end}");
            sources.iter().any(|s| s.path.starts_with(&script))
        }
    };
    for (number, line) in doc.text.lines().enumerate() {
        let Some(row) = line.strip_suffix(" |") else {
            continue;
        };
        let cell = row.rsplit(" | ").next().unwrap_or_default();
        for name in cell.split('`').skip(1).step_by(2).filter(|n| !exists(n)) {
            findings.push(format!("{DOC}:{}: no test `{name}`", number + 1));
        }
    }
}

/// A golden script is a directory with `cmd` and `out` and nothing else.
fn golden_scripts(root: &Path, findings: &mut Vec<String>) -> Result<(), String> {
    let dir = root.join("tests/golden");
    let entries = fs::read_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    for entry in entries {
        let path = entry.map_err(|e| format!("{}: {e}", dir.display()))?.path();
        let shown = path
            .strip_prefix(root)
            .unwrap_or(&path)
            .display()
            .to_string();
        let Ok(files) = fs::read_dir(&path) else {
            findings.push(format!("{shown}:1: not the directory of a golden script"));
            continue;
        };
        let mut names: Vec<String> = files
            .filter_map(|file| Some(file.ok()?.file_name().to_string_lossy().into_owned()))
            .collect();
        names.sort();
        if names != ["cmd", "out"] {
            findings.push(format!(
                "{shown}:1: holds {names:?} where a golden script has cmd and out"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_found_alone_and_in_lists_and_prose_is_not_taken_for_one() {
        let one = ["QCOW2-ORD-1"];
        assert_eq!(cited("// INV QCOW2-ORD-1: why"), one);
        assert_eq!(cited("that is half of INV QCOW2-ORD-1; the other"), one);
        assert_eq!(cited("(INV QCOW2-ORD-1). QCOW2-ORD-2 is else"), one);
        let two = ["QCOW2-ORD-1", "REQ-SER-2"];
        assert_eq!(cited("INV QCOW2-ORD-1, REQ-SER-2 | x"), two);
        assert_eq!(cited("INV QCOW2-ORD-1 and REQ-SER-2."), two);
        assert!(cited("INV is short for invariant").is_empty());
        assert!(cited("QCOW2-ORD-1 without the mark").is_empty());
    }

    #[test]
    fn each_word_rule_finds_its_word() {
        let text = format!("x\n{} later\n", concat!("// TO", "DO"));
        let source = Source {
            path: "crates/a/src/lib.rs".to_owned(),
            text,
        };
        let mut findings = Vec::new();
        words(&source, &mut findings);
        assert_eq!(findings.len(), 1);
        assert!(findings[0].starts_with("crates/a/src/lib.rs:2: "));
    }

    #[test]
    fn a_driver_crate_may_not_depend_on_another() {
        let source = Source {
            path: "crates/qcow2/Cargo.toml".to_owned(),
            text: "[dependencies]\nblockcore.workspace = true\nraw.workspace = true\n\
                   [dev-dependencies]\nraw.workspace = true\n"
                .to_owned(),
        };
        let mut findings = Vec::new();
        dependencies(&source, &mut findings);
        assert_eq!(
            findings,
            ["crates/qcow2/Cargo.toml:3: qcow2 must not depend on raw"]
        );
    }

    #[test]
    fn a_named_test_has_to_exist() {
        let source = |path: &str, text: &str| Source {
            path: path.to_owned(),
            text: text.to_owned(),
        };
        let row = |names: &str| source("docs/SECURITY.md", &format!("| a | `x` | {names} |\n"));
        let code = source("crates/a/tests/good.rs", "fn one() {}\n");
        let script = source("tests/golden/io-x/cmd", "");
        let sources = [row("`good::one`, `io-x`, `io-*`"), code, script];
        let mut findings = Vec::new();
        named_tests(&sources, &mut findings);
        assert!(findings.is_empty(), "{findings:?}");
        named_tests(
            &[row("`good::two`, `bad::one`, `io`, `bad-*`")],
            &mut findings,
        );
        assert_eq!(findings.len(), 4);
    }

    #[test]
    fn unsafe_code_is_found_outside_its_two_homes_only() {
        let text = format!("{} {{ }}\n", concat!("uns", "afe"));
        for (path, expected) in [
            ("crates/raw/src/engine.rs", 0),
            ("crates/blockcore/src/buffer.rs", 0),
            ("crates/qcow2/src/read.rs", 1),
        ] {
            let mut findings = Vec::new();
            let source = Source {
                path: path.to_owned(),
                text: text.clone(),
            };
            unsafe_code(&source, &mut findings);
            assert_eq!(findings.len(), expected, "{path}");
        }
    }
}
