// SPDX-License-Identifier: MIT OR Apache-2.0
//! A header is read as it was written, and every field that makes no sense is told by name.

use blockcore::testing::Rng;

use super::*;
use crate::algorithm::{CipherAlg, CipherMode, IvGen};

fn sound() -> Header {
    let spec = CipherSpec {
        alg: CipherAlg::Aes256,
        mode: CipherMode::Xts,
        iv_gen: IvGen::Plain64,
        iv_hash: None,
    };
    let mut header = Header::new(spec, HashAlg::Sha256, [0x5a; 16]);
    header.digest_iterations = 1000;
    header.slots[0].active = true;
    header.slots[0].iterations = 2000;
    header
}

#[test]
fn a_header_is_read_as_it_was_written() {
    let header = sound();
    assert_eq!(
        Header::parse(&header.encode(), Payload::Behind).unwrap(),
        header
    );
    assert_eq!(header.uuid, "5a5a5a5a-5a5a-4a5a-9a5a-5a5a5a5a5a5a");
    assert!(Header::probe(&header.encode()));
}

#[test]
fn a_new_header_has_the_layout_that_others_make() {
    let header = sound();
    let places: Vec<u64> = header.slots.iter().map(|s| s.key_offset).collect();
    assert_eq!(places[..3], [4096, 262_144, 520_192]);
    assert_eq!(header.payload_offset, 2_068_480);
}

#[test]
fn every_field_that_makes_no_sense_is_told() {
    const SLOT_0: usize = 208;
    let cases: [(usize, &[u8], &str); 17] = [
        (0, b"X", "Volume is not in LUKS format"),
        (6, &[0, 2], "LUKS version 2 is not supported"),
        (
            8,
            &[b'a'; 32],
            "LUKS header cipher name is not NUL terminated",
        ),
        (
            40,
            &[b'a'; 32],
            "LUKS header cipher mode is not NUL terminated",
        ),
        (
            72,
            &[b'a'; 32],
            "LUKS header hash spec is not NUL terminated",
        ),
        (72, b"sha0\0\0", "Hash algorithm 'sha0' not supported"),
        (
            104,
            &[0, 0, 0, 1],
            "LUKS payload is overlapping with the header",
        ),
        (104, &[0; 4], "LUKS payload is overlapping with the header"),
        (
            108,
            &[0; 4],
            "Algorithm 'aes' with key size 0 bytes not supported",
        ),
        (
            108,
            &[0xff; 4],
            "Keyslot 0 is overlapping with the encrypted payload",
        ),
        (164, &[0; 4], "LUKS key iteration count is zero"),
        (
            SLOT_0,
            &[0; 4],
            "Keyslot 0 state (active/disable) is corrupted",
        ),
        (SLOT_0 + 4, &[0; 4], "Keyslot 0 iteration count is zero"),
        (
            SLOT_0 + 40,
            &[0; 4],
            "Keyslot 0 is overlapping with the LUKS header",
        ),
        (
            SLOT_0 + 40,
            &[0xff; 4],
            "Keyslot 0 is overlapping with the encrypted payload",
        ),
        (
            SLOT_0 + 40,
            &[0, 0, 2, 0],
            "Keyslots 0 and 1 are overlapping in the header",
        ),
        (
            SLOT_0 + 44,
            &[0xff; 4],
            "Keyslot 0 is corrupted (stripes -1 != 4000)",
        ),
    ];
    for (at, wrong, told) in cases {
        let mut bytes = sound().encode();
        bytes[at..at + wrong.len()].copy_from_slice(wrong);
        let read = Header::parse(&bytes, Payload::Behind);
        assert_eq!(read.unwrap_err().text(), told, "{wrong:?} at {at}");
    }
}

#[test]
fn a_payload_elsewhere_may_begin_at_0() {
    let mut header = sound();
    header.payload_offset = 0;
    assert!(Header::parse(&header.encode(), Payload::Elsewhere).is_ok());
    assert!(Header::parse(&header.encode(), Payload::Behind).is_err());
    header.payload_offset = 4096;
    assert!(Header::parse(&header.encode(), Payload::Elsewhere).is_err());
}

#[test]
fn no_bytes_make_it_panic() {
    let mut random = Rng::new(Rng::seed_from_env());
    for _ in 0..20_000 {
        let mut bytes = sound().encode();
        for _ in 0..1 + random.below(4) {
            let at = random.below(HEADER_BYTES as u64) as usize;
            bytes[at] = random.below(256) as u8;
        }
        if let Ok(header) = Header::parse(&bytes, Payload::Behind) {
            assert!(header.material_bytes() <= 256_000);
            assert!(
                header
                    .slots
                    .iter()
                    .all(|s| s.key_offset < header.payload_offset)
            );
            assert_eq!(header.encode().len(), bytes.len());
        }
    }
}

#[test]
fn all_bytes_that_hold_keys_are_claimed() {
    let bytes = sound().encode();
    let claimed = Header::claimed_bytes(&bytes);
    assert_eq!(claimed, sound().payload_offset);
    // Damaged fields claim no less than the rest of them does.
    let mut no_payload = bytes;
    no_payload[104..108].fill(0);
    let last = sound().slots.iter().map(|s| s.key_offset).max().unwrap();
    let material = sound().material_bytes() as u64;
    assert_eq!(Header::claimed_bytes(&no_payload), last + material);
    assert_eq!(
        Header::claimed_bytes(&[0; HEADER_BYTES]),
        HEADER_BYTES as u64
    );
    assert!(Header::claimed_bytes(&[0xff; HEADER_BYTES]) > 1 << 40);
}
