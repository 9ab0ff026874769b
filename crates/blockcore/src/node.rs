// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`Node`]: one driver in the graph, with what the block layer keeps about it. `QEMU: BlockDriverState`.
//!
//! The request path over it is in `request` (reads, writes), `zeroes` (zero writes, discards) and `walk` (block status). This file has
//! the state: name, limits, length, mode, what is in flight, and closing.
//!
//! Lock order: none of the locks here is held across an await, and none is taken while another is held.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

use futures::future::BoxFuture;

use crate::backend::InFlight;
use crate::child::Child;
use crate::debug::DebugEvent;
use crate::dirty_bitmap::DirtyBitmaps;
use crate::driver::{BlockDriver, ReopenRequest, TruncateRequest};
use crate::error::{BlockError, ErrorKind, Op, Result};
use crate::limits::{BlockLimits, MAX_LENGTH_BYTES};
use crate::options::{OptionValue, Options};
use crate::orphan::Orphans;
use crate::tracked::TrackedRequests;

/// The size of a sector in bytes. Lengths of nodes are multiples of it, as in QEMU.
pub const SECTOR_BYTES: u64 = 512;

/// How a node was opened; what its children inherit, and `reopen` may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeFlags {
    /// Nothing may be written.
    pub read_only: bool,
    /// The host's page cache is bypassed (`cache.direct`).
    pub direct: bool,
    /// `flush` doesn't reach the disk (`cache.no-flush`): after a crash of the host anything may be lost.
    pub no_flush: bool,
    /// Discards are passed on (`discard=unmap`).
    pub unmap: bool,
    /// No locks are taken, and none are respected.
    pub force_share: bool,
}

impl Default for NodeFlags {
    fn default() -> NodeFlags {
        NodeFlags {
            read_only: false,
            direct: false,
            no_flush: false,
            unmap: true,
            force_share: false,
        }
    }
}

/// One driver in the graph.
pub struct Node {
    name: String,
    filename: String,
    options: RwLock<Options>,
    driver: Box<dyn BlockDriver>,
    limits: RwLock<BlockLimits>,
    /// A copy out of `limits`, for the request path.
    pub(crate) request_alignment: AtomicU32,
    /// In bytes, a multiple of a sector.
    length: AtomicU64,
    length_doubts: Doubts,
    read_only: AtomicBool,
    direct: AtomicBool,
    no_flush: AtomicBool,
    unmap: AtomicBool,
    debug_events: bool,
    pub(crate) tracked: TrackedRequests,
    /// Those of the tracked requests that go on when their future is dropped: changes of length, and of the whole node.
    pub(crate) changes: TrackedRequests,
    /// Those of these whose future was dropped: later reads and flushes wait for them.
    pub(crate) orphans: Orphans,
    pub(crate) bitmaps: Arc<DirtyBitmaps>,
    /// How many of them there are, for closing.
    pub(crate) tasks: Arc<InFlight>,
    /// Counts changes that are done, given up or failed. Two flushes without a step in between are one.
    write_generation: AtomicU64,
    flushed_generation: AtomicU64,
    /// How many parents (children of other nodes, backends) hold the node open.
    users: AtomicUsize,
}

/// Keys that say what the node is, and are none of its driver's options.
pub(crate) const NO_OPTION: [&str; 2] = ["driver", "node-name"];

static NEXT_NODE_NUMBER: AtomicU64 = AtomicU64::new(100);

/// What a node is made from.
#[derive(Debug, Default)]
pub struct NodeConfig {
    /// The name; `None`: one is made up (`#block123`).
    pub name: Option<String>,
    /// The file name it was opened by, for messages; may be empty.
    pub filename: String,
    /// The driver's own options as given, without the parts that went to children.
    pub options: Options,
    /// Mode.
    pub flags: NodeFlags,
}

