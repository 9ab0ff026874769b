// SPDX-License-Identifier: MIT OR Apache-2.0
//! `fault`: a driver over another one, which fails or slows down the requests that a test picks.
//!
//! # Fault model
//!
//! A [`Rule`] picks requests by kind, place, length and content, or by the named point ([`DebugEvent`]) that comes before them; of those that it picks it
//! lets the first ones pass, acts on the next, and lets the rest pass again, or acts on all. A request that fails has changed nothing, or, where a write is torn,
//! the first half of its sectors; a request that is slow
//! lets other tasks run, a given number of times, before it begins; one that hangs never ends. The first rule that acts on a request decides.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;

use crate::buffer::{IoBuf, IoBufMut};
use crate::debug::DebugEvent;
use crate::driver::{BlockDriver, ReadFlags, TruncateRequest, WriteFlags};
use crate::error::{BlockError, Result};
use crate::limits::BlockLimits;
use crate::node::{Node, NodeConfig, NodeFlags, SECTOR_BYTES};
use crate::status::{BlockStatus, StatusMode};

/// A kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// `preadv`.
    Read,
    /// `pwritev`.
    Write,
    /// `pwrite_zeroes`.
    WriteZeroes,
    /// `pdiscard`.
    Discard,
    /// `flush`.
    Flush,
    /// `truncate`.
    Truncate,
    /// `length`.
    Length,
}

/// What makes a rule look at a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trigger {
    /// Its kind.
    Event(Event),
    /// Nothing but that it comes.
    Any,
    /// That it comes next after this point was passed.
    Point(DebugEvent),
}

#[derive(Clone, Copy, Debug)]
enum Action {
    Fail(i32),
    Tear(i32),
    Slow(u32),
    Hang,
}

/// Which requests meet with what.
#[derive(Clone, Debug)]
pub struct Rule {
    trigger: Trigger,
    range: Range<u64>,
    min_bytes: u64,
    first_byte: Option<u8>,
    skip: u32,
    times: u32,
    action: Action,
}

impl Rule {
    fn new(trigger: Trigger, action: Action) -> Rule {
        Rule {
            trigger,
            range: 0..u64::MAX,
            min_bytes: 0,
            first_byte: None,
            skip: 0,
            times: u32::MAX,
            action,
        }
    }

    /// Every request of this kind fails with this errno.
    pub fn fail(event: Event, errno: i32) -> Rule {
        Rule::new(Trigger::Event(event), Action::Fail(errno))
    }

    /// Every request fails with this errno.
    pub fn fail_all(errno: i32) -> Rule {
        Rule::new(Trigger::Any, Action::Fail(errno))
    }

    /// Every request that comes next after this point was passed fails with this errno, whatever its kind.
    pub fn fail_after(point: DebugEvent, errno: i32) -> Rule {
        Rule::new(Trigger::Point(point), Action::Fail(errno))
    }

    /// Every request fails with this errno, and writes change the first half of their sectors before.
    pub fn tear_all(errno: i32) -> Rule {
        Rule::new(Trigger::Any, Action::Tear(errno))
    }

    /// Every request of this kind lets other tasks run so many times before it begins.
    pub fn slow(event: Event, yields: u32) -> Rule {
        Rule::new(Trigger::Event(event), Action::Slow(yields))
    }

    /// Every request never ends.
    pub fn hang() -> Rule {
        Rule::new(Trigger::Any, Action::Hang)
    }

    /// Only requests that touch these bytes.
    pub fn within(mut self, range: Range<u64>) -> Rule {
        self.range = range;
        self
    }

    /// Only requests of at least so many bytes.
    pub fn at_least(mut self, bytes: u64) -> Rule {
        self.min_bytes = bytes;
        self
    }

    /// Only writes whose first byte is this one.
    pub fn starting_with(mut self, byte: u8) -> Rule {
        self.first_byte = Some(byte);
        self
    }

    /// Only the one number `nth` of the requests, or the passings of a point, that match, counted from 0.
    pub fn only(mut self, nth: u32) -> Rule {
        (self.skip, self.times) = (nth, 1);
        self
    }

    /// None of the first `count` that match.
    pub fn not_before(mut self, count: u32) -> Rule {
        self.skip = count;
        self
    }

    fn matches(&self, request: &Request) -> bool {
        (self.trigger == Trigger::Any || self.trigger == Trigger::Event(request.event))
            && request.offset < self.range.end
            && self.range.start < request.offset.saturating_add(request.bytes.max(1))
            && request.bytes >= self.min_bytes
            && (self.first_byte.is_none() || self.first_byte == request.first_byte)
    }

    /// The rule is looked at once more: whether it acts now.
    fn acts(&mut self) -> bool {
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        let acts = self.times > 0;
        self.times = self.times.saturating_sub(u32::from(self.times != u32::MAX));
        acts
    }
}

/// A request as the rules see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The kind.
    pub event: Event,
    /// Byte offset; the new length for `truncate`; 0 where there is none.
    pub offset: u64,
    /// Bytes; 0 where there are none.
    pub bytes: u64,
    first_byte: Option<u8>,
}

