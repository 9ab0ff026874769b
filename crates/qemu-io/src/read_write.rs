// SPDX-License-Identifier: MIT OR Apache-2.0
//! `read`, `readv`, `write`, `writev`, `discard`, `flush`.
//!
//! The order in which options are checked is interface: it decides which of several mistakes is reported.

use std::time::Instant;

use blockcore::{BlockError, IoBuf, IoBufMut, ReadFlags, WriteFlags};

use crate::numbers::{REQUEST_BYTES_MAX, pattern, size};
use crate::report::{Report, hexdump};
use crate::session::{Call, Done, Failed, Ran, Session};

/// A multiple of the 16 bytes of a line.
const DUMP_PIECE_BYTES: usize = 4096;

/// What the options of a read ask for.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ReadOptions {
    pub machine: bool,
    pub quiet: bool,
    pub verbose: bool,
    pub registered: bool,
    pub pattern: Option<u8>,
    /// The part that the pattern is looked for in: offset and length.
    pub part: Option<(u64, u64)>,
}

impl ReadOptions {
    pub fn flags(&self) -> ReadFlags {
        if self.registered {
            ReadFlags::REGISTERED_BUF
        } else {
            ReadFlags::empty()
        }
    }
}

impl Session {
    /// Verifies, dumps and reports what was read. `Err` if the pattern isn't there.
    pub(crate) fn show_read(
        &mut self,
        o: &ReadOptions,
        report: Report,
        buf: &IoBufMut,
    ) -> Result<(), Failed> {
        let mut result = Ok(());
        if let Some(byte) = o.pattern {
            let (at, len) = o.part.unwrap_or((0, buf.len() as u64));
            if !is_filled(buf, at as usize, len as usize, byte) {
                let at = report.offset + at;
                self.output.out(&format!(
                    "Pattern verification failed at offset {at}, {len} bytes\n"
                ));
                result = Err(Failed::Mismatch);
            }
        }
        if !o.quiet {
            if o.verbose {
                self.dump(report.offset, buf);
            }
            self.output.out(&report.text());
        }
        result
    }

    /// Prints a dump piece by piece: all of it can be five times as long as the data.
    fn dump(&mut self, offset: u64, buf: &IoBufMut) {
        let mut piece = [0; DUMP_PIECE_BYTES];
        for at in (0..buf.len()).step_by(DUMP_PIECE_BYTES) {
            let piece = &mut piece[..DUMP_PIECE_BYTES.min(buf.len() - at)];
            buf.copy_to_slice(at, piece);
            self.output.out(&hexdump(offset + at as u64, piece));
        }
    }

    pub(crate) async fn read(&mut self, c: Call<'_>) -> Ran {
        let (options, words) = self.options(&c, "bCl:pP:qrs:v");
        let mut o = ReadOptions::default();
        let (mut vmstate, mut part_len, mut part_at) = (false, None, None);
        for option in options {
            let option = self.checked(&c, option)?;
            match option.value {
                'b' => vmstate = true,
                'C' => o.machine = true,
                'l' => part_len = Some(size(&option.arg).or_else(|e| self.number_error(&e))?),
                'P' => o.pattern = Some(pattern(&option.arg).or_else(|e| self.number_error(&e))?),
                'q' => o.quiet = true,
                'r' => o.registered = true,
                's' => part_at = Some(size(&option.arg).or_else(|e| self.number_error(&e))?),
                'v' => o.verbose = true,
                _ => {}
            }
        }
        let [offset, length] = words.as_slice() else {
            return self.usage(&c);
        };
        let offset = size(offset).or_else(|e| self.number_error(&e))?;
        let bytes = size(length).or_else(|e| self.number_error(&e))?;
        if bytes > REQUEST_BYTES_MAX {
            return self.fail(&format!(
                "length cannot exceed {REQUEST_BYTES_MAX}, given {length}"
            ));
        }
        if o.pattern.is_none() && (part_len.is_some() || part_at.is_some()) {
            return self.usage(&c);
        }
        let at = part_at.unwrap_or(0);
        let len = part_len.unwrap_or(bytes.saturating_sub(at));
        if at > bytes || at.checked_add(len).is_none_or(|end| end > bytes) {
            return self.fail("pattern verification range exceeds end of read data");
        }
        o.part = Some((at, len));
        if vmstate {
            self.check_sectors(offset, bytes)?;
            if o.registered {
                return self
                    .fail("I/O buffer registration is not supported when reading from vmstate");
            }
        }
        let buf = self.read_buffer(bytes as usize);
        let backend = self.backend()?;
        let started = Instant::now();
        let result = if vmstate {
            self.wait(async { backend.load_vmstate(offset, buf).await })
                .await
        } else {
            self.wait(async { backend.preadv(offset, buf, o.flags()).await })
                .await
        };
        let elapsed = started.elapsed();
        let buf = match result {
            Ok(buf) => buf,
            Err(e) => return self.failed("read", &e),
        };
        let report = Report {
            verb: "read",
            offset,
            bytes,
            elapsed,
            machine: o.machine,
        };
        self.show_read(&o, report, &buf)?;
        Ok(Done::Io { offset, bytes })
    }

