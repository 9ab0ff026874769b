// SPDX-License-Identifier: MIT OR Apache-2.0
//! Changing the mode of an open file: a second opening of the same file takes the first one's place. `QEMU: raw_reopen_prepare`.
//!
//! Locks belong to an opening. New ones are taken on the old opening first, since others' locks can be told from one's own only there; then
//! the new opening takes the same bytes, and only then may the old one go.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use blockcore::{
    BlockError, Perm, Permissions, PreparedReopen, ReopenRequest, Result, blocking, strerror,
};
use rustix::fs::fstat;

use crate::file::FileState;
use crate::file_open::{Aio, OpenMode, open_host};
use crate::host::HostFile;
use crate::waits::may_wait;
use crate::{direct, lock};

struct Prepared {
    state: Arc<FileState>,
    /// The new opening, until it is in place.
    host: Option<Arc<HostFile>>,
    /// What was held before the preparation, and what is held after the commit; between them both hold.
    old: Permissions,
    new: Permissions,
}

impl PreparedReopen for Prepared {
    fn commit(mut self: Box<Self>) {
        let Some(host) = self.host.take() else {
            return;
        };
        let before = self.state.host();
        self.state.replace_host(host.clone());
        // A read that nobody waits for may keep the old opening a little longer: its locks must not stay.
        if let Err(e) = lock::release(before.as_fd(), both(self.old, self.new), Permissions::NONE) {
            tracing::error!("locks of '{}' before a reopen: {e}", self.state.filename);
        }
        self.state.narrow_permissions(&[&host], self.new);
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        if self.host.take().is_some() {
            self.state
                .narrow_permissions(&[&self.state.host()], self.old);
        }
    }
}

/// What is used after a reopen: the parent's word at open, less or more the right to write.
fn permissions_after(held: Permissions, read_only: bool) -> Permissions {
    let mut used = held.used;
    // A parent that lets nobody else resize is a format, which resizes when it writes.
    let writes = match held.shared.contains(Perm::RESIZE) {
        true => Perm::WRITE,
        false => Perm::WRITE | Perm::RESIZE,
    };
    used.set(writes, !read_only);
    if read_only {
        used.remove(Perm::WRITE | Perm::RESIZE);
    }
    Permissions { used, ..held }
}

fn both(a: Permissions, b: Permissions) -> Permissions {
    Permissions {
        used: a.used | b.used,
        shared: a.shared & b.shared,
    }
}

/// Opens the file once more in the new mode.
///
/// # Errors
/// The host's; `Locked` where somebody else writes.
pub(crate) async fn prepare(
    state: &Arc<FileState>,
    request: &mut ReopenRequest,
) -> Result<Box<dyn PreparedReopen>> {
    if state.aio == Aio::Native && !request.direct {
        return Err(BlockError::invalid(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ));
    }
    // The name and the ways of access are what they were; saying so again is no change.
    take_unchanged(state, request)?;
    let mode = OpenMode {
        read_only: request.read_only,
        direct: request.direct,
        aio: state.aio,
    };
    let state = state.clone();
    blocking::run(move || prepare_blocking(state, mode)).await?
}

fn take_unchanged(state: &FileState, request: &mut ReopenRequest) -> Result<()> {
    if let Some(name) = request.options.take_str("filename")
        && name != state.filename
    {
        return Err(BlockError::invalid("Cannot change the option 'filename'"));
    }
    if let Some(aio) = request.options.take_str("aio")
        && Aio::from_name(&aio)? != state.aio
    {
        return Err(BlockError::invalid("Cannot change the option 'aio'"));
    }
    if let Some(locking) = request.options.take_str("locking")
        && (locking == "off") != state.held().is_none()
    {
        return Err(BlockError::invalid("Cannot change the option 'locking'"));
    }
    Ok(())
}

fn prepare_blocking(state: Arc<FileState>, mode: OpenMode) -> Result<Box<dyn PreparedReopen>> {
    let could_not = |e: std::io::Error| {
        let err = BlockError::from_io(e);
        let text = format!("Could not reopen file: {}", strerror(err.errno()));
        err.message(text)
    };
    let current = state.host();
    let host = open_again(&state, &current, mode).map_err(could_not)?;
    let (old, new) = match state.held() {
        Some(old) => (old, permissions_after(old, mode.read_only)),
        None => (Permissions::NONE, Permissions::NONE),
    };
    direct::check_writer(&host, new)?;
    // Until it is decided, both hold.
    state.apply_permissions(both(old, new))?;
    if state.held().is_some()
        && let Err(e) = lock::take(host.as_fd(), both(old, new))
    {
        state.narrow_permissions(&[&current], old);
        return Err(e);
    }
    Ok(Box::new(Prepared {
        state,
        host: Some(Arc::new(host)),
        old,
        new,
    }))
}

/// Opens the file behind `current`, wherever its name points by now.
fn open_again(state: &FileState, current: &HostFile, mode: OpenMode) -> std::io::Result<HostFile> {
    let by_descriptor = format!("/proc/self/fd/{}", current.as_fd().as_raw_fd());
    match open_host(&by_descriptor, mode) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        other => return other,
    }
    let host = open_host(&state.filename, mode)?;
    may_wait("fstat");
    let (a, b) = (fstat(current)?, fstat(&host)?);
    if (a.st_dev, a.st_ino) != (b.st_dev, b.st_ino) {
        return Err(std::io::Error::from_raw_os_error(libc::ESTALE));
    }
    Ok(host)
}
