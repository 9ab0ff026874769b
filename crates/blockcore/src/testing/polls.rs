// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether a future's polls put their thread to sleep: the kernel counts how often a thread goes to sleep of its own accord, and a poll that waits for a disk,
//! a lock or another thread adds to that count. Linux only.

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Counts polls, and those that slept. Futures on any number of threads may share one.
///
/// ```
/// use blockcore::testing::Polls;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// let polls = Polls::default();
/// polls.watch(async {}).await;
/// assert_eq!((polls.count(), polls.slept()), (1, 0));
/// polls.watch(async { std::thread::sleep(std::time::Duration::from_millis(1)) }).await;
/// assert_eq!((polls.count(), polls.slept()), (2, 1));
/// assert!(polls.which_slept().contains(&1), "the second of them");
/// # }
/// ```
#[derive(Debug, Default)]
pub struct Polls {
    polls: AtomicU64,
    slept: Mutex<BTreeSet<u64>>,
}

/// How often this thread has gone to sleep of its own accord.
fn sleeps() -> u64 {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let mut lines = status.lines();
    let line = lines.find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"));
    line.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

impl Polls {
    /// Polls a future to its end, and counts.
    pub async fn watch<T>(&self, future: impl Future<Output = T>) -> T {
        let mut future = pin!(future);
        poll_fn(|cx| {
            let before = sleeps();
            let polled = future.as_mut().poll(cx);
            let slept = sleeps() != before;
            let number = self.polls.fetch_add(1, Ordering::Relaxed);
            if slept {
                let mut all = self.slept.lock();
                all.as_mut()
                    .expect("no code panics while it holds this lock")
                    .insert(number);
            }
            polled
        })
        .await
    }

    /// How many polls there were.
    pub fn count(&self) -> u64 {
        self.polls.load(Ordering::Relaxed)
    }

    /// How many of them put their thread to sleep.
    pub fn slept(&self) -> u64 {
        self.which_slept().len() as u64
    }

    /// Which polls did, counted from 0. On one thread, and where every run is the same, a wait for something is there in every run, and what the machine does
    /// beside is not: other threads of the process hold locks of the allocator, or of the kernel's map of its memory.
    pub fn which_slept(&self) -> BTreeSet<u64> {
        let all = self.slept.lock();
        all.expect("no code panics while it holds this lock")
            .clone()
    }
}

/// Runs a future to its end on a current-thread runtime that is never idle meanwhile. Gives back its output, and the longest time between two turns of the
/// scheduler in which the thread went to sleep all the same: then a poll has waited, the future's or that of any other task of the runtime.
///
/// ```
/// use std::time::Duration;
/// use blockcore::testing::longest_wait;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// let wait = Duration::from_millis(50);
/// let (_, longest) = longest_wait(async {
///     tokio::spawn(async move { std::thread::sleep(wait) }).await
/// })
/// .await;
/// assert!(longest >= wait);
/// # }
/// ```
pub async fn longest_wait<T>(future: impl Future<Output = T>) -> (T, Duration) {
    let mut future = pin!(future);
    let mut longest = Duration::ZERO;
    let mut last = (sleeps(), Instant::now());
    let output = poll_fn(|cx| {
        let mut look = || {
            let now = sleeps();
            if now != last.0 {
                longest = longest.max(last.1.elapsed());
            }
            last = (now, Instant::now());
        };
        // The others' turn, and ours.
        look();
        let polled = future.as_mut().poll(cx);
        look();
        if polled.is_pending() {
            let _pending = pin!(tokio::task::yield_now()).poll(cx);
        }
        polled
    })
    .await;
    (output, longest)
}
