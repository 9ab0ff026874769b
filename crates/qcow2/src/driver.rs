// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`Qcow2`]: the format as a [`BlockDriver`]. Each method hands on to the file that does it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use async_trait::async_trait;
use blockcore::{
    AmendProgress, BackingName, BlockDriver, BlockError, BlockLimits, BlockStatus, CheckFix,
    CheckResult, Child, DirtyBitmaps, DriverInfo, ErrorKind, IoBuf, IoBufMut, OptionValue, Options,
    PreparedReopen, ReadFlags, ReopenRequest, Result, SECTOR_BYTES, SnapshotInfo, SnapshotRequest,
    SnapshotSelector, SpecificInfo, StatusMode, TruncateRequest, WriteFlags,
};

use crate::header::{Header, Incompatible};
use crate::image::Image;
use crate::runtime::RuntimeOptions;
use crate::{crypto, info, snapshot};

/// The longest request to an encrypted image, in bytes: each write makes a copy.
const ENCRYPTED_BYTES_MAX: u64 = 2 << 20;

/// An open qcow2 image.
pub struct Qcow2 {
    pub(crate) image: Arc<Image>,
}

impl Qcow2 {
    fn header(&self) -> Header {
        self.image.header().clone()
    }

    /// Hands a result on. Corruption that was found is noted on disk first, so that the next program knows too; if that fails, the next commit tries again.
    async fn settle<T: Send>(&self, result: Result<T>) -> Result<T> {
        if matches!(&result, Err(e) if e.kind() == ErrorKind::Corrupt)
            && let Err(e) = self.image.mark_corrupt_on_disk().await
        {
            tracing::error!("the image could not be marked as corrupt: {e}");
        }
        result
    }
}

