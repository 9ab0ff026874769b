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
    let status = runtime.block_on(async {
        // One thread does everything: io_uring without a switch between threads. Where that can't be had, there are other ways.
        if let Err(e) = blocklayer::raw::use_this_runtime() {
            tracing::debug!("the runtime can't work io_uring itself: {e}");
        }
        if let Err(e) = toolkit::survive_file_size_limit() {
            tracing::debug!("the limit for files may end the program: {e}");
        }
        qemu_io::cli::main(argv).await
    });
    // A thread that waits for standard input must not keep the program alive.
    runtime.shutdown_background();
    ExitCode::from(status as u8)
}
