// SPDX-License-Identifier: MIT OR Apache-2.0
//! The VM state area: guest bytes behind the end of the disk, from the first L1 entry on that the disk doesn't need. A machine's state is written there before a
//! snapshot is taken, and belongs to the snapshot afterwards.

use std::sync::Arc;

use blockcore::{BlockError, DebugEvent, ErrorKind, IoBuf, IoBufMut, Result};

use crate::format::MAX_L1_BYTES;
use crate::image::Image;

impl Image {
    /// Guest bytes that one L1 entry covers.
    fn table_bytes(&self) -> u64 {
        1 << (self.l2_bits() + self.cluster_bits)
    }

    /// Where the area begins, in guest bytes.
    pub fn vm_state_offset(&self) -> u64 {
        self.size().next_multiple_of(self.table_bytes())
    }

    /// A range of the area in guest bytes, start and end.
    ///
    /// # Errors
    /// EFBIG for a range past what the format can address.
    pub fn vm_state_range(&self, offset: u64, bytes: u64) -> Result<(u64, u64)> {
        let start = self.vm_state_offset().checked_add(offset);
        let end = start.and_then(|s| s.checked_add(bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= MAX_L1_BYTES / 8 * self.table_bytes() => {
                Ok((start, end))
            }
            _ => Err(BlockError::from_errno(libc::EFBIG)),
        }
    }

    /// Reads the area. What was never written is zero.
    ///
    /// # Errors
    /// As [`read`](Image::read); `InvalidArgument` for a range past what the format can address.
    pub async fn load_vm_state(self: &Arc<Self>, offset: u64, buf: IoBufMut) -> Result<IoBufMut> {
        self.check_no_data_file()?;
        let (start, _) = self.vm_state_range(offset, buf.len() as u64)?;
        self.file.debug_event(DebugEvent::VmstateLoad).await;
        self.read(start, buf).await
    }

    /// Writes the area.
    ///
    /// # Errors
    /// As [`write`](Image::write); `ReadOnly`; `InvalidArgument` for a range past what the format can address.
    pub async fn save_vm_state(self: &Arc<Self>, offset: u64, buf: IoBuf) -> Result<()> {
        self.check_sound()?;
        if !self.writable.load(std::sync::atomic::Ordering::Acquire) {
            return Err(BlockError::new(ErrorKind::ReadOnly, "").errno_is(libc::EPERM));
        }
        self.check_no_data_file()?;
        let (start, end) = self.vm_state_range(offset, buf.len() as u64)?;
        self.file.debug_event(DebugEvent::VmstateSave).await;
        self.spawn(start, end, move |image| async move {
            let entries = end.div_ceil(image.table_bytes()) as usize;
            image.grow_l1(entries).await?;
            image.write_allocating(start, buf).await
        })
        .await
    }
}
