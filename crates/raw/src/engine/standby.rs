// SPDX-License-Identifier: MIT OR Apache-2.0
//! Standing by: a thread that has done a piece of work looks out a little for the next one of the same file before it sleeps, and whoever waits for a piece of
//! work looks a few times before it sleeps. To wake a thread takes much longer than to write 4 KiB to the page cache, and requests that come one by one need two
//! of them woken for each. `QEMU: poll-max-ns of an iothread`.
//!
//! Neither side keeps a CPU from others for long: where looking was in vain, it is left alone for a while; no more threads stand by than half of the CPUs, so
//! none where there is but one; and who waits lets the executor's other tasks have their turn each time.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use blockcore::{BlockError, Result};
use tokio::sync::oneshot::{self, error::TryRecvError};

use crate::orphan::Orphans;

/// How long either side looks: about what it costs to be woken.
const PATIENCE: Duration = Duration::from_micros(64);
/// So many pieces of work go without, after somebody looked in vain.
const DISAPPOINTED: usize = 32;

/// A piece of work. It says itself that it is done.
type Job = Box<dyn FnOnce() + Send>;

/// Where a thread stands by for the work of one file.
#[derive(Default)]
pub(crate) struct Standby {
    post: Mutex<Post>,
    /// `post` has work; saves the thread from taking the lock to look.
    is_given: AtomicBool,
    /// So many pieces of work still go without.
    without: AtomicUsize,
}

#[derive(Default)]
enum Post {
    #[default]
    Deserted,
    StandingBy,
    Given(Job),
}

impl std::fmt::Debug for Standby {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Standby").finish_non_exhaustive()
    }
}

/// One of the places for threads that stand by, for all files together.
struct Place;

static TAKEN: AtomicUsize = AtomicUsize::new(0);

