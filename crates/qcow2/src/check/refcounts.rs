// SPDX-License-Identifier: MIT OR Apache-2.0
//! Setting refcounts right where they are: first up, then down (INV QCOW2-REPAIR-1).

use blockcore::{CheckFix, IoBufMut, ReadFlags, Result, SECTOR_BYTES};

use super::{Checker, Tally};
use crate::refcount::{get_refcount, set_refcount};

/// Which refcounts are changed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Up,
    Down,
}

impl Checker<'_> {
    /// Raises the refcounts that [`compare`](Checker::compare) said it would, and makes them durable.
    ///
    /// INV QCOW2-REPAIR-1: before `COPIED` goes away and before anything is lowered. A writer that copies a cluster takes one reference from it: one that
    /// isn't counted would be somebody else's last.
    pub(super) async fn raise_refcounts(&mut self, compared: &Tally) -> Result<()> {
        if self.fix == CheckFix::All && compared.corruptions_fixed > 0 {
            self.raise_all().await?;
        }
        Ok(())
    }

    /// Raises all refcounts that are too low, and makes them durable.
    pub(super) async fn raise_all(&mut self) -> Result<()> {
        self.change_refcounts(Direction::Up).await
    }

    /// Lowers the refcounts that are too high, and makes them durable. What referred to the clusters is durably gone by now.
    pub(super) async fn lower_refcounts(&mut self) -> Result<()> {
        if self.fix != CheckFix::None {
            self.change_refcounts(Direction::Down).await?;
        }
        Ok(())
    }

    async fn change_refcounts(&mut self, direction: Direction) -> Result<()> {
        let mut is_changed = false;
        for number in 0..self.table.len() as u64 {
            is_changed |= self.change_block(number, direction).await?;
        }
        self.block = None;
        if is_changed {
            self.file.flush().await?;
        }
        Ok(())
    }

    /// Changes the refcounts in a block, and says whether there were any to change.
    async fn change_block(&mut self, number: u64, direction: Direction) -> Result<bool> {
        let offset = self.block_offset(number);
        let entries = self.header.geometry().block_entries();
        let order = self.header.refcount_order;
        let first = number * entries;
        let end = (first + entries).min(self.references.len());
        let is_there = offset != 0 && offset.is_multiple_of(self.cluster);
        if !is_there || first >= end || offset >= self.file.length() {
            return Ok(false);
        }
        let buf = IoBufMut::zeroed(self.cluster as usize);
        let read = self.file.preadv(offset, buf, ReadFlags::empty()).await?;
        let mut block = read.to_vec();
        let mut changed: Option<(u64, u64)> = None;
        for cluster in first..end {
            let index = cluster - first;
            let (is, wanted) = (get_refcount(&block, order, index), self.wanted(cluster));
            let is_due = match direction {
                Direction::Up => is < wanted,
                Direction::Down => is > wanted && self.may_lower(),
            };
            if is_due {
                set_refcount(&mut block, order, index, wanted);
                let at = (index << order) / 8;
                let sector = at / SECTOR_BYTES * SECTOR_BYTES;
                let (start, _) = *changed.get_or_insert((sector, sector));
                changed = Some((start, sector + SECTOR_BYTES));
                if wanted == 0 {
                    self.note_free(cluster);
                }
            }
        }
        let Some((start, end)) = changed else {
            return Ok(false);
        };
        let bytes = block[start as usize..end as usize].to_vec();
        self.write(offset + start, bytes).await?;
        Ok(true)
    }

    fn note_free(&mut self, cluster: u64) {
        match self.freed.last_mut() {
            Some(last) if last.end == cluster => last.end += 1,
            _ => self.freed.push(cluster..cluster + 1),
        }
    }
}
