// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`FileFactory`] and [`HostDeviceFactory`]: options, opening and creating. `QEMU: raw_open_common`, `raw_co_create`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use async_trait::async_trait;
use blockcore::{
    BlockDriver, BlockError, CreateContext, CreateOption, DriverFactory, IoBuf, OpenContext,
    OptionKind, Options, Perm, Permissions, Preallocation, Result, SECTOR_BYTES, TruncateRequest,
    blocking, strerror,
};
use rustix::fs::{FileType, IFlags, Mode, OFlags};

use crate::direct::Alignment;
use crate::engine::{Engine, uring};
use crate::file::FileDriver;
use crate::host::{HostFile, HostKind, retry};
use crate::waits::may_wait;
use crate::{ioctl, lock, truncate};

/// Opens and creates regular files.
#[derive(Clone, Copy, Debug, Default)]
pub struct FileFactory;

/// Opens block and character devices.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostDeviceFactory;

pub(crate) const CREATE_OPTIONS: &[CreateOption] = &[
    CreateOption {
        name: "size",
        kind: OptionKind::Size,
        help: "Virtual disk size",
        default: None,
    },
    CreateOption {
        name: "preallocation",
        kind: OptionKind::String,
        help: "Preallocation mode (allowed values: off, falloc, full)",
        default: None,
    },
    CreateOption {
        name: "extent_size_hint",
        kind: OptionKind::Size,
        help: "Extent size hint for the image file, 0 to disable",
        default: None,
    },
    CreateOption {
        name: "nocow",
        kind: OptionKind::Bool,
        help: "Turn off copy-on-write (valid only on btrfs)",
        default: None,
    },
];

/// The option `aio`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Aio {
    /// Not given: io_uring where the kernel grants it.
    Auto,
    Threads,
    Native,
    Uring,
}

impl Aio {
    pub fn from_name(name: &str) -> Result<Aio> {
        match name {
            "threads" => Ok(Aio::Threads),
            "native" => Ok(Aio::Native),
            "io_uring" => Ok(Aio::Uring),
            _ => Err(bad_value(name)),
        }
    }

    fn engine(self) -> Engine {
        match self {
            Aio::Threads => Engine::Pool,
            _ if uring::available().is_ok() => Engine::Uring,
            _ => Engine::Pool,
        }
    }
}

fn bad_value(value: &str) -> BlockError {
    BlockError::invalid(format!("invalid parameter value: {value}"))
}

/// How a file is opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenMode {
    pub read_only: bool,
    pub direct: bool,
    pub aio: Aio,
}

/// Opens a file or device; blocks.
///
/// # Errors
/// The host's; `EINVAL` also where the file system has no O_DIRECT.
pub(crate) fn open_host(filename: &str, mode: OpenMode) -> io::Result<HostFile> {
    let mut flags = match mode.read_only {
        true => OFlags::RDONLY,
        false => OFlags::RDWR,
    };
    flags.set(OFlags::DIRECT, mode.direct);
    let fd = open_fd(filename, flags)?;
    let kind = kind_of(&fd)?;
    let direct = mode.direct.then(|| Alignment::probe(&fd));
    Ok(HostFile::new(fd, kind, direct, mode.aio.engine()))
}

fn open_fd(filename: &str, flags: OFlags) -> io::Result<OwnedFd> {
    let mode = Mode::from_raw_mode(0o644);
    may_wait("openat");
    let fd = retry(|| rustix::fs::open(filename, flags | OFlags::CLOEXEC, mode))?;
    if file_type(&fd)? == FileType::Directory {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    Ok(fd)
}

fn file_type(fd: &OwnedFd) -> io::Result<FileType> {
    may_wait("fstat");
    Ok(FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode))
}

fn kind_of(fd: &OwnedFd) -> io::Result<HostKind> {
    Ok(match file_type(fd)? {
        FileType::BlockDevice => HostKind::BlockDevice,
        FileType::CharacterDevice => HostKind::CharDevice,
        FileType::RegularFile => HostKind::File,
        _ => HostKind::Other,
    })
}

