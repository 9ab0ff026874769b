// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`HostFile`]: an open file of the host and the system calls that block. Called on pool threads by the engine; only
//! [`read_nowait`](HostFile::read_nowait) is for any thread.
//!
//! What the file system can't do is learned once, from its refusal, and remembered: zeroing and punching are not tried again.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockcore::{IoBuf, IoBufMut, WriteFlags};
use rustix::fs::{FallocateFlags, SeekFrom, copy_file_range, fallocate};
use rustix::io::{Errno, ReadWriteFlags, preadv, preadv2, pwritev};

use crate::direct::Alignment;
use crate::engine::Engine;
use crate::engine::standby::Standby;
use crate::ioctl;
use crate::status::KnownData;
use crate::waits::may_wait;

/// The most pieces that one vectored call takes (`IOV_MAX`).
const IOV_MAX: usize = 1024;

/// The longest read that is copied out of the page cache on the caller's thread, in bytes: some tens of microseconds.
pub(crate) const NOWAIT_BYTES_MAX: usize = 256 << 10;

/// What an open name turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HostKind {
    File,
    BlockDevice,
    CharDevice,
    /// A pipe, a socket ...: nothing that a disk can lie in.
    Other,
}

/// An open file of the host.
#[derive(Debug)]
pub(crate) struct HostFile {
    fd: OwnedFd,
    pub kind: HostKind,
    /// What O_DIRECT asks for; `None`: the page cache is used.
    pub direct: Option<Alignment>,
    pub engine: Engine,
    pub known_data: KnownData,
    /// Its own, and not the file's: a thread that stands by must not keep the file open.
    pub standby: Arc<Standby>,
    can_zero_range: AtomicBool,
    can_punch: AtomicBool,
    can_discard: AtomicBool,
    can_allocate: AtomicBool,
    can_nowait: AtomicBool,
    /// The next sync fails, and those after it don't, as with a kernel that tells of a failure only once.
    #[cfg(test)]
    pub sync_fails: AtomicBool,
}

impl AsFd for HostFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether the answer says that the host will never do it, as opposed to a failure.
fn is_unsupported(e: Errno) -> bool {
    matches!(
        e,
        Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOTTY | Errno::NODEV | Errno::PERM
    )
}

impl HostFile {
    pub fn new(fd: OwnedFd, kind: HostKind, direct: Option<Alignment>, engine: Engine) -> HostFile {
        HostFile {
            fd,
            kind,
            direct,
            engine,
            known_data: KnownData::default(),
            standby: Arc::default(),
            can_zero_range: AtomicBool::new(true),
            can_punch: AtomicBool::new(true),
            can_discard: AtomicBool::new(true),
            can_allocate: AtomicBool::new(true),
            can_nowait: AtomicBool::new(direct.is_none()),
            #[cfg(test)]
            sync_fails: AtomicBool::new(false),
        }
    }

    /// The length in bytes, of a device too.
    pub fn length(&self) -> io::Result<u64> {
        if self.kind == HostKind::File {
            may_wait("fstat");
            return Ok(rustix::fs::fstat(&self.fd)?.st_size as u64);
        }
        may_wait("lseek");
        Ok(rustix::fs::seek(&self.fd, SeekFrom::End(0))?)
    }

    /// Fills `buf` if the page cache has all of it.
    pub fn read_nowait(&self, offset: u64, buf: &mut [u8]) -> bool {
        let len = buf.len();
        if len > NOWAIT_BYTES_MAX || !self.can_nowait.load(Ordering::Relaxed) {
            return false;
        }
        let mut iov = [IoSliceMut::new(buf)];
        match preadv2(&self.fd, &mut iov, offset, ReadWriteFlags::NOWAIT) {
            Ok(n) => n == len,
            Err(e) => {
                if is_unsupported(e) {
                    self.can_nowait.store(false, Ordering::Relaxed);
                }
                false
            }
        }
    }

