// SPDX-License-Identifier: MIT OR Apache-2.0
//! Block status: what a range of a node holds, and where. `QEMU: BDRV_BLOCK_*`.
//!
//! | DATA | ZERO | OFFSET_VALID | meaning |
//! |---|---|---|---|
//! | yes | yes | yes | reads as zero, and lies allocated at `map` |
//! | yes | no | yes | data, readable at `map` in `file` too |
//! | no | yes | yes | reads as zero; `map` is where a preallocated cluster lies, its bytes mean nothing |
//! | no | no | yes | (not used) |
//! | yes | yes | no | reads as zero, allocated somewhere |
//! | yes | no | no | data, only readable through the node (compressed, encrypted) |
//! | no | yes | no | reads as zero |
//! | no | no | no | not in this layer: the backing node decides |

use std::sync::Arc;

use bitflags::bitflags;

use crate::node::Node;

bitflags! {
    /// What a range of a node holds.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct StatusFlags: u8 {
        /// Reads from this node's storage.
        const DATA = 1 << 0;
        /// Reads as zero.
        const ZERO = 1 << 1;
        /// `map` is the offset in `file`.
        const OFFSET_VALID = 1 << 2;
        /// A driver's way to say: ask `file` at `map` instead. Never leaves the node.
        const RAW = 1 << 3;
        /// This layer decides what the range reads as; the backing node has no say.
        const ALLOCATED = 1 << 4;
        /// The range ends where the node does.
        const EOF = 1 << 5;
        /// A driver's way to say: `file` may know that these data are zero. Never leaves the node.
        const RECURSE = 1 << 6;
        /// Stored compressed.
        const COMPRESSED = 1 << 7;
    }
}

/// How exactly the caller wants to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusMode {
    /// Whether ranges read as zero matters: the driver may ask the host.
    Precise,
    /// Only which layer a range comes from matters: the driver answers from its own metadata.
    AllocationOnly,
}

/// The status of one range that starts where the caller asked.
#[derive(Clone, Debug)]
pub struct BlockStatus {
    /// What the range holds.
    pub flags: StatusFlags,
    /// The length of the range in bytes; at least 1, unless the caller asked at the end of the node.
    pub bytes: u64,
    /// Byte offset in `file`; meaningful with [`StatusFlags::OFFSET_VALID`].
    pub map: u64,
    /// The node that `map` speaks of.
    pub file: Option<Arc<Node>>,
}

impl BlockStatus {
    /// A range without a place.
    pub fn new(flags: StatusFlags, bytes: u64) -> BlockStatus {
        BlockStatus {
            flags,
            bytes,
            map: 0,
            file: None,
        }
    }

    /// A range that lies at `map` in `file`.
    pub fn mapped(flags: StatusFlags, bytes: u64, map: u64, file: Arc<Node>) -> BlockStatus {
        BlockStatus {
            flags: flags | StatusFlags::OFFSET_VALID,
            bytes,
            map,
            file: Some(file),
        }
    }

    /// Whether the range surely reads as zero.
    pub fn is_zero(&self) -> bool {
        self.flags.contains(StatusFlags::ZERO)
    }

    /// Whether the layer asked decides what the range reads as.
    pub fn is_allocated(&self) -> bool {
        self.flags.contains(StatusFlags::ALLOCATED)
    }
}

/// The status of a range as a whole backing chain has it.
#[derive(Clone, Debug)]
pub struct ChainStatus {
    /// What the range holds. Without [`StatusFlags::ALLOCATED`], no layer that was asked holds it.
    pub status: BlockStatus,
    /// How many layers below the top the answer comes from; 0 is the top.
    pub depth: usize,
    /// The layer the answer comes from.
    pub node: Arc<Node>,
}