fn could_not(what: &str, filename: &str, e: BlockError) -> BlockError {
    let why = strerror(e.errno());
    e.message(format!("Could not {what} '{filename}': {why}"))
}

async fn open(
    driver_name: &'static str,
    wants_device: bool,
    ctx: &OpenContext<'_>,
    options: &mut Options,
) -> Result<Box<dyn BlockDriver>> {
    let filename = options.take_str("filename").unwrap_or_default();
    if filename.is_empty() {
        return Err(BlockError::invalid(format!(
            "The '{driver_name}' block driver requires a file name"
        )));
    }
    let flags = ctx.flags();
    let aio = match options.take_str("aio") {
        Some(name) => Aio::from_name(&name)?,
        None => Aio::Auto,
    };
    if aio == Aio::Native && !flags.direct {
        return Err(BlockError::invalid(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ));
    }
    let locking = options.take_str("locking").unwrap_or("auto".to_owned());
    if !matches!(locking.as_str(), "auto" | "on" | "off") {
        return Err(bad_value(&locking));
    }
    let mode = OpenMode {
        read_only: flags.read_only,
        direct: flags.direct,
        aio,
    };
    if let Some(id) = options.take_str("pr-manager") {
        // Nobody can have made one: there are no such objects here.
        let text = format!("No persistent reservation manager with id '{id}'");
        return Err(BlockError::unsupported(text));
    }
    let name = filename;
    blocking::run(move || {
        if aio == Aio::Uring {
            uring::available()
                .map_err(|e| BlockError::from_io(e).context("Unable to use io_uring"))?;
        }
        let wrong_kind = || {
            let what = match wants_device {
                true => "either a character or block device",
                false => "a regular file",
            };
            let text = format!("'{driver_name}' driver requires '{name}' to be {what}");
            BlockError::invalid(text)
        };
        // Opening a pipe would wait for whoever is at its other end.
        may_wait("stat");
        let is_pipe = |mode| FileType::from_raw_mode(mode) == FileType::Fifo;
        if rustix::fs::stat(&name).is_ok_and(|stat| is_pipe(stat.st_mode)) {
            return Err(wrong_kind());
        }
        let host = open_host(&name, mode).map_err(|e| match e.raw_os_error() {
            // The host lets directories be opened, but not for writing.
            Some(libc::EISDIR) if mode.read_only => wrong_kind(),
            _ => open_failed(&name, mode, e),
        })?;
        let is_wanted = match host.kind {
            HostKind::File => !wants_device,
            HostKind::BlockDevice | HostKind::CharDevice => wants_device,
            HostKind::Other => false,
        };
        if !is_wanted {
            return Err(wrong_kind());
        }
        let can_lock = lock::are_supported(host.as_fd());
        if locking == "on" && !can_lock {
            return Err(BlockError::unsupported(format!(
                "locking=on was specified, but '{name}' can't be locked: the host has no OFD locks"
            )));
        }
        let locks = locking != "off" && can_lock;
        Ok(FileDriver::new(driver_name, name, aio, locks, host))
    })
    .await?
    .map(|driver| Box::new(driver) as Box<dyn BlockDriver>)
}

