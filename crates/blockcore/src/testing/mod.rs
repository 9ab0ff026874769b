// SPDX-License-Identifier: MIT OR Apache-2.0
//! Drivers for tests: of this project and of any program that embeds it. They are ordinary drivers, so every layer can stand on them.
//!
//! * [`memory`]: a disk in memory.
//! * [`crash`]: a disk in memory that rebuilds what a power cut could leave.
//! * [`fault`]: any driver, with errors and delays at chosen requests.
//! * [`rng`]: seeded randomness.

pub mod crash;
pub mod fault;
pub mod memory;
pub mod rng;

pub use crash::CrashDriver;
pub use fault::{FaultDriver, Faults};
pub use memory::{MemoryDriver, MemoryFactory};
pub use rng::Rng;
