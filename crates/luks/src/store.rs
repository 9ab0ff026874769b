// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`FileStore`]: a header at the beginning of a file.

use async_trait::async_trait;
use blockcore::{Child, IoBuf, IoBufMut, ReadFlags, Result, WriteFlags};

use crate::volume::HeaderStore;

/// A header at the beginning of a file.
pub(crate) struct FileStore<'a>(pub &'a Child);

#[async_trait]
impl HeaderStore for FileStore<'_> {
    async fn read(&self, offset: u64, bytes: usize) -> Result<Vec<u8>> {
        let buf = IoBufMut::zeroed(bytes);
        let read = self.0.preadv(offset, buf, ReadFlags::empty()).await?;
        Ok(read.to_vec())
    }

    async fn write(&self, offset: u64, bytes: Vec<u8>) -> Result<()> {
        self.0
            .pwritev(offset, IoBuf::from(bytes), WriteFlags::empty())
            .await
    }

    async fn flush(&self) -> Result<()> {
        self.0.flush().await
    }
}