    pub(crate) async fn readv(&mut self, c: Call<'_>) -> Ran {
        let (options, words) = self.options(&c, "CP:qrv");
        let mut o = ReadOptions::default();
        for option in options {
            let option = self.checked(&c, option)?;
            self.read_option(&mut o, option.value, &option.arg)?;
        }
        let (offset, lengths) = self.vector(&c, &words)?;
        let buf = self.read_vector(&lengths);
        let bytes = buf.len() as u64;
        let backend = self.backend()?;
        let started = Instant::now();
        let result = self
            .wait(async { backend.preadv(offset, buf, o.flags()).await })
            .await;
        let elapsed = started.elapsed();
        let buf = match result {
            Ok(buf) => buf,
            Err(e) => return self.failed("readv", &e),
        };
        self.show_read(
            &o,
            Report {
                verb: "read",
                offset,
                bytes,
                elapsed,
                machine: o.machine,
            },
            &buf,
        )?;
        Ok(Done::Io { offset, bytes })
    }

    /// The options that `readv` and `aio_read` share.
    pub(crate) fn read_option(
        &mut self,
        o: &mut ReadOptions,
        letter: char,
        arg: &str,
    ) -> Result<(), Failed> {
        match letter {
            'C' => o.machine = true,
            'P' => o.pattern = Some(pattern(arg).or_else(|e| self.number_error(&e))?),
            'q' => o.quiet = true,
            'r' => o.registered = true,
            'v' => o.verbose = true,
            _ => {}
        }
        Ok(())
    }

    /// The offset and the lengths of a vectored request.
    pub(crate) fn vector(
        &mut self,
        c: &Call<'_>,
        words: &[String],
    ) -> Result<(u64, Vec<u64>), Failed> {
        let [offset, lengths @ ..] = words else {
            return self.usage(c).and(Err(Failed::Refused));
        };
        if lengths.is_empty() {
            return self.usage(c).and(Err(Failed::Refused));
        }
        let offset = size(offset).or_else(|e| self.number_error(&e))?;
        let mut out = Vec::new();
        let mut total = 0u64;
        for text in lengths {
            let len = size(text).or_else(|e| self.number_error(&e))?;
            if len > REQUEST_BYTES_MAX {
                self.output.out(&format!(
                    "Argument '{text}' exceeds maximum size {REQUEST_BYTES_MAX}\n"
                ));
                return Err(Failed::Refused);
            }
            total += len;
            if total > REQUEST_BYTES_MAX {
                let line = format!(
                    "The total number of bytes exceed the maximum size {REQUEST_BYTES_MAX}\n"
                );
                self.output.out(&line);
                return Err(Failed::Refused);
            }
            out.push(len);
        }
        Ok((offset, out))
    }

    /// One buffer of several pieces.
    pub(crate) fn read_vector(&self, lengths: &[u64]) -> IoBufMut {
        let mut all = IoBufMut::default();
        for &len in lengths {
            all.append(self.read_buffer(len as usize));
        }
        all
    }

    /// One buffer of several pieces, all of the same byte.
    pub(crate) fn write_vector(&self, lengths: &[u64], byte: u8) -> IoBuf {
        let mut all = IoBuf::default();
        for &len in lengths {
            all.append(self.filled(len as usize, byte));
        }
        all
    }

