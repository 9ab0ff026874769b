// SPDX-License-Identifier: MIT OR Apache-2.0
//! The anti-forensic splitter of LUKS1 (`AFsplit`, `AFmerge`): a key is spread over so many stripes that all of them are needed to have it, so that a disk that
//! keeps some old sectors does not keep an erased key. Called by `key_slot`.

use blockcore::Result;
use zeroize::Zeroizing;

use crate::algorithm::HashAlg;
use crate::random;

/// How many stripes a key is spread over. Headers say it, but nobody makes others.
pub const STRIPES: usize = 4000;

/// Mixes a block so that every bit of a piece of it depends on every bit of that piece.
fn diffuse(hash: HashAlg, block: &mut [u8]) {
    for (index, piece) in (0u32..).zip(block.chunks_mut(hash.digest_bytes())) {
        let digest = hash.digest(&[&index.to_be_bytes(), piece]);
        piece.copy_from_slice(&digest[..piece.len()]);
    }
}

/// What all stripes but the last come to.
fn fold(hash: HashAlg, stripes: &[u8], key_bytes: usize) -> Zeroizing<Vec<u8>> {
    let mut sum = Zeroizing::new(vec![0; key_bytes]);
    for stripe in stripes.chunks_exact(key_bytes) {
        xor(&mut sum, stripe);
        diffuse(hash, &mut sum);
    }
    sum
}

fn xor(into: &mut [u8], other: &[u8]) {
    for (a, b) in into.iter_mut().zip(other) {
        *a ^= b;
    }
}

/// Spreads a key over `bytes` bytes, which is room for all stripes; what is more than that is zero.
///
/// # Errors
/// The host's, if it has no random bytes.
pub(crate) fn split(hash: HashAlg, key: &[u8], bytes: usize) -> Result<Zeroizing<Vec<u8>>> {
    let mut stripes = Zeroizing::new(vec![0; bytes]);
    let (random, last) = stripes.split_at_mut(key.len() * (STRIPES - 1));
    random::fill(random)?;
    let last = &mut last[..key.len()];
    last.copy_from_slice(&fold(hash, random, key.len()));
    xor(last, key);
    Ok(stripes)
}

/// Puts a key together again.
pub(crate) fn merge(hash: HashAlg, stripes: &[u8], key_bytes: usize) -> Zeroizing<Vec<u8>> {
    let (random, last) = stripes.split_at(key_bytes * (STRIPES - 1));
    let mut key = fold(hash, random, key_bytes);
    xor(&mut key, &last[..key_bytes]);
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_put_together_again_and_needs_every_stripe() {
        for (hash, key_bytes) in [
            (HashAlg::Sha1, 16),
            (HashAlg::Sha256, 64),
            (HashAlg::Sha512, 24),
        ] {
            let key: Vec<u8> = (0..key_bytes).collect();
            let mut stripes = split(hash, &key, key.len() * STRIPES + 7).unwrap();
            assert_eq!(*merge(hash, &stripes, key.len()), key);
            stripes[key.len() * 1000] ^= 1;
            assert_ne!(*merge(hash, &stripes, key.len()), key);
        }
    }
}
