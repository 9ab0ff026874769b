// SPDX-License-Identifier: MIT OR Apache-2.0
//! The ring of the process: one thread submits and reaps.
//!
//! A request is put into a queue; the thread takes all that is queued at once, so that many requests cost one system call, and
//! sleeps in the kernel until something completes or is queued. The kernel may do its completion work on that thread and nowhere else.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use rustix::event::{EventfdFlags, eventfd};

use super::Operation;
use super::ring::{Completion, Ring, Worker};

/// What both sides know.
struct Shared {
    queue: Mutex<Vec<Arc<Operation>>>,
    /// The thread is about to sleep, or sleeps; whoever queues something and sees it wakes the thread.
    asleep: AtomicBool,
    wake: OwnedFd,
}

impl Shared {
    fn submit(&self, operation: Arc<Operation>) {
        self.lock().push(operation);
        if self.asleep.swap(false, Ordering::SeqCst) {
            // Fails only when the counter is full, and then the thread is being woken anyway.
            let _woken = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Operation>>> {
        self.queue
            .lock()
            .expect("no code panics while it holds this lock")
    }
}

fn shared() -> io::Result<&'static Shared> {
    static RING: OnceLock<Result<Arc<Shared>, i32>> = OnceLock::new();
    RING.get_or_init(|| start().map_err(|e| e.raw_os_error().unwrap_or(libc::EIO)))
        .as_ref()
        .map(|shared| &**shared)
        .map_err(|errno| io::Error::from_raw_os_error(*errno))
}

/// Whether the kernel grants io_uring; starts the ring on the first call.
///
/// # Errors
/// What the kernel has against it.
pub(crate) fn available() -> io::Result<()> {
    shared().map(|_| ())
}

fn start() -> io::Result<Arc<Shared>> {
    let shared = Arc::new(Shared {
        queue: Mutex::default(),
        asleep: AtomicBool::new(false),
        wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
    });
    let (tell, told) = std::sync::mpsc::channel();
    let for_thread = shared.clone();
    std::thread::Builder::new()
        .name("io_uring".to_owned())
        .spawn(move || match Ring::new(Worker::ThisThread) {
            Ok(ring) => {
                let _told = tell.send(Ok(()));
                drop(tell);
                run(&for_thread, ring);
            }
            Err(e) => {
                let _told = tell.send(Err(e));
            }
        })?;
    told.recv()
        .map_err(|_| io::Error::from_raw_os_error(libc::EIO))??;
    Ok(shared)
}

fn run(shared: &Shared, mut ring: Ring) {
    ring.watch(shared.wake.as_raw_fd());
    loop {
        ring.add(std::mem::take(&mut *shared.lock()));
        // First say "asleep", then look again: whoever queues after the look sees it, and wakes.
        shared.asleep.store(true, Ordering::SeqCst);
        if shared.lock().is_empty() {
            ring.submit(1);
        } else {
            ring.submit(0);
        }
        shared.asleep.store(false, Ordering::SeqCst);
        if ring.reap() == Completion::WatchEnded {
            ring.watch(shared.wake.as_raw_fd());
        }
    }
}

/// Hands an operation to the thread.
///
/// # Errors
/// What the kernel has against io_uring.
pub(super) fn submit(operation: Arc<Operation>) -> io::Result<()> {
    shared()?.submit(operation);
    Ok(())
}
