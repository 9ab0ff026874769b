// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the command-line tools share.
//!
//! * [`getopt`]: options by the rules of GNU getopt, which scripts rely on;
//! * [`specific`]: the facts that only one format knows, as the tools print them;
//! * [`cache`]: the names of cache modes.

pub mod cache;
pub mod getopt;
pub mod specific;

use blockcore::BlockError;

/// An error as the tools print it behind their name: its text, and a hint on a line of its own.
pub fn error_lines(error: &BlockError) -> String {
    match error.hint_text() {
        Some(hint) => format!("{}\n{hint}", error.text()),
        None => error.text(),
    }
}
