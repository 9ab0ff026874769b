// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask plant`: takes each rule of `docs/INVARIANTS.md` out of a copy of the code, and sees the tests fail.
//!
//! A [`Plant`] changes a few lines. It counts as caught when the changed copy compiles and the test that it names fails. (Most are found by several, and by the random ones;
//! those that are named are quick.) The copy, and what is built of it, lie in
//! `target/plant`. `tidy` sees to it that every rule has a plant, and that every plant still finds its lines.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::run::{cargo, root};

/// A fault.
pub struct Plant {
    /// The rule that it breaks.
    pub rule: &'static str,
    /// What is taken out, or done wrong.
    pub what: &'static str,
    /// The package whose tests have to fail.
    package: &'static str,
    /// The test, or how the names of the tests begin, one of which has to fail.
    test: &'static str,
    /// Files with lines that occur once in them, and what takes their place.
    pub edits: &'static [(&'static str, &'static str, &'static str)],
}

impl Plant {
    const fn of(
        package: &'static str,
        rule: &'static str,
        what: &'static str,
        test: &'static str,
        edits: &'static [(&'static str, &'static str, &'static str)],
    ) -> Plant {
        Plant {
            rule,
            what,
            test,
            package,
            edits,
        }
    }
}

const COMMIT: &str = "crates/qcow2/src/commit.rs";
const WRITE: &str = "crates/qcow2/src/write.rs";
const OVERHAUL: &str = "crates/qcow2/src/overhaul.rs";
const BITMAPS: &str = "crates/qcow2/src/bitmap_store.rs";
const REBUILD: &str = "crates/qcow2/src/check/rebuild.rs";

