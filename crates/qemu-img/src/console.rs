// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`Console`]: where a run of the tool prints. A test gives it two buffers, the program gives it the process's streams.

use std::io::Write;
use std::sync::{Arc, Mutex};

use blockcore::{BlockError, Diagnostics};

/// How much output is held back when it doesn't go to a person, in bytes: what the C library holds back for a pipe. What goes to both streams then comes out in
/// the same order as from the C tool.
pub const BLOCK_BYTES: usize = 4096;

/// The program's name where nothing else is known.
const PROGRAM: &str = "qemu-img";

/// A command that failed and has said why. The status is what the process exits with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed(pub u8);

/// What a command comes to.
pub type Outcome<T = ()> = std::result::Result<T, Failed>;

/// Where a run of the tool prints. Clones print to the same place.
#[derive(Clone)]
pub struct Console(Arc<Streams>);

struct Streams {
    /// The program as it was called; advice how to call it repeats that.
    called: String,
    /// The last part of it, which stands before every message.
    name: String,
    out: Mutex<Sink>,
    err: Mutex<Box<dyn Write + Send>>,
}

struct Sink {
    stream: Box<dyn Write + Send>,
    /// The first thing that went wrong; kept until the end of the run.
    error: Option<std::io::Error>,
}

impl Sink {
    fn keep(&mut self, result: std::io::Result<()>) {
        if let Err(e) = result {
            self.error.get_or_insert(e);
        }
    }
}

impl Console {
    /// Prints results to `out` and messages to `err`.
    pub fn new(out: Box<dyn Write + Send>, err: Box<dyn Write + Send>) -> Console {
        Console::called(PROGRAM, out, err)
    }

    /// As [`new`](Console::new), for a program that was called by another name or path.
    pub fn called(
        program: &str,
        out: Box<dyn Write + Send>,
        err: Box<dyn Write + Send>,
    ) -> Console {
        Console(Arc::new(Streams {
            called: program.to_owned(),
            name: program.rsplit('/').next().unwrap_or(PROGRAM).to_owned(),
            out: Mutex::new(Sink {
                stream: out,
                error: None,
            }),
            err: Mutex::new(err),
        }))
    }

    fn with_out(&self, f: impl FnOnce(&mut Sink)) {
        f(&mut self
            .0
            .out
            .lock()
            .expect("no code panics while it holds this lock"));
    }

    /// Prints to standard output.
    pub fn print(&self, text: &str) {
        self.with_out(|out| {
            let result = out.stream.write_all(text.as_bytes());
            out.keep(result);
        });
    }

    /// Prints a line to standard output.
    pub fn line(&self, text: &str) {
        self.print(&format!("{text}\n"));
    }

    /// Lets out what is held back.
    pub fn flush(&self) {
        self.with_out(|out| {
            let result = out.stream.flush();
            out.keep(result);
        });
    }

    /// What went wrong with standard output, but that nobody reads on: that is the reader's choice.
    pub(crate) fn output_error(&self) -> Option<std::io::Error> {
        let mut error = None;
        self.with_out(|out| error = out.error.take());
        error.filter(|e| e.kind() != std::io::ErrorKind::BrokenPipe)
    }

    /// A line on standard error, without the program's name.
    pub fn raw_error(&self, text: &str) {
        let mut err = self
            .0
            .err
            .lock()
            .expect("no code panics while it holds this lock");
        // Where standard error is gone too there is nobody left to tell.
        let _gone = err.write_all(format!("{text}\n").as_bytes());
    }

    /// A message: `qemu-img: text`.
    pub fn error(&self, text: &str) {
        self.raw_error(&format!("{}: {text}", self.0.name));
    }

    /// A message, and the failure it tells of.
    pub fn fail(&self, text: &str) -> Failed {
        self.error(text);
        Failed(1)
    }

    /// An error with its hint, behind `prefix` (which ends with `: ` if it is not empty).
    pub fn block_error(&self, prefix: &str, error: &BlockError) -> Failed {
        self.fail(&format!("{prefix}{}", toolkit::error_lines(error)))
    }

    /// A command line that makes no sense.
    pub fn usage_error(&self, command: &str, text: &str) -> Failed {
        self.error(text);
        self.try_help(command)
    }

    /// What getopt says of an option.
    pub fn option_error(&self, command: &str, text: &str) -> Failed {
        self.raw_error(&format!("{}: {text}", self.called_with(command)));
        self.try_help(command)
    }

    fn try_help(&self, command: &str) -> Failed {
        let called = self.called_with(command);
        self.raw_error(&format!("Try '{called} --help' for more info"));
        Failed(1)
    }

    fn called_with(&self, command: &str) -> String {
        let space = if command.is_empty() { "" } else { " " };
        format!("{}{space}{command}", self.0.called)
    }

    /// Where the block layer's warnings go.
    pub fn diagnostics(&self) -> Diagnostics {
        let console = self.clone();
        Diagnostics::new(move |line| {
            console.raw_error(&toolkit::diagnostic_line(&console.0.name, line));
        })
    }
}
