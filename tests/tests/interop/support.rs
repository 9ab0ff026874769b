// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the interop tests share: a directory to work in, running a tool there, and a seeded random sequence.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use blocklayer_tests::tools::{self, Tools};

/// Both tool sets, or `None` when the comparison is to be skipped.
pub fn both(test: &str) -> Option<(Tools, Tools)> {
    let qemu = tools::installed_qemu_or_skip(test)?;
    let ours = tools::our_tools().unwrap_or_else(|why| panic!("{why}"));
    Some((ours, qemu))
}

/// A directory of its own for one test, removed at the end.
pub struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    pub fn new() -> Bench {
        let dir = tempfile::Builder::new()
            .prefix("interop-")
            .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
            .expect("the target directory can be written");
        Bench { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
    }

    /// Takes the files here out of the host's page cache: which parts of a file that are reserved and not written count as data depends on it.
    pub fn forget_cached(&self) {
        for entry in std::fs::read_dir(self.dir.path()).expect("the directory is there") {
            let path = entry.expect("its entries can be read").path();
            let file = std::fs::File::open(path).expect("files here can be read");
            file.sync_all().expect("they are on a disk");
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)
                .expect("the kernel may be advised");
        }
    }

    /// Runs a program here and returns what it printed and how it ended. One that hangs is killed after two minutes.
    pub fn output(&self, program: &Path, arguments: &[&str]) -> Output {
        Command::new("timeout")
            .args(["-s", "KILL", "120"])
            .arg(program)
            .args(arguments)
            .current_dir(self.dir.path())
            .env("LC_ALL", "C")
            .output()
            .unwrap_or_else(|e| panic!("{}: {e}", program.display()))
    }

    /// Runs a program that must succeed and returns its stdout.
    pub fn run(&self, program: &Path, arguments: &[&str]) -> String {
        let output = self.output(program, arguments);
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(
            output.status.success(),
            "{} {}: {}\n{text}",
            program.display(),
            arguments.join(" "),
            output.status
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs `qemu-io` commands on an image; all must succeed.
    pub fn io(&self, tools: &Tools, commands: &[String], image: &str) -> String {
        let mut arguments = Vec::new();
        for command in commands {
            arguments.extend(["-c", command.as_str()]);
        }
        arguments.push(image);
        self.run(&tools.qemu_io, &arguments)
    }

    /// Runs a `qemu-img` subcommand that must succeed.
    pub fn img(&self, tools: &Tools, arguments: &[&str]) -> String {
        self.run(&tools.qemu_img, arguments)
    }

    /// What `image` (or its internal snapshot) reads as, through `tools`.
    pub fn contents(&self, tools: &Tools, image: &str, snapshot: Option<&str>) -> Vec<u8> {
        let mut arguments = vec!["convert", "-f", "qcow2", "-O", "raw"];
        if let Some(name) = snapshot {
            arguments.extend(["-l", name]);
        }
        arguments.extend([image, "contents.raw"]);
        self.img(tools, &arguments);
        self.read("contents.raw")
    }

    /// `qemu-img check` must find nothing at all.
    pub fn check(&self, tools: &Tools, image: &str) {
        let text = self.img(tools, &["check", "-f", "qcow2", image]);
        assert!(
            text.starts_with("No errors were found on the image.\n"),
            "{image}, checked by {}: {text}",
            tools.side
        );
    }
}

/// Where two byte strings first differ, in words.
pub fn first_difference(actual: &[u8], expected: &[u8]) -> Option<String> {
    if actual.len() != expected.len() {
        let (actual, expected) = (actual.len(), expected.len());
        return Some(format!("{actual} bytes long, expected {expected}"));
    }
    let at = actual.iter().zip(expected).position(|(a, b)| a != b)?;
    let (is, should) = (actual[at], expected[at]);
    Some(format!("byte {at} is {is:#04x}, expected {should:#04x}"))
}

/// A small random sequence (splitmix64) with a printed seed.
pub struct Random(u64);

impl Random {
    /// Seeded from `BLOCKLAYER_SEED`, or from the clock; prints which.
    pub fn new(test: &str) -> Random {
        let seed = match std::env::var("BLOCKLAYER_SEED") {
            Ok(text) => text
                .parse()
                .unwrap_or_else(|e| panic!("BLOCKLAYER_SEED={text}: {e}")),
            Err(_) => std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(1, |since| {
                    since.as_secs() * 1_000 + u64::from(since.subsec_millis())
                }),
        };
        println!("{test}: BLOCKLAYER_SEED={seed}");
        Random(seed)
    }

    pub fn seeded(seed: u64) -> Random {
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: usize) -> usize {
        let limit = u64::try_from(limit).expect("a length fits into 64 bits");
        usize::try_from(self.next() % limit).expect("it is below a usize")
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count + 8);
        while bytes.len() < count {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(count);
        bytes
    }
}
