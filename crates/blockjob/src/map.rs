// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`Extents`]: what a disk holds and where, range by range, as a whole backing chain has it. `QEMU: img_map`.

use std::sync::Arc;

use blockcore::{Backend, BlockStatus, Node, Result, StatusFlags, StatusMode, chain_below};

/// A range of a disk that is the same throughout.
#[derive(Clone, Debug, Default)]
pub struct Extent {
    /// Where it begins, in bytes.
    pub start: u64,
    /// Its length in bytes.
    pub length: u64,
    /// How many layers below the top it comes from.
    pub depth: usize,
    /// Some layer holds it.
    pub present: bool,
    /// It reads as zero.
    pub zero: bool,
    /// It reads from a layer's storage.
    pub data: bool,
    /// It is stored compressed.
    pub compressed: bool,
    /// Where it lies in [`file`](Extent::file), in bytes.
    pub offset: Option<u64>,
    /// The node that `offset` speaks of.
    pub file: Option<Arc<Node>>,
}

impl Extent {
    fn new(start: u64, depth: usize, status: &BlockStatus) -> Extent {
        let has = |flag| status.flags.contains(flag);
        let valid = has(StatusFlags::OFFSET_VALID);
        Extent {
            start,
            length: status.bytes,
            depth,
            present: has(StatusFlags::ALLOCATED),
            zero: has(StatusFlags::ZERO),
            data: has(StatusFlags::DATA),
            compressed: has(StatusFlags::COMPRESSED),
            offset: valid.then_some(status.map),
            file: status.file.clone().filter(|_| valid),
        }
    }

    /// Whether `next` continues this extent.
    fn continues(&self, next: &Extent) -> bool {
        let same_file = match (&self.file, &next.file) {
            (None, None) => true,
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            _ => false,
        };
        same_file
            && self.depth == next.depth
            && self.present == next.present
            && self.zero == next.zero
            && self.data == next.data
            && self.compressed == next.compressed
            && self.offset.map(|o| o + self.length) == next.offset
    }
}

/// Goes through the extents of a range of a disk, joining neighbours that continue each other. Dropping it, or a future of it, loses nothing.
#[derive(Debug)]
pub struct Extents<'a> {
    disk: &'a Backend,
    at: u64,
    end: u64,
    current: Option<Extent>,
}

impl<'a> Extents<'a> {
    /// The extents of `length` bytes from `start` on; what lies past the end of the disk has none.
    pub fn new(disk: &'a Backend, start: u64, length: u64) -> Extents<'a> {
        Extents {
            disk,
            at: start,
            end: start.saturating_add(length).min(disk.length()),
            current: None,
        }
    }

    /// The next extent.
    ///
    /// # Errors
    /// The drivers'.
    pub async fn next(&mut self) -> Result<Option<Extent>> {
        while self.at < self.end {
            let next = extent_at(self.disk.root(), self.at, self.end - self.at).await?;
            if next.length == 0 {
                break;
            }
            self.at += next.length;
            match &mut self.current {
                Some(current) if current.continues(&next) => current.length += next.length,
                _ => {
                    if let Some(done) = self.current.replace(next) {
                        return Ok(Some(done));
                    }
                }
            }
        }
        Ok(self.current.take())
    }
}

/// Asks layer by layer until one says data or zero. A layer that knows that nothing below it reaches this far says zero without holding the
/// range; that is an answer of its own, told from one that a backing node gives.
async fn extent_at(top: &Arc<Node>, at: u64, bytes: u64) -> Result<Extent> {
    let (mut node, mut bytes, mut depth) = (top.clone(), bytes, 0);
    loop {
        let status = node.block_status(at, bytes, StatusMode::Precise).await?;
        let decided = status
            .flags
            .intersects(StatusFlags::DATA | StatusFlags::ZERO);
        let past_end = status.bytes == 0;
        if decided {
            return Ok(Extent::new(at, depth, &status));
        }
        let below = chain_below(&node);
        let (false, Some(below)) = (past_end, below) else {
            let length = if past_end { bytes } else { status.bytes };
            return Ok(Extent {
                start: at,
                length,
                depth,
                ..Extent::default()
            });
        };
        bytes = status.bytes;
        depth += 1;
        node = below;
    }
}