impl Node {
    /// Puts a driver into a node, and asks it for its limits and length.
    ///
    /// # Errors
    /// The driver's, or `InvalidImage` for a length that is out of bounds.
    pub async fn new(driver: Box<dyn BlockDriver>, config: NodeConfig) -> Result<Arc<Node>> {
        let number = NEXT_NODE_NUMBER.fetch_add(1, Ordering::Relaxed);
        let f = config.flags;
        let debug_events = driver.wants_debug_events();
        let bitmaps = driver.dirty_bitmaps().unwrap_or_default();
        let node = Node {
            name: config.name.unwrap_or_else(|| format!("#block{number}")),
            filename: config.filename,
            options: RwLock::new(config.options),
            driver,
            limits: RwLock::default(),
            request_alignment: AtomicU32::new(1),
            length: AtomicU64::new(0),
            length_doubts: Doubts::default(),
            read_only: AtomicBool::new(f.read_only),
            direct: AtomicBool::new(f.direct),
            no_flush: AtomicBool::new(f.no_flush),
            unmap: AtomicBool::new(f.unmap),
            debug_events,
            tracked: TrackedRequests::default(),
            changes: TrackedRequests::default(),
            orphans: Orphans::default(),
            bitmaps,
            tasks: Arc::default(),
            write_generation: AtomicU64::new(0),
            flushed_generation: AtomicU64::new(0),
            users: AtomicUsize::new(0),
        };
        node.refresh_limits();
        node.refresh_length().await?;
        Ok(Arc::new(node))
    }

    /// The node's name: given, or `#block` and a number.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file name the node was opened by; empty where there is none.
    pub fn filename(&self) -> &str {
        &self.filename
    }

    /// The driver's own options as given at open and changed since by `reopen`.
    pub fn options(&self) -> Options {
        self.options
            .read()
            .expect("no code panics while it holds this lock")
            .clone()
    }

    /// The driver, for questions that are no requests (`info`, `children` ...). Requests go through the node.
    pub fn driver(&self) -> &dyn BlockDriver {
        &*self.driver
    }

