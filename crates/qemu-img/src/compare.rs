// SPDX-License-Identifier: MIT OR Apache-2.0
//! `qemu-img compare`. Exit status: 0 identical, 1 different, 2 an image can't be opened, 3 block status failed, 4 a read failed.

use blockjob::{CompareFailure, Outcome as Found, Side};
use toolkit::getopt::{Arg, Long, long};

use crate::Tool;
use crate::console::{Failed, Outcome};
use crate::image::Image;
use crate::options::{IMAGE_OPTS, OBJECT, Words};
use crate::progress;

const LONG: &[Long] = &[
    long("help", Arg::No, 'h'),
    long("quiet", Arg::No, 'q'),
    long("progress", Arg::No, 'p'),
    long("a-format", Arg::Required, 'f'),
    long("b-format", Arg::Required, 'F'),
    long("image-opts", Arg::No, IMAGE_OPTS),
    long("strict", Arg::No, 's'),
    long("cache", Arg::Required, 'T'),
    long("force-share", Arg::No, 'U'),
    long("object", Arg::Required, OBJECT),
];

/// A failure before there was anything to compare.
fn trouble(_: Failed) -> Failed {
    Failed(2)
}

impl Tool {
    pub(crate) async fn compare(&self, args: &[String]) -> Outcome {
        let (mut format1, mut format2, mut image_opts) = (None, None, false);
        let (mut quiet, mut show, mut strict, mut force_share) = (false, false, false, false);
        let mut cache = "writeback".to_owned();
        let mut words = Words::new(self, "compare", args, "hf:F:T:pqsU", LONG);
        while let Some(option) = words.next()? {
            match option.value {
                'q' => quiet = true,
                'p' => show = true,
                'f' => format1 = Some(option.arg),
                'F' => format2 = Some(option.arg),
                's' => strict = true,
                'T' => cache = option.arg,
                'U' => force_share = true,
                _ => image_opts = true,
            }
        }
        let show = show && !quiet;
        let names: Result<[String; 2], _> = words.positionals().try_into();
        let Ok([name1, name2]) = names else {
            let text = "Expecting two image file names";
            return Err(self.console.usage_error("compare", text));
        };
        let either = format1.as_deref().or(format2.as_deref());
        self.check_image_opts(image_opts, either).map_err(trouble)?;
        let cache = self
            .cache_mode(&cache, &format!("Invalid source cache option: {cache}"))
            .map_err(trouble)?;
        let image = |name: &str, format| Image {
            cache,
            force_share,
            ..Image::new(name, format, image_opts)
        };
        let job = progress::job(&self.console, show, 2.0);
        let disk1 = self.open(image(&name1, format1)).await.map_err(trouble)?;
        let disk2 = self.open(image(&name2, format2)).await.map_err(trouble)?;
        let on_tail = || self.say(quiet, "Warning: Image size mismatch!");
        let found = blockjob::compare(&disk1, &disk2, strict, &job, on_tail).await;
        let name_of = |side| match side {
            Side::First => &name1,
            Side::Second => &name2,
        };
        let result = match found {
            Ok(found) => self.report_comparison(found, quiet),
            Err(CompareFailure::Status(side, _)) => {
                let name = name_of(side);
                self.console
                    .error(&format!("Sector allocation test failed for {name}"));
                Err(Failed(3))
            }
            Err(CompareFailure::Read(side, at, e)) => {
                let (name, why) = (name_of(side), e.strerror());
                self.console
                    .error(&format!("Error while reading offset {at} of {name}: {why}"));
                Err(Failed(4))
            }
            Err(CompareFailure::Cancelled) => Err(self.console.fail("cancelled")),
        };
        self.close(disk1).await.map_err(trouble)?;
        self.close(disk2).await.map_err(trouble)?;
        progress::end(&self.console, show);
        result
    }

    fn say(&self, quiet: bool, text: &str) {
        if !quiet {
            self.console.line(text);
        }
    }

    fn report_comparison(&self, found: Found, quiet: bool) -> Outcome {
        let say = |text: &str| self.say(quiet, text);
        match found {
            Found::Identical => {
                say("Images are identical.");
                return Ok(());
            }
            Found::ContentDiffers(at) => say(&format!("Content mismatch at offset {at}!")),
            Found::StatusDiffers(at) => {
                say(&format!("Strict mode: Offset {at} block status mismatch!"));
            }
            Found::LengthDiffers => say("Strict mode: Image size mismatch!"),
        }
        Err(Failed(1))
    }
}
