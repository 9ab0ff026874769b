// SPDX-License-Identifier: MIT OR Apache-2.0
//! Drivers for tests: of this project and of any program that embeds it. They are ordinary drivers, so every layer can stand on them.
//!
//! * [`memory`]: a disk in memory.
//! * [`crash`]: a disk in memory that rebuilds what a power cut could leave.
//! * [`delay`]: any driver, whose requests take random times.
//! * [`fault`]: any driver, with errors and delays at chosen requests and points.
//! * [`Polls`]: whether futures put their thread to sleep.
//! * [`rng`]: seeded randomness.
//! * [`given_up_after`]: futures that are dropped half way.

pub mod crash;
pub mod delay;
pub mod fault;
mod give_up;
pub mod memory;
mod polls;
pub mod rng;

pub use crash::CrashDriver;
pub use delay::DelayDriver;
pub use fault::{FaultDriver, Faults};
pub use give_up::given_up_after;
pub use memory::{MemoryDriver, MemoryFactory};
pub use polls::{Polls, longest_wait};
pub use rng::Rng;
