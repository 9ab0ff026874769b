// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random bytes of the operating system, for keys and salts.

use blockcore::{BlockError, Result};

/// Fills `bytes`.
///
/// # Errors
/// `Io` if the system has none to give.
pub(crate) fn fill(bytes: &mut [u8]) -> Result<()> {
    getrandom::fill(bytes).map_err(|e| {
        let errno = e.raw_os_error().unwrap_or(libc::EIO);
        BlockError::from_errno(errno).context("Could not get random bytes")
    })
}

/// `N` random bytes.
///
/// # Errors
/// As [`fill`].
pub(crate) fn array<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    fill(&mut bytes)?;
    Ok(bytes)
}
