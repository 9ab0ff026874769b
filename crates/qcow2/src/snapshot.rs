// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table of internal snapshots, for reading. Making, applying and deleting them comes later; that their clusters are never written in place is the
//! business of `write` (INV QCOW2-META-2).

use blockcore::{BlockError, Child, ErrorKind, IoBufMut, ReadFlags, Result};

use crate::format::{MAX_L1_BYTES, MAX_SNAPSHOT_TABLE_BYTES};
use crate::header::Header;

/// Bytes of the fixed part of an entry.
const FIXED_BYTES: u64 = 40;
/// The most bytes of extra data in an entry.
const MAX_EXTRA_BYTES: u64 = 1024;

/// One internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The id, unique in the image.
    pub id: String,
    /// The name.
    pub name: String,
    /// Byte offset of its L1 table.
    pub l1_table_offset: u64,
    /// Entries in its L1 table.
    pub l1_size: u32,
    /// When it was made: seconds since 1970.
    pub date_sec: u32,
    /// When it was made: nanoseconds within the second.
    pub date_nsec: u32,
    /// How long the guest had been running, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of VM state.
    pub vm_state_size: u64,
    /// The length of the disk then, in bytes, where it was noted.
    pub disk_size: Option<u64>,
    /// Instructions executed (record/replay), where noted.
    pub icount: Option<u64>,
}

/// The snapshots of an image, and the bytes that their table takes up.
#[derive(Clone, Debug, Default)]
pub struct SnapshotTable {
    /// In the order of the table.
    pub snapshots: Vec<Snapshot>,
    /// The length of the table in bytes.
    pub bytes: u64,
}

fn bad<T>(text: impl Into<String>) -> Result<T> {
    Err(BlockError::new(ErrorKind::InvalidImage, text))
}

/// Reads the snapshot table.
///
/// # Errors
/// `InvalidImage` for a table that can't be; those of the file.
pub async fn read_table(header: &Header, file: &Child) -> Result<SnapshotTable> {
    let mut table = SnapshotTable::default();
    let mut at = header.snapshots_offset;
    for index in 0..header.nb_snapshots {
        at = at.next_multiple_of(8);
        let fixed = read(file, at, FIXED_BYTES).await?;
        let word = |i: usize| u32::from_be_bytes(fixed[i..i + 4].try_into().expect("four bytes"));
        let long = |i: usize| u64::from_be_bytes(fixed[i..i + 8].try_into().expect("eight bytes"));
        let short = |i: usize| {
            u64::from(u16::from_be_bytes(
                fixed[i..i + 2].try_into().expect("two bytes"),
            ))
        };
        let (id_bytes, name_bytes, extra_bytes) = (short(12), short(14), u64::from(word(36)));
        if extra_bytes > MAX_EXTRA_BYTES {
            return bad(format!(
                "Too much extra metadata in snapshot table entry {index}"
            ));
        }
        let rest = read(file, at + FIXED_BYTES, extra_bytes + id_bytes + name_bytes).await?;
        let extra = &rest[..extra_bytes as usize];
        let extra_long = |i: usize| {
            extra
                .get(i..i + 8)
                .map(|b| u64::from_be_bytes(b.try_into().expect("eight bytes")))
        };
        let (id, name) = rest[extra_bytes as usize..].split_at(id_bytes as usize);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let snapshot = Snapshot {
            id: text(id),
            name: text(name),
            l1_table_offset: long(0),
            l1_size: word(8),
            date_sec: word(16),
            date_nsec: word(20),
            vm_clock_nsec: long(24),
            vm_state_size: extra_long(0).unwrap_or(word(32).into()),
            disk_size: extra_long(8),
            icount: extra_long(16).filter(|&n| n != u64::MAX),
        };
        if u64::from(snapshot.l1_size) * 8 > MAX_L1_BYTES {
            return bad(format!("Snapshot L1 table too large in entry {index}"));
        }
        table.snapshots.push(snapshot);
        at += FIXED_BYTES + extra_bytes + id_bytes + name_bytes;
        table.bytes = at - header.snapshots_offset;
        if table.bytes > MAX_SNAPSHOT_TABLE_BYTES {
            return bad("Snapshot table is too large");
        }
    }
    Ok(table)
}

async fn read(file: &Child, at: u64, bytes: u64) -> Result<Vec<u8>> {
    if at.checked_add(bytes).is_none_or(|end| end > file.length()) {
        return bad("Snapshot table reaches past the end of the file");
    }
    Ok(file
        .preadv(at, IoBufMut::zeroed(bytes as usize), ReadFlags::empty())
        .await?
        .to_vec())
}
