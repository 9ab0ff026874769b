// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random scripts about one image with any creation options, and everything that `qemu-img` does to it: snapshots, resizing, amending, converting, repairs, bitmaps
//! (`bitmaps`), passwords (`keys`); with options of the open image, compressed writes and the VM state among the requests. What the image is in the end is looked at in
//! every way (`looks`).
//!
//! What differs on purpose (`docs/DIFFERENCES.md`) is kept out; each such place says so. Host offsets, file lengths and what depends on them are each side's own business, since
//! most scripts free clusters.

use std::fmt::Write;

use super::keys::Keys;
use super::{KIB, Writer, pick};

/// What has been done to the image so far, as far as later steps depend on it.
#[derive(Default)]
pub struct History {
    pub is_version_2: bool,
    pub has_data_file: bool,
    pub is_raw: bool,
    has_backing: bool,
    is_lazy: bool,
    refcount_bits: usize,
    /// Its data file has another name.
    pub is_renamed: bool,
    is_preallocated: bool,
    /// The passwords of an encrypted image.
    pub keys: Option<Keys>,
    /// Names of bitmaps.
    pub bitmaps: Vec<String>,
    /// There is another image, with a bitmap of its own.
    pub has_other: bool,
    /// Something may be free in the middle of the file, or lie behind its last cluster.
    pub has_freed: bool,
    pub has_resized: bool,
    pub has_vm_state: bool,
    /// Clusters were preallocated in each side's own way.
    pub has_own_layout: bool,
    /// The least length that the disk ever had, in bytes.
    pub least: usize,
    pub snapshots: Vec<String>,
    pub count: usize,
}

impl History {
    /// The image as words of a command line.
    pub fn image(&self) -> String {
        match &self.keys {
            Some(keys) => format!("$S --image-opts {}", keys.options()),
            None => "t.qcow2".to_owned(),
        }
    }

    /// As [`image`](History::image), with its format.
    fn image_with_format(&self) -> String {
        match &self.keys {
            Some(_) => self.image(),
            None => "-f qcow2 t.qcow2".to_owned(),
        }
    }

    /// The passwords as words of a command line, with a space behind them.
    pub fn secrets(&self) -> &'static str {
        if self.keys.is_some() { "$S " } else { "" }
    }
}

