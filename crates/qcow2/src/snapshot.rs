// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table of internal snapshots: what is on disk. Taking, applying and deleting them is `snapshot_ops`; that their clusters are never written in place is
//! the business of `write` (INV QCOW2-META-2).

use blockcore::{BlockError, Child, ErrorKind, IoBufMut, ReadFlags, Result, SnapshotRequest};

use crate::format::{MAX_L1_BYTES, MAX_SNAPSHOT_TABLE_BYTES};
use crate::header::Header;

/// Bytes of the fixed part of an entry.
const FIXED_BYTES: u64 = 40;
/// The most bytes of extra data in an entry.
pub(crate) const MAX_EXTRA_BYTES: u64 = 1024;
/// The extra data that every entry of a version 3 image has: the length of the VM state and that of the disk.
const COMPLETE_EXTRA_BYTES: u64 = 16;
/// The extra data that this knows: besides, the number of instructions executed.
const KNOWN_EXTRA_BYTES: usize = 24;
/// What is read of the table at a time, in bytes; more than the longest id and name.
const WINDOW_BYTES: u64 = 256 << 10;

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
    /// The entry has all fields that the specification asks for.
    pub is_complete: bool,
    /// Id and name as they are on disk, where they need not be text.
    raw_names: (Vec<u8>, Vec<u8>),
    /// What later versions of the format may have put behind the extra data that is known.
    unknown_extra: Vec<u8>,
}

impl Snapshot {
    /// A new snapshot of a disk of `disk_size` bytes.
    pub fn new(id: u64, request: &SnapshotRequest, l1: (u64, u32), disk_size: u64) -> Snapshot {
        let id = id.to_string();
        Snapshot {
            raw_names: (id.clone().into_bytes(), request.name.clone().into_bytes()),
            id,
            name: request.name.clone(),
            l1_table_offset: l1.0,
            l1_size: l1.1,
            date_sec: request.date_sec,
            date_nsec: request.date_nsec,
            vm_clock_nsec: request.vm_clock_nsec,
            vm_state_size: request.vm_state_size,
            disk_size: Some(disk_size),
            icount: request.icount,
            is_complete: true,
            unknown_extra: Vec::new(),
        }
    }

    /// The entry as it lies on disk, padded to eight bytes.
    fn encode(&self, out: &mut Vec<u8>) {
        let (id, name) = &self.raw_names;
        out.extend(self.l1_table_offset.to_be_bytes());
        out.extend(self.l1_size.to_be_bytes());
        out.extend((id.len() as u16).to_be_bytes());
        out.extend((name.len() as u16).to_be_bytes());
        out.extend(self.date_sec.to_be_bytes());
        out.extend(self.date_nsec.to_be_bytes());
        out.extend(self.vm_clock_nsec.to_be_bytes());
        out.extend((self.vm_state_size as u32).to_be_bytes());
        // Entries without a disk size stay so: it isn't known.
        let known = match self.disk_size {
            None => 0,
            Some(_) => KNOWN_EXTRA_BYTES,
        };
        out.extend(((known + self.unknown_extra.len()) as u32).to_be_bytes());
        if let Some(disk_size) = self.disk_size {
            out.extend(self.vm_state_size.to_be_bytes());
            out.extend(disk_size.to_be_bytes());
            out.extend(self.icount.unwrap_or(u64::MAX).to_be_bytes());
        }
        out.extend(&self.unknown_extra);
        out.extend(id);
        out.extend(name);
        out.resize(out.len().next_multiple_of(8), 0);
    }

    /// What is wrong with the place or the length of its L1 table, in the words of QEMU's check.
    pub fn l1_fault(&self, cluster_size: u64) -> Option<String> {
        let fault = if self.l1_table_offset & (cluster_size - 1) != 0 {
            format!(
                "l1_offset={:#x}: L1 table is not cluster aligned",
                self.l1_table_offset
            )
        } else if u64::from(self.l1_size) * 8 > MAX_L1_BYTES {
            format!("l1_size={:#x}: L1 table is too large", self.l1_size)
        } else {
            return None;
        };
        Some(format!(
            "snapshot {} ({}) {fault}; snapshot table entry corrupted",
            self.id, self.name
        ))
    }
}

/// The snapshots of an image, and the bytes that their table takes up.
#[derive(Clone, Debug, Default)]
pub struct SnapshotTable {
    /// In the order of the table.
    pub snapshots: Vec<Snapshot>,
    /// The length of the table in bytes.
    pub bytes: u64,
}

impl SnapshotTable {
    /// The table as it lies on disk.
    ///
    /// # Errors
    /// `InvalidImage` for one that is longer than the format allows.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        for snapshot in &self.snapshots {
            snapshot.encode(&mut out);
        }
        if out.len() as u64 > MAX_SNAPSHOT_TABLE_BYTES {
            return Err(too_long("Snapshot table is too large"));
        }
        Ok(out)
    }
}

fn too_long(text: impl Into<String>) -> BlockError {
    BlockError::new(ErrorKind::InvalidImage, text).errno_is(libc::EFBIG)
}

/// Reads the snapshot table of an image that is to be used: every entry's L1 table is of a possible length and at a possible place.
///
/// # Errors
/// `InvalidImage` for a table that can't be; those of the file.
pub async fn read_table(header: &Header, file: &Child) -> Result<SnapshotTable> {
    let table = read_entries(header, file).await?;
    let fault = |s: &Snapshot| s.l1_fault(1 << header.cluster_bits);
    match table.snapshots.iter().find_map(fault) {
        Some(fault) => Err(BlockError::new(ErrorKind::InvalidImage, fault)),
        None => Ok(table),
    }
}

