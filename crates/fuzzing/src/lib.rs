// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the fuzz targets (`fuzz/`) and their quick runs in the test suite share.
//!
//! * [`open`]: any bytes as an image, opened read-only and looked at.
//! * [`operations`]: a sound image ([`seeds`]) with some of its metadata changed, and requests on it.
//!
//! Both are functions of bytes, so that a fuzzer can find its way, and what it finds is a test by being kept. What has to hold is asserted here: nothing
//! panics, an image that is open read-only is not changed, an undamaged one is sound afterwards with what its bitmaps said, and a repair that says that all is well is
//! right, and has cost nothing that could be read (`repair`). That nothing hangs and memory is bounded is for the caller to see to: libFuzzer's `-timeout` and
//! an allocator that counts ([`MEMORY_BYTES`]), or `tests/quick.rs`.
//!
//! An image may be encrypted: its password is always the same ([`PASSWORD`]). An image may have an external data file: that is another disk in memory.

mod host;
mod input;
mod repair;
mod request;
mod run;
pub mod seeds;

pub use host::PASSWORD;
pub use run::{damaged, open, operations};

/// The most that a case may allocate at a time, in bytes, over what there was before: four times the longest L1 table that the format has. What takes most is
/// a small file whose header claims such a table: it is read at opening, and once more by a check.
pub const MEMORY_BYTES: usize = 128 << 20;
