// SPDX-License-Identifier: MIT OR Apache-2.0
//! Constants and pure functions of the format on disk. Source: the published qcow2 specification; the limits are QEMU's.

/// `QFI\xfb`.
pub const MAGIC: u32 = 0x5146_49fb;

/// Set in an L1 or L2 entry: the cluster it points at has exactly one reference.
pub const OFLAG_COPIED: u64 = 1 << 63;
/// Set in an L2 entry: the cluster is compressed.
pub const OFLAG_COMPRESSED: u64 = 1 << 62;
/// Set in an L2 entry: the cluster reads as zero (version 3).
pub const OFLAG_ZERO: u64 = 1;
/// The host offset in an L1 entry.
pub const L1E_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The host offset in an L2 entry.
pub const L2E_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The host offset in a refcount table entry.
pub const REFT_OFFSET_MASK: u64 = 0xffff_ffff_ffff_fe00;

/// The smallest cluster is `1 << MIN_CLUSTER_BITS` bytes.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// The largest cluster is `1 << MAX_CLUSTER_BITS` bytes.
pub const MAX_CLUSTER_BITS: u32 = 21;
/// With extended L2 entries a cluster has `1 << SUBCLUSTERS_BITS` subclusters.
pub const SUBCLUSTERS_BITS: u32 = 5;
/// The smallest cluster with extended L2 entries is `1 << MIN_EXTENDED_CLUSTER_BITS` bytes: a subcluster has a sector at least.
pub const MIN_EXTENDED_CLUSTER_BITS: u32 = 14;
/// The longest L1 table, in bytes.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// The longest refcount table, in bytes.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// The most snapshots.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// The longest snapshot table, in bytes.
pub const MAX_SNAPSHOT_TABLE_BYTES: u64 = 1024 * MAX_SNAPSHOTS as u64;
/// The longest backing file name, in bytes.
pub const MAX_BACKING_NAME_BYTES: u32 = 1023;
/// The bytes of a version 2 header.
pub const V2_HEADER_BYTES: u32 = 72;
/// The bytes of the version 3 fields that every image of that version has.
pub const V3_HEADER_BYTES: u32 = 104;

/// Where the bytes of a compressed cluster lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressedDescriptor {
    /// Byte offset in the file; of no alignment.
    pub host_offset: u64,
    /// How many bytes the compressed data has at most: it ends somewhere in the last sector.
    pub host_bytes: u64,
}

impl CompressedDescriptor {
    /// Compressed data ends no later in the file than this, in bytes.
    pub fn end_max(cluster_bits: u32) -> u64 {
        1 << (62 - (cluster_bits - 8))
    }

    /// The L2 entry of a cluster whose `bytes` bytes of compressed data lie at `host`.
    pub fn encode(host: u64, bytes: u64, cluster_bits: u32) -> u64 {
        let offset_bits = 62 - (cluster_bits - 8);
        debug_assert!(host >> offset_bits == 0 && bytes > 0);
        let more_sectors = ((host + bytes - 1) >> 9) - (host >> 9);
        OFLAG_COMPRESSED | more_sectors << offset_bits | host
    }

    /// Reads the L2 entry of a compressed cluster. The number of bits of the offset depends on the cluster size.
    pub fn decode(entry: u64, cluster_bits: u32) -> CompressedDescriptor {
        let offset_bits = 62 - (cluster_bits - 8);
        let host_offset = entry & ((1 << offset_bits) - 1);
        let more_sectors = (entry >> offset_bits) & ((1 << (cluster_bits - 8)) - 1);
        CompressedDescriptor {
            host_offset,
            host_bytes: (more_sectors + 1) * 512 - (host_offset & 511),
        }
    }
}

/// The sizes that follow from cluster size, refcount width and the words in an L2 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// A cluster is `1 << cluster_bits` bytes.
    pub cluster_bits: u32,
    /// A refcount is `1 << refcount_order` bits.
    pub refcount_order: u32,
    /// L2 entries have two words.
    pub extended_l2: bool,
}

impl Geometry {
    /// Bytes in a cluster.
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries in an L2 table.
    pub fn l2_entries(self) -> u64 {
        1 << (self.cluster_bits - 3 - u32::from(self.extended_l2))
    }

    /// Guest bytes that one L1 entry covers.
    pub fn table_bytes(self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// L1 entries that a disk of `size` bytes needs.
    pub fn l1_entries(self, size: u64) -> u64 {
        size.div_ceil(self.table_bytes())
    }

    /// Refcounts in a block.
    pub fn block_entries(self) -> u64 {
        1 << (self.cluster_bits + 3 - self.refcount_order)
    }

    /// Clusters that `bytes` bytes need.
    pub fn clusters(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compressed_descriptor_counts_whole_sectors_from_where_it_starts() {
        // 64 KiB clusters: 54 bits of offset, 8 bits of further sectors.
        let d = CompressedDescriptor::decode(OFLAG_COMPRESSED | 2 << 54 | 0x5_0010, 16);
        assert_eq!(
            d,
            CompressedDescriptor {
                host_offset: 0x5_0010,
                host_bytes: 3 * 512 - 0x10
            }
        );
    }

    #[test]
    fn an_encoded_descriptor_reaches_over_all_of_the_data_and_no_further_sector() {
        for cluster_bits in [9, 16, 21] {
            for (host, bytes) in [
                (0x5_0000, 1),
                (0x5_0010, 496),
                (0x5_0010, 497),
                (0x5_01ff, 400),
            ] {
                let entry = CompressedDescriptor::encode(host, bytes, cluster_bits);
                let d = CompressedDescriptor::decode(entry, cluster_bits);
                assert_eq!(d.host_offset, host);
                assert_eq!(host + d.host_bytes, (host + bytes).next_multiple_of(512));
            }
        }
    }
}
