// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sectors are encrypted each by its number, in whatever pieces a buffer lies, and read back as they were.

use super::*;
use crate::algorithm::HashAlg;

const KEY: [u8; 64] = [7; 64];

fn spec(alg: &str, mode: &str, iv_gen: IvGen) -> CipherSpec {
    let iv_hash = (iv_gen == IvGen::Essiv).then_some(match alg {
        "cast5-128" => HashAlg::Md5,
        _ => HashAlg::Sha256,
    });
    CipherSpec {
        alg: CipherAlg::from_name(alg).unwrap(),
        mode: CipherMode::from_name(mode).unwrap(),
        iv_gen,
        iv_hash,
    }
}

fn cipher(spec: &CipherSpec) -> Arc<SectorCipher> {
    let key: Vec<u8> = (0..spec.key_bytes() as u8).collect();
    Arc::new(SectorCipher::new(spec, &key).unwrap())
}

fn plain(sectors: usize) -> Vec<u8> {
    (0..sectors * SECTOR_BYTES)
        .map(|i| (i * i / 7) as u8)
        .collect()
}

#[test]
fn every_combination_gives_back_what_went_in() {
    let algs = [
        "aes-128",
        "aes-192",
        "aes-256",
        "cast5-128",
        "serpent-256",
        "twofish-192",
    ];
    for alg in algs {
        for mode in ["ecb", "cbc", "ctr", "xts"] {
            for iv_gen in [IvGen::Plain, IvGen::Plain64, IvGen::Essiv] {
                let spec = spec(alg, mode, iv_gen);
                if spec.check().is_err() {
                    assert_eq!((alg, mode), ("cast5-128", "xts"));
                    continue;
                }
                let cipher = cipher(&spec);
                let mut data = plain(3);
                cipher.encrypt(5, &mut data);
                assert_ne!(data, plain(3), "{spec:?}");
                // Sector by sector it is the same.
                let mut last = plain(3)[2 * SECTOR_BYTES..].to_vec();
                cipher.encrypt(7, &mut last);
                assert_eq!(last, data[2 * SECTOR_BYTES..], "{spec:?}");
                cipher.decrypt(5, &mut data);
                assert_eq!(data, plain(3), "{spec:?}");
            }
        }
    }
}

#[test]
fn equal_sectors_differ_by_their_numbers() {
    for mode in ["cbc", "ctr", "xts"] {
        let cipher = cipher(&spec("aes-256", mode, IvGen::Plain64));
        let mut data = vec![0; 2 * SECTOR_BYTES];
        cipher.encrypt(0, &mut data);
        assert_ne!(data[..SECTOR_BYTES], data[SECTOR_BYTES..], "{mode}");
    }
}

#[test]
fn plain_forgets_the_upper_half_of_a_number_and_plain64_does_not() {
    for (iv_gen, same) in [
        (IvGen::Plain, true),
        (IvGen::Plain64, false),
        (IvGen::Essiv, false),
    ] {
        let cipher = cipher(&spec("aes-256", "xts", iv_gen));
        let (mut low, mut high) = (plain(1), plain(1));
        cipher.encrypt(3, &mut low);
        cipher.encrypt(3 + (1 << 32), &mut high);
        assert_eq!(low == high, same, "{iv_gen:?}");
    }
}

#[tokio::test]
async fn a_buffer_may_be_long_and_in_pieces_of_any_length() {
    let cipher = cipher(&spec("aes-256", "xts", IvGen::Plain64));
    let data = plain(100);
    let mut expected = data.clone();
    cipher.encrypt(9, &mut expected);
    for cut in [0, 100, 512, 1000, 20_000, 51_200] {
        let mut scattered = IoBuf::from(data[..cut].to_vec());
        scattered.append(IoBuf::from(data[cut..].to_vec()));
        let encrypted = cipher.encrypt_buf(9, scattered.clone()).await.unwrap();
        assert_eq!(encrypted.to_vec(), expected, "{cut}");
        assert_eq!(scattered.to_vec(), data, "the caller's bytes, {cut}");
        let mut scattered = IoBufMut::from(expected[..cut].to_vec());
        scattered.append(IoBufMut::from(expected[cut..].to_vec()));
        let decrypted = cipher.decrypt_buf(9, scattered).await.unwrap();
        assert_eq!(decrypted.to_vec(), data, "{cut}");
    }
}

#[test]
fn a_key_of_another_length_is_refused() {
    let spec = spec("aes-128", "xts", IvGen::Plain64);
    assert!(SectorCipher::new(&spec, &KEY[..32]).is_ok());
    for wrong in [0, 16, 31, 33, 64] {
        assert!(SectorCipher::new(&spec, &KEY[..wrong]).is_err(), "{wrong}");
    }
}

#[test]
fn the_old_encryption_takes_sixteen_bytes_of_a_password() {
    let encrypted = |password: &str| {
        let cipher = SectorCipher::legacy(&Secret::new(password)).unwrap();
        let mut data = plain(1);
        cipher.encrypt(1, &mut data);
        data
    };
    assert_eq!(
        encrypted("0123456789abcdefgh"),
        encrypted("0123456789abcdef")
    );
    assert_ne!(encrypted("0123456789abcde"), encrypted("0123456789abcdef"));
}

#[test]
fn nothing_prints_a_key() {
    let shown = format!("{:?}", cipher(&spec("aes-256", "xts", IvGen::Essiv)));
    assert_eq!(shown, "SectorCipher { mode: Xts, .. }");
}
