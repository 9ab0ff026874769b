// SPDX-License-Identifier: MIT OR Apache-2.0
//! io_uring: one ring for the process, worked by one thread that submits and reaps.
//!
//! A request is put into a queue; the thread takes all that is queued at once, so that many requests cost one system call, and
//! sleeps in the kernel until something completes or is queued. Only that thread touches the ring, so the ring needs no lock,
//! and the kernel may do its completion work there and nowhere else.
//!
//! *The rule that makes it safe*: an operation, with its buffer, is owned by the thread's table from before its submission until
//! its completion has been reaped. The future that waits only shares it; dropping the future changes nothing.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::task::{Poll, Waker};

use blockcore::{BlockError, IoBuf, IoBufMut, Result};
use io_uring::{IoUring, opcode, squeue, types};
use rustix::event::{EventfdFlags, eventfd};

use crate::host::HostFile;
use crate::orphan::{Orphans, WorkGuard};

/// Requests in the kernel at a time; the completion queue has room for twice as many, so it never overflows.
const IN_FLIGHT_MAX: usize = 256;
/// The most pieces of memory that one operation takes (`IOV_MAX`).
const IOV_MAX: usize = 1024;
/// The most bytes that one operation moves; the kernel's own limit is near `i32::MAX`.
const TRANSFER_BYTES_MAX: usize = 1 << 30;
/// The `user_data` of the poll on the wake-up descriptor.
const WAKE: u64 = u64::MAX;

/// What is to be done with which memory.
enum Payload {
    Read(IoBufMut),
    Write(IoBuf, #[allow(dead_code)] WorkGuard),
    /// The result has been taken.
    Taken,
}

enum State {
    Running(Option<Waker>),
    Finished(io::Result<()>),
}

/// One request, shared between the thread and the future that waits.
struct Operation {
    file: Arc<HostFile>,
    offset: u64,
    inner: Mutex<Inner>,
}

struct Inner {
    payload: Payload,
    state: State,
}

impl Operation {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner
            .lock()
            .expect("no code panics while it holds this lock")
    }

    fn finish(&self, result: io::Result<()>) {
        let mut inner = self.lock();
        if let Payload::Write(..) = inner.payload {
            // The work is over: the memory, and the guard that says so, go before the waiter is told, and outside the lock.
            let written = std::mem::replace(&mut inner.payload, Payload::Taken);
            drop(inner);
            drop(written);
            inner = self.lock();
        }
        let before = std::mem::replace(&mut inner.state, State::Finished(result));
        drop(inner);
        if let State::Running(Some(waker)) = before {
            waker.wake();
        }
    }
}

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
        .spawn(move || match Ring::new(for_thread) {
            Ok(mut ring) => {
                let _told = tell.send(Ok(()));
                drop(tell);
                ring.run();
            }
            Err(e) => {
                let _told = tell.send(Err(e));
            }
        })?;
    told.recv()
        .map_err(|_| io::Error::from_raw_os_error(libc::EIO))??;
    Ok(shared)
}

/// The thread's side: the ring and what is in it.
struct Ring {
    shared: Arc<Shared>,
    uring: IoUring,
    /// By `user_data`.
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
    backlog: VecDeque<Flight>,
}

/// An operation on its way, and how much of it is done.
struct Flight {
    operation: Arc<Operation>,
    done: usize,
    total: usize,
    /// What the submitted entry points to; lives until the completion.
    iov: Vec<libc::iovec>,
}

