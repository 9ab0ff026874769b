// SPDX-License-Identifier: MIT OR Apache-2.0
//! Raising a signal, for `sigraise`. SIGPIPE needs no care: the Rust runtime ignores it from the start, as the tool always did.

/// Sends signal `number` to this process. 0 does nothing, and neither does a number that no signal has.
pub(crate) fn raise(number: i32) {
    // The C library says no to a number without a signal, and the tool never told.
    drop(signal_hook::low_level::raise(number));
}
