// SPDX-License-Identifier: MIT OR Apache-2.0
//! The blocking pool: work that would keep an executor's thread waiting goes to tokio's blocking threads.

use std::sync::Arc;

use blockcore::{BlockError, Result};

use crate::orphan::Orphans;

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

/// As [`run`], for a change of `start..end`: if the future is dropped, the work becomes an orphan.
///
/// # Errors
/// As [`run`].
pub(crate) async fn run_change<T, E>(
    orphans: &Arc<Orphans>,
    start: u64,
    end: u64,
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T>
where
    T: Send + 'static,
    E: Into<BlockError> + Send + 'static,
{
    // INV REQ-DROP-1: the thread's guard says when the work is over, the future's guard says when nobody waits any more.
    let (worker, _waiter) = orphans.begin(start, end);
    run(move || {
        let _worker = worker;
        work()
    })
    .await
}
