// SPDX-License-Identifier: MIT OR Apache-2.0
//! Drivers for tests: of this project and of any program that embeds it. They are ordinary drivers, so every layer can stand on them.
//!
//! * [`memory`]: a disk in memory.

pub mod memory;

pub use memory::{MemoryDriver, MemoryFactory};
