// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the command-line tools share.
//!
//! * [`getopt`]: options by the rules of GNU getopt, which scripts rely on;
//! * [`specific`]: the facts that only one format knows, as the tools print them;
//! * [`cache`]: the names of cache modes.

pub mod cache;
pub mod getopt;
pub mod specific;

use std::io;
use std::sync::Arc;

use blockcore::BlockError;

/// Lets a write or a growth past the limit that the process has for files (`ulimit -f`) fail, where the host would end the process.
///
/// # Errors
/// The host's.
pub fn survive_file_size_limit() -> io::Result<()> {
    let noted = Arc::default();
    signal_hook::flag::register(signal_hook::consts::SIGXFSZ, noted).map(drop)
}

/// An error as the tools print it behind their name: its text, and a hint on a line of its own.
pub fn error_lines(error: &BlockError) -> String {
    match error.hint_text() {
        Some(hint) => format!("{}\n{hint}", error.text()),
        None => error.text(),
    }
}

/// A line of the block layer as the tools print it: the program's name stands in front of a warning.
pub fn diagnostic_line(program: &str, line: &str) -> String {
    match line.starts_with("warning: ") {
        true => format!("{program}: {line}"),
        false => line.to_owned(),
    }
}
