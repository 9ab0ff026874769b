// SPDX-License-Identifier: MIT OR Apache-2.0
//! Signals: raising one, and living without SIGPIPE.
//!
//! Raising a signal is asked of the shell's `kill`, so that no unsafe call is needed for a command that only tests use.

use std::process::Command;

/// Sends signal `number` to this process; 0 does nothing.
pub(crate) fn raise(number: i32) {
    // A `kill` that can't be run is as good as a signal that is ignored.
    drop(
        Command::new("kill")
            .arg(format!("-{number}"))
            .arg(std::process::id().to_string())
            .status(),
    );
}
