// SPDX-License-Identifier: MIT OR Apache-2.0
//! A real file system inside a chain of ours: `mke2fs -d` puts a source tree into a raw image, our tools turn it into a qcow2
//! chain, files are changed through the overlays, and what is read back must be a clean file system with exactly those files.
//!
//! Method: nobody mounts anything. `debugfs` changes a raw copy, and the blocks that differ from before are written through
//! our `qemu-io` into the top overlay, so that the chain goes through what a guest would put it through.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use blocklayer_tests::tools::{self, Tools};

use crate::support::{Bench, Random, first_difference};

/// The file system's block size; changed blocks are found and written in these.
const BLOCK: usize = 1_024;

/// A tree of files: relative path to contents.
type Tree = BTreeMap<PathBuf, Vec<u8>>;

#[test]
fn a_file_system_changed_through_a_chain_of_ours_is_clean_and_holds_the_files() {
    let ours = tools::our_tools().unwrap_or_else(|why| panic!("{why}"));
    let Some(e2fs) = E2fs::find() else {
        assert!(
            !tools::qemu_required(),
            "mke2fs, e2fsck and debugfs are needed"
        );
        eprintln!("SKIPPED file system: mke2fs, e2fsck or debugfs is missing");
        return;
    };
    let mut random = Random::new("file system");
    let bench = Bench::new();
    let mut tree = Tree::new();
    read_tree(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        "src",
        &mut tree,
    );
    read_tree(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("golden"),
        "golden",
        &mut tree,
    );
    assert!(tree.len() > 100, "a source tree of some size");
    write_tree(&bench.path("tree"), &tree);

    // 9001 KiB: no multiple of any cluster.
    bench.run(
        &e2fs.mke2fs,
        &[
            "-q", "-F", "-t", "ext4", "-b", "1024", "-d", "tree", "disk.raw", "9001k",
        ],
    );
    e2fs.check(&bench, "disk.raw");
    bench.img(
        &ours,
        &[
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "disk.raw",
            "base.qcow2",
        ],
    );
    read_back(&bench, &ours, &e2fs, "base.qcow2", &tree);

    let overlays = [
        ("base.qcow2", "one.qcow2", "cluster_size=4k"),
        ("one.qcow2", "two.qcow2", "compat=0.10"),
        ("two.qcow2", "top.qcow2", "cluster_size=512,refcount_bits=8"),
    ];
    for (round, (below, image, options)) in overlays.into_iter().enumerate() {
        bench.img(
            &ours,
            &[
                "create", "-q", "-f", "qcow2", "-o", options, "-b", below, "-F", "qcow2", image,
            ],
        );
        let before = bench.read("disk.raw");
        change_files(&bench, &e2fs, &mut tree, &mut random, round);
        e2fs.check(&bench, "disk.raw");
        let after = bench.read("disk.raw");
        write_differences(&bench, &ours, image, &before, &after);
        read_back(&bench, &ours, &e2fs, image, &tree);
    }
    for image in ["base.qcow2", "one.qcow2", "two.qcow2", "top.qcow2"] {
        bench.check(&ours, image);
    }
    let Some(qemu) = tools::installed_qemu_or_skip("file system, second opinion") else {
        return;
    };
    for image in ["base.qcow2", "one.qcow2", "two.qcow2", "top.qcow2"] {
        bench.check(&qemu, image);
    }
    let contents = bench.contents(&qemu, "top.qcow2", None);
    if let Some(difference) = first_difference(&contents, &padded(bench.read("disk.raw"))) {
        panic!("the chain as QEMU reads it: {difference}");
    }
}

/// The ext4 tools.
struct E2fs {
    mke2fs: PathBuf,
    e2fsck: PathBuf,
    debugfs: PathBuf,
}

impl E2fs {
    fn find() -> Option<E2fs> {
        let find = |name: &str| {
            ["/usr/sbin", "/sbin", "/usr/bin"]
                .iter()
                .map(|dir| Path::new(dir).join(name))
                .find(|path| path.is_file())
        };
        Some(E2fs {
            mke2fs: find("mke2fs")?,
            e2fsck: find("e2fsck")?,
            debugfs: find("debugfs")?,
        })
    }

    /// A forced check that changes nothing and must find nothing.
    fn check(&self, bench: &Bench, image: &str) {
        bench.run(&self.e2fsck, &["-f", "-n", image]);
    }
}