impl Ring {
    /// Made on its own thread: the kernel lets only that one submit then, which is cheaper for it.
    fn new(shared: Arc<Shared>) -> io::Result<Ring> {
        let entries = IN_FLIGHT_MAX as u32;
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(entries)
            // Older kernels know less.
            .or_else(|_| IoUring::new(entries))?;
        if !uring.params().is_feature_nodrop() || !uring.params().is_feature_resource_tagging() {
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        let mut ring = Ring {
            shared,
            uring,
            flights: (0..IN_FLIGHT_MAX).map(|_| None).collect(),
            free: (0..IN_FLIGHT_MAX).rev().collect(),
            backlog: VecDeque::new(),
        };
        ring.watch_for_wake();
        Ok(ring)
    }

    fn run(&mut self) {
        let mut reaped = Vec::with_capacity(2 * IN_FLIGHT_MAX);
        loop {
            let queued = std::mem::take(&mut *self.shared.lock());
            self.backlog.extend(queued.into_iter().map(Flight::new));
            self.submit_backlog();
            // First say "asleep", then look again: whoever queues after the look sees it, and wakes.
            self.shared.asleep.store(true, Ordering::SeqCst);
            if !self.shared.lock().is_empty() {
                self.shared.asleep.store(false, Ordering::SeqCst);
                continue;
            }
            match self.uring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EBUSY)) => {}
                Err(e) => {
                    // Out of memory, mostly. What is in flight stays so; try again a little later.
                    tracing::error!("io_uring_enter: {e}");
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
            }
            self.shared.asleep.store(false, Ordering::SeqCst);
            reaped.extend(
                self.uring
                    .completion()
                    .map(|c| (c.user_data(), c.result(), c.flags())),
            );
            for (user_data, result, flags) in reaped.drain(..) {
                if user_data != WAKE {
                    self.complete(user_data as usize, result);
                } else if !io_uring::cqueue::more(flags) {
                    self.watch_for_wake();
                }
            }
        }
    }

    /// Asks for a completion whenever somebody writes to the wake-up descriptor.
    fn watch_for_wake(&mut self) {
        let fd = types::Fd(self.shared.wake.as_raw_fd());
        let entry = opcode::PollAdd::new(fd, libc::POLLIN as u32)
            .multi(true)
            .build()
            .user_data(WAKE);
        self.push(&entry);
    }

    fn submit_backlog(&mut self) {
        while let Some(slot) = self.free.last().copied() {
            let Some(mut flight) = self.backlog.pop_front() else {
                return;
            };
            let entry = flight.entry().user_data(slot as u64);
            self.free.pop();
            // The flight is in the table before the kernel can see the entry, and stays there until `complete`.
            self.flights[slot] = Some(flight);
            self.push(&entry);
        }
    }

    fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: the descriptor and the memory that the entry speaks of are kept by `self.flights` (see `submit_backlog`) or by
            // `self.shared`, until the entry's completion has been reaped. The ring is used by this thread alone.
            if unsafe { self.uring.submission().push(entry) }.is_ok() {
                return;
            }
            // The queue is full: make room. What can fail here is tried again until it works.
            if self.uring.submit().is_err() {
                std::thread::yield_now();
            }
        }
    }

    fn complete(&mut self, slot: usize, result: i32) {
        let Some(mut flight) = self.flights[slot].take() else {
            tracing::error!("io_uring completed a request that is not in flight: {slot}");
            return;
        };
        self.free.push(slot);
        match flight.advance(result) {
            Some(result) => flight.operation.finish(result),
            None => self.backlog.push_back(flight),
        }
    }
}

impl Flight {
    fn new(operation: Arc<Operation>) -> Flight {
        let total = match &operation.lock().payload {
            Payload::Read(buf) => buf.len(),
            Payload::Write(buf, _) => buf.len(),
            Payload::Taken => 0,
        };
        Flight {
            operation,
            done: 0,
            total,
            iov: Vec::new(),
        }
    }

    /// The entry for what is left to do.
    fn entry(&mut self) -> squeue::Entry {
        let fd = types::Fd(self.operation.file.as_fd().as_raw_fd());
        let offset = self.operation.offset + self.done as u64;
        self.iov.clear();
        let mut inner = self.operation.lock();
        match &mut inner.payload {
            Payload::Read(buf) => {
                let pieces = buf.raw_segments().map(|(base, len)| (base.as_ptr(), len));
                collect_iov(&mut self.iov, self.done, pieces);
                match self.iov[..] {
                    [one] => opcode::Read::new(fd, one.iov_base.cast(), one.iov_len as u32)
                        .offset(offset)
                        .build(),
                    _ => opcode::Readv::new(fd, self.iov.as_ptr(), self.iov.len() as u32)
                        .offset(offset)
                        .build(),
                }
            }
            Payload::Write(buf, _) => {
                let pieces = buf.segments().map(|s| (s.as_ptr().cast_mut(), s.len()));
                collect_iov(&mut self.iov, self.done, pieces);
                match self.iov[..] {
                    [one] => opcode::Write::new(fd, one.iov_base.cast(), one.iov_len as u32)
                        .offset(offset)
                        .build(),
                    _ => opcode::Writev::new(fd, self.iov.as_ptr(), self.iov.len() as u32)
                        .offset(offset)
                        .build(),
                }
            }
            Payload::Taken => opcode::Nop::new().build(),
        }
    }

