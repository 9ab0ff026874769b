// SPDX-License-Identifier: MIT OR Apache-2.0
//! The modes against published vectors: NIST SP 800-38A (F.2.1, F.5.1) and IEEE 1619 (vectors 1 and 2).

use super::*;
use crate::algorithm::CipherAlg;
use crate::block_cipher::block_cipher;

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
    let byte = |pair: &[u8]| {
        let text = std::str::from_utf8(pair).unwrap();
        u8::from_str_radix(text, 16).unwrap()
    };
    digits.chunks_exact(2).map(byte).collect()
}

fn iv(hex: &str) -> Iv {
    bytes(hex).try_into().unwrap()
}

const NIST_KEY: &str = "2b7e151628aed2a6abf7158809cf4f3c";
const NIST_PLAIN: &str = "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51";

#[test]
fn cbc_is_that_of_nist() {
    let cipher = block_cipher(CipherAlg::Aes128, &bytes(NIST_KEY));
    let iv = iv("000102030405060708090a0b0c0d0e0f");
    let mut data = bytes(NIST_PLAIN);
    cbc_encrypt(&*cipher, iv, &mut data);
    let expected = "7649abac8119b246cee98e9b12e9197d5086cb9b507219ee95db113a917678b2";
    assert_eq!(data, bytes(expected));
    cbc_decrypt(&*cipher, iv, &mut data);
    assert_eq!(data, bytes(NIST_PLAIN));
}

#[test]
fn ctr_is_that_of_nist() {
    let cipher = block_cipher(CipherAlg::Aes128, &bytes(NIST_KEY));
    let iv = iv("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff");
    let mut data = bytes(NIST_PLAIN);
    ctr(&*cipher, iv, &mut data);
    let expected = "874d6191b620e3261bef6864990db6ce9806f66b7970fdff8617187bb9fffdff";
    assert_eq!(data, bytes(expected));
}

#[test]
fn xts_is_that_of_ieee() {
    let vectors = [
        (
            "00000000000000000000000000000000",
            "00000000000000000000000000000000",
            "00000000000000000000000000000000",
            "00",
            "917cf69ebd68b2ec9b9fe9a3eadda692cd43d2f59598ed858c02c2652fbf922e",
        ),
        (
            "11111111111111111111111111111111",
            "22222222222222222222222222222222",
            "33333333330000000000000000000000",
            "44",
            "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0",
        ),
    ];
    for (key, tweak_key, number, fill, expected) in vectors {
        let cipher = block_cipher(CipherAlg::Aes128, &bytes(key));
        let tweak = block_cipher(CipherAlg::Aes128, &bytes(tweak_key));
        let plain = bytes(&fill.repeat(32));
        let mut data = plain.clone();
        xts(|b| cipher.encrypt(b), &*tweak, iv(number), &mut data);
        assert_eq!(data, bytes(expected));
        xts(|b| cipher.decrypt(b), &*tweak, iv(number), &mut data);
        assert_eq!(data, plain);
    }
}
