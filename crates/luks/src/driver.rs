// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`LuksDriver`]: the format `luks`, one encrypted disk behind a header. `QEMU: block/crypto.c`.
//!
//! A request goes to the file at the payload's offset, encrypted on the way there and decrypted on the way back. There is nothing but that: no holes, so zeroes
//! are written like any data, and what a growth adds reads as noise until it is written.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use blockcore::{
    AmendProgress, BlockDriver, BlockError, BlockLimits, Child, DriverInfo, ErrorKind, IoBuf,
    IoBufMut, MAX_LENGTH_BYTES, Options, ReadFlags, Result, Secrets, SpecificInfo, TruncateRequest,
    WriteFlags,
};

use crate::header::Header;
use crate::info::header_info;
use crate::sector::{INLINE_BYTES_MAX, SECTOR_BYTES, SectorCipher};
use crate::slot_change::SlotChange;
use crate::store::FileStore;
use crate::volume::Unlocked;

/// The longest request, in bytes: each write makes a copy.
const TRANSFER_BYTES_MAX: u64 = 2 << 20;

/// An open volume.
#[derive(Debug)]
pub struct LuksDriver {
    pub(crate) file: Child,
    /// The file of the header, where it has one of its own.
    pub(crate) header_file: Option<Child>,
    pub(crate) header: Mutex<Header>,
    /// `None`: opened to be looked at, without a password.
    pub(crate) unlocked: Option<Unlocked>,
    pub(crate) payload_offset: u64,
    /// Where `amend` finds new passwords.
    pub(crate) secrets: Secrets,
}

/// The number of the sector at an offset of the disk.
fn sector(offset: u64) -> u64 {
    offset / SECTOR_BYTES as u64
}

impl LuksDriver {
    fn unlocked(&self) -> Result<&Unlocked> {
        let text = "The image was opened without its key";
        self.unlocked
            .as_ref()
            .ok_or_else(|| BlockError::new(ErrorKind::PermissionDenied, text))
    }

    fn cipher(&self) -> Result<&Arc<SectorCipher>> {
        Ok(&self.unlocked()?.cipher)
    }

    /// The header as it is now.
    pub(crate) fn header(&self) -> Header {
        self.header
            .lock()
            .expect("no code panics while it holds this lock")
            .clone()
    }
}

#[async_trait]
impl BlockDriver for LuksDriver {
    fn format_name(&self) -> &'static str {
        "luks"
    }

    fn is_encrypted(&self) -> bool {
        true
    }

    fn children(&self) -> Vec<&Child> {
        self.header_file.iter().chain([&self.file]).collect()
    }

    fn primary(&self) -> Option<&Child> {
        Some(&self.file)
    }

    fn strong_options(&self) -> &'static [&'static str] {
        &["key-secret"]
    }

    fn strong_children(&self) -> Vec<&Child> {
        self.header_file.iter().collect()
    }

    fn limits(&self) -> BlockLimits {
        let sector = SECTOR_BYTES as u32;
        BlockLimits {
            request_alignment: sector,
            pwrite_zeroes_alignment: sector,
            pdiscard_alignment: sector,
            max_transfer: TRANSFER_BYTES_MAX,
            ..BlockLimits::default()
        }
    }

    async fn length(&self) -> Result<u64> {
        let file = self.file.refresh_length().await?;
        file.checked_sub(self.payload_offset).ok_or_else(|| {
            BlockError::from_errno(libc::EIO).context("Could not refresh total sector count")
        })
    }

    fn read_nowait(&self, offset: u64, buf: &mut [u8]) -> bool {
        let Ok(cipher) = self.cipher() else {
            return false;
        };
        let there = buf.len() <= INLINE_BYTES_MAX
            && self.file.read_nowait(self.payload_offset + offset, buf);
        if there {
            cipher.decrypt(sector(offset), buf);
        }
        there
    }

    async fn preadv(&self, offset: u64, buf: IoBufMut, flags: ReadFlags) -> Result<IoBufMut> {
        let cipher = self.cipher()?;
        let at = self.payload_offset + offset;
        let read = self.file.preadv(at, buf, flags).await?;
        cipher.decrypt_buf(sector(offset), read).await
    }

    async fn pwritev(&self, offset: u64, buf: IoBuf, flags: WriteFlags) -> Result<()> {
        // The copy is memory of our own.
        let flags = flags - WriteFlags::REGISTERED_BUF;
        let encrypted = self.cipher()?.encrypt_buf(sector(offset), buf).await?;
        let at = self.payload_offset + offset;
        self.file.pwritev(at, encrypted, flags).await
    }

    fn supported_write_flags(&self) -> WriteFlags {
        WriteFlags::FUA | WriteFlags::UNCHANGED
    }

    /// What is new reads as noise, as after `resize` with QEMU's tool: nothing of the file is encrypted that nobody has written.
    async fn truncate(&self, request: TruncateRequest) -> Result<()> {
        match request.bytes.checked_add(self.payload_offset) {
            Some(bytes) if bytes <= MAX_LENGTH_BYTES => {
                let request = TruncateRequest { bytes, ..request };
                self.file.truncate(request).await
            }
            _ => {
                Err(BlockError::from_errno(libc::EFBIG)
                    .message("The requested file size is too large"))
            }
        }
    }

    async fn amend(&self, mut options: Options, _progress: &AmendProgress) -> Result<()> {
        let force = options.take_bool("force")?.unwrap_or(false);
        let change = SlotChange::take(&mut options)?;
        let store = FileStore(self.header_file.as_ref().unwrap_or(&self.file));
        let (mut header, key) = (self.header(), &self.unlocked()?.key);
        let changed = change.apply(&mut header, &store, key, &self.secrets, force);
        let changed = changed.await;
        *self
            .header
            .lock()
            .expect("no code panics while it holds this lock") = header;
        changed
    }

    async fn allocated_size(&self) -> Result<Option<u64>> {
        let mut sum = None;
        for child in self.children() {
            let bytes = child.driver().allocated_size().await?;
            sum = bytes.map(|b| b + sum.unwrap_or(0)).or(sum);
        }
        Ok(sum)
    }

    async fn info(&self) -> Result<DriverInfo> {
        Ok(DriverInfo::default())
    }

    async fn specific_info(&self) -> Result<Option<SpecificInfo>> {
        Ok(Some(SpecificInfo {
            type_name: "luks",
            data: header_info(&self.header(), None),
        }))
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
