// SPDX-License-Identifier: MIT OR Apache-2.0
//! The I/O engines: how requests get to the kernel without a wait on an executor's thread.
//!
//! * [`pool`]: any call at all, on a thread of tokio's blocking pool; [`standby`]: the same for the short calls that a file gets one by one;
//! * [`uring`]: reads, writes and syncs by io_uring, where the kernel grants it.
//!
//! With both, whoever works on a buffer owns it, so a future can be dropped at any time; what then goes on is the business of
//! [`orphan`](crate::orphan).

pub(crate) mod pool;
pub(crate) mod standby;
pub(crate) mod uring;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use blockcore::{IoBuf, IoBufMut, Result};

use crate::host::{HostFile, NOWAIT_BYTES_MAX};
use crate::orphan::Orphans;

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

    /// The page cache is written by a thread either way. io_uring keeps one at work as long as there are more writes, where the pool wakes one for each; but to
    /// wake one of the pool is quicker, so writes that come one by one go there.
    fn writes_by_uring(&self, come_together: bool) -> bool {
        self.engine == Engine::Uring && (self.direct.is_some() || come_together)
    }
}

/// Whether the writes of a file come one by one or several at a time.
#[derive(Debug, Default)]
pub(crate) struct Writers {
    under_way: AtomicUsize,
    /// How many more writes have to come alone till they are believed to come one by one.
    together: AtomicUsize,
}

/// How many writes in a row have to come alone.
const ALONE: usize = 64;

/// One of the writes that are under way.
struct Writing<'a>(&'a Writers);

impl Writers {
    /// Begins a write, and says whether they come several at a time.
    fn begin(&self) -> (Writing<'_>, bool) {
        let writing = Writing(self);
        // These numbers decide nothing but who works; that two threads at once may miscount `together` is no harm.
        if self.under_way.fetch_add(1, Ordering::Relaxed) > 0 {
            self.together.store(ALONE, Ordering::Relaxed);
            return (writing, true);
        }
        let together = self.together.load(Ordering::Relaxed);
        self.together
            .store(together.saturating_sub(1), Ordering::Relaxed);
        (writing, together > 0)
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::Relaxed);
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
    standby.run(work).await
}

/// Writes all of `buf` at `offset`.
pub(crate) async fn write(
    file: &Arc<HostFile>,
    orphans: &Arc<Orphans>,
    offset: u64,
    buf: IoBuf,
) -> Result<()> {
    let (_writing, come_together) = file.writers.begin();
    if file.writes_by_uring(come_together) {
        return uring::write(file, orphans, offset, buf).await;
    }
    let end = offset + buf.len() as u64;
    let standby = file.standby.clone();
    let file = file.clone();
    let work = move || file.write(offset, &buf);
    standby.run_change(orphans, offset, end, work).await
}
