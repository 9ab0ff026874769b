// SPDX-License-Identifier: MIT OR Apache-2.0
//! Report lines and hex dumps.

use std::fmt::Write;
use std::time::Duration;

use crate::numbers::{human, time};

/// What one request did.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    /// `read`, `wrote` or `discard`.
    pub verb: &'static str,
    /// Byte offset.
    pub offset: u64,
    /// Bytes asked for; all of them were done.
    pub bytes: u64,
    /// How long it took.
    pub elapsed: Duration,
    /// One line for machines instead of two for people.
    pub machine: bool,
}

impl Report {
    /// The lines, each with its end.
    pub fn text(&self) -> String {
        let seconds = self.elapsed.as_secs_f64();
        let per_second = |n: f64| n / seconds;
        let bytes = self.bytes as f64;
        if self.machine {
            let elapsed = time(self.elapsed, true);
            return format!(
                "{},1,{elapsed},{:.3},{:.3}\n",
                self.bytes,
                per_second(bytes),
                per_second(1.0)
            );
        }
        let elapsed = time(self.elapsed, false);
        let n = self.bytes;
        format!(
            "{} {n}/{n} bytes at offset {}\n{}, 1 ops; {elapsed} ({}/sec and {:.4} ops/sec)\n",
            self.verb,
            self.offset,
            human(bytes),
            human(per_second(bytes)),
            per_second(1.0)
        )
    }
}

/// `data` in hex, 16 bytes a line, as it lies from `offset` on.
pub fn hexdump(offset: u64, data: &[u8]) -> String {
    let mut out = String::with_capacity(data.len() * 5);
    for (i, line) in data.chunks(16).enumerate() {
        write!(out, "{:08x}:  ", offset + i as u64 * 16).expect("a String takes everything");
        for b in line {
            write!(out, "{b:02x} ").expect("a String takes everything");
        }
        out.push(' ');
        out.extend(line.iter().map(|&b| {
            if b.is_ascii_alphanumeric() {
                b as char
            } else {
                '.'
            }
        }));
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dump_begins_where_the_data_does_and_a_short_line_is_not_padded() {
        let dump = hexdump(3, b"lo, World_1 \x80\xe9 end\0\0\0");
        assert_eq!(
            dump,
            "00000003:  6c 6f 2c 20 57 6f 72 6c 64 5f 31 20 80 e9 20 65  lo..World.1....e\n\
             00000013:  6e 64 00 00 00  nd...\n"
        );
    }
}
