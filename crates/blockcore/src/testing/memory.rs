// SPDX-License-Identifier: MIT OR Apache-2.0
//! `memory`: a protocol driver over a byte vector. It grows by being written to, as a file does.

use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;

use crate::buffer::{IoBuf, IoBufMut, slice_is_zero};
use crate::driver::{BlockDriver, DriverFactory, ReadFlags, TruncateRequest, WriteFlags};
use crate::error::{BlockError, Result};
use crate::node::{Node, NodeConfig, NodeFlags, SECTOR_BYTES};
use crate::open::OpenContext;
use crate::options::Options;
use crate::status::{BlockStatus, StatusFlags, StatusMode};

/// A disk in memory. Clones share the bytes, so that a test can look at, damage or keep them while the driver is in use.
#[derive(Clone, Debug, Default)]
pub struct MemoryDriver {
    bytes: Arc<Mutex<Vec<u8>>>,
    /// Whether [`BlockDriver::read_nowait`] serves reads.
    pub nowait: bool,
    /// How many bytes there is room for: what would make the disk longer fails with ENOSPC.
    pub room: Option<u64>,
    /// What bytes hold that appear when the disk becomes longer and are not written.
    pub grows_with: u8,
}

impl MemoryDriver {
    /// A disk with these bytes on it.
    pub fn new(bytes: Vec<u8>) -> MemoryDriver {
        MemoryDriver {
            bytes: Arc::new(Mutex::new(bytes)),
            nowait: true,
            room: None,
            grows_with: 0,
        }
    }

    pub(super) fn check_room(&self, bytes: u64) -> Result<()> {
        match self.room {
            Some(room) if bytes > room => Err(BlockError::from_errno(libc::ENOSPC)),
            _ => Ok(()),
        }
    }

    /// The bytes as they are now.
    pub fn snapshot(&self) -> Vec<u8> {
        self.lock().clone()
    }

    /// Changes the bytes behind everybody's back.
    pub fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes
            .lock()
            .expect("no code panics while it holds this lock")
    }

    /// A node over this disk.
    ///
    /// # Errors
    /// None that a test has to expect.
    pub async fn into_node(self, flags: NodeFlags) -> Result<Arc<Node>> {
        Node::new(
            Box::new(self),
            NodeConfig {
                filename: "memory".to_owned(),
                flags,
                ..NodeConfig::default()
            },
        )
        .await
    }
}

#[async_trait]
impl BlockDriver for MemoryDriver {
    fn format_name(&self) -> &'static str {
        "memory"
    }

    fn is_protocol(&self) -> bool {
        true
    }

    fn grows_zeroed(&self) -> bool {
        self.grows_with == 0
    }

    async fn length(&self) -> Result<u64> {
        Ok(self.lock().len() as u64)
    }

    fn read_nowait(&self, offset: u64, buf: &mut [u8]) -> bool {
        let bytes = self.lock();
        let Some(src) = bytes.get(offset as usize..offset as usize + buf.len()) else {
            return false;
        };
        if self.nowait {
            buf.copy_from_slice(src);
        }
        self.nowait
    }

    async fn preadv(&self, offset: u64, mut buf: IoBufMut, _flags: ReadFlags) -> Result<IoBufMut> {
        let bytes = self.lock();
        let start = (offset as usize).min(bytes.len());
        let src = &bytes[start..(start + buf.len()).min(bytes.len())];
        buf.copy_from_slice(0, src);
        let (have, want) = (src.len(), buf.len());
        buf.fill_range(have, want - have, 0);
        Ok(buf)
    }

    async fn pwritev(&self, offset: u64, buf: IoBuf, _flags: WriteFlags) -> Result<()> {
        self.check_room(offset.saturating_add(buf.len() as u64))?;
        let mut bytes = self.lock();
        let (start, end) = (offset as usize, offset as usize + buf.len());
        if bytes.len() < end {
            bytes.resize(end, self.grows_with);
        }
        buf.copy_to_slice(0, &mut bytes[start..end]);
        Ok(())
    }

    fn supported_zero_flags(&self) -> WriteFlags {
        WriteFlags::MAY_UNMAP | WriteFlags::NO_FALLBACK
    }

    async fn pwrite_zeroes(&self, offset: u64, bytes: u64, _flags: WriteFlags) -> Result<()> {
        self.check_room(offset.saturating_add(bytes))?;
        self.pwritev(offset, IoBuf::zeroes(bytes as usize), WriteFlags::empty())
            .await
    }

    async fn pdiscard(&self, offset: u64, bytes: u64) -> Result<()> {
        let mut all = self.lock();
        let end = (offset + bytes).min(all.len() as u64) as usize;
        let start = (offset as usize).min(end);
        all[start..end].fill(0);
        Ok(())
    }

    async fn block_status(
        &self,
        offset: u64,
        bytes: u64,
        _mode: StatusMode,
    ) -> Result<BlockStatus> {
        let all = self.lock();
        let start = (offset as usize).min(all.len());
        let range = &all[start..(start + bytes as usize).min(all.len())];
        if range.is_empty() {
            return Ok(BlockStatus::new(StatusFlags::ZERO, bytes));
        }
        let mut sectors = range.chunks(SECTOR_BYTES as usize).map(slice_is_zero);
        let first = sectors.next().unwrap_or(true);
        let same = 1 + sectors.take_while(|zero| *zero == first).count() as u64;
        let flags = if first {
            StatusFlags::ZERO
        } else {
            StatusFlags::DATA
        };
        Ok(BlockStatus::new(flags, (same * SECTOR_BYTES).min(bytes)))
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn truncate(&self, request: TruncateRequest) -> Result<()> {
        self.check_room(request.bytes)?;
        self.lock().resize(request.bytes as usize, self.grows_with);
        Ok(())
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// Opens `memory:` names: the same name is the same disk, within one factory.
#[derive(Debug, Default)]
pub struct MemoryFactory {
    disks: Mutex<std::collections::HashMap<String, MemoryDriver>>,
    room: Option<u64>,
}

impl MemoryFactory {
    /// A factory whose disks have room for so many bytes each.
    pub fn with_room(bytes: u64) -> MemoryFactory {
        MemoryFactory {
            room: Some(bytes),
            ..MemoryFactory::default()
        }
    }

    /// The disk of a name; made, empty, if it is not there yet.
    pub fn disk(&self, name: &str) -> MemoryDriver {
        let mut disks = self
            .disks
            .lock()
            .expect("no code panics while it holds this lock");
        disks
            .entry(name.to_owned())
            .or_insert_with(|| MemoryDriver {
                room: self.room,
                ..MemoryDriver::new(Vec::new())
            })
            .clone()
    }
}

#[async_trait]
impl DriverFactory for MemoryFactory {
    fn format_name(&self) -> &'static str {
        "memory"
    }

    fn protocol_name(&self) -> Option<&'static str> {
        Some("memory")
    }

    async fn open(
        &self,
        _ctx: &OpenContext<'_>,
        options: &mut Options,
    ) -> Result<Box<dyn BlockDriver>> {
        let name = options.take_str("filename").unwrap_or_default();
        Ok(Box::new(self.disk(&name)))
    }

    async fn create(
        &self,
        _ctx: &crate::open::CreateContext<'_>,
        filename: &str,
        mut options: Options,
    ) -> Result<()> {
        let size = options.take_size("size")?.unwrap_or(0);
        let name = filename.strip_prefix("memory:").unwrap_or(filename);
        *self.disk(name).lock() = vec![0; size as usize];
        Ok(())
    }
}
