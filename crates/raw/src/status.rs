// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which parts of a host file are holes, by `SEEK_DATA` and `SEEK_HOLE`. `QEMU: find_allocation`, `raw_co_block_status`.
//!
//! To find where data ends, a file system walks over all extents up to there. A format above asks cluster by cluster, so the walk would be made for each cluster of
//! a long run; [`KnownData`] keeps the last run. `QEMU: bdrv_bsc_fill`.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

use blockcore::{BlockStatus, StatusFlags};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::host::HostFile;
use crate::waits::may_wait;

/// The last run of data that was found. That something is data is never wrong, only less than could be said, so what other processes do is no matter.
#[derive(Debug, Default)]
pub(crate) struct KnownData(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    run: Range<u64>,
    /// Counts what could have made holes: a run that was looked up before the last of them is not kept.
    generation: u64,
}

impl KnownData {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0
            .lock()
            .expect("no code panics while it holds this lock")
    }

    /// Where the run of data that `offset` lies in ends, if that is known.
    fn end_of_run(&self, offset: u64) -> Option<u64> {
        let known = self.lock();
        known.run.contains(&offset).then_some(known.run.end)
    }

    fn generation(&self) -> u64 {
        self.lock().generation
    }

    fn remember(&self, run: Range<u64>, generation: u64) {
        let mut known = self.lock();
        if known.generation == generation {
            known.run = run;
        }
    }

    /// For whoever may make holes: nothing is known any more once the guard is dropped.
    pub fn forget_afterwards(&self) -> impl Drop + '_ {
        ForgetOnDrop(self)
    }
}

struct ForgetOnDrop<'a>(&'a KnownData);

impl Drop for ForgetOnDrop<'_> {
    fn drop(&mut self) {
        let mut known = self.0.lock();
        known.generation += 1;
        known.run = 0..0;
    }
}

/// The status of the range that starts at `offset`, if no system call is needed for it.
pub(crate) fn status_nowait(file: &HostFile, offset: u64, bytes: u64) -> Option<BlockStatus> {
    let end = file.known_data.end_of_run(offset)?;
    Some(at_itself(
        StatusFlags::DATA,
        offset,
        bytes.min(end - offset),
    ))
}

fn at_itself(flags: StatusFlags, offset: u64, bytes: u64) -> BlockStatus {
    let mut status = BlockStatus::new(flags | StatusFlags::OFFSET_VALID, bytes);
    status.map = offset;
    status
}

/// The status of the range that starts at `offset`; blocks on the disk.
pub(crate) fn status(file: &HostFile, offset: u64, bytes: u64) -> BlockStatus {
    let generation = file.known_data.generation();
    let request_alignment = file.direct.map_or(1, |d| d.request).into();
    may_wait("lseek");
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
                file.known_data
                    .remember(offset..offset + length, generation);
                (StatusFlags::DATA, bytes.min(length))
            }
            _ => (StatusFlags::DATA, bytes),
        },
    };
    at_itself(flags, offset, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Engine;
    use crate::host::HostKind;
    use blockcore::{IoBuf, WriteFlags};

    #[test]
    fn a_run_of_data_is_looked_up_once_and_forgotten_with_the_next_hole() {
        let fd = tempfile::tempfile().unwrap().into();
        let file = HostFile::new(fd, HostKind::File, None, Engine::Pool);
        file.set_length(4 << 20).unwrap();
        file.write(1 << 20, &IoBuf::from(vec![1; 1 << 20])).unwrap();
        assert!(status_nowait(&file, 1 << 20, 512).is_none());
        let data = status(&file, 1 << 20, 512);
        assert!(data.flags.contains(StatusFlags::DATA));
        assert_eq!(
            status_nowait(&file, (1 << 20) + 700, 512).unwrap().bytes,
            512
        );
        let near_end = status_nowait(&file, (2 << 20) - 100, 4096).unwrap();
        assert_eq!((near_end.bytes, near_end.map), (100, (2 << 20) - 100));
        assert!(status_nowait(&file, 2 << 20, 512).is_none());

        if file.zero(1 << 20, 64 << 10, WriteFlags::MAY_UNMAP).is_ok() {
            assert!(status_nowait(&file, (1 << 20) + 700, 512).is_none());
            assert!(status(&file, 1 << 20, 512).is_zero());
        }
    }

    #[test]
    fn a_run_that_was_looked_up_before_a_hole_was_made_is_not_kept() {
        let known = KnownData::default();
        let before = known.generation();
        drop(known.forget_afterwards());
        known.remember(0..100, before);
        assert_eq!(known.end_of_run(50), None);
    }
}
