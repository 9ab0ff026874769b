// SPDX-License-Identifier: MIT OR Apache-2.0
//! Block status of a node, and the walk down its backing chain. `QEMU: bdrv_co_do_block_status`, `bdrv_co_common_block_status_above`.

use std::sync::Arc;

use crate::error::{Op, Result};
use crate::node::Node;
use crate::status::{BlockStatus, ChainStatus, StatusFlags, StatusMode};

impl Node {
    /// What the range that starts at `offset` holds, in this node alone. Answers for at most `bytes` bytes, and for none only at the end.
    ///
    /// # Errors
    /// The driver's.
    pub async fn block_status(
        &self,
        offset: u64,
        bytes: u64,
        mode: StatusMode,
    ) -> Result<BlockStatus> {
        self.settle_orphans(offset, offset.saturating_add(bytes))
            .await;
        let length = self.known_length().await?;
        if offset >= length || bytes == 0 {
            let flags = if offset >= length {
                StatusFlags::EOF
            } else {
                StatusFlags::empty()
            };
            return Ok(BlockStatus::new(flags, 0));
        }
        let bytes = bytes.min(length - offset);
        let align = self.align();
        let start = offset / align * align;
        let end = (offset + bytes)
            .next_multiple_of(align)
            .min(length.next_multiple_of(align));
        let mut status = self
            .driver()
            .block_status(start, end - start, mode)
            .await
            .map_err(|e| e.during(Op::BlockStatus).on_node(self.name()).at(offset))?;
        assert!(
            status.bytes > 0 && status.bytes <= end - start,
            "{}: status of no or too many bytes",
            self.format_name()
        );
        // Back from the aligned range to the one asked for. The driver's answers are aligned, so at least one byte is left.
        let skipped = offset - start;
        if status.bytes <= skipped {
            return Ok(BlockStatus::new(
                StatusFlags::DATA | StatusFlags::ALLOCATED,
                (align - skipped).min(bytes),
            ));
        }
        status.bytes = (status.bytes - skipped).min(bytes);
        status.map += skipped;

        let file = status.file.clone();
        if status.flags.contains(StatusFlags::RAW) {
            let file = file.expect("a driver that says RAW names the file");
            status = Box::pin(file.block_status(status.map, status.bytes, mode)).await?;
            // A protocol driver that says where a range lies means its own node, which it can't name.
            status.file.get_or_insert(file);
            status.flags.remove(StatusFlags::EOF);
            if status.bytes == 0 {
                // The file ends before the node does (its length is rounded up to a sector).
                status =
                    BlockStatus::new(StatusFlags::ZERO | StatusFlags::ALLOCATED, length - offset);
            }
        } else {
            self.complete_status(&mut status, offset, mode, file)
                .await?;
        }
        if offset + status.bytes == length {
            status.flags |= StatusFlags::EOF;
        }
        Ok(status)
    }

    /// Adds what follows from the driver's answer.
    async fn complete_status(
        &self,
        status: &mut BlockStatus,
        offset: u64,
        mode: StatusMode,
        file: Option<Arc<Node>>,
    ) -> Result<()> {
        if status
            .flags
            .intersects(StatusFlags::DATA | StatusFlags::ZERO)
        {
            status.flags |= StatusFlags::ALLOCATED;
        } else if self.driver().supports_backing() {
            match self.backing() {
                None => status.flags |= StatusFlags::ZERO,
                Some(backing) if mode == StatusMode::Precise && offset >= backing.length() => {
                    status.flags |= StatusFlags::ZERO;
                }
                Some(_) => {}
            }
        }
        let recurse = StatusFlags::RECURSE | StatusFlags::DATA | StatusFlags::OFFSET_VALID;
        if let Some(file) = file
            && mode == StatusMode::Precise
            && status.flags.contains(recurse)
        {
            // Only a hint: where the file can't tell, the data are data.
            if let Ok(below) = Box::pin(file.block_status(status.map, status.bytes, mode)).await {
                let at_end = below.flags.contains(StatusFlags::EOF);
                if at_end && (below.bytes == 0 || below.is_zero()) {
                    status.flags |= StatusFlags::ZERO;
                } else if below.bytes > 0 {
                    status.bytes = below.bytes;
                    status.flags |= below.flags & StatusFlags::ZERO;
                }
            }
        }
        status.flags.remove(StatusFlags::RECURSE);
        Ok(())
    }
}

/// What the range that starts at `offset` holds, asking `top` and the backing nodes below it until one has an answer, or until `base` (which
/// is not asked) is reached. Answers for at most `bytes` bytes.
///
/// What lies past the end of a backing node reads as zero, and counts as decided by that node.
///
/// # Errors
/// Those of the layers asked.
pub async fn chain_status(
    top: &Arc<Node>,
    base: Option<&Arc<Node>>,
    offset: u64,
    bytes: u64,
    mode: StatusMode,
) -> Result<ChainStatus> {
    let mut node = top.clone();
    let mut depth = 0;
    let mut limit = bytes;
    let mut first_eof = None;
    loop {
        let mut status = node.block_status(offset, limit, mode).await?;
        if depth > 0 && status.bytes == 0 && status.flags.contains(StatusFlags::EOF) {
            // This layer is shorter than the ones above, which hold nothing here: zeroes up to where they were asked.
            status = BlockStatus::new(StatusFlags::ZERO | StatusFlags::ALLOCATED, limit);
            return Ok(ChainStatus {
                status: with_eof(status, offset, first_eof),
                depth,
                node,
            });
        }
        if depth == 0 && status.flags.contains(StatusFlags::EOF) {
            first_eof = Some(offset + status.bytes);
        }
        if status.is_allocated() || status.bytes == 0 {
            return Ok(ChainStatus {
                status: with_eof(status, offset, first_eof),
                depth,
                node,
            });
        }
        limit = limit.min(status.bytes);
        let below = chain_below(&node).filter(|n| base.is_none_or(|b| !Arc::ptr_eq(n, b)));
        let Some(below) = below else {
            return Ok(ChainStatus {
                status: with_eof(status, offset, first_eof),
                depth,
                node,
            });
        };
        node = below;
        depth += 1;
    }
}

/// `EOF` speaks of the top layer, whichever layer answered.
fn with_eof(mut status: BlockStatus, offset: u64, first_eof: Option<u64>) -> BlockStatus {
    status
        .flags
        .set(StatusFlags::EOF, first_eof == Some(offset + status.bytes));
    status
}

/// The node that shows through `node`: its backing node, or what it filters.
pub fn chain_below(node: &Node) -> Option<Arc<Node>> {
    if node.driver().is_filter() {
        return node.driver().primary().map(|c| c.node().clone());
    }
    node.backing().map(|c| c.node().clone())
}

/// Whether a range surely reads as zero, as the whole chain has it. Ranges past the end do.
///
/// # Errors
/// Those of the layers asked.
pub async fn chain_is_zero(top: &Arc<Node>, offset: u64, bytes: u64) -> Result<bool> {
    let end = (offset + bytes).min(top.length());
    let mut at = offset;
    while at < end {
        let found = chain_status(top, None, at, end - at, StatusMode::Precise).await?;
        if !found.status.is_zero() || found.status.bytes == 0 {
            return Ok(false);
        }
        at += found.status.bytes;
    }
    Ok(true)
}