fn open_failed(name: &str, mode: OpenMode, e: io::Error) -> BlockError {
    let err = BlockError::from_io(e);
    if mode.direct && err.errno() == libc::EINVAL {
        return err.message(format!(
            "Could not open '{name}': filesystem does not support O_DIRECT"
        ));
    }
    could_not("open", name, err)
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
        open("file", false, ctx, options).await
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
        let name = filename
            .strip_prefix("file:")
            .unwrap_or(filename)
            .to_owned();
        // A disk is whole sectors, also where the next program takes the file for one.
        let bytes = options.take_size("size")?.unwrap_or(0);
        let bytes = bytes.next_multiple_of(SECTOR_BYTES);
        let preallocation = match options.take_str("preallocation") {
            Some(mode) => Preallocation::from_name(&mode).ok_or_else(|| bad_value(&mode))?,
            None => Preallocation::Off,
        };
        let nocow = options.take_bool("nocow")?.unwrap_or(false);
        let extent_bytes = options
            .take_size("extent_size_hint")?
            .unwrap_or(DEFAULT_EXTENT_BYTES);
        if let Some(key) = options.keys().next() {
            return Err(BlockError::invalid(format!("Invalid parameter '{key}'")));
        }
        let Ok(extent_bytes) = u32::try_from(extent_bytes) else {
            return Err(BlockError::invalid("Extent size hint is too large"));
        };
        let hints = Hints {
            nocow,
            extent_bytes,
        };
        blocking::run(move || create(&name, bytes, preallocation, hints)).await?
    }

    async fn delete(&self, filename: &str) -> Result<()> {
        let name = filename
            .strip_prefix("file:")
            .unwrap_or(filename)
            .to_owned();
        let delete = move || {
            may_wait("unlink");
            // A device or a pipe is not ours to take away.
            if !std::fs::metadata(&name)?.is_file() {
                return Err(std::io::ErrorKind::NotFound.into());
            }
            std::fs::remove_file(&name)
        };
        blocking::run(delete).await?.map_err(BlockError::from_io)
    }
}

/// The extents that a new file is to have where the file system can be asked, in bytes: fewer, larger ones than it would choose.
const DEFAULT_EXTENT_BYTES: u64 = 1 << 20;

/// What a file system may be asked to do about a new file. Those that don't know it do nothing.
#[derive(Clone, Copy, Debug)]
struct Hints {
    nocow: bool,
    /// 0: as the file system likes.
    extent_bytes: u32,
}

impl Hints {
    fn give(self, name: &str, host: &HostFile) {
        may_wait("ioctl");
        if self.nocow
            && let Ok(flags) = rustix::fs::ioctl_getflags(host)
            && let Err(e) = rustix::fs::ioctl_setflags(host, flags | IFlags::NOCOW)
        {
            tracing::debug!("nocow of '{name}': {e}");
        }
        if self.extent_bytes > 0
            && let Err(e) = ioctl::set_extent_size_hint(host.as_fd(), self.extent_bytes)
        {
            tracing::debug!("extent size hint of '{name}': {e}");
        }
    }
}

/// Makes a file, or empties the one that is there; blocks. `QEMU: raw_co_create`.
fn create(name: &str, bytes: u64, preallocation: Preallocation, hints: Hints) -> Result<()> {
    if preallocation == Preallocation::Metadata {
        // Before the file that may be there is emptied for nothing.
        return Err(BlockError::unsupported(format!(
            "Unsupported preallocation mode: {preallocation}"
        )));
    }
    let failed = |e| could_not("create", name, BlockError::from_io(e));
    let fd = open_fd(name, OFlags::RDWR | OFlags::CREATE).map_err(failed)?;
    let kind = kind_of(&fd).map_err(failed)?;
    let host = HostFile::new(fd, kind, None, Engine::Pool);
    if kind != HostKind::File {
        // A device is there already; all it needs is room.
        let request = TruncateRequest {
            bytes,
            exact: false,
            preallocation,
            zero_new_area: false,
        };
        return truncate::truncate(&host, request, &|| sync_new(&host));
    }
    let mine = Permissions {
        used: Perm::WRITE | Perm::RESIZE,
        shared: Perm::all() - Perm::RESIZE,
    };
    if lock::are_supported(host.as_fd()) {
        lock::apply(host.as_fd(), name, Permissions::NONE, mine)?;
    }
    host.set_length(0)
        .map_err(|e| BlockError::from_io(e).context("Failed to resize file"))?;
    // While it is empty: later it is too late.
    hints.give(name, &host);
    truncate::truncate_file(&host, 0, bytes, preallocation, &|| sync_new(&host))
}

