// SPDX-License-Identifier: MIT OR Apache-2.0
//! An image under test and what a guest should see in it: how it is made, random requests, and the comparison of both sides with the model.

use std::fmt::Write;

use blocklayer_tests::filters::Filters;
use blocklayer_tests::tools::{Side, Tools};

use super::bitmaps::Bitmap;
use super::features::{Feature, Source};
use super::refusals::{REFUSED, Refusal};
use crate::support::{Bench, Random, first_difference};

pub const IMAGE: &str = "t.qcow2";

/// An image, and beside it the bytes that it should hold.
pub struct Disk<'a> {
    pub bench: Bench,
    pub features: &'a [&'static Feature],
    /// Who makes the image, and the other one.
    pub sides: [&'a Tools; 2],
    pub random: Random,
    /// What the guest should read.
    pub model: Vec<u8>,
    pub snapshots: Vec<Kept>,
    /// What the backing file holds.
    pub below: Vec<u8>,
    pub cluster: usize,
    subcluster: usize,
    pub is_version_2: bool,
    pub bitmaps: Vec<Bitmap>,
    /// The id of the password that opens the image, if it is encrypted.
    pub secret: Option<&'static str>,
    /// The name of its data file, where it has one.
    pub data_file: String,
    /// The image below is encrypted; its password doesn't change.
    pub has_secret_below: bool,
    pub story: String,
    /// Refusals that have been met, by their place in the list.
    pub met: Vec<usize>,
}

/// A snapshot and what it should hold.
pub struct Kept {
    pub name: &'static str,
    pub model: Vec<u8>,
    /// The pattern of its VM state.
    pub state: Option<u8>,
}

impl<'a> Disk<'a> {
    /// Makes an image with these features, or returns `None` where the tools refuse to.
    pub fn make(
        features: &'a [&'static Feature],
        sides: [&'a Tools; 2],
        random: Random,
    ) -> (Disk<'a>, bool) {
        let option = |name| {
            let all = features.iter().flat_map(|feature| feature.options);
            all.into_iter().find(|(key, _)| *key == name)
        };
        let cluster = match option("cluster_size") {
            Some((_, "512")) => 512,
            Some(_) => 2 << 20,
            None => 64 << 10,
        };
        let subcluster = match option("extended_l2") {
            Some(_) => cluster / 32,
            None => cluster,
        };
        let mut disk = Disk {
            bench: Bench::new(),
            features,
            sides,
            random,
            // The last cluster is not a whole one.
            model: vec![0; (800 << 10).max(2 * cluster) + 1536],
            snapshots: Vec::new(),
            below: Vec::new(),
            cluster,
            subcluster,
            is_version_2: option("compat").is_some(),
            bitmaps: Vec::new(),
            secret: option("encrypt.key-secret").map(|(_, id)| *id),
            data_file: "t.data".to_owned(),
            has_secret_below: features.iter().any(|f| f.source == Source::BackingLuks),
            story: String::new(),
            met: Vec::new(),
        };
        let is_made = disk.create();
        (disk, is_made)
    }

    fn create(&mut self) -> bool {
        let options: Vec<String> = self
            .features
            .iter()
            .flat_map(|feature| feature.options)
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        let options = match options.as_slice() {
            [] => String::new(),
            some => format!("-o {} ", some.join(",")),
        };
        let is = |source| self.features.iter().any(|f| f.source == source);
        let backing = match () {
            () if is(Source::BackingRaw) => {
                self.make_base(500_001);
                "-b base.raw -F raw "
            }
            () if is(Source::BackingChain) => {
                self.make_base(700_416);
                self.make_middle("");
                "-b middle.qcow2 -F qcow2 "
            }
            () if is(Source::BackingLuks) => {
                self.make_base(300_032);
                let luks = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=1";
                self.make_middle(&format!("-o {luks} "));
                // Whether there is such a file is looked at without a password.
                "-u -b middle.qcow2 -F qcow2 "
            }
            () => "",
        };
        let length = self.model.len();
        let line = if is(Source::Converted) || is(Source::Copied) {
            self.model = stuff(&mut self.random, length);
            self.bench.write("source.raw", &self.model);
            let backing = backing.replace("-b", "-B");
            let compress = if is(Source::Converted) { "-c " } else { "" };
            format!("convert {compress}-f raw -O qcow2 {options}{backing}source.raw {IMAGE}")
        } else {
            let common = length.min(self.below.len());
            self.model[..common].copy_from_slice(&self.below[..common]);
            format!("create -q -f qcow2 {options}{backing}{IMAGE} {length}")
        };
        let side = self.sides[0];
        let is_made = self.try_img(side, &line);
        // The metadata of an image with a raw data file is preallocated, too.
        let is_preallocated = ["preallocation", "data_file_raw"]
            .iter()
            .any(|option| options.contains(option));
        if is_made && is_preallocated && self.reads_noise(side) {
            self.session(side, &[format!("write -z 0 {length}")]);
        }
        is_made
    }

