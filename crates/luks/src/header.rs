// SPDX-License-Identifier: MIT OR Apache-2.0
//! The LUKS1 header: `RawHeader` is what is on disk, [`Header`] is what has been checked. Source: the LUKS1 On-Disk Format Specification, version 1.2.
//!
//! Nothing here is believed before it was looked at. What a header can ask for is bounded: its keys have the length that a known cipher wants, a key slot
//! has 4000 stripes, so key material is 256,000 bytes at most. Rounds of PBKDF2 are bounded by their field alone (four billion); whoever waits for them may
//! give up at any time, and the work ends.

use std::fmt::Write;

use blockcore::{BlockError, ErrorKind, Result};
use zerocopy::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::af::STRIPES;
use crate::algorithm::{CipherSpec, HashAlg, hash_of_header};
use crate::sector::SECTOR_BYTES;

/// `LUKS\xba\xbe`.
pub const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
/// The version that this crate knows.
pub const VERSION: u16 = 1;
/// Bytes of a header.
pub const HEADER_BYTES: usize = size_of::<RawHeader>();
/// How many key slots a header has.
pub const SLOTS: usize = 8;
/// Bytes of the digest by which a master key is known.
pub const DIGEST_BYTES: usize = 20;
/// Bytes of a salt.
pub const SALT_BYTES: usize = 32;

/// Key material and payload begin at multiples of this many bytes in new headers.
const ALIGN_BYTES: u64 = 4096;

const SLOT_ACTIVE: u32 = 0x00ac_71f3;
const SLOT_INACTIVE: u32 = 0x0000_dead;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSlot {
    state: U32,
    iterations: U32,
    salt: [u8; SALT_BYTES],
    key_offset_sectors: U32,
    stripes: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 6],
    version: U16,
    cipher: [u8; 32],
    mode: [u8; 32],
    hash: [u8; 32],
    payload_offset_sectors: U32,
    key_bytes: U32,
    digest: [u8; DIGEST_BYTES],
    digest_salt: [u8; SALT_BYTES],
    digest_iterations: U32,
    uuid: [u8; 40],
    slots: [RawSlot; SLOTS],
}

/// Byte offset of a slot's fields in the header.
pub(crate) fn slot_offset(slot: usize) -> u64 {
    (HEADER_BYTES - (SLOTS - slot) * size_of::<RawSlot>()) as u64
}

/// One of the places for a password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySlot {
    /// Whether there is a password in it.
    pub active: bool,
    /// Rounds of PBKDF2; at least 1 in an active slot.
    pub iterations: u32,
    /// The salt of the password.
    pub salt: [u8; SALT_BYTES],
    /// Byte offset of the key material, from the header's first byte.
    pub key_offset: u64,
}

impl KeySlot {
    fn raw(&self) -> RawSlot {
        let state = match self.active {
            true => SLOT_ACTIVE,
            false => SLOT_INACTIVE,
        };
        RawSlot {
            state: state.into(),
            iterations: self.iterations.into(),
            salt: self.salt,
            key_offset_sectors: sectors(self.key_offset),
            stripes: (STRIPES as u32).into(),
        }
    }

    /// The fields as they lie on disk.
    pub(crate) fn encode(&self) -> Vec<u8> {
        self.raw().as_bytes().to_vec()
    }
}

/// Where what a header encrypts lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    /// Behind the header, in the same file.
    Behind,
    /// Elsewhere; the header may say that it begins at 0.
    Elsewhere,
}

/// A header whose every field has been checked. It holds no secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// How sectors are encrypted.
    pub spec: CipherSpec,
    /// The hash of PBKDF2 and of the splitter.
    pub hash: HashAlg,
    /// Byte offset of what is encrypted.
    pub payload_offset: u64,
    /// What the master key is known by.
    pub digest: [u8; DIGEST_BYTES],
    /// The salt of it.
    pub digest_salt: [u8; SALT_BYTES],
    /// Rounds of PBKDF2 for it.
    pub digest_iterations: u32,
    /// A name of the volume; any text.
    pub uuid: String,
    /// The places for passwords.
    pub slots: [KeySlot; SLOTS],
}