/// Removes some files, replaces some, adds some: in the tree and, by debugfs, in the raw image.
fn change_files(bench: &Bench, e2fs: &E2fs, tree: &mut Tree, random: &mut Random, round: usize) {
    let mut commands = String::new();
    for change in 0..12 {
        let paths: Vec<PathBuf> = tree.keys().cloned().collect();
        let path = paths[random.below(paths.len())].clone();
        let shown = path.display().to_string();
        if change % 3 == 0 {
            commands.push_str(&format!("rm {shown}\n"));
            tree.remove(&path);
            continue;
        }
        let bytes = random.below(60_000);
        let mut data = random.bytes(bytes);
        if change % 4 == 1 {
            // Long stretches of zeroes, which debugfs writes as holes or blocks.
            let half = data.len() / 2;
            data[..half].fill(0);
        }
        let local = format!("new-{round}-{change}");
        bench.write(&local, &data);
        if change % 3 == 1 {
            commands.push_str(&format!("rm {shown}\nwrite {local} {shown}\n"));
            tree.insert(path, data);
        } else {
            commands.push_str(&format!("write {local} {local}\n"));
            tree.insert(PathBuf::from(local), data);
        }
    }
    bench.write("commands", commands.as_bytes());
    let output = bench.output(&e2fs.debugfs, &["-w", "-f", "commands", "disk.raw"]);
    assert!(output.status.success(), "debugfs: {output:?}");
}

/// Writes each run of differing blocks through `qemu-io`: zeroes as a zero write, all else from a file.
fn write_differences(bench: &Bench, ours: &Tools, image: &str, before: &[u8], after: &[u8]) {
    assert_eq!(before.len(), after.len());
    let blocks = after.len() / BLOCK;
    let differs = |block: usize| {
        let range = block * BLOCK..(block + 1) * BLOCK;
        before[range.clone()] != after[range]
    };
    let is_zero = |block: usize| {
        after[block * BLOCK..(block + 1) * BLOCK]
            .iter()
            .all(|byte| *byte == 0)
    };
    let mut commands = Vec::new();
    let mut block = 0;
    while block < blocks {
        if !differs(block) {
            block += 1;
            continue;
        }
        let (start, zero) = (block, is_zero(block));
        while block < blocks && differs(block) && is_zero(block) == zero {
            block += 1;
        }
        let (offset, bytes) = (start * BLOCK, (block - start) * BLOCK);
        if zero {
            commands.push(format!("write -z {offset} {bytes}"));
        } else {
            let name = format!("blocks-{start}");
            bench.write(&name, &after[offset..offset + bytes]);
            commands.push(format!("write -s {name} {offset} {bytes}"));
        }
    }
    assert!(!commands.is_empty(), "the files that changed change blocks");
    for batch in commands.chunks(16) {
        bench.io(ours, batch, image);
    }
}

/// Flattens the chain with our tools: the bytes are the raw image's, the file system is clean, the files are the tree's.
fn read_back(bench: &Bench, ours: &Tools, e2fs: &E2fs, image: &str, tree: &Tree) {
    bench.img(
        ours,
        &["convert", "-f", "qcow2", "-O", "raw", image, "back.raw"],
    );
    let back = bench.read("back.raw");
    if let Some(difference) = first_difference(&back, &padded(bench.read("disk.raw"))) {
        panic!("{image}: {difference}");
    }
    e2fs.check(bench, "back.raw");
    let out = bench.path("out");
    if out.exists() {
        fs::remove_dir_all(&out).expect("an older copy of the tree can be removed");
    }
    fs::create_dir(&out).expect("the bench can be written");
    bench.run(&e2fs.debugfs, &["-R", "rdump / out", "back.raw"]);
    let mut found = Tree::new();
    read_tree(&out, "", &mut found);
    let names = |tree: &Tree| tree.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&found), names(tree), "{image}: files");
    for (path, data) in tree {
        if let Some(difference) = first_difference(&found[path], data) {
            panic!("{image}: {}: {difference}", path.display());
        }
    }
}

/// A raw image's bytes as a qcow2 image holds them: up to the next sector.
fn padded(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn read_tree(dir: &Path, prefix: &str, tree: &mut Tree) {
    for entry in fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
        let path = entry.expect("the directory can be read").path();
        let name = Path::new(prefix).join(path.file_name().expect("an entry has a name"));
        if path.is_dir() {
            read_tree(&path, &name.to_string_lossy(), tree);
        } else {
            let data = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            tree.insert(name, data);
        }
    }
}

fn write_tree(dir: &Path, tree: &Tree) {
    for (path, data) in tree {
        let path = dir.join(path);
        let parent = path.parent().expect("a file lies in a directory");
        fs::create_dir_all(parent).unwrap_or_else(|e| panic!("{}: {e}", parent.display()));
        fs::write(&path, data).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
}
