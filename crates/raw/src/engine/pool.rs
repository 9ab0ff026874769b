// SPDX-License-Identifier: MIT OR Apache-2.0
//! The blocking pool: work that would keep an executor's thread waiting goes to tokio's blocking threads.

use blockcore::{BlockError, Result};

/// Runs `work` on a blocking thread. What it needs, it owns; so nothing is freed under it when the future is dropped, and it
/// then runs to its end all the same.
///
/// # Errors
/// The work's; `ECANCELED` if the runtime shuts down.
pub(crate) async fn run<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T>
where
    T: Send + 'static,
    E: Into<BlockError> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(Into::into),
        Err(e) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
        // The runtime is shutting down and has thrown the work away.
        Err(_) => Err(BlockError::from_errno(libc::ECANCELED)),
    }
}
