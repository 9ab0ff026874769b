// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`DebugEvent`]: the named points that a request passes on its way. `QEMU: BlkdebugEvent`.
//!
//! A driver says to the node it is about to touch what it is about to do ([`Node::debug_event`](crate::Node::debug_event)). Only a node whose driver
//! wants to know hears of it: one that injects faults (`testing::fault`), or one that stops requests for a debugger. For all others it costs the look at
//! one `bool`.

use std::fmt;

macro_rules! debug_events {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// A named point. The names are QEMU's, so that scripts that use them keep their meaning; not every point is passed by this implementation.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum DebugEvent {
            $($(#[$doc])* $variant,)*
        }

        impl DebugEvent {
            /// All of them.
            pub const ALL: &[DebugEvent] = &[$(DebugEvent::$variant,)*];

            /// The name in scripts and options.
            pub fn name(self) -> &'static str {
                match self {
                    $(DebugEvent::$variant => $name,)*
                }
            }
        }
    };
}

debug_events! {
    /// L1 entries are written.
    L1Update = "l1_update",
    /// A longer L1 table is given a place.
    L1GrowAllocTable = "l1_grow_alloc_table",
    /// A longer L1 table is written.
    L1GrowWriteTable = "l1_grow_write_table",
    /// The header is written, with the new place of the L1 table and the disk's new length.
    L1GrowActivateTable = "l1_grow_activate_table",
    /// An L2 table, or a slice of one, is read.
    L2Load = "l2_load",
    /// An L2 table, or a slice of one, is written.
    L2Update = "l2_update",
    /// The entry of a compressed cluster is changed.
    L2UpdateCompressed = "l2_update_compressed",
    /// A shared L2 table is read, to be copied.
    L2AllocCowRead = "l2_alloc_cow_read",
    /// A new L2 table is written.
    L2AllocWrite = "l2_alloc_write",
    /// Guest data is read.
    ReadAio = "read_aio",
    /// Guest data is read from the backing node.
    ReadBackingAio = "read_backing_aio",
    /// A compressed cluster is read.
    ReadCompressed = "read_compressed",
    /// Guest data is written.
    WriteAio = "write_aio",
    /// A compressed cluster is written.
    WriteCompressed = "write_compressed",
    /// VM state is read.
    VmstateLoad = "vmstate_load",
    /// VM state is written.
    VmstateSave = "vmstate_save",
    /// What a request leaves out of a new cluster is read.
    CowRead = "cow_read",
    /// What a request leaves out of a new cluster is written, apart from what the request writes.
    CowWrite = "cow_write",
    /// The refcount table is read.
    ReftableLoad = "reftable_load",
    /// The refcount table is given a longer place.
    ReftableGrow = "reftable_grow",
    /// The refcount table is written.
    ReftableUpdate = "reftable_update",
    /// A refcount block is read.
    RefblockLoad = "refblock_load",
    /// A refcount block is written.
    RefblockUpdate = "refblock_update",
    /// A part of a refcount block is written.
    RefblockUpdatePart = "refblock_update_part",
    /// A new refcount block is given a place.
    RefblockAlloc = "refblock_alloc",
    /// A new refcount block is entered in the refcount table.
    RefblockAllocHookup = "refblock_alloc_hookup",
    /// A new refcount block is written.
    RefblockAllocWrite = "refblock_alloc_write",
    /// The blocks that a longer refcount table needs are written.
    RefblockAllocWriteBlocks = "refblock_alloc_write_blocks",
    /// A longer refcount table is written.
    RefblockAllocWriteTable = "refblock_alloc_write_table",
    /// The header is written, with the new place of the refcount table.
    RefblockAllocSwitchTable = "refblock_alloc_switch_table",
    /// Clusters are allocated.
    ClusterAlloc = "cluster_alloc",
    /// Bytes within a cluster are allocated, for compressed data.
    ClusterAllocBytes = "cluster_alloc_bytes",
    /// Clusters are freed.
    ClusterFree = "cluster_free",
    /// A flush hands what a format keeps in memory to its file.
    FlushToOs = "flush_to_os",
    /// A flush makes a format's file durable.
    FlushToDisk = "flush_to_disk",
    /// A write that isn't aligned reads its first block.
    PwritevRmwHead = "pwritev_rmw_head",
    /// It has read its first block.
    PwritevRmwAfterHead = "pwritev_rmw_after_head",
    /// A write that isn't aligned reads its last block.
    PwritevRmwTail = "pwritev_rmw_tail",
    /// It has read its last block.
    PwritevRmwAfterTail = "pwritev_rmw_after_tail",
    /// A node is written to.
    Pwritev = "pwritev",
    /// A node's range is zeroed.
    PwritevZero = "pwritev_zero",
    /// A node has been written to.
    PwritevDone = "pwritev_done",
    /// An image is emptied.
    EmptyImagePrepare = "empty_image_prepare",
    /// A shorter L1 table is written.
    L1ShrinkWriteTable = "l1_shrink_write_table",
    /// L2 tables that a shorter disk doesn't need are freed.
    L1ShrinkFreeL2Clusters = "l1_shrink_free_l2_clusters",
    /// What was read is copied up.
    CorWrite = "cor_write",
    /// Storage is reserved for a cluster.
    ClusterAllocSpace = "cluster_alloc_space",
    /// No point at all.
    None = "none",
}

impl DebugEvent {
    /// The point of a name.
    ///
    /// ```
    /// use blockcore::DebugEvent;
    ///
    /// assert_eq!(DebugEvent::from_name("l2_load"), Some(DebugEvent::L2Load));
    /// assert_eq!(DebugEvent::from_name("l3_load"), None);
    /// ```
    pub fn from_name(name: &str) -> Option<DebugEvent> {
        DebugEvent::ALL.iter().copied().find(|e| e.name() == name)
    }
}

impl fmt::Display for DebugEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