    /// The driver's name.
    pub fn format_name(&self) -> &'static str {
        self.driver.format_name()
    }

    /// The length in bytes, a multiple of [`SECTOR_BYTES`].
    pub fn length(&self) -> u64 {
        self.length.load(Ordering::Acquire)
    }

    /// Whether nothing may be written.
    pub fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Acquire)
    }

    /// Mode.
    pub fn flags(&self) -> NodeFlags {
        NodeFlags {
            read_only: self.is_read_only(),
            direct: self.direct.load(Ordering::Acquire),
            no_flush: self.no_flush.load(Ordering::Acquire),
            unmap: self.unmap.load(Ordering::Acquire),
            force_share: false,
        }
    }

    /// Sizes and alignments that the driver wants.
    pub fn limits(&self) -> BlockLimits {
        *self
            .limits
            .read()
            .expect("no code panics while it holds this lock")
    }

    /// The backing child, also through filters.
    pub fn backing(&self) -> Option<&Child> {
        self.driver.backing()
    }

    fn refresh_limits(&self) {
        let limits = self.driver.limits();
        limits.assert_valid();
        self.request_alignment
            .store(limits.request_alignment, Ordering::Release);
        *self
            .limits
            .write()
            .expect("no code panics while it holds this lock") = limits;
    }

    /// Asks the driver for the length again: somebody else may have changed the file.
    ///
    /// # Errors
    /// The driver's, or `InvalidImage` for a length that is out of bounds.
    pub async fn refresh_length(&self) -> Result<u64> {
        let doubt = self.length_doubts.raised();
        let bytes = self
            .driver
            .length()
            .await
            .map_err(|e| e.during(Op::Length).on_node(&self.name))?;
        if bytes > MAX_LENGTH_BYTES {
            return Err(BlockError::from_errno(libc::EFBIG)
                .context(format!("Image of {bytes} bytes is too long")));
        }
        let bytes = bytes.next_multiple_of(SECTOR_BYTES);
        let _settling = self.length_doubts.settle(doubt);
        self.length.store(bytes, Ordering::Release);
        Ok(bytes)
    }

    /// As [`length`](Node::length), after changes that reached past the end and failed, or were given up: parts of them may be there.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) async fn known_length(&self) -> Result<u64> {
        let doubt = self.length_doubts.raised();
        if self.length_doubts.is_open(doubt) {
            let bytes = self.driver.length().await?;
            let settling = self.length_doubts.settle(doubt);
            // Somebody else may have looked since, and the node may have become shorter.
            if settling.is_first {
                self.grow_length(bytes);
            }
        }
        Ok(self.length())
    }

    /// Begins a change up to `end`. Unless [`Growing::done`] is told, nobody knows how far it got.
    pub(crate) fn growing_to(&self, end: u64) -> Growing<'_> {
        Growing {
            node: self,
            end,
            is_known: end <= self.length(),
        }
    }

    fn grow_length(&self, end: u64) {
        self.length
            .fetch_max(end.next_multiple_of(SECTOR_BYTES), Ordering::AcqRel);
    }

    pub(crate) fn mark_written(&self) {
        self.write_generation.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn check_writable(&self, op: Op) -> Result<()> {
        if self.is_read_only() {
            let err = BlockError::new(ErrorKind::ReadOnly, "Block node is read-only")
                .errno_is(libc::EPERM);
            return Err(err.during(op).on_node(&self.name));
        }
        Ok(())
    }

    /// Whether somebody listens to [`debug_event`](Node::debug_event).
    pub fn wants_debug_events(&self) -> bool {
        self.debug_events
    }

    /// Says that a parent is about to do something to this node, to whoever injects faults there or stops requests.
    #[inline]
    pub async fn debug_event(&self, event: DebugEvent) {
        if self.debug_events {
            self.driver.debug_event(event).await;
        }
    }

    /// Makes every completed write durable, with all that makes it reachable.
    ///
    /// # Errors
    /// The driver's; nothing is known then about what is durable.
    pub async fn flush(&self) -> Result<()> {
        self.settle_orphans(0, u64::MAX).await;
        self.flush_now().await
    }

    /// As [`flush`](Node::flush), and never skipped: makes durable what others have written before the node was opened, or behind its back. A format that goes by
    /// what it has read there can only rely on it afterwards: whoever wrote it may have been killed before he came to flush.
    ///
    /// # Errors
    /// As [`flush`](Node::flush).
    pub async fn flush_unseen(&self) -> Result<()> {
        self.mark_all_written();
        self.flush().await
    }

    fn mark_all_written(&self) {
        self.mark_written();
        for child in self.driver.children() {
            child.node().mark_all_written();
        }
    }

    /// As [`flush`](Node::flush), for a request that is in flight itself: it waits for no other, since those may wait for it.
    pub(crate) async fn flush_now(&self) -> Result<()> {
        if !self.driver.is_protocol() {
            // A format knows itself what it has to write, and its child below knows whether anything was.
            if let Some(child) = self.driver.primary() {
                child.debug_event(DebugEvent::FlushToOs).await;
            }
            return self
                .driver
                .flush()
                .await
                .map_err(|e| e.during(Op::Flush).on_node(&self.name));
        }
        if self.no_flush.load(Ordering::Acquire) {
            return Ok(());
        }
        // INV REQ-GEN-1: read before the flush begins, so that what is written while it runs counts for the next one.
        let generation = self.write_generation.load(Ordering::Acquire);
        if self.flushed_generation.load(Ordering::Acquire) == generation {
            return Ok(());
        }
        self.driver
            .flush()
            .await
            .map_err(|e| e.during(Op::Flush).on_node(&self.name))?;
        self.flushed_generation
            .fetch_max(generation, Ordering::AcqRel);
        Ok(())
    }

    /// Changes the length. What is new reads as zero, or as the backing node where that is longer.
    ///
    /// Runs to its end even if the future is dropped: the length that the node knows and the one that the driver has never part (INV REQ-DROP-1).
    ///
    /// # Errors
    /// `ReadOnly`, the driver's, or `InvalidArgument` for a length out of bounds.
    pub async fn truncate(self: &Arc<Self>, request: TruncateRequest) -> Result<()> {
        self.check_writable(Op::Truncate)?;
        if request.bytes > MAX_LENGTH_BYTES {
            let text = format!(
                "offset({}) exceeds maximum({MAX_LENGTH_BYTES})",
                request.bytes
            );
            return Err(BlockError::from_errno(libc::EFBIG).message(text));
        }
        let from = self.length().min(request.bytes);
        self.set_length(from, move |_| Some(request)).await
    }

    /// Makes the node at least `bytes` long. Never makes it shorter, whatever is written to it meanwhile. Runs to its end even if the future is dropped.
    ///
    /// # Errors
    /// As [`truncate`](Node::truncate).
    pub async fn extend(self: &Arc<Self>, bytes: u64) -> Result<()> {
        self.check_writable(Op::Truncate)?;
        let old = self.length();
        if old >= bytes {
            return Ok(());
        }
        // Looked at again: what was in flight past the old end has made the node longer, and must not be cut off.
        let still_short = move |length| (length < bytes).then(|| TruncateRequest::to(bytes));
        self.set_length(old, still_short).await
    }

    /// Makes the storage reach to the end of its last sector, which counts as being there. Runs to its end even if the future is dropped.
    ///
    /// # Errors
    /// As [`truncate`](Node::truncate).
    pub async fn fill_last_sector(self: &Arc<Self>) -> Result<()> {
        self.check_writable(Op::Truncate)?;
        if self.driver.length().await?.is_multiple_of(SECTOR_BYTES) {
            return Ok(());
        }
        // What is in flight there comes first.
        let last = self.length().saturating_sub(SECTOR_BYTES);
        let all = |length| Some(TruncateRequest::to(length));
        self.set_length(last, all).await
    }

    /// Changes the length as `request` wants, which is told the length when nothing behind `from` is in flight any more.
    async fn set_length(
        self: &Arc<Self>,
        from: u64,
        request: impl FnOnce(u64) -> Option<TruncateRequest> + Send + 'static,
    ) -> Result<()> {
        let change = async move |node: Arc<Node>| {
            let Some(request) = request(node.known_length().await?) else {
                return Ok(());
            };
            let result = async {
                if request.bytes != node.length() {
                    node.check_bitmaps_resizable()?;
                    node.outdate_copies().await?;
                }
                node.driver.truncate(request).await
            };
            let result = result.await;
            node.mark_written();
            let refreshed = node.refresh_length().await;
            node.bitmaps.set_length(node.length());
            result.and(refreshed.map(|_| ()))
        };
        self.change_behind(from, Op::Truncate, change).await
    }

    /// Changes something that concerns all of the node behind `from`, when nothing there is in flight any more. Runs to its end even if the future is dropped;
    /// whatever is asked for later waits for it (INV REQ-DROP-1).
    pub(crate) async fn change_behind<T, F>(
        self: &Arc<Self>,
        from: u64,
        op: Op,
        change: impl FnOnce(Arc<Node>) -> F,
    ) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        // Serialising: nothing may write to what appears or goes while it does.
        let tracked = self.tracked.enter(from, u64::MAX, true);
        let listed = self.changes.enter(from, u64::MAX, false);
        let (done, _unless_dropped) = self.orphans.watch();
        let in_flight = self.tasks.enter_owned();
        let node = self.clone();
        let change = change(self.clone());
        let task = tokio::spawn(async move {
            let _in_flight = in_flight;
            let _done = done;
            tracked.turn().await;
            // Looked at again: a reopening that was dropped has had its turn first, perhaps.
            let may_change = match op {
                Op::Check | Op::Reopen => Ok(()),
                _ => node.check_writable(op),
            };
            let result = match may_change {
                Ok(()) => change.await,
                Err(e) => Err(e),
            };
            drop((tracked, listed));
            result.map_err(|e| e.during(op).on_node(&node.name))
        });
        let cancelled = |_| Err(BlockError::from_errno(libc::ECANCELED).during(op));
        task.await.unwrap_or_else(cancelled)
    }

    /// Changes mode and options of this node. The caller has seen to it that nothing is in flight.
    pub(crate) async fn reopen(self: &Arc<Self>, flags: NodeFlags, options: Options) -> Result<()> {
        // INV REQ-DROP-1: a driver has things to write before it is read-only, and what is written later is none of it.
        let reopen = async move |node: Arc<Node>| node.reopen_alone(flags, options).await;
        self.change_behind(0, Op::Reopen, reopen).await
    }

    async fn reopen_alone(&self, flags: NodeFlags, options: Options) -> Result<()> {
        let before = self.options();
        let mut request = ReopenRequest {
            read_only: flags.read_only,
            direct: flags.direct,
            options: options.clone(),
        };
        let prepared = self.driver.reopen_prepare(&mut request).await?;
        let changed = |(key, value): &(&str, &OptionValue)| match *key {
            "driver" => value.to_string() != self.format_name(),
            "node-name" => value.to_string() != self.name,
            key => before.get_str(key) != Some(value.to_string()),
        };
        // Saying what holds already is no change.
        if let Some((key, _)) = request.options.iter().find(changed) {
            return Err(BlockError::invalid(format!(
                "Cannot change the option '{key}'"
            )));
        }
        prepared.commit();
        self.read_only.store(flags.read_only, Ordering::Release);
        self.direct.store(flags.direct, Ordering::Release);
        self.no_flush.store(flags.no_flush, Ordering::Release);
        self.unmap.store(flags.unmap, Ordering::Release);
        self.refresh_limits();
        if options.iter().next().is_some() {
            self.remember_options(&options);
            self.refresh_length().await?;
        }
        Ok(())
    }

    /// `null` takes an option back.
    fn remember_options(&self, changed: &Options) {
        let mut options = self
            .options
            .write()
            .expect("no code panics while it holds this lock");
        for (key, value) in changed.iter().filter(|(key, _)| !NO_OPTION.contains(key)) {
            match value {
                OptionValue::Null => drop(options.take_str(key)),
                value => options.set(key, value.clone()),
            }
        }
    }

    pub(crate) fn add_user(&self) {
        self.users.fetch_add(1, Ordering::AcqRel);
    }

    /// One parent less. The last one closes the driver, and then the children.
    ///
    /// # Errors
    /// The first error of the driver or of a child; everything is closed all the same.
    pub(crate) fn release(self: Arc<Node>) -> BoxFuture<'static, Result<()>> {
        Box::pin(async move {
            if self.users.fetch_sub(1, Ordering::AcqRel) != 1 {
                return Ok(());
            }
            self.tasks.wait_idle().await;
            let mut result = self
                .driver
                .close()
                .await
                .map_err(|e| e.during(Op::Close).on_node(&self.name));
            for child in self.driver.children() {
                result = result.and(child.close().await);
            }
            result
        })
    }
}

