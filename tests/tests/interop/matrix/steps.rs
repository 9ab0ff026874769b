// SPDX-License-Identifier: MIT OR Apache-2.0
//! The steps of features: what they do to the image, and to the model.

use blocklayer_tests::tools::{Side, Tools};

use super::damage;
use super::disk::{Disk, IMAGE, Kept};
use super::features::Step;

const STATE_BYTES: usize = 70_144;

impl Disk<'_> {
    /// Does one step as the side whose turn it is.
    pub fn step(&mut self, step: Step, turn: usize) {
        let (side, other) = (self.sides[turn % 2], self.sides[(turn + 1) % 2]);
        match step {
            Step::Compress => self.compress(side),
            Step::Snapshot(name) => self.snapshot(side, name, None),
            Step::Apply(name) => {
                self.apply(side, name);
            }
            Step::Delete(name) => {
                if self.kept(name).is_some() {
                    self.try_img(side, &format!("snapshot -d {name} @"));
                    self.snapshots.retain(|kept| kept.name != name);
                }
            }
            Step::SaveState(name) => self.save_state(side, name),
            Step::LoadState(name) => {
                if let Some(state) = self.apply(side, name) {
                    self.read_state(state);
                }
            }
            Step::Grow(mode) => self.grow(side, mode),
            Step::Shrink => self.shrink(side),
            Step::Amend(options) => {
                if self.try_img(side, &format!("amend -o {options} @"))
                    && let Some(compat) = options.strip_prefix("compat=")
                {
                    self.is_version_2 = compat == "0.10";
                }
            }
            Step::Leak => self.repair(side, "leaks"),
            Step::Uncount => self.repair(side, "all"),
            Step::Crash => self.crash(side, other),
            Step::Bitmap(line, name) => self.change_bitmap(side, line, name),
            Step::CopyBitmaps => self.copy_bitmaps(side),
            Step::AddKey(id) => self.add_key(side, id),
            Step::EraseKey(id) => self.erase_key(side, id),
            Step::Rebase(options) => self.rebase(options),
            Step::NameData(name) => self.name_data(side, name),
        }
    }

    /// Compressed data goes only where there is none yet, so that is given back first.
    fn compress(&mut self, side: &Tools) {
        for _ in 0..3 {
            let range = self.clusters();
            let pattern = self.pattern();
            let (start, bytes) = (range.start, range.len());
            self.session(side, &[format!("discard {start} {bytes}")]);
            self.discard(range.clone());
            if self.try_io(side, &[format!("write -c -P {pattern} {start} {bytes}")]) {
                self.fill(range, pattern);
            }
        }
    }

    fn kept(&self, name: &str) -> Option<&Kept> {
        self.snapshots.iter().find(|kept| kept.name == name)
    }

    fn snapshot(&mut self, side: &Tools, name: &'static str, state: Option<u8>) {
        if self.try_img(side, &format!("snapshot -c {name} @")) {
            let model = self.model.clone();
            self.snapshots.push(Kept { name, model, state });
        }
    }

    /// Goes back to a snapshot, if it was ever taken, and returns the pattern of its VM state.
    fn apply(&mut self, side: &Tools, name: &str) -> Option<u8> {
        let kept = self.kept(name)?;
        let (model, state) = (kept.model.clone(), kept.state);
        if !self.try_img(side, &format!("snapshot -a {name} @")) {
            return None;
        }
        self.model = model;
        self.mend_lost_state(side);
        state
    }

    fn save_state(&mut self, side: &Tools, name: &'static str) {
        let pattern = self.pattern();
        if self.try_io(side, &[format!("write -b -P {pattern} 0 {STATE_BYTES}")]) {
            self.read_state(pattern);
            self.snapshot(side, name, Some(pattern));
        }
    }

    fn read_state(&mut self, pattern: u8) {
        for side in self.sides {
            self.session(side, &[format!("read -b -P {pattern} 0 {STATE_BYTES}")]);
        }
    }

    fn grow(&mut self, side: &Tools, mode: &str) {
        let bytes = self.model.len() + 512 * (1 + self.random.below(600));
        let line = format!("resize -q --preallocation={mode} @ {bytes}");
        let old = self.model.len();
        if !self.try_img(side, &line) {
            return;
        }
        self.model.resize(bytes, 0);
        self.resize_bitmaps();
        if mode != "off" && side.side == Side::Qemu {
            // It shows what lay in free clusters, and behind the last used one. Ours doesn't.
            self.session(side, &[format!("write -z {old} {}", bytes - old)]);
            self.mark(old..bytes);
        }
    }

    /// Whole clusters are left: of a cut one QEMU shows the rest when the disk grows again.
    fn shrink(&mut self, side: &Tools) {
        let clusters = 1 + self.random.below(self.model.len() / self.cluster);
        let bytes = clusters * self.cluster;
        if self.try_img(side, &format!("resize -q --shrink @ {bytes}")) {
            self.model.truncate(bytes);
            self.resize_bitmaps();
            self.mend_lost_state(side);
        }
    }

    /// When QEMU makes a disk shorter, it forgets the VM state that is still in the image.
    fn mend_lost_state(&self, side: &Tools) {
        if self.snapshots.iter().any(|kept| kept.state.is_some()) {
            self.mend_leaks(side);
        }
    }

    /// Damages the image. Both sides see the same, each repairs a copy in the same words, and the side whose turn it is the image itself.
    fn repair(&mut self, side: &Tools, what: &str) {
        let mut image = self.bench.read(IMAGE);
        match what {
            "leaks" => damage::leak(&mut image, &mut self.random),
            _ => damage::uncount(&mut image),
        }
        self.bench.write(IMAGE, &image);
        self.tell(side, &format!("damage, check -r {what}"));
        let check = |side: &Tools, line: &str, file: &str| {
            let words = self.words(line);
            let words: Vec<String> = words.iter().map(|w| w.replace(IMAGE, file)).collect();
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            let output = self.bench.output(&side.qemu_img, &words);
            let text = [output.stdout, output.stderr].concat();
            (String::from_utf8_lossy(&text).into_owned(), output.status)
        };
        let seen = self.sides.map(|side| check(side, "check @", IMAGE));
        assert_eq!(seen[0], seen[1], "after {}", self.story);
        let repair = format!("check -r {what} @");
        let repaired = self.sides.map(|side| {
            self.bench.write("copy.qcow2", &image);
            check(side, &repair, "copy.qcow2")
        });
        assert_eq!(repaired[0], repaired[1], "after {}", self.story);
        let (text, status) = check(side, &repair, IMAGE);
        assert!(status.success(), "{text}\nafter {}", self.story);
    }

    /// A write, a flush, and the end. What was flushed is there; the other side goes on, and what it leaves behind is sound.
    fn crash(&mut self, side: &Tools, other: &Tools) {
        let range = self.clusters();
        let pattern = self.pattern();
        let commands = [
            format!("write -P {pattern} {} {}", range.start, range.len()),
            "flush".to_owned(),
            "sigraise 9".to_owned(),
        ];
        self.fill(range, pattern);
        self.break_bitmaps();
        self.tell(side, &commands.join("; "));
        let words = self.io_words("writeback", &commands);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let output = self.bench.output(&side.qemu_io, &words);
        assert!(!output.status.success(), "it is dead: {}", self.story);
        self.compare_contents();
        self.requests(other);
    }

    fn name_data(&mut self, side: &Tools, name: &str) {
        let path = |name: &str| self.bench.path(name);
        let old = std::mem::replace(&mut self.data_file, name.to_owned());
        std::fs::copy(path(&old), path(name)).expect("the data file is there");
        if self.try_img(side, &format!("amend -o data_file={name} @")) {
            std::fs::remove_file(self.bench.path(&old)).expect("the data file is there");
        } else {
            self.data_file = old;
        }
    }

    /// Another name for the backing file, or none. QEMU's tool alone can do it, whose turn it is or not.
    fn rebase(&mut self, options: &str) {
        // Snapshots would lose what shows through.
        let takes_away = options == "-b ";
        if takes_away && !self.snapshots.is_empty() {
            return;
        }
        let qemu = self.sides.into_iter().find(|side| side.side == Side::Qemu);
        let qemu = qemu.expect("one of them is QEMU's");
        let (from, to) = ("base.raw", "another-name-for-base.raw");
        std::fs::copy(self.bench.path(from), self.bench.path(to)).expect("it is there");
        if self.try_img(qemu, &format!("rebase {options} @")) && takes_away {
            self.below.clear();
        }
    }
}