pub const PLANTS: &[Plant] = &[
    Plant::of(
        "qcow2",
        "QCOW2-ORD-1",
        "no flush between refcounts and the entries that need them",
        "tests::crash::",
        &[(
            COMMIT,
            "what the entries below point at is durable before they are.\n        self.file.flush().await?;",
            "\n",
        )],
    ),
    Plant::of(
        "qcow2",
        "QCOW2-ORD-1",
        "no flush between a refcount block and the table entry that names it",
        "tests::failing::a_refcount_block_is_not_in_use",
        &[(
            COMMIT,
            "and after the entry of the block that counts it.\n            self.file.flush().await?;",
            "\n",
        )],
    ),
    Plant::of(
        "qcow2",
        "QCOW2-ORD-2",
        "clusters are linked before their data is there",
        "tests::rules::a_shared_cluster_is_copied",
        &[(
            WRITE,
            "        let filled = filled.await;\n",
            "        self.link_run(written.clone(), run, sparse).await?;\n        let filled = filled.await;\n",
        )],
    ),
    Plant::of(
        "qcow2",
        "QCOW2-ORD-3",
        "what is freed is counted down before the entries are written",
        "tests::bitmaps::copies_that_could_not",
        &[
            (
                COMMIT,
                "        let result = self.write_plan(&plan).await;\n",
                "        let early = plan.freed.iter().map(|f| (0, *f));\n        self.meta.lock().await.limbo.extend(early);\n        self.empty_limbo().await?;\n        let result = self.write_plan(&plan).await;\n",
            ),
            (
                COMMIT,
                "let mut freed = plan.freed.clone();",
                "let mut freed = Vec::new();",
            ),
        ],
    ),
    Plant::of(
        "qcow2",
        "QCOW2-ORD-4",
        "freed clusters do not wait for those who are reading them",
        "tests::rules::a_freed_cluster_waits",
        &[(COMMIT, ".take_while(passed)", ".take_while(|_| true)")],
    ),
    Plant::of(
        "qcow2",
        "QCOW2-ORD-5",
        "no flush after the entries",
        "tests::corners::the_place_of_a_dropped_refcount_block",
        &[(
            COMMIT,
            "        self.file.debug_event(DebugEvent::FlushToDisk).await;\n        self.file.flush().await?;",
            "\n",
        )],
    ),
    Plant::of(
        "qcow2",
        "QCOW2-ORD-6",
        "no flush before the header names a new tree",
        "tests::overhaul::a_power_cut",
        &[(
            OVERHAUL,
            "all that the header names below is durable before.\n        self.image.file.flush().await?;",
            "\n",
        )],
    ),
    Plant::of(
        "qcow2",
        "QCOW2-ORD-6",
        "no flush after it",
        "tests::overhaul::",
        &[(
            OVERHAUL,
            "            .await?;\n        file.flush().await\n",
            "            .await\n",
        )],
    ),
    Plant::of(
        "qcow2",
        "QCOW2-ORD-7",
        "no flush of what was there before the first change",
        "tests::rules::what_was_read_is_durable",
        &[(
            "crates/qcow2/src/open.rs",
            "self.file.node().flush_unseen().await?;",
            "",
        )],
    ),
    Plant::of(
        "qcow2",
        "QCOW2-BITMAP-1",
        "changes begin before the mark of bitmaps in use is durable",
        "tests::bitmaps",
        &[(
            BITMAPS,
            "            .await?;\n        self.file.flush().await?;\n        *self.bitmaps.stored() = outdated;",
            "            .await?;\n        *self.bitmaps.stored() = outdated;",
        )],
    ),
    Plant::of(
        "qcow2",
        "QCOW2-BITMAP-1",
        "new bitmaps take their place before what they tell of is durable",
        "tests::bitmaps::a_copy_is_in_use",
        &[(
            BITMAPS,
            "        self.commit().await?;\n        Ok(new)",
            "        Ok(new)",
        )],
    ),
    Plant::of(
        "qcow2",
        "QCOW2-REPAIR-1",
        "no flush after refcounts were raised or lowered",
        "tests::repair_cuts::refcounts_are",
        &[(
            "crates/qcow2/src/check/refcounts.rs",
            "            self.file.flush().await?;",
            "",
        )],
    ),
    Plant::of(
        "qcow2",
        "QCOW2-REPAIR-2",
        "new refcounts are named before they are durable",
        "tests::repair_rules::new_refcounts_are_there",
        &[(
            REBUILD,
            "        self.file.flush().await?;\n        let mut fields",
            "        let mut fields",
        )],
    ),
    Plant::of(
        "qcow2",
        "QCOW2-REPAIR-3",
        "a table is changed in place whatever else its clusters are",
        "tests::repair",
        &[(
            "crates/qcow2/src/check/count.rs",
            "clusters.into_iter().all(|c| self.uses.get(c) == what)",
            "clusters.into_iter().all(|c| self.uses.get(c) & what == what)",
        )],
    ),
    Plant::of(
        "qcow2",
        "QCOW2-REPAIR-4",
        "leaks are freed while entries name impossible places",
        "tests::repair_rules::what_a_flipped_bit_hides",
        &[(
            "crates/qcow2/src/check/compare.rs",
            "self.fix != CheckFix::None && self.lost == 0",
            "self.fix != CheckFix::None",
        )],
    ),
    Plant::of(
        "qcow2",
        "QCOW2-REPAIR-5",
        "an image that is still damaged loses its mark",
        "tests::repair_rules::an_image_that_is_still_damaged",
        &[(
            "crates/qcow2/src/check/finish.rs",
            "        if found.is_clean() {\n            bits -=",
            "        if true {\n            bits -=",
        )],
    ),
    Plant::of(
        "qcow2",
        "QCOW2-META-1",
        "nobody looks whether data would be written over metadata",
        "tests::rules::a_guest_write_never_lands",
        &[(
            "crates/qcow2/src/image.rs",
            "        match self.owner_in(host, bytes) {\n            Some(owner) if self.runtime().overlap_checks.includes(owner) => {",
            "        match self.owner_in(host, bytes) {\n            Some(owner) if false => {",
        )],
    ),
    Plant::of(
        "qcow2",
        "QCOW2-META-2",
        "a cluster that a snapshot shares is written in place",
        "tests::rules::a_shared_cluster_is_copied",
        &[(
            WRITE,
            "let Mapping::Data { host, copied: true } = mapping else {",
            "let Mapping::Data { host, .. } = mapping else {",
        )],
    ),
    Plant::of(
        "qcow2",
        "QCOW2-CRYPT-1",
        "guest data goes out as it is",
        "tests::encryption::",
        &[(
            "crates/qcow2/src/crypto.rs",
            "        crypto.cipher()?.encrypt_buf(sector, data).await",
            "        let _ = (crypto.cipher()?, sector);\n        Ok(data)",
        )],
    ),
    Plant::of(
        "qcow2",
        "QCOW2-RAW-1",
        "data of a raw data file is written in place, beside zero writes",
        "tests::rules::a_raw_data_file_reads_as",
        &[(
            WRITE,
            "if !self.orphans.any() && !self.reads_raw() {",
            "if !self.orphans.any() {",
        )],
    ),
    Plant::of(
        "qcow2",
        "QCOW2-PAIR-1",
        "half of an entry is believed",
        "l2_cache::tests::",
        &[(
            "crates/qcow2/src/l2_cache.rs",
            "if before.is_multiple_of(2) && self.changes.load(Ordering::Acquire) == before {",
            "if before < u64::MAX {",
        )],
    ),
    Plant::of(
        "qcow2",
        "REQ-DROP-1",
        "a later write overtakes one that was dropped",
        "tests::rules::a_write_in_place_does_not_overtake",
        &[(
            WRITE,
            "if !self.orphans.any() && !self.reads_raw() {",
            "if !self.reads_raw() {",
        )],
    ),
    Plant::of(
        "qcow2",
        "REQ-PARK-1",
        "the caller's own future makes the file longer",
        "tests::parked::a_parked_write_behind",
        &[(
            WRITE,
            "            if needed > self.storage()?.length() {",
            "            if needed == u64::MAX {",
        )],
    ),
    Plant::of(
        "blockcore",
        "REQ-SER-1",
        "nobody waits for a read-modify-write",
        "tracked::tests::",
        &[(
            "crates/blockcore/src/tracked.rs",
            "            if !blocked {\n                return;\n            }",
            "            if !blocked || blocked {\n                return;\n            }",
        )],
    ),
    Plant::of(
        "blockcore",
        "REQ-DIRTY-1",
        "a change is made that no bitmap knows of",
        "bitmap_ops::tests::",
        &[(
            "crates/blockcore/src/bitmap_ops.rs",
            "        if offset < end {\n            self.bitmaps.mark(offset..end);\n        }\n        Ok(())",
            "        Ok(())",
        )],
    ),
    Plant::of(
        "blockcore",
        "REQ-GEN-1",
        "a flush notes what was written while it ran",
        "node::tests::a_flush_is_skipped",
        &[(
            "crates/blockcore/src/node.rs",
            "            .fetch_max(generation, Ordering::AcqRel);",
            "            .fetch_max(generation + 1, Ordering::AcqRel);",
        )],
    ),
    Plant::of(
        "luks",
        "LUKS-SLOT-1",
        "a slot is called active before its key material is durable",
        "volume::tests::",
        &[(
            "crates/luks/src/volume.rs",
            "        store.flush().await?;\n        header.slots[slot].active = true;",
            "        header.slots[slot].active = true;",
        )],
    ),
];

