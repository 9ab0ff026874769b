// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`RawDriver`]: the format that is none: a request goes to the file as it is, or moved by the option `offset`. `QEMU: block/raw-format.c`.
//!
//! A raw image whose format was guessed is a danger: a guest that writes another format's header into its first sector makes the next
//! guess find that format, with any backing file it likes. So such a write is refused.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use blockcore::{
    BlockDriver, BlockError, BlockLimits, BlockStatus, Child, DebugEvent, DriverInfo, IoBuf,
    IoBufMut, MAX_LENGTH_BYTES, Node, OptionValue, Options, Perm, Permissions, PreparedReopen,
    ReadFlags, Registry, ReopenRequest, Result, SECTOR_BYTES, StatusFlags, StatusMode,
    TruncateRequest, WriteFlags,
};

use crate::file::FileDriver;
use crate::raw_open::check_range;

/// A raw image.
#[derive(Debug)]
pub struct RawDriver {
    pub(crate) file: Child,
    pub(crate) range: Arc<Range>,
    /// Nothing is forbidden to others.
    pub(crate) force_share: bool,
    /// The drivers that guessed the format, if they did.
    pub(crate) probed_by: Option<Registry>,
}

/// Which part of the file is the image. Changes only in `reopen`, with no request in flight.
#[derive(Debug)]
pub(crate) struct Range {
    offset: AtomicU64,
    /// `NO_SIZE`: up to the end of the file.
    size: AtomicU64,
}

const NO_SIZE: u64 = u64::MAX;

impl Range {
    pub fn new(offset: u64, size: Option<u64>) -> Range {
        Range {
            offset: offset.into(),
            size: size.unwrap_or(NO_SIZE).into(),
        }
    }

    fn set(&self, offset: u64, size: Option<u64>) {
        self.offset.store(offset, Ordering::Release);
        self.size.store(size.unwrap_or(NO_SIZE), Ordering::Release);
    }

    /// Where the image begins in the file, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset.load(Ordering::Acquire)
    }

    /// The length in bytes, where the option `size` says it.
    pub fn fixed_size(&self) -> Option<u64> {
        let size = self.size.load(Ordering::Acquire);
        (size != NO_SIZE).then_some(size)
    }
}

impl RawDriver {
    /// Whether the first sector may be overwritten with what `buf` begins with.
    fn check_first_sector(&self, offset: u64, buf: &IoBuf) -> Result<()> {
        let Some(registry) = &self.probed_by else {
            return Ok(());
        };
        if offset >= SECTOR_BYTES || buf.is_empty() {
            return Ok(());
        }
        // Requests are aligned to sectors (see `limits`), so all of it is there.
        let mut head = [0; SECTOR_BYTES as usize];
        buf.copy_to_slice(0, &mut head);
        match registry.probe(&head) {
            Some(driver) if driver.format_name() != "raw" => {
                Err(BlockError::from_errno(libc::EPERM))
            }
            _ => Ok(()),
        }
    }

    /// What to ask of the file when the parent asks for `parent`.
    fn permissions_below(&self, parent: Permissions) -> Permissions {
        let counts_on_length = self.range.offset() > 0 || self.range.fixed_size().is_some();
        file_permissions(parent, counts_on_length && !self.force_share)
    }

    /// Whether a range that the caller checked against the length lies in the file's part that is the image.
    fn shift(&self, offset: u64, bytes: u64) -> Result<u64> {
        if let Some(size) = self.range.fixed_size()
            && offset.checked_add(bytes).is_none_or(|end| end > size)
        {
            return Err(BlockError::from_errno(libc::ENOSPC));
        }
        offset
            .checked_add(self.range.offset())
            .ok_or_else(|| BlockError::from_errno(libc::EINVAL))
    }
}

/// What to ask of the file: where a part of it is the image, nobody may change the length that the part was checked against.
pub(crate) fn file_permissions(parent: Permissions, counts_on_length: bool) -> Permissions {
    let mut wanted = parent;
    wanted.shared.set(
        Perm::RESIZE,
        wanted.shared.contains(Perm::RESIZE) && !counts_on_length,
    );
    wanted
}

/// What a reopen makes of an option: what is asked for, `null` for taking it back, or what holds `now`.
fn reopened(options: &mut Options, key: &str, now: Option<u64>) -> Result<Option<u64>> {
    match options.get(key) {
        None => Ok(now),
        Some(OptionValue::Null) => {
            options.take_str(key);
            Ok(None)
        }
        Some(_) => options.take_size(key),
    }
}

