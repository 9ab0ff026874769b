// SPDX-License-Identifier: MIT OR Apache-2.0
//! `qemu-img create`.

use blockcore::{BlockError, CreateOption, OptionKind, Options, Result};
use blockjob::create::{CreatePlan, CreateRequest, known_options};
use toolkit::getopt::{Arg, Long, long};

use crate::Tool;
use crate::console::{Console, Outcome};
use crate::number::MAX;
use crate::options::{OBJECT, Words};

const LONG: &[Long] = &[
    long("help", Arg::No, 'h'),
    long("quiet", Arg::No, 'q'),
    long("format", Arg::Required, 'f'),
    long("options", Arg::Required, 'o'),
    long("backing", Arg::Required, 'b'),
    long("backing-format", Arg::Required, 'F'),
    long("backing-unsafe", Arg::No, 'u'),
    long("object", Arg::Required, OBJECT),
];

/// The values of several `-o`, as one.
#[derive(Default)]
pub(crate) struct CreateOptions(Vec<String>);

impl CreateOptions {
    /// One more; an empty one, or one with a comma at an end, is printed as an error.
    pub fn push(&mut self, console: &Console, text: String) -> Outcome {
        let commas = text.len() - text.trim_end_matches(',').len();
        if text.is_empty() || text.starts_with(',') || commas % 2 == 1 {
            return Err(console.fail(&format!("Invalid option list: {text}")));
        }
        self.0.push(text);
        Ok(())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether one of them asks for the list of options.
    pub fn asks_for_help(&self) -> bool {
        let all = self.0.join(",");
        all.split(',').any(|part| part == "help" || part == "?")
    }

    pub fn parse(&self) -> Result<Options> {
        let mut all = Options::new();
        for text in &self.0 {
            if text.starts_with('=') {
                return Err(BlockError::invalid("Invalid parameter ''"));
            }
            all.merge(Options::from_dotted(text)?);
        }
        Ok(all)
    }
}

impl Tool {
    pub(crate) async fn create(&self, args: &[String]) -> Outcome {
        let (mut quiet, mut unsafe_backing) = (false, false);
        let (mut format, mut backing, mut backing_format) = ("raw".to_owned(), None, None);
        let mut options = CreateOptions::default();
        let mut words = Words::new(self, "create", args, "F:b:f:ho:qu", LONG);
        while let Some(option) = words.next()? {
            match option.value {
                'q' => quiet = true,
                'f' => format = option.arg,
                'o' => options.push(&self.console, option.arg)?,
                'b' => backing = Some(option.arg),
                'F' => backing_format = Some(option.arg),
                _ => unsafe_backing = true,
            }
        }
        let mut positionals = words.positionals().into_iter();
        let (filename, size) = (positionals.next(), positionals.next());
        if options.asks_for_help() {
            return self.list_create_options(&format, filename.as_deref());
        }
        let Some(filename) = filename else {
            let text = "Expecting image file name";
            return Err(self.console.usage_error("create", text));
        };
        let size = match size {
            Some(size) => Some(self.number("image size", &size, 0, MAX)?),
            None => None,
        };
        if let Some(extra) = positionals.next() {
            let text = format!("Unexpected argument: {extra}");
            return Err(self.console.usage_error("create", &text));
        }
        let prefix = format!("{filename}: ");
        let fail = |e: &BlockError| self.console.block_error(&prefix, e);
        let request = CreateRequest {
            format: format.clone(),
            filename,
            options: options.parse().map_err(|e| fail(&e))?,
            size,
            backing,
            backing_format,
            backing_unchecked: unsafe_backing,
        };
        let diagnostics = self.console.diagnostics();
        let plan = CreatePlan::new(&self.registry, request, &diagnostics)
            .await
            .map_err(|e| fail(&e))?;
        if !quiet {
            self.console.line(&plan.describe());
            self.console.flush();
        }
        let made = plan.run(&self.registry, &diagnostics).await;
        made.map_err(|e| match e.errno() {
            libc::EFBIG => fail(&too_large(&plan, &format)),
            _ => fail(&e),
        })
    }

    /// `-o help`.
    pub(crate) fn list_create_options(&self, format: &str, filename: Option<&str>) -> Outcome {
        let mut known = known_options(&self.registry, format, filename)
            .map_err(|e| self.console.block_error("", &e))?;
        known.sort_by_key(|o| o.name);
        match filename {
            Some(_) => self.console.line("Supported options:"),
            None => self.console.line(&format!("Supported {format} options:")),
        }
        for option in &known {
            self.console.line(&create_option_line(option));
        }
        if filename.is_none() {
            self.console.line("\nThe protocol level may support further options.\nSpecify the target filename to include those options.");
        }
        Ok(())
    }
}

fn too_large(plan: &CreatePlan, format: &str) -> BlockError {
    let hint = if plan.knows("cluster_size") {
        " (try using a larger cluster size)"
    } else {
        ""
    };
    BlockError::invalid(format!(
        "The image size is too large for file format '{format}'{hint}"
    ))
}

pub(crate) fn create_option_line(option: &CreateOption) -> String {
    let kind = match option.kind {
        OptionKind::String => "str",
        OptionKind::Bool => "bool (on/off)",
        OptionKind::Number => "num",
        OptionKind::Size => "size",
    };
    let name = format!("{}=<{kind}>", option.name);
    format!("  {name:<22} - {}", option.help)
}