#[derive(Debug, Default)]
struct State {
    rules: Vec<Rule>,
    /// What the next requests meet with, because of points that were passed.
    armed: VecDeque<Action>,
    passed: BTreeMap<DebugEvent, u32>,
    requests: u64,
    failed: Vec<Request>,
    hung: u32,
}

impl State {
    fn action(&mut self, request: &Request) -> Option<Action> {
        self.requests += 1;
        let armed = self.armed.pop_front();
        let found = armed.or_else(|| {
            let acts = |r: &mut Rule| (r.matches(request) && r.acts()).then_some(r.action);
            self.rules.iter_mut().find_map(acts)
        });
        match found {
            Some(Action::Fail(_) | Action::Tear(_)) => self.failed.push(*request),
            Some(Action::Hang) => self.hung += 1,
            Some(Action::Slow(_)) | None => {}
        }
        found
    }
}

/// The rules of a [`FaultDriver`], to be changed while it is in use, and what it has seen.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    state: Arc<Mutex<State>>,
}

impl Faults {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("no code panics while it holds this lock")
    }

    /// Adds a rule.
    pub fn add(&self, rule: Rule) {
        self.lock().rules.push(rule);
    }

    /// Takes all rules away.
    pub fn clear(&self) {
        let mut state = self.lock();
        state.rules.clear();
        state.armed.clear();
    }

    /// How many requests there were so far.
    pub fn requests(&self) -> u64 {
        self.lock().requests
    }

    /// How many times each point was passed.
    pub fn passed(&self) -> BTreeMap<DebugEvent, u32> {
        self.lock().passed.clone()
    }

    /// The requests that were made to fail.
    pub fn failed(&self) -> Vec<Request> {
        self.lock().failed.clone()
    }

    /// How many requests were made never to end.
    pub fn hung(&self) -> u32 {
        self.lock().hung
    }

    fn pass(&self, point: DebugEvent) {
        let mut state = self.lock();
        *state.passed.entry(point).or_default() += 1;
        let at_point = |r: &&mut Rule| r.trigger == Trigger::Point(point);
        let mut rules = state.rules.iter_mut().filter(at_point);
        let action = rules.find_map(|r| r.acts().then_some(r.action));
        state.armed.extend(action);
    }

    async fn meet(&self, event: Event, offset: u64, bytes: u64) -> Result<()> {
        self.act(Request {
            event,
            offset,
            bytes,
            first_byte: None,
        })
        .await
        .map_err(|met| met.error)
    }

    async fn act(&self, request: Request) -> Result<(), Met> {
        let action = self.lock().action(&request);
        let failed = |errno, is_torn| {
            let error = BlockError::from_errno(errno);
            Err(Met { error, is_torn })
        };
        match action {
            None => Ok(()),
            Some(Action::Fail(errno)) => failed(errno, false),
            Some(Action::Tear(errno)) => failed(errno, true),
            Some(Action::Hang) => std::future::pending().await,
            Some(Action::Slow(yields)) => {
                for _ in 0..yields {
                    tokio::task::yield_now().await;
                }
                Ok(())
            }
        }
    }
}

/// An error that a request met.
struct Met {
    error: BlockError,
    /// A part of a write was made before.
    is_torn: bool,
}

/// Another driver, with faults.
pub struct FaultDriver {
    inner: Box<dyn BlockDriver>,
    faults: Faults,
    request_alignment: u32,
    nowait: bool,
}

impl FaultDriver {
    /// Over `inner`, with no rule yet.
    pub fn new(inner: Box<dyn BlockDriver>) -> FaultDriver {
        FaultDriver::over(inner, Faults::default())
    }

    /// Over `inner`, with rules that others may share.
    pub fn over(inner: Box<dyn BlockDriver>, faults: Faults) -> FaultDriver {
        FaultDriver {
            inner,
            faults,
            request_alignment: 1,
            nowait: false,
        }
    }

    /// Reads that must not wait are served, where `inner` serves them, and meet no rules.
    pub fn with_nowait(mut self) -> FaultDriver {
        self.nowait = true;
        self
    }

    /// Requests have to be aligned to so many bytes, a power of two: what isn't becomes a read and a write.
    pub fn aligned_to(mut self, bytes: u32) -> FaultDriver {
        self.request_alignment = bytes;
        self
    }

    /// The rules.
    pub fn faults(&self) -> Faults {
        self.faults.clone()
    }

    /// A node over this driver.
    ///
    /// # Errors
    /// Those of the rules and the inner driver.
    pub async fn into_node(self, flags: NodeFlags) -> Result<Arc<Node>> {
        let config = NodeConfig {
            filename: "fault".to_owned(),
            flags,
            ..NodeConfig::default()
        };
        Node::new(Box::new(self), config).await
    }
}

