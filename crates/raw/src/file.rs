// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`FileDriver`]: the protocol drivers `file` and `host_device`. `QEMU: block/file-posix.c`.
//!
//! Every change waits first for orphans to the same bytes (INV REQ-DROP-1, see [`orphan`](crate::orphan)), and reads do too: what a dropped
//! write leaves behind is settled before anybody sees it.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use async_trait::async_trait;
use blockcore::{
    BlockDriver, BlockError, BlockLimits, BlockStatus, DriverInfo, IoBuf, IoBufMut, Node, Perm,
    Permissions, Preallocation, PreparedReopen, ReadFlags, ReopenRequest, Result, SpecificInfo,
    StatusFlags, StatusMode, TruncateRequest, WriteFlags, blocking,
};

use crate::engine::standby::Manner;
use crate::file_open::Aio;
use crate::host::{HostFile, HostKind};
use crate::orphan::Orphans;
use crate::{direct, lock, reopen, status, truncate};

/// An open file or device of the host.
#[derive(Debug)]
pub struct FileDriver {
    pub(crate) state: Arc<FileState>,
}

/// What a driver and its preparations for reopening share.
#[derive(Debug)]
pub(crate) struct FileState {
    pub driver_name: &'static str,
    pub filename: String,
    pub aio: Aio,
    /// Changes only with a reopen.
    current: RwLock<Arc<HostFile>>,
    orphans: Arc<Orphans>,
    /// `None`: no locks are taken.
    held: Option<Mutex<Permissions>>,
    /// The errno of the sync after which the page cache can no longer be trusted; 0: none.
    sync_failed: AtomicI32,
}

impl Drop for FileState {
    /// Closing the file would give the locks back, too, but not at once: io_uring may hold the file for a moment after a request has ended, and whoever opens
    /// the image next would find it locked.
    fn drop(&mut self) {
        self.narrow_permissions(&[&self.host()], Permissions::NONE);
    }
}

impl FileState {
    pub fn host(&self) -> Arc<HostFile> {
        self.current
            .read()
            .expect("no code panics while it holds this lock")
            .clone()
    }

    pub fn replace_host(&self, host: Arc<HostFile>) {
        *self
            .current
            .write()
            .expect("no code panics while it holds this lock") = host;
    }

    /// Permissions as the locks show them; `None`: no locks are taken.
    pub fn held(&self) -> Option<Permissions> {
        let held = self.held.as_ref()?;
        Some(
            *held
                .lock()
                .expect("no code panics while it holds this lock"),
        )
    }

    /// Takes and drops locks on the open file; blocks.
    pub fn apply_permissions(&self, new: Permissions) -> Result<()> {
        let Some(held) = &self.held else {
            return Ok(());
        };
        let mut held = held
            .lock()
            .expect("no code panics while it holds this lock");
        lock::apply(self.host().as_fd(), &self.filename, *held, new)?;
        *held = new;
        Ok(())
    }

    /// Takes the lock of what the parent did not say it would do, and keeps it; blocks.
    fn also_use(&self, perm: Perm) -> Result<()> {
        match self.held() {
            Some(held) if !held.used.contains(perm) => self.apply_permissions(Permissions {
                used: held.used | perm,
                ..held
            }),
            _ => Ok(()),
        }
    }

    /// Lets go of the locks that `keep` has no use for, on every opening given; what is kept has been taken before.
    pub fn narrow_permissions(&self, openings: &[&HostFile], keep: Permissions) {
        let Some(held) = &self.held else {
            return;
        };
        let mut held = held
            .lock()
            .expect("no code panics while it holds this lock");
        for host in openings {
            if let Err(e) = lock::release(host.as_fd(), *held, keep) {
                tracing::error!("letting go of locks of '{}': {e}", self.filename);
            }
        }
        *held = keep;
    }

    /// Makes what was written to an opening of the file durable. All syncs come by here: the kernel tells of a failure only once.
    fn sync(&self, host: &HostFile) -> Result<()> {
        let failed = self.sync_failed.load(Ordering::Acquire);
        if failed != 0 {
            return Err(BlockError::from_errno(failed));
        }
        host.sync_data().map_err(|e| {
            let err = BlockError::from_io(e);
            // The kernel has dropped the dirty state of the pages: a later sync would succeed with the data lost.
            if host.direct.is_none() {
                self.sync_failed.store(err.errno(), Ordering::Release);
            }
            err
        })
    }
}