/// Every plant whose rule contains a word, or all of them.
pub fn plant(words: &[&str]) -> Result<(), String> {
    let only = match *words {
        [] => "",
        [rule] => rule,
        _ => return Err("plant takes one rule, or none".to_owned()),
    };
    let tree = root().join("target/plant/tree");
    let mut missed = Vec::new();
    let chosen: Vec<&Plant> = PLANTS.iter().filter(|p| p.rule.contains(only)).collect();
    if chosen.is_empty() {
        return Err(format!("no rule has {only} in its name"));
    }
    for plant in &chosen {
        for part in ["Cargo.toml", "Cargo.lock", "crates", "tests", "xtask"] {
            copy(&root().join(part), &tree.join(part))?;
        }
        for (file, code, instead) in plant.edits {
            let path = tree.join(file);
            let text = read(&path)?;
            write(&path, &planted(plant, &text, file, code, instead)?)?;
        }
        let failed = first_to_fail(plant, &tree)?;
        let told = failed.as_deref().unwrap_or("NOT CAUGHT");
        println!("{}, {}: {told}", plant.rule, plant.what);
        if failed.is_none() {
            missed.push(plant.what);
        }
    }
    match missed.is_empty() {
        true => Ok(()),
        false => Err(format!("not caught: {}", missed.join("; "))),
    }
}