#[async_trait]
impl BlockDriver for FaultDriver {
    fn format_name(&self) -> &'static str {
        "fault"
    }

    fn is_protocol(&self) -> bool {
        self.inner.is_protocol()
    }

    fn limits(&self) -> BlockLimits {
        let inner = self.inner.limits();
        BlockLimits {
            request_alignment: inner.request_alignment.max(self.request_alignment),
            pwrite_zeroes_alignment: inner.pwrite_zeroes_alignment.max(self.request_alignment),
            pdiscard_alignment: inner.pdiscard_alignment.max(self.request_alignment),
            ..inner
        }
    }

    fn wants_debug_events(&self) -> bool {
        true
    }

    async fn debug_event(&self, event: DebugEvent) {
        self.faults.pass(event);
    }

    fn grows_zeroed(&self) -> bool {
        self.inner.grows_zeroed()
    }

    async fn length(&self) -> Result<u64> {
        let length = self.inner.length().await;
        self.faults.meet(Event::Length, 0, 0).await?;
        length
    }

    fn read_nowait(&self, offset: u64, buf: &mut [u8]) -> bool {
        // Every read is to meet the rules, unless something else was asked for.
        self.nowait && self.inner.read_nowait(offset, buf)
    }

    async fn preadv(&self, offset: u64, buf: IoBufMut, flags: ReadFlags) -> Result<IoBufMut> {
        let bytes = buf.len() as u64;
        self.faults.meet(Event::Read, offset, bytes).await?;
        self.inner.preadv(offset, buf, flags).await
    }

    async fn pwritev(&self, offset: u64, buf: IoBuf, flags: WriteFlags) -> Result<()> {
        let request = Request {
            event: Event::Write,
            offset,
            bytes: buf.len() as u64,
            first_byte: buf.slice(..1).to_vec().first().copied(),
        };
        let Err(met) = self.faults.act(request).await else {
            return self.inner.pwritev(offset, buf, flags).await;
        };
        let sector = SECTOR_BYTES as usize;
        let half = buf.len() / 2 / sector * sector;
        if met.is_torn && half > 0 {
            self.inner.pwritev(offset, buf.slice(..half), flags).await?;
        }
        Err(met.error)
    }

    fn supported_write_flags(&self) -> WriteFlags {
        self.inner.supported_write_flags()
    }

    fn supported_zero_flags(&self) -> WriteFlags {
        self.inner.supported_zero_flags()
    }

    async fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> Result<()> {
        self.faults.meet(Event::WriteZeroes, offset, bytes).await?;
        self.inner.pwrite_zeroes(offset, bytes, flags).await
    }

    async fn pdiscard(&self, offset: u64, bytes: u64) -> Result<()> {
        self.faults.meet(Event::Discard, offset, bytes).await?;
        self.inner.pdiscard(offset, bytes).await
    }

    async fn block_status(&self, offset: u64, bytes: u64, mode: StatusMode) -> Result<BlockStatus> {
        self.inner.block_status(offset, bytes, mode).await
    }

    async fn flush(&self) -> Result<()> {
        self.faults.meet(Event::Flush, 0, 0).await?;
        self.inner.flush().await
    }

    async fn truncate(&self, request: TruncateRequest) -> Result<()> {
        self.faults.meet(Event::Truncate, request.bytes, 0).await?;
        self.inner.truncate(request).await
    }

    async fn close(&self) -> Result<()> {
        self.inner.close().await
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::MemoryDriver;

    #[tokio::test]
    async fn rules_pick_their_requests() {
        let bytes = MemoryDriver::new(vec![0; 4096]);
        let driver = FaultDriver::new(Box::new(bytes.clone()));
        let faults = driver.faults();
        let node = driver.into_node(NodeFlags::default()).await.unwrap();
        let write = async |offset: u64, byte: u8| {
            let buf = IoBuf::from(vec![byte; 512]);
            node.pwritev(offset, buf, WriteFlags::empty())
                .await
                .map_err(|e| e.errno())
        };
        faults.add(Rule::fail(Event::Write, libc::ENOSPC).only(1));
        assert_eq!(write(0, 1).await, Ok(()));
        assert_eq!(write(0, 2).await, Err(libc::ENOSPC));
        assert_eq!(write(0, 3).await, Ok(()));
        faults.clear();
        faults.add(Rule::fail(Event::Write, libc::EIO).within(512..1024));
        faults.add(Rule::fail(Event::Write, libc::EPERM).starting_with(9));
        assert_eq!(write(0, 1).await, Ok(()));
        assert_eq!(write(512, 1).await, Err(libc::EIO));
        assert_eq!(write(1024, 9).await, Err(libc::EPERM));
        assert_eq!(write(1024, 8).await, Ok(()));
        faults.clear();
        faults.add(Rule::tear_all(libc::EIO));
        let torn = node.pwritev(0, vec![7; 2048].into(), WriteFlags::empty());
        torn.await.unwrap_err();
        let disk = bytes.snapshot();
        assert_eq!((disk[0], disk[1023], disk[1024]), (7, 7, 8));
        faults.clear();
        faults.add(Rule::fail_after(DebugEvent::L2Load, libc::EIO).only(1));
        for expected in [Ok(()), Err(libc::EIO), Ok(())] {
            node.debug_event(DebugEvent::L2Load).await;
            assert_eq!(write(0, 1).await, expected);
        }
        assert_eq!(faults.passed()[&DebugEvent::L2Load], 3);
        assert_eq!(faults.failed().len(), 5);
    }
}
