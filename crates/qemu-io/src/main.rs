// SPDX-License-Identifier: MIT OR Apache-2.0
//! The program `qemu-io`. Everything is in the library.

use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let argv: Vec<String> = std::env::args_os()
        .map(|a| a.to_string_lossy().into_owned())
        .collect();
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("qemu-io: no runtime: {e}");
            return ExitCode::FAILURE;
        }
    };
    let status = runtime.block_on(qemu_io::cli::main(argv));
    // A thread that waits for standard input must not keep the program alive.
    runtime.shutdown_background();
    ExitCode::from(status as u8)
}
