// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the fuzz targets (`fuzz/`) and their quick runs in the test suite share.
//!
//! * [`open`]: any bytes as an image, opened read-only and looked at.
//! * [`operations`]: a sound image ([`seeds`]) with some of its metadata changed, and requests on it.
//!
//! Both are functions of bytes, so that a fuzzer can find its way, and what it finds is a test by being kept. What has to hold is asserted here: nothing
//! panics, an image that is open read-only is not changed, an undamaged one is sound afterwards with what its bitmaps said, and a repair that says that all is well is
//! right, and has cost nothing that could be read (`repair`). That nothing hangs and memory is bounded is for the caller to see to: libFuzzer's `-timeout` and
//! `-rss_limit_mb`, or `tests/quick.rs`.
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
