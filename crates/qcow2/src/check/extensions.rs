// SPDX-License-Identifier: MIT OR Apache-2.0
//! What header extensions refer to: the encryption header, and persistent bitmaps (directory, tables, data).

use blockcore::{BlockError, ErrorKind, Result};
use luks::HEADER_BYTES;

use super::Checker;
use super::count::Use;
use crate::bitmap_load;
use crate::crypto::CryptMethod;
use crate::extension;
use crate::header::Header;

/// Bytes of the extension that names the encryption header: offset, length.
const ENCRYPTION_BYTES: usize = 16;

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn bad<T>(text: impl Into<String>) -> Result<T> {
    Err(BlockError::new(ErrorKind::InvalidImage, text))
}

fn find(header: &Header, kind: u32) -> Option<&[u8]> {
    let extension = header.extensions.iter().find(|e| e.kind == kind)?;
    Some(&extension.data)
}

/// Offset and length of the encryption header.
///
/// # Errors
/// `InvalidImage` for an extension that makes no sense.
pub(crate) fn encryption_header(header: &Header) -> Result<Option<(u64, u64)>> {
    let Some(data) = find(header, extension::ENCRYPTION) else {
        return Ok(None);
    };
    if data.len() != ENCRYPTION_BYTES {
        return bad(format!(
            "CRYPTO header extension size {}, but expected size {ENCRYPTION_BYTES}",
            data.len()
        ));
    }
    let (offset, length) = (long(data, 0), long(data, 8));
    let cluster = 1u64 << header.cluster_bits;
    if !offset.is_multiple_of(cluster) {
        return bad(format!(
            "Encryption header offset '{offset}' is not a multiple of cluster size '{cluster}'"
        ));
    }
    Ok(Some((offset, length)))
}

impl Checker<'_> {
    /// Counts what header extensions refer to.
    pub(super) async fn count_extensions(&mut self) -> Result<()> {
        self.count_keys().await?;
        let Some(data) = bitmap_load::extension_data(&self.header) else {
            return Ok(());
        };
        let (file, header) = (self.file, &self.header);
        let bits = header.cluster_bits;
        let ((offset, bytes), entries) = bitmap_load::read_stored(file, header, data).await?;
        self.count(offset, bytes, Use::OTHER);
        for entry in entries {
            self.count(entry.table_offset, entry.table_bytes(), Use::OTHER);
            let table = bitmap_load::read_entries(file, bits, &entry).await?;
            for host in bitmap_load::data_offsets(&table) {
                self.count(host, self.cluster, Use::OTHER);
            }
        }
        Ok(())
    }

    /// INV QCOW2-REPAIR-4: where the header of an encrypted image is damaged, its keys are among what nobody seems to refer to.
    async fn count_keys(&mut self) -> Result<()> {
        let Some((offset, length)) = encryption_header(&self.header)? else {
            if self.header.crypt_method == CryptMethod::Luks {
                self.lost += 1;
                self.corruption(
                    "ERROR the image is encrypted, and names no LUKS header".to_owned(),
                );
            }
            return Ok(());
        };
        // The image's own header is no LUKS header, whatever the pointer says.
        if offset != 0 {
            self.count(offset, length, Use::OTHER);
        }
        if !self.holds_all_keys(offset, length).await? {
            self.lost += 1;
            self.corruption(format!(
                "ERROR the {length} bytes at offset={offset:#x} are no LUKS header, or not all of one"
            ));
        }
        Ok(())
    }

    /// Whether the encryption header is one, and is as long as its fields say. Without the keys in it no guest data can be read ever again, so no part of it may
    /// become free because of a wrong length.
    async fn holds_all_keys(&self, offset: u64, length: u64) -> Result<bool> {
        let words = self.words(offset, HEADER_BYTES.div_ceil(8) as u64).await?;
        let head: Vec<u8> = words.iter().flat_map(|w| w.to_be_bytes()).collect();
        Ok(head.first_chunk().is_some_and(|head| {
            luks::Header::probe(head) && luks::Header::claimed_bytes(head) <= length
        }))
    }
}
