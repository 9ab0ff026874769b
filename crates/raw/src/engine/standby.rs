// SPDX-License-Identifier: MIT OR Apache-2.0
//! Short calls, by a thread of the blocking pool that stays with the file while there is something to do: it does one after the other, and stands by a little for
//! the next before it sleeps. Whoever waits looks a few times before it sleeps. To wake a thread takes much longer than to write 4 KiB to the page cache, and
//! with a thread of the pool for each request two are woken for each. `QEMU: poll-max-ns of an iothread`.
//!
//! *Looking costs nobody much*: where it was in vain, it is left alone for a while; no more threads stand by than half of the CPUs, so none where there is but
//! one; who waits lets the executor's other tasks have their turn each time; and of those who wait for a file one looks.
//!
//! *No runtime depends on another* that uses the same file: a thread goes back to its pool after [`SHIFT`], and until it is there only calls of its own runtime
//! wait for it.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use blockcore::{BlockError, Result, blocking};
use tokio::runtime::{Handle, Id};
use tokio::sync::oneshot::{self, error::TryRecvError};

use crate::orphan::Orphans;

/// How long either side looks: about what it costs to be woken.
const PATIENCE: Duration = Duration::from_micros(64);
/// So many calls go without, after somebody looked in vain.
const DISAPPOINTED: usize = 32;
/// How long a thread stays away from its pool.
const SHIFT: Duration = Duration::from_millis(10);

/// A call. It says itself that it is done.
type Job = Box<dyn FnOnce() + Send>;

/// Whether a call may wait for others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// One after the other: the host does these one at a time anyway.
    InLine,
    /// At once, on a thread that does nothing else.
    Alone,
}

/// The calls for one file.
pub(crate) struct Standby {
    post: Mutex<Post>,
    /// There is another CPU for what is looked for.
    may_look: bool,
    /// The thread that stands by has been given something; saves it from taking the lock to look.
    is_given: AtomicBool,
    /// So many calls still go without looking.
    without: AtomicUsize,
    /// Somebody who waits looks.
    is_looked_at: AtomicBool,
    /// Calls that were made, to tell who looks that it goes on.
    done: AtomicUsize,
}

#[derive(Default)]
struct Post {
    thread: Thread,
    /// Which shift the thread is there for, or will be.
    shift: u64,
    /// How many there have been.
    shifts: u64,
    queue: VecDeque<Job>,
}

/// What the file's thread does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Thread {
    /// There is none.
    #[default]
    Away,
    StandingBy,
    /// A runtime's pool will send one. Its threads may all have something else to do, so only its own calls wait for that.
    Called(Id),
    /// It makes the calls in the queue.
    Busy,
    /// It makes a call that nobody may wait for.
    Apart,
}

impl std::fmt::Debug for Standby {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Standby").finish_non_exhaustive()
    }
}

/// What a thread of the pool does: a call perhaps, and then what is in the queue if nobody else sees to it.
struct Shift {
    standby: Arc<Standby>,
    number: u64,
    first: Option<Job>,
}

impl Shift {
    fn work(mut self) {
        let end = Instant::now() + SHIFT;
        if let Some(job) = self.first.take() {
            self.standby.make(job);
        }
        if self.begin() {
            self.standby.work(end);
        }
    }

    /// Whether it is its business to see to the queue.
    fn begin(&self) -> bool {
        let mut post = self.standby.lock();
        let is_mine = post.thread == Thread::Away || post.shift == self.number;
        if is_mine {
            post.thread = Thread::Busy;
            post.shift = self.number;
        }
        is_mine
    }
}

impl Drop for Shift {
    /// The pool may have thrown it away, and with it those who came before now: they are all of its runtime.
    fn drop(&mut self) {
        let mut post = self.standby.lock();
        if post.shift == self.number {
            let queue = post.leave();
            drop(post);
            drop(queue);
        }
    }
}

