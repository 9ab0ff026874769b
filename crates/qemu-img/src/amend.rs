// SPDX-License-Identifier: MIT OR Apache-2.0
//! `qemu-img amend`.

use blockcore::{BlockError, CreateOption, Options};
use blockjob::create::check_options;
use toolkit::getopt::{Arg, Long, long};

use crate::Tool;
use crate::console::Outcome;
use crate::create::{CreateOptions, create_option_line};
use crate::image::Image;
use crate::options::{IMAGE_OPTS, OBJECT, OWN, Words};
use crate::progress;

const FORCE: char = OWN as char;

const LONG: &[Long] = &[
    long("help", Arg::No, 'h'),
    long("quiet", Arg::No, 'q'),
    long("progress", Arg::No, 'p'),
    long("format", Arg::Required, 'f'),
    long("image-opts", Arg::No, IMAGE_OPTS),
    long("cache", Arg::Required, 't'),
    long("options", Arg::Required, 'o'),
    long("force", Arg::No, FORCE),
    long("object", Arg::Required, OBJECT),
];

impl Tool {
    pub(crate) async fn amend(&self, args: &[String]) -> Outcome {
        let (mut format, mut image_opts, mut cache) = (None, false, "writeback".to_owned());
        let (mut quiet, mut show, mut force) = (false, false, false);
        let mut options = CreateOptions::default();
        let mut words = Words::new(self, "amend", args, "ho:f:t:pq", LONG);
        while let Some(option) = words.next()? {
            match option.value {
                'q' => quiet = true,
                'p' => show = true,
                'f' => format = Some(option.arg),
                't' => cache = option.arg,
                'o' => options.push(&self.console, option.arg)?,
                FORCE => force = true,
                _ => image_opts = true,
            }
        }
        if options.is_empty() {
            let text = "Must specify options (-o)";
            return Err(self.console.usage_error("amend", text));
        }
        let show = show && !quiet;
        if options.asks_for_help()
            && let Some(format) = &format
        {
            return self.list_amend_options(format);
        }
        let mut positionals = words.positionals();
        let (Some(name), true) = (positionals.pop(), positionals.is_empty()) else {
            return Err(self.console.fail("Expecting one image file name"));
        };
        self.check_image_opts(image_opts, format.as_deref())?;
        let text = format!("Invalid cache option: {cache}");
        let image = Image {
            writable: true,
            cache: self.cache_mode(&cache, &text)?,
            ..Image::new(name, format, image_opts)
        };
        let disk = self.open(image).await?;
        let amended = match options.asks_for_help() {
            true => self.list_amend_options(disk.root().format_name()),
            false => self.amend_disk(&disk, &options, force, show).await,
        };
        let closed = self.close(disk).await;
        amended.and(closed)
    }

    async fn amend_disk(
        &self,
        disk: &blockcore::Backend,
        options: &CreateOptions,
        force: bool,
        show: bool,
    ) -> Outcome {
        let known = self.amend_options(disk.root().format_name())?;
        let checked = options
            .parse()
            .and_then(|given| self.checked_amend_options(disk, &known, given));
        let amended = match checked {
            Ok(mut options) => {
                if force {
                    options.set("force", "on");
                }
                let progress = progress::amend(&self.console, show);
                let amended = disk.root().amend_observed(options, progress).await;
                progress::complete(&self.console, show);
                amended
            }
            Err(e) => Err(e),
        };
        let amended = amended.map_err(|e| self.console.block_error("", &e));
        progress::end(&self.console, show);
        amended
    }

    fn checked_amend_options(
        &self,
        disk: &blockcore::Backend,
        known: &[CreateOption],
        given: Options,
    ) -> blockcore::Result<Options> {
        let is_known = |key: &str| known.iter().any(|k| k.name == key);
        if let Some((key, _)) = given.iter().find(|(key, _)| !is_known(key)) {
            let text = format!("Invalid parameter '{key}'");
            let driver = self.registry.driver(disk.root().format_name())?;
            let at_creation = driver.create_options().iter().any(|k| k.name == key);
            let err = BlockError::invalid(text);
            return Err(match at_creation {
                true => err.hint("This option is only supported for image creation"),
                false => err,
            });
        }
        check_options(known, given)
    }

    fn amend_options(&self, format: &str) -> Outcome<Vec<CreateOption>> {
        let driver = self.registry.driver(format);
        let driver = driver.map_err(|e| self.console.block_error("", &e))?;
        let mut known = driver.amend_options().to_vec();
        if known.is_empty() {
            let text = format!("Format driver '{format}' does not support option amendment");
            return Err(self.console.fail(&text));
        }
        known.sort_by_key(|o| o.name);
        Ok(known)
    }

    fn list_amend_options(&self, format: &str) -> Outcome {
        let known = self.amend_options(format)?;
        self.console.line(&format!("Amend options for '{format}':"));
        for option in &known {
            self.console.line(&create_option_line(option));
        }
        Ok(())
    }
}
