// SPDX-License-Identifier: MIT OR Apache-2.0
//! The long operations of the block layer, each a library call that shows its progress and can be cancelled.
//!
//! Every call takes a [`Job`]: a handle that others can watch and cancel. A call can also be ended by dropping its future; what holds then is
//! said with each. None of them spawns tasks: all the work happens where the future is polled, and what a dropped future leaves
//! behind are single requests, which [`Backend::close`](blockcore::Backend::close) waits for.

pub mod bench;
pub mod compare;
pub mod convert;
pub mod create;
pub mod map;
pub mod progress;

pub use bench::{Bench, BenchFailure, Direction};
pub use compare::{CompareFailure, Outcome, Side, compare};
pub use convert::{ConvertOptions, convert};
pub use create::{CreatePlan, CreateRequest};
pub use map::{Extent, Extents};
pub use progress::{Job, Progress};
