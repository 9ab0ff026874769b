// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`Backend`]: what a program holds. `QEMU: BlockBackend`.
//!
//! It checks requests against the length of the disk, adds write-through, and counts what is in flight, so that closing and reopening wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::sync::Notify;

use crate::buffer::{IoBuf, IoBufMut};
use crate::child::{Child, ChildRole};
use crate::driver::{ReadFlags, TruncateRequest, WriteFlags};
use crate::error::{BlockError, ErrorKind, Op, Result};
use crate::limits::MAX_REQUEST_BYTES;
use crate::node::{Node, NodeFlags};
use crate::options::Options;
use crate::status::{BlockStatus, ChainStatus, StatusMode};
use crate::walk::chain_status;

/// Counts what is in flight and lets others wait until nothing is.
#[derive(Debug, Default)]
pub struct InFlight {
    count: AtomicUsize,
    idle: Notify,
}

/// One thing in flight; ends when dropped.
#[derive(Debug)]
pub struct InFlightGuard<'a>(&'a InFlight);

/// As [`InFlightGuard`], for work that outlives the caller's borrow.
#[derive(Debug)]
pub struct OwnedInFlightGuard(Arc<InFlight>);

impl InFlight {
    /// One more, until the guard is dropped.
    pub fn enter(&self) -> InFlightGuard<'_> {
        self.count.fetch_add(1, Ordering::AcqRel);
        InFlightGuard(self)
    }

    /// One more, until the guard is dropped.
    pub fn enter_owned(self: &Arc<Self>) -> OwnedInFlightGuard {
        self.count.fetch_add(1, Ordering::AcqRel);
        OwnedInFlightGuard(self.clone())
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Waits until there are none.
    pub async fn wait_idle(&self) {
        loop {
            let mut idle = std::pin::pin!(self.idle.notified());
            idle.as_mut().enable();
            if self.count() == 0 {
                return;
            }
            idle.await;
        }
    }

    fn leave(&self) {
        if self.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.idle.notify_waiters();
        }
    }
}

impl Drop for InFlightGuard<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl Drop for OwnedInFlightGuard {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// A program's hold on a disk. Share it in an [`Arc`]: all methods take `&self`, and requests run concurrently.
///
/// Every request's future can be dropped at any time; see [`BlockDriver`](crate::BlockDriver) for what that means. Call
/// [`close`](Backend::close) when done: dropping a backend loses what was not flushed.
#[derive(Debug)]
pub struct Backend {
    root: Child,
    write_through: Arc<AtomicBool>,
    in_flight: Arc<InFlight>,
}

impl Backend {
    /// A hold on `root`.
    pub fn new(root: Arc<Node>, write_through: bool) -> Backend {
        Backend {
            root: Child::new("root", ChildRole::Filtered, root),
            write_through: Arc::new(AtomicBool::new(write_through)),
            in_flight: Arc::default(),
        }
    }

    /// The top node of the disk.
    pub fn root(&self) -> &Arc<Node> {
        self.root.node()
    }

    /// The length of the disk in bytes.
    pub fn length(&self) -> u64 {
        self.root.length()
    }

    /// Whether every write is made durable before it is done.
    pub fn is_write_through(&self) -> bool {
        self.write_through.load(Ordering::Acquire)
    }

