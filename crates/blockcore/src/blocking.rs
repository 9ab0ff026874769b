// SPDX-License-Identifier: MIT OR Apache-2.0
//! Work that would keep an executor's thread waiting, or busy for long: it goes to tokio's blocking threads.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::error::{BlockError, Result};

/// Does `work` on a blocking thread. What it needs, it owns; so nothing is freed under it when the future is dropped, and it then runs to its end all
/// the same.
///
/// # Errors
/// `ECANCELED` if the runtime shuts down; `EAGAIN` if the host has no thread for it. Either way the work is not done.
///
/// # Panics
/// If `work` does, and outside a runtime.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> blockcore::Result<()> {
/// let name = blockcore::blocking::run(|| std::fs::read_to_string("/etc/hostname")).await?;
/// # let _ = name; Ok(()) }
/// ```
pub async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    match spawn(work)?.await {
        Ok(Some(done)) => Ok(done),
        Err(e) if e.is_panic() => resume_unwind(e.into_panic()),
        // The runtime is shutting down and has thrown the work away.
        Ok(None) | Err(_) => Err(BlockError::from_errno(libc::ECANCELED)),
    }
}

/// Has a blocking thread do `work`, and doesn't wait for it. If the runtime shuts down before its turn has come, it is dropped.
///
/// # Errors
/// `EAGAIN`: the host has no thread for it. It has been dropped.
///
/// # Panics
/// Outside a runtime.
pub fn send(work: impl FnOnce() + Send + 'static) -> Result<()> {
    spawn(work).map(drop)
}

/// As `spawn_blocking`, which panics where a thread can't be had, and does the work later all the same.
fn spawn<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<Option<T>>> {
    let runtime = Handle::current();
    let ours = Arc::new(Mutex::new(Some(work)));
    let theirs = ours.clone();
    let take = |work: &Mutex<Option<_>>| work.lock().unwrap_or_else(PoisonError::into_inner).take();
    let once = move || take(&theirs).map(|work| work());
    match catch_unwind(AssertUnwindSafe(|| runtime.spawn_blocking(once))) {
        Ok(handle) => Ok(handle),
        Err(_) => {
            drop(take(&ours));
            Err(BlockError::from_errno(libc::EAGAIN))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tokio::runtime::Builder;

    #[tokio::test]
    async fn the_works_result_is_the_callers() {
        assert_eq!(run(|| 7).await.unwrap(), 7);
    }

    #[tokio::test]
    #[should_panic(expected = "as planned")]
    async fn the_works_panic_is_the_callers() {
        let _ = run(|| panic!("as planned")).await;
    }

    #[test]
    fn work_that_no_thread_can_be_had_for_is_an_error_and_never_done() {
        let mut builder = Builder::new_current_thread();
        // No host has so much room.
        let runtime = builder.thread_stack_size(1 << 60).build().unwrap();
        let is_done = Arc::new(AtomicBool::new(false));
        let work = {
            let is_done = is_done.clone();
            move || is_done.store(true, Ordering::Release)
        };
        let told = runtime.block_on(run(work)).unwrap_err();
        assert_eq!(told.errno(), libc::EAGAIN);
        assert_eq!(Arc::strong_count(&is_done), 1, "the work is gone");
        assert!(!is_done.load(Ordering::Acquire));
    }
}
