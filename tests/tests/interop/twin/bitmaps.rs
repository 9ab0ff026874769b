// SPDX-License-Identifier: MIT OR Apache-2.0
//! `qemu-img bitmap` in all its forms.

use std::fmt::Write;

use super::features::History;
use super::{Writer, pick};

impl Writer<'_> {
    /// Some actions on a bitmap that may be there or not.
    pub fn bitmap(&mut self, history: &mut History) {
        let name = format!("b{}", self.random.below(3));
        let from = format!("b{}", self.random.below(3));
        let image = history.image();
        let mut words = "bitmap ".to_owned();
        match self.random.below(10) {
            0..4 => {
                words += "--add ";
                if self.random.below(2) == 0 {
                    let sizes = [
                        "512", "512", "4k", "8k", "64k", "64k", "1M", "2G", "256", "4G", "5000",
                        "0",
                    ];
                    let _infallible = write!(words, "-g {} ", pick(self.random, &sizes));
                }
                words += pick(self.random, &["", "", "--disable ", "--enable "]);
                if self.random.below(3) == 0 {
                    let _infallible = write!(words, "--merge {from} ");
                }
            }
            4 => words += "--remove ",
            5 => words += pick(self.random, &["--clear ", "--clear --disable "]),
            6 => words += pick(self.random, &["--enable ", "--disable "]),
            7 | 8 => {
                let _infallible = write!(words, "--merge {from} ");
            }
            _ => {
                self.other_image(history);
                words += "-b other.qcow2 -F qcow2 --merge theirs ";
            }
        }
        self.img(&format!("{words}{image} {name}"));
        if words.contains("--add") && !history.bitmaps.contains(&name) {
            history.bitmaps.push(name);
        }
    }

    /// Another image with a bitmap, of the length that the disk has when it is wanted for the first time.
    fn other_image(&mut self, history: &mut History) {
        if history.has_other {
            return;
        }
        history.has_other = true;
        let size = self.size;
        let granularity = pick(self.random, &["512", "4k", "64k"]);
        let whose = self.whose();
        self.line(&format!(
            "{whose}qemu-img create -q -f qcow2 other.qcow2 {size}"
        ));
        self.img(&format!("bitmap --add -g {granularity} other.qcow2 theirs"));
        let command = self.command();
        self.line(&format!("qemu-io -c '{command}' other.qcow2"));
        // The other one may have another length now.
        self.size = size;
    }
}
