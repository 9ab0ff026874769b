// SPDX-License-Identifier: MIT OR Apache-2.0
//! Numbers and choices out of a fuzzer's bytes. When they run out, everything is zero.

/// What is left of the bytes.
#[derive(Clone, Debug)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// All of the bytes.
    pub fn new(bytes: &'a [u8]) -> Input<'a> {
        Input(bytes)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        self.number(1) as u8
    }

    /// The next `bytes` bytes as a number.
    pub fn number(&mut self, bytes: usize) -> u64 {
        let (now, rest) = self.0.split_at(bytes.min(self.0.len()));
        self.0 = rest;
        now.iter().fold(0, |n, &b| n << 8 | u64::from(b))
    }

    /// A number below `bound`, out of two bytes.
    pub fn below(&mut self, bound: usize) -> usize {
        self.number(2) as usize % bound.max(1)
    }
}