/// Reads the snapshot table as it is. Past the end of the file there are zeroes, as everywhere.
///
/// # Errors
/// `InvalidImage` for a table that is too long; those of the file.
pub async fn read_entries(header: &Header, file: &Child) -> Result<SnapshotTable> {
    let mut reader = EntryReader::new(header, file);
    let mut table = SnapshotTable::default();
    for index in 0..header.nb_snapshots {
        let entry = reader.next().await?;
        if entry.extra_bytes > MAX_EXTRA_BYTES {
            let text = format!("Too much extra metadata in snapshot table entry {index}");
            let hint = "You can force-remove this extra metadata with qemu-img check -r all";
            return Err(too_long(text).hint(hint));
        }
        table.snapshots.push(entry.snapshot);
        table.bytes = reader.bytes();
        if table.bytes > MAX_SNAPSHOT_TABLE_BYTES {
            let hint = format!(
                "You can force-remove all {} overhanging snapshots with qemu-img check -r all",
                header.nb_snapshots - index
            );
            return Err(too_long("Snapshot table is too big").hint(hint));
        }
    }
    Ok(table)
}

/// An entry of the table, and how many bytes of extra data it says it has. What is more than [`MAX_EXTRA_BYTES`] is left out of the snapshot.
pub(crate) struct Entry {
    pub snapshot: Snapshot,
    pub extra_bytes: u64,
}

/// Reads one entry of the table after the other.
pub(crate) struct EntryReader<'a> {
    window: Window<'a>,
    start: u64,
    at: u64,
}

impl<'a> EntryReader<'a> {
    pub fn new(header: &Header, file: &'a Child) -> EntryReader<'a> {
        EntryReader {
            window: Window::new(file),
            start: header.snapshots_offset,
            at: header.snapshots_offset,
        }
    }

    /// The bytes of the table up to here.
    pub fn bytes(&self) -> u64 {
        self.at - self.start
    }

    /// The next entry. Nobody knows here how many there are.
    pub async fn next(&mut self) -> Result<Entry> {
        self.at = self.at.next_multiple_of(8);
        let fixed = self.window.read(self.at, FIXED_BYTES).await?;
        let word = |i: usize| u32::from_be_bytes(fixed[i..i + 4].try_into().expect("four bytes"));
        let long = |i: usize| u64::from_be_bytes(fixed[i..i + 8].try_into().expect("eight bytes"));
        let short = |i: usize| {
            u64::from(u16::from_be_bytes(
                fixed[i..i + 2].try_into().expect("two bytes"),
            ))
        };
        let (id_bytes, name_bytes, extra_bytes) = (short(12), short(14), u64::from(word(36)));
        let mut snapshot = Snapshot {
            id: String::new(),
            name: String::new(),
            l1_table_offset: long(0),
            l1_size: word(8),
            date_sec: word(16),
            date_nsec: word(20),
            vm_clock_nsec: long(24),
            vm_state_size: word(32).into(),
            disk_size: None,
            icount: None,
            is_complete: extra_bytes >= COMPLETE_EXTRA_BYTES,
            raw_names: Default::default(),
            unknown_extra: Vec::new(),
        };
        self.at += FIXED_BYTES;
        let extra_taken = extra_bytes.min(MAX_EXTRA_BYTES);
        let extra = self.window.read(self.at, extra_taken).await?;
        let extra_long = |i: usize| {
            extra
                .get(i..i + 8)
                .map(|b| u64::from_be_bytes(b.try_into().expect("eight bytes")))
        };
        snapshot.vm_state_size = extra_long(0).unwrap_or(snapshot.vm_state_size);
        snapshot.disk_size = extra_long(8);
        snapshot.icount = extra_long(16).filter(|&n| n != u64::MAX);
        snapshot.unknown_extra = extra.get(KNOWN_EXTRA_BYTES..).unwrap_or_default().to_vec();
        self.at += extra_bytes;
        let names = self.window.read(self.at, id_bytes + name_bytes).await?;
        let (id, name) = names.split_at(id_bytes as usize);
        snapshot.raw_names = (id.to_vec(), name.to_vec());
        let text = |bytes: &[u8]| {
            // Other programs stop at a zero byte, too.
            let bytes = bytes.split(|&b| b == 0).next().unwrap_or_default();
            String::from_utf8_lossy(bytes).into_owned()
        };
        (snapshot.id, snapshot.name) = (text(id), text(name));
        self.at += id_bytes + name_bytes;
        Ok(Entry {
            snapshot,
            extra_bytes,
        })
    }
}

/// Reads pieces of a file that follow each other closely, a larger piece at a time.
struct Window<'a> {
    file: &'a Child,
    start: u64,
    bytes: Vec<u8>,
}

impl<'a> Window<'a> {
    fn new(file: &'a Child) -> Window<'a> {
        Window {
            file,
            start: 0,
            bytes: Vec::new(),
        }
    }

    /// `len` bytes at `at`; `len` is no more than [`WINDOW_BYTES`].
    async fn read(&mut self, at: u64, len: u64) -> Result<&[u8]> {
        let have = self.start..self.start + self.bytes.len() as u64;
        if at < have.start || at + len > have.end {
            let end = self.file.length().min(at + WINDOW_BYTES);
            let mut bytes = vec![];
            if at < end {
                let buf = IoBufMut::zeroed((end - at) as usize);
                bytes = self
                    .file
                    .preadv(at, buf, ReadFlags::empty())
                    .await?
                    .to_vec();
            }
            bytes.resize(WINDOW_BYTES as usize, 0);
            (self.start, self.bytes) = (at, bytes);
        }
        let from = (at - self.start) as usize;
        Ok(&self.bytes[from..from + len as usize])
    }
}

#[cfg(test)]
mod tests;
