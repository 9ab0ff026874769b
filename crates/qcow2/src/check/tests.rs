// SPDX-License-Identifier: MIT OR Apache-2.0
//! What `check` says of damaged images. That QEMU says the same is shown by the golden scripts.

use blockcore::testing::{MemoryDriver, Rng};
use blockcore::{ChildRole, NodeFlags};

use super::count::OVERFLOW_HINT;
use super::*;
use crate::format::OFLAG_COPIED;
use crate::tests::{Shape, findings, fresh_image};

const CLUSTER: usize = 4096;
/// Where the parts of [`image`] lie: after header, refcount table, refcount block and L1 table.
const L2: usize = 4 * CLUSTER;

/// One L2 table, in cluster 4, and one data cluster, in cluster 5.
fn image(refcount_order: u32) -> Vec<u8> {
    let mut image = fresh_image(Shape {
        refcount_order,
        ..Shape::small(1 << 20)
    });
    image.resize(6 * CLUSTER, 0);
    put(&mut image, 3 * CLUSTER, L2 as u64 | OFLAG_COPIED);
    put(&mut image, L2, (5 * CLUSTER) as u64 | OFLAG_COPIED);
    for cluster in 4..6 {
        let block = &mut image[2 * CLUSTER..3 * CLUSTER];
        crate::refcount::set_refcount(block, refcount_order, cluster, 1);
    }
    image
}

fn put(image: &mut [u8], at: usize, word: u64) {
    image[at..at + 8].copy_from_slice(&word.to_be_bytes());
}

#[tokio::test]
async fn a_sound_image_is_sound() {
    for order in 0..=6 {
        assert_eq!(findings(image(order)).await, [""; 0], "2^{order} bits");
    }
}

#[tokio::test]
async fn damage_is_told_line_by_line() {
    let copied = OFLAG_COPIED;
    let cases: &[(usize, u64, &[&str])] = &[
        (L2, 0, &["Leaked cluster 5 refcount=1 reference=0"]),
        (
            L2 + 8,
            copied | (5 * CLUSTER as u64),
            &["ERROR cluster 5 refcount=1 reference=2"],
        ),
        (
            L2,
            5 * CLUSTER as u64,
            &["ERROR OFLAG_COPIED data cluster: l2_entry=5000 refcount=1"],
        ),
        (
            L2,
            copied | (5 * CLUSTER as u64) | 2,
            &["ERROR found l2 entry with reserved bits set: 8000000000005002"],
        ),
        (
            L2 + 8,
            copied | 1 << 40,
            &[
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset 0x10000000000 size 0x1000",
                "ERROR OFLAG_COPIED data cluster: l2_entry=8000010000000000 refcount=0",
            ],
        ),
        (
            3 * CLUSTER,
            L2 as u64,
            &["ERROR OFLAG_COPIED L2 cluster: l1_index=0 l1_entry=4000 refcount=1"],
        ),
        (
            CLUSTER + 8,
            1 << 40,
            &["ERROR refcount block 1 is outside image"],
        ),
    ];
    for (at, word, lines) in cases {
        let mut image = image(4);
        put(&mut image, *at, *word);
        assert_eq!(findings(image).await, *lines);
    }
}

#[tokio::test]
async fn a_second_reference_that_does_not_fit_is_an_overflow() {
    let mut image = image(0);
    put(&mut image, L2 + 8, OFLAG_COPIED | (5 * CLUSTER as u64));
    assert_eq!(
        findings(image).await,
        ["ERROR: overflow cluster offset=0x5000", OVERFLOW_HINT]
    );
}

#[tokio::test]
async fn no_bytes_make_the_check_panic() {
    let mut rng = Rng::new(Rng::seed_from_env());
    let good = image(4);
    for _ in 0..1500 {
        let mut image = good.clone();
        for _ in 0..1 + rng.below(4) {
            let table = [0, CLUSTER, 2 * CLUSTER, 3 * CLUSTER, L2][rng.below(5) as usize];
            let at = table + 8 * rng.below(9) as usize;
            let word = match rng.below(4) {
                0 => rng.next_u64(),
                1 => 1 << rng.below(64),
                2 => (rng.below(8) * CLUSTER as u64) | OFLAG_COPIED,
                _ => u64::MAX,
            };
            put(&mut image, at, word);
        }
        if rng.below(5) == 0 {
            image.truncate(rng.below(6 * CLUSTER as u64) as usize);
        }
        let flags = NodeFlags {
            read_only: true,
            ..Default::default()
        };
        let node = MemoryDriver::new(image).into_node(flags).await.unwrap();
        let file = Child::new("file", ChildRole::File, node);
        if let Ok(header) = Header::read(&file).await {
            let _finds_something = check(&header, &file, CheckFix::None).await;
        }
    }
}