    fn filled(&self, len: usize, byte: u8) -> IoBuf {
        let mut buf = self.read_buffer(len);
        buf.fill(byte);
        buf.freeze()
    }

    pub(crate) async fn write(&mut self, c: Call<'_>) -> Ran {
        let (options, words) = self.options(&c, "bcCfnpP:qrs:uz");
        let (mut vmstate, mut compressed, mut machine, mut quiet, mut zero) =
            (false, false, false, false, false);
        let (mut byte, mut source, mut flags) = (None, None, WriteFlags::empty());
        for option in options {
            let option = self.checked(&c, option)?;
            match option.value {
                'b' => vmstate = true,
                'c' => compressed = true,
                'C' => machine = true,
                'f' => flags |= WriteFlags::FUA,
                'n' => flags |= WriteFlags::NO_FALLBACK,
                'P' => byte = Some(pattern(&option.arg).or_else(|e| self.number_error(&e))?),
                'q' => quiet = true,
                'r' => flags |= WriteFlags::REGISTERED_BUF,
                's' => source = Some(option.arg),
                'u' => flags |= WriteFlags::MAY_UNMAP,
                'z' => zero = true,
                _ => {}
            }
        }
        let [offset_text, length] = words.as_slice() else {
            return self.usage(&c);
        };
        if vmstate && zero {
            return self.fail("-b and -z cannot be specified at the same time");
        }
        if flags.contains(WriteFlags::FUA) && (vmstate || compressed) {
            return self.fail("-f and -b or -c cannot be specified at the same time");
        }
        if flags.contains(WriteFlags::NO_FALLBACK) && !zero {
            return self.fail("-n requires -z to be specified");
        }
        if flags.contains(WriteFlags::MAY_UNMAP) && !zero {
            return self.fail("-u requires -z to be specified");
        }
        if usize::from(zero) + usize::from(byte.is_some()) + usize::from(source.is_some()) > 1 {
            return self.fail("Only one of -z, -P, and -s can be specified at the same time");
        }
        let offset = size(offset_text).or_else(|e| self.number_error(&e))?;
        let bytes = size(length).or_else(|e| self.number_error(&e))?;
        if bytes > REQUEST_BYTES_MAX && !flags.contains(WriteFlags::NO_FALLBACK) {
            return self.fail(&format!(
                "length cannot exceed {REQUEST_BYTES_MAX} without -n, given {length}"
            ));
        }
        if vmstate || compressed {
            self.check_sectors(offset, bytes)?;
        }
        if zero && flags.contains(WriteFlags::REGISTERED_BUF) {
            return self.fail("cannot combine zero write with registered I/O buffer");
        }
        let data = match source {
            _ if zero => IoBuf::default(),
            Some(name) => self.fill_from_file(&name, bytes as usize)?,
            None => self.filled(bytes as usize, byte.unwrap_or(0xcd)),
        };
        let backend = self.backend()?;
        let started = Instant::now();
        let result = self
            .wait(async {
                if zero {
                    backend.pwrite_zeroes(offset, bytes, flags).await
                } else if vmstate {
                    backend.save_vmstate(offset, data).await
                } else if compressed {
                    backend.pwritev_compressed(offset, data).await
                } else {
                    backend.pwritev(offset, data, flags).await
                }
            })
            .await;
        let elapsed = started.elapsed();
        if let Err(e) = result {
            return self.failed("write", &e);
        }
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
        Ok(Done::Io { offset, bytes })
    }

    /// The bytes of a file, from the start again where it is too short.
    fn fill_from_file(&mut self, name: &str, len: usize) -> Result<IoBuf, Failed> {
        let content = match read_at_most(name, len) {
            Ok(content) if content.is_empty() => {
                self.output.err(&format!("{name}: file is empty"));
                return Err(Failed::Refused);
            }
            Ok(content) => content,
            Err(e) => {
                let text = BlockError::from_io(e).strerror();
                self.output.err(&format!("{name}: {text}"));
                return Err(Failed::Refused);
            }
        };
        let mut buf = self.read_buffer(len);
        let mut at = 0;
        while at < len {
            let n = content.len().min(len - at);
            buf.copy_from_slice(at, &content[..n]);
            at += n;
        }
        Ok(buf.freeze())
    }