#[async_trait]
impl DriverFactory for HostDeviceFactory {
    fn format_name(&self) -> &'static str {
        "host_device"
    }

    fn protocol_name(&self) -> Option<&'static str> {
        Some("host_device")
    }

    fn needs_filename(&self) -> bool {
        true
    }

    fn probe_path(&self, path: &str) -> u32 {
        let is_device = |mode| {
            matches!(
                FileType::from_raw_mode(mode),
                FileType::BlockDevice | FileType::CharacterDevice
            )
        };
        may_wait("stat");
        match rustix::fs::stat(path) {
            Ok(stat) if is_device(stat.st_mode) => 100,
            _ => 0,
        }
    }

    async fn open(
        &self,
        ctx: &OpenContext<'_>,
        options: &mut Options,
    ) -> Result<Box<dyn BlockDriver>> {
        open("host_device", true, ctx, options).await
    }

    fn create_options(&self) -> &'static [CreateOption] {
        &CREATE_OPTIONS[3..]
    }

    async fn create(
        &self,
        _ctx: &CreateContext<'_>,
        filename: &str,
        mut options: Options,
    ) -> Result<()> {
        let name = filename
            .strip_prefix("host_device:")
            .unwrap_or(filename)
            .to_owned();
        let bytes = options.take_size("size")?.unwrap_or(0);
        if let Some(mode) = options.take_str("preallocation") {
            match Preallocation::from_name(&mode) {
                Some(Preallocation::Off) => {}
                Some(_) => {
                    let text = format!("Unsupported preallocation mode '{mode}'");
                    return Err(BlockError::unsupported(text));
                }
                None => return Err(bad_value(&mode)),
            }
        }
        if let Some(key) = options.keys().next() {
            return Err(BlockError::invalid(format!("Invalid parameter '{key}'")));
        }
        blocking::run(move || use_as_new(&name, bytes)).await?
    }
}

/// Makes durable what was written to a file that is open only while it is being made.
fn sync_new(host: &HostFile) -> Result<()> {
    host.sync_data().map_err(BlockError::from_io)
}

/// Takes a device that is there for a new image of `bytes`; blocks. `QEMU: bdrv_co_create_opts_simple`.
fn use_as_new(name: &str, bytes: u64) -> Result<()> {
    let cannot_open = |e: BlockError| {
        e.context(
            "Protocol driver 'host_device' does not support creating new images, so an existing image must be selected as the target; however, opening the given target as an existing image failed",
        )
    };
    let failed = |e| cannot_open(could_not("open", name, BlockError::from_io(e)));
    let is_file = |mode| FileType::from_raw_mode(mode) == FileType::RegularFile;
    may_wait("stat");
    if rustix::fs::stat(name).is_ok_and(|stat| is_file(stat.st_mode)) {
        let text = format!(
            "'host_device' driver requires '{name}' to be either a character or block device"
        );
        return Err(cannot_open(BlockError::invalid(text)));
    }
    let fd = open_fd(name, OFlags::RDWR).map_err(failed)?;
    let kind = kind_of(&fd).map_err(failed)?;
    let host = HostFile::new(fd, kind, None, Engine::Pool);
    let mine = Permissions {
        used: Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE,
        shared: Perm::all(),
    };
    if lock::are_supported(host.as_fd()) {
        lock::apply(host.as_fd(), name, Permissions::NONE, mine).map_err(cannot_open)?;
    }
    let request = TruncateRequest {
        bytes,
        exact: false,
        ..TruncateRequest::default()
    };
    truncate::truncate(&host, request, &|| sync_new(&host))?;
    // The header of what was there before must not make the next guess find it.
    let cannot_clear =
        |e| BlockError::from_io(e).context("Failed to clear the new image's first sector");
    let first_sector = host.length().map_err(cannot_clear)?.min(SECTOR_BYTES);
    if first_sector > 0 {
        host.write(0, &IoBuf::zeroes(first_sector as usize))
            .and_then(|()| host.sync_data())
            .map_err(cannot_clear)?;
    }
    Ok(())
}
