// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a program does with the dirty bitmaps of a node, and how changes of the node get into them. `QEMU: block-dirty-bitmap-add` and its siblings.
//!
//! The request path calls [`note_change`](Node::note_change) before every change. See `dirty_bitmap` for why nothing is missed.

use std::sync::Arc;

use crate::dirty_bitmap::{DirtyBitmap, FrozenBitmap};
use crate::error::{BlockError, Op, Result};
use crate::node::Node;

/// The default granularity lies between these, in bytes; in between it is the cluster size.
const DEFAULT_GRANULARITY_BYTES: (u64, u64) = (4 << 10, 64 << 10);

/// A dirty bitmap that is to be added to a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewBitmap {
    /// Its name, unique on the node.
    pub name: String,
    /// Bytes that one bit stands for: a power of two from 512 to 2 GiB. `None`: the node's cluster size, but 4 KiB at least and 64 KiB at most.
    pub granularity: Option<u64>,
    /// Whether it is stored with the image when that is closed.
    pub persistent: bool,
    /// Whether changes are marked in it.
    pub enabled: bool,
}

impl NewBitmap {
    /// A bitmap that marks changes from now on, and is gone when the node is closed.
    pub fn new(name: impl Into<String>) -> NewBitmap {
        NewBitmap {
            name: name.into(),
            granularity: None,
            persistent: false,
            enabled: true,
        }
    }
}

impl Node {
    /// Notes a change that is about to be made: the bitmaps know before the data is another (INV REQ-DIRTY-1). The caller has entered the change as a tracked
    /// request.
    #[inline]
    pub(crate) async fn note_change(&self, offset: u64, bytes: u64) -> Result<()> {
        // Looked at again: a reopening that was dropped has had its turn first, perhaps.
        self.check_writable(Op::Write)?;
        if !self.bitmaps.is_watching() {
            return Ok(());
        }
        self.outdate_copies().await?;
        // Who stores bitmaps says himself how long the disk is. A change that has waited for a shorter disk fails there, and must not make a bitmap longer.
        let end = match self.driver().dirty_bitmaps() {
            Some(_) => self.length().min(offset + bytes),
            None => offset + bytes,
        };
        if offset < end {
            self.bitmaps.mark(offset..end);
        }
        Ok(())
    }

    /// Sees to it that copies of bitmaps on disk no longer claim to be right.
    pub(crate) async fn outdate_copies(&self) -> Result<()> {
        if self.bitmaps.copies_are_current() {
            self.driver().outdate_bitmaps().await?;
        }
        Ok(())
    }

    /// The dirty bitmaps, in the order in which they were added.
    pub fn dirty_bitmaps(&self) -> Vec<Arc<DirtyBitmap>> {
        self.bitmaps.list()
    }