    fn check(&self, offset: u64, bytes: u64, op: Op) -> Result<()> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.length() => Ok(()),
            _ => Err(BlockError::from_errno(libc::EIO)
                .during(op)
                .on_node(self.root.name())
                .at(offset)),
        }
    }

    fn check_len(&self, offset: u64, bytes: u64, op: Op) -> Result<()> {
        if bytes > MAX_REQUEST_BYTES {
            return Err(BlockError::from_errno(libc::EIO)
                .during(op)
                .on_node(self.root.name())
                .at(offset));
        }
        self.check(offset, bytes, op)
    }

    fn write_flags(&self, flags: WriteFlags) -> WriteFlags {
        if self.is_write_through() {
            flags | WriteFlags::FUA
        } else {
            flags
        }
    }

    /// Reads `buf.len()` bytes at `offset` and gives the buffer back. Bytes that are at hand are read on the spot, without a wait.
    ///
    /// # Errors
    /// `Io` for a range past the end; the drivers'.
    pub async fn preadv(
        &self,
        offset: u64,
        mut buf: IoBufMut,
        flags: ReadFlags,
    ) -> Result<IoBufMut> {
        self.check_len(offset, buf.len() as u64, Op::Read)?;
        if let Some(slice) = buf.as_mut_slice()
            && self.root.read_nowait(offset, slice)
        {
            // A cached read never waits; without this, a busy loop of them would starve every other task of the thread.
            tokio::task::consume_budget().await;
            return Ok(buf);
        }
        let _in_flight = self.in_flight.enter();
        self.root.preadv(offset, buf, flags).await
    }

    /// Reads `bytes` bytes at `offset` to a new buffer.
    ///
    /// # Errors
    /// As [`preadv`](Backend::preadv).
    pub async fn read(&self, offset: u64, bytes: usize) -> Result<IoBufMut> {
        self.check_len(offset, bytes as u64, Op::Read)?;
        self.preadv(offset, IoBufMut::zeroed(bytes), ReadFlags::empty())
            .await
    }

    /// Reads into the caller's memory if that needs no wait; `false`: use [`preadv`](Backend::preadv).
    pub fn read_nowait(&self, offset: u64, buf: &mut [u8]) -> bool {
        self.root.read_nowait(offset, buf)
    }

    /// Writes `buf` at `offset`.
    ///
    /// # Errors
    /// `Io` for a range past the end; `ReadOnly`; the drivers'.
    pub async fn pwritev(&self, offset: u64, buf: IoBuf, flags: WriteFlags) -> Result<()> {
        self.check_len(offset, buf.len() as u64, Op::Write)?;
        let _in_flight = self.in_flight.enter();
        self.root
            .pwritev(offset, buf, self.write_flags(flags))
            .await
    }

    /// Writes data that is to be stored compressed.
    ///
    /// # Errors
    /// `Unsupported` where the format can't; as [`pwritev`](Backend::pwritev).
    pub async fn pwritev_compressed(&self, offset: u64, buf: IoBuf) -> Result<()> {
        self.check_len(offset, buf.len() as u64, Op::Write)?;
        let _in_flight = self.in_flight.enter();
        self.root.pwritev_compressed(offset, buf).await
    }

    /// Makes a range read as zero.
    ///
    /// # Errors
    /// `Io` for a range past the end; `ReadOnly`; `Unsupported` for a `NO_FALLBACK` that would have to write; the drivers'.
    pub async fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> Result<()> {
        self.check(offset, bytes, Op::WriteZeroes)?;
        let _in_flight = self.in_flight.enter();
        self.root
            .pwrite_zeroes(offset, bytes, self.write_flags(flags))
            .await
    }

    /// Says that what a range holds is no longer needed.
    ///
    /// # Errors
    /// `Io` for a range past the end; `ReadOnly`; the drivers'.
    pub async fn pdiscard(&self, offset: u64, bytes: u64) -> Result<()> {
        self.check(offset, bytes, Op::Discard)?;
        let _in_flight = self.in_flight.enter();
        self.root.pdiscard(offset, bytes).await
    }

    /// Makes every completed write durable.
    ///
    /// # Errors
    /// The drivers'.
    pub async fn flush(&self) -> Result<()> {
        let _in_flight = self.in_flight.enter();
        self.root.flush().await
    }

    /// Changes the length of the disk.
    ///
    /// # Errors
    /// `ReadOnly`, `Unsupported`, the drivers'.
    pub async fn truncate(&self, request: TruncateRequest) -> Result<()> {
        let _in_flight = self.in_flight.enter();
        self.root.truncate(request).await
    }

    /// What a range holds, in the top layer alone.
    ///
    /// # Errors
    /// The drivers'.
    pub async fn block_status(
        &self,
        offset: u64,
        bytes: u64,
        mode: StatusMode,
    ) -> Result<BlockStatus> {
        let _in_flight = self.in_flight.enter();
        self.root.block_status(offset, bytes, mode).await
    }

    /// What a range holds, as the whole chain has it.
    ///
    /// # Errors
    /// The drivers'.
    pub async fn chain_status(
        &self,
        offset: u64,
        bytes: u64,
        mode: StatusMode,
    ) -> Result<ChainStatus> {
        let _in_flight = self.in_flight.enter();
        chain_status(self.root.node(), None, offset, bytes, mode).await
    }

    /// Reads the VM state area.
    ///
    /// # Errors
    /// As [`Node::load_vmstate`].
    pub async fn load_vmstate(&self, offset: u64, buf: IoBufMut) -> Result<IoBufMut> {
        let _in_flight = self.in_flight.enter();
        self.root.load_vmstate(offset, buf).await
    }

    /// Writes the VM state area.
    ///
    /// # Errors
    /// As [`Node::save_vmstate`].
    pub async fn save_vmstate(&self, offset: u64, buf: IoBuf) -> Result<()> {
        let _in_flight = self.in_flight.enter();
        self.root.save_vmstate(offset, buf).await?;
        match self.is_write_through() {
            true => self.root.flush().await,
            false => Ok(()),
        }
    }

    /// Waits until no request of this backend is in flight. New ones may start at once; it is the caller who keeps them away.
    pub async fn drain(&self) {
        self.in_flight.wait_idle().await;
    }

    /// Changes mode and options of the root node, and with them the mode of the nodes below it that belong to it. Waits for requests in flight
    /// first; the caller starts none meanwhile. If the future is dropped after that, the nodes are changed all the same, and what is asked for next waits
    /// for it: closing, draining, another reopening.
    ///
    /// # Errors
    /// Options that can't be changed; the drivers'. Then nothing has changed on the node that refused; nodes that were changed before it are
    /// changed back.
    pub async fn reopen(
        &self,
        flags: NodeFlags,
        write_through: bool,
        options: Options,
    ) -> Result<()> {
        self.drain().await;
        if !self.root.is_read_only() {
            self.root.flush().await?;
        }
        let in_flight = self.in_flight.enter_owned();
        let (root, mode) = (self.root.node().clone(), self.write_through.clone());
        // INV REQ-DROP-1: nobody is left with some nodes in one mode and some in the other.
        let task = tokio::spawn(async move {
            let _in_flight = in_flight;
            reopen_all(&root, flags, options).await?;
            mode.store(write_through, Ordering::Release);
            Ok(())
        });
        let cancelled = |_| Err(BlockError::from_errno(libc::ECANCELED).during(Op::Reopen));
        task.await.unwrap_or_else(cancelled)
    }

    /// Waits for requests in flight, flushes, and closes the chain.
    ///
    /// # Errors
    /// The first error met; everything is closed all the same.
    pub async fn close(&self) -> Result<()> {
        self.drain().await;
        let flushed = if self.root.is_read_only() {
            Ok(())
        } else {
            self.root.flush().await
        };
        let closed = self.root.close().await;
        match flushed {
            // That the image is corrupt has been said when it was found; closing it is no second failure.
            Err(e) if e.kind() == ErrorKind::Corrupt => closed,
            flushed => flushed.and(closed),
        }
    }
}

