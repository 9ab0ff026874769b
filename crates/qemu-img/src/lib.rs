// SPDX-License-Identifier: MIT OR Apache-2.0
//! `qemu-img` as a library: [`run`] takes a command line and prints to a [`Console`].
//!
//! What it prints, on which stream, and the exit status are those of QEMU's tool, so that scripts written for that one go on working. The
//! long operations are the crate `blockjob`'s; here are command lines and printing. Each command is a file.
//!
//! ```
//! use qemu_img::console::Console;
//! let console = Console::new(Box::new(std::io::sink()), Box::new(std::io::sink()));
//! assert_eq!(qemu_img::run(&["nonsense".to_owned()], console), 1);
//! ```

mod amend;
mod bench;
mod bitmap;
mod check;
mod compare;
pub mod console;
mod convert;
mod create;
mod help;
mod image;
mod info;
mod json;
mod map;
mod number;
mod options;
mod progress;
mod resize;
mod snapshot;
mod snapshot_list;

use blockcore::Registry;
use toolkit::getopt::{Arg, Getopt, long};

use console::{Console, Failed, Outcome};

/// What a command works with.
pub(crate) struct Tool {
    pub registry: Registry,
    pub console: Console,
}

/// Runs a command line (without the program's name) to its end, on a runtime of its own, with the standard drivers. Returns the exit status.
pub fn run(args: &[String], console: Console) -> u8 {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let status = match runtime {
        Ok(runtime) => runtime.block_on(async {
            // One thread does everything: io_uring without a switch between threads. Where that can't be had, there are other ways.
            if let Err(e) = blocklayer::raw::use_this_runtime() {
                tracing::debug!("the runtime can't work io_uring itself: {e}");
            }
            if let Err(e) = toolkit::survive_file_size_limit() {
                tracing::debug!("the limit for files may end the program: {e}");
            }
            run_async(args, blocklayer::registry(), console.clone()).await
        }),
        Err(e) => console.fail(&format!("Could not start: {e}")).0,
    };
    console.flush();
    match console.output_error() {
        Some(e) if status == 0 => console.fail(&format!("Could not write the output: {e}")).0,
        _ => status,
    }
}

/// As [`run`], on the caller's runtime and with the caller's drivers.
pub async fn run_async(args: &[String], registry: Registry, console: Console) -> u8 {
    let tool = Tool { registry, console };
    match tool.command_line(args).await {
        Ok(()) => 0,
        Err(Failed(status)) => status,
    }
}

/// Commands that QEMU's tool has and this one has not yet.
const LATER: [&str; 4] = ["commit", "dd", "measure", "rebase"];

impl Tool {
    async fn command_line(&self, args: &[String]) -> Outcome {
        // Options of the tool itself end where the command's name is.
        let own = args
            .iter()
            .take_while(|a| a.starts_with('-') && a.len() > 1);
        let mut own: Vec<String> = own.cloned().collect();
        let mut rest = &args[own.len()..];
        if let Some(end) = own.iter().position(|a| a == "--") {
            rest = &args[end + 1..];
            own.truncate(end);
        }
        let known = [
            long("help", Arg::No, 'h'),
            long("version", Arg::No, 'V'),
            long("trace", Arg::Required, 'T'),
        ];
        // An option's own argument may be the first word that looks like none.
        let with_next: Vec<String> = own.iter().chain(rest.first()).cloned().collect();
        let mut options = Getopt::new(&with_next, "hVT:", &known);
        // Each of them ends the run, so there is no second.
        if let Some(option) = options.next() {
            let option = option.map_err(|e| self.console.option_error("", e.text()))?;
            return match option.value {
                'h' => {
                    help::print(self, "");
                    Ok(())
                }
                'V' => {
                    self.console.print(&help::version());
                    Ok(())
                }
                _ => Err(self.console.fail("tracing (-T) is not supported yet")),
            };
        }
        let Some((command, args)) = rest.split_first() else {
            return Err(self.console.usage_error("", "Not enough arguments"));
        };
        match command.as_str() {
            "bench" => self.bench(args).await,
            "bitmap" => self.bitmap(args).await,
            "check" => self.check(args).await,
            "compare" => self.compare(args).await,
            "convert" => self.convert(args).await,
            "amend" => self.amend(args).await,
            "create" => self.create(args).await,
            "info" => self.info(args).await,
            "map" => self.map(args).await,
            "resize" => self.resize(args).await,
            "snapshot" => self.snapshot(args).await,
            later if LATER.contains(&later) => Err(self
                .console
                .fail(&format!("'{later}' is not supported yet"))),
            other => {
                let text = format!("Command not found: {other}");
                Err(self.console.usage_error("", &text))
            }
        }
    }
}
