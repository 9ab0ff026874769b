// SPDX-License-Identifier: MIT OR Apache-2.0
//! `aio_read` and `aio_write`: requests that go on while the next commands run. They are reported as they end, but only when the program waits for
//! something: `aio_flush`, `sleep`, `close`, a line from standard input, a request that has to wait, the end.

use std::time::{Duration, Instant};

use blockcore::{IoBufMut, WriteFlags};
use futures::future::FutureExt;

use crate::numbers::{pattern, size};
use crate::read_write::ReadOptions;
use crate::report::Report;
use crate::session::{Call, Done, Failed, Ran, Session};

/// A request of `aio_read` or `aio_write` that has ended and was reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// It wrote; otherwise it read.
    pub is_write: bool,
    /// Byte offset.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// How it ended. Failures here do not count for the program's exit status, as ever.
    pub result: Result<(), Failed>,
}

/// A request that has ended, and how it is to be reported.
pub(crate) struct Finished {
    pub options: ReadOptions,
    pub is_write: bool,
    pub offset: u64,
    pub bytes: u64,
    pub elapsed: Duration,
    /// What a read read.
    pub result: blockcore::Result<Option<IoBufMut>>,
}

impl Session {
    /// Prints the report of a request that has ended.
    pub(crate) fn report(&mut self, finished: Finished) {
        let (is_write, offset, bytes) = (finished.is_write, finished.offset, finished.bytes);
        let report = Report {
            verb: if is_write { "wrote" } else { "read" },
            offset,
            bytes,
            elapsed: finished.elapsed,
            machine: finished.options.machine,
        };
        let result = match finished.result {
            Ok(Some(buf)) => self.show_read(&finished.options, report, &buf),
            Ok(None) => {
                if !finished.options.quiet {
                    self.output.out(&report.text());
                }
                Ok(())
            }
            Err(e) => {
                let what = if is_write { "aio_write" } else { "readv" };
                self.failed(what, &e).map(|_| ())
            }
        };
        self.completions.push(Completion {
            is_write,
            offset,
            bytes,
            result,
        });
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
        let bytes = buf.len() as u64;
        let backend = self.backend()?;
        let started = Instant::now();
        let request = async move {
            let result = backend.preadv(offset, buf, options.flags()).await;
            Finished {
                options,
                is_write: false,
                offset,
                bytes,
                elapsed: started.elapsed(),
                result: result.map(Some),
            }
        };
        self.start(request.boxed());
        Ok(Done::Started)
    }

    pub(crate) async fn aio_write(&mut self, c: Call<'_>) -> Ran {
        let (found, words) = self.options(&c, "CfiP:qruz");
        let mut options = ReadOptions::default();
        let (mut zero, mut byte) = (false, 0xcd);
        let mut flags = WriteFlags::empty();
        for option in found {
            let option = self.checked(&c, option)?;
            match option.value {
                'C' => options.machine = true,
                'f' => flags |= WriteFlags::FUA,
                'i' => return self.injected("write"),
                'P' => byte = pattern(&option.arg).or_else(|e| self.number_error(&e))?,
                'q' => options.quiet = true,
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
        let (offset, bytes, data) = if zero {
            let offset = size(&words[0]).or_else(|e| self.number_error(&e))?;
            let bytes = size(&words[1]).or_else(|e| self.number_error(&e))?;
            (offset, bytes, None)
        } else {
            let (offset, lengths) = self.vector(&c, &words)?;
            let data = self.write_vector(&lengths, byte);
            (offset, data.len() as u64, Some(data))
        };
        let started = Instant::now();
        let request = async move {
            let result = match data {
                Some(data) => backend.pwritev(offset, data, flags).await,
                None => backend.pwrite_zeroes(offset, bytes, flags).await,
            };
            Finished {
                options,
                is_write: true,
                offset,
                bytes,
                elapsed: started.elapsed(),
                result: result.map(|()| None),
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
