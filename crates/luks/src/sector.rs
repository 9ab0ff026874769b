// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`SectorCipher`]: encrypts and decrypts sectors of 512 bytes, each by its number. What `driver` and qcow2 call for every request.
//!
//! It has no state but its keys, so any number of tasks may use it at once. The keys are wiped when it is dropped. Short pieces are done on the spot, longer
//! ones on the blocking pool ([`encrypt_buf`](SectorCipher::encrypt_buf), [`decrypt_buf`](SectorCipher::decrypt_buf)).

use std::fmt;
use std::sync::Arc;

use blockcore::{BlockError, IoBuf, IoBufMut, Result, Secret, blocking};
use zeroize::Zeroizing;

use crate::algorithm::{CipherAlg, CipherMode, CipherSpec, IvGen};
use crate::block_cipher::{BlockCipher, block_cipher};
use crate::iv::IvGenerator;
use crate::modes;

/// Bytes of a sector: each has an initialisation vector of its own.
pub const SECTOR_BYTES: usize = 512;

/// Up to so many bytes are done on the caller's thread: the way to another one would take about as long.
pub const INLINE_BYTES_MAX: usize = 16 << 10;

/// Bytes of the key of the old encryption of qcow and qcow2: the password is the key.
const LEGACY_KEY_BYTES: usize = 16;

/// A cipher with its keys, for sectors.
pub struct SectorCipher {
    mode: CipherMode,
    cipher: Box<dyn BlockCipher>,
    /// The second key of XTS.
    tweak: Option<Box<dyn BlockCipher>>,
    iv: IvGenerator,
}

impl fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SectorCipher")
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

impl SectorCipher {
    /// With a key of [`CipherSpec::key_bytes`] bytes.
    ///
    /// # Errors
    /// As [`CipherSpec::check`]; `InvalidArgument` for a key of another length.
    pub fn new(spec: &CipherSpec, key: &[u8]) -> Result<SectorCipher> {
        spec.check()?;
        if key.len() != spec.key_bytes() {
            return Err(BlockError::invalid(format!(
                "A key of {} bytes does not fit the cipher, which wants {}",
                key.len(),
                spec.key_bytes()
            )));
        }
        let (own, tweak) = key.split_at(spec.alg.key_bytes());
        Ok(SectorCipher {
            mode: spec.mode,
            cipher: block_cipher(spec.alg, own),
            tweak: (!tweak.is_empty()).then(|| block_cipher(spec.alg, tweak)),
            iv: IvGenerator::new(spec, key)?,
        })
    }

    /// The old encryption of qcow and qcow2: AES-128 in CBC mode; the key is the password itself, cut off at 16 bytes or filled up with zeroes.
    ///
    /// # Errors
    /// None, with this specification.
    pub fn legacy(password: &Secret) -> Result<SectorCipher> {
        let mut key = Zeroizing::new([0; LEGACY_KEY_BYTES]);
        let taken = password.as_bytes().len().min(LEGACY_KEY_BYTES);
        key[..taken].copy_from_slice(&password.as_bytes()[..taken]);
        let spec = CipherSpec {
            alg: CipherAlg::Aes128,
            mode: CipherMode::Cbc,
            iv_gen: IvGen::Plain64,
            iv_hash: None,
        };
        SectorCipher::new(&spec, &*key)
    }

    /// Encrypts whole sectors in place; the first of them has the number `sector`.
    ///
    /// # Panics
    /// If `data` is no multiple of a sector long.
    pub fn encrypt(&self, sector: u64, data: &mut [u8]) {
        for (number, bytes) in numbered(sector, data) {
            let (cipher, iv) = (&*self.cipher, self.iv.iv(number));
            match (self.mode, &self.tweak) {
                (CipherMode::Ecb, _) => cipher.encrypt(bytes),
                (CipherMode::Cbc, _) => modes::cbc_encrypt(cipher, iv, bytes),
                (CipherMode::Ctr, _) => modes::ctr(cipher, iv, bytes),
                (CipherMode::Xts, Some(tweak)) => {
                    modes::xts(|b| cipher.encrypt(b), &**tweak, iv, bytes);
                }
                (CipherMode::Xts, None) => unreachable!("XTS has two keys"),
            }
        }
    }