impl Post {
    /// The thread is away for those who come from now on. What those asked for who came before.
    fn leave(&mut self) -> VecDeque<Job> {
        self.thread = Thread::Away;
        std::mem::take(&mut self.queue)
    }
}

/// One of the places for threads that stand by, for all files together.
struct Place;

static TAKEN: AtomicUsize = AtomicUsize::new(0);

impl Place {
    /// How many there are.
    fn all() -> usize {
        static PLACES: OnceLock<usize> = OnceLock::new();
        *PLACES.get_or_init(|| available_parallelism().map_or(0, |n| n.get() / 2))
    }

    fn take() -> Option<Place> {
        let before = TAKEN.fetch_add(1, Ordering::Relaxed);
        // Made first, so that it gives back what was counted.
        let place = Place;
        (before < Place::all()).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        TAKEN.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Who looks, of those who wait.
struct Looking<'a>(&'a Standby);

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        self.0.is_looked_at.store(false, Ordering::Relaxed);
    }
}

impl Default for Standby {
    fn default() -> Standby {
        Standby {
            post: Mutex::default(),
            may_look: Place::all() > 0,
            is_given: AtomicBool::new(false),
            without: AtomicUsize::new(0),
            is_looked_at: AtomicBool::new(false),
            done: AtomicUsize::new(0),
        }
    }
}

impl Standby {
    /// Makes a call. What `work` needs, it owns; it runs to its end even if the future is dropped.
    ///
    /// # Errors
    /// The call's; `ECANCELED` if the runtime shuts down; `EAGAIN` if the host has no thread for it. Either way the call is not made.
    pub async fn run<T, E>(
        self: &Arc<Self>,
        manner: Manner,
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
        let shift = self.give(job, manner, Handle::current().id());
        let is_awake = shift.is_none();
        if let Some(shift) = shift {
            // One that the runtime drops because it shuts down says so to who waits.
            blocking::send(move || shift.work())?;
        }
        match self.wait(receiver, is_awake).await {
            Some(Ok(done)) => done.map_err(Into::into),
            Some(Err(panic)) => resume_unwind(panic),
            None => Err(BlockError::from_errno(libc::ECANCELED)),
        }
    }

    /// As [`run`](Standby::run), for a change of `start..end`: if the future is dropped, the call becomes an orphan.
    ///
    /// # Errors
    /// As [`run`](Standby::run).
    pub async fn run_change<T, E>(
        self: &Arc<Self>,
        manner: Manner,
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
        self.run(manner, move || {
            let _worker = worker;
            work()
        })
        .await
    }

    /// Waits for what a job sends; `None` if it was thrown away. `is_awake`: no thread is woken for it, so what takes long are the calls.
    async fn wait<R>(&self, mut receiver: oneshot::Receiver<R>, is_awake: bool) -> Option<R> {
        let may_look = self.may_look && self.without.load(Ordering::Relaxed) == 0;
        if may_look && !self.is_looked_at.swap(true, Ordering::Relaxed) {
            let _looking = Looking(self);
            let mut seen = self.done.load(Ordering::Relaxed);
            let mut until = Instant::now() + PATIENCE;
            loop {
                match receiver.try_recv() {
                    Ok(sent) => return Some(sent),
                    Err(TryRecvError::Closed) => return None,
                    Err(TryRecvError::Empty) => {}
                }
                let (now, done) = (Instant::now(), self.done.load(Ordering::Relaxed));
                if done != seen {
                    (seen, until) = (done, now + PATIENCE);
                } else if now >= until {
                    break;
                }
                tokio::task::yield_now().await;
            }
            if is_awake {
                self.without.store(DISAPPOINTED, Ordering::Relaxed);
            }
        }
        receiver.await.ok()
    }