fn sectors(bytes: u64) -> U32 {
    let sectors = bytes / SECTOR_BYTES as u64;
    U32::new(u32::try_from(sectors).expect("it was read from 32 bits, or is small"))
}

fn in_bytes(sectors: U32) -> u64 {
    u64::from(sectors.get()) * SECTOR_BYTES as u64
}

fn bad<T>(text: impl Into<String>) -> Result<T> {
    Err(BlockError::new(ErrorKind::InvalidImage, text))
}

/// The text of a field that ends with a zero byte. What is no text is shown as such in messages, and is no known name.
fn text(field: &[u8], what: &str) -> Result<String> {
    match field.iter().position(|b| *b == 0) {
        Some(end) => Ok(String::from_utf8_lossy(&field[..end]).into_owned()),
        None => bad(format!("LUKS header {what} is not NUL terminated")),
    }
}

/// A text as a field, which is longer than the text.
fn field<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [0; N];
    let bytes = &text.as_bytes()[..text.len().min(N - 1)];
    field[..bytes.len()].copy_from_slice(bytes);
    field
}

/// Bytes that the stripes of a key take up: whole sectors.
fn stripes_bytes(key_bytes: u64) -> u64 {
    (key_bytes * STRIPES as u64).next_multiple_of(SECTOR_BYTES as u64)
}

impl Header {
    /// Whether an image that begins with `head` says that it is one.
    pub fn probe(head: &[u8]) -> bool {
        head.starts_with(&MAGIC) && head.get(6..8) == Some(&VERSION.to_be_bytes())
    }

    /// How many bytes from the header's start on hold keys, by what the fields of `head` say, whether they make sense or not. Nothing of that may be lost.
    pub fn claimed_bytes(head: &[u8; HEADER_BYTES]) -> u64 {
        let (raw, _) = RawHeader::read_from_prefix(head).expect("the length is that of the type");
        let material = stripes_bytes(raw.key_bytes.get().into());
        let is_used = |slot: &&RawSlot| slot.key_offset_sectors.get() > 0;
        let slots = raw.slots.iter().filter(is_used);
        let ends = slots.map(|slot| in_bytes(slot.key_offset_sectors) + material);
        let payload = in_bytes(raw.payload_offset_sectors);
        let end = ends.max().unwrap_or(0).max(payload);
        end.max(HEADER_BYTES as u64)
    }

    /// The layout of a new volume: eight inactive slots, and then the payload.
    pub fn new(spec: CipherSpec, hash: HashAlg, uuid: [u8; 16]) -> Header {
        let first = (HEADER_BYTES as u64).next_multiple_of(ALIGN_BYTES);
        let step = stripes_bytes(spec.key_bytes() as u64).next_multiple_of(ALIGN_BYTES);
        let slot = |index: usize| KeySlot {
            active: false,
            iterations: 0,
            salt: [0; SALT_BYTES],
            key_offset: first + index as u64 * step,
        };
        Header {
            spec,
            hash,
            payload_offset: first + SLOTS as u64 * step,
            digest: [0; DIGEST_BYTES],
            digest_salt: [0; SALT_BYTES],
            digest_iterations: 0,
            uuid: uuid_text(uuid),
            slots: std::array::from_fn(slot),
        }
    }

    /// Bytes of the master key.
    pub fn key_bytes(&self) -> usize {
        self.spec.key_bytes()
    }

    /// Bytes of a slot's key material: whole sectors.
    pub fn material_bytes(&self) -> usize {
        stripes_bytes(self.key_bytes() as u64) as usize
    }

