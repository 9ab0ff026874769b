// SPDX-License-Identifier: MIT OR Apache-2.0
//! Changes of a whole node: internal snapshots with their VM state, and amending. `QEMU: bdrv_snapshot_create` and its siblings, `bdrv_amend_options`.
//!
//! Taking, applying and deleting a snapshot, and amending, concern every byte of a node, so each enters itself as one serialising change of all of it: it waits for the
//! changes that are in flight, and those that come later wait for it. Each runs to its end even if its future is dropped.

use std::sync::Arc;

use crate::buffer::{IoBuf, IoBufMut};
use crate::driver::SnapshotInfo;
use crate::error::{BlockError, Op, Result};
use crate::node::Node;
use crate::options::Options;
use crate::request::WrittenOnDrop;
use crate::tracked::TrackedRequest;

/// A snapshot that is to be taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotRequest {
    /// Its name. Several snapshots may have the same.
    pub name: String,
    /// When it is taken: seconds since 1970.
    pub date_sec: u32,
    /// When it is taken: nanoseconds within the second.
    pub date_nsec: u32,
    /// How long the guest has been running, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of VM state that were saved for it ([`Node::save_vmstate`]). The active layer has none afterwards.
    pub vm_state_size: u64,
    /// Instructions that the guest has executed, where they are counted.
    pub icount: Option<u64>,
}

impl SnapshotRequest {
    /// A snapshot of a disk without a machine, taken now.
    pub fn now(name: impl Into<String>) -> SnapshotRequest {
        let now = std::time::SystemTime::now();
        let since = now
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        SnapshotRequest {
            name: name.into(),
            date_sec: since.as_secs() as u32,
            date_nsec: since.subsec_nanos(),
            icount: Some(0),
            ..SnapshotRequest::default()
        }
    }
}

/// Which of an image's snapshots is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotSelector {
    /// The first with this id or, if there is none, with this name.
    IdOrName(String),
    /// The first of which holds what is given here.
    Fields {
        /// Its id.
        id: Option<String>,
        /// Its name.
        name: Option<String>,
    },
}

impl SnapshotSelector {
    /// The snapshot with a name.
    pub fn name(name: impl Into<String>) -> SnapshotSelector {
        SnapshotSelector::Fields {
            id: None,
            name: Some(name.into()),
        }
    }

    /// The place of the chosen one among ids and names.
    pub fn find<'a>(&self, all: impl Iterator<Item = (&'a str, &'a str)> + Clone) -> Option<usize> {
        let mut all = all;
        match self {
            SnapshotSelector::IdOrName(word) => {
                let by_id = all.clone().position(|(id, _)| id == word);
                by_id.or_else(|| all.position(|(_, name)| name == word))
            }
            SnapshotSelector::Fields { id, name } => all.position(|(i, n)| {
                id.as_deref().is_none_or(|id| id == i)
                    && name.as_deref().is_none_or(|name| name == n)
            }),
        }
    }
}

/// Who is told how far an amending is.
#[derive(Clone, Default)]
pub struct AmendProgress(Option<Arc<Observer>>);

type Observer = dyn Fn(u64, u64) + Send + Sync;

impl AmendProgress {
    /// Calls `observer` with how many steps are done, and how many there are, on the thread that does them. It must not block. How many there are may become
    /// known only on the way, so that the share that is done may become smaller.
    pub fn observed(observer: impl Fn(u64, u64) + Send + Sync + 'static) -> AmendProgress {
        AmendProgress(Some(Arc::new(observer)))
    }

    /// Tells how far it is.
    pub fn tell(&self, done: u64, total: u64) {
        if let Some(observer) = &self.0 {
            observer(done, total);
        }
    }
}

/// A change of the whole node.
enum Change {
    Create(SnapshotRequest),
    Goto(SnapshotSelector),
    Delete(SnapshotSelector),
    Amend(Options, AmendProgress),
}