    /// Gives a job to the thread that is there, or will be; else says what a thread of the `pool` has to do.
    fn give(self: &Arc<Self>, job: Job, manner: Manner, pool: Id) -> Option<Shift> {
        let without = self.without.load(Ordering::Relaxed);
        if without > 0 {
            // Decides nothing but who works: that two threads at once may miscount is no harm.
            self.without.store(without - 1, Ordering::Relaxed);
        }
        let mut post = self.lock();
        let first = match (post.thread, manner) {
            (Thread::StandingBy, _) => {
                post.queue.push_back(job);
                post.thread = match manner {
                    Manner::InLine => Thread::Busy,
                    Manner::Alone => Thread::Apart,
                };
                self.is_given.store(true, Ordering::Release);
                return None;
            }
            (Thread::Busy, Manner::InLine) => {
                post.queue.push_back(job);
                return None;
            }
            (Thread::Called(its), Manner::InLine) if its == pool => {
                post.queue.push_back(job);
                return None;
            }
            (Thread::Away, Manner::InLine) => {
                post.queue.push_back(job);
                post.thread = Thread::Called(pool);
                post.shift = post.shifts + 1;
                None
            }
            _ => Some(job),
        };
        post.shifts += 1;
        Some(Shift {
            standby: self.clone(),
            number: post.shifts,
            first,
        })
    }

    /// Makes the calls in the queue, and those that come meanwhile.
    fn work(&self, end: Instant) {
        while let Some(job) = self.next() {
            self.make(job);
            if Instant::now() >= end {
                let rest = self.lock().leave();
                return rest.into_iter().for_each(|job| self.make(job));
            }
        }
    }

