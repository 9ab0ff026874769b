// SPDX-License-Identifier: MIT OR Apache-2.0
//! `qemu-img bench`.

use std::time::Instant;

use blockjob::{Bench, Direction, Job};
use toolkit::getopt::{Arg, Long, long};

use crate::Tool;
use crate::console::Outcome;
use crate::image::Image;
use crate::number::{INT_MAX, MAX};
use crate::options::{IMAGE_OPTS, OWN, Words};

const PATTERN: char = OWN as char;
const FLUSH_INTERVAL: char = (OWN + 1) as char;
const NO_DRAIN: char = (OWN + 2) as char;

const LONG: &[Long] = &[
    long("help", Arg::No, 'h'),
    long("quiet", Arg::No, 'q'),
    long("format", Arg::Required, 'f'),
    long("image-opts", Arg::No, IMAGE_OPTS),
    long("cache", Arg::Required, 't'),
    long("count", Arg::Required, 'c'),
    long("buffer-size", Arg::Required, 's'),
    long("depth", Arg::Required, 'd'),
    long("offset", Arg::Required, 'o'),
    long("step-size", Arg::Required, 'S'),
    long("write", Arg::No, 'w'),
    long("pattern", Arg::Required, PATTERN),
    long("flush-interval", Arg::Required, FLUSH_INTERVAL),
    long("no-drain", Arg::No, NO_DRAIN),
    long("aio", Arg::Required, 'i'),
    long("native", Arg::No, 'n'),
    long("force-share", Arg::No, 'U'),
];

impl Tool {
    pub(crate) async fn bench(&self, args: &[String]) -> Outcome {
        let (mut count, mut depth, mut size, mut step, mut offset) = (75_000, 64, 4096, 0, 0);
        let (mut pattern, mut flush_interval, mut drain) = (0, 0, true);
        let (mut write, mut native, mut aio) = (false, false, None);
        let (mut format, mut image_opts, mut force_share) = (None, false, false);
        let mut cache = "writeback".to_owned();
        let mut words = Words::new(self, "bench", args, "hc:d:f:ni:o:qs:S:t:wU", LONG);
        while let Some(option) = words.next()? {
            let arg = &option.arg;
            match option.value {
                // There is nothing that it would keep quiet, in QEMU's tool either.
                'q' => {}
                'c' => count = self.number("request count", arg, 1, INT_MAX)?,
                'd' => depth = self.number("queue depth", arg, 1, INT_MAX)?,
                's' => size = self.number("buffer size", arg, 1, INT_MAX)?,
                'S' => step = self.number("step size", arg, 1, INT_MAX)?,
                'o' => offset = self.number("offset", arg, 0, MAX)?,
                PATTERN => pattern = self.number("pattern byte", arg, 0, 0xff)?,
                FLUSH_INTERVAL => {
                    flush_interval = self.number("flush interval", arg, 0, INT_MAX)?;
                }
                NO_DRAIN => drain = false,
                'w' => write = true,
                'n' => native = true,
                'i' if matches!(arg.as_str(), "threads" | "native" | "io_uring") => {
                    aio = Some(option.arg);
                }
                'i' => return Err(self.console.fail(&format!("Invalid aio option: {arg}"))),
                'f' => format = Some(option.arg),
                't' => cache = option.arg,
                'U' => force_share = true,
                _ => image_opts = true,
            }
        }
        let name = words.one_positional()?;
        self.check_image_opts(image_opts, format.as_deref())?;
        if !write && flush_interval > 0 {
            let text = "--flush-interval is only available in write tests";
            return Err(self.console.fail(text));
        }
        if flush_interval > 0 && flush_interval < depth {
            let text = "Flush interval can't be smaller than depth";
            return Err(self.console.fail(text));
        }
        let mut image = Image {
            writable: write,
            cache: self.cache_mode(&cache, "Invalid cache mode")?,
            force_share,
            ..Image::new(name, format, image_opts)
        };
        if native {
            aio = Some("native".to_owned());
        }
        if let Some(aio) = aio {
            image.options.set("file.aio", aio);
        }
        let disk = self.open(image).await?;
        let bench = Bench {
            count,
            depth: depth as usize,
            request_bytes: size as usize,
            offset,
            step: if step == 0 { size } else { step },
            direction: if write {
                Direction::Write {
                    pattern: pattern as u8,
                    flush_interval,
                    drain_on_flush: drain,
                }
            } else {
                Direction::Read
            },
        };
        let what = if write { "write" } else { "read" };
        self.console.line(&format!(
            "Sending {count} {what} requests, {size} bytes each, {depth} in parallel (starting at offset {offset}, step size {})",
            bench.step
        ));
        if flush_interval > 0 {
            self.console
                .line(&format!("Sending flush every {flush_interval} requests"));
        }
        let started = Instant::now();
        let done = bench.run(&disk, &Job::new()).await;
        let seconds = started.elapsed().as_secs_f64();
        let result = done.map_err(|e| self.console.fail(&e.to_string()));
        if result.is_ok() {
            self.console
                .line(&format!("Run completed in {seconds:.3} seconds."));
        }
        let closed = self.close(disk).await;
        result.and(closed)
    }
}
