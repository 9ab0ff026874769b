// SPDX-License-Identifier: MIT OR Apache-2.0
//! The target of a copy reads as the sources do, whatever the options, and holes are where zeroes are.

use blockcore::testing::MemoryDriver;
use blockcore::{Backend, NodeFlags};

use super::*;

async fn disk(bytes: Vec<u8>) -> (Backend, MemoryDriver) {
    let memory = MemoryDriver::new(bytes);
    let node = memory
        .clone()
        .into_node(NodeFlags::default())
        .await
        .unwrap();
    (Backend::new(node, false), memory)
}

fn pattern(len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    for (i, block) in out.chunks_mut(3000).enumerate() {
        if i % 3 != 0 {
            block.fill(i as u8 | 1);
        }
    }
    out
}

#[tokio::test]
async fn sources_are_joined_in_every_mode() {
    for (sparse, parallel, in_order) in [(4096, 8, true), (0, 1, true), (65536, 3, false)] {
        let (first, second) = (pattern(5 << 20), pattern(1_000_448));
        let sources = [
            disk(first.clone()).await.0,
            disk(Vec::new()).await.0,
            disk(second.clone()).await.0,
        ];
        let expected = [first, second].concat();
        let (target, memory) = disk(vec![9; expected.len() + 512]).await;
        let options = ConvertOptions {
            sparse_bytes: sparse,
            parallel,
            in_order,
            ..ConvertOptions::default()
        };
        let job = Job::new();
        convert(&sources, &target, &options, &job).await.unwrap();
        let found = memory.snapshot();
        assert!(found[..expected.len()] == expected[..], "sparse {sparse}");
        assert_eq!(found[expected.len()..], [9; 512]);
        assert_eq!(job.progress().done, job.progress().total);
    }
}

#[tokio::test]
async fn a_cancelled_copy_stops() {
    let (source, _) = disk(vec![1; 1 << 20]).await;
    let (target, memory) = disk(vec![0; 1 << 20]).await;
    let job = Job::new();
    job.cancel();
    let result = convert(&[source], &target, &ConvertOptions::default(), &job).await;
    assert_eq!(result.unwrap_err().kind(), blockcore::ErrorKind::Cancelled);
    assert!(memory.snapshot().iter().all(|&b| b == 0));
}

#[test]
fn runs_change_at_blocks_and_short_zeroes_are_data() {
    let mut bytes = vec![0u8; 16 * 4096];
    bytes[0] = 1;
    bytes[2 * 4096 + 5] = 1;
    assert_eq!(next_run(&bytes, 0, 4096, 4096), (true, 4096));
    assert_eq!(next_run(&bytes, 0, 4096, 8192), (true, 3 * 4096));
    assert_eq!(next_run(&bytes[4096..], 4096, 4096, 8192), (false, 4096));
    assert_eq!(
        next_run(&bytes[3 * 4096..], 512, 4096, 4096),
        (false, 13 * 4096)
    );
    assert_eq!(next_run(&bytes[..4096], 512, 4096, 4096), (true, 3584));
}
