// SPDX-License-Identifier: MIT OR Apache-2.0
//! Modes over whole sectors: how blocks that a [`BlockCipher`] encrypts one by one are chained. Called by `sector`, for one sector at a time.
//!
//! They are here and not crates' because a sector is so simple a thing (no padding, no part of a block, 512 bytes) and because all blocks that
//! do not depend on each other go to the cipher in one call, which is several times as fast. XTS is IEEE 1619's, the others are those of NIST SP 800-38A.

use crate::block_cipher::BlockCipher;
use crate::iv::Iv;
use crate::sector::SECTOR_BYTES;

/// The longest block of a cipher, in bytes.
const BLOCK_BYTES_MAX: usize = 16;

fn xor(into: &mut [u8], other: &[u8]) {
    for (a, b) in into.iter_mut().zip(other) {
        *a ^= b;
    }
}

pub(crate) fn cbc_encrypt(cipher: &dyn BlockCipher, iv: Iv, sector: &mut [u8]) {
    let block = cipher.block_bytes();
    let mut chain = iv;
    for piece in sector.chunks_exact_mut(block) {
        xor(piece, &chain);
        cipher.encrypt(piece);
        chain[..block].copy_from_slice(piece);
    }
}

pub(crate) fn cbc_decrypt(cipher: &dyn BlockCipher, iv: Iv, sector: &mut [u8]) {
    let block = cipher.block_bytes();
    let mut before = [0; SECTOR_BYTES];
    before[..sector.len()].copy_from_slice(sector);
    cipher.decrypt(sector);
    xor(&mut sector[..block], &iv);
    let end = sector.len() - block;
    xor(&mut sector[block..], &before[..end]);
}

/// Encrypts, and decrypts too: both add the same stream. The counter is the IV as one big-endian number.
pub(crate) fn ctr(cipher: &dyn BlockCipher, iv: Iv, sector: &mut [u8]) {
    let block = cipher.block_bytes();
    let mut stream = [0; SECTOR_BYTES];
    let stream = &mut stream[..sector.len()];
    let mut counter = [0; BLOCK_BYTES_MAX];
    counter[BLOCK_BYTES_MAX - block..].copy_from_slice(&iv[..block]);
    let mut counter = u128::from_be_bytes(counter);
    for piece in stream.chunks_exact_mut(block) {
        // What is above a shorter block falls off.
        piece.copy_from_slice(&counter.to_be_bytes()[BLOCK_BYTES_MAX - block..]);
        counter = counter.wrapping_add(1);
    }
    cipher.encrypt(stream);
    xor(sector, stream);
}

/// The tweaks of a sector's blocks: the encrypted IV, doubled again and again in GF(2^128).
fn xts_tweaks(tweak_cipher: &dyn BlockCipher, iv: Iv, bytes: usize) -> [u8; SECTOR_BYTES] {
    let mut first = iv;
    tweak_cipher.encrypt(&mut first);
    let mut tweak = u128::from_le_bytes(first);
    let mut tweaks = [0; SECTOR_BYTES];
    for piece in tweaks[..bytes].chunks_exact_mut(BLOCK_BYTES_MAX) {
        piece.copy_from_slice(&tweak.to_le_bytes());
        let carry = (tweak >> 127) * 0x87;
        tweak = (tweak << 1) ^ carry;
    }
    tweaks
}

/// Encrypts or decrypts, as `blocks` does with blocks.
pub(crate) fn xts(
    blocks: impl FnOnce(&mut [u8]),
    tweak_cipher: &dyn BlockCipher,
    iv: Iv,
    sector: &mut [u8],
) {
    let tweaks = xts_tweaks(tweak_cipher, iv, sector.len());
    xor(sector, &tweaks);
    blocks(sector);
    xor(sector, &tweaks);
}

#[cfg(test)]
mod tests;