/// How long a change of the file takes, as far as the kind of host doesn't matter.
#[derive(Clone, Copy)]
enum Takes {
    /// Writes can wait for it.
    Moments,
    /// Nobody should have to wait for it.
    ItsTime,
}

impl FileDriver {
    pub(crate) fn new(
        driver_name: &'static str,
        filename: String,
        aio: Aio,
        locking: bool,
        host: HostFile,
    ) -> FileDriver {
        FileDriver {
            state: Arc::new(FileState {
                driver_name,
                filename,
                aio,
                current: RwLock::new(Arc::new(host)),
                orphans: Arc::default(),
                held: locking.then(|| Mutex::new(Permissions::NONE)),
                sync_failed: AtomicI32::new(0),
            }),
        }
    }

    /// Does something to the open file on a blocking thread.
    async fn blocking<T, E>(
        &self,
        work: impl FnOnce(&HostFile) -> Result<T, E> + Send + 'static,
    ) -> Result<T>
    where
        T: Send + 'static,
        E: Into<BlockError> + Send + 'static,
    {
        let host = self.state.host();
        let standby = host.standby.clone();
        standby.run(Manner::Alone, move || work(&host)).await
    }

    /// As `blocking`, for a change of a range.
    async fn change<E: Into<BlockError> + Send + 'static>(
        &self,
        takes: Takes,
        offset: u64,
        end: u64,
        work: impl FnOnce(&HostFile) -> Result<(), E> + Send + 'static,
    ) -> Result<()> {
        let orphans = &self.state.orphans;
        orphans.wait(offset, end).await;
        let host = self.state.host();
        let standby = host.standby.clone();
        let manner = match takes {
            Takes::Moments => host.write_manner(),
            Takes::ItsTime => Manner::Alone,
        };
        let work = move || work(&host);
        standby.run_change(manner, orphans, offset, end, work).await
    }
}

