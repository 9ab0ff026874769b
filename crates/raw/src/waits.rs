// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`may_wait`]: said before every system call that may wait for the host, so that tests can tell on which thread it is made. Only what the
//! kernel promises to answer at once ([`read_nowait`](crate::host::HostFile::read_nowait)), and calls to io_uring, go without.

/// The thread may have to wait now. Nothing but a word, outside of tests.
#[cfg(not(test))]
pub(crate) fn may_wait(_call: &'static str) {}

#[cfg(test)]
pub(crate) use tests::note as may_wait;

#[cfg(test)]
mod tests;