    /// Fills `buf`; what lies past the end of the file is zero.
    pub fn read(&self, mut offset: u64, buf: &mut IoBufMut) -> io::Result<()> {
        let mut iov: Vec<IoSliceMut<'_>> = buf.segments_mut().map(IoSliceMut::new).collect();
        let mut left = &mut iov[..];
        while !left.is_empty() {
            let count = left.len().min(IOV_MAX);
            may_wait("preadv");
            match preadv(&self.fd, &mut left[..count], offset) {
                Ok(n) => {
                    offset += n as u64;
                    IoSliceMut::advance_slices(&mut left, n);
                    // O_DIRECT stops in the middle of a block only where the file ends.
                    if n == 0 || self.direct.is_some_and(|d| !d.is_aligned(offset)) {
                        left.iter_mut().for_each(|s| s.fill(0));
                        break;
                    }
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Writes all of `buf`.
    pub fn write(&self, mut offset: u64, buf: &IoBuf) -> io::Result<()> {
        let mut iov: Vec<IoSlice<'_>> = buf.segments().map(IoSlice::new).collect();
        let mut left = &mut iov[..];
        while !left.is_empty() {
            let count = left.len().min(IOV_MAX);
            may_wait("pwritev");
            match pwritev(&self.fd, &left[..count], offset) {
                Ok(0) => return Err(Errno::NOSPC.into()),
                Ok(n) => {
                    offset += n as u64;
                    IoSlice::advance_slices(&mut left, n);
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    pub fn sync_data(&self) -> io::Result<()> {
        #[cfg(test)]
        if self.sync_fails.swap(false, Ordering::Relaxed) {
            return Err(Errno::IO.into());
        }
        may_wait("fdatasync");
        Ok(retry(|| rustix::fs::fdatasync(&self.fd))?)
    }

    /// Bytes of storage in use.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        may_wait("fstat");
        Ok(rustix::fs::fstat(&self.fd)?.st_blocks as u64 * 512)
    }

    /// Changes the length.
    ///
    /// # Errors
    /// The host's; `EFBIG` past the limit that the process has for files, where the host would kill it.
    pub fn set_length(&self, bytes: u64) -> io::Result<()> {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Fsize).current;
        if limit.is_some_and(|limit| bytes > limit) && bytes > self.length()? {
            return Err(Errno::FBIG.into());
        }
        let _holes = self.known_data.forget_afterwards();
        may_wait("ftruncate");
        Ok(retry(|| rustix::fs::ftruncate(&self.fd, bytes))?)
    }

    /// Reserves storage without writing it.
    pub fn allocate(&self, offset: u64, bytes: u64) -> io::Result<()> {
        may_wait("fallocate");
        Ok(retry(|| {
            fallocate(&self.fd, FallocateFlags::empty(), offset, bytes)
        })?)
    }

    /// Reserves storage for a range without changing bytes or length. A host that can't is no failure.
    pub fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        may_wait("fallocate");
        match retry(|| fallocate(&self.fd, FallocateFlags::KEEP_SIZE, offset, bytes)) {
            Err(e) if is_unsupported(e) || e == Errno::INVAL => Ok(()),
            result => result.map_err(io::Error::from),
        }
    }

    /// Makes a range read as zero without writing it; `ENOTSUP` where the host can't. A range past the end grows the file.
    pub fn zero(&self, offset: u64, bytes: u64, flags: WriteFlags) -> io::Result<()> {
        let _holes = self.known_data.forget_afterwards();
        let end = offset + bytes;
        if flags.contains(WriteFlags::MAY_UNMAP)
            && self.try_mode(&self.can_punch, PUNCH, offset, bytes)?
        {
            if self.kind == HostKind::File && end > self.length()? {
                // A hole doesn't grow the file, and setting a length could cut off what a write adds at this moment.
                self.allocate(end - 1, 1)?;
            }
            return Ok(());
        }
        if self.try_mode(
            &self.can_zero_range,
            FallocateFlags::ZERO_RANGE,
            offset,
            bytes,
        )? {
            return Ok(());
        }
        if self.can_allocate.load(Ordering::Relaxed)
            && self.try_mode(&self.can_punch, PUNCH, offset, bytes)?
            && self.try_mode(&self.can_allocate, FallocateFlags::empty(), offset, bytes)?
        {
            return Ok(());
        }
        Err(Errno::NOTSUP.into())
    }

    /// Whether [`zero`](HostFile::zero) may work, as far as is known.
    pub fn may_zero(&self) -> bool {
        let can = |c: &AtomicBool| c.load(Ordering::Relaxed);
        can(&self.can_zero_range) || can(&self.can_punch)
    }

    /// Whether [`discard`](HostFile::discard) may work, as far as is known.
    pub fn may_discard(&self) -> bool {
        match self.kind {
            HostKind::BlockDevice => self.can_discard.load(Ordering::Relaxed),
            _ => self.can_punch.load(Ordering::Relaxed),
        }
    }

    /// Gives the storage of a range back; `ENOTSUP` where the host can't.
    pub fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let _holes = self.known_data.forget_afterwards();
        if self.kind == HostKind::BlockDevice {
            may_wait("ioctl");
            return match ioctl::discard_blocks(self.fd.as_fd(), offset, bytes) {
                Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    self.can_discard.store(false, Ordering::Relaxed);
                    Err(Errno::NOTSUP.into())
                }
                result => result,
            };
        }
        if self.try_mode(&self.can_punch, PUNCH, offset, bytes)? {
            return Ok(());
        }
        Err(Errno::NOTSUP.into())
    }

    /// Copies from another file without the data passing through this process; `ENOTSUP` where the host can't.
    pub fn copy_from(&self, source: &HostFile, from: u64, to: u64, bytes: u64) -> io::Result<()> {
        let _holes = self.known_data.forget_afterwards();
        let (mut from, mut to, mut left) = (from, to, bytes);
        while left > 0 {
            let n = left.min(1 << 30) as usize;
            may_wait("copy_file_range");
            match copy_file_range(source, Some(&mut from), self, Some(&mut to), n) {
                // The source ends here: let the caller read zeroes.
                Ok(0) => return Err(Errno::NOTSUP.into()),
                Ok(n) => left -= n as u64,
                Err(Errno::INTR) => {}
                Err(e) if is_unsupported(e) || e == Errno::XDEV || e == Errno::INVAL => {
                    return Err(Errno::NOTSUP.into());
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Whether `fallocate` did it; `false` where the host never does.
    fn try_mode(
        &self,
        can: &AtomicBool,
        mode: FallocateFlags,
        offset: u64,
        bytes: u64,
    ) -> io::Result<bool> {
        if !can.load(Ordering::Relaxed) {
            return Ok(false);
        }
        may_wait("fallocate");
        match retry(|| fallocate(&self.fd, mode, offset, bytes)) {
            Ok(()) => Ok(true),
            Err(e) if is_unsupported(e) => {
                can.store(false, Ordering::Relaxed);
                Ok(false)
            }
            // A device refuses what is not aligned to its blocks, today's request alone.
            Err(Errno::INVAL) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }
}

const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

/// Makes a system call again for as long as a signal interrupts it.
pub(crate) fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}
