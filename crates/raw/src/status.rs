// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which parts of a host file are holes, by `SEEK_DATA` and `SEEK_HOLE`. `QEMU: find_allocation`, `raw_co_block_status`.

use blockcore::{BlockStatus, StatusFlags};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::host::HostFile;

/// The status of the range that starts at `offset`; blocks on the disk.
pub(crate) fn status(file: &HostFile, offset: u64, bytes: u64) -> BlockStatus {
    let request_alignment = file.direct.map_or(1, |d| d.request).into();
    let (flags, bytes) = match seek(file, SeekFrom::Data(offset)) {
        // A hole up to the end, or past it.
        Err(Errno::NXIO) => (StatusFlags::ZERO, bytes),
        // The file system knows no holes.
        Err(_) => (StatusFlags::DATA, bytes),
        Ok(data) if data > offset => (StatusFlags::ZERO, bytes.min(data - offset)),
        Ok(_) => match seek(file, SeekFrom::Hole(offset)) {
            Ok(hole) if hole > offset => {
                // A hole that starts inside a block (the end of the file, mostly) is data up to the block's end.
                let length = (hole - offset).next_multiple_of(request_alignment);
                (StatusFlags::DATA, bytes.min(length))
            }
            _ => (StatusFlags::DATA, bytes),
        },
    };
    let mut status = BlockStatus::new(flags | StatusFlags::OFFSET_VALID, bytes);
    status.map = offset;
    status
}
