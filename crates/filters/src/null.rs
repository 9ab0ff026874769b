// SPDX-License-Identifier: MIT OR Apache-2.0
//! `null-co` and `null-aio`: a disk that forgets what is written, for measuring what lies above it. `QEMU: block/null.c`.
//!
//! Options: `size` (1 GiB), `latency-ns` (how long a request takes; 0), `read-zeroes` (whether reads give zeroes; off: they leave the
//! buffer as it is, which costs nothing).

use std::time::Duration;

use async_trait::async_trait;
use blockcore::{
    BlockDriver, BlockError, BlockStatus, CreateContext, DriverFactory, IoBuf, IoBufMut,
    OpenContext, Options, ReadFlags, Result, StatusFlags, StatusMode, WriteFlags,
};

const DEFAULT_BYTES: u64 = 1 << 30;

/// A disk that keeps nothing.
#[derive(Clone, Copy, Debug)]
pub struct NullDriver {
    name: &'static str,
    bytes: u64,
    latency: Duration,
    read_zeroes: bool,
}

impl NullDriver {
    async fn take_time(&self) {
        if !self.latency.is_zero() {
            tokio::time::sleep(self.latency).await;
        }
    }
}

#[async_trait]
impl BlockDriver for NullDriver {
    fn format_name(&self) -> &'static str {
        self.name
    }

    fn is_protocol(&self) -> bool {
        true
    }

    fn strong_options(&self) -> &'static [&'static str] {
        &["read-zeroes", "size"]
    }

    fn exact_filename(&self) -> Option<&'static str> {
        Some(match self.name {
            "null-aio" => "null-aio://",
            _ => "null-co://",
        })
    }

    async fn length(&self) -> Result<u64> {
        Ok(self.bytes)
    }

    fn read_nowait(&self, _offset: u64, buf: &mut [u8]) -> bool {
        if self.read_zeroes {
            buf.fill(0);
        }
        self.latency.is_zero()
    }

    async fn preadv(&self, _offset: u64, mut buf: IoBufMut, _flags: ReadFlags) -> Result<IoBufMut> {
        self.take_time().await;
        if self.read_zeroes {
            buf.fill(0);
        }
        Ok(buf)
    }

    async fn pwritev(&self, _offset: u64, _buf: IoBuf, _flags: WriteFlags) -> Result<()> {
        self.take_time().await;
        Ok(())
    }

    fn supported_write_flags(&self) -> WriteFlags {
        WriteFlags::FUA
    }

    async fn block_status(
        &self,
        offset: u64,
        bytes: u64,
        _mode: StatusMode,
    ) -> Result<BlockStatus> {
        let mut flags = StatusFlags::OFFSET_VALID;
        flags.set(StatusFlags::ZERO, self.read_zeroes);
        let mut status = BlockStatus::new(flags, bytes);
        status.map = offset;
        Ok(status)
    }

    async fn flush(&self) -> Result<()> {
        self.take_time().await;
        Ok(())
    }

    async fn allocated_size(&self) -> Result<Option<u64>> {
        Ok(Some(0))
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// Opens `null-co://` or `null-aio://`. QEMU has two drivers to measure its two kinds of callers; to us they are one under two names.
#[derive(Clone, Copy, Debug)]
pub struct NullFactory {
    name: &'static str,
}

impl NullFactory {
    /// The driver `null-co`.
    pub const CO: NullFactory = NullFactory { name: "null-co" };
    /// The driver `null-aio`.
    pub const AIO: NullFactory = NullFactory { name: "null-aio" };
}

#[async_trait]
impl DriverFactory for NullFactory {
    fn format_name(&self) -> &'static str {
        self.name
    }

    fn protocol_name(&self) -> Option<&'static str> {
        Some(self.name)
    }

    async fn open(
        &self,
        _ctx: &OpenContext<'_>,
        options: &mut Options,
    ) -> Result<Box<dyn BlockDriver>> {
        // A name comes without its prefix; anything else was given as an option, which is none of this driver's.
        if options
            .get_str("filename")
            .is_some_and(|name| name.starts_with("//"))
        {
            let name = options.take_str("filename").unwrap_or_default();
            if name != "//" {
                return Err(BlockError::invalid(format!(
                    "The only allowed filename for this driver is '{}://'",
                    self.name
                )));
            }
        }
        let latency = options.take_str("latency-ns");
        let latency = match latency.map(|text| text.parse::<u64>()) {
            None => 0,
            Some(Ok(ns)) => ns,
            Some(Err(_)) => return Err(BlockError::invalid("latency-ns is invalid")),
        };
        Ok(Box::new(NullDriver {
            name: self.name,
            bytes: options.take_size("size")?.unwrap_or(DEFAULT_BYTES),
            latency: Duration::from_nanos(latency),
            read_zeroes: options.take_bool("read-zeroes")?.unwrap_or(false),
        }))
    }

    async fn create(&self, _ctx: &CreateContext<'_>, _name: &str, _options: Options) -> Result<()> {
        Err(BlockError::unsupported(format!(
            "Protocol driver '{}' does not support image creation",
            self.name
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockcore::{OpenOptions, Registry};

    fn registry() -> Registry {
        let mut registry = Registry::new();
        registry.register(NullFactory::CO);
        registry.register(NullFactory::AIO);
        registry
    }

    #[tokio::test]
    async fn it_forgets_what_is_written_and_reads_zeroes_if_told_to() {
        let disk = OpenOptions::new()
            .option("driver", "null-co")
            .option("size", "1M")
            .option("read-zeroes", "on")
            .open_options(&registry())
            .await
            .unwrap();
        assert_eq!(disk.length(), 1 << 20);
        disk.pwritev(0, IoBuf::from(vec![1; 512]), WriteFlags::FUA)
            .await
            .unwrap();
        disk.pwrite_zeroes(512, 512, WriteFlags::empty())
            .await
            .unwrap();
        let buf = IoBufMut::from(vec![3; 512]);
        let read = disk.preadv(0, buf, ReadFlags::empty()).await.unwrap();
        assert!(read.is_zero());
        disk.close().await.unwrap();
    }

    #[tokio::test]
    async fn only_its_own_name_opens_it() {
        let open = |name: &'static str| async move {
            OpenOptions::new()
                .format("null-co")
                .open(&registry(), name)
                .await
        };
        assert_eq!(open("null-co://").await.unwrap().length(), DEFAULT_BYTES);
        let other = OpenOptions::new().format("null-aio");
        let other = other.open(&registry(), "null-aio://").await.unwrap();
        assert_eq!(other.root().format_name(), "null-aio");
        assert_eq!(
            open("null-co://x").await.unwrap_err().text(),
            "The only allowed filename for this driver is 'null-co://'"
        );
    }
}
