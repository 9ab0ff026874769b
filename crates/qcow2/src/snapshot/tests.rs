// SPDX-License-Identifier: MIT OR Apache-2.0
//! Snapshot tables, sound and damaged.

use blockcore::testing::MemoryDriver;
use blockcore::{ChildRole, NodeFlags};

use super::*;
use crate::tests::{Shape, fresh_image};

/// Bytes of one entry, padded as the next one needs it.
fn entry(l1_offset: u64, l1_size: u32, id: &str, name: &str, extra: &[u64]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(l1_offset.to_be_bytes());
    out.extend(l1_size.to_be_bytes());
    out.extend((id.len() as u16).to_be_bytes());
    out.extend((name.len() as u16).to_be_bytes());
    for word in [11u32, 12, 0, 13, 14, extra.len() as u32 * 8] {
        out.extend(word.to_be_bytes());
    }
    out.extend(extra.iter().flat_map(|e| e.to_be_bytes()));
    out.extend(id.bytes().chain(name.bytes()));
    out.resize(out.len().next_multiple_of(8), 0);
    out
}

async fn image(count: u32, entries: &[Vec<u8>]) -> (Header, Child) {
    let mut image = fresh_image(Shape::small(1 << 20));
    let at = image.len() as u64;
    image[60..64].copy_from_slice(&count.to_be_bytes());
    image[64..72].copy_from_slice(&at.to_be_bytes());
    image.extend(entries.concat());
    let flags = NodeFlags {
        read_only: true,
        ..Default::default()
    };
    let node = MemoryDriver::new(image).into_node(flags).await.unwrap();
    let file = Child::new("file", ChildRole::File, node);
    (Header::read(&file).await.unwrap(), file)
}

#[tokio::test]
async fn a_table_is_read_as_it_was_written() {
    let entries = [
        entry(0x5000, 2, "1", "first", &[7 << 40, 1 << 20, u64::MAX]),
        entry(0x6000, 3, "2", "the second", &[0, 2 << 20, 99]),
        entry(0x7000, 1, "3", "", &[]),
    ];
    let (header, file) = image(3, &entries).await;
    let table = read_table(&header, &file).await.unwrap();
    assert_eq!(table.bytes, 40 + 24 + 6 + 2 + 40 + 24 + 11 + 5 + 41);
    let [first, second, third] = &table.snapshots[..] else {
        panic!("{table:?}");
    };
    assert_eq!((&first.id[..], &first.name[..]), ("1", "first"));
    assert_eq!((first.l1_table_offset, first.l1_size), (0x5000, 2));
    assert_eq!(
        (first.date_sec, first.date_nsec, first.vm_clock_nsec),
        (11, 12, 13)
    );
    assert_eq!(
        (first.vm_state_size, first.disk_size),
        (7 << 40, Some(1 << 20))
    );
    assert_eq!((first.icount, second.icount), (None, Some(99)));
    assert_eq!((third.vm_state_size, third.disk_size), (14, None));
    let complete: Vec<bool> = table.snapshots.iter().map(|s| s.is_complete).collect();
    assert_eq!(complete, [true, true, false]);
}

#[tokio::test]
async fn impossible_tables_are_refused_and_told() {
    for (entries, text) in [
        (
            entry(0x5000, 1, "1", "a", &[0; 129]),
            "Too much extra metadata in snapshot table entry 0",
        ),
        (
            entry(0x5001, 1, "1", "a", &[0, 0]),
            "snapshot 1 (a) l1_offset=0x5001: L1 table is not cluster aligned; snapshot table entry corrupted",
        ),
        (
            entry(0x5000, (4 << 20) + 1, "1", "a", &[0, 0]),
            "snapshot 1 (a) l1_size=0x400001: L1 table is too large; snapshot table entry corrupted",
        ),
    ] {
        let (header, file) = image(1, &[entries]).await;
        assert_eq!(read_table(&header, &file).await.unwrap_err().text(), text);
    }
}

#[tokio::test]
async fn a_table_past_the_end_of_the_file_is_zeroes() {
    let (header, file) = image(MAX_ENTRIES, &[]).await;
    let table = read_entries(&header, &file).await.unwrap();
    assert_eq!(table.snapshots.len(), MAX_ENTRIES as usize);
    assert!(
        table
            .snapshots
            .iter()
            .all(|s| !s.is_complete && s.name.is_empty())
    );
}

const MAX_ENTRIES: u32 = crate::format::MAX_SNAPSHOTS;
