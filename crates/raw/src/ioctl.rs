// SPDX-License-Identifier: MIT OR Apache-2.0
//! The few questions to the kernel that have no safe wrapper elsewhere.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `struct fsxattr` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FsXattr {
    flags: u32,
    extent_size: u32,
    extent_count: u32,
    project: u32,
    cow_extent_size: u32,
    pad: [u8; 8],
}

const FS_IOC_FSGETXATTR: libc::Ioctl = 0x801c_581f;
const FS_IOC_FSSETXATTR: libc::Ioctl = 0x401c_5820;
const FS_XFLAG_EXTSIZE: u32 = 0x800;
const BLKDISCARD: libc::Ioctl = 0x1277;

/// Asks the file system to allocate an empty file in pieces of `bytes`; 0: as it likes. XFS knows it.
///
/// # Errors
/// The file system's; most know no such hint.
pub(crate) fn set_extent_size_hint(fd: BorrowedFd<'_>, bytes: u32) -> io::Result<()> {
    let mut attr = FsXattr::default();
    // SAFETY: the descriptor is open, and `attr` is what the kernel writes to for this request, in size and layout.
    if unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_FSGETXATTR, &raw mut attr) } != 0 {
        return Err(io::Error::last_os_error());
    }
    attr.flags |= FS_XFLAG_EXTSIZE;
    attr.extent_size = bytes;
    // SAFETY: as above; the kernel only reads `attr`.
    if unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_FSSETXATTR, &raw const attr) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Tells a block device that a range is no longer needed.
///
/// # Errors
/// The device's; `EOPNOTSUPP` where it has no such command.
pub(crate) fn discard_blocks(fd: BorrowedFd<'_>, offset: u64, bytes: u64) -> io::Result<()> {
    let range = [offset, bytes];
    // SAFETY: the descriptor is open, and `range` is the pair of numbers that this request reads.
    if unsafe { libc::ioctl(fd.as_raw_fd(), BLKDISCARD, range.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
