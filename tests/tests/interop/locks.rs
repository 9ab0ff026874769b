// SPDX-License-Identifier: MIT OR Apache-2.0
//! A process of ours and one of QEMU's shut each other out of the same image, with QEMU's message, both ways round; so do two
//! of ours. Readers share, and `-r -U` looks past the locks.
//!
//! Method: the holder is a `qemu-io` in stdin mode. Once it has answered `length`, it has the image open; then the other side
//! tries, and what it prints is compared whole.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use blocklayer_tests::tools::Tools;

use crate::support::{Bench, both};

/// A `qemu-io` process that has an image open until it is dropped.
struct Holder {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Holder {
    fn open(bench: &Bench, qemu_io: &Path, arguments: &[&str]) -> Holder {
        let mut child = Command::new(qemu_io)
            .args(arguments)
            .current_dir(bench.path(""))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{}: {e}", qemu_io.display()));
        let mut stdin = child.stdin.take().expect("stdin is a pipe");
        let stdout = child.stdout.take().expect("stdout is a pipe");
        // The answer to the first command is flushed with the prompt of the second.
        stdin
            .write_all(b"length\nlength\n")
            .expect("the holder reads its commands");
        let mut line = String::new();
        BufReader::new(stdout)
            .read_line(&mut line)
            .expect("the holder answers");
        assert_eq!(line, "qemu-io> 1 MiB\n", "{}", qemu_io.display());
        Holder {
            child,
            stdin: Some(stdin),
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // At the end of its input it closes the image and exits.
        self.stdin.take();
        let _ = self.child.wait();
    }
}

fn refused(bench: &Bench, tools: &Tools, arguments: &[&str], message: &str) {
    let tool = if arguments[0] == "info" {
        &tools.qemu_img
    } else {
        &tools.qemu_io
    };
    let output = bench.output(tool, arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(stderr, message, "{} {arguments:?}", tools.side);
    assert_eq!(
        output.status.code(),
        Some(1),
        "{} {arguments:?}",
        tools.side
    );
}

#[test]
fn ours_and_qemu_shut_each_other_out_of_an_open_image() {
    let Some((ours, qemu)) = both("locks") else {
        return;
    };
    let bench = Bench::new();
    bench.img(&qemu, &["create", "-q", "-f", "raw", "base.raw", "1M"]);
    let over = "create -q -f qcow2 -b base.raw -F raw t.qcow2 1M";
    bench.img(&qemu, &over.split(' ').collect::<Vec<_>>());
    for (holder, other) in [(&ours, &qemu), (&qemu, &ours), (&ours, &ours)] {
        println!("{} holds, {} tries", holder.side, other.side);
        {
            let _held = Holder::open(&bench, &holder.qemu_io, &["t.qcow2"]);
            refused(
                &bench,
                other,
                &["-c", "length", "t.qcow2"],
                "qemu-io: can't open device t.qcow2: Failed to get \"write\" lock\n\
                 Is another process using the image [t.qcow2]?\n",
            );
            refused(
                &bench,
                other,
                &["-r", "-c", "length", "t.qcow2"],
                "qemu-io: can't open device t.qcow2: Failed to get shared \"write\" lock\n\
                 Is another process using the image [t.qcow2]?\n",
            );
            refused(
                &bench,
                other,
                &["info", "t.qcow2"],
                "qemu-img: Could not open 't.qcow2': Failed to get shared \"write\" lock\n\
                 Is another process using the image [t.qcow2]?\n",
            );
            // The image below may be read by others.
            let arguments = ["-r", "-f", "raw", "-c", "length", "base.raw"];
            assert_eq!(bench.run(&other.qemu_io, &arguments), "1 MiB\n");
            let arguments = ["-r", "-U", "-c", "length", "t.qcow2"];
            assert_eq!(bench.run(&other.qemu_io, &arguments), "1 MiB\n");
            bench.run(&other.qemu_img, &["info", "-U", "t.qcow2"]);
        }
        {
            let _held = Holder::open(&bench, &holder.qemu_io, &["-r", "t.qcow2"]);
            let arguments = ["-r", "-c", "length", "t.qcow2"];
            assert_eq!(bench.run(&other.qemu_io, &arguments), "1 MiB\n");
            refused(
                &bench,
                other,
                &["-c", "length", "t.qcow2"],
                "qemu-io: can't open device t.qcow2: Failed to get \"write\" lock\n\
                 Is another process using the image [t.qcow2]?\n",
            );
        }
        // Nothing is left of the locks once the holder is gone.
        let arguments = ["-c", "length", "t.qcow2"];
        assert_eq!(bench.run(&other.qemu_io, &arguments), "1 MiB\n");
    }
}
