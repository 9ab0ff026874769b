// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a parent does with a node, and what it lets others do. `QEMU: BLK_PERM_*`.
//!
//! The `file` driver turns these into the byte-range locks that other processes see; see `raw::lock`.

use bitflags::bitflags;

bitflags! {
    /// One thing a parent may do with a node. The bit numbers are the lock byte numbers that QEMU uses.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Perm: u8 {
        /// Reads, and relies on what it read staying true.
        const CONSISTENT_READ = 1 << 0;
        /// Changes the data.
        const WRITE = 1 << 1;
        /// Writes data that is there already (copy-on-read).
        const WRITE_UNCHANGED = 1 << 2;
        /// Changes the length.
        const RESIZE = 1 << 3;
    }
}

/// What a parent does, and what it puts up with from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permissions {
    /// What the parent does.
    pub used: Perm,
    /// What others may do at the same time.
    pub shared: Perm,
}

impl Permissions {
    /// Nothing used, nothing forbidden: the start.
    pub const NONE: Permissions = Permissions {
        used: Perm::empty(),
        shared: Perm::all(),
    };

    /// A program at the top of the graph: others may do what they like.
    pub const fn root(writable: bool) -> Permissions {
        let used = if writable {
            Perm::CONSISTENT_READ.union(Perm::WRITE)
        } else {
            Perm::CONSISTENT_READ
        };
        Permissions {
            used,
            shared: Perm::all(),
        }
    }

    /// A format driver over its file: nobody else may write, and who writes also resizes.
    /// `QEMU: bdrv_default_perms_for_storage`.
    pub const fn storage(writable: bool) -> Permissions {
        let mut used = Perm::CONSISTENT_READ;
        if writable {
            used = used.union(Perm::WRITE).union(Perm::RESIZE);
        }
        Permissions {
            used,
            shared: Perm::CONSISTENT_READ.union(Perm::WRITE_UNCHANGED),
        }
    }

    /// The same use, with nothing forbidden to others: `force-share`.
    pub const fn sharing_all(self) -> Permissions {
        Permissions {
            used: self.used,
            shared: Perm::all(),
        }
    }
}
