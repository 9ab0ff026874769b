// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is dirty in a persistent bitmap: QEMU's answer comes from its NBD server, ours from the library, since no tool shows it.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use blocklayer::{OpenOptions, OpenPolicy};
use blocklayer_tests::tools::Tools;

use crate::support::Bench;

/// Bits that are set, by their numbers.
pub type Dirty = BTreeSet<usize>;

/// The bits that stand for a range of bytes.
pub fn bits(range: std::ops::Range<usize>, granularity: usize) -> std::ops::Range<usize> {
    range.start / granularity..range.end.div_ceil(granularity)
}

/// Whether a server has got so far that clients can connect. (To try would be to be the one client that it waits for.)
fn is_listened_to(socket: &Path) -> bool {
    const ACCEPTS: &str = "00010000";
    let sockets = std::fs::read_to_string("/proc/net/unix").expect("Linux has it");
    let path = socket.to_str().expect("a test's path is text");
    sockets
        .lines()
        .any(|line| line.ends_with(path) && line.split_whitespace().nth(3) == Some(ACCEPTS))
}

/// What QEMU takes for dirty. `image` are the words by which its tools open the image.
pub fn seen_by_qemu(
    bench: &Bench,
    qemu: &Tools,
    image: &[&str],
    name: &str,
    granularity: usize,
) -> Dirty {
    let socket = bench.path("socket");
    let mut server = Command::new(qemu.qemu_img.with_file_name("qemu-nbd"))
        .args(["-r", "-B", name, "-k"])
        .arg(&socket)
        .args(image)
        .current_dir(bench.path(""))
        .spawn()
        .unwrap_or_else(|e| panic!("qemu-nbd: {e}"));
    while !is_listened_to(&socket) {
        let ended = server.try_wait().expect("it is a child of ours");
        assert!(ended.is_none(), "qemu-nbd shows nothing of {name}");
        std::thread::sleep(Duration::from_millis(5));
    }
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{name}",
        socket.display()
    );
    let map = bench.img(qemu, &["map", "--output=json", "--image-opts", &options]);
    // It ends with its client, but not at once; until then it keeps others out of the image.
    server.wait().expect("it is a child of ours");
    let map: serde_json::Value = serde_json::from_str(&map).expect("map prints JSON");
    let number = |e: &serde_json::Value, key: &str| -> usize {
        let number = e[key].as_u64().expect("places are numbers");
        usize::try_from(number).expect("the disk is short")
    };
    let ranges = map.as_array().expect("map prints a list").iter();
    ranges
        // Through this option, what is dirty shows as what isn't data.
        .filter(|e| e["data"] == false)
        .flat_map(|e| {
            let start = number(e, "start");
            bits(start..start + number(e, "length"), granularity)
        })
        .collect()
}

/// What our library takes for dirty.
pub fn seen_by_ours(bench: &Bench, file: &str, name: &str) -> Dirty {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.expect("a runtime can be had").block_on(async {
        // Bitmaps are not encrypted, and so need no key; nor do they need anything that lies below.
        let open = OpenOptions::new()
            .format("qcow2")
            .read_only(true)
            .policy(OpenPolicy::Everything)
            .no_backing(true)
            .no_io(true);
        let path = bench.path(file);
        let path = path.to_str().expect("the directory's name is text");
        let disk = open.open(&blocklayer::registry(), path).await;
        let disk = disk.unwrap_or_else(|e| panic!("{file}: {e}"));
        let bitmap = disk.root().dirty_bitmap(name);
        let bitmap = bitmap.unwrap_or_else(|e| panic!("{file}: {e}"));
        let in_bits = |bit: u64| usize::try_from(bit).expect("the disk is short");
        let dirty = bitmap.bits().ranges().flatten().map(in_bits).collect();
        disk.close().await.expect("it was only read");
        dirty
    })
}
