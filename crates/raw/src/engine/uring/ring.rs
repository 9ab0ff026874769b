// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`Ring`]: an io_uring with the table of the operations in it. One thread at a time works it.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};

use super::{Operation, Payload};

/// Requests in the kernel at a time; the completion queue has room for twice as many, so it never overflows.
const IN_FLIGHT_MAX: usize = 256;
/// The most pieces of memory that one operation takes (`IOV_MAX`).
const IOV_MAX: usize = 1024;
/// The most bytes that one operation moves; the kernel's own limit is near `i32::MAX`.
const TRANSFER_BYTES_MAX: usize = 1 << 30;
/// The `user_data` of the poll on the wake-up descriptor.
const WAKE: u64 = u64::MAX;

/// A ring and what is in it.
pub(super) struct Ring {
    uring: IoUring,
    /// By `user_data`. Declared after the ring, so that it goes last.
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

// SAFETY: the pointers in `iov` go only to the kernel, and point into the operation's buffer, which the flight owns a share of.
unsafe impl Send for Flight {}

/// Who will work a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Worker {
    /// The thread that makes the ring, alone.
    ThisThread,
    /// The only thread of a runtime: its completion work can wait until it comes back to the kernel by itself.
    OneAtATime,
    /// Any thread of a runtime.
    Any,
}

impl Ring {
    /// # Errors
    /// What the kernel has against it; `ENOSYS` if it knows too little.
    pub fn new(worker: Worker) -> io::Result<Ring> {
        let entries = IN_FLIGHT_MAX as u32;
        let mut builder = IoUring::builder();
        match worker {
            Worker::ThisThread => builder.setup_single_issuer().setup_defer_taskrun(),
            Worker::OneAtATime => builder.setup_coop_taskrun(),
            Worker::Any => &mut builder,
        };
        let uring = builder
            .build(entries)
            // Older kernels know less.
            .or_else(|_| IoUring::new(entries))?;
        if !uring.params().is_feature_nodrop() || !uring.params().is_feature_resource_tagging() {
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        Ok(Ring {
            uring,
            flights: (0..IN_FLIGHT_MAX).map(|_| None).collect(),
            free: (0..IN_FLIGHT_MAX).rev().collect(),
            backlog: VecDeque::new(),
        })
    }

    /// Another descriptor of the ring: readable when there are completions.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        // SAFETY: the ring is open for as long as `self` lives.
        let fd = unsafe { BorrowedFd::borrow_raw(self.uring.as_raw_fd()) };
        Ok(rustix::io::fcntl_dupfd_cloexec(fd, 0)?)
    }

    /// How many operations the ring has, in the kernel or waiting for room there.
    pub fn len(&self) -> usize {
        IN_FLIGHT_MAX - self.free.len() + self.backlog.len()
    }

    /// Whether there is anything that the kernel could be given now: the rest of what it did in part, or what it had no memory for.
    pub fn has_work_to_submit(&mut self) -> bool {
        let waits = !self.backlog.is_empty() && !self.free.is_empty();
        waits || !self.uring.submission().is_empty()
    }

    /// Takes operations over.
    pub fn add(&mut self, operations: impl IntoIterator<Item = Arc<Operation>>) {
        self.backlog.extend(operations.into_iter().map(Flight::new));
    }

    /// Asks for a [`Completion::Wake`] whenever `fd` becomes readable; `fd` outlives the ring.
    pub fn watch(&mut self, fd: RawFd) {
        let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32)
            .multi(true)
            .build()
            .user_data(WAKE);
        // SAFETY: the entry speaks of no memory.
        unsafe { self.push(&entry) };
    }

    /// Gives the kernel what waits, as far as there is room, and waits until `want` completions are there.
    pub fn submit(&mut self, want: usize) {
        self.fill();
        if want == 0 && self.uring.submission().is_empty() {
            return;
        }
        match self.uring.submit_and_wait(want) {
            Ok(_) => {}
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EBUSY)) => {}
            Err(e) => {
                // Out of memory, mostly. What is in flight stays so; try again a little later.
                tracing::error!("io_uring_enter: {e}");
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
    }

    /// Ends what the kernel has completed. Says whether there was anything, and whether the watched descriptor became readable for the last time.
    pub fn reap(&mut self) -> Completion {
        let mut found = Completion::Nothing;
        loop {
            let next = self
                .uring
                .completion()
                .next()
                .map(|c| (c.user_data(), c.result(), c.flags()));
            match next {
                None => return found,
                Some((WAKE, _, flags)) if !io_uring::cqueue::more(flags) => {
                    found = Completion::WatchEnded;
                }
                Some((WAKE, ..)) => {}
                Some((slot, result, _)) => {
                    self.complete(slot as usize, result);
                    if found == Completion::Nothing {
                        found = Completion::Some;
                    }
                }
            }
        }
    }

    fn fill(&mut self) {
        while let Some(slot) = self.free.last().copied() {
            let Some(mut flight) = self.backlog.pop_front() else {
                return;
            };
            let entry = flight.entry().user_data(slot as u64);
            self.free.pop();
            // The flight is in the table before the kernel can see the entry, and stays there until `complete`.
            self.flights[slot] = Some(flight);
            // SAFETY: the descriptor and the memory that the entry speaks of are kept by `self.flights` until its completion is reaped:
            // the operation holds the file and the buffer, the flight the vector.
            unsafe { self.push(&entry) };
        }
    }

    /// # Safety
    /// What the entry points to must live, and be used by nobody else, until its completion has been reaped.
    unsafe fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: the caller's promise.
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
        let Some(mut flight) = self.flights.get_mut(slot).and_then(Option::take) else {
            tracing::error!("io_uring completed a request that is not in flight: {slot}");
            return;
        };
        self.free.push(slot);
        match flight.advance(result) {
            Some(result) => flight.operation.finish(result),
            None => self.backlog.push_back(flight),
        }
    }

    /// Takes back what the kernel has not seen yet.
    pub fn take_backlog(&mut self) -> impl Iterator<Item = Arc<Operation>> + '_ {
        self.backlog.drain(..).map(|flight| flight.operation)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel may still write to the buffers: they must not go before it is done.
        self.backlog.clear();
        while self.free.len() < IN_FLIGHT_MAX {
            self.submit(1);
            self.reap();
        }
    }
}

/// What [`Ring::reap`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Completion {
    Nothing,
    Some,
    /// The descriptor has to be watched anew.
    WatchEnded,
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
            // Cancelled: the thread that submitted it has ended. Nobody else cancels.
            r if [libc::EINTR, libc::EAGAIN, libc::ECANCELED].contains(&-r) => return None,
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
