// SPDX-License-Identifier: MIT OR Apache-2.0
//! Drivers for tests: of this project and of any program that embeds it. They are ordinary drivers, so every layer can stand on them.
//!
//! * [`memory`]: a disk in memory.
//! * [`crash`]: a disk in memory that rebuilds what a power cut could leave.
//! * [`rng`]: seeded randomness.

pub mod crash;
pub mod memory;
pub mod rng;

pub use crash::CrashDriver;
pub use memory::{MemoryDriver, MemoryFactory};
pub use rng::Rng;
