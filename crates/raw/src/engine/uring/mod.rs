// SPDX-License-Identifier: MIT OR Apache-2.0
//! io_uring: reads and writes that the kernel works on while nobody waits in a system call.
//!
//! * [`ring`]: a ring and the table of what is in it;
//! * [`thread`]: the ring of the process, worked by a thread of its own: right for every runtime;
//! * [`reactor`]: a ring that a tokio runtime works itself, where the program says that it can: no switch between threads.
//!
//! *The rule that makes it safe*: an operation, with its buffer, is owned by a ring's table from before its submission until its completion
//! has been reaped. The future that waits only shares it; dropping the future changes nothing.

mod reactor;
mod ring;
mod thread;

use std::future::poll_fn;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Poll, Waker};

use blockcore::{BlockError, IoBuf, IoBufMut, Result};

use crate::host::HostFile;
use crate::orphan::{Orphans, WorkGuard};

pub use reactor::use_this_runtime;
pub(crate) use thread::available;

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
    if let Err(operation) = reactor::submit(operation.clone()) {
        thread::submit(operation)?;
    }
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
