// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random scripts on both tool sets: what they print, how they end, what the images hold, `map`, `info` and `check` have to be the same. In two scripts
//! of three the images change hands: some sessions are the other side's (`$OTHER/qemu-io`), so that each side opens and changes what the other has made.
//!
//! Half of the scripts are about chains and requests (here), half about one image with any features (`features`).
//!
//! The ordinary test runs 25 scripts, always the same ones. A script that differs is printed with its seed, and once more as short as it gets (`shrink`), and can be put into `tests/golden` as it is. `BLOCKLAYER_TWIN_SCRIPTS` says how many there are
//! (`cargo xtask diff --count N`).

mod bitmaps;
mod features;
mod keys;
mod looks;
mod shrink;

use std::fmt::Write;

use blocklayer_tests::golden::Script;

use crate::support::{Bench, Random, both};

const KIB: usize = 1024;

/// One of some words.
fn pick<'a>(random: &mut Random, words: &[&'a str]) -> &'a str {
    words[random.below(words.len())]
}

/// A random script. With `frees`, clusters are given back, after which host offsets are each side's own business.
struct Writer<'a> {
    random: &'a mut Random,
    frees: bool,
    /// Some sessions are the other side's.
    mixed: bool,
    text: String,
    /// The disk's length, cluster size and subcluster size, in bytes.
    size: usize,
    cluster: usize,
    subcluster: usize,
}

impl Writer<'_> {
    fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }

    fn script(mut self, seed: u64) -> String {
        let top = self.chain();
        for _ in 0..1 + self.random.below(3) {
            self.session(&top);
        }
        // Version 2 has no zero clusters: a zero write may give clusters back. A growth gives back the old L1 table.
        self.frees |= self.text.contains("compat=0.10") || self.text.contains("truncate");
        self.look(&top);
        let filter = match self.frees {
            true => "disk-size offsets",
            false => "disk-size",
        };
        format!(
            "# Random script of seed {seed}.\n# filter: {filter}\n{}",
            self.text
        )
    }

    /// Makes a chain, and returns the name of its last image.
    fn chain(&mut self) -> String {
        let layers = self.random.below(4);
        let base_bytes = (1 + self.random.below(2000)) * 512;
        let mut below = (
            format!("base.{}", pick(self.random, &["raw", "qcow2"])),
            String::new(),
        );
        below.1 = below.0.trim_start_matches("base.").to_owned();
        let (mut name, mut format) = below;
        (self.size, self.cluster, self.subcluster) = (base_bytes, 64 * KIB, 64 * KIB);
        self.line(&format!(
            "qemu-img create -q -f {format} {name} {base_bytes}"
        ));
        self.session(&name.clone());
        for layer in 0..layers.max(usize::from(format == "raw")) {
            let cluster = 512 << self.random.below(9);
            let compat = pick(self.random, &["0.10", "1.1", "1.1", "1.1"]);
            let mut options = format!("cluster_size={cluster},compat={compat}");
            if compat == "1.1" && self.random.below(3) == 0 {
                let bits = 1 << self.random.below(7);
                let _infallible = write!(options, ",refcount_bits={bits}");
            }
            let is_extended = compat == "1.1" && cluster >= 16 * KIB && self.random.below(2) == 0;
            if is_extended {
                options.push_str(",extended_l2=on");
            }
            let bytes = match self.random.below(3) {
                0 => String::new(),
                _ => format!(" {}", (1 + self.random.below(2500)) * 512),
            };
            if let Ok(bytes) = bytes.trim().parse() {
                self.size = bytes;
            }
            self.cluster = cluster;
            self.subcluster = if is_extended { cluster / 32 } else { cluster };
            let over = format!("layer{layer}.qcow2");
            let whose = self.whose();
            self.line(&format!(
                "{whose}qemu-img create -q -f qcow2 -o {options} -b {name} -F {format} {over}{bytes}"
            ));
            (name, format) = (over, "qcow2".to_owned());
            if layer + 1 < layers {
                self.session(&name.clone());
            }
        }
        name
    }

    /// A range: aligned to something, sometimes past the end.
    fn range(&mut self) -> (usize, usize) {
        let unit = match self.random.below(6) {
            0 => 1,
            1 => 512,
            2 => 4 * KIB,
            3 => self.subcluster,
            _ => self.cluster,
        };
        let offset = self.random.below(self.size) / unit * unit;
        let most = match self.random.below(2) {
            0 => (4 * self.cluster).min(512 * KIB),
            _ => 4 * self.subcluster,
        };
        let bytes = ((1 + self.random.below(most)) / unit * unit).max(unit);
        match self.random.below(25) {
            0 => (offset, bytes),
            _ => (offset, bytes.min(self.size.saturating_sub(offset)).max(1)),
        }
    }

    fn command(&mut self) -> String {
        let (offset, bytes) = self.range();
        let pattern = 1 + self.random.below(250);
        match self.random.below(if self.frees { 17 } else { 14 }) {
            0..4 => format!("write -P {pattern} {offset} {bytes}"),
            4 => format!("write -f -P {pattern} {offset} {bytes}"),
            5..7 => format!("write -z {offset} {bytes}"),
            7 => format!("write -zn {offset} {bytes}"),
            8 => format!(
                "writev -P {pattern} {offset} {} {}",
                bytes.div_ceil(2),
                bytes / 2 + 1
            ),
            9 => format!("read -v {offset} {}", bytes.min(48)),
            10 => format!("alloc {offset} {bytes}"),
            11 => "map".to_owned(),
            12 => "flush".to_owned(),
            13 => {
                let more = self.random.below(5) * 512 * self.random.below(100);
                self.size += more;
                format!("truncate {}", self.size)
            }
            14 => format!("write -zu {offset} {bytes}"),
            _ => format!("discard {offset} {bytes}"),
        }
    }

    /// Where the tool of the next step comes from: in front of its name.
    fn whose(&mut self) -> &'static str {
        if self.mixed && self.random.below(2) == 0 {
            "$OTHER/"
        } else {
            ""
        }
    }

    /// Which parts of a file that are reserved and not written count as data depends on what the host has read ahead into its page cache, and so on how
    /// a tool reads. Without a cache they are holes.
    fn forget_cached(&mut self) {
        if self.text.contains("base.raw") {
            self.line("sync base.raw; dd if=base.raw iflag=nocache count=0 status=none");
        }
    }

    fn session(&mut self, image: &str) {
        self.forget_cached();
        let cache = pick(
            self.random,
            &["writeback", "writeback", "writethrough", "none"],
        );
        let whose = self.whose();
        let mut line = format!("{whose}qemu-io -t {cache}");
        for _ in 0..1 + self.random.below(8) {
            let command = self.command();
            let _infallible = write!(line, " -c '{command}'");
        }
        let format = if image.ends_with(".raw") {
            "raw"
        } else {
            "qcow2"
        };
        self.line(&format!("{line} -f {format} {image}"));
        self.line("echo \"status $?\"");
    }

    fn look(&mut self, top: &str) {
        self.forget_cached();
        self.line(&format!("qemu-io -r -c map -c length {top}"));
        self.line(&format!(
            "qemu-img convert -O raw {top} all.raw && md5sum < all.raw"
        ));
        // How long the file is, and what lies where, depends on what was used again.
        let (info, check) = match self.frees {
            true => (
                "| grep -v 'file length'",
                "| grep -v -e 'Image end' -e allocated",
            ),
            false => ("", ""),
        };
        self.line(&format!("qemu-img info --backing-chain {top} {info}"));
        self.line(&format!(
            "for i in *.qcow2; do qemu-img check $i {check}; echo \"status ${{PIPESTATUS[0]}}\"; done"
        ));
        if !self.frees {
            self.forget_cached();
            self.line(&format!("qemu-img map --output=json {top}"));
            self.forget_cached();
            self.line(&format!("qemu-img map {top}; echo \"status $?\""));
        }
    }
}

