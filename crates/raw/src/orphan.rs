// SPDX-License-Identifier: MIT OR Apache-2.0
//! Orphans: changes whose future was dropped while a thread or the kernel still works on them.
//!
//! Such a change will land some time. A later request to the same bytes must not be overtaken by it (INV REQ-DROP-1), so it waits; `flush`, `truncate`
//! and `close` wait for all. As long as no future is dropped half way, this costs one load per request.

use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::Notify;

const RUNNING: u8 = 0;
const ORPHANED: u8 = 1;
const DONE: u8 = 2;

/// The orphans of one file.
#[derive(Debug, Default)]
pub(crate) struct Orphans {
    count: AtomicUsize,
    ranges: Mutex<Vec<(Arc<Work>, u64, u64)>>,
    gone: Notify,
}

/// What the worker holds while it works. Dropping it says that the work is over.
#[derive(Debug)]
pub(crate) struct WorkGuard {
    work: Arc<Work>,
    orphans: Arc<Orphans>,
}

/// What the future holds while it waits. Dropping it makes the work an orphan, if it is still going on.
#[derive(Debug)]
pub(crate) struct WaitGuard {
    work: Arc<Work>,
    orphans: Arc<Orphans>,
    start: u64,
    end: u64,
}

#[derive(Debug, Default)]
struct Work {
    state: AtomicU8,
}

impl Orphans {
    /// Begins a change of `start..end`: one guard for whoever does it, one for whoever waits.
    pub fn begin(self: &Arc<Self>, start: u64, end: u64) -> (WorkGuard, WaitGuard) {
        let work = Arc::new(Work::default());
        let worker = WorkGuard {
            work: work.clone(),
            orphans: self.clone(),
        };
        (
            worker,
            WaitGuard {
                work,
                orphans: self.clone(),
                start,
                end,
            },
        )
    }

    /// Waits until no orphan overlaps `start..end`.
    pub async fn wait(&self, start: u64, end: u64) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        loop {
            let mut gone = std::pin::pin!(self.gone.notified());
            gone.as_mut().enable();
            if !self.lock().iter().any(|(_, s, e)| *s < end && start < *e) {
                return;
            }
            gone.await;
        }
    }

    /// Waits until there is no orphan.
    pub async fn wait_all(&self) {
        self.wait(0, u64::MAX).await;
    }

    /// Whether there are any; those who can't wait take the long way then.
    pub fn any(&self) -> bool {
        self.count.load(Ordering::Acquire) != 0
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(Arc<Work>, u64, u64)>> {
        self.ranges
            .lock()
            .expect("no code panics while it holds this lock")
    }
}

impl Drop for WaitGuard {
    fn drop(&mut self) {
        if self.work.state.load(Ordering::Acquire) == DONE {
            return;
        }
        let mut ranges = self.orphans.lock();
        let still = self.work.state.compare_exchange(
            RUNNING,
            ORPHANED,
            Ordering::AcqRel,
            Ordering::Acquire,
        );
        if still.is_ok() {
            ranges.push((self.work.clone(), self.start, self.end));
            self.orphans.count.store(ranges.len(), Ordering::Release);
        }
    }
}

impl Drop for WorkGuard {
    fn drop(&mut self) {
        if self.work.state.swap(DONE, Ordering::AcqRel) == ORPHANED {
            let mut ranges = self.orphans.lock();
            ranges.retain(|(work, _, _)| !Arc::ptr_eq(work, &self.work));
            self.orphans.count.store(ranges.len(), Ordering::Release);
            drop(ranges);
            self.orphans.gone.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    // INV REQ-DROP-1: who comes to the same bytes waits for what a dropped future left going on, and nobody else does.
    #[test]
    fn an_orphan_holds_up_its_own_bytes_and_no_others() {
        let orphans = Arc::new(Orphans::default());
        let (work, wait) = orphans.begin(10, 20);
        assert!(
            orphans.wait(0, 100).now_or_never().is_some(),
            "somebody waits for it: no orphan"
        );
        drop(wait);
        assert!(orphans.wait(15, 16).now_or_never().is_none());
        assert!(orphans.wait(20, 30).now_or_never().is_some());
        drop(work);
        assert!(orphans.wait_all().now_or_never().is_some());
    }

    #[test]
    fn work_that_is_over_leaves_no_orphan() {
        let orphans = Arc::new(Orphans::default());
        let (work, wait) = orphans.begin(10, 20);
        drop(work);
        drop(wait);
        assert!(!orphans.any());
    }
}
