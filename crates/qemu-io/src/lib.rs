// SPDX-License-Identifier: MIT OR Apache-2.0
//! `qemu-io` as a library: run its commands against an image and get typed outcomes and the printed text.
//!
//! Reading order: [`session`] (a session and how a line becomes a command), [`command`] (the table), then one file per group of commands:
//! `read_write`, `aio`, `status`, `admin`, `help`. `cli` and `repl` are the program around it.

pub mod admin;
mod aio;
pub mod cli;
pub mod command;
mod help;
pub mod numbers;
pub mod output;
mod read_write;
mod repl;
pub mod report;
pub mod session;
mod signal;
mod status;

pub use admin::OpenRequest;
pub use aio::Completion;
pub use session::{Done, Failed, Outcome, Session};
