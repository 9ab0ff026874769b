// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`Session`]: an open image (or none), requests in flight, and where the text goes. Runs command lines one by one.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use blockcore::{Backend, BlockError, Diagnostics, ErrorKind, IoBufMut, Registry};
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{FuturesUnordered, StreamExt};
use toolkit::getopt::{Getopt, GetoptError, Opt};

use crate::aio::{Completion, Finished};
use crate::command::{Command, Verb, find};
use crate::output::{self, Output};

/// What a command did, beside the text it printed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Done {
    /// Nothing worth telling.
    Nothing,
    /// It read, wrote or discarded a range.
    Io {
        /// Byte offset.
        offset: u64,
        /// Length in bytes.
        bytes: u64,
    },
    /// It started a request.
    Started,
    /// It asked for the length, in bytes.
    Length(u64),
    /// It counted allocated bytes.
    Allocated {
        /// So many of ...
        allocated: u64,
        /// ... so many.
        of: u64,
    },
    /// The session is to end.
    Quit,
}

/// Why a command failed; what it printed says more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Failed {
    /// The command line makes no sense, or there is no image to run it on.
    Refused,
    /// What was read is not what `-P` asked for.
    Mismatch,
    /// The block layer failed it.
    Error {
        /// What a program may do about it.
        kind: ErrorKind,
        /// The errno that stands for it.
        errno: i32,
    },
}

impl Failed {
    pub(crate) fn of(error: &BlockError) -> Failed {
        Failed::Error {
            kind: error.kind(),
            errno: error.errno(),
        }
    }
}

pub(crate) type Ran = Result<Done, Failed>;

/// The outcome of one command line.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What it did, or that it failed.
    pub result: Result<Done, Failed>,
    /// What it printed to standard output; empty for a session that prints to the process's own streams.
    pub stdout: String,
    /// What it printed to standard error, likewise.
    pub stderr: String,
    /// Requests of `aio_read` and `aio_write`, also of earlier lines, that were reported while the command ran.
    pub completions: Vec<Completion>,
}

/// Runs command lines against an image.
///
/// ```
/// use blocklayer::testing::MemoryFactory;
/// use qemu_io::{Done, Failed, Session};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> blocklayer::Result<()> {
/// let mut registry = blocklayer::Registry::new();
/// registry.register(MemoryFactory::default());
/// registry.create("memory", "memory:disk", blocklayer::Options::new().with("size", "1M"), Default::default()).await?;
/// let mut session = Session::captured(registry);
/// session.run("open -o driver=memory memory:disk").await;
/// let write = session.run("write -q -P 7 4k 512").await;
/// assert_eq!(write.result, Ok(Done::Io { offset: 4096, bytes: 512 }));
/// let read = session.run("read -P 8 4k 512").await;
/// assert_eq!(read.result, Err(Failed::Mismatch));
/// assert!(read.stdout.starts_with("Pattern verification failed at offset 4096, 512 bytes\n"));
/// session.close().await;
/// # Ok(()) }
/// ```
pub struct Session {
    pub(crate) prog: String,
    pub(crate) registry: Registry,
    pub(crate) backend: Option<Arc<Backend>>,
    pub(crate) output: Output,
    pub(crate) diagnostics: Diagnostics,
    warnings: Arc<Mutex<Vec<String>>>,
    in_flight: FuturesUnordered<BoxFuture<'static, Finished>>,
    /// Requests that ended at once; they are reported when the others are.
    finished: VecDeque<Finished>,
    /// What was reported since the last outcome.
    pub(crate) completions: Vec<Completion>,
    /// Buffers begin 16 bytes off (`-m`).
    pub(crate) misalign: bool,
    /// File names are option strings (`--image-opts`).
    pub(crate) image_opts: bool,
}

impl Session {
    /// A session that prints to the process's own streams. `prog` is the program's name in messages.
    pub fn for_process(registry: Registry, prog: &str) -> Session {
        let mut session = Session::captured(registry);
        session.prog = prog.to_owned();
        session.output = Output::process();
        let program = prog.to_owned();
        session.diagnostics = Diagnostics::new(move |line| {
            output::print_error(&toolkit::diagnostic_line(&program, line));
        });
        session
    }