    pub(crate) async fn writev(&mut self, c: Call<'_>) -> Ran {
        let (options, words) = self.options(&c, "CfqrP:");
        let (mut machine, mut quiet, mut byte, mut flags) =
            (false, false, 0xcd, WriteFlags::empty());
        for option in options {
            let option = self.checked(&c, option)?;
            match option.value {
                'C' => machine = true,
                'f' => flags |= WriteFlags::FUA,
                'q' => quiet = true,
                'r' => flags |= WriteFlags::REGISTERED_BUF,
                'P' => byte = pattern(&option.arg).or_else(|e| self.number_error(&e))?,
                _ => {}
            }
        }
        let (offset, lengths) = self.vector(&c, &words)?;
        let data = self.write_vector(&lengths, byte);
        let bytes = data.len() as u64;
        let backend = self.backend()?;
        let started = Instant::now();
        let result = self
            .wait(async { backend.pwritev(offset, data, flags).await })
            .await;
        let elapsed = started.elapsed();
        if let Err(e) = result {
            return self.failed("writev", &e);
        }
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
        Ok(Done::Io { offset, bytes })
    }

    pub(crate) async fn discard(&mut self, c: Call<'_>) -> Ran {
        let (options, words) = self.options(&c, "Cq");
        let (mut machine, mut quiet) = (false, false);
        for option in options {
            match self.checked(&c, option)?.value {
                'C' => machine = true,
                _ => quiet = true,
            }
        }
        let [offset, length] = words.as_slice() else {
            return self.usage(&c);
        };
        let offset = size(offset).or_else(|e| self.number_error(&e))?;
        let bytes = size(length).or_else(|e| self.number_error(&e))?;
        if bytes > REQUEST_BYTES_MAX {
            return self.fail(&format!(
                "length cannot exceed {REQUEST_BYTES_MAX}, given {length}"
            ));
        }
        let backend = self.backend()?;
        let started = Instant::now();
        let result = self
            .wait(async { backend.pdiscard(offset, bytes).await })
            .await;
        let elapsed = started.elapsed();
        if let Err(e) = result {
            return self.failed("discard", &e);
        }
        if !quiet {
            self.output.out(
                &Report {
                    verb: "discard",
                    offset,
                    bytes,
                    elapsed,
                    machine,
                }
                .text(),
            );
        }
        Ok(Done::Io { offset, bytes })
    }

    pub(crate) async fn flush(&mut self) -> Ran {
        let backend = self.backend()?;
        match self.wait(async { backend.flush().await }).await {
            Ok(()) => Ok(Done::Nothing),
            // Says nothing, as ever; the exit status tells.
            Err(_) => Err(Failed::Refused),
        }
    }

    /// The open image. Commands that need one are not called without.
    pub(crate) fn backend(&self) -> Result<std::sync::Arc<blockcore::Backend>, Failed> {
        self.backend.clone().ok_or(Failed::Refused)
    }

    /// Prints why a number is none.
    pub(crate) fn number_error<T>(&mut self, line: &str) -> Result<T, Failed> {
        self.output.out(&format!("{line}\n"));
        Err(Failed::Refused)
    }

    fn check_sectors(&mut self, offset: u64, bytes: u64) -> Result<(), Failed> {
        for (value, what) in [(offset, "offset"), (bytes, "count")] {
            if !value.is_multiple_of(512) {
                self.output.out(&format!(
                    "{value} is not a sector-aligned value for '{what}'\n"
                ));
                return Err(Failed::Refused);
            }
        }
        Ok(())
    }
}

/// Whether `len` bytes from `at` on are all `byte`.
fn is_filled(buf: &IoBufMut, at: usize, len: usize, byte: u8) -> bool {
    let mut start = 0;
    buf.segments().all(|segment| {
        let from = at.clamp(start, start + segment.len()) - start;
        let to = (at + len).clamp(start, start + segment.len()) - start;
        start += segment.len();
        segment[from..to].iter().all(|&b| b == byte)
    })
}

fn read_at_most(name: &str, len: usize) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut content = Vec::new();
    std::fs::File::open(name)?
        .take(len as u64)
        .read_to_end(&mut content)?;
    Ok(content)
}
