// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`IvGenerator`]: the initialisation vector of a sector, made of its number. Called by `sector`.

use blockcore::Result;

use crate::algorithm::{CipherSpec, IvGen};
use crate::block_cipher::{BlockCipher, block_cipher};

/// An initialisation vector. Ciphers with shorter blocks take its front.
pub(crate) type Iv = [u8; 16];

pub(crate) enum IvGenerator {
    Plain,
    Plain64,
    Essiv(Box<dyn BlockCipher>),
}

impl IvGenerator {
    /// The generator of a specification that has been checked, and of a key.
    ///
    /// # Errors
    /// None, for such a specification.
    pub fn new(spec: &CipherSpec, key: &[u8]) -> Result<IvGenerator> {
        Ok(match spec.iv_gen {
            IvGen::Plain => IvGenerator::Plain,
            IvGen::Plain64 => IvGenerator::Plain64,
            IvGen::Essiv => {
                let hash = spec.iv_hash.expect("a checked specification has one");
                let salt = hash.digest(&[key]);
                IvGenerator::Essiv(block_cipher(spec.essiv_cipher(hash)?, &salt))
            }
        })
    }

    pub fn iv(&self, sector: u64) -> Iv {
        let mut iv = [0; 16];
        match self {
            IvGenerator::Plain => iv[..4].copy_from_slice(&(sector as u32).to_le_bytes()),
            IvGenerator::Plain64 => iv[..8].copy_from_slice(&sector.to_le_bytes()),
            IvGenerator::Essiv(cipher) => {
                iv[..8].copy_from_slice(&sector.to_le_bytes());
                cipher.encrypt(&mut iv[..cipher.block_bytes()]);
            }
        }
        iv
    }
}
