// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the tests that cross crates share: finding the two tool sets (`tools`), running golden scripts
//! (`golden`) and the filters over their output (`filters`).
//!
//! Called by the test binaries in `tests/`. Everything here drives the tools as a user does, as processes with
//! arguments and streams; tests that call the libraries sit in the crates they test. The rules for writing a
//! golden script are in `docs/TESTING.md`.

pub mod filters;
pub mod golden;
pub mod tools;