impl Writer<'_> {
    pub fn features_script(mut self, seed: u64) -> String {
        self.line("export TZ=UTC");
        self.line(
            "dates() { sed -E -e 's/[0-9]{4}-[0-9-]+ [0-9:]+/DATE/' -e 's/((date-n?sec|uuid|iters|master key iters)\"?: ).*/\\1 N/'; }",
        );
        let mut history = self.create();
        if self.random.below(3) == 0 {
            for _ in 0..1 + self.random.below(3) {
                self.bitmap(&mut history);
            }
        }
        self.features_session(&mut history);
        if self.random.below(3) == 0 {
            self.damage(&history);
        }
        for _ in 0..2 + self.random.below(7) {
            match self.random.below(13) {
                0..3 => self.features_session(&mut history),
                3 | 4 => self.snapshot(&mut history),
                5 | 6 => self.resize(&mut history),
                7 => self.amend(&mut history),
                8 => self.convert(&history),
                9 if !history.bitmaps.is_empty() => self.kill(&mut history),
                9 | 10 if !history.bitmaps.is_empty() => self.bitmap(&mut history),
                11 if history.keys.is_some() => self.change_keys(&mut history),
                11 => self.bitmap(&mut history),
                _ => self.look_at_something(&history),
            }
        }
        self.features_look(&history);
        format!(
            "# Random script of seed {seed}.\n# filter: disk-size offsets\n{}",
            self.text
        )
    }

    fn create(&mut self) -> History {
        let mut history = History {
            refcount_bits: 16,
            ..History::default()
        };
        self.cluster = match self.random.below(8) {
            0 => 512,
            1 => 4 * KIB,
            2 => 2048 * KIB,
            3 | 4 => 16 * KIB,
            _ => 64 * KIB,
        };
        self.subcluster = self.cluster;
        self.size = (1 + self.random.below(3000)) * 512;
        history.least = self.size;
        let mut options = vec![format!("cluster_size={}", self.cluster)];
        history.is_version_2 = self.random.below(5) == 0;
        if history.is_version_2 {
            options.push("compat=0.10".to_owned());
        } else {
            if self.cluster >= 16 * KIB && self.random.below(3) == 0 {
                options.push("extended_l2=on".to_owned());
                self.subcluster = self.cluster / 32;
            }
            if self.random.below(3) == 0 {
                // A snapshot that a width of 1 does not allow leaves leaks behind in QEMU's images.
                history.refcount_bits = 2 << self.random.below(6);
                options.push(format!("refcount_bits={}", history.refcount_bits));
            }
            for (one_of, option) in [
                (3, "compression_type=zstd"),
                (4, "lazy_refcounts=on"),
                (6, "data_file=t.data"),
            ] {
                if self.random.below(one_of) == 0 {
                    options.push(option.to_owned());
                    history.has_data_file |= option.starts_with("data_file");
                }
            }
            if history.has_data_file && self.random.below(2) == 0 {
                options.push("data_file_raw=on".to_owned());
                history.is_raw = true;
            }
        }
        history.is_lazy = options.iter().any(|o| o.starts_with("lazy"));
        // What was never written to the raw data file of an encrypted image reads as noise.
        if !history.is_raw && self.random.below(5) == 0 {
            history.keys = Some(self.keys(&mut options));
        }
        if self.random.below(20) == 0 {
            let more = ["nocow=on", "extent_size_hint=1M", "encryption=off"];
            options.push(pick(self.random, &more).to_owned());
        }
        let is_extended = self.subcluster < self.cluster;
        history.has_backing = !history.is_raw && self.random.below(3) == 0;
        // What QEMU preallocates in an encrypted image reads as noise.
        let may_preallocate = history.keys.is_none() && (!history.has_backing || is_extended);
        if self.random.below(4) == 0 && may_preallocate {
            let mode = pick(self.random, &["metadata", "falloc", "full"]);
            options.push(format!("preallocation={mode}"));
            // The tables of small clusters lie between the data, or all before it.
            history.has_own_layout |= self.cluster < 4 * KIB;
            history.is_preallocated = true;
        }
        let mut below = String::new();
        if history.has_backing {
            let format = pick(self.random, &["raw", "qcow2"]);
            let bytes = (1 + self.random.below(2500)) * 512;
            self.line(&format!("qemu-img create -q -f {format} base {bytes}"));
            let half = bytes / 2;
            self.line(&format!(
                "qemu-io -f {format} -c 'write -q -P 99 0 {half}' -c 'write -q -z 0 {}' base",
                half / 2 + 1
            ));
            below = format!("-b base -F {format} ");
        }
        let (whose, options, size) = (self.whose(), options.join(","), self.size);
        let (quiet, secrets) = (pick(self.random, &["", "-q "]), history.secrets());
        let unchecked = match history.has_backing && self.random.below(4) == 0 {
            true => "-u ",
            false => "",
        };
        self.line(&format!(
            "{whose}qemu-img create {quiet}{secrets}-f qcow2 -o {options} {unchecked}{below}t.qcow2 {size}"
        ));
        history
    }

    /// A session of requests, by one of the ways to open the image with options.
    fn features_session(&mut self, history: &mut History) {
        let whose = self.whose();
        let mut commands = String::new();
        for _ in 0..1 + self.random.below(7) {
            let command = self.features_command(history);
            let _infallible = write!(commands, " -c '{command}'");
        }
        let options = self.open_options(history);
        let secrets = history.secrets();
        let (key, opened) = match &history.keys {
            Some(keys) => (format!("{},", keys.option()), "--image-opts"),
            None => (String::new(), "-f qcow2"),
        };
        let image = match &history.keys {
            Some(keys) => keys.options(),
            None => "t.qcow2".to_owned(),
        };
        let line = match self.random.below(4) {
            0 => format!(
                "{whose}qemu-io {secrets}--image-opts{commands} {key}driver=qcow2,file.filename=t.qcow2,discard=unmap{options}"
            ),
            1 if !options.is_empty() => {
                let options = options.trim_start_matches(',');
                format!("{whose}qemu-io {secrets}-c 'open -o {key}{options} t.qcow2'{commands}")
            }
            2 if !options.is_empty() => {
                // Ours looks for the L2 tables of snapshots only when an image is opened.
                let options = options.trim_start_matches(',').replace("=all", "=cached");
                format!(
                    "{whose}qemu-io {secrets}-c 'reopen -o {options}'{commands} {opened} {image}"
                )
            }
            _ => {
                let cache = pick(self.random, &["writeback", "writethrough", "none"]);
                format!("{whose}qemu-io {secrets}-t {cache}{commands} {opened} {image}")
            }
        };
        self.line(&line);
        self.line("echo \"status $?\"");
    }

    /// A session that ends before the image is closed: bitmaps can't be used any more.
    fn kill(&mut self, history: &mut History) {
        // What has not been written then is each side's own business.
        if history.is_lazy {
            return;
        }
        // A bitmap is in use here from the first change on, and not before.
        let (offset, bytes) = self.range();
        let command = format!("write {} {}", offset / 512 * 512, bytes.div_ceil(512) * 512);
        let (whose, image) = (self.whose(), history.image());
        self.line(&format!(
            "{{ {whose}qemu-io -c '{command}' -c flush -c 'sigraise 9' {image}; }} 2> /dev/null"
        ));
        self.line("echo \"status $?\"");
    }

    /// Options of an open image, each with a comma before it.
    fn open_options(&mut self, history: &History) -> String {
        let mut options = String::new();
        for _ in 0..self.random.below(3) {
            options += match self.random.below(9) {
                0 => ",l2-cache-size=1M",
                1 => ",cache-size=512k",
                2 => ",refcount-cache-size=256k",
                3 => ",overlap-check=all",
                4 => ",overlap-check.template=cached,overlap-check.active-l2=off",
                5 => ",pass-discard-other=on",
                6 => ",lazy-refcounts=on",
                // With a snapshot, QEMU punches what is the snapshot's.
                7 if !history.is_version_2 && history.snapshots.is_empty() => {
                    ",discard-no-unref=on"
                }
                _ => ",overlap-check=none",
            };
        }
        options
    }

    fn features_command(&mut self, history: &mut History) -> String {
        let (offset, bytes) = self.range();
        let pattern = 1 + self.random.below(250);
        match self.random.below(14) {
            0..5 => format!("write -P {pattern} {offset} {bytes}"),
            5 => format!("write -z {offset} {bytes}"),
            6 => {
                history.has_freed = true;
                format!("write -zu {offset} {bytes}")
            }
            7 => {
                history.has_freed = true;
                format!("discard {offset} {bytes}")
            }
            // Ours compresses nothing into an encrypted image.
            8..11 if history.keys.is_none() => {
                history.has_freed = true;
                // One cluster: how much of a request that fails has been done is each side's own business.
                let start = offset / self.cluster * self.cluster;
                let bytes = self.cluster.min(self.size.saturating_sub(start)).max(1);
                format!("write -c -P {pattern} {start} {bytes}")
            }
            // In an external data file there is no VM state here.
            11 if !history.has_data_file && history.snapshots.is_empty() => {
                history.has_vm_state = true;
                let (offset, bytes) = (offset / 512 * 512, bytes.div_ceil(512) * 512);
                format!("write -b -P {pattern} {offset} {bytes}")
            }
            12 if history.has_vm_state => format!("read -b -v {} 48", offset / 512 * 512),
            12 if !history.has_own_layout => format!("alloc {offset} {bytes}"),
            _ => format!("read -v {offset} {}", bytes.min(48)),
        }
    }

    pub fn img(&mut self, words: &str) {
        let whose = self.whose();
        self.line(&format!("{whose}qemu-img {words}; echo \"status $?\""));
    }

    fn snapshot(&mut self, history: &mut History) {
        let (some, image) = (history.snapshots.len(), history.image());
        match self.random.below(5) {
            // QEMU's fails half way where refcounts are too narrow for it, and leaks.
            0..3 if some < 4 && history.refcount_bits > 4 => {
                history.count += 1;
                let name = format!("s{}", history.count);
                self.img(&format!("snapshot -c {name} {image}"));
                history.snapshots.push(name);
            }
            3 if some > 0 => {
                let name = history.snapshots[self.random.below(some)].clone();
                self.img(&format!("snapshot -a {name} {image}"));
                history.has_freed = true;
            }
            4 if some > 0 => {
                let name = history.snapshots.remove(self.random.below(some));
                self.img(&format!("snapshot -d {name} {image}"));
                history.has_freed = true;
            }
            _ => self.img(&format!("snapshot -a nobody {image}")),
        }
    }

    fn resize(&mut self, history: &mut History) {
        // Where the VM state lies depends on the length of the disk, and QEMU forgets it when it shrinks.
        if history.has_vm_state {
            return;
        }
        history.has_resized = true;
        let image = history.image_with_format();
        if self.random.below(3) == 0 {
            // Whole clusters are left: of a cut one QEMU shows the rest when the disk grows again.
            let clusters = self.size / self.cluster;
            self.size = (1 + self.random.below(clusters.max(1))) * self.cluster;
            history.least = history.least.min(self.size);
            let shrink = pick(self.random, &["", "--shrink ", "--shrink ", "--shrink "]);
            self.img(&format!("resize {shrink}{image} {}", self.size));
        } else {
            // What QEMU preallocates later may show what free clusters held.
            let modes = ["off", "metadata", "falloc", "full"];
            let is_own = history.has_freed || history.keys.is_some();
            let mode = modes[self.random.below(if is_own { 1 } else { 4 })];
            // That of the cluster that the disk ended in among it.
            history.has_own_layout |= mode != "off";
            let more = self.random.below(2000) * 512;
            let length = match self.random.below(2) {
                0 => format!("+{more}"),
                _ => (self.size + more).to_string(),
            };
            self.size += more;
            self.img(&format!("resize --preallocation={mode} {image} {length}"));
        }
        history.has_freed = true;
    }

    fn amend(&mut self, history: &mut History) {
        let bits = 2 << self.random.below(6);
        let choice = self.random.below(8);
        if choice == 7 && history.has_data_file {
            self.amend_data_file(history);
            return;
        }
        // QEMU takes minutes to change the width of refcounts in clusters of that size.
        if self.cluster > 64 * KIB && (choice == 2 || choice == 3) {
            return;
        }
        let options = match choice {
            0 => "lazy_refcounts=on".to_owned(),
            1 => "lazy_refcounts=off".to_owned(),
            2 | 3 => format!("refcount_bits={bits}"),
            4 => "compat=1.1".to_owned(),
            // What snapshots show stays what it was here, and bitmaps are taken out.
            5 if history.snapshots.is_empty() && history.bitmaps.is_empty() => {
                "compat=0.10".to_owned()
            }
            _ => "data_file_raw=on".to_owned(),
        };
        // It may have failed; then less is asked of the image from now on than it could do.
        history.is_version_2 |= options == "compat=0.10";
        history.has_freed = true;
        history.is_lazy |= options == "lazy_refcounts=on";
        if choice == 2 || choice == 3 {
            history.refcount_bits = history.refcount_bits.min(bits);
        }
        let image = history.image_with_format();
        self.img(&format!("amend -o {options} {image}"));
    }

    /// Another name for the data file, or the end of its being raw.
    fn amend_data_file(&mut self, history: &mut History) {
        let image = history.image();
        if self.random.below(3) == 0 {
            history.is_raw = false;
            self.img(&format!("amend -o data_file_raw=off {image}"));
            return;
        }
        let names = ["t.data", "another-name-for-t.data"];
        let (old, new) = match history.is_renamed {
            true => (names[1], names[0]),
            false => (names[0], names[1]),
        };
        history.is_renamed = !history.is_renamed;
        self.line(&format!("cp {old} {new}"));
        self.img(&format!("amend -o data_file={new} {image}"));
    }

    fn convert(&mut self, history: &History) {
        let mut words = "convert ".to_owned();
        let is_compressed = self.random.below(2) == 0;
        if is_compressed {
            words += "-c ";
        }
        if let Some(name) = history.snapshots.first()
            && !history.has_resized
            && self.random.below(2) == 0
        {
            let _infallible = write!(words, "-l {name} ");
        }
        if !history.bitmaps.is_empty() && self.random.below(2) == 0 {
            words += pick(
                self.random,
                &["--bitmaps ", "--bitmaps --skip-broken-bitmaps "],
            );
        }
        // With a data file, `convert -c` of nothing but zeroes ends differently (docs/DIFFERENCES.md).
        let option = pick(
            self.random,
            &[
                "compression_type=zstd",
                "extended_l2=on",
                "compat=0.10",
                "cluster_size=4k",
                "refcount_bits=1",
                "preallocation=metadata",
                "data_file=out.data",
            ],
        );
        let option = match option {
            "data_file=out.data" if is_compressed => "lazy_refcounts=on",
            option => option,
        };
        self.line("rm -f out.*");
        let image = history.image();
        self.img(&format!("{words}-O qcow2 -o {option} {image} out.qcow2"));
        self.line(
            "[ -f out.qcow2 ] && qemu-img convert -O raw out.qcow2 out.raw && md5sum < out.raw",
        );
        self.line("qemu-img check out.qcow2 | head -1");
        self.line("qemu-img info out.qcow2 | grep -v 'file length'");
    }

    /// Refcounts or flags of a fresh image are changed, and it is repaired. In a fresh image each of the first structures has its place: header, refcount table,
    /// refcount block, L1 table, L2 table.
    fn damage(&mut self, history: &History) {
        if history.has_freed
            || history.has_vm_state
            || history.is_preallocated
            || history.keys.is_some()
            || !history.bitmaps.is_empty()
            || self.cluster < 4 * KIB
            || self.cluster > 64 * KIB
        {
            return;
        }
        let mut pokes = Vec::new();
        if self.random.below(3) == 0 {
            // `COPIED` of the first L1 entry.
            pokes.push((3 * self.cluster, 0));
        }
        for _ in 0..1 + self.random.below(2) {
            // Refcounts of the first clusters: what is counted behind the end of the file shows only later.
            let bytes = (5 * history.refcount_bits).div_ceil(8);
            pokes.push((
                2 * self.cluster + self.random.below(bytes),
                self.random.below(4),
            ));
        }
        for (at, byte) in pokes {
            self.line(&format!(
                "printf '\\x{byte:02x}' | dd of=t.qcow2 bs=1 seek={at} conv=notrunc status=none"
            ));
        }
        let how = pick(self.random, &["leaks", "all", "all"]);
        self.line("qemu-img check t.qcow2 | grep -v 'Image end'; echo \"status ${PIPESTATUS[0]}\"");
        self.line(&format!(
            "qemu-img check -r {how} t.qcow2 | grep -v -e 'Image end' -e allocated"
        ));
        self.line("qemu-img check t.qcow2 | grep -v -e 'Image end' -e allocated");
        self.line("qemu-img check -q -r all t.qcow2");
    }
}
