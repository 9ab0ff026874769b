// SPDX-License-Identifier: MIT OR Apache-2.0
//! Changing more of the header than one sector: extensions that come and go, and with them the place of the backing file's name. Called by `bitmap_store`,
//! `amend` and `check`.
//!
//! A disk writes a sector or doesn't; of several it may write any. So (INV QCOW2-ORD-6) the old header counts up to one write of its first sector, and from then on
//! the new one:
//!
//! * Where the first sector alone is in use, what follows is written before it.
//! * Where more is in use, the new header first comes in a short form that needs only that sector: without the names of feature bits, which are for people, and with
//!   the backing file's name behind everything else. What follows the first sector is in nobody's use then, and is written before the first sector once more.
//! * Where even that doesn't fit (long extensions of other programs in a small cluster), what follows is written before the first sector, and a power cut in between
//!   may leave a header that can't be opened. QEMU's way is that one always.
//!
//! An error is undone by writing the old header. If that fails too, or the runtime ends in the middle, nothing is written any more until the image is opened again.

use std::sync::atomic::Ordering;

use blockcore::{Child, IoBuf, IoBufMut, ReadFlags, Result, WriteFlags};

use crate::extension;
use crate::format::V2_HEADER_BYTES;
use crate::header::Header;
use crate::image::Image;

/// What a disk writes as a whole, in bytes.
const SECTOR: usize = blockcore::SECTOR_BYTES as usize;

/// Says that nobody knows what is on disk, unless it is told that somebody does.
pub(crate) struct Uncertain<'a>(Option<&'a Image>);

impl<'a> Uncertain<'a> {
    /// From now on nobody knows.
    pub fn about(image: &'a Image) -> Uncertain<'a> {
        Uncertain(Some(image))
    }

    /// Memory and disk agree.
    pub fn resolve(mut self) {
        self.0 = None;
    }
}

impl Drop for Uncertain<'_> {
    fn drop(&mut self) {
        if let Some(image) = self.0 {
            image.uncertain.store(true, Ordering::Release);
        }
    }
}

impl Image {
    /// Changes the header, in memory and durably on disk.
    ///
    /// # Errors
    /// `InvalidArgument` for a header that doesn't fit into a cluster; those of the file. The header is the old one then, or nothing is written any more.
    pub async fn rewrite_header(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let _no_commits = self.commits.none().await;
        self.check_sound()?;
        let mut header = self.header().clone();
        change(&mut header);
        let rewrite = Rewrite::prepare(&self.file, &header).await?;
        let uncertain = Uncertain::about(self);
        if let Err(e) = rewrite.write(&header).await {
            if rewrite.undo().await.is_ok() {
                uncertain.resolve();
            }
            return Err(e);
        }
        uncertain.resolve();
        *self.header() = header;
        Ok(())
    }
}

/// A header on disk, and what takes its place.
pub(crate) struct Rewrite<'a> {
    file: &'a Child,
    /// Whole sectors of both, equally many.
    old: Vec<u8>,
    new: Vec<u8>,
    /// How many bytes of the old one are in use.
    old_end: usize,
}

impl<'a> Rewrite<'a> {
    /// Looks at what is there, and writes nothing.
    ///
    /// # Errors
    /// `InvalidArgument` for a header that doesn't fit into a cluster; those of the file.
    pub async fn prepare(file: &'a Child, header: &Header) -> Result<Rewrite<'a>> {
        let encoded = header.encode()?;
        let cluster = IoBufMut::zeroed(1 << header.cluster_bits);
        let read = file.preadv(0, cluster, ReadFlags::empty()).await?;
        let mut old = read.to_vec();
        let old_end = used_bytes(&old);
        old.truncate(old_end.max(encoded.len()).next_multiple_of(SECTOR));
        let mut new = old.clone();
        new[..encoded.len()].copy_from_slice(&encoded);
        Ok(Rewrite {
            file,
            old,
            new,
            old_end,
        })
    }

    /// Writes `header`, for which this was prepared, durably.
    ///
    /// # Errors
    /// Those of the file; what is there then is for [`undo`](Rewrite::undo) to settle.
    pub async fn write(&self, header: &Header) -> Result<()> {
        let (old, new) = (&self.old, &self.new);
        let sectors = old.chunks(SECTOR).zip(new.chunks(SECTOR)).enumerate();
        let changed: Vec<usize> = sectors.filter(|(_, (a, b))| a != b).map(|s| s.0).collect();
        let (Some(&first), Some(&last)) = (changed.first(), changed.last()) else {
            return Ok(());
        };
        if first == last {
            let at = first * SECTOR;
            let sector = new[at..at + SECTOR].to_vec();
            return self.write_durably(at as u64, sector).await;
        }
        if self.old_end > SECTOR
            && let Some((head, name)) = short_form(header, new.len())
        {
            if let Some(name) = name {
                self.write_durably(new.len() as u64, name).await?;
            }
            self.write_durably(0, head).await?;
        }
        self.write_head(new, first.max(1)..last + 1).await
    }

    /// Writes the old header again.
    ///
    /// # Errors
    /// Those of the file: nobody knows then which of both is there.
    pub async fn undo(&self) -> Result<()> {
        self.write_head(&self.old, 1..self.old.len() / SECTOR).await
    }

    /// Writes some sectors of a header, and then the first.
    async fn write_head(&self, head: &[u8], rest: std::ops::Range<usize>) -> Result<()> {
        let bytes = head[rest.start * SECTOR..rest.end * SECTOR].to_vec();
        if !bytes.is_empty() {
            self.write_durably((rest.start * SECTOR) as u64, bytes)
                .await?;
        }
        self.write_durably(0, head[..SECTOR].to_vec()).await
    }

    async fn write_durably(&self, at: u64, bytes: Vec<u8>) -> Result<()> {
        let flags = WriteFlags::empty();
        self.file.pwritev(at, IoBuf::from(bytes), flags).await?;
        self.file.flush().await
    }
}

/// How far the header on disk reaches, with its extensions and the name of the backing file.
fn used_bytes(bytes: &[u8]) -> usize {
    let field = |at: usize, n: usize| {
        let bytes = bytes[at..at + n].iter();
        bytes.fold(0usize, |value, b| value << 8 | usize::from(*b))
    };
    let (name_at, name_bytes) = (field(8, 8), field(16, 4));
    let extensions_at = match field(4, 4) {
        2 => V2_HEADER_BYTES as usize,
        _ => field(100, 4),
    };
    let area_end = if name_at == 0 { bytes.len() } else { name_at };
    let area = bytes.get(extensions_at..area_end).unwrap_or(&[]);
    let extensions = extension::encode(&extension::parse_prefix(area));
    (extensions_at + extensions.len())
        .max(name_at + name_bytes)
        .min(bytes.len())
}

/// The first sector of a header that needs no more of them but for the name of the backing file, which is at `name_at` if it isn't in there.
fn short_form(header: &Header, name_at: usize) -> Option<(Vec<u8>, Option<Vec<u8>>)> {
    let mut short = header.clone();
    short
        .extensions
        .retain(|e| e.kind != extension::FEATURE_NAMES);
    let (mut head, name) = short.encode_apart(name_at).ok()?;
    if head.len() > SECTOR {
        return None;
    }
    head.resize(SECTOR, 0);
    Some((head, name))
}
