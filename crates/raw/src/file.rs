// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`FileDriver`]: the protocol drivers `file` and `host_device`. `QEMU: block/file-posix.c`.

use std::sync::Arc;

use async_trait::async_trait;
use blockcore::{
    BlockDriver, BlockStatus, IoBuf, IoBufMut, ReadFlags, Result, StatusFlags, StatusMode,
    TruncateRequest, WriteFlags,
};

use crate::engine::pool;
use crate::host::HostFile;
use crate::status;

/// An open file or device of the host.
#[derive(Debug)]
pub struct FileDriver {
    host: Arc<HostFile>,
}

impl FileDriver {
    pub(crate) fn new(host: HostFile) -> FileDriver {
        FileDriver {
            host: Arc::new(host),
        }
    }
}

#[async_trait]
impl BlockDriver for FileDriver {
    fn format_name(&self) -> &'static str {
        "file"
    }

    fn is_protocol(&self) -> bool {
        true
    }

    async fn length(&self) -> Result<u64> {
        let host = self.host.clone();
        pool::run(move || host.length()).await
    }

    fn read_nowait(&self, offset: u64, buf: &mut [u8]) -> bool {
        self.host.read_nowait(offset, buf)
    }

    async fn preadv(&self, offset: u64, mut buf: IoBufMut, _flags: ReadFlags) -> Result<IoBufMut> {
        let host = self.host.clone();
        pool::run(move || host.read(offset, &mut buf).map(|()| buf)).await
    }

    async fn pwritev(&self, offset: u64, buf: IoBuf, _flags: WriteFlags) -> Result<()> {
        let host = self.host.clone();
        pool::run(move || host.write(offset, &buf)).await
    }

    fn supported_zero_flags(&self) -> WriteFlags {
        WriteFlags::MAY_UNMAP | WriteFlags::NO_FALLBACK
    }

    async fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> Result<()> {
        let host = self.host.clone();
        pool::run(move || host.zero(offset, bytes, flags.contains(WriteFlags::MAY_UNMAP))).await
    }

    async fn pdiscard(&self, offset: u64, bytes: u64) -> Result<()> {
        let host = self.host.clone();
        pool::run(move || host.discard(offset, bytes)).await
    }

    async fn block_status(&self, offset: u64, bytes: u64, mode: StatusMode) -> Result<BlockStatus> {
        if mode == StatusMode::AllocationOnly {
            let mut status = BlockStatus::new(StatusFlags::DATA | StatusFlags::OFFSET_VALID, bytes);
            status.map = offset;
            return Ok(status);
        }
        let host = self.host.clone();
        pool::run(move || status::status(&host, offset, bytes, 1)).await
    }

    async fn flush(&self) -> Result<()> {
        let host = self.host.clone();
        pool::run(move || host.sync_data()).await
    }

    async fn truncate(&self, request: TruncateRequest) -> Result<()> {
        let host = self.host.clone();
        pool::run(move || host.set_length(request.bytes)).await
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