    /// Decrypts whole sectors in place; the first of them has the number `sector`.
    ///
    /// # Panics
    /// If `data` is no multiple of a sector long.
    pub fn decrypt(&self, sector: u64, data: &mut [u8]) {
        for (number, bytes) in numbered(sector, data) {
            let (cipher, iv) = (&*self.cipher, self.iv.iv(number));
            match (self.mode, &self.tweak) {
                (CipherMode::Ecb, _) => cipher.decrypt(bytes),
                (CipherMode::Cbc, _) => modes::cbc_decrypt(cipher, iv, bytes),
                (CipherMode::Ctr, _) => modes::ctr(cipher, iv, bytes),
                (CipherMode::Xts, Some(tweak)) => {
                    modes::xts(|b| cipher.decrypt(b), &**tweak, iv, bytes);
                }
                (CipherMode::Xts, None) => unreachable!("XTS has two keys"),
            }
        }
    }

    /// Encrypts a copy of `data`, which is whole sectors. The caller's bytes stay as they are.
    ///
    /// *If the future is dropped*: nothing has happened.
    ///
    /// # Errors
    /// `Cancelled` if the runtime ends.
    pub async fn encrypt_buf(self: &Arc<Self>, sector: u64, data: IoBuf) -> Result<IoBuf> {
        let bytes = data.len();
        let work = move |cipher: &SectorCipher| {
            let mut copy = IoBufMut::zeroed(data.len());
            let whole = copy.as_mut_slice().expect("new buffers are in one piece");
            data.copy_to_slice(0, whole);
            cipher.encrypt(sector, whole);
            copy.freeze()
        };
        self.run(bytes, work).await
    }

    /// Decrypts `data`, which is whole sectors, and gives it back.
    ///
    /// *If the future is dropped*: the buffer is gone when the work is done.
    ///
    /// # Errors
    /// `Cancelled` if the runtime ends.
    pub async fn decrypt_buf(
        self: &Arc<Self>,
        sector: u64,
        mut data: IoBufMut,
    ) -> Result<IoBufMut> {
        let bytes = data.len();
        let work = move |cipher: &SectorCipher| {
            cipher.decrypt_in_place(sector, &mut data);
            data
        };
        self.run(bytes, work).await
    }

    /// Decrypts a buffer that may lie in pieces of any length.
    fn decrypt_in_place(&self, sector: u64, data: &mut IoBufMut) {
        if data
            .segments()
            .all(|s| s.len().is_multiple_of(SECTOR_BYTES))
        {
            let mut at = sector;
            for piece in data.segments_mut() {
                self.decrypt(at, piece);
                at += (piece.len() / SECTOR_BYTES) as u64;
            }
            return;
        }
        let mut whole = data.to_vec();
        self.decrypt(sector, &mut whole);
        data.copy_from_slice(0, &whole);
    }

    /// Does `work`, here or on the blocking pool.
    async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        bytes: usize,
        work: impl FnOnce(&SectorCipher) -> T + Send + 'static,
    ) -> Result<T> {
        if bytes <= INLINE_BYTES_MAX {
            return Ok(work(self));
        }
        let cipher = self.clone();
        blocking::run(move || work(&cipher)).await
    }
}

/// The sectors of `data`, with their numbers.
fn numbered(first: u64, data: &mut [u8]) -> impl Iterator<Item = (u64, &mut [u8])> {
    assert!(
        data.len().is_multiple_of(SECTOR_BYTES),
        "{} bytes are no whole sectors",
        data.len()
    );
    (first..).zip(data.chunks_exact_mut(SECTOR_BYTES))
}

#[cfg(test)]
mod tests;