    /// Whether what a side preallocates reads as noise: QEMU encrypts nothing of it.
    pub fn reads_noise(&self, side: &Tools) -> bool {
        self.secret.is_some() && side.side == Side::Qemu
    }

    fn make_base(&mut self, bytes: usize) {
        self.below = stuff(&mut self.random, bytes);
        self.bench.write("base.raw", &self.below);
    }

    /// A qcow2 image over the raw one, longer than any disk of the matrix.
    fn make_middle(&mut self, options: &str) {
        let bytes = self.model.len() + 300_032;
        let line = format!("create -q -f qcow2 {options}-b base.raw -F raw middle.qcow2 {bytes}");
        self.img(self.sides[0], &line);
        let (from, to) = (self.model.len() - 100_000, self.model.len() + 200_000);
        self.below.resize(bytes, 0);
        self.below[from..to].fill(7);
        self.below[100_000..200_000].fill(0);
        let commands = [
            format!("write -P 7 {from} 300000"),
            "write -z 100000 100000".to_owned(),
        ];
        let key = match self.has_secret_below {
            true => ",encrypt.key-secret=s0",
            false => "",
        };
        let image = format!("driver=qcow2,file.filename=middle.qcow2{key}");
        let mut words: Vec<String> = self.secrets().collect();
        for command in commands {
            words.extend(["-c".to_owned(), command]);
        }
        words.extend(["--image-opts".to_owned(), image]);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        self.bench.run(&self.sides[1].qemu_io, &words);
    }

