// SPDX-License-Identifier: MIT OR Apache-2.0
//! Extension, directory and table entries: written and read back, and refused where they make no sense.

use super::*;

const CLUSTER_BITS: u32 = 12;

fn entry(name: &str) -> DirectoryEntry {
    DirectoryEntry {
        name: name.as_bytes().to_vec(),
        flags: BitmapFlags::AUTO,
        granularity_bits: 16,
        table_offset: 0x5000,
        table_size: 1,
    }
}

fn extension(entries: &[DirectoryEntry]) -> BitmapsExtension {
    BitmapsExtension {
        nb_bitmaps: entries.len() as u32,
        directory_size: entries.iter().map(|e| e.directory_bytes()).sum(),
        directory_offset: 0x7000,
    }
}

fn parse(extension: &BitmapsExtension, bytes: &[u8]) -> Result<Vec<DirectoryEntry>> {
    parse_directory(extension, bytes, 1 << 20, CLUSTER_BITS)
}

fn text<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.unwrap_err().text()
}

#[test]
fn what_is_written_is_read() {
    let entries = [
        entry("a"),
        entry("eight888"),
        entry(&"x".repeat(MAX_NAME_BYTES)),
    ];
    let e = extension(&entries);
    assert_eq!(
        BitmapsExtension::parse(&e.encode(), CLUSTER_BITS).unwrap(),
        e
    );
    let bytes = encode_directory(&entries);
    assert_eq!(bytes.len() as u64, e.directory_size);
    assert_eq!(parse(&e, &bytes).unwrap(), entries);
    for e in [
        TableEntry::Zeroes,
        TableEntry::Ones,
        TableEntry::Data(0x7000),
    ] {
        assert_eq!(TableEntry::decode(e.encode(), CLUSTER_BITS), Some(e));
    }
}

#[test]
fn table_entries_that_make_no_sense_are_told() {
    for entry in [2, 0x7001, 0x7200, 1 << 56, 1 << 63, 0x7002] {
        assert_eq!(TableEntry::decode(entry, CLUSTER_BITS), None, "{entry:#x}");
    }
}

#[test]
fn an_impossible_extension_is_told() {
    let good = extension(&[entry("a")]);
    let with = |change: &dyn Fn(&mut BitmapsExtension)| {
        let mut e = good;
        change(&mut e);
        text(BitmapsExtension::parse(&e.encode(), CLUSTER_BITS))
    };
    assert_eq!(
        with(&|e| e.nb_bitmaps = 0),
        "found bitmaps extension with zero bitmaps"
    );
    assert_eq!(
        with(&|e| e.nb_bitmaps = 65536),
        "bitmaps_ext: Image has 65536 bitmaps, exceeding the QEMU supported maximum of 65535"
    );
    assert_eq!(
        with(&|e| e.directory_size = 0),
        "Requested bitmap directory size is zero"
    );
    assert_eq!(
        with(&|e| e.directory_size = 268435456),
        "bitmaps_ext: bitmap directory size (268435456) exceeds the maximum supported size (67107840)"
    );
    assert_eq!(
        with(&|e| e.directory_offset = 0x7200),
        "bitmaps_ext: invalid bitmap directory offset"
    );
    let mut bytes = good.encode();
    bytes[7] = 1;
    assert_eq!(
        text(BitmapsExtension::parse(&bytes, CLUSTER_BITS)),
        "bitmaps_ext: Reserved field is not zero"
    );
    assert_eq!(
        text(BitmapsExtension::parse(&bytes[..16], CLUSTER_BITS)),
        "bitmaps_ext: Invalid extension length"
    );
}

#[test]
fn an_impossible_directory_is_told() {
    let entries = [entry("a"), entry("bb")];
    let (e, bytes) = (extension(&entries), encode_directory(&entries));
    let sized = |nb_bitmaps, directory_size| {
        let e = BitmapsExtension {
            nb_bitmaps,
            directory_size,
            ..e
        };
        text(parse(&e, &bytes))
    };
    let broken = "Broken bitmap directory";
    assert_eq!(sized(2, 63), broken);
    assert_eq!(sized(2, 72), broken);
    assert_eq!(
        sized(1, 64),
        "More bitmaps found than specified in header extension"
    );
    assert_eq!(
        sized(3, 64),
        "Less bitmaps found than specified in header extension"
    );
    let poked = |at: usize, value: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        text(parse(&e, &bytes))
    };
    assert_eq!(poked(23, &[8]), "Bitmap extra data is not supported");
    assert_eq!(poked(18, &[4, 0]), broken);
    let unfit = "Bitmap 'a' doesn't satisfy the constraints";
    let pokes: [(usize, &[u8]); 10] = [
        (6, &[0x12]),
        (0, &[0; 8]),
        (8, &[0; 4]),
        // 512 MiB of bits and a cluster.
        (8, &[0, 2, 0, 1]),
        (15, &[4]),
        (12, &[0x80]),
        (16, &[0]),
        (16, &[2]),
        (17, &[8]),
        (17, &[32]),
    ];
    for (at, value) in pokes {
        assert_eq!(poked(at, value), unfit, "{at} {value:?}");
    }
    assert_eq!(
        poked(24, &[0]),
        "Bitmap '' doesn't satisfy the constraints",
        "a name ends where others would end it"
    );
    // Too short for the disk, but for one that is not to be read.
    let short = parse_directory(&e, &bytes, 1 << 40, CLUSTER_BITS);
    assert_eq!(text(short), unfit);
    let mut old = entries.clone();
    old.iter_mut().for_each(|e| e.flags |= BitmapFlags::IN_USE);
    let read = parse_directory(&e, &encode_directory(&old), 1 << 40, CLUSTER_BITS);
    assert_eq!(read.unwrap(), old);
    // A file that ends in the middle.
    assert_eq!(
        text(parse(&e, &bytes[..32])),
        "Bitmap '' doesn't satisfy the constraints"
    );
}
