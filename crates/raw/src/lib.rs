// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host side of the block layer: the protocol drivers `file` and `host_device`, and the format `raw`.
//!
//! Reading order: `host` (an open file and its system calls), `engine` (who makes those calls, and what happens when nobody waits
//! for them any more), `orphan` (what dropped futures leave going on), `file` (the driver), `file_open` (its options, creating), `lock`
//! (what other processes see), `reopen`, `truncate`, `status` (holes), `direct` (O_DIRECT), `waits` (for tests), `raw` and `raw_open` (the format).

mod direct;
mod engine;
mod file;
mod file_open;
mod host;
mod ioctl;
mod lock;
mod orphan;
mod raw;
mod raw_open;
mod reopen;
mod status;
mod truncate;
mod waits;

pub use engine::uring::use_this_runtime;
pub use file::FileDriver;
pub use file_open::{FileFactory, HostDeviceFactory};
pub use raw::RawDriver;
pub use raw_open::RawFactory;