    /// Runs `qemu-img` with the words of a line, in which `@` is the image; it must succeed.
    pub fn img(&self, side: &Tools, line: &str) -> String {
        let words = self.words(line);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let output = self.bench.output(&side.qemu_img, &words);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{line} by {}: {errors}\nafter {}",
            side.side,
            self.story
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// As [`img`](Disk::img). Where the tools refuse, that has to be on the list, and `false` is returned.
    pub fn try_img(&mut self, side: &Tools, line: &str) -> bool {
        let words = self.words(line);
        self.attempt(line, side, |side| &side.qemu_img, &words)
    }

    /// Runs `qemu-io` with one session. Where the tools refuse, that has to be on the list, and `false` is returned.
    pub fn try_io(&mut self, side: &Tools, commands: &[String]) -> bool {
        let words = self.io_words("writeback", commands);
        self.attempt(&commands.join("; "), side, |side| &side.qemu_io, &words)
    }

    fn attempt(
        &mut self,
        line: &str,
        side: &Tools,
        tool: fn(&Tools) -> &std::path::PathBuf,
        words: &[String],
    ) -> bool {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        self.tell(side, line);
        let output = self.bench.output(tool(side), &words);
        if output.status.success() {
            return true;
        }
        let complaint = |output: &std::process::Output| {
            let text = [output.stdout.as_slice(), &output.stderr].concat();
            // Nodes without a name get one, which is another in every process.
            Filters::new(&[]).apply(&String::from_utf8_lossy(&text))
        };
        let text = complaint(&output);
        let Some((place, refusal)) = self.refusal(side, &text) else {
            panic!("{}: {text}\nafter {}", output.status, self.story);
        };
        self.met.push(place);
        self.story += " (refused)";
        // What QEMU refuses for its own reasons, it may take when it is asked again.
        for other in self.sides.into_iter().filter(|o| o.side != side.side) {
            if refusal.by.is_none_or(|by| by == other.side) {
                let output = self.bench.output(tool(other), &words);
                assert!(
                    !output.status.success() && complaint(&output) == text,
                    "refused by {}: {text}\nby {}: {}\nafter {}",
                    side.side,
                    other.side,
                    complaint(&output),
                    self.story
                );
            }
        }
        for side in self.sides {
            // QEMU's failures leave leaks behind.
            self.mend_leaks(side);
        }
        false
    }

    /// Repairs what QEMU is known to leak. Its own repair would forget the snapshots of an image with bitmaps.
    pub fn mend_leaks(&self, side: &Tools) {
        if side.side == Side::Qemu {
            let by = self
                .sides
                .into_iter()
                .find(|s| self.bitmaps.is_empty() || s.side == Side::Ours);
            let by = by.expect("one of them is ours");
            let words = self.words("check -q -r leaks @");
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            self.bench.output(&by.qemu_img, &words);
        }
    }

    /// The entry of the list that has these words, for features that this image has.
    fn refusal(&self, side: &Tools, text: &str) -> Option<(usize, &'static Refusal)> {
        let has = |beginning: &str| self.features.iter().any(|f| f.name.starts_with(beginning));
        let is_met = |refusal: &Refusal| {
            refusal.by.is_none_or(|by| by == side.side)
                && text.contains(refusal.message)
                && refusal.pair.iter().all(|name| has(name))
        };
        REFUSED
            .iter()
            .enumerate()
            .find(|(_, refusal)| is_met(refusal))
    }

    pub fn tell(&mut self, side: &Tools, line: &str) {
        let _infallible = write!(self.story, "\n{}: {line}", side.side);
    }

    /// A range of the disk, aligned to something.
    fn range(&mut self) -> std::ops::Range<usize> {
        let units = [1, 512, self.subcluster, self.cluster];
        let unit = units[self.random.below(4)];
        let most = [4 * self.subcluster, 3 * self.cluster][self.random.below(2)];
        let start = self.random.below(self.model.len()) / unit * unit;
        let bytes = ((1 + self.random.below(most)) / unit * unit).max(unit);
        start..(start + bytes).min(self.model.len())
    }

    /// Whole clusters of the disk, of which the last one may be shorter.
    pub fn clusters(&mut self) -> std::ops::Range<usize> {
        let range = self.range();
        let end = range.end.next_multiple_of(self.cluster);
        range.start / self.cluster * self.cluster..end.min(self.model.len())
    }

    /// A pattern for data: never that of zeroes.
    pub fn pattern(&mut self) -> u8 {
        u8::try_from(1 + self.random.below(255)).expect("below 256")
    }

    /// The guest writes the same byte everywhere in a range.
    pub fn fill(&mut self, range: std::ops::Range<usize>, byte: u8) {
        self.mark(range.clone());
        self.model[range].fill(byte);
    }

    /// One random request; the model follows.
    fn request(&mut self) -> String {
        let range = self.range();
        let (start, bytes) = (range.start, range.len());
        match self.random.below(10) {
            0..4 => {
                let pattern = self.pattern();
                self.fill(range, pattern);
                format!("write -P {pattern} {start} {bytes}")
            }
            4 => {
                let data = self.random.bytes(bytes);
                self.mark(range.clone());
                self.model[range].copy_from_slice(&data);
                self.bench.write("data", &data);
                // One such file at a time: it is used before the next one is made.
                format!("write -s data {start} {bytes}")
            }
            5 => {
                self.discard(range);
                format!("discard {start} {bytes}")
            }
            kind => {
                let zero = [" -z", " -z", " -zu", " -zu"][kind - 6];
                self.fill(range, 0);
                format!("write{zero} {start} {bytes}")
            }
        }
    }

    /// A discard: whole clusters, one that reaches to the end of the disk included, read as zero. Version 2 can't say that where there is a backing file, and
    /// keeps them.
    pub fn discard(&mut self, range: std::ops::Range<usize>) {
        self.mark(range.clone());
        if self.is_version_2 && !self.below.is_empty() {
            return;
        }
        let first = range.start.next_multiple_of(self.cluster);
        let last = match range.end == self.model.len() {
            true => range.end,
            false => range.end / self.cluster * self.cluster,
        };
        if first < last {
            self.model[first..last].fill(0);
        }
    }

    /// A session of random requests, some of which are read back in it.
    pub fn requests(&mut self, side: &Tools) {
        let mut commands = Vec::new();
        while commands.len() < 8 {
            let command = self.request();
            let is_last = command.contains("-s data");
            commands.push(command);
            if is_last {
                break;
            }
        }
        for _ in 0..3 {
            let start = self.random.below(self.model.len());
            let pattern = self.model[start];
            let same = self.model[start..].iter().take_while(|b| **b == pattern);
            commands.push(format!("read -P {pattern} {start} {}", same.count()));
        }
        self.session(side, &commands);
    }

    /// Runs `qemu-io` commands that must succeed.
    pub fn session(&mut self, side: &Tools, commands: &[String]) {
        let cache = ["writeback", "writeback", "writethrough", "none"][self.random.below(4)];
        let words = self.io_words(cache, commands);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        self.tell(side, &format!("-t {cache} {}", commands.join("; ")));
        let output = self.bench.output(&side.qemu_io, &words);
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{}: {text}{errors}\nafter {}",
            output.status,
            self.story
        );
    }

