// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`Child`]: an edge of the graph, from a parent's driver to the node it uses.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{BlockError, Op, Result};
use crate::node::Node;

/// What a parent uses a child for. `QEMU: BdrvChildRole`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChildRole {
    /// A format's file: metadata and data.
    File,
    /// A format's external data file: data only.
    Data,
    /// What shows through where the parent holds nothing.
    Backing,
    /// What a filter passes its requests to.
    Filtered,
}

/// An edge of the graph. Requests on the child go through the node's request path: a `Child` derefs to its [`Node`].
#[derive(Debug)]
pub struct Child {
    name: &'static str,
    role: ChildRole,
    node: Arc<Node>,
    closed: AtomicBool,
}

impl Child {
    /// Makes `node` a child called `name` (`file`, `backing` ...).
    pub fn new(name: &'static str, role: ChildRole, node: Arc<Node>) -> Child {
        node.add_user();
        Child {
            name,
            role,
            node,
            closed: AtomicBool::new(false),
        }
    }

    /// The child's name, as in dotted options.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// What the parent uses it for.
    pub fn role(&self) -> ChildRole {
        self.role
    }

    /// The node at the other end.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Gives the child up; the node closes when this was its last parent. Runs to its end even if the future is dropped.
    ///
    /// # Errors
    /// What closing the node met.
    pub async fn close(&self) -> Result<()> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let task = tokio::spawn(self.node.clone().release());
        let cancelled = |_| Err(BlockError::from_errno(libc::ECANCELED).during(Op::Close));
        task.await.unwrap_or_else(cancelled)
    }
}

impl Deref for Child {
    type Target = Arc<Node>;

    fn deref(&self) -> &Arc<Node> {
        &self.node
    }
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use futures::FutureExt;

    use super::*;
    use crate::buffer::IoBufMut;
    use crate::driver::{BlockDriver, ReadFlags};
    use crate::node::NodeConfig;

    /// A driver that takes its time to close, and says when it has.
    struct ClosesSlowly {
        child: Option<Child>,
        closed: Arc<AtomicBool>,
    }

    #[async_trait]
    impl BlockDriver for ClosesSlowly {
        fn format_name(&self) -> &'static str {
            "test"
        }

        fn children(&self) -> Vec<&Child> {
            self.child.iter().collect()
        }

        async fn length(&self) -> Result<u64> {
            Ok(0)
        }

        async fn preadv(&self, _: u64, buf: IoBufMut, _: ReadFlags) -> Result<IoBufMut> {
            Ok(buf)
        }

        async fn close(&self) -> Result<()> {
            for _ in 0..3 {
                tokio::task::yield_now().await;
            }
            self.closed.store(true, Ordering::Release);
            Ok(())
        }

        fn as_any(&self) -> &dyn std::any::Any {
            self
        }
    }

    async fn over(child: Option<Child>) -> (Child, Arc<AtomicBool>) {
        let closed = Arc::new(AtomicBool::new(false));
        let driver = ClosesSlowly {
            child,
            closed: closed.clone(),
        };
        let node = Node::new(Box::new(driver), NodeConfig::default()).await;
        (Child::new("top", ChildRole::File, node.unwrap()), closed)
    }

    // INV REQ-DROP-1: a close that is given up goes on to its end, since nobody can ask for it once more.
    #[tokio::test]
    async fn a_close_that_is_given_up_closes_everything_all_the_same() {
        let (file, file_closed) = over(None).await;
        let (top, top_closed) = over(Some(file)).await;
        assert!(top.close().now_or_never().is_none());
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
        assert!(top_closed.load(Ordering::Acquire));
        assert!(file_closed.load(Ordering::Acquire));
    }
}