/// The text of a file with a fault in it.
///
/// # Errors
/// When the lines are not there, or more than once.
pub fn planted(
    plant: &Plant,
    text: &str,
    file: &str,
    code: &str,
    instead: &str,
) -> Result<String, String> {
    match text.matches(code).count() {
        1 => Ok(text.replace(code, instead)),
        n => Err(format!(
            "the plant of {} ({}) finds its lines {n} times in {file}",
            plant.rule, plant.what
        )),
    }
}

/// Builds the tests of a plant's package in the copy and runs those that it names until one fails. Says which.
fn first_to_fail(plant: &Plant, tree: &Path) -> Result<Option<String>, String> {
    let mut build = cargo();
    build
        .current_dir(tree)
        .args([
            "test",
            "-p",
            plant.package,
            "--lib",
            "--no-run",
            "--target-dir",
        ])
        // One of its own: cargo takes what it has built of the copy for what it would build of the workspace.
        .arg(root().join("target/plant/build"))
        // A few tests are not worth an optimised build.
        .args(["--config", "profile.dev.package.qcow2.opt-level=0"]);
    let built = build.output().map_err(|e| format!("cargo: {e}"))?;
    let said = String::from_utf8_lossy(&built.stderr).into_owned();
    let tests = said.lines().rev().find_map(|line| {
        let (_, path) = line.trim().strip_prefix("Executable ")?.split_once('(')?;
        path.strip_suffix(')')
    });
    let Some(tests) = tests.filter(|_| built.status.success()) else {
        return Err(format!("{}, {}: {said}", plant.rule, plant.what));
    };
    let mut tests = Command::new(tree.join(tests))
        .arg(plant.test)
        .current_dir(tree.join("crates").join(plant.package))
        .env("RUST_BACKTRACE", "0")
        // That it fails is enough.
        .env("BLOCKLAYER_CRASH_TRIES", "0")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("{tests}: {e}"))?;
    let lines = BufReader::new(tests.stdout.take().expect("it was asked for")).lines();
    for line in lines.map_while(Result::ok) {
        let name = line
            .strip_prefix("test ")
            .and_then(|l| l.split_once(" ... FAILED"));
        if let Some((name, _)) = name {
            let _gone_already = tests.kill();
            let _status = tests.wait();
            return Ok(Some(name.to_owned()));
        }
    }
    match tests.wait() {
        Ok(status) if status.success() => Ok(None),
        // It ended otherwise: overflowed its stack, perhaps.
        other => Ok(Some(format!("an end of the tests ({other:?})"))),
    }
}

/// Makes a file or a directory what another is. Files that are so already stay as they are, so that nothing is built again.
fn copy(from: &Path, to: &Path) -> Result<(), String> {
    if from.file_name().is_some_and(|name| name == "target") {
        return Ok(());
    }
    if from.is_file() {
        let bytes = fs::read(from).map_err(|e| format!("{}: {e}", from.display()))?;
        if fs::read(to).is_ok_and(|there| there == bytes) {
            return Ok(());
        }
        return write(to, bytes);
    }
    let entries = fs::read_dir(from).map_err(|e| format!("{}: {e}", from.display()))?;
    let paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    for path in paths {
        let name = path.file_name().unwrap_or_default();
        copy(&path, &to.join(name))?;
    }
    Ok(())
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

fn write(path: &Path, bytes: impl AsRef<[u8]>) -> Result<(), String> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent)
        .and_then(|()| fs::write(path, bytes))
        .map_err(|e| format!("{}: {e}", path.display()))
}
