// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the metadata of an image lies.

/// The end of the header extensions, and those that say where something else is.
const EXTENSION_END: u64 = 0;
const EXTENSION_BITMAPS: u64 = 0x2385_2875;
const EXTENSION_ENCRYPTION: u64 = 0x0537_be77;

/// Bytes of a LUKS header before the key material.
const LUKS_HEADER_BYTES: u64 = 592;
/// Bytes of a snapshot table that are looked at, and of a directory of bitmaps.
const TABLE_BYTES: u64 = 320;
/// Bytes of an entry of the bitmap directory, without its name.
const DIRECTORY_ENTRY_BYTES: u64 = 24;
/// The most bitmaps that are looked at.
const BITMAPS: usize = 4;

struct Words<'a> {
    image: &'a [u8],
    cluster: u64,
    out: Vec<usize>,
}

/// Byte offsets of the words worth changing: the header and what follows it, the first entries of every table, snapshots, bitmaps, key slots.
pub fn of(image: &[u8]) -> Vec<usize> {
    let mut words = Words {
        image,
        cluster: 65536,
        out: Vec::new(),
    };
    words.all(
        0,
        256.max(LUKS_HEADER_BYTES * u64::from(image.starts_with(b"LUKS"))),
    );
    if image.starts_with(b"QFI") {
        words.cluster = 1 << words.half(20).min(21);
        words.tables();
        words.extensions();
    }
    let mut out = words.out;
    out.retain(|&at| at + 8 <= image.len());
    out
}

impl Words<'_> {
    fn word(&self, at: u64) -> u64 {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        let bytes = at.checked_add(8).and_then(|end| self.image.get(at..end));
        bytes.map_or(0, |b| {
            u64::from_be_bytes(b.try_into().expect("eight bytes"))
        })
    }

    fn half(&self, at: u64) -> u64 {
        self.word(at) >> 32
    }

    /// Every word of a structure.
    fn all(&mut self, at: u64, bytes: u64) {
        self.out
            .extend((at..at + bytes).step_by(4).map(|p| p as usize));
    }

    /// The first entries of a table that are in use.
    fn table(&mut self, at: u64, entries: u64) -> Vec<u64> {
        let places = (0..entries).map(|i| at + i * 8);
        let used: Vec<u64> = places.filter(|&p| self.word(p) != 0).take(24).collect();
        self.out.extend(used.iter().map(|&p| p as usize));
        used
    }

    /// A table of tables.
    fn tree(&mut self, at: u64, entries: u64) {
        for entry in self.table(at, entries) {
            let table = self.word(entry) & 0x00ff_ffff_ffff_fe00;
            self.table(table, self.cluster / 8);
        }
    }

    fn tables(&mut self) {
        self.tree(self.word(40), self.half(36).min(64));
        self.tree(self.word(48), self.cluster / 8);
        let (snapshots, count) = (self.word(64), self.half(60));
        if snapshots != 0 && count != 0 {
            self.all(snapshots, TABLE_BYTES);
            self.tree(self.word(snapshots), self.half(snapshots + 8).min(64));
        }
        // Whatever begins a cluster.
        let clusters = (0..self.image.len() as u64).step_by(self.cluster as usize);
        for at in clusters.take(32) {
            self.table(at, 2);
        }
    }

    fn extensions(&mut self) {
        let mut at = match self.half(4) {
            2 => 72,
            _ => self.half(100),
        };
        while at < self.cluster.min(self.image.len() as u64) {
            let (kind, bytes) = (self.half(at), self.half(at + 4));
            let data = at + 8;
            match kind {
                EXTENSION_END => break,
                EXTENSION_BITMAPS => {
                    self.all(at, 32);
                    self.bitmaps(self.word(data + 16));
                }
                EXTENSION_ENCRYPTION => {
                    self.all(at, 24);
                    self.all(self.word(data), LUKS_HEADER_BYTES);
                }
                _ => {}
            }
            at = data + bytes.next_multiple_of(8);
        }
    }

    fn bitmaps(&mut self, directory: u64) {
        self.all(directory, TABLE_BYTES);
        let mut at = directory;
        for _ in 0..BITMAPS {
            let (table, entries) = (self.word(at), self.half(at + 8));
            if table == 0 {
                break;
            }
            self.table(table, entries.min(64));
            let name = self.half(at + 16) & 0xffff;
            let more = self.half(at + 20);
            at += (DIRECTORY_ENTRY_BYTES + name + more).next_multiple_of(8);
        }
    }
}