#[test]
fn random_scripts_print_the_same_on_both_sides() {
    let Some((ours, qemu)) = both("twin") else {
        return;
    };
    let asked = std::env::var("BLOCKLAYER_TWIN_SCRIPTS").ok();
    let asked: Option<u64> = asked.and_then(|n| n.parse().ok());
    // The quick run is the same every time: it guards what is known to be equal. Looking for more is what the long run is for.
    let mut seeds = match asked {
        None => Random::seeded(1),
        Some(_) => Random::new("twin"),
    };
    let (first, count) = (seeds.next() >> 8, asked.unwrap_or(25));
    let mut differ = Vec::new();
    for seed in first..first + count {
        let mut random = Random::seeded(seed);
        let writer = Writer {
            frees: random.below(3) == 0,
            mixed: random.below(3) > 0,
            random: &mut random,
            text: String::new(),
            size: 0,
            cluster: 0,
            subcluster: 0,
        };
        let text = match seed % 2 {
            0 => writer.script(seed),
            _ => writer.features_script(seed),
        };
        let compare = |text: &str| {
            let bench = Bench::new();
            bench.write("cmd", text.as_bytes());
            Script::compare(&bench.path(""), &ours, &qemu, &bench.path(""))
        };
        if let Err(why) = compare(&text) {
            let short = shrink::shortest(&text, |text| compare(text).is_err());
            println!("{text}\n{why}\nA short script that differs, maybe in another way:\n{short}");
            differ.push(seed);
        }
    }
    assert!(
        differ.is_empty(),
        "{} of {count} scripts differ: {differ:?}",
        differ.len()
    );
}
