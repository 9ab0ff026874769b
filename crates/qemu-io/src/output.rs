// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the text goes: block-buffered standard output and unbuffered standard error, or memory.
//!
//! Scripts see the order in which the two streams arrive in one pipe, so standard output is flushed exactly where the tool always did: at prompts and at
//! the end; at a terminal, with every line.

use std::io::{IsTerminal, Write};

/// The two streams.
pub enum Output {
    /// The process's own.
    Process {
        /// What was not written yet.
        pending: Vec<u8>,
        /// Standard output is a terminal.
        terminal: bool,
    },
    /// Kept, for tests and embedding programs.
    Captured {
        /// Standard output.
        out: String,
        /// Standard error.
        err: String,
    },
}

/// How much standard output is held back at most, in bytes.
const BUFFER_BYTES: usize = 4096;

impl Output {
    /// The process's own streams.
    pub fn process() -> Output {
        Output::Process {
            pending: Vec::new(),
            terminal: std::io::stdout().is_terminal(),
        }
    }

    /// Memory.
    pub fn captured() -> Output {
        Output::Captured {
            out: String::new(),
            err: String::new(),
        }
    }

    /// Writes to standard output.
    pub fn out(&mut self, text: &str) {
        match self {
            Output::Captured { out, .. } => out.push_str(text),
            Output::Process { pending, terminal } => {
                pending.extend_from_slice(text.as_bytes());
                let whole = (pending.len().saturating_sub(1)) / BUFFER_BYTES * BUFFER_BYTES;
                match terminal {
                    true => self.flush(),
                    // Whole blocks go, the rest stays: so the C library cuts it.
                    false if whole > 0 => {
                        write_stdout(&pending[..whole]);
                        pending.drain(..whole);
                    }
                    false => {}
                }
            }
        }
    }

    /// Writes a line to standard error.
    pub fn err(&mut self, line: &str) {
        match self {
            Output::Captured { err, .. } => {
                err.push_str(line);
                err.push('\n');
            }
            Output::Process { .. } => print_error(line),
        }
    }

    /// Hands on what is held back.
    pub fn flush(&mut self) {
        if let Output::Process { pending, .. } = self {
            write_stdout(pending);
            pending.clear();
        }
    }

    /// Takes what was captured: standard output, standard error.
    pub fn take(&mut self) -> (String, String) {
        match self {
            Output::Captured { out, err } => (std::mem::take(out), std::mem::take(err)),
            Output::Process { .. } => Default::default(),
        }
    }
}

/// Writes to standard output, at once.
fn write_stdout(bytes: &[u8]) {
    let mut stdout = std::io::stdout().lock();
    // Nobody reads any more: nothing to be done, as ever.
    drop(stdout.write_all(bytes).and_then(|()| stdout.flush()));
}

/// Writes a line to standard error. That nobody reads it is no reason to stop.
pub(crate) fn print_error(line: &str) {
    drop(std::io::stderr().write_all(format!("{line}\n").as_bytes()));
}