/// How often the length was in doubt, and how often of these it was looked at since.
#[derive(Debug, Default)]
struct Doubts {
    raised: AtomicU64,
    settled: AtomicU64,
    /// Held while the answer is taken over, so that an older one comes before a newer one or not at all.
    settling: Mutex<()>,
}

/// The answer to a doubt can be taken over.
struct Settling<'a> {
    /// Nobody has answered it before.
    is_first: bool,
    _held: MutexGuard<'a, ()>,
}

impl Doubts {
    fn raised(&self) -> u64 {
        self.raised.load(Ordering::Acquire)
    }

    fn is_open(&self, doubt: u64) -> bool {
        doubt > self.settled.load(Ordering::Acquire)
    }

    fn settle(&self, doubt: u64) -> Settling<'_> {
        let held = self
            .settling
            .lock()
            .expect("no code panics while it holds this lock");
        let before = self.settled.fetch_max(doubt, Ordering::AcqRel);
        Settling {
            is_first: doubt > before,
            _held: held,
        }
    }
}

/// A change that may reach past the end.
pub(crate) struct Growing<'a> {
    node: &'a Node,
    end: u64,
    is_known: bool,
}

impl Growing<'_> {
    /// It has worked.
    pub(crate) fn done(mut self) {
        self.node.grow_length(self.end);
        self.is_known = true;
    }
}