impl Node {
    /// The internal snapshots, in the order in which they were taken.
    ///
    /// # Errors
    /// Those of the driver.
    pub async fn snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        self.driver().snapshots().await
    }

    /// Takes an internal snapshot: what the node holds now can be had again later. Durable when it returns.
    ///
    /// # Errors
    /// `Unsupported` for drivers without snapshots; `ReadOnly`; those of the driver. Nothing has changed then.
    pub async fn snapshot_create(self: &Arc<Self>, request: SnapshotRequest) -> Result<()> {
        self.change_all(Change::Create(request)).await
    }

    /// Makes the node what it was when the snapshot was taken, its length included. What was written since is gone. Durable when it returns.
    ///
    /// # Errors
    /// `NotFound` where there is no such snapshot; EBUSY where there are dirty bitmaps, which would miss it; as [`snapshot_create`](Node::snapshot_create).
    pub async fn snapshot_goto(self: &Arc<Self>, which: SnapshotSelector) -> Result<()> {
        self.change_all(Change::Goto(which)).await
    }

    /// Deletes an internal snapshot. Durable when it returns.
    ///
    /// # Errors
    /// As [`snapshot_goto`](Node::snapshot_goto).
    pub async fn snapshot_delete(self: &Arc<Self>, which: SnapshotSelector) -> Result<()> {
        self.change_all(Change::Delete(which)).await
    }

    /// Changes what the image was created with: version, refcount width and so on. Durable when it returns.
    ///
    /// # Errors
    /// `Unsupported` for drivers whose images can't be changed so; `InvalidArgument`; `ReadOnly`; those of the driver.
    pub async fn amend(self: &Arc<Self>, options: Options) -> Result<()> {
        self.amend_observed(options, AmendProgress::default()).await
    }

    /// As [`amend`](Node::amend), and tells how far it is.
    ///
    /// # Errors
    /// As [`amend`](Node::amend).
    pub async fn amend_observed(
        self: &Arc<Self>,
        options: Options,
        progress: AmendProgress,
    ) -> Result<()> {
        self.change_all(Change::Amend(options, progress)).await
    }

    /// Shows what the node was when the snapshot was taken, its length included, instead of what it is. The node is read-only, and stays so.
    ///
    /// # Errors
    /// `NotFound` where there is no such snapshot; `InvalidArgument` for a node that may be written.
    pub async fn snapshot_load(self: &Arc<Self>, which: SnapshotSelector) -> Result<()> {
        if !self.is_read_only() {
            return Err(BlockError::invalid("Device is not readonly"));
        }
        // INV REQ-DROP-1: nobody sees the tables of one and the length of the other.
        let load = async move |node: Arc<Node>| {
            node.driver().snapshot_load(&which).await?;
            node.refresh_length().await.map(drop)
        };
        self.change_behind(0, Op::Reopen, load).await
    }

    /// Reads the VM state area: `offset` counts from its start. What was never written is zero.
    ///
    /// # Errors
    /// `Unsupported` for drivers without such an area, and for parts of sectors of an encrypted image; those of the driver.
    pub async fn load_vmstate(&self, offset: u64, buf: IoBufMut) -> Result<IoBufMut> {
        self.settle_orphans(self.length(), u64::MAX).await;
        let _tracked = self.track_vmstate().await;
        let loaded = self.driver().load_vmstate(offset, buf).await;
        loaded.map_err(|e| e.during(Op::Read).on_node(self.name()))
    }

    /// Writes the VM state area, as [`load_vmstate`](Node::load_vmstate) reads it. The next snapshot keeps it.
    ///
    /// # Errors
    /// `Unsupported` for drivers without such an area, and for parts of sectors of an encrypted image; `ReadOnly`; those of the driver.
    pub async fn save_vmstate(&self, offset: u64, buf: IoBuf) -> Result<()> {
        let _tracked = self.track_vmstate().await;
        let _written = WrittenOnDrop(self);
        let saved = self.driver().save_vmstate(offset, buf).await;
        saved.map_err(|e| e.during(Op::Write).on_node(self.name()))
    }

    /// The area begins where the disk ends, and so lies still only as long as the length does.
    async fn track_vmstate(&self) -> TrackedRequest {
        self.tracked.begin(self.length(), u64::MAX, false).await
    }

    async fn change_all(self: &Arc<Self>, change: Change) -> Result<()> {
        let op = match change {
            Change::Amend(..) => Op::Amend,
            _ => Op::Snapshot,
        };
        self.check_writable(op)?;
        let work = async move |node: Arc<Node>| {
            let driver = node.driver();
            let result = match change {
                Change::Create(request) => driver.snapshot_create(request).await,
                Change::Goto(which) => node.goto_alone(&which).await,
                Change::Delete(which) => driver.snapshot_delete(&which).await,
                Change::Amend(options, progress) => node.amend_alone(options, &progress).await,
            };
            node.mark_written();
            let refreshed = node.refresh_length().await;
            node.bitmaps.set_length(node.length());
            result.and(refreshed.map(|_| ()))
        };
        self.change_behind(0, op, work).await
    }

    /// Bitmaps would miss what changes. Who adds one after this look waits until it is over.
    async fn goto_alone(&self, which: &SnapshotSelector) -> Result<()> {
        if !self.bitmaps.list().is_empty() {
            let text = "Device has active dirty bitmaps";
            return Err(BlockError::from_errno(libc::EBUSY).message(text));
        }
        self.driver().snapshot_goto(which).await
    }

    /// The length may change, and with it what bitmaps cover.
    async fn amend_alone(&self, options: Options, progress: &AmendProgress) -> Result<()> {
        if options.contains("size") {
            self.check_bitmaps_resizable()?;
        }
        self.outdate_copies().await?;
        self.driver().amend(options, progress).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_goes_before_a_name() {
        let all = [("1", "2"), ("2", "a"), ("3", "a")];
        let find = |s: SnapshotSelector| s.find(all.into_iter());
        assert_eq!(find(SnapshotSelector::IdOrName("2".into())), Some(1));
        assert_eq!(find(SnapshotSelector::IdOrName("a".into())), Some(1));
        assert_eq!(find(SnapshotSelector::IdOrName("b".into())), None);
        assert_eq!(find(SnapshotSelector::name("2")), Some(0));
        let fields = |id: &str, name: &str| SnapshotSelector::Fields {
            id: Some(id.into()),
            name: Some(name.into()),
        };
        assert_eq!(find(fields("3", "a")), Some(2));
        assert_eq!(find(fields("1", "a")), None);
    }
}
