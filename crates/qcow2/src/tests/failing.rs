// SPDX-License-Identifier: MIT OR Apache-2.0
//! Commits that fail at each of their requests in turn, and are tried again.

use blockcore::testing::fault::{Event, Rule};
use blockcore::testing::{CrashDriver, Rng};
use blockcore::{Node, TruncateRequest};

use super::torture::{Op, Plan, Step};
use super::{
    DataFileKind, Shape, corruptions, findings, fresh_image, open_on, open_with_faults, read_all,
    write,
};
use crate::crypto::CryptMethod;

/// Clusters of 512 bytes with refcounts of 64 bits: a refcount table of one cluster counts 4096 clusters, so that it soon has to move.
const MANY_BLOCKS: Shape = Shape {
    size: 4 << 20,
    cluster_bits: 9,
    version: 3,
    refcount_order: 6,
    extended_l2: false,
    encryption: CryptMethod::None,
};

// INV QCOW2-RAW-1: what is left of a write that failed behind the end of the data file is there at once, or never.
#[tokio::test(start_paused = true)]
async fn a_torn_write_behind_the_end_of_a_raw_data_file_is_seen_at_once() {
    let mut told = 0;
    for nth in 0..30 {
        let mut plan = Plan::over(Shape {
            size: 36 * 512,
            cluster_bits: 15,
            version: 3,
            refcount_order: 4,
            extended_l2: true,
            encryption: CryptMethod::None,
        });
        plan.data_file = DataFileKind::Raw;
        plan.faults = vec![Rule::tear_all(libc::EIO).not_before(nth)];
        let steps = [Op::Write(30..36, 1), Op::Read(11..36), Op::Write(4..9, 5)];
        plan.sessions = vec![steps.map(Step::new).to_vec()];
        let seen = plan.run(0, &mut Rng::new(1)).await;
        told += seen
            .unwrap_or_else(|why| panic!("request {nth}: {why}"))
            .errors
            .len();
    }
    assert!(told > 0, "nothing failed");
}

// INV QCOW2-ORD-1, INV QCOW2-ORD-3, INV QCOW2-ORD-5: a commit that failed anywhere has lost nothing, and may be tried again without harm.
#[tokio::test]
async fn a_commit_that_failed_is_done_by_the_next() {
    let mut failed = 0;
    for (event, nth) in [Event::Write, Event::Flush]
        .into_iter()
        .flat_map(|event| (0..90).step_by(2).map(move |nth| (event, nth)))
    {
        let disk = CrashDriver::new(fresh_image(MANY_BLOCKS));
        let (node, _image, faults) = open_with_faults(disk.clone()).await;
        write(&node, 0, 1 << 20, 1).await.unwrap();
        node.flush().await.unwrap();
        write(&node, 1 << 20, 1 << 20, 2).await.unwrap();
        node.pdiscard(0, 256 << 10).await.unwrap();
        faults.add(Rule::fail(event, libc::EIO).only(nth));
        let first = node.flush().await;
        faults.clear();
        failed += u32::from(first.is_err());
        let first_ended = disk.log_len() as u64;
        write(&node, 3 << 20, 1024, 3).await.unwrap();
        node.flush().await.unwrap();
        let expected = read_all(&node).await;
        for at in [0, 1 << 20, 3 << 20] {
            let value = [0, 2, 2, 3][at >> 20];
            assert_eq!(expected[at], value);
        }
        let mut rng = Rng::new(u64::from(nth));
        for _ in 0..6 {
            let cut = (first_ended + rng.below(disk.log_len() as u64 - first_ended + 1)) as usize;
            let left = disk.image_after(cut, rng.below(101), &mut rng);
            let wrong = corruptions(left).await;
            assert_eq!(wrong, Vec::<String>::new(), "{event:?} {nth} cut {cut}");
        }
        node.driver().close().await.unwrap();
        let (again, _) = open_on(CrashDriver::new(disk.snapshot()), None).await;
        assert!(read_all(&again).await == expected, "{event:?} {nth}");
        let left = findings(disk.snapshot()).await;
        assert_eq!(left, Vec::<String>::new(), "{event:?} {nth}");
    }
    assert!(failed > 20, "only {failed} commits failed");
}

