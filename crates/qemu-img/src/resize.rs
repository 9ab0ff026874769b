// SPDX-License-Identifier: MIT OR Apache-2.0
//! `qemu-img resize`.

use blockcore::{Backend, Preallocation, TruncateRequest};
use blockjob::create::option_size;
use toolkit::getopt::{Arg, Long, long};

use crate::Tool;
use crate::console::Outcome;
use crate::image::Image;
use crate::options::{IMAGE_OPTS, OBJECT, OWN, Words};

const SHRINK: char = OWN as char;
const PREALLOCATION: char = (OWN + 1) as char;

const LONG: &[Long] = &[
    long("help", Arg::No, 'h'),
    long("quiet", Arg::No, 'q'),
    long("format", Arg::Required, 'f'),
    long("image-opts", Arg::No, IMAGE_OPTS),
    long("shrink", Arg::No, SHRINK),
    long("preallocation", Arg::Required, PREALLOCATION),
    long("object", Arg::Required, OBJECT),
];

/// The size that a command line asks for.
#[derive(Clone, Copy)]
enum Change {
    To,
    More,
    Less,
}

impl Tool {
    pub(crate) async fn resize(&self, args: &[String]) -> Outcome {
        // A size such as -1M is the last word, and no option.
        let is_less = |w: &&String| {
            w.strip_prefix('-')
                .is_some_and(|n| n.starts_with(|c: char| c.is_ascii_digit()))
        };
        let less = args.last().filter(is_less).cloned();
        let args = &args[..args.len() - usize::from(less.is_some())];
        let (mut format, mut image_opts, mut quiet) = (None, false, false);
        let (mut shrink, mut preallocation) = (false, Preallocation::Off);
        let mut words = Words::new(self, "resize", args, "f:hq", LONG);
        while let Some(option) = words.next()? {
            match option.value {
                'q' => quiet = true,
                'f' => format = Some(option.arg),
                SHRINK => shrink = true,
                PREALLOCATION => {
                    preallocation = Preallocation::from_name(&option.arg).ok_or_else(|| {
                        let text = format!("Invalid preallocation mode '{}'", option.arg);
                        self.console.fail(&text)
                    })?;
                }
                _ => image_opts = true,
            }
        }
        self.check_image_opts(image_opts, format.as_deref())?;
        let mut positionals = words.positionals().into_iter().chain(less);
        let (Some(name), Some(size)) = (positionals.next(), positionals.next()) else {
            let text = "Expecting image file name and size";
            return Err(self.console.usage_error("resize", text));
        };
        if positionals.next().is_some() {
            let text = "Extra argument(s) in command line";
            return Err(self.console.usage_error("resize", text));
        }
        let (change, digits) = match size.as_bytes().first() {
            Some(b'+') => (Change::More, &size[1..]),
            Some(b'-') => (Change::Less, &size[1..]),
            _ => (Change::To, size.as_str()),
        };
        let bytes = option_size("size", digits).map_err(|e| self.console.block_error("", &e))?;
        let image = Image {
            writable: true,
            ..Image::new(name, format, image_opts)
        };
        let disk = self.open(image).await?;
        let resized = self
            .resize_disk(&disk, change, bytes, shrink, preallocation)
            .await;
        let closed = self.close(disk).await;
        resized.and(closed)?;
        if !quiet {
            self.console.line("Image resized.");
        }
        Ok(())
    }

    async fn resize_disk(
        &self,
        disk: &Backend,
        change: Change,
        bytes: u64,
        shrink: bool,
        preallocation: Preallocation,
    ) -> Outcome {
        let current = disk.length();
        let total = match change {
            Change::To => Some(bytes),
            Change::More => current.checked_add(bytes),
            Change::Less => current.checked_sub(bytes),
        };
        let total = total.filter(|&n| n > 0 && n <= i64::MAX as u64);
        let Some(total) = total else {
            return Err(self.console.fail("New image size must be positive"));
        };
        if total <= current && preallocation != Preallocation::Off {
            let text = "Preallocation can only be used for growing images";
            return Err(self.console.fail(text));
        }
        if total < current && !shrink {
            self.console
                .error("Use the --shrink option to perform a shrink operation.");
            return Err(self.console.fail("warning: Shrinking an image will delete all data beyond the shrunken image's end. Before performing such an operation, make sure there is no important data there."));
        }
        // Not exact for the host's sake alone: a device that is larger is fine.
        let request = TruncateRequest {
            bytes: total,
            exact: true,
            preallocation,
            zero_new_area: true,
        };
        disk.truncate(request)
            .await
            .map_err(|e| self.console.block_error("", &e))
    }
}