    /// The dirty bitmap with a name.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn dirty_bitmap(&self, name: &str) -> Result<Arc<DirtyBitmap>> {
        let all = self.bitmaps.list();
        let found = all.into_iter().find(|b| b.name() == name);
        found.ok_or_else(|| DirtyBitmap::not_found(name))
    }

    /// Adds a dirty bitmap. Every change that begins after this returns is marked in it; those before are done.
    ///
    /// # Errors
    /// `InvalidArgument` for a name or a granularity that can't be, or a name that is taken; `Unsupported` and others where the image can't store it.
    pub async fn add_dirty_bitmap(&self, new: NewBitmap) -> Result<Arc<DirtyBitmap>> {
        let granularity = match new.granularity {
            Some(bytes) => bytes,
            None => self.default_granularity().await,
        };
        let bitmap = DirtyBitmap::new(new.name, granularity, self.length())?;
        if new.persistent {
            self.check_storable(&bitmap).await?;
        }
        let bitmap = Arc::new(bitmap.enabled(new.enabled).persistent(new.persistent));
        self.bitmaps.change(|all| {
            if all.iter().any(|b| b.name() == bitmap.name()) {
                let text = format!("Bitmap already exists: {}", bitmap.name());
                return Err(BlockError::invalid(text));
            }
            // Whoever changes the length looks at the set afterwards, under the same lock.
            bitmap.set_length(self.length());
            all.push(bitmap.clone());
            Ok(())
        })?;
        self.tracked.settled(0, u64::MAX).await;
        if new.persistent
            && let Err(e) = self.check_storable(&bitmap).await
        {
            // The disk has grown meanwhile. A growth that begins later looks at the bitmaps first.
            self.forget(&bitmap);
            return Err(e);
        }
        Ok(bitmap)
    }

    fn forget(&self, bitmap: &Arc<DirtyBitmap>) {
        self.bitmaps
            .change(|all| all.retain(|b| !Arc::ptr_eq(b, bitmap)));
    }

    async fn default_granularity(&self) -> u64 {
        let (min, max) = DEFAULT_GRANULARITY_BYTES;
        // A driver without such facts has no clusters.
        match self.driver().info().await {
            Ok(info) if info.cluster_size > 0 => info.cluster_size.clamp(min, max),
            _ => max,
        }
    }

    async fn check_storable(&self, bitmap: &DirtyBitmap) -> Result<()> {
        self.check_writable(Op::Write)?;
        let (driver, node) = (self.driver(), self.name());
        if driver.dirty_bitmaps().is_none() {
            let text = format!("Can't store persistent bitmaps to {node}");
            return Err(BlockError::from_errno(libc::ENOTSUP).context(text));
        }
        let storable = driver.check_bitmap(bitmap.name(), bitmap.granularity());
        let prefix = || {
            let name = bitmap.name();
            format!("Can't make bitmap '{name}' persistent in '{node}'")
        };
        storable.await.map_err(|e| e.context(prefix()))
    }

    /// Removes a dirty bitmap, also one that can't be used. What the image has stored of it goes when the image is closed.
    ///
    /// # Errors
    /// `NotFound`; `InvalidArgument` for one that a backup works with; those of the driver.
    pub async fn remove_dirty_bitmap(&self, name: &str) -> Result<()> {
        let bitmap = self.dirty_bitmap(name)?;
        if bitmap.is_busy() {
            bitmap.check_usable()?;
        }
        if bitmap.is_persistent() {
            self.check_writable(Op::Write)?;
            self.outdate_copies().await?;
        }
        self.forget(&bitmap);
        Ok(())
    }

    /// A bitmap that is about to be changed in another way than by marking.
    async fn bitmap_to_change(&self, name: &str) -> Result<Arc<DirtyBitmap>> {
        let bitmap = self.dirty_bitmap(name)?;
        bitmap.check_usable()?;
        if bitmap.is_persistent() {
            self.check_writable(Op::Write)?;
            self.outdate_copies().await?;
        }
        Ok(bitmap)
    }

    /// Forgets what is dirty. Changes that begin after this returns are marked; those before are done.
    ///
    /// # Errors
    /// `NotFound`; `InvalidArgument` for one that can't be used; those of the driver.
    pub async fn clear_dirty_bitmap(&self, name: &str) -> Result<()> {
        self.bitmap_to_change(name).await?.clear();
        self.tracked.settled(0, u64::MAX).await;
        Ok(())
    }

    /// Marks changes in the bitmap from now on, or no longer.
    ///
    /// # Errors
    /// As [`clear_dirty_bitmap`](Node::clear_dirty_bitmap).
    pub async fn enable_dirty_bitmap(&self, name: &str, on: bool) -> Result<()> {
        let bitmap = self.bitmap_to_change(name).await?;
        self.bitmaps.change(|_| bitmap.set_enabled(on));
        self.tracked.settled(0, u64::MAX).await;
        Ok(())
    }

    /// Marks in the bitmap what is dirty in `source`, which may be another node's and have another granularity, but not another length.
    ///
    /// # Errors
    /// As [`clear_dirty_bitmap`](Node::clear_dirty_bitmap), for both; `InvalidArgument` for disks of different lengths.
    pub async fn merge_dirty_bitmap(&self, name: &str, source: &DirtyBitmap) -> Result<()> {
        let bitmap = self.bitmap_to_change(name).await?;
        source.check_consistent()?;
        bitmap.merge(source)
    }

    /// Takes what is dirty, for an incremental backup: what is in the [`FrozenBitmap`] is to be copied, what changes meanwhile is marked anew. When this returns,
    /// everything that was in flight is done, and what is read of the node is what the backup has to have.
    ///
    /// To get a copy of *one* point in time, keep changes away while copying, or copy from a snapshot that is taken together with this.
    ///
    /// ```
    /// # use blockcore::testing::MemoryFactory;
    /// use blockcore::{IoBuf, NewBitmap, OpenOptions, Options, Registry, WriteFlags};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> blockcore::Result<()> {
    /// # let mut registry = Registry::new();
    /// # registry.register(MemoryFactory::default());
    /// # registry.create("memory", "memory:disk", Options::new().with("size", "1M"), Default::default()).await?;
    /// # let disk = OpenOptions::new().format("memory").open(&registry, "memory:disk").await?;
    /// // With the full backup. On a qcow2 image, `persistent: true` keeps it over closing and opening.
    /// disk.root().add_dirty_bitmap(NewBitmap::new("since-monday")).await?;
    ///
    /// disk.pwritev(100_000, IoBuf::from(vec![7; 512]), WriteFlags::empty()).await?;
    ///
    /// // With every incremental one.
    /// let dirty = disk.root().freeze_dirty_bitmap("since-monday").await?;
    /// for range in dirty.ranges() {
    ///     let data = disk.read(range.start, (range.end - range.start) as usize).await?;
    ///     // ... goes to the backup.
    /// #   assert_eq!(range, 65_536..131_072);
    /// }
    /// // Only now is it safe to forget. If it is dropped instead, all that was dirty stays so.
    /// dirty.done();
    /// # assert_eq!(disk.root().dirty_bitmap("since-monday")?.dirty_bytes(), 0);
    /// # disk.close().await
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`clear_dirty_bitmap`](Node::clear_dirty_bitmap).
    pub async fn freeze_dirty_bitmap(&self, name: &str) -> Result<FrozenBitmap> {
        let frozen = self.bitmap_to_change(name).await?.freeze()?;
        self.tracked.settled(0, u64::MAX).await;
        Ok(frozen)
    }

    /// Whether the length may change with the bitmaps that there are.
    pub(crate) fn check_bitmaps_resizable(&self) -> Result<()> {
        let all = self.bitmaps.list();
        let mut stored = all.iter().filter(|b| b.is_persistent());
        stored.try_for_each(|b| b.check_usable())
    }
}

#[cfg(test)]
mod tests;
