// SPDX-License-Identifier: MIT OR Apache-2.0
//! O_DIRECT: which alignments the host asks for, and buffers that don't have them. `QEMU: raw_probe_alignment`.
//!
//! Offsets and lengths are the request path's business (the node pads them to the limits); addresses are ours.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use blockcore::{BlockError, IoBuf, IoBufMut, Perm, Permissions, Result, SECTOR_BYTES};
use rustix::fs::{AtFlags, StatxFlags, statx};
use rustix::io::{Errno, preadv};

use crate::engine;
use crate::host::HostFile;
use crate::orphan::Orphans;
use crate::waits::may_wait;

/// What is right for every disk there is, where nothing better is known, in bytes.
const SAFE_ALIGN_BYTES: u32 = 4096;

/// What O_DIRECT asks for, in bytes; powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alignment {
    /// Of offsets and lengths.
    pub request: u32,
    /// Of addresses.
    pub memory: u32,
}

impl Alignment {
    /// Asks the kernel, or tries, for a file that is open with O_DIRECT. Blocks.
    pub fn probe(fd: &OwnedFd) -> Alignment {
        Alignment::from_statx(fd).unwrap_or_else(|| Alignment::from_reads(fd))
    }

    fn from_statx(fd: &OwnedFd) -> Option<Alignment> {
        may_wait("statx");
        let stat = statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
        let known = StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::DIOALIGN);
        let (request, memory) = (stat.stx_dio_offset_align, stat.stx_dio_mem_align);
        let valid = |n: u32| n.is_power_of_two() && n <= 1 << 20;
        (known && valid(request) && valid(memory)).then_some(Alignment { request, memory })
    }

    /// The smallest length that can be read, and the smallest alignment of an address that a read can go to.
    fn from_reads(fd: &OwnedFd) -> Alignment {
        let mut buf =
            IoBufMut::zeroed_aligned(2 * SAFE_ALIGN_BYTES as usize, 2 * SAFE_ALIGN_BYTES as usize);
        let mut works = |at: u32, len: u32| {
            let Some(all) = buf.as_mut_slice() else {
                return false;
            };
            let range = at as usize..(at + len) as usize;
            let mut iov = [IoSliceMut::new(&mut all[range])];
            may_wait("preadv");
            !matches!(preadv(fd.as_fd(), &mut iov, 0), Err(Errno::INVAL))
        };
        let sizes = [512, 1024, 2048, SAFE_ALIGN_BYTES];
        let first = |works: &mut dyn FnMut(u32) -> bool| {
            sizes
                .into_iter()
                .find(|n| works(*n))
                .unwrap_or(SAFE_ALIGN_BYTES)
        };
        let request = first(&mut |n| works(0, n));
        let memory = first(&mut |n| works(n, SAFE_ALIGN_BYTES));
        Alignment { request, memory }
    }

    pub fn is_aligned(self, offset: u64) -> bool {
        offset.is_multiple_of(self.request.into())
    }

    /// What pieces of memory have to keep to: their lengths are parts of the request.
    fn of_pieces(self) -> usize {
        self.memory.max(self.request) as usize
    }
}

/// Whether somebody who may write, but not change the length, can do so: O_DIRECT writes whole blocks, and the last one may reach past the end.
/// `QEMU: bdrv_node_check_perm`. Blocks.
///
/// # Errors
/// `InvalidArgument`, in QEMU's words; the host's.
pub(crate) fn check_writer(file: &HostFile, permissions: Permissions) -> Result<()> {
    let Some(align) = file.direct else {
        return Ok(());
    };
    let writes = permissions.used.contains(Perm::WRITE);
    if !writes || permissions.used.contains(Perm::RESIZE) {
        return Ok(());
    }
    let length = file.length()?.next_multiple_of(SECTOR_BYTES);
    if align.is_aligned(length) {
        return Ok(());
    }
    Err(BlockError::invalid(
        "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment",
    ))
}

/// Reads, by way of an aligned buffer where the caller's is not.
pub(crate) async fn read(file: &Arc<HostFile>, offset: u64, mut buf: IoBufMut) -> Result<IoBufMut> {
    let Some(align) = file.direct.map(Alignment::of_pieces) else {
        return engine::read(file, offset, buf).await;
    };
    if buf.is_aligned(align) {
        return engine::read(file, offset, buf).await;
    }
    let aligned = IoBufMut::zeroed_aligned(buf.len(), align.max(SAFE_ALIGN_BYTES as usize));
    let aligned = engine::read(file, offset, aligned).await?;
    let mut at = 0;
    for piece in buf.segments_mut() {
        aligned.copy_to_slice(at, piece);
        at += piece.len();
    }
    Ok(buf)
}

/// Writes, by way of an aligned buffer where the caller's is not.
pub(crate) async fn write(
    file: &Arc<HostFile>,
    orphans: &Arc<Orphans>,
    offset: u64,
    mut buf: IoBuf,
) -> Result<()> {
    if let Some(align) = file.direct.map(Alignment::of_pieces)
        && !buf.is_aligned(align)
    {
        let mut aligned = IoBufMut::zeroed_aligned(buf.len(), align.max(SAFE_ALIGN_BYTES as usize));
        if let Some(to) = aligned.as_mut_slice() {
            buf.copy_to_slice(0, to);
        }
        buf = aligned.freeze();
    }
    engine::write(file, orphans, offset, buf).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Engine;
    use crate::host::HostKind;

    #[test]
    fn a_writer_that_may_not_resize_needs_a_file_of_whole_blocks() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1000).unwrap();
        let writer = Permissions::root(true);
        let of_blocks = |request, permissions| {
            let fd = OwnedFd::from(file.try_clone().unwrap());
            let align = Alignment { request, memory: 1 };
            let host = HostFile::new(fd, HostKind::File, Some(align), Engine::Pool);
            check_writer(&host, permissions)
        };
        assert!(of_blocks(512, writer).is_ok(), "files count in sectors");
        assert!(of_blocks(4096, Permissions::root(false)).is_ok());
        assert!(of_blocks(4096, Permissions::storage(true)).is_ok());
        let err = of_blocks(4096, writer).unwrap_err();
        assert!(err.text().contains("without 'resize'"), "{err}");
    }
}
