// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`RawDriver`]: the format that is none. Every request goes to the file as it is.

use async_trait::async_trait;
use blockcore::{
    BlockDriver, BlockLimits, BlockStatus, Child, CreateContext, CreateOption, DriverFactory,
    DriverInfo, IoBuf, IoBufMut, OpenContext, Options, ReadFlags, Result, StatusFlags, StatusMode,
    TruncateRequest, WriteFlags,
};

use crate::file_open::FileFactory;

/// A raw image.
#[derive(Debug)]
pub struct RawDriver {
    file: Child,
}

#[async_trait]
impl BlockDriver for RawDriver {
    fn format_name(&self) -> &'static str {
        "raw"
    }

    fn children(&self) -> Vec<&Child> {
        vec![&self.file]
    }

    fn limits(&self) -> BlockLimits {
        BlockLimits {
            request_alignment: self.file.limits().request_alignment,
            ..self.file.limits()
        }
    }

    async fn length(&self) -> Result<u64> {
        self.file.refresh_length().await
    }

    fn read_nowait(&self, offset: u64, buf: &mut [u8]) -> bool {
        self.file.read_nowait(offset, buf)
    }

    async fn preadv(&self, offset: u64, buf: IoBufMut, flags: ReadFlags) -> Result<IoBufMut> {
        self.file.preadv(offset, buf, flags).await
    }

    async fn pwritev(&self, offset: u64, buf: IoBuf, flags: WriteFlags) -> Result<()> {
        self.file.pwritev(offset, buf, flags).await
    }

    async fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> Result<()> {
        self.file.pwrite_zeroes(offset, bytes, flags).await
    }

    async fn pdiscard(&self, offset: u64, bytes: u64) -> Result<()> {
        self.file.pdiscard(offset, bytes).await
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
            offset,
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
        self.file.truncate(request).await
    }

    async fn allocated_size(&self) -> Result<Option<u64>> {
        self.file.driver().allocated_size().await
    }

    async fn info(&self) -> Result<DriverInfo> {
        self.file.driver().info().await
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// Opens and creates raw images.
#[derive(Clone, Copy, Debug, Default)]
pub struct RawFactory;

#[async_trait]
impl DriverFactory for RawFactory {
    fn format_name(&self) -> &'static str {
        "raw"
    }

    fn probe(&self, _head: &[u8]) -> u32 {
        1
    }

    async fn open(
        &self,
        ctx: &OpenContext<'_>,
        _options: &mut Options,
    ) -> Result<Box<dyn BlockDriver>> {
        let file = ctx.take_file()?;
        Ok(Box::new(RawDriver { file }))
    }

    fn create_options(&self) -> &'static [CreateOption] {
        FileFactory.create_options()
    }

    async fn create(
        &self,
        ctx: &CreateContext<'_>,
        filename: &str,
        options: Options,
    ) -> Result<()> {
        ctx.create_file(filename, options).await?.close().await
    }
}