    /// Reads and checks a header. The order of the checks decides which of several faults is told.
    ///
    /// # Errors
    /// `InvalidImage` and `Unsupported` with a text that names the field.
    pub fn parse(bytes: &[u8; HEADER_BYTES], payload: Payload) -> Result<Header> {
        let (raw, _) = RawHeader::read_from_prefix(bytes).expect("the length is that of the type");
        if raw.magic != MAGIC {
            return bad("Volume is not in LUKS format");
        }
        if raw.version.get() != VERSION {
            let text = format!("LUKS version {} is not supported", raw.version);
            return Err(BlockError::unsupported(text));
        }
        let cipher = text(&raw.cipher, "cipher name")?;
        let mode = text(&raw.mode, "cipher mode")?;
        let hash = text(&raw.hash, "hash spec")?;
        check_places(&raw, payload)?;
        let spec = CipherSpec::from_header(&cipher, &mode, raw.key_bytes.get() as usize)?;
        let slot = |raw: &RawSlot| KeySlot {
            active: raw.state.get() == SLOT_ACTIVE,
            iterations: raw.iterations.get(),
            salt: raw.salt,
            key_offset: in_bytes(raw.key_offset_sectors),
        };
        // It is a name for people, and stands in no message.
        let uuid_end = raw.uuid.iter().position(|b| *b == 0);
        let uuid = &raw.uuid[..uuid_end.unwrap_or(raw.uuid.len())];
        Ok(Header {
            spec,
            hash: hash_of_header(&hash)?,
            payload_offset: in_bytes(raw.payload_offset_sectors),
            digest: raw.digest,
            digest_salt: raw.digest_salt,
            digest_iterations: raw.digest_iterations.get(),
            uuid: String::from_utf8_lossy(uuid).into_owned(),
            slots: raw.slots.each_ref().map(slot),
        })
    }

    /// The header as it lies on disk.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let raw = RawHeader {
            magic: MAGIC,
            version: VERSION.into(),
            cipher: field(self.spec.alg.header_name()),
            mode: field(&self.spec.mode_text()),
            hash: field(self.hash.name()),
            payload_offset_sectors: sectors(self.payload_offset),
            key_bytes: (self.key_bytes() as u32).into(),
            digest: self.digest,
            digest_salt: self.digest_salt,
            digest_iterations: self.digest_iterations.into(),
            uuid: field(&self.uuid),
            slots: self.slots.each_ref().map(KeySlot::raw),
        };
        let bytes = raw.as_bytes().try_into();
        bytes.expect("the length is that of the type")
    }
}

/// Checks that key material and payload lie behind the header and not on each other, and that slots make sense.
fn check_places(raw: &RawHeader, payload: Payload) -> Result<()> {
    let header_end = (HEADER_BYTES as u64).next_multiple_of(SECTOR_BYTES as u64);
    let payload_offset = in_bytes(raw.payload_offset_sectors);
    let payload_matters = payload == Payload::Behind || payload_offset > 0;
    if payload_matters && payload_offset < header_end {
        return bad("LUKS payload is overlapping with the header");
    }
    if raw.digest_iterations.get() == 0 {
        return bad("LUKS key iteration count is zero");
    }
    let material = stripes_bytes(u64::from(raw.key_bytes.get()));
    for (i, slot) in raw.slots.iter().enumerate() {
        let (state, stripes) = (slot.state.get(), slot.stripes.get());
        let begin = in_bytes(slot.key_offset_sectors);
        if ![SLOT_ACTIVE, SLOT_INACTIVE].contains(&state) {
            return bad(format!("Keyslot {i} state (active/disable) is corrupted"));
        }
        if stripes as usize != STRIPES {
            // As other readers show it: with a sign.
            let text = format!(
                "Keyslot {i} is corrupted (stripes {} != {STRIPES})",
                stripes as i32
            );
            return bad(text);
        }
        if begin < header_end {
            return bad(format!("Keyslot {i} is overlapping with the LUKS header"));
        }
        if state == SLOT_ACTIVE && slot.iterations.get() == 0 {
            return bad(format!("Keyslot {i} iteration count is zero"));
        }
        if payload_matters && begin + material > payload_offset {
            let text = format!("Keyslot {i} is overlapping with the encrypted payload");
            return bad(text);
        }
        for (j, other) in raw.slots.iter().enumerate().skip(i + 1) {
            if begin.abs_diff(in_bytes(other.key_offset_sectors)) < material {
                let text = format!("Keyslots {i} and {j} are overlapping in the header");
                return bad(text);
            }
        }
    }
    Ok(())
}

/// A random UUID (version 4) as text.
fn uuid_text(mut bytes: [u8; 16]) -> String {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let mut out = String::new();
    for (i, byte) in bytes.iter().enumerate() {
        if [4, 6, 8, 10].contains(&i) {
            out.push('-');
        }
        write!(out, "{byte:02x}").expect("a string takes everything");
    }
    out
}

#[cfg(test)]
mod tests;
