// SPDX-License-Identifier: MIT OR Apache-2.0
//! The byte-range locks by which processes keep out of each other's way on an image file. `QEMU: raw_apply_lock_bytes`, `raw_check_lock_bytes`.
//!
//! Byte `100 + n` is locked (shared) by whoever uses permission `n`, byte `200 + n` by whoever doesn't want others to use it. Taking a permission means: lock
//! one's own bytes first, then look whether somebody else holds a byte that speaks against it. Both sides do it in this order, so at least one of two
//! that come at once sees the other. The locks belong to the open file description: a second opening in the same process counts as somebody else.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use blockcore::{BlockError, ErrorKind, Op, Perm, Permissions, Result};

use crate::waits::may_wait;

const USED_BASE: i64 = 100;
const UNSHARED_BASE: i64 = 200;

/// The permissions, with the names that messages have for them.
const NAMES: [(Perm, &str); 4] = [
    (Perm::CONSISTENT_READ, "consistent read"),
    (Perm::WRITE, "write"),
    (Perm::WRITE_UNCHANGED, "write unchanged"),
    (Perm::RESIZE, "resize"),
];

/// Whether the host has locks that belong to the open file.
pub(crate) fn are_supported(file: BorrowedFd<'_>) -> bool {
    lock_byte(file, libc::F_OFD_GETLK, libc::F_WRLCK, USED_BASE).is_ok()
}

/// Takes the locks of `new` and lets go of those that only `old` had.
///
/// # Errors
/// `Locked` if somebody else is in the way: then the locks are those of `old` again.
pub(crate) fn apply(
    file: BorrowedFd<'_>,
    name: &str,
    old: Permissions,
    new: Permissions,
) -> Result<()> {
    if let Err(e) = take(file, new).and_then(|()| check_others(file, name, new)) {
        release(file, new, old)?;
        return Err(e);
    }
    release(file, old, new)
}

/// Takes the locks of a set of permissions without looking for others: for a second descriptor of a file whose first one has them.
///
/// # Errors
/// The host's.
pub(crate) fn take(file: BorrowedFd<'_>, permissions: Permissions) -> Result<()> {
    for byte in bytes_of(permissions) {
        lock_byte(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte).map_err(|e| {
            BlockError::from_io(e)
                .context(format!("Failed to lock byte {byte}"))
                .during(Op::Lock)
        })?;
    }
    Ok(())
}

/// Lets go of what only `had` has.
///
/// # Errors
/// The host's.
pub(crate) fn release(file: BorrowedFd<'_>, had: Permissions, keep: Permissions) -> Result<()> {
    let kept: Vec<i64> = bytes_of(keep).collect();
    for byte in bytes_of(had).filter(|b| !kept.contains(b)) {
        lock_byte(file, libc::F_OFD_SETLK, libc::F_UNLCK, byte).map_err(BlockError::from_io)?;
    }
    Ok(())
}

fn bytes_of(permissions: Permissions) -> impl Iterator<Item = i64> {
    let used = permissions
        .used
        .iter()
        .map(|p| USED_BASE + i64::from(p.bits().trailing_zeros()));
    let unshared = (Perm::all() - permissions.shared).iter();
    // QEMU's tools never take the byte for "others may not read", nor do formats forbid unchanged writes.
    used.chain(unshared.map(|p| UNSHARED_BASE + i64::from(p.bits().trailing_zeros())))
}

fn check_others(file: BorrowedFd<'_>, name: &str, permissions: Permissions) -> Result<()> {
    let locked = |what: String| {
        let hint = format!("Is another process using the image [{name}]?");
        Err(BlockError::new(ErrorKind::Locked, what)
            .hint(hint)
            .during(Op::Lock))
    };
    for (n, (perm, what)) in NAMES.iter().enumerate() {
        let n = n as i64;
        if permissions.used.contains(*perm) && is_locked(file, UNSHARED_BASE + n)? {
            return locked(format!("Failed to get \"{what}\" lock"));
        }
    }
    for (n, (perm, what)) in NAMES.iter().enumerate() {
        if !permissions.shared.contains(*perm) && is_locked(file, USED_BASE + n as i64)? {
            return locked(format!("Failed to get shared \"{what}\" lock"));
        }
    }
    Ok(())
}

fn is_locked(file: BorrowedFd<'_>, byte: i64) -> Result<bool> {
    let found =
        lock_byte(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte).map_err(BlockError::from_io)?;
    Ok(found != libc::F_UNLCK)
}

/// Sets or asks for the lock on one byte; the answer of asking is the type of lock that is in the way.
fn lock_byte(
    file: BorrowedFd<'_>,
    command: libc::c_int,
    kind: libc::c_int,
    byte: i64,
) -> io::Result<libc::c_int> {
    // To let go of one takes no answer of anybody.
    if kind != libc::F_UNLCK {
        may_wait("fcntl");
    }
    let mut lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open for as long as `file` lives, and `lock` is a valid `flock` that the call may read and write.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(lock.l_type.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    fn two_openings() -> (tempfile::NamedTempFile, File, File) {
        let temp = tempfile::NamedTempFile::new().unwrap();
        let open = || {
            File::options()
                .read(true)
                .write(true)
                .open(temp.path())
                .unwrap()
        };
        let (a, b) = (open(), open());
        (temp, a, b)
    }

    #[test]
    fn a_writer_keeps_everybody_else_out_and_readers_share() {
        let (_temp, a, b) = two_openings();
        apply(
            a.as_fd(),
            "x",
            Permissions::NONE,
            Permissions::storage(false),
        )
        .unwrap();
        apply(
            b.as_fd(),
            "x",
            Permissions::NONE,
            Permissions::storage(false),
        )
        .unwrap();
        let err = apply(
            b.as_fd(),
            "x",
            Permissions::storage(false),
            Permissions::storage(true),
        )
        .unwrap_err();
        assert_eq!(err.to_string(), "Failed to get \"write\" lock");
        assert_eq!(
            err.hint_text(),
            Some("Is another process using the image [x]?")
        );
        apply(
            a.as_fd(),
            "x",
            Permissions::storage(false),
            Permissions::NONE,
        )
        .unwrap();
        apply(
            b.as_fd(),
            "x",
            Permissions::storage(false),
            Permissions::storage(true),
        )
        .unwrap();
        let err = apply(
            a.as_fd(),
            "x",
            Permissions::NONE,
            Permissions::storage(false),
        )
        .unwrap_err();
        assert_eq!(err.to_string(), "Failed to get shared \"write\" lock");
    }
}