#[async_trait]
impl BlockDriver for FileDriver {
    fn format_name(&self) -> &'static str {
        self.state.driver_name
    }

    fn is_protocol(&self) -> bool {
        true
    }

    fn grows_zeroed(&self) -> bool {
        self.state.host().kind == HostKind::File
    }

    fn limits(&self) -> BlockLimits {
        let Some(align) = self.state.host().direct else {
            return BlockLimits::default();
        };
        BlockLimits {
            request_alignment: align.request,
            pwrite_zeroes_alignment: align.request,
            pdiscard_alignment: align.request,
            mem_alignment: align.memory,
            ..BlockLimits::default()
        }
    }

    async fn length(&self) -> Result<u64> {
        self.state.orphans.wait_all().await;
        self.blocking(HostFile::length).await
    }

    fn read_nowait(&self, offset: u64, buf: &mut [u8]) -> bool {
        if self.state.orphans.any() {
            return false;
        }
        let host = self
            .state
            .current
            .read()
            .expect("no code panics while it holds this lock");
        host.read_nowait(offset, buf)
    }

    async fn preadv(&self, offset: u64, buf: IoBufMut, _flags: ReadFlags) -> Result<IoBufMut> {
        let end = offset + buf.len() as u64;
        self.state.orphans.wait(offset, end).await;
        direct::read(&self.state.host(), offset, buf).await
    }

    async fn pwritev(&self, offset: u64, buf: IoBuf, _flags: WriteFlags) -> Result<()> {
        let end = offset + buf.len() as u64;
        self.state.orphans.wait(offset, end).await;
        direct::write(&self.state.host(), &self.state.orphans, offset, buf).await
    }

    fn supported_zero_flags(&self) -> WriteFlags {
        WriteFlags::MAY_UNMAP | WriteFlags::NO_FALLBACK
    }

    async fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> Result<()> {
        if !self.state.host().may_zero() {
            return Err(BlockError::from_errno(libc::ENOTSUP));
        }
        self.change(Takes::Moments, offset, offset + bytes, move |host| {
            host.zero(offset, bytes, flags)
        })
        .await
    }

    async fn reserve_storage(&self, offset: u64, bytes: u64) -> Result<()> {
        self.change(Takes::Moments, offset, offset + bytes, move |host| {
            host.reserve(offset, bytes)
        })
        .await
    }

    async fn pdiscard(&self, offset: u64, bytes: u64) -> Result<()> {
        if !self.state.host().may_discard() {
            return Err(BlockError::from_errno(libc::ENOTSUP));
        }
        self.change(Takes::Moments, offset, offset + bytes, move |host| {
            host.discard(offset, bytes)
        })
        .await
    }

    async fn block_status(&self, offset: u64, bytes: u64, mode: StatusMode) -> Result<BlockStatus> {
        if mode == StatusMode::AllocationOnly {
            let mut status = BlockStatus::new(StatusFlags::DATA | StatusFlags::OFFSET_VALID, bytes);
            status.map = offset;
            return Ok(status);
        }
        self.state.orphans.wait(offset, offset + bytes).await;
        if let Some(known) = status::status_nowait(&self.state.host(), offset, bytes) {
            return Ok(known);
        }
        self.blocking(move |host| Ok::<_, BlockError>(status::status(host, offset, bytes)))
            .await
    }

    async fn flush(&self) -> Result<()> {
        self.state.orphans.wait_all().await;
        let state = self.state.clone();
        blocking::run(move || state.sync(&state.host())).await?
    }

    async fn truncate(&self, request: TruncateRequest) -> Result<()> {
        let state = self.state.clone();
        let takes = match request.preallocation {
            Preallocation::Off => Takes::Moments,
            _ => Takes::ItsTime,
        };
        self.change(takes, 0, u64::MAX, move |host| {
            // Somebody may count on the length: a raw image with a fixed place in the file.
            state.also_use(Perm::RESIZE)?;
            truncate::truncate(host, request, &|| state.sync(host))
        })
        .await
    }

    async fn allocated_size(&self) -> Result<Option<u64>> {
        self.blocking(HostFile::allocated_bytes).await.map(Some)
    }

    async fn info(&self) -> Result<DriverInfo> {
        Ok(DriverInfo::default())
    }

    async fn specific_info(&self) -> Result<Option<SpecificInfo>> {
        Ok(Some(SpecificInfo {
            type_name: "file",
            data: serde_json::Map::new(),
        }))
    }

    async fn copy_range_from(
        &self,
        source: &Node,
        src_offset: u64,
        dst_offset: u64,
        bytes: u64,
    ) -> Result<()> {
        let Some(source) = source.driver().as_any().downcast_ref::<FileDriver>() else {
            return Err(BlockError::from_errno(libc::ENOTSUP));
        };
        let orphans = &source.state.orphans;
        let src_end = src_offset + bytes;
        orphans.wait(src_offset, src_end).await;
        let from = source.state.host();
        // What is being copied must not change before a copy that nobody waits for any more is over.
        let (reader, _waiter) = orphans.begin(src_offset, src_end);
        self.change(
            Takes::ItsTime,
            dst_offset,
            dst_offset + bytes,
            move |host| {
                let _reader = reader;
                host.copy_from(&from, src_offset, dst_offset, bytes)
            },
        )
        .await
    }

    async fn reopen_prepare(&self, request: &mut ReopenRequest) -> Result<Box<dyn PreparedReopen>> {
        self.state.orphans.wait_all().await;
        reopen::prepare(&self.state, request).await
    }

    async fn set_permissions(&self, permissions: Permissions) -> Result<()> {
        let state = self.state.clone();
        blocking::run(move || {
            direct::check_writer(&state.host(), permissions)?;
            state.apply_permissions(permissions)
        })
        .await?
    }

    async fn close(&self) -> Result<()> {
        self.state.orphans.wait_all().await;
        // A read that nobody waits for may hold the file open a little longer; the locks must not stay with it.
        self.set_permissions(Permissions::NONE).await
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

#[cfg(test)]
mod tests;