#[async_trait]
impl BlockDriver for RawDriver {
    fn format_name(&self) -> &'static str {
        "raw"
    }

    fn children(&self) -> Vec<&Child> {
        vec![&self.file]
    }

    fn strong_options(&self) -> &'static [&'static str] {
        &["offset", "size"]
    }

    /// A part of a file grows by what the file has there.
    fn grows_zeroed(&self) -> bool {
        self.range.fixed_size().is_none() && self.file.driver().grows_zeroed()
    }

    fn limits(&self) -> BlockLimits {
        let file = self.file.limits();
        let sector = match self.probed_by {
            Some(_) => SECTOR_BYTES as u32,
            None => 1,
        };
        BlockLimits {
            request_alignment: sector,
            pwrite_zeroes_alignment: sector,
            pdiscard_alignment: sector,
            mem_alignment: file.mem_alignment,
            opt_transfer: file.opt_transfer,
            ..BlockLimits::default()
        }
    }

    async fn length(&self) -> Result<u64> {
        let file_length = self.file.refresh_length().await?;
        match self.range.fixed_size() {
            Some(size) => Ok(size),
            // The file may have shrunk behind our back.
            None => Ok(file_length.saturating_sub(self.range.offset())),
        }
    }

    fn read_nowait(&self, offset: u64, buf: &mut [u8]) -> bool {
        match self.shift(offset, buf.len() as u64) {
            Ok(at) => self.file.read_nowait(at, buf),
            Err(_) => false,
        }
    }

    async fn preadv(&self, offset: u64, buf: IoBufMut, flags: ReadFlags) -> Result<IoBufMut> {
        let at = self.shift(offset, buf.len() as u64)?;
        self.file.preadv(at, buf, flags).await
    }

    async fn pwritev(&self, offset: u64, buf: IoBuf, flags: WriteFlags) -> Result<()> {
        self.check_first_sector(offset, &buf)?;
        let at = self.shift(offset, buf.len() as u64)?;
        self.file.pwritev(at, buf, flags).await
    }

    async fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> Result<()> {
        let at = self.shift(offset, bytes)?;
        self.file.pwrite_zeroes(at, bytes, flags).await
    }

    async fn reserve_storage(&self, offset: u64, bytes: u64) -> Result<()> {
        let at = self.shift(offset, bytes)?;
        self.file.reserve_storage(at, bytes).await
    }

    async fn pdiscard(&self, offset: u64, bytes: u64) -> Result<()> {
        let at = self.shift(offset, bytes)?;
        self.file.pdiscard(at, bytes).await
    }

    async fn block_status(
        &self,
        offset: u64,
        bytes: u64,
        _mode: StatusMode,
    ) -> Result<BlockStatus> {
        Ok(BlockStatus::mapped(
            StatusFlags::RAW,
            bytes,
            offset + self.range.offset(),
            self.file.node().clone(),
        ))
    }

    fn supported_write_flags(&self) -> WriteFlags {
        WriteFlags::FUA | WriteFlags::REGISTERED_BUF | WriteFlags::UNCHANGED
    }

    fn supported_zero_flags(&self) -> WriteFlags {
        WriteFlags::FUA | WriteFlags::MAY_UNMAP | WriteFlags::NO_FALLBACK
    }

    async fn truncate(&self, request: TruncateRequest) -> Result<()> {
        if self.range.fixed_size().is_some() {
            return Err(BlockError::unsupported(
                "Cannot resize fixed-size raw disks",
            ));
        }
        match request.bytes.checked_add(self.range.offset()) {
            Some(bytes) if bytes <= MAX_LENGTH_BYTES => {
                self.file
                    .truncate(TruncateRequest { bytes, ..request })
                    .await
            }
            _ => Err(BlockError::invalid(
                "Disk size too large for the chosen offset",
            )),
        }
    }

    async fn allocated_size(&self) -> Result<Option<u64>> {
        self.file.driver().allocated_size().await
    }

    async fn info(&self) -> Result<DriverInfo> {
        self.file.driver().info().await
    }

    async fn copy_range_from(
        &self,
        source: &Node,
        src_offset: u64,
        dst_offset: u64,
        bytes: u64,
    ) -> Result<()> {
        let at = self.shift(dst_offset, bytes)?;
        if self.probed_by.is_some() && dst_offset < SECTOR_BYTES {
            return Err(BlockError::from_errno(libc::ENOTSUP));
        }
        let to = self.file.driver();
        match source.driver().as_any().downcast_ref::<RawDriver>() {
            Some(raw) => {
                let from = raw.shift(src_offset, bytes)?;
                to.copy_range_from(&raw.file, from, at, bytes).await
            }
            None if source.driver().as_any().is::<FileDriver>() => {
                to.copy_range_from(source, src_offset, at, bytes).await
            }
            None => Err(BlockError::from_errno(libc::ENOTSUP)),
        }
    }

    async fn reopen_prepare(&self, request: &mut ReopenRequest) -> Result<Box<dyn PreparedReopen>> {
        struct Prepared(Arc<Range>, u64, Option<u64>);
        impl PreparedReopen for Prepared {
            fn commit(self: Box<Self>) {
                self.0.set(self.1, self.2);
            }
        }
        let options = &mut request.options;
        let offset = reopened(options, "offset", Some(self.range.offset()))?.unwrap_or(0);
        let size = reopened(options, "size", self.range.fixed_size())?;
        check_range(offset, size, self.file.refresh_length().await?)?;
        Ok(Box::new(Prepared(self.range.clone(), offset, size)))
    }

    fn wants_debug_events(&self) -> bool {
        self.file.wants_debug_events()
    }

    async fn debug_event(&self, event: DebugEvent) {
        self.file.debug_event(event).await;
    }

    /// Raw has no use of its own for the file: what its parent does and puts up with is what the file's locks say.
    async fn set_permissions(&self, permissions: Permissions) -> Result<()> {
        let wanted = self.permissions_below(permissions);
        self.file.driver().set_permissions(wanted).await
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