    fn make(&self, job: Job) {
        // Who is told of the end may panic; that is nothing to those who come after it in the line.
        let _ = catch_unwind(AssertUnwindSafe(job));
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    /// The next job, for which the thread stands by if need be; `None`: it is away.
    fn next(&self) -> Option<Job> {
        let place = {
            let mut post = self.lock();
            if let Some(job) = post.queue.pop_front() {
                return Some(job);
            }
            let place = match self.without.load(Ordering::Relaxed) {
                0 => Place::take(),
                _ => None,
            };
            post.thread = match place {
                Some(_) => Thread::StandingBy,
                None => Thread::Away,
            };
            place
        };
        let _place = place?;
        let until = Instant::now() + PATIENCE;
        while !self.is_given.load(Ordering::Acquire) && Instant::now() < until {
            std::hint::spin_loop();
        }
        let mut post = self.lock();
        self.is_given.store(false, Ordering::Relaxed);
        let job = post.queue.pop_front();
        if job.is_none() {
            post.thread = Thread::Away;
            self.without.store(DISAPPOINTED, Ordering::Relaxed);
        }
        job
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
    use futures::FutureExt;
    use std::future::Future;
    use tokio::runtime::{Builder, Runtime};

    const MANNERS: [Manner; 2] = [Manner::InLine, Manner::Alone];

    fn runtime() -> Runtime {
        let mut builder = Builder::new_current_thread();
        builder.enable_time().max_blocking_threads(1);
        builder.build().unwrap()
    }

    async fn counted(standby: &Arc<Standby>, manner: Manner, done: &Arc<AtomicUsize>) -> usize {
        let counter = done.clone();
        let work = move || Ok::<_, BlockError>(counter.fetch_add(1, Ordering::Relaxed));
        standby.run(manner, work).await.unwrap()
    }

    #[tokio::test]
    async fn calls_that_come_one_by_one_are_made() {
        for manner in MANNERS {
            let (standby, done) = (Arc::default(), Arc::default());
            for i in 0..2000 {
                assert_eq!(counted(&standby, manner, &done).await, i);
            }
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn calls_from_many_tasks_are_made() {
        let (standby, done) = (Arc::default(), Arc::default());
        let tasks = (0..8).map(|i| {
            let (standby, done) = (Arc::clone(&standby), Arc::clone(&done));
            tokio::spawn(async move {
                for n in 0..500 {
                    counted(&standby, MANNERS[usize::from((i + n) % 7 == 0)], &done).await;
                }
            })
        });
        for task in tasks.collect::<Vec<_>>() {
            task.await.unwrap();
        }
        assert_eq!(done.load(Ordering::Relaxed), 8 * 500);
    }

    #[tokio::test]
    async fn calls_whose_futures_are_dropped_are_made_all_the_same() {
        let (standby, done) = (Arc::default(), Arc::default());
        let mut begun = 0;
        for i in 0..400 {
            let mut run = Box::pin(counted(&standby, MANNERS[i / 2 % 2], &done));
            let first = futures::poll!(&mut run);
            begun += 1;
            if i % 2 == 0 && first.is_pending() {
                run.await;
            }
        }
        let all_done = async {
            while done.load(Ordering::Relaxed) < begun {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(60), all_done).await;
        waited.expect("all of it is done");
    }

    // A call that takes long holds up nobody but those that wait in the line.
    #[tokio::test]
    async fn nobody_waits_for_a_call_that_is_made_alone() {
        let (standby, done) = (Arc::<Standby>::default(), Arc::default());
        // A thread that stands by, or not: either way.
        for _ in 0..100 {
            counted(&standby, Manner::InLine, &done).await;
            let (go, wait) = std::sync::mpsc::channel::<()>();
            let long = standby.run(Manner::Alone, move || {
                wait.recv().map_err(|_| BlockError::from_errno(libc::EIO))
            });
            let short = async {
                for manner in MANNERS {
                    counted(&standby, manner, &done).await;
                }
                go.send(()).unwrap();
            };
            futures::join!(long, short).0.unwrap();
        }
    }

    // A runtime that shuts down doesn't take another's calls with it, whatever its thread is at.
    #[test]
    fn a_runtime_that_ends_loses_no_call_of_another() {
        for i in 0..50 {
            let (standby, done) = (Arc::<Standby>::default(), Arc::default());
            let (first, second) = (runtime(), runtime());
            let mut own = Box::pin(counted(&standby, Manner::InLine, &done));
            first.block_on(async {
                if i % 2 == 0 {
                    // Its only thread has something else to do.
                    tokio::task::spawn_blocking(|| std::thread::sleep(Duration::from_millis(2)));
                }
                let _ = futures::poll!(&mut own);
            });
            second.block_on(async {
                let mut run = Box::pin(counted(&standby, Manner::InLine, &done));
                let early = futures::poll!(&mut run);
                first.shutdown_background();
                if early.is_pending() {
                    run.await;
                }
            });
        }
    }

    // The pool of one runtime is full: what another asks for is done all the same.
    #[test]
    fn a_full_pool_holds_up_no_other_runtime() {
        let (standby, done) = (Arc::<Standby>::default(), Arc::default());
        let (first, second) = (runtime(), runtime());
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let mut own = Box::pin(counted(&standby, Manner::InLine, &done));
        first.block_on(async {
            tokio::task::spawn_blocking(move || wait.recv());
            assert!(futures::poll!(&mut own).is_pending());
        });
        second.block_on(counted(&standby, Manner::InLine, &done));
        go.send(()).unwrap();
        first.block_on(own);
    }

    // A runtime's thread is its own again after a while, however much others have to do.
    #[test]
    fn a_runtime_ends_while_another_uses_its_thread() {
        let (standby, done) = (Arc::<Standby>::default(), Arc::default());
        let first = runtime();
        first.block_on(counted(&standby, Manner::InLine, &done));
        let is_over = Arc::new(AtomicBool::new(false));
        let other = std::thread::spawn({
            let (standby, done, is_over) = (standby.clone(), done.clone(), is_over.clone());
            move || {
                runtime().block_on(async {
                    while !is_over.load(Ordering::Relaxed) {
                        let two = [Manner::InLine; 2].map(|m| counted(&standby, m, &done));
                        futures::future::join_all(two).await;
                    }
                });
            }
        });
        for _ in 0..200 {
            first.block_on(counted(&standby, Manner::InLine, &done));
        }
        drop(first);
        is_over.store(true, Ordering::Relaxed);
        other.join().unwrap();
    }

    // The host has no thread for one runtime: its calls fail, and no other's.
    #[test]
    fn a_call_that_no_thread_can_be_had_for_holds_up_nobody() {
        let (standby, done) = (Arc::<Standby>::default(), Arc::default());
        let mut builder = Builder::new_current_thread();
        // No host has so much room.
        let poor = builder.thread_stack_size(1 << 60).build().unwrap();
        let rich = runtime();
        let mut refused = 0;
        for i in 0..10 {
            for manner in MANNERS {
                // The other one's thread may stand by, and make it.
                if let Err(e) = poor.block_on(standby.run(manner, || Ok::<_, BlockError>(()))) {
                    assert_eq!(e.errno(), libc::EAGAIN);
                    refused += 1;
                }
            }
            assert_eq!(rich.block_on(counted(&standby, Manner::InLine, &done)), i);
        }
        assert!(refused > 1, "at first there is nobody");
    }

    #[test]
    fn a_call_outside_a_runtime_harms_nobody_else() {
        let (standby, done) = (Arc::<Standby>::default(), Arc::default());
        let runtime = runtime();
        let mut own = Box::pin(counted(&standby, Manner::InLine, &done));
        let outside = catch_unwind(AssertUnwindSafe(|| (&mut own).now_or_never()));
        assert!(outside.is_err(), "there is nobody who could make it");
        assert_eq!(
            runtime.block_on(counted(&standby, Manner::InLine, &done)),
            0
        );
    }

    #[test]
    fn a_waker_that_panics_ends_no_line() {
        struct Panics;
        impl std::task::Wake for Panics {
            fn wake(self: Arc<Self>) {
                panic!("as planned");
            }
        }
        let (standby, done) = (Arc::<Standby>::default(), Arc::default());
        let runtime = runtime();
        let waker = Arc::new(Panics).into();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let work = move || wait.recv().map_err(|_| BlockError::from_errno(libc::EIO));
        let mut own = Box::pin(standby.run(Manner::InLine, work));
        {
            let _in_runtime = runtime.enter();
            // The looking waker is woken at once; the one that waits when there was nothing to see is another's.
            standby.without.store(2, Ordering::Relaxed);
            let mut context = std::task::Context::from_waker(&waker);
            assert!(own.as_mut().poll(&mut context).is_pending());
        }
        go.send(()).unwrap();
        runtime.block_on(counted(&standby, Manner::InLine, &done));
        let all = async { futures::join!(own, counted(&standby, Manner::InLine, &done)) };
        runtime.block_on(all).0.unwrap();
    }

    #[tokio::test]
    async fn nobody_looks_where_there_is_one_cpu() {
        let standby = Arc::new(Standby {
            may_look: false,
            ..Standby::default()
        });
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let work = move || wait.recv().map_err(|_| BlockError::from_errno(libc::EIO));
        let polls = AtomicUsize::new(0);
        let mut run = Box::pin(standby.run(Manner::InLine, work));
        let counting = std::future::poll_fn(|context| {
            polls.fetch_add(1, Ordering::Relaxed);
            run.as_mut().poll(context)
        });
        let later = tokio::spawn(async move {
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
            go.send(()).unwrap();
        });
        counting.await.unwrap();
        later.await.unwrap();
        assert_eq!(polls.into_inner(), 2, "one to ask, one for the answer");
    }

    #[tokio::test]
    #[should_panic(expected = "as planned")]
    async fn a_panic_is_the_callers() {
        let work = || -> Result<()> { panic!("as planned") };
        let _ = Arc::<Standby>::default().run(Manner::Alone, work).await;
    }
}
