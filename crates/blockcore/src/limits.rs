// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`BlockLimits`]: what sizes and alignments a driver wants to see. The request path keeps to them.

/// The longest request that any node takes, in bytes: `i32::MAX` rounded down to a sector, as in QEMU.
pub const MAX_REQUEST_BYTES: u64 = (i32::MAX as u64) & !511;

/// The largest disk a node may have, in bytes. Leaves room below `i64::MAX` for any alignment to be added.
pub const MAX_LENGTH_BYTES: u64 = (i64::MAX as u64) & !((1 << 30) - 1);

/// Sizes and alignments that a driver asks for. `QEMU: BlockLimits`.
///
/// A field that speaks of alignment is a power of two of at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockLimits {
    /// Offsets and lengths of reads and writes are multiples of this many bytes. 1 for a buffered file, the logical block
    /// size under O_DIRECT. Every other alignment below is at least this.
    pub request_alignment: u32,
    /// The longest read or write, in bytes; a multiple of `request_alignment`. 0: no limit but [`MAX_REQUEST_BYTES`].
    pub max_transfer: u64,
    /// Zero writes are best in multiples of this many bytes: heads and tails that are not come as requests of their
    /// own, so that the driver can refuse them one by one.
    pub pwrite_zeroes_alignment: u32,
    /// The longest zero write, in bytes; 0: no limit.
    pub max_pwrite_zeroes: u64,
    /// Discards are best in multiples of this many bytes; heads and tails come as requests of their own.
    pub pdiscard_alignment: u32,
    /// The longest discard, in bytes; 0: no limit.
    pub max_pdiscard: u64,
    /// Addresses and lengths of buffers should be multiples of this, or the driver has to copy. 1: any will do.
    pub mem_alignment: u32,
    /// The length that requests do best to have, in bytes; 0: unknown.
    pub opt_transfer: u64,
}

impl Default for BlockLimits {
    fn default() -> BlockLimits {
        BlockLimits {
            request_alignment: 1,
            max_transfer: 0,
            pwrite_zeroes_alignment: 1,
            max_pwrite_zeroes: 0,
            pdiscard_alignment: 1,
            max_pdiscard: 0,
            mem_alignment: 1,
            opt_transfer: 0,
        }
    }
}

impl BlockLimits {
    /// Checks what each field promises; called once by the node for what a driver returns.
    pub(crate) fn assert_valid(&self) {
        for align in [
            self.request_alignment,
            self.pwrite_zeroes_alignment,
            self.pdiscard_alignment,
            self.mem_alignment,
        ] {
            assert!(
                align.is_power_of_two(),
                "alignment {align} is no power of two"
            );
        }
        assert!(
            self.pwrite_zeroes_alignment >= self.request_alignment,
            "zero writes are aligned less than writes"
        );
        assert!(
            self.pdiscard_alignment >= self.request_alignment,
            "discards are aligned less than writes"
        );
        assert!(
            self.max_transfer
                .is_multiple_of(self.request_alignment.into()),
            "max_transfer is not aligned"
        );
    }
}
