// SPDX-License-Identifier: MIT OR Apache-2.0
//! Filters and drivers for tests and measurements, one file for each.

mod null;

pub use null::{NullDriver, NullFactory};