    /// Takes note of a completion. `None`: there is more to do.
    fn advance(&mut self, result: i32) -> Option<io::Result<()>> {
        let mut inner = self.operation.lock();
        let is_read = matches!(inner.payload, Payload::Read(_));
        match result {
            r if r == -libc::EINTR || r == -libc::EAGAIN => return None,
            ..0 => return Some(Err(io::Error::from_raw_os_error(-result))),
            0 if !is_read => return Some(Err(io::Error::from_raw_os_error(libc::ENOSPC))),
            _ => self.done += result as usize,
        }
        let left = self.total - self.done;
        // O_DIRECT stops in the middle of a block only where the file ends.
        let at_end = result == 0
            || self
                .operation
                .file
                .direct
                .is_some_and(|d| !d.is_aligned(self.done as u64));
        if let Payload::Read(buf) = &mut inner.payload
            && at_end
        {
            buf.fill_range(self.done, left, 0);
            return Some(Ok(()));
        }
        (left == 0).then_some(Ok(()))
    }
}

/// The pieces of memory behind the first `skip` bytes, as the kernel wants them.
fn collect_iov(
    iov: &mut Vec<libc::iovec>,
    mut skip: usize,
    pieces: impl Iterator<Item = (*mut u8, usize)>,
) {
    let mut room = TRANSFER_BYTES_MAX;
    for (base, len) in pieces {
        if skip >= len {
            skip -= len;
            continue;
        }
        let n = (len - skip).min(room);
        if n == 0 || iov.len() == IOV_MAX {
            break;
        }
        iov.push(libc::iovec {
            iov_base: base.wrapping_add(skip).cast(),
            iov_len: n,
        });
        room -= n;
        skip = 0;
    }
}

/// Waits for an operation that was submitted, and takes its payload.
async fn finished(operation: &Operation) -> (Payload, io::Result<()>) {
    poll_fn(|cx| {
        let mut inner = operation.lock();
        match &mut inner.state {
            State::Running(waker) => {
                match waker {
                    Some(waker) => waker.clone_from(cx.waker()),
                    None => *waker = Some(cx.waker().clone()),
                }
                Poll::Pending
            }
            State::Finished(result) => {
                let result = std::mem::replace(result, Ok(()));
                let payload = std::mem::replace(&mut inner.payload, Payload::Taken);
                Poll::Ready((payload, result))
            }
        }
    })
    .await
}

async fn run(file: &Arc<HostFile>, offset: u64, payload: Payload) -> Result<Payload> {
    let operation = Arc::new(Operation {
        file: file.clone(),
        offset,
        inner: Mutex::new(Inner {
            payload,
            state: State::Running(None),
        }),
    });
    shared()?.submit(operation.clone());
    let (payload, result) = finished(&operation).await;
    result.map_err(BlockError::from_io)?;
    Ok(payload)
}

/// Fills `buf` from `offset`; what lies past the end of the file reads as zero.
pub(crate) async fn read(file: &Arc<HostFile>, offset: u64, buf: IoBufMut) -> Result<IoBufMut> {
    match run(file, offset, Payload::Read(buf)).await? {
        Payload::Read(buf) => Ok(buf),
        _ => Err(BlockError::from_errno(libc::EIO)),
    }
}

/// Writes all of `buf` at `offset`.
pub(crate) async fn write(
    file: &Arc<HostFile>,
    orphans: &Arc<Orphans>,
    offset: u64,
    buf: IoBuf,
) -> Result<()> {
    // INV REQ-DROP-1: the operation's guard goes when the kernel is done, the future's when nobody waits any more.
    let (worker, _waiter) = orphans.begin(offset, offset + buf.len() as u64);
    run(file, offset, Payload::Write(buf, worker)).await?;
    Ok(())
}
