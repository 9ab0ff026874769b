// SPDX-License-Identifier: MIT OR Apache-2.0
//! Checking a node's metadata, and repairing it. `QEMU: bdrv_check`.
//!
//! What a check sees has to stand still: on a node that may be written it enters itself as one serialising change of all of it, as the snapshot operations do.

use std::fmt;
use std::sync::Arc;

use crate::driver::{CheckFix, CheckResult};
use crate::error::{BlockError, Op, Result};
use crate::node::Node;

/// What a check had found, and repaired, when an error ended it: the [`source`](std::error::Error::source) of that error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckAborted(pub CheckResult);

impl fmt::Display for CheckAborted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = &self.0;
        write!(
            f,
            "the check ended early, after {} corruptions and {} leaks",
            found.corruptions, found.leaks
        )
    }
}

impl std::error::Error for CheckAborted {}

impl CheckAborted {
    /// What had been found when a check ended with this error, where its driver says so.
    pub fn found_before(error: &BlockError) -> Option<&CheckResult> {
        let source = std::error::Error::source(error)?;
        source.downcast_ref::<CheckAborted>().map(|a| &a.0)
    }
}

impl Node {
    /// Checks the metadata, and repairs what `fix` allows. Repairs are durable when it returns. On a node that may be written it runs to its end even if its
    /// future is dropped.
    ///
    /// # Errors
    /// `Unsupported` for drivers without checks; `ReadOnly` for repairs on such a node; those of the driver, with [what was found till
    /// then](CheckAborted::found_before). An error in the middle of a repair leaves the node as readable as it was.
    pub async fn check(self: &Arc<Self>, fix: CheckFix) -> Result<CheckResult> {
        let tell = |node: &Node, e: BlockError| e.during(Op::Check).on_node(node.name());
        if self.is_read_only() {
            if fix != CheckFix::None {
                self.check_writable(Op::Check)?;
            }
            return self.driver().check(fix).await.map_err(|e| tell(self, e));
        }
        let tracked = self.tracked.enter(0, u64::MAX, true);
        let (done, _unless_dropped) = self.orphans.watch();
        let in_flight = self.tasks.enter_owned();
        let node = self.clone();
        let task = tokio::spawn(async move {
            let _in_flight = in_flight;
            let _done = done;
            tracked.turn().await;
            let result = node.driver().check(fix).await;
            if fix != CheckFix::None {
                node.mark_written();
            }
            drop(tracked);
            result.map_err(|e| tell(&node, e))
        });
        let cancelled = |_| Err(BlockError::from_errno(libc::ECANCELED).during(Op::Check));
        task.await.unwrap_or_else(cancelled)
    }
}