    /// Both sides find the image sound, and see in it and in its snapshots what the model says.
    pub fn compare(&mut self) {
        self.compare_contents();
        for side in self.sides {
            let text = self.img(side, "check @");
            assert!(
                text.starts_with("No errors were found on the image.\n"),
                "checked by {}: {text}\nafter {}",
                side.side,
                self.story
            );
        }
        self.compare_bitmaps(IMAGE);
    }

    pub fn compare_contents(&mut self) {
        // Which parts of a file that are reserved and not written count as data depends on what the host has in its page cache, and so on how a tool reads.
        let options = self.image_options();
        self.same_words(&format!(
            "map --output=json --image-opts {options},cache.direct=on"
        ));
        self.same_words(&format!("info -f qcow2 {IMAGE}"));
        for side in self.sides {
            let actual = self.contents(side, None);
            if let Some(difference) = first_difference(&actual, &self.model) {
                panic!("{difference} for {} after {}", side.side, self.story);
            }
            for kept in &self.snapshots {
                let actual = self.contents(side, Some(kept.name));
                // QEMU shows as much of it as the disk is long now.
                let common = actual.len().min(kept.model.len());
                if let Some(difference) = first_difference(&actual[..common], &kept.model[..common])
                {
                    let (side, name) = (side.side, kept.name);
                    panic!("{difference} in {name} for {side} after {}", self.story);
                }
            }
        }
        if self.secret.is_some() {
            self.check_nothing_shows();
        } else if self.features.iter().any(|f| f.name == "data-file-raw") {
            let raw = self.bench.read(&self.data_file);
            let common = raw.len().min(self.model.len());
            if let Some(difference) = first_difference(&raw[..common], &self.model) {
                panic!("{difference} in the data file after {}", self.story);
            }
        }
    }

    /// What the image, or a snapshot in it, reads as.
    fn contents(&self, side: &Tools, snapshot: Option<&str>) -> Vec<u8> {
        let snapshot = snapshot.map_or(String::new(), |name| format!("-l {name} "));
        self.img(side, &format!("convert -O raw {snapshot}@ contents.raw"));
        self.bench.read("contents.raw")
    }

    /// What both sides have to print alike.
    fn same_words(&self, line: &str) {
        let words = self.sides.map(|side| {
            self.bench.forget_cached();
            self.img(side, line)
        });
        assert_eq!(words[0], words[1], "{line}\nafter {}", self.story);
    }
}

/// Bytes with noise, zeroes and text among them.
fn stuff(random: &mut Random, bytes: usize) -> Vec<u8> {
    let mut stuff = random.bytes(bytes);
    let mut at = 0;
    while at < bytes {
        let end = (at + 1 + random.below(150_000)).min(bytes);
        match random.below(4) {
            0 => stuff[at..end].fill(0),
            1 => stuff[at..end].fill(b'a'),
            2 => {
                for (i, byte) in stuff[at..end].iter_mut().enumerate() {
                    *byte = b"The same words, over and over. "[i % 31];
                }
            }
            _ => {}
        }
        at = end;
    }
    stuff
}
