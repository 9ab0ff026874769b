// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`Words`]: a command's options, taken one by one; and the kinds of argument that several commands have.

use blocklayer::luks::secret_object::{self, Defined};
use toolkit::cache::CacheMode;
use toolkit::getopt::{Getopt, Long, Opt};

use crate::Tool;
use crate::console::{Failed, Outcome};
use crate::help;

/// `--object`: a secret is defined.
pub(crate) const OBJECT: char = '\u{1}';
/// `--image-opts`.
pub(crate) const IMAGE_OPTS: char = '\u{2}';
/// `--output`.
pub(crate) const OUTPUT: char = '\u{3}';
/// The first free value for a command's own long options.
pub(crate) const OWN: u8 = 16;

/// The options of one command line.
pub(crate) struct Words<'a> {
    tool: &'a Tool,
    command: &'static str,
    getopt: Getopt<'a>,
}

/// How a command prints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Output {
    #[default]
    Human,
    Json,
}

impl<'a> Words<'a> {
    pub fn new(
        tool: &'a Tool,
        command: &'static str,
        args: &'a [String],
        short: &'a str,
        long: &'a [Long],
    ) -> Words<'a> {
        Words {
            tool,
            command,
            getopt: Getopt::new(args, short, long),
        }
    }

    /// The next option. `--help` is answered here, and ends the command well; `--object` is, too, and the option behind it is the next.
    pub fn next(&mut self) -> Outcome<Option<Opt>> {
        let console = &self.tool.console;
        match self.getopt.next() {
            None => Ok(None),
            Some(Err(e)) => Err(console.option_error(self.command, e.text())),
            Some(Ok(o)) if o.value == 'h' => {
                help::print(self.tool, self.command);
                Err(Failed(0))
            }
            Some(Ok(o)) if o.value == OBJECT => {
                self.tool.define_object(&o.arg)?;
                self.next()
            }
            Some(Ok(o)) => Ok(Some(o)),
        }
    }

    /// The words that are no options.
    pub fn positionals(self) -> Vec<String> {
        self.getopt.positionals()
    }

    /// The one word that is no option.
    pub fn one_positional(self) -> Outcome<String> {
        let (tool, command) = (self.tool, self.command);
        let mut words = self.positionals();
        match (words.pop(), words.is_empty()) {
            (Some(word), true) => Ok(word),
            _ => Err(tool
                .console
                .usage_error(command, "Expecting one image file name")),
        }
    }

    /// The argument of `--output`.
    pub fn output(&self, arg: &str) -> Outcome<Output> {
        match arg {
            "human" => Ok(Output::Human),
            "json" => Ok(Output::Json),
            _ => {
                let text = format!("--output expects 'human' or 'json' not '{arg}'");
                Err(self.tool.console.usage_error(self.command, &text))
            }
        }
    }
}

impl Tool {
    /// Defines what `--object` describes. Asking for help ends the command well.
    fn define_object(&self, text: &str) -> Outcome {
        match secret_object::define(text, self.registry.secrets()) {
            Ok(Defined::Added) => Ok(()),
            Ok(Defined::Help(text)) => {
                self.console.print(&text);
                Err(Failed(0))
            }
            Err(e) => Err(self.console.block_error("", &e)),
        }
    }

    /// The cache mode of a name; `message` says what is wrong with it.
    pub(crate) fn cache_mode(&self, name: &str, message: &str) -> Outcome<CacheMode> {
        toolkit::cache::parse(name).ok_or_else(|| self.console.fail(message))
    }
}
