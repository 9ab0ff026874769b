// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host side of the block layer: the protocol drivers `file` and `host_device`, and the format `raw`.
//!
//! Reading order: `host` (an open file and its system calls), `engine` (who makes those calls, and what happens when nobody waits
//! for them any more), `file` (the driver), `file_open` (its options, creating), `lock` (what other processes see), `status`
//! (holes), `direct` (O_DIRECT), `raw` (the format), `probe_guard` (raw images whose format was guessed).

mod engine;
mod file;
mod file_open;
mod host;
mod raw;
mod status;

pub use file::FileDriver;
pub use file_open::FileFactory;
pub use raw::{RawDriver, RawFactory};