impl Place {
    fn take() -> Option<Place> {
        static PLACES: OnceLock<usize> = OnceLock::new();
        let places = *PLACES.get_or_init(|| available_parallelism().map_or(0, |n| n.get() / 2));
        let before = TAKEN.fetch_add(1, Ordering::Relaxed);
        // Made first, so that it gives back what was counted.
        let place = Place;
        (before < places).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        TAKEN.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Standby {
    /// Runs `work` on the thread that stands by, or else on one of the blocking pool. What it needs, it owns; it runs to its end even if the future is dropped.
    ///
    /// # Errors
    /// The work's; `ECANCELED` if the runtime shuts down.
    pub async fn run<T, E>(
        self: &Arc<Self>,
        work: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Result<T>
    where
        T: Send + 'static,
        E: Into<BlockError> + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let job = Box::new(move || {
            // Nobody may wait any more.
            let _ = sender.send(catch_unwind(AssertUnwindSafe(work)));
        });
        let refused = self.give(job);
        let is_given = refused.is_none();
        if let Some(job) = refused {
            let standby = self.clone();
            // Dropped without a run if the runtime shuts down, and the sender with it.
            drop(tokio::task::spawn_blocking(move || standby.work(job)));
        }
        match self.wait(receiver, is_given).await {
            Some(Ok(done)) => done.map_err(Into::into),
            Some(Err(panic)) => resume_unwind(panic),
            None => Err(BlockError::from_errno(libc::ECANCELED)),
        }
    }

    /// As [`run`](Standby::run), for a change of `start..end`: if the future is dropped, the work becomes an orphan.
    ///
    /// # Errors
    /// As [`run`](Standby::run).
    pub async fn run_change<T, E>(
        self: &Arc<Self>,
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
        self.run(move || {
            let _worker = worker;
            work()
        })
        .await
    }

    /// Waits for what a job sends; `None` if it was thrown away. `is_given`: its thread needn't be woken, so what takes long is the job.
    async fn wait<R>(&self, mut receiver: oneshot::Receiver<R>, is_given: bool) -> Option<R> {
        if self.without.load(Ordering::Relaxed) == 0 {
            let until = Instant::now() + PATIENCE;
            loop {
                match receiver.try_recv() {
                    Ok(sent) => return Some(sent),
                    Err(TryRecvError::Closed) => return None,
                    Err(TryRecvError::Empty) if Instant::now() < until => {}
                    Err(TryRecvError::Empty) => break,
                }
                tokio::task::yield_now().await;
            }
            if is_given {
                self.without.store(DISAPPOINTED, Ordering::Relaxed);
            }
        }
        receiver.await.ok()
    }

    /// Gives a job to the thread that stands by; gives it back where there is none.
    fn give(&self, job: Job) -> Option<Job> {
        let without = self.without.load(Ordering::Relaxed);
        // Decides nothing but who works: that two threads at once may miscount is no harm.
        self.without
            .store(without.saturating_sub(1), Ordering::Relaxed);
        let mut post = self.lock();
        if !matches!(*post, Post::StandingBy) {
            return Some(job);
        }
        *post = Post::Given(job);
        self.is_given.store(true, Ordering::Release);
        None
    }

    /// What a thread of the pool does: one job, and those that come while it stands by.
    fn work(&self, job: Job) {
        job();
        while let Some(next) = self.stand_by() {
            next();
        }
    }

    fn stand_by(&self) -> Option<Job> {
        if self.without.load(Ordering::Relaxed) > 0 {
            return None;
        }
        let _place = Place::take()?;
        {
            let mut post = self.lock();
            if !matches!(*post, Post::Deserted) {
                return None;
            }
            *post = Post::StandingBy;
        }
        let until = Instant::now() + PATIENCE;
        while !self.is_given.load(Ordering::Acquire) && Instant::now() < until {
            std::hint::spin_loop();
        }
        let mut post = self.lock();
        self.is_given.store(false, Ordering::Relaxed);
        match std::mem::take(&mut *post) {
            Post::Given(job) => Some(job),
            Post::StandingBy | Post::Deserted => {
                self.without.store(DISAPPOINTED, Ordering::Relaxed);
                None
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Post> {
        self.post
            .lock()
            .expect("no code panics while it holds this lock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standby() -> Arc<Standby> {
        Arc::default()
    }

    #[tokio::test]
    async fn work_that_comes_one_by_one_is_all_done_and_in_its_order() {
        let (standby, done) = (standby(), Arc::new(AtomicUsize::new(0)));
        for i in 0..2000 {
            let counter = done.clone();
            let work = move || Ok::<_, BlockError>(counter.fetch_add(1, Ordering::Relaxed));
            assert_eq!(standby.run(work).await.unwrap(), i);
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn work_from_many_tasks_is_all_done() {
        let (standby, done) = (standby(), Arc::new(AtomicUsize::new(0)));
        let tasks = (0..8).map(|_| {
            let (standby, done) = (standby.clone(), done.clone());
            tokio::spawn(async move {
                for _ in 0..500 {
                    let counter = done.clone();
                    let work = move || Ok::<_, BlockError>(counter.fetch_add(1, Ordering::Relaxed));
                    standby.run(work).await.unwrap();
                }
            })
        });
        for task in tasks.collect::<Vec<_>>() {
            task.await.unwrap();
        }
        assert_eq!(done.load(Ordering::Relaxed), 8 * 500);
    }

    // What is given to a thread that stands by is done even if nobody waits for it, as with the pool.
    #[tokio::test]
    async fn work_whose_future_is_dropped_is_done_all_the_same() {
        let (standby, done) = (standby(), Arc::new(AtomicUsize::new(0)));
        for i in 0..200 {
            let counter = done.clone();
            let work = move || Ok::<_, BlockError>(counter.fetch_add(1, Ordering::Relaxed));
            let mut run = Box::pin(standby.run(work));
            if i % 2 == 0 {
                assert!(futures::poll!(&mut run).is_pending() || i > 0);
                drop(run);
            } else {
                run.await.unwrap();
            }
        }
        let all_done = async {
            while done.load(Ordering::Relaxed) < 200 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(60), all_done).await;
        waited.expect("all of it is done");
    }

    // A runtime that shuts down doesn't take the work of another with it.
    #[test]
    fn a_runtime_that_ends_loses_no_work_of_another() {
        let standby = standby();
        let runtime = || {
            let mut builder = tokio::runtime::Builder::new_current_thread();
            builder.build().unwrap()
        };
        for i in 0..200 {
            let first = runtime();
            first.block_on(async { standby.run(|| Ok::<_, BlockError>(())).await.unwrap() });
            let second = runtime();
            let done = second.block_on(async {
                let run = standby.run(move || Ok::<_, BlockError>(i));
                first.shutdown_background();
                run.await
            });
            assert_eq!(done.unwrap(), i);
        }
    }

    #[tokio::test]
    #[should_panic(expected = "as planned")]
    async fn a_panic_is_the_callers() {
        let work = || -> Result<()> { panic!("as planned") };
        let _ = standby().run(work).await;
    }
}
