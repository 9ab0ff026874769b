// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `qemu-img` program: the library, over this process's command line and streams.

use std::io::{IsTerminal, LineWriter, Write, stderr, stdout};
use std::process::ExitCode;

use qemu_img::console::{BLOCK_BYTES, Console};

fn main() -> ExitCode {
    let mut args = Vec::new();
    for (i, arg) in std::env::args_os().enumerate() {
        match arg.into_string() {
            Ok(arg) => args.push(arg),
            Err(arg) => {
                eprintln!("qemu-img: argument {i} is no valid text: {arg:?}");
                return ExitCode::FAILURE;
            }
        }
    }
    // As the C library does it: lines for a person, blocks for a file or a pipe.
    let out: Box<dyn Write + Send> = if stdout().is_terminal() {
        Box::new(LineWriter::new(stdout()))
    } else {
        Box::new(std::io::BufWriter::with_capacity(BLOCK_BYTES, Unbuffered))
    };
    let (called, args) = match args.split_first() {
        Some((called, args)) => (called.as_str(), args),
        None => ("qemu-img", &[][..]),
    };
    let status = qemu_img::run(args, Console::called(called, out, Box::new(stderr())));
    ExitCode::from(status)
}

/// Standard output without the line buffer that the standard library puts before it.
struct Unbuffered;

impl Write for Unbuffered {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut out = stdout().lock();
        out.write_all(bytes)?;
        out.flush()?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