    /// A session that keeps what it prints, for tests and embedding programs.
    pub fn captured(registry: Registry) -> Session {
        let warnings = Arc::new(Mutex::new(Vec::new()));
        let sink = warnings.clone();
        let diagnostics = Diagnostics::new(move |line| {
            sink.lock()
                .expect("no code panics while it holds this lock")
                .push(line.to_owned());
        });
        Session {
            prog: "qemu-io".to_owned(),
            registry,
            backend: None,
            output: Output::captured(),
            diagnostics,
            warnings,
            in_flight: FuturesUnordered::new(),
            finished: VecDeque::new(),
            completions: Vec::new(),
            misalign: false,
            image_opts: false,
        }
    }

    /// Runs one command line.
    pub async fn run(&mut self, line: &str) -> Outcome {
        let words: Vec<String> = line
            .split(' ')
            .filter(|w| !w.is_empty())
            .map(str::to_owned)
            .collect();
        let result = match words.split_first() {
            None => Ok(Done::Nothing),
            Some((name, args)) => self.run_command(name, args).await,
        };
        self.print_warnings();
        let (stdout, stderr) = self.output.take();
        Outcome {
            result,
            stdout,
            stderr,
            completions: std::mem::take(&mut self.completions),
        }
    }

    async fn run_command(&mut self, name: &str, args: &[String]) -> Ran {
        let Some(command) = find(name) else {
            self.output.err(&format!("command \"{name}\" not found"));
            return Err(Failed::Refused);
        };
        if !command.no_file && self.backend.is_none() {
            self.output.err("no file open, try 'help open'");
            return Err(Failed::Refused);
        }
        self.check_count(command, name, args.len())?;
        if command.writes
            && self
                .backend
                .as_ref()
                .is_some_and(|b| b.root().is_read_only())
        {
            self.complain("Block node is read-only");
            return Err(Failed::Refused);
        }
        self.dispatch(command, name, args).await
    }

    fn check_count(&mut self, command: &Command, name: &str, count: usize) -> Result<(), Failed> {
        if count >= command.min && command.max.is_none_or(|max| count <= max) {
            return Ok(());
        }
        let expected = match command.max {
            None => format!("at least {}", command.min),
            Some(max) if max == command.min => max.to_string(),
            Some(max) => format!("between {} and {max}", command.min),
        };
        self.output.err(&format!(
            "bad argument count {count} to {name}, expected {expected} arguments"
        ));
        Err(Failed::Refused)
    }

    async fn dispatch(&mut self, command: &'static Command, name: &str, args: &[String]) -> Ran {
        let c = Call {
            command,
            name,
            args,
        };
        match command.verb {
            Verb::Abort => std::process::abort(),
            Verb::AioFlush => {
                self.finish_all().await;
                Ok(Done::Nothing)
            }
            Verb::AioRead => self.aio_read(c).await,
            Verb::AioWrite => self.aio_write(c).await,
            Verb::Alloc => self.alloc(c).await,
            Verb::Close => {
                self.close().await;
                Ok(Done::Nothing)
            }
            Verb::Discard => self.discard(c).await,
            Verb::Flush => self.flush().await,
            Verb::Help => self.help(c),
            Verb::Info => self.info().await,
            Verb::Length => self.length(),
            Verb::Map => self.map().await,
            Verb::Open => self.open(c).await,
            Verb::Quit => Ok(Done::Quit),
            Verb::Read => self.read(c).await,
            Verb::Readv => self.readv(c).await,
            Verb::Reopen => self.reopen(c).await,
            Verb::Sigraise => self.sigraise(c),
            Verb::Sleep => self.sleep(c).await,
            Verb::Truncate => self.truncate(c).await,
            Verb::Write => self.write(c).await,
            Verb::Writev => self.writev(c).await,
            Verb::Break | Verb::RemoveBreak | Verb::Resume | Verb::WaitBreak => self.breakpoint(c),
            Verb::ZoneAppend
            | Verb::ZoneClose
            | Verb::ZoneFinish
            | Verb::ZoneOpen
            | Verb::ZoneReport
            | Verb::ZoneReset => self.zone(c),
        }
    }

    /// Prints a line to standard output and fails.
    pub(crate) fn fail(&mut self, line: &str) -> Ran {
        self.output.out(&format!("{line}\n"));
        Err(Failed::Refused)
    }

    /// Prints `WHAT failed: why` to standard output and fails.
    pub(crate) fn failed(&mut self, what: &str, error: &BlockError) -> Ran {
        self.print_warnings();
        let line = format!("{what} failed: {}\n", error.strerror());
        self.output.out(&line);
        Err(Failed::of(error))
    }

