// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`BlockCipher`]: a cipher with its key, whatever cipher it is. The keys are wiped when it is dropped.

use cipher::array::Array;
use cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};

use crate::algorithm::CipherAlg;

/// Encrypts and decrypts whole blocks, each by itself.
pub(crate) trait BlockCipher: Send + Sync {
    fn block_bytes(&self) -> usize;

    /// `blocks` is a multiple of the block long.
    fn encrypt(&self, blocks: &mut [u8]);

    /// As [`encrypt`](BlockCipher::encrypt).
    fn decrypt(&self, blocks: &mut [u8]);
}

impl<C: BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync> BlockCipher for C {
    fn block_bytes(&self) -> usize {
        C::block_size()
    }

    fn encrypt(&self, blocks: &mut [u8]) {
        let (blocks, rest) = Array::slice_as_chunks_mut(blocks);
        assert!(rest.is_empty(), "a part of a block can't be encrypted");
        self.encrypt_blocks(blocks);
    }

    fn decrypt(&self, blocks: &mut [u8]) {
        let (blocks, rest) = Array::slice_as_chunks_mut(blocks);
        assert!(rest.is_empty(), "a part of a block can't be decrypted");
        self.decrypt_blocks(blocks);
    }
}

fn boxed<C: BlockCipher + KeyInit + 'static>(key: &[u8]) -> Box<dyn BlockCipher> {
    Box::new(C::new_from_slice(key).expect("the caller has looked at the key's length"))
}

/// A cipher with a key, which has the length that the cipher wants.
pub(crate) fn block_cipher(alg: CipherAlg, key: &[u8]) -> Box<dyn BlockCipher> {
    assert_eq!(key.len(), alg.key_bytes(), "the length of a key");
    match alg {
        CipherAlg::Aes128 => boxed::<aes::Aes128>(key),
        CipherAlg::Aes192 => boxed::<aes::Aes192>(key),
        CipherAlg::Aes256 => boxed::<aes::Aes256>(key),
        CipherAlg::Cast5 => boxed::<cast5::Cast5>(key),
        CipherAlg::Serpent128 | CipherAlg::Serpent192 | CipherAlg::Serpent256 => {
            boxed::<serpent::Serpent>(key)
        }
        CipherAlg::Twofish128 | CipherAlg::Twofish192 | CipherAlg::Twofish256 => {
            boxed::<twofish::Twofish>(key)
        }
    }
}
