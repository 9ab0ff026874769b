// SPDX-License-Identifier: MIT OR Apache-2.0
//! Persistent bitmaps of an image under test, and what should be dirty in them.

use std::ops::Range;

use blocklayer_tests::tools::{Side, Tools};

use super::disk::{Disk, IMAGE};
use crate::dirty::{self, Dirty, bits};
use crate::support::first_difference;

/// A bitmap and what should be dirty in it.
pub struct Bitmap {
    name: &'static str,
    granularity: usize,
    is_enabled: bool,
    /// The process that had it in use was killed: it can be removed, and nothing else.
    is_broken: bool,
    dirty: Dirty,
}

/// One of the actions of `qemu-img bitmap`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Action<'a> {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    Merge(&'a str),
}

/// The actions of a command line, and the granularity that it gives.
fn parse(line: &str) -> (Vec<Action<'_>>, Option<usize>) {
    let (mut actions, mut granularity) = (Vec::new(), None);
    let mut words = line.split(' ');
    while let Some(word) = words.next() {
        match word {
            "--add" => actions.push(Action::Add),
            "--remove" => actions.push(Action::Remove),
            "--clear" => actions.push(Action::Clear),
            "--enable" => actions.push(Action::Enable),
            "--disable" => actions.push(Action::Disable),
            "--merge" => actions.push(Action::Merge(words.next().expect("a name follows"))),
            "-g" => granularity = Some(bytes(words.next().expect("a length follows"))),
            _ => panic!("no such action: {word}"),
        }
    }
    (actions, granularity)
}

/// A length with one of two suffixes, in bytes.
fn bytes(word: &str) -> usize {
    let number = word.trim_end_matches(['k', 'M']);
    let number: usize = number.parse().expect("it is a number");
    match &word[word.len() - 1..] {
        "k" => number << 10,
        "M" => number << 20,
        _ => number,
    }
}

impl Disk<'_> {
    /// Notes that the guest changes a range.
    pub fn mark(&mut self, range: Range<usize>) {
        for bitmap in self.bitmaps.iter_mut().filter(|b| b.is_enabled) {
            bitmap.dirty.extend(bits(range.clone(), bitmap.granularity));
        }
    }

    /// The disk is shorter or longer now.
    pub fn resize_bitmaps(&mut self) {
        let length = self.model.len();
        for bitmap in &mut self.bitmaps {
            let end = length.div_ceil(bitmap.granularity);
            bitmap.dirty.retain(|bit| *bit < end);
        }
    }

    /// A process that could write is gone without having closed the image.
    pub fn break_bitmaps(&mut self) {
        for bitmap in &mut self.bitmaps {
            bitmap.is_broken = true;
            bitmap.is_enabled = false;
        }
    }

    fn known(&mut self, name: &str) -> Option<&mut Bitmap> {
        self.bitmaps.iter_mut().find(|b| b.name == name)
    }

    /// `bitmap` with these actions, if there are the bitmaps for it.
    pub fn change_bitmap(&mut self, side: &Tools, line: &str, name: &'static str) {
        let (actions, granularity) = parse(line);
        for action in &actions {
            let wanted = match *action {
                Action::Add => break,
                Action::Merge(from) => from,
                _ => name,
            };
            if self.known(wanted).is_none() {
                return;
            }
        }
        let is_new = actions[0] == Action::Add;
        let from_broken = |action: &Action<'_>| match *action {
            Action::Merge(from) => self.bitmaps.iter().any(|b| b.name == from && b.is_broken),
            _ => false,
        };
        // What has been added when a merge fails stays.
        if is_new && actions.iter().any(from_broken) {
            return;
        }
        if !self.try_img(side, &format!("bitmap {line} @ {name}")) {
            return;
        }
        for action in actions {
            self.act(action, name, granularity);
        }
    }

    fn act(&mut self, action: Action<'_>, name: &'static str, granularity: Option<usize>) {
        match action {
            Action::Add => self.bitmaps.push(Bitmap {
                name,
                granularity: granularity.unwrap_or(self.cluster.clamp(4 << 10, 64 << 10)),
                is_enabled: true,
                is_broken: false,
                dirty: Dirty::new(),
            }),
            Action::Remove => self.bitmaps.retain(|b| b.name != name),
            Action::Merge(from) => {
                let length = self.model.len();
                let from = self.known(from).expect("both sides know it");
                let wide = from.granularity;
                let ranges: Vec<Range<usize>> = from
                    .dirty
                    .iter()
                    .map(|bit| bit * wide..((bit + 1) * wide).min(length))
                    .collect();
                let to = self.known(name).expect("both sides know it");
                let (dirty, granularity) = (&mut to.dirty, to.granularity);
                dirty.extend(
                    ranges
                        .into_iter()
                        .flat_map(|range| bits(range, granularity)),
                );
            }
            _ => {
                let bitmap = self.known(name).expect("both sides know it");
                match action {
                    Action::Clear => bitmap.dirty.clear(),
                    _ => bitmap.is_enabled = action == Action::Enable,
                }
            }
        }
    }

    /// Both sides see as dirty in an image what the model says.
    pub fn compare_bitmaps(&self, file: &str) {
        let qemu = self.sides.into_iter().find(|side| side.side == Side::Qemu);
        let qemu = qemu.expect("one of them is QEMU's");
        let words = match file {
            IMAGE => self.image_words(),
            _ => ["-f", "qcow2", file].map(str::to_owned).to_vec(),
        };
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        for bitmap in self.bitmaps.iter().filter(|b| !b.is_broken) {
            let Bitmap {
                name, granularity, ..
            } = *bitmap;
            let seen = dirty::seen_by_qemu(&self.bench, qemu, &words, name, granularity);
            assert_eq!(seen, bitmap.dirty, "{name} by QEMU after {}", self.story);
            let seen = dirty::seen_by_ours(&self.bench, file, name);
            assert_eq!(seen, bitmap.dirty, "{name} by ours after {}", self.story);
        }
    }

    /// `convert --bitmaps`: the copy has the same data, and the same is dirty in it.
    pub fn copy_bitmaps(&mut self, side: &Tools) {
        if self.bitmaps.is_empty() {
            return;
        }
        let line = "convert -O qcow2 --bitmaps --skip-broken-bitmaps @ copy.qcow2";
        if self.try_img(side, line) {
            self.compare_bitmaps("copy.qcow2");
            for side in self.sides {
                let copy = self.bench.contents(side, "copy.qcow2", None);
                if let Some(difference) = first_difference(&copy, &self.model) {
                    panic!("{difference} in the copy after {}", self.story);
                }
            }
        }
    }
}