    /// Prints `PROG: text` to standard error.
    pub(crate) fn complain(&mut self, text: &str) {
        let line = format!("{}: {text}", self.prog);
        self.output.err(&line);
    }

    /// Prints an error of the block layer with what stands in front of it, and fails.
    pub(crate) fn complain_of(&mut self, before: &str, error: &BlockError) -> Ran {
        self.print_warnings();
        let text = format!("{before}{}", toolkit::error_lines(error));
        self.complain(&text);
        Err(Failed::of(error))
    }

    /// Prints how a command is used, and fails.
    pub(crate) fn usage(&mut self, c: &Call<'_>) -> Ran {
        self.output.out(&c.command.usage(c.command.name));
        Err(Failed::Refused)
    }

    /// The options of a call up to the first wrong one, and its positionals. Commands look at them one by one with
    /// [`checked`](Session::checked), since an earlier mistake is reported first.
    pub(crate) fn options(
        &self,
        c: &Call<'_>,
        short: &str,
    ) -> (Vec<Result<Opt, GetoptError>>, Vec<String>) {
        let mut options = Getopt::new(c.args, short, &[]);
        let mut found = Vec::new();
        while let Some(option) = options.next() {
            let wrong = option.is_err();
            found.push(option);
            if wrong {
                break;
            }
        }
        (found, options.positionals())
    }

    /// An option, or a complaint about a wrong one.
    pub(crate) fn checked(
        &mut self,
        c: &Call<'_>,
        option: Result<Opt, GetoptError>,
    ) -> Result<Opt, Failed> {
        option.map_err(|e| {
            self.output.err(&format!("{}: {}", c.name, e.text()));
            self.output.out(&c.command.usage(c.command.name));
            Failed::Refused
        })
    }

    /// A buffer to read to.
    pub(crate) fn read_buffer(&self, len: usize) -> IoBufMut {
        let mut buf = IoBufMut::zeroed(len + self.offset_in_memory());
        let mut buf = buf.split_off(self.offset_in_memory());
        buf.fill(0xab);
        buf
    }

    pub(crate) fn offset_in_memory(&self) -> usize {
        if self.misalign { 16 } else { 0 }
    }

    /// Lines for people that came from below.
    pub(crate) fn print_warnings(&mut self) {
        let lines = std::mem::take(
            &mut *self
                .warnings
                .lock()
                .expect("no code panics while it holds this lock"),
        );
        for line in lines {
            self.output
                .err(&toolkit::diagnostic_line(&self.prog, &line));
        }
    }

    /// Starts a request. It ends at once or is reported later.
    pub(crate) fn start(&mut self, mut request: BoxFuture<'static, Finished>) {
        match (&mut request).now_or_never() {
            Some(finished) => self.finished.push_back(finished),
            None => self.in_flight.push(request),
        }
    }

    /// Waits for `work`; requests in flight go on meanwhile, and are reported as they end.
    pub async fn wait<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        if let Some(done) = work.as_mut().now_or_never() {
            return done;
        }
        self.report_finished();
        loop {
            tokio::select! {
                biased;
                done = &mut work => return done,
                Some(finished) = self.in_flight.next(), if !self.in_flight.is_empty() => self.report(finished),
            }
        }
    }

    /// Reports requests that ended without a wait.
    fn report_finished(&mut self) {
        while let Some(finished) = self.finished.pop_front() {
            self.report(finished);
        }
    }

    /// Waits for all requests in flight and reports them.
    pub async fn finish_all(&mut self) {
        self.report_finished();
        while let Some(finished) = self.in_flight.next().await {
            self.report(finished);
        }
        self.print_warnings();
    }

    /// Waits for requests in flight and closes the image, if one is open.
    pub async fn close(&mut self) {
        self.finish_all().await;
        if let Some(backend) = self.backend.take()
            && let Err(e) = backend.close().await
        {
            self.print_warnings();
            self.complain(&toolkit::error_lines(&e));
        }
        self.print_warnings();
    }

    /// Prints what is held back.
    pub fn flush_output(&mut self) {
        self.output.flush();
    }
}

/// One call of a command.
#[derive(Clone, Copy)]
pub(crate) struct Call<'a> {
    pub command: &'static Command,
    /// The name it was called by.
    pub name: &'a str,
    pub args: &'a [String],
}
