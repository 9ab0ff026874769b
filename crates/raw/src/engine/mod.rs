// SPDX-License-Identifier: MIT OR Apache-2.0
//! The I/O engines: how requests get to the kernel without a wait on an executor's thread.
//!
//! * [`blocking`](blockcore::blocking): any call at all, on a thread of tokio's blocking pool; [`standby`]: the same for the short calls that a file gets one
//!   by one;
//! * [`uring`]: reads and writes by io_uring, where the kernel grants it.
//!
//! With both, whoever works on a buffer owns it, so a future can be dropped at any time; what then goes on is the business of
//! [`orphan`](crate::orphan).

pub(crate) mod standby;
pub(crate) mod uring;

use std::sync::Arc;

use blockcore::{IoBuf, IoBufMut, Result};

use crate::host::{HostFile, HostKind, NOWAIT_BYTES_MAX};
use crate::orphan::Orphans;
use standby::Manner;

/// Who makes the calls for one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Engine {
    /// The blocking pool.
    Pool,
    /// io_uring for what it is good at, the pool for the rest.
    Uring,
}

impl HostFile {
    /// Copying much out of the page cache keeps a thread busy, and that should be one of the pool's.
    fn reads_by_uring(&self, bytes: usize) -> bool {
        self.engine == Engine::Uring && (self.direct.is_some() || bytes <= NOWAIT_BYTES_MAX)
    }

    /// The page cache is written by a thread either way.
    fn writes_by_uring(&self) -> bool {
        self.engine == Engine::Uring && self.direct.is_some()
    }

    /// The host's file systems let one at a time write to the page cache of a file, or change what is in it.
    pub fn write_manner(&self) -> Manner {
        match self.kind == HostKind::File && self.direct.is_none() {
            true => Manner::InLine,
            false => Manner::Alone,
        }
    }
}

/// Fills `buf` from `offset`; what lies past the end of the file reads as zero.
pub(crate) async fn read(file: &Arc<HostFile>, offset: u64, mut buf: IoBufMut) -> Result<IoBufMut> {
    if file.reads_by_uring(buf.len()) {
        return uring::read(file, offset, buf).await;
    }
    let standby = file.standby.clone();
    let file = file.clone();
    let work = move || file.read(offset, &mut buf).map(|()| buf);
    standby.run(Manner::Alone, work).await
}

/// Writes all of `buf` at `offset`.
pub(crate) async fn write(
    file: &Arc<HostFile>,
    orphans: &Arc<Orphans>,
    offset: u64,
    buf: IoBuf,
) -> Result<()> {
    if file.writes_by_uring() {
        return uring::write(file, orphans, offset, buf).await;
    }
    let end = offset + buf.len() as u64;
    let (standby, manner) = (file.standby.clone(), file.write_manner());
    let file = file.clone();
    let work = move || file.write(offset, &buf);
    standby.run_change(manner, orphans, offset, end, work).await
}