impl Drop for Growing<'_> {
    fn drop(&mut self) {
        if !self.is_known {
            self.node
                .length_doubts
                .raised
                .fetch_add(1, Ordering::AcqRel);
        }
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Node({} {} {:?})",
            self.name,
            self.driver.format_name(),
            self.filename
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::{IoBuf, IoBufMut};
    use crate::driver::{ReadFlags, WriteFlags};
    use crate::status::StatusMode;
    use crate::testing::fault::{Event, Faults, Rule};
    use crate::testing::{CrashDriver, FaultDriver, MemoryDriver};
    use futures::FutureExt;

    // INV REQ-GEN-1: a flush is skipped only if nothing was written since the last one; a write that was given up counts, too.
    #[tokio::test]
    async fn a_flush_is_skipped_only_when_nothing_was_written() {
        let disk = CrashDriver::new(vec![0; 4096]);
        let node = disk.clone().into_node(NodeFlags::default()).await.unwrap();
        let flushes = || (0..disk.log_len()).filter(|&at| disk.is_flush(at)).count();
        let write = || node.pwritev(0, IoBuf::from(vec![1; 512]), WriteFlags::empty());
        node.flush().await.unwrap();
        assert_eq!(flushes(), 0, "nothing was ever written");
        write().await.unwrap();
        node.flush().await.unwrap();
        node.flush().await.unwrap();
        assert_eq!(flushes(), 1, "the second had nothing to do");
        let mut dropped = Box::pin(write());
        assert!(dropped.as_mut().now_or_never().is_none());
        drop(dropped);
        node.flush().await.unwrap();
        assert_eq!(flushes(), 2, "nobody knows what the dropped write has done");
    }

    // What part of a failed write is there is there at once, and not only when the image is opened again.
    #[tokio::test]
    async fn a_write_that_failed_past_the_end_is_seen_as_far_as_it_got() {
        for is_zero_write in [false, true] {
            let driver = FaultDriver::new(Box::new(MemoryDriver::new(vec![0; 4096])));
            let faults = driver.faults();
            let node = driver.into_node(NodeFlags::default()).await.unwrap();
            faults.add(Rule::tear_all(libc::EIO));
            let none = WriteFlags::empty();
            match is_zero_write {
                true => node.pwrite_zeroes(4096, 4096, none).await.unwrap_err(),
                false => {
                    let write = node.pwritev(4096, IoBuf::from(vec![7; 4096]), none);
                    write.await.unwrap_err()
                }
            };
            faults.clear();
            let status = node.block_status(4096, 4096, StatusMode::Precise).await;
            let there = status.unwrap().bytes;
            let read = node.preadv(4096, IoBufMut::zeroed(4096), ReadFlags::empty());
            let read = read.await.unwrap().to_vec();
            let (expected, bytes) = if is_zero_write { (0, 0) } else { (7, 2048) };
            assert_eq!(there, bytes);
            assert_eq!((read[0], read[2048]), (expected, 0));
            assert_eq!(node.length(), 4096 + bytes);
        }
    }

    // Who asks for the length while the disk becomes shorter may get the old one, which is none of the node's any more.
    #[tokio::test]
    async fn an_old_answer_makes_no_node_longer_that_has_become_shorter() {
        let driver = FaultDriver::new(Box::new(MemoryDriver::new(vec![0; 4096])));
        let faults = driver.faults();
        let node = driver.into_node(NodeFlags::default()).await.unwrap();
        faults.add(Rule::fail_all(libc::EIO));
        let write = node.pwritev(4096, IoBuf::from(vec![7; 4096]), WriteFlags::empty());
        write.await.unwrap_err();
        faults.clear();
        // The driver has answered this one, and it is not its turn yet.
        faults.add(Rule::slow(Event::Length, 100).only(0));
        let mut read = Box::pin(node.preadv(0, IoBufMut::zeroed(512), ReadFlags::empty()));
        assert!(read.as_mut().now_or_never().is_none());
        node.truncate(TruncateRequest::to(1024)).await.unwrap();
        read.await.unwrap();
        assert_eq!(node.length(), 1024);
    }

    // What is asked for while a reopening waits for its turn finds the node as the reopening has left it.
    #[tokio::test]
    async fn a_growth_that_waits_for_a_reopening_looks_at_the_mode_again() {
        let driver = FaultDriver::new(Box::new(MemoryDriver::new(vec![0; 4096])));
        driver.faults().add(Rule::slow(Event::Write, 100));
        let node = driver.into_node(NodeFlags::default()).await.unwrap();
        let mut write = Box::pin(node.pwritev(0, IoBuf::from(vec![1; 512]), WriteFlags::empty()));
        assert!(write.as_mut().now_or_never().is_none());
        let read_only = NodeFlags {
            read_only: true,
            ..NodeFlags::default()
        };
        let mut reopening = Box::pin(node.reopen(read_only, Options::new()));
        assert!(reopening.as_mut().now_or_never().is_none());
        let growth = node.truncate(TruncateRequest::to(8192));
        let (written, reopened, grown) = futures::join!(write, reopening, growth);
        written.and(reopened).unwrap();
        assert_eq!(grown.unwrap_err().kind(), ErrorKind::ReadOnly);
        assert_eq!(node.length(), 4096);
    }

    /// A node over a disk whose changes of length take their time, and the faults of the disk.
    async fn node_that_grows_slowly() -> (Arc<Node>, Faults) {
        let driver = FaultDriver::new(Box::new(MemoryDriver::new(vec![0; 4096])));
        let faults = driver.faults();
        faults.add(Rule::slow(Event::Truncate, 1000));
        let node = driver.into_node(NodeFlags::default()).await.unwrap();
        (node, faults)
    }

    /// Begins to make the node longer, and gives that up.
    async fn give_up_a_growth(node: &Arc<Node>) {
        let mut growth = Box::pin(node.truncate(TruncateRequest::to(8192)));
        assert!(growth.as_mut().now_or_never().is_none());
        tokio::task::yield_now().await;
        drop(growth);
        assert!(node.orphans.any(), "it goes on");
    }

    // INV REQ-DROP-1: who makes a write durable waits for no change that comes after the write, and so not for himself.
    #[tokio::test(start_paused = true)]
    async fn a_durable_write_is_not_held_up_by_a_change_of_length_that_was_given_up() {
        let (node, _faults) = node_that_grows_slowly().await;
        give_up_a_growth(&node).await;
        let write = node.pwritev(0, IoBuf::from(vec![1; 512]), WriteFlags::FUA);
        let done = tokio::time::timeout(std::time::Duration::from_secs(1), write).await;
        done.expect("the write waits for itself").unwrap();
    }

    // INV REQ-PARK-1: a flush waits for changes that were given up, and not for others, which may never be polled again.
    #[tokio::test(start_paused = true)]
    async fn a_flush_that_waits_for_what_was_given_up_waits_for_nothing_else() {
        let (node, faults) = node_that_grows_slowly().await;
        faults.add(Rule::slow(Event::Write, 1));
        let mut parked = Box::pin(node.pwritev(0, IoBuf::from(vec![1; 512]), WriteFlags::empty()));
        assert!(parked.as_mut().now_or_never().is_none());
        give_up_a_growth(&node).await;
        let flush = tokio::time::timeout(std::time::Duration::from_secs(1), node.flush()).await;
        flush
            .expect("the flush waits for the parked write")
            .unwrap();
        assert_eq!(node.length(), 8192);
    }
}
