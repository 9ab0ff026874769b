// SPDX-License-Identifier: MIT OR Apache-2.0
//! A ring that a tokio runtime works itself, by a task: requests are submitted by the thread whose task made them, and completions wake the
//! runtime through its own I/O driver. That spares the two switches between threads that the ring of the process costs a request.
//!
//! Requests that are made while other tasks run go into a queue; the task submits them together when its turn comes.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::task::{Context, Poll};

use futures::task::AtomicWaker;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::{Handle, Id, RuntimeFlavor};

use super::ring::{Ring, Worker};
use super::{Operation, thread};

/// With this many requests under way, it pays to let other tasks add theirs before the kernel is called.
const BUSY: usize = 4;

/// The runtimes that work a ring themselves.
static REACTORS: RwLock<Vec<(Id, Arc<Queue>)>> = RwLock::new(Vec::new());
static REACTOR_COUNT: AtomicUsize = AtomicUsize::new(0);

/// Where requests wait for the task.
struct Queue {
    /// `None`: the runtime is shutting down.
    waiting: Mutex<Option<Vec<Arc<Operation>>>>,
    /// The task has been woken and has not looked yet.
    woken: AtomicBool,
    task: AtomicWaker,
}

/// Lets the current tokio runtime work io_uring for its own requests, until it shuts down. Without this call, a thread of the process does.
///
/// A request that is given up is still worked on, but only while the runtime runs: who uses the same file from another runtime may have to wait for it.
///
/// Call it once in each runtime, early. Does nothing where the kernel grants no io_uring: requests then go to the blocking pool.
///
/// # Errors
/// The host's.
///
/// # Panics
/// Outside of a runtime, and in one that was built without `enable_io`.
pub fn use_this_runtime() -> io::Result<()> {
    if thread::available().is_err() {
        return Ok(());
    }
    let handle = Handle::current();
    let mut reactors = REACTORS
        .write()
        .expect("no code panics while it holds this lock");
    if reactors.iter().any(|(id, _)| *id == handle.id()) {
        return Ok(());
    }
    let ring = Ring::new(match handle.runtime_flavor() {
        RuntimeFlavor::CurrentThread => Worker::OneAtATime,
        _ => Worker::Any,
    })?;
    let queue = Arc::new(Queue {
        waiting: Mutex::new(Some(Vec::new())),
        woken: AtomicBool::new(false),
        task: AtomicWaker::new(),
    });
    drop(reactors);
    let descriptor = ring.descriptor()?;
    // SAFETY: the registration owns the descriptor, and nobody else closes or replaces it.
    let ready = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?;
    let reactor = Reactor {
        id: handle.id(),
        queue: queue.clone(),
        ready: Some(ready),
        ring: Some(ring),
        has_yielded: false,
    };
    reactors = REACTORS
        .write()
        .expect("no code panics while it holds this lock");
    reactors.push((handle.id(), queue));
    REACTOR_COUNT.store(reactors.len(), Ordering::Release);
    drop(reactors);
    handle.spawn(reactor);
    Ok(())
}

/// Queues an operation for the current runtime's ring; gives it back where there is none.
pub(super) fn submit(operation: Arc<Operation>) -> Result<(), Arc<Operation>> {
    if REACTOR_COUNT.load(Ordering::Acquire) == 0 {
        return Err(operation);
    }
    let Ok(handle) = Handle::try_current() else {
        return Err(operation);
    };
    let id = handle.id();
    let reactors = REACTORS
        .read()
        .expect("no code panics while it holds this lock");
    let Some(queue) = reactors
        .iter()
        .find(|(of, _)| *of == id)
        .map(|(_, queue)| queue.clone())
    else {
        return Err(operation);
    };
    drop(reactors);
    match &mut *queue
        .waiting
        .lock()
        .expect("no code panics while it holds this lock")
    {
        Some(waiting) => waiting.push(operation),
        None => return Err(operation),
    }
    if !queue.woken.swap(true, Ordering::AcqRel) {
        queue.task.wake();
    }
    Ok(())
}

/// The task.
struct Reactor {
    id: Id,
    queue: Arc<Queue>,
    /// The ring's descriptor, which is readable when there are completions.
    ready: Option<AsyncFd<OwnedFd>>,
    ring: Option<Ring>,
    has_yielded: bool,
}

impl Reactor {
    /// Takes what is queued to the kernel, and ends what has completed.
    fn work(&mut self) {
        let Some(ring) = &mut self.ring else {
            return;
        };
        self.queue.woken.store(false, Ordering::Release);
        let queued = match &mut *self
            .queue
            .waiting
            .lock()
            .expect("no code panics while it holds this lock")
        {
            Some(waiting) => std::mem::take(waiting),
            None => Vec::new(),
        };
        ring.add(queued);
        ring.submit(0);
        ring.reap();
    }
}

impl Future for Reactor {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        this.queue.task.register(cx.waker());
        let (Some(ring), Some(ready)) = (&this.ring, &this.ready) else {
            return Poll::Ready(());
        };
        let is_busy = ring.len() >= BUSY;
        let mut has_completions = false;
        // Clear first, look then: what completes after the look makes the descriptor readable anew.
        while let Poll::Ready(Ok(mut guard)) = ready.poll_read_ready(cx) {
            guard.clear_ready();
            has_completions = true;
        }
        if is_busy && !has_completions && !std::mem::replace(&mut this.has_yielded, true) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        this.has_yielded = false;
        this.work();
        if this.ring.as_mut().is_some_and(Ring::has_work_to_submit) {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        let mut reactors = REACTORS
            .write()
            .expect("no code panics while it holds this lock");
        reactors.retain(|(id, _)| *id != self.id);
        REACTOR_COUNT.store(reactors.len(), Ordering::Release);
        drop(reactors);
        let waiting = self
            .queue
            .waiting
            .lock()
            .expect("no code panics while it holds this lock")
            .take();
        self.ready = None;
        let Some(mut ring) = self.ring.take() else {
            return;
        };
        // What the kernel has not seen goes on elsewhere: somebody in another runtime may wait for it.
        let unseen: Vec<_> = ring.take_backlog().collect();
        for operation in waiting.into_iter().flatten().chain(unseen) {
            if let Err(e) = thread::submit(operation.clone()) {
                operation.finish(Err(e));
            }
        }
        // Waits for what the kernel is doing, which is over soon.
        while ring.len() > 0 {
            ring.submit(1);
            ring.reap();
        }
    }
}
