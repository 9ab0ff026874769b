// SPDX-License-Identifier: MIT OR Apache-2.0
//! Headers: what is written can be read again, and no bytes at all make the reader panic or take much memory.

use blockcore::testing::{MemoryDriver, Rng};
use blockcore::{ChildRole, NodeFlags};

use super::*;
use crate::tests::{Shape, fresh_image};

async fn read(bytes: Vec<u8>) -> Result<Header> {
    let flags = NodeFlags {
        read_only: true,
        ..Default::default()
    };
    let node = MemoryDriver::new(bytes).into_node(flags).await?;
    Header::read(&Child::new("file", ChildRole::File, node)).await
}

async fn refusal(damage: &[(usize, &[u8])]) -> String {
    let mut image = fresh_image(Shape::small(1 << 20));
    for (at, bytes) in damage {
        image[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    match read(image).await {
        Ok(header) => format!("accepted: {header:?}"),
        Err(e) => e.text(),
    }
}

#[tokio::test]
async fn what_is_written_is_read_again_with_extensions_that_nobody_knows() {
    let mut header = read(fresh_image(Shape::small(1 << 20))).await.unwrap();
    let extension = |kind, data: &[u8]| Extension {
        kind,
        data: data.to_vec(),
    };
    header.extensions = vec![
        extension(extension::BACKING_FORMAT, b"raw"),
        extension(0x1234_5678, b"five5"),
        extension(0x1234_5679, b""),
        extension::feature_names(),
    ];
    header.backing = Some(BackingName {
        filename: "below.img".to_owned(),
        format: Some("raw".to_owned()),
    });
    header.autoclear = 1 << 40;
    let mut bytes = header.encode().unwrap();
    bytes.resize(16 << 10, 0);
    let again = read(bytes).await.unwrap();
    assert_eq!(again.extensions, header.extensions);
    assert_eq!(again.backing, header.backing);
    assert_eq!(
        (again.autoclear, again.size, again.l1_size),
        (1 << 40, header.size, header.l1_size)
    );
}

#[tokio::test]
async fn what_is_damaged_is_named() {
    /// Bytes to put somewhere.
    type Damage<'a> = &'a [(usize, &'a [u8])];
    let cases: &[(Damage<'_>, &str)] = &[
        (&[(0, b"QFI\xfa")], "Image is not in qcow2 format"),
        (&[(7, &[4])], "Unsupported qcow2 version 4"),
        (&[(23, &[8])], "Unsupported cluster size: 2^8"),
        (&[(103, &[103])], "qcow2 header too short"),
        (&[(100, &[1])], "qcow2 header exceeds cluster size"),
        (&[(12, &[0, 0, 16, 1])], "Invalid backing file offset"),
        (
            &[(32, &[255, 255, 255, 254])],
            "Unsupported encryption method -2",
        ),
        (
            &[(79, &[128])],
            "Unsupported qcow2 feature(s): Unknown incompatible feature: 80",
        ),
        (
            &[(99, &[7])],
            "Reference count entry width too large; may not exceed 64 bits",
        ),
        (
            &[(56, &[0, 0, 0, 0])],
            "Image does not contain a reference count table",
        ),
        (&[(56, &[0, 0, 8, 1])], "Reference count table too large"),
        (&[(55, &[1])], "Reference count table offset invalid"),
        (&[(60, &[0, 1, 0, 1])], "Snapshot table too large"),
        (&[(71, &[1])], "Snapshot table offset invalid"),
        (&[(36, &[1, 0, 0, 0])], "Active L1 table too large"),
        (&[(36, &[0, 0, 0, 0])], "L1 table is too small"),
        (&[(47, &[1])], "Active L1 table offset invalid"),
        (
            &[(104, &[1, 2, 3, 4, 0, 0, 16, 0])],
            "Header extension too large",
        ),
        // Of two faults, the one that QEMU meets first.
        (
            &[(79, &[128]), (71, &[1])],
            "Unsupported qcow2 feature(s): Unknown incompatible feature: 80",
        ),
        (&[(71, &[1]), (35, &[9])], "Snapshot table offset invalid"),
    ];
    for (damage, text) in cases {
        assert_eq!(refusal(damage).await, *text, "{damage:?}");
    }
}

#[tokio::test]
async fn an_unknown_feature_has_the_name_that_the_image_gives_it() {
    let mut table = vec![0; 48];
    table[1] = 9;
    table[2..9].copy_from_slice(b"time ok");
    let mut extension = vec![0x68, 0x03, 0xf8, 0x57, 0, 0, 0, 48];
    extension.extend(table);
    assert_eq!(
        refusal(&[(78, &[2]), (104, &extension)]).await,
        "Unsupported qcow2 feature(s): time ok"
    );
    assert_eq!(
        refusal(&[(78, &[6]), (104, &extension)]).await,
        "Unsupported qcow2 feature(s): time ok, Unknown incompatible feature: 400"
    );
}

#[tokio::test]
async fn no_bytes_make_the_reader_panic() {
    let mut rng = Rng::new(Rng::seed_from_env());
    let good = fresh_image(Shape::small(1 << 20));
    for round in 0..4000 {
        let mut image = good.clone();
        for _ in 0..1 + rng.below(6) {
            let at = rng.below(200) as usize;
            image[at] = [0, 1, 0x7f, 0x80, 0xff, rng.below(256) as u8][rng.below(6) as usize];
        }
        if round % 7 == 0 {
            image.truncate(rng.below(300) as usize);
        }
        if let Ok(header) = read(image).await {
            let _may_not_fit = header.encode();
            let _may_be_refused = header.check_writable();
        }
    }
}
