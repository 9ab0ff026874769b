// SPDX-License-Identifier: MIT OR Apache-2.0
//! `fault`: a driver over another one, which fails or slows down the requests that a test picks.
//!
//! # Fault model
//!
//! A [`Rule`] matches requests by kind, place, length and content; of those that match it lets the first ones pass, acts on the next, and lets the rest pass
//! again, or acts on all. A request that fails has changed nothing; a request that is slow lets other tasks run, a given number of times, before it begins.
//! The first rule that acts on a request decides.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;

use crate::buffer::{IoBuf, IoBufMut};
use crate::driver::{BlockDriver, ReadFlags, TruncateRequest, WriteFlags};
use crate::error::{BlockError, Result};
use crate::node::{Node, NodeConfig, NodeFlags};
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

#[derive(Clone, Copy, Debug)]
enum Action {
    Fail(i32),
    Slow(u32),
}

/// Which requests meet with what.
#[derive(Clone, Debug)]
pub struct Rule {
    event: Event,
    range: Range<u64>,
    min_bytes: u64,
    first_byte: Option<u8>,
    skip: u32,
    times: u32,
    action: Action,
}

impl Rule {
    fn new(event: Event, action: Action) -> Rule {
        Rule {
            event,
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
        Rule::new(event, Action::Fail(errno))
    }

    /// Every request of this kind lets other tasks run so many times before it begins.
    pub fn slow(event: Event, yields: u32) -> Rule {
        Rule::new(event, Action::Slow(yields))
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

    /// Only the request number `nth` of those that match, counted from 0.
    pub fn only(mut self, nth: u32) -> Rule {
        (self.skip, self.times) = (nth, 1);
        self
    }

    fn matches(&self, event: Event, offset: u64, bytes: u64, first_byte: Option<u8>) -> bool {
        self.event == event
            && offset < self.range.end
            && self.range.start < offset.saturating_add(bytes.max(1))
            && bytes >= self.min_bytes
            && (self.first_byte.is_none() || self.first_byte == first_byte)
    }
}

/// The rules of a [`FaultDriver`], to be changed while it is in use.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    rules: Arc<Mutex<Vec<Rule>>>,
}

impl Faults {
    fn lock(&self) -> MutexGuard<'_, Vec<Rule>> {
        self.rules
            .lock()
            .expect("no code panics while it holds this lock")
    }

    /// Adds a rule.
    pub fn add(&self, rule: Rule) {
        self.lock().push(rule);
    }

    /// Takes all rules away.
    pub fn clear(&self) {
        self.lock().clear();
    }

    fn action(
        &self,
        event: Event,
        offset: u64,
        bytes: u64,
        first_byte: Option<u8>,
    ) -> Option<Action> {
        for rule in self.lock().iter_mut() {
            if !rule.matches(event, offset, bytes, first_byte) {
                continue;
            }
            if rule.skip > 0 {
                rule.skip -= 1;
            } else if rule.times > 0 {
                rule.times = rule.times.saturating_sub(u32::from(rule.times != u32::MAX));
                return Some(rule.action);
            }
        }
        None
    }

    async fn meet(
        &self,
        event: Event,
        offset: u64,
        bytes: u64,
        first_byte: Option<u8>,
    ) -> Result<()> {
        match self.action(event, offset, bytes, first_byte) {
            None => Ok(()),
            Some(Action::Fail(errno)) => Err(BlockError::from_errno(errno)),
            Some(Action::Slow(yields)) => {
                for _ in 0..yields {
                    tokio::task::yield_now().await;
                }
                Ok(())
            }
        }
    }
}

/// Another driver, with faults.
pub struct FaultDriver {
    inner: Box<dyn BlockDriver>,
    faults: Faults,
}

impl FaultDriver {
    /// Over `inner`, with no rule yet.
    pub fn new(inner: Box<dyn BlockDriver>) -> FaultDriver {
        FaultDriver {
            inner,
            faults: Faults::default(),
        }
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

    async fn length(&self) -> Result<u64> {
        let length = self.inner.length().await;
        self.faults.meet(Event::Length, 0, 0, None).await?;
        length
    }

    fn read_nowait(&self, _offset: u64, _buf: &mut [u8]) -> bool {
        // Every read is to meet the rules.
        false
    }

    async fn preadv(&self, offset: u64, buf: IoBufMut, flags: ReadFlags) -> Result<IoBufMut> {
        let bytes = buf.len() as u64;
        self.faults.meet(Event::Read, offset, bytes, None).await?;
        self.inner.preadv(offset, buf, flags).await
    }

    async fn pwritev(&self, offset: u64, buf: IoBuf, flags: WriteFlags) -> Result<()> {
        let first_byte = buf.slice(..1).to_vec().first().copied();
        let bytes = buf.len() as u64;
        self.faults
            .meet(Event::Write, offset, bytes, first_byte)
            .await?;
        self.inner.pwritev(offset, buf, flags).await
    }

    fn supported_write_flags(&self) -> WriteFlags {
        self.inner.supported_write_flags()
    }

    fn supported_zero_flags(&self) -> WriteFlags {
        self.inner.supported_zero_flags()
    }

    async fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> Result<()> {
        self.faults
            .meet(Event::WriteZeroes, offset, bytes, None)
            .await?;
        self.inner.pwrite_zeroes(offset, bytes, flags).await
    }

    async fn pdiscard(&self, offset: u64, bytes: u64) -> Result<()> {
        self.faults
            .meet(Event::Discard, offset, bytes, None)
            .await?;
        self.inner.pdiscard(offset, bytes).await
    }

    async fn block_status(&self, offset: u64, bytes: u64, mode: StatusMode) -> Result<BlockStatus> {
        self.inner.block_status(offset, bytes, mode).await
    }

    async fn flush(&self) -> Result<()> {
        self.faults.meet(Event::Flush, 0, 0, None).await?;
        self.inner.flush().await
    }

    async fn truncate(&self, request: TruncateRequest) -> Result<()> {
        self.faults
            .meet(Event::Truncate, request.bytes, 0, None)
            .await?;
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
        let driver = FaultDriver::new(Box::new(MemoryDriver::new(vec![0; 4096])));
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
    }
}
