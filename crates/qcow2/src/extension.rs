// SPDX-License-Identifier: MIT OR Apache-2.0
//! Header extensions: typed pieces behind the header. Those that this release doesn't know are kept as they are.

use blockcore::{BlockError, ErrorKind, Result};

use crate::bitmap::BitmapsExtension;

/// The end of the list.
const END: u32 = 0;
/// The name of the backing file's format.
pub const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Names of feature bits.
pub const FEATURE_NAMES: u32 = 0x6803_f857;
/// Where persistent dirty bitmaps are.
pub const BITMAPS: u32 = 0x2385_2875;
/// Where the encryption header is.
pub const ENCRYPTION: u32 = 0x0537_be77;
/// The name of the external data file.
pub const DATA_FILE: u32 = 0x4441_5441;

/// Bytes of one entry of the feature name table: kind, bit, name.
const FEATURE_NAME_BYTES: usize = 48;

/// The name of a format is shorter than this, in bytes.
pub(crate) const BACKING_FORMAT_BYTES_MAX: usize = 16;

/// One header extension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// What it is.
    pub kind: u32,
    /// Its bytes, without the padding to eight.
    pub data: Vec<u8>,
}

/// Reads the extensions in `area`, which begins behind the header and ends at the backing file name or the cluster's end.
///
/// # Errors
/// `InvalidImage` for one that reaches out of the area.
pub fn parse(area: &[u8]) -> Result<Vec<Extension>> {
    let mut out = Vec::new();
    parse_into(&mut out, area)?;
    Ok(out)
}

/// Reads the extensions up to the first that is broken.
pub fn parse_prefix(area: &[u8]) -> Vec<Extension> {
    let mut out = Vec::new();
    let _what_is_broken = parse_into(&mut out, area);
    out
}

fn too_large() -> Result<()> {
    let text = "Header extension too large";
    Err(BlockError::new(ErrorKind::InvalidImage, text))
}

fn parse_into(out: &mut Vec<Extension>, area: &[u8]) -> Result<()> {
    let mut at = 0;
    let word = |at: usize| {
        area.get(at..at + 4)
            .map(|b| u32::from_be_bytes(b.try_into().expect("four bytes")))
    };
    while at < area.len() {
        let (Some(kind), Some(len)) = (word(at), word(at + 4)) else {
            return too_large();
        };
        at += 8;
        let len = len as usize;
        if len > area.len() - at {
            return too_large();
        }
        if kind == END {
            break;
        }
        if kind == BACKING_FORMAT && len >= BACKING_FORMAT_BYTES_MAX {
            let text = format!(
                "ERROR: ext_backing_format: len={len} too large (>={BACKING_FORMAT_BYTES_MAX})"
            );
            return Err(BlockError::new(ErrorKind::InvalidImage, text));
        }
        let data = &area[at..at + len];
        if kind == BITMAPS {
            BitmapsExtension::check_length(data)?;
        }
        out.push(Extension {
            kind,
            data: data.to_vec(),
        });
        at = (at + len).next_multiple_of(8);
    }
    Ok(())
}

/// Writes extensions, with the end mark.
pub fn encode(extensions: &[Extension]) -> Vec<u8> {
    let mut out = Vec::new();
    for e in extensions {
        out.extend(e.kind.to_be_bytes());
        out.extend((e.data.len() as u32).to_be_bytes());
        out.extend(&e.data);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out.extend([0; 8]);
    out
}

/// The feature name table that a new image gets.
pub fn feature_names() -> Extension {
    let names: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut data = Vec::with_capacity(names.len() * FEATURE_NAME_BYTES);
    for (kind, bit, name) in names {
        let mut entry = [0; FEATURE_NAME_BYTES];
        (entry[0], entry[1]) = (kind, bit);
        entry[2..2 + name.len()].copy_from_slice(name.as_bytes());
        data.extend(entry);
    }
    Extension {
        kind: FEATURE_NAMES,
        data,
    }
}

/// What the image itself calls an incompatible feature bit.
pub fn incompatible_name(extensions: &[Extension], bit: u32) -> Option<String> {
    let table = extensions.iter().find(|e| e.kind == FEATURE_NAMES)?;
    let entry = table
        .data
        .chunks_exact(FEATURE_NAME_BYTES)
        .find(|e| e[0] == 0 && u32::from(e[1]) == bit)?;
    let name = &entry[2..];
    let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
    Some(String::from_utf8_lossy(&name[..end]).into_owned())
}
