// SPDX-License-Identifier: MIT OR Apache-2.0
//! `aio_read` and `aio_write`: requests that go on while the next commands run. They are reported as they end, but only when the program waits for
//! something: `aio_flush`, `sleep`, `close`, a line from standard input, a request that has to wait, the end.

use std::time::{Duration, Instant};

use blockcore::{IoBufMut, Result, WriteFlags};
use futures::future::FutureExt;

use crate::numbers::{REQUEST_BYTES_MAX, pattern, size};
use crate::read_write::ReadOptions;
use crate::report::Report;
use crate::session::{Call, Done, Failed, Ran, Session};

/// A request that has ended.
pub(crate) enum Finished {
    Read {
        options: ReadOptions,
        offset: u64,
        elapsed: Duration,
        result: Result<IoBufMut>,
    },
    Write {
        machine: bool,
        quiet: bool,
        offset: u64,
        bytes: u64,
        elapsed: Duration,
        result: Result<()>,
    },
}

impl Session {
    /// Prints the report of a request that has ended.
    pub(crate) fn report(&mut self, finished: Finished) {
        match finished {
            Finished::Read { result: Err(e), .. } => {
                self.output
                    .out(&format!("readv failed: {}\n", e.strerror()));
            }
            Finished::Read {
                options,
                offset,
                elapsed,
                result: Ok(buf),
            } => {
                let bytes = buf.len() as u64;
                let report = Report {
                    verb: "read",
                    offset,
                    bytes,
                    elapsed,
                    machine: options.machine,
                };
                // A mismatch is printed and does not count for the exit status, as ever.
                let _printed = self.show_read(&options, report, &buf);
            }
            Finished::Write { result: Err(e), .. } => {
                self.output
                    .out(&format!("aio_write failed: {}\n", e.strerror()));
            }
            Finished::Write {
                machine,
                quiet,
                offset,
                bytes,
                elapsed,
                result: Ok(()),
            } => {
                if !quiet {
                    self.output.out(
                        &Report {
                            verb: "wrote",
                            offset,
                            bytes,
                            elapsed,
                            machine,
                        }
                        .text(),
                    );
                }
            }
        }
    }

    pub(crate) async fn aio_read(&mut self, c: Call<'_>) -> Ran {
        let (found, words) = self.options(&c, "CP:iqrv");
        let mut options = ReadOptions::default();
        for option in found {
            let option = self.checked(&c, option)?;
            if option.value == 'i' {
                return self.injected("read");
            }
            self.read_option(&mut options, option.value, &option.arg)?;
        }
        let (offset, lengths) = self.vector(&c, &words)?;
        let buf = self.read_vector(&lengths);
        let backend = self.backend()?;
        let started = Instant::now();
        let request = async move {
            let result = backend.preadv(offset, buf, options.flags()).await;
            Finished::Read {
                options,
                offset,
                elapsed: started.elapsed(),
                result,
            }
        };
        self.start(request.boxed());
        Ok(Done::Started)
    }

    pub(crate) async fn aio_write(&mut self, c: Call<'_>) -> Ran {
        let (found, words) = self.options(&c, "CfiP:qruz");
        let (mut machine, mut quiet, mut zero, mut byte) = (false, false, false, 0xcd);
        let mut flags = WriteFlags::empty();
        for option in found {
            let option = self.checked(&c, option)?;
            match option.value {
                'C' => machine = true,
                'f' => flags |= WriteFlags::FUA,
                'i' => return self.injected("write"),
                'P' => byte = pattern(&option.arg).or_else(|e| self.number_error(&e))?,
                'q' => quiet = true,
                'r' => flags |= WriteFlags::REGISTERED_BUF,
                'u' => flags |= WriteFlags::MAY_UNMAP,
                'z' => zero = true,
                _ => {}
            }
        }
        if words.len() < 2 {
            return self.usage(&c);
        }
        if zero && words.len() != 2 {
            return self.fail("-z supports only a single length parameter");
        }
        if flags.contains(WriteFlags::MAY_UNMAP) && !zero {
            return self.fail("-u requires -z to be specified");
        }
        if zero && flags.contains(WriteFlags::REGISTERED_BUF) {
            return self.fail("cannot combine zero write with registered I/O buffer");
        }
        let backend = self.backend()?;
        if zero {
            let offset = size(&words[0]).or_else(|e| self.number_error(&e))?;
            let bytes = size(&words[1]).or_else(|e| self.number_error(&e))?;
            let started = Instant::now();
            let request = async move {
                let result = backend.pwrite_zeroes(offset, bytes, flags).await;
                Finished::Write {
                    machine,
                    quiet,
                    offset,
                    bytes,
                    elapsed: started.elapsed(),
                    result,
                }
            };
            self.start(request.boxed());
            return Ok(Done::Started);
        }
        let (offset, lengths) = self.vector(&c, &words)?;
        let data = self.write_vector(&lengths, byte);
        let bytes = data.len() as u64;
        debug_assert!(bytes <= REQUEST_BYTES_MAX);
        let started = Instant::now();
        let request = async move {
            let result = backend.pwritev(offset, data, flags).await;
            Finished::Write {
                machine,
                quiet,
                offset,
                bytes,
                elapsed: started.elapsed(),
                result,
            }
        };
        self.start(request.boxed());
        Ok(Done::Started)
    }

    /// `-i` counts a request that is never made.
    fn injected(&mut self, what: &str) -> Result<Done, Failed> {
        self.output
            .out(&format!("injecting invalid {what} request\n"));
        Ok(Done::Nothing)
    }
}
