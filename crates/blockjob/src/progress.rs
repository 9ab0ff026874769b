// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`Job`]: the handle of a long operation: how far it is, and the wish that it stop.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockcore::{BlockError, Result};
use tokio::sync::watch;

/// How far an operation is, in bytes of the disk it works on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// What is done.
    pub done: u64,
    /// What there is to do; 0 until the operation knows.
    pub total: u64,
}

impl Progress {
    /// The share that is done, 0.0 to 1.0. Nothing to do counts as done.
    pub fn fraction(self) -> f64 {
        if self.total == 0 {
            1.0
        } else {
            self.done as f64 / self.total as f64
        }
    }
}

type Observer = Box<dyn Fn(Progress) + Send + Sync>;

/// The handle of one operation. Clones are the same handle.
///
/// ```
/// use blockjob::Job;
/// let job = Job::new();
/// let watcher = job.clone();
/// watcher.cancel();
/// assert!(job.is_cancelled());
/// assert_eq!(job.progress().done, 0);
/// ```
#[derive(Clone)]
pub struct Job(Arc<State>);

struct State {
    progress: watch::Sender<Progress>,
    observer: Option<Observer>,
    cancelled: AtomicBool,
}

impl Job {
    /// A handle for an operation that has not begun.
    pub fn new() -> Job {
        Job::with_observer(None)
    }

    /// A handle that calls `observer` on every step, on the thread that does the step. It must not block.
    pub fn observed(observer: impl Fn(Progress) + Send + Sync + 'static) -> Job {
        Job::with_observer(Some(Box::new(observer)))
    }

    fn with_observer(observer: Option<Observer>) -> Job {
        Job(Arc::new(State {
            progress: watch::Sender::new(Progress::default()),
            observer,
            cancelled: AtomicBool::new(false),
        }))
    }

    /// How far the operation is.
    pub fn progress(&self) -> Progress {
        *self.0.progress.borrow()
    }

    /// Follows the progress; steps may be skipped.
    pub fn subscribe(&self) -> watch::Receiver<Progress> {
        self.0.progress.subscribe()
    }

    /// Asks the operation to stop. It ends with `Cancelled` before it starts another request; requests in flight end first.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Release);
    }

    /// Whether somebody asked the operation to stop.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Acquire)
    }

    /// `Err(Cancelled)` if somebody asked the operation to stop.
    pub(crate) fn check(&self) -> Result<()> {
        if self.is_cancelled() {
            return Err(BlockError::from_errno(libc::ECANCELED));
        }
        Ok(())
    }

    pub(crate) fn begin(&self, total: u64) {
        self.update(|p| *p = Progress { done: 0, total });
    }

    pub(crate) fn advance(&self, bytes: u64) {
        self.update(|p| p.done += bytes);
    }

    fn update(&self, change: impl FnOnce(&mut Progress)) {
        self.0.progress.send_modify(change);
        if let Some(observer) = &self.0.observer {
            observer(self.progress());
        }
    }
}

impl Default for Job {
    fn default() -> Job {
        Job::new()
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let p = self.progress();
        write!(f, "Job({} of {})", p.done, p.total)
    }
}
