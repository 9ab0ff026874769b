// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`FileFactory`]: options, opening and creating of files. `QEMU: raw_open_common`, `raw_co_create`.

use std::os::fd::OwnedFd;

use async_trait::async_trait;
use blockcore::{
    BlockDriver, BlockError, CreateContext, CreateOption, DriverFactory, OpenContext, OptionKind,
    Options, Result, strerror,
};
use rustix::fs::{FileType, Mode, OFlags};

use crate::engine::pool;
use crate::file::FileDriver;
use crate::host::{HostFile, HostKind, retry};

/// Opens and creates files.
#[derive(Clone, Copy, Debug, Default)]
pub struct FileFactory;

const CREATE_OPTIONS: &[CreateOption] = &[
    CreateOption {
        name: "preallocation",
        kind: OptionKind::String,
        help: "Preallocation mode (allowed values: off, falloc, full)",
        default: None,
    },
    CreateOption {
        name: "size",
        kind: OptionKind::Size,
        help: "Virtual disk size",
        default: None,
    },
];

fn open_host(filename: &str, flags: OFlags) -> std::io::Result<HostFile> {
    let fd: OwnedFd = retry(|| {
        rustix::fs::open(
            filename,
            flags | OFlags::CLOEXEC,
            Mode::from_raw_mode(0o644),
        )
    })?;
    let kind = match FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) {
        FileType::BlockDevice => HostKind::BlockDevice,
        FileType::CharacterDevice => HostKind::CharDevice,
        FileType::Directory => return Err(std::io::Error::from_raw_os_error(libc::EISDIR)),
        _ => HostKind::File,
    };
    Ok(HostFile::new(fd, kind))
}

fn could_not(what: &str, filename: &str, e: BlockError) -> BlockError {
    let text = format!("Could not {what} '{filename}': {}", strerror(e.errno()));
    e.message(text)
}

#[async_trait]
impl DriverFactory for FileFactory {
    fn format_name(&self) -> &'static str {
        "file"
    }

    fn protocol_name(&self) -> Option<&'static str> {
        Some("file")
    }

    fn needs_filename(&self) -> bool {
        true
    }

    fn probe_path(&self, _path: &str) -> u32 {
        1
    }

    async fn open(
        &self,
        ctx: &OpenContext<'_>,
        options: &mut Options,
    ) -> Result<Box<dyn BlockDriver>> {
        let filename = options.take_str("filename").unwrap_or_default();
        if filename.is_empty() {
            return Err(BlockError::invalid(
                "The 'file' block driver requires a file name",
            ));
        }
        let access = if ctx.flags().read_only {
            OFlags::RDONLY
        } else {
            OFlags::RDWR
        };
        let name = filename.clone();
        let host = pool::run(move || open_host(&name, access))
            .await
            .map_err(|e| could_not("open", &filename, e))?;
        Ok(Box::new(FileDriver::new(host)))
    }

    fn create_options(&self) -> &'static [CreateOption] {
        CREATE_OPTIONS
    }

    async fn create(
        &self,
        _ctx: &CreateContext<'_>,
        filename: &str,
        mut options: Options,
    ) -> Result<()> {
        let bytes = options.take_size("size")?.unwrap_or(0);
        let name = filename
            .strip_prefix("file:")
            .unwrap_or(filename)
            .to_owned();
        let create = move || {
            let host = open_host(&name, OFlags::RDWR | OFlags::CREATE)?;
            host.set_length(0)?;
            host.set_length(bytes)
        };
        pool::run(create)
            .await
            .map_err(|e| could_not("create", filename, e))
    }
}