/// What takes a change of options back: the values from before, `null` where there was none.
fn undo(node: &Node, change: &Options) -> Options {
    let before = node.options();
    let mut undo = Options::new();
    for (key, _) in change.iter() {
        match before.get(key) {
            Some(value) => undo.set(key, value.clone()),
            None if crate::node::NO_OPTION.contains(&key) => {}
            None => undo.set(key, crate::OptionValue::Null),
        }
    }
    undo
}

/// Reopens a node and what belongs to it, or nothing.
async fn reopen_all(root: &Arc<Node>, flags: NodeFlags, options: Options) -> Result<()> {
    let mut done = Vec::new();
    let result = reopen_down(root, flags, options, &mut done).await;
    if result.is_err() {
        for (node, flags, options) in done.into_iter().rev() {
            node.reopen(flags, options).await?;
        }
    }
    result
}

/// Reopens a node after its own storage when that becomes writable, before it when it becomes read-only: a format never is writable over a
/// file that is not. Backing nodes keep their mode but for the cache.
async fn reopen_down(
    node: &Arc<Node>,
    flags: NodeFlags,
    mut options: Options,
    done: &mut Vec<(Arc<Node>, NodeFlags, Options)>,
) -> Result<()> {
    let own: Vec<(Arc<Node>, bool, Options)> = node
        .driver()
        .children()
        .into_iter()
        .map(|c| {
            (
                c.node().clone(),
                c.role() == ChildRole::Backing,
                options.take_subtree(c.name()),
            )
        })
        .collect();
    if flags.read_only {
        let (old, undo) = (node.flags(), undo(node, &options));
        node.reopen(flags, std::mem::take(&mut options)).await?;
        done.push((node.clone(), old, undo));
    }
    for (child, is_backing, child_options) in own {
        let read_only = if is_backing {
            child.is_read_only()
        } else {
            flags.read_only
        };
        Box::pin(reopen_down(
            &child,
            NodeFlags { read_only, ..flags },
            child_options,
            done,
        ))
        .await?;
    }
    if !flags.read_only {
        let (old, undo) = (node.flags(), undo(node, &options));
        node.reopen(flags, options).await?;
        done.push((node.clone(), old, undo));
    }
    Ok(())
}
