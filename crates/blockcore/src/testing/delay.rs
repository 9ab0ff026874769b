// SPDX-License-Identifier: MIT OR Apache-2.0
//! `delay`: a driver over another one, whose requests take their time: each a random one, out of a seed.
//!
//! A request waits, takes effect, and waits again before it is said to be done; so requests that are in flight together take effect in one random order and
//! end in another. On a current-thread runtime with paused time (`tokio::time::pause`) the orders depend on the seed alone, and the waits cost nothing.
//! tokio's timers go by milliseconds, so the longest delay should be many of them. Where real time would be too slow, and paused time can't be had (on a
//! multi-thread runtime), [`DelayDriver::by_turns`] counts in turns of the scheduler.
//!
//! ```
//! use std::time::Duration;
//! use blockcore::testing::{DelayDriver, MemoryDriver};
//! use blockcore::{IoBuf, NodeFlags, WriteFlags};
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> blockcore::Result<()> {
//! tokio::time::pause();
//! let disk = MemoryDriver::new(vec![0; 4096]);
//! let slow = DelayDriver::new(Box::new(disk), 42, Duration::from_millis(10));
//! let node = slow.into_node(NodeFlags::default()).await?;
//! let before = tokio::time::Instant::now();
//! node.pwritev(0, IoBuf::from(vec![1; 512]), WriteFlags::empty()).await?;
//! assert!(before.elapsed() > Duration::ZERO);
//! # Ok(()) }
//! ```

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;

use super::rng::Rng;
use crate::buffer::{IoBuf, IoBufMut};
use crate::driver::{BlockDriver, ReadFlags, TruncateRequest, WriteFlags};
use crate::error::Result;
use crate::limits::BlockLimits;
use crate::node::{Node, NodeConfig, NodeFlags};
use crate::status::{BlockStatus, StatusMode};

/// Another driver, in its own time. Reads that must not wait are never served.
pub struct DelayDriver {
    inner: Box<dyn BlockDriver>,
    rng: Mutex<Rng>,
    longest: Delay,
}

/// A wait.
#[derive(Clone, Copy)]
enum Delay {
    Time(Duration),
    /// How often other tasks get their turn.
    Turns(u32),
}

impl DelayDriver {
    /// Over `inner`: every request waits at most `longest` before it takes effect, and as long again before it is done.
    pub fn new(inner: Box<dyn BlockDriver>, seed: u64, longest: Duration) -> DelayDriver {
        DelayDriver {
            inner,
            rng: Mutex::new(Rng::new(seed)),
            longest: Delay::Time(longest),
        }
    }

    /// Over `inner`: before it takes effect, every request lets other tasks have their turn less than `most` times, and as often again before it is done.
    /// `most` is not 0.
    pub fn by_turns(inner: Box<dyn BlockDriver>, seed: u64, most: u32) -> DelayDriver {
        DelayDriver {
            longest: Delay::Turns(most),
            ..DelayDriver::new(inner, seed, Duration::ZERO)
        }
    }

    /// A node over this driver.
    ///
    /// # Errors
    /// Those of the inner driver.
    pub async fn into_node(self, flags: NodeFlags) -> Result<Arc<Node>> {
        let config = NodeConfig {
            filename: "delay".to_owned(),
            flags,
            ..NodeConfig::default()
        };
        Node::new(Box::new(self), config).await
    }

    fn below(&self, bound: u64) -> u64 {
        let mut rng = self
            .rng
            .lock()
            .expect("no code panics while it holds this lock");
        rng.below(bound)
    }

    async fn wait(&self) {
        match self.longest {
            Delay::Time(longest) => {
                let longest = u64::try_from(longest.as_nanos()).unwrap_or(u64::MAX);
                let nanos = self.below(longest.max(1));
                tokio::time::sleep(Duration::from_nanos(nanos)).await;
            }
            Delay::Turns(most) => {
                for _ in 0..self.below(most.into()) {
                    tokio::task::yield_now().await;
                }
            }
        }
    }

    async fn around<T>(&self, request: impl Future<Output = Result<T>>) -> Result<T> {
        self.wait().await;
        let result = request.await;
        self.wait().await;
        result
    }
}

#[async_trait]
impl BlockDriver for DelayDriver {
    fn format_name(&self) -> &'static str {
        "delay"
    }

    fn is_protocol(&self) -> bool {
        self.inner.is_protocol()
    }

    fn limits(&self) -> BlockLimits {
        self.inner.limits()
    }

    fn grows_zeroed(&self) -> bool {
        self.inner.grows_zeroed()
    }

    async fn length(&self) -> Result<u64> {
        self.inner.length().await
    }

    async fn preadv(&self, offset: u64, buf: IoBufMut, flags: ReadFlags) -> Result<IoBufMut> {
        self.around(self.inner.preadv(offset, buf, flags)).await
    }

    async fn pwritev(&self, offset: u64, buf: IoBuf, flags: WriteFlags) -> Result<()> {
        self.around(self.inner.pwritev(offset, buf, flags)).await
    }

    fn supported_write_flags(&self) -> WriteFlags {
        self.inner.supported_write_flags()
    }

    fn supported_zero_flags(&self) -> WriteFlags {
        self.inner.supported_zero_flags()
    }

    async fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> Result<()> {
        self.around(self.inner.pwrite_zeroes(offset, bytes, flags))
            .await
    }

    async fn pdiscard(&self, offset: u64, bytes: u64) -> Result<()> {
        self.around(self.inner.pdiscard(offset, bytes)).await
    }

    async fn block_status(&self, offset: u64, bytes: u64, mode: StatusMode) -> Result<BlockStatus> {
        self.around(self.inner.block_status(offset, bytes, mode))
            .await
    }

    async fn flush(&self) -> Result<()> {
        self.around(self.inner.flush()).await
    }

    async fn truncate(&self, request: TruncateRequest) -> Result<()> {
        self.around(self.inner.truncate(request)).await
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
    use futures::stream::{FuturesUnordered, StreamExt};

    use super::*;
    use crate::testing::MemoryDriver;

    /// The order in which sixteen reads that begin together end.
    async fn order(seed: u64) -> Vec<u64> {
        let disk = MemoryDriver::new(vec![0; 16 * 512]);
        let slow = DelayDriver::new(Box::new(disk), seed, Duration::from_secs(1));
        let node = slow.into_node(NodeFlags::default()).await.unwrap();
        let read = async |i: u64| {
            let read = node.preadv(i * 512, IoBufMut::zeroed(512), ReadFlags::empty());
            read.await.unwrap();
            i
        };
        let mut reads: FuturesUnordered<_> = (0..16).map(read).collect();
        let mut ended = Vec::new();
        while let Some(i) = reads.next().await {
            ended.push(i);
        }
        ended
    }

    #[tokio::test(start_paused = true)]
    async fn the_seed_alone_decides_the_order() {
        let first = order(1).await;
        assert_eq!(order(1).await, first);
        assert_ne!(order(2).await, first);
        assert_ne!(first, (0..16).collect::<Vec<_>>());
    }
}