/// Flushes, cuts the power right before each flush of the disk, where most is at stake, and checks what is left.
async fn check_cuts(disk: &CrashDriver, node: &Node) {
    let begun = disk.log_len();
    node.flush().await.unwrap();
    for cut in (begun..disk.log_len()).filter(|&at| disk.is_flush(at)) {
        for seed in 0..16 {
            let left = disk.image_after(cut, 50, &mut Rng::new(seed));
            let wrong = corruptions(left).await;
            assert_eq!(wrong, Vec::<String>::new(), "cut {cut} seed {seed}");
        }
    }
}

// INV QCOW2-ORD-1: a long run needs several new refcount blocks, and some are counted in others. Here their table entries lie in two sectors.
#[tokio::test]
async fn a_refcount_block_is_not_in_use_before_it_is_counted() {
    let shape = Shape {
        size: 16 << 20,
        ..MANY_BLOCKS
    };
    let disk = CrashDriver::new(fresh_image(shape));
    let (node, image) = open_on(disk.clone(), None).await;
    write(&node, 0, 15 << 19, 1).await.unwrap();
    node.flush().await.unwrap();
    let mut meta = image.meta.lock().await;
    image.alloc_run(&mut meta, 1200).await.unwrap();
    drop(meta);
    check_cuts(&disk, &node).await;
}

// INV QCOW2-ORD-1: the same where an earlier commit has failed after the header may have named the refcount table's new place.
#[tokio::test]
async fn a_table_that_the_header_may_name_is_changed_with_care() {
    let shape = Shape {
        size: 16 << 20,
        ..MANY_BLOCKS
    };
    let disk = CrashDriver::new(fresh_image(shape));
    let (node, image, faults) = open_with_faults(disk.clone()).await;
    write(&node, 0, 11 << 19, 1).await.unwrap();
    node.flush().await.unwrap();
    write(&node, 11 << 19, 1 << 19, 2).await.unwrap();
    assert!(image.meta.lock().await.refcounts.needs_move());
    let named = async {
        while !image.meta.lock().await.header_may_name_moved_table() {
            tokio::task::yield_now().await;
        }
        faults.add(Rule::fail(Event::Flush, libc::EIO));
    };
    let (flushed, ()) = tokio::join!(node.flush(), named);
    assert!(flushed.is_err());
    faults.clear();
    let mut meta = image.meta.lock().await;
    image.alloc_run(&mut meta, 5000).await.unwrap();
    drop(meta);
    check_cuts(&disk, &node).await;
}

#[tokio::test]
async fn a_growth_whose_commit_fails_leaves_the_old_length() {
    let mut failed = 0;
    for (event, nth) in [Event::Write, Event::Flush]
        .into_iter()
        .flat_map(|event| (0..12).map(move |nth| (event, nth)))
    {
        let disk = CrashDriver::new(fresh_image(MANY_BLOCKS));
        let (node, _image, faults) = open_with_faults(disk.clone()).await;
        write(&node, 0, 1 << 20, 1).await.unwrap();
        faults.add(Rule::fail(event, libc::EIO).only(nth));
        let grown = node.truncate(TruncateRequest::to(8 << 20)).await;
        faults.clear();
        failed += u32::from(grown.is_err());
        let length = if grown.is_ok() { 8 << 20 } else { 4 << 20 };
        assert_eq!(node.length(), length);
        write(&node, 3 << 20, 1024, 3).await.unwrap();
        node.flush().await.unwrap();
        let (again, _) = open_on(CrashDriver::new(disk.snapshot()), None).await;
        assert_eq!(again.length(), length, "{event:?} {nth}");
        assert!(read_all(&again).await == read_all(&node).await);
        node.driver().close().await.unwrap();
        let left = findings(disk.snapshot()).await;
        assert_eq!(left, Vec::<String>::new(), "{event:?} {nth}");
    }
    assert!(failed > 5, "only {failed} growths failed");
}
