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
        if self.is_read_only() {
            if fix != CheckFix::None {
                self.check_writable(Op::Check)?;
            }
            let tell = |e: BlockError| e.during(Op::Check).on_node(self.name());
            return self.driver().check(fix).await.map_err(tell);
        }
        let work = async move |node: Arc<Node>| {
            let result = node.driver().check(fix).await;
            if fix != CheckFix::None {
                node.mark_written();
            }
            result
        };
        self.change_behind(0, Op::Check, work).await
    }
}