#[async_trait]
impl BlockDriver for Qcow2 {
    fn format_name(&self) -> &'static str {
        "qcow2"
    }

    fn supports_backing(&self) -> bool {
        true
    }

    fn is_encrypted(&self) -> bool {
        self.image.is_encrypted()
    }

    fn grows_zeroed(&self) -> bool {
        let data = self.image.data.child();
        data.is_none_or(|data| data.driver().grows_zeroed())
    }

    fn strong_options(&self) -> &'static [&'static str] {
        &["encrypt.key-secret"]
    }

    fn children(&self) -> Vec<&Child> {
        std::iter::once(&self.image.file)
            .chain(self.image.data.child())
            .chain(&self.image.backing)
            .collect()
    }

    fn backing(&self) -> Option<&Child> {
        self.image.backing.as_ref()
    }

    fn limits(&self) -> BlockLimits {
        let (request_alignment, max_transfer) = match self.image.is_encrypted() {
            true => (SECTOR_BYTES as u32, ENCRYPTED_BYTES_MAX),
            false => (1, 0),
        };
        BlockLimits {
            request_alignment,
            max_transfer,
            pwrite_zeroes_alignment: self.image.subcluster_size() as u32,
            // As QEMU: subclusters are not discarded.
            pdiscard_alignment: self.image.cluster_size() as u32,
            ..BlockLimits::default()
        }
    }

    async fn length(&self) -> Result<u64> {
        Ok(self.image.size())
    }

    fn read_nowait(&self, offset: u64, buf: &mut [u8]) -> bool {
        self.image.read_nowait(offset, buf)
    }

    async fn preadv(&self, offset: u64, buf: IoBufMut, _flags: ReadFlags) -> Result<IoBufMut> {
        let result = self.image.read(offset, buf).await;
        self.settle(result).await
    }

    fn supported_write_flags(&self) -> WriteFlags {
        WriteFlags::COMPRESSED
    }

    async fn pwritev(&self, offset: u64, buf: IoBuf, flags: WriteFlags) -> Result<()> {
        let result = match flags.contains(WriteFlags::COMPRESSED) {
            true => self.image.write_compressed(offset, buf).await,
            false => self.image.write(offset, buf).await,
        };
        self.settle(result).await
    }

    fn supported_zero_flags(&self) -> WriteFlags {
        // Version 2 can't promise anything: it has no zero clusters.
        if self.image.version() < 3 {
            WriteFlags::empty()
        } else {
            WriteFlags::MAY_UNMAP | WriteFlags::NO_FALLBACK
        }
    }

    async fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> Result<()> {
        let result = self.image.write_zeroes(offset, bytes, flags).await;
        self.settle(result).await
    }

    async fn pdiscard(&self, offset: u64, bytes: u64) -> Result<()> {
        let result = self.image.discard(offset, bytes).await;
        self.settle(result).await
    }

    async fn block_status(&self, offset: u64, bytes: u64, mode: StatusMode) -> Result<BlockStatus> {
        let result = self.image.status(offset, bytes, mode).await;
        self.settle(result).await
    }

    async fn flush(&self) -> Result<()> {
        if !self.image.writable.load(Ordering::Acquire) {
            return Ok(());
        }
        // INV REQ-DROP-1: what a dropped future left going on is over before the flush is.
        if self.image.orphans.any() {
            self.image.changing.settled(0, u64::MAX).await;
        }
        self.image.commit().await
    }

    async fn truncate(&self, request: TruncateRequest) -> Result<()> {
        self.image.truncate(request).await
    }

    async fn allocated_size(&self) -> Result<Option<u64>> {
        self.image.file.driver().allocated_size().await
    }

    async fn info(&self) -> Result<DriverInfo> {
        let cluster_size = self.image.cluster_size();
        Ok(DriverInfo {
            cluster_size,
            subcluster_size: self.image.subcluster_size(),
            vm_state_offset: self.image.vm_state_offset(),
            is_dirty: self.header().incompatible.contains(Incompatible::DIRTY),
            unallocated_reads_zero: true,
        })
    }

    async fn specific_info(&self) -> Result<Option<SpecificInfo>> {
        let header = self.header();
        let crypto = self.image.crypto.as_ref();
        let bitmaps = self.image.bitmaps.set.list();
        let in_use = self.image.writable.load(Ordering::Acquire);
        Ok(Some(info::specific_info(&header, crypto, &bitmaps, in_use)))
    }

    async fn snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        // The table that is being read may be on its way to be free.
        let _epoch = self.image.epochs.enter();
        let table = snapshot::read_entries(&self.header(), &self.image.file).await?;
        let info = |s: snapshot::Snapshot| SnapshotInfo {
            id: s.id,
            name: s.name,
            vm_state_size: s.vm_state_size,
            date_sec: s.date_sec,
            date_nsec: s.date_nsec,
            vm_clock_nsec: s.vm_clock_nsec,
            icount: s.icount,
        };
        Ok(table.snapshots.into_iter().map(info).collect())
    }

    async fn snapshot_create(&self, request: SnapshotRequest) -> Result<()> {
        let result = self.image.snapshot_create(request).await;
        self.settle(result).await
    }

    async fn snapshot_goto(&self, which: &SnapshotSelector) -> Result<()> {
        let result = self.image.snapshot_goto(which).await;
        self.settle(result).await
    }

    async fn snapshot_delete(&self, which: &SnapshotSelector) -> Result<()> {
        let result = self.image.snapshot_delete(which).await;
        self.settle(result).await
    }

    async fn snapshot_load(&self, which: &SnapshotSelector) -> Result<()> {
        self.image.snapshot_load(which).await
    }

    async fn load_vmstate(&self, offset: u64, buf: IoBufMut) -> Result<IoBufMut> {
        let result = self.image.load_vm_state(offset, buf).await;
        self.settle(result).await
    }

    async fn save_vmstate(&self, offset: u64, buf: IoBuf) -> Result<()> {
        let result = self.image.save_vm_state(offset, buf).await;
        self.settle(result).await
    }

    async fn amend(&self, options: Options, progress: &AmendProgress) -> Result<()> {
        let result = self.image.amend(options, progress).await;
        self.settle(result).await
    }

    fn dirty_bitmaps(&self) -> Option<Arc<DirtyBitmaps>> {
        Some(self.image.bitmaps.set.clone())
    }

    fn supports_persistent_bitmaps(&self) -> bool {
        self.image.version() >= 3
    }

    async fn check_bitmap(&self, name: &str, granularity: u64) -> Result<()> {
        self.image.check_bitmap(name, granularity)
    }

    async fn outdate_bitmaps(&self) -> Result<()> {
        self.image.outdate_bitmaps().await
    }

    fn backing_name(&self) -> Option<BackingName> {
        self.header().backing
    }

    async fn check(&self, fix: CheckFix) -> Result<CheckResult> {
        self.image.check(fix).await
    }

    async fn reopen_prepare(&self, request: &mut ReopenRequest) -> Result<Box<dyn PreparedReopen>> {
        struct Prepared {
            image: Arc<Image>,
            writable: bool,
            runtime: RuntimeOptions,
        }
        impl PreparedReopen for Prepared {
            fn commit(self: Box<Self>) {
                self.image.set_runtime(self.runtime);
                self.image.writable.store(self.writable, Ordering::Release);
            }
        }
        let mut runtime = self.image.runtime().clone();
        runtime.take(&mut request.options, &self.header())?;
        if let Some(OptionValue::Str(reference)) = request.options.get("backing") {
            let text = format!("Cannot find device='' nor node-name='{reference}'");
            return Err(BlockError::new(ErrorKind::NotFound, text));
        }
        crypto::check_reopen(&mut request.options, self.header().crypt_method)?;
        self.image.prepare_runtime(&runtime).await?;
        let writable = !request.read_only;
        if writable && !self.image.writable.load(Ordering::Acquire) {
            if self.image.shows_snapshot.load(Ordering::Acquire) {
                // Its changes would land in the active layer's tables.
                let text = "An image that shows a snapshot can't be made writable";
                return Err(BlockError::unsupported(text));
            }
            let checks = runtime.overlap_checks;
            self.image.prepare_writing_with(checks).await?;
        }
        if !writable && self.image.writable.load(Ordering::Acquire) {
            self.image.tasks.wait_idle().await;
            self.image.store_bitmaps().await?;
            self.image.commit().await?;
            // Once more for what the first has freed: a reader may have ended since, and later nothing can be written.
            self.image.commit().await?;
            self.image.cut_ahead().await;
        }
        let image = self.image.clone();
        Ok(Box::new(Prepared {
            image,
            writable,
            runtime,
        }))
    }

    async fn close(&self) -> Result<()> {
        self.image.tasks.wait_idle().await;
        if !self.image.writable.load(Ordering::Acquire) {
            return Ok(());
        }
        if self.image.corrupt.load(Ordering::Acquire) {
            // What is not written yet stays so: it was made from metadata that can't be trusted.
            return self.image.mark_corrupt_on_disk().await;
        }
        let stored = self.image.store_bitmaps().await;
        self.image.commit().await.and(stored)?;
        self.image.cut_ahead().await;
        // Compressed data ends anywhere. Programs that read past the host's cache want whole sectors, but nothing is lost without.
        if let Err(e) = self.image.file.node().fill_last_sector().await {
            tracing::debug!("the file does not end with a sector: {e}");
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
