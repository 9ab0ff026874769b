// SPDX-License-Identifier: MIT OR Apache-2.0
//! Options by the rules of GNU `getopt_long`: options may follow positionals, be joined (`-qv`, `-P0xcd`), end with `--`; long ones may be abbreviated as
//! long as they stay unambiguous. The messages are getopt's.

/// Whether an option takes an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arg {
    /// None.
    No,
    /// One, joined or as the next word.
    Required,
}

/// A long option, and the letter or number that stands for it.
#[derive(Clone, Copy, Debug)]
pub struct Long {
    /// Without the dashes.
    pub name: &'static str,
    /// Whether it takes an argument.
    pub arg: Arg,
    /// What [`Getopt::next`] gives for it: the short option's letter, or any other character.
    pub value: char,
}

/// Shorthand for a [`Long`].
pub const fn long(name: &'static str, arg: Arg, value: char) -> Long {
    Long { name, arg, value }
}

/// An option that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opt {
    /// The letter.
    pub value: char,
    /// The argument; empty if it takes none.
    pub arg: String,
}

/// Why an option is wrong; the text is getopt's line without the program's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GetoptError {
    /// No such option, or one that can't have an argument.
    Unknown(String),
    /// Its argument is missing. The second field is the option as it was typed.
    MissingArgument(String, String),
}

impl GetoptError {
    /// getopt's line without the program's name.
    pub fn text(&self) -> &str {
        match self {
            GetoptError::Unknown(text) | GetoptError::MissingArgument(text, _) => text,
        }
    }
}

/// Goes through the words of a command line.
///
/// ```
/// use toolkit::getopt::Getopt;
/// let words = ["0", "-qv", "512", "-P7"].map(String::from);
/// let mut options = Getopt::new(&words, "qvP:", &[]);
/// let mut seen = Vec::new();
/// while let Some(o) = options.next() {
///     let o = o.unwrap();
///     seen.push((o.value, o.arg));
/// }
/// assert_eq!(seen, [('q', String::new()), ('v', String::new()), ('P', "7".to_string())]);
/// assert_eq!(options.positionals(), ["0", "512"]);
/// ```
#[derive(Debug)]
pub struct Getopt<'a> {
    words: &'a [String],
    /// The next word to look at.
    at: usize,
    /// What is left of a word of joined short options.
    joined: &'a str,
    short: &'a str,
    long: &'a [Long],
    positionals: Vec<String>,
}

impl<'a> Getopt<'a> {
    /// Over `words` (without the program's or command's name). `short` lists the letters, each with `:` behind it if it takes an argument.
    pub fn new(words: &'a [String], short: &'a str, long: &'a [Long]) -> Getopt<'a> {
        Getopt {
            words,
            at: 0,
            joined: "",
            short,
            long,
            positionals: Vec::new(),
        }
    }

    /// The words that are no options, once [`next`](Getopt::next) has given `None`.
    pub fn positionals(self) -> Vec<String> {
        self.positionals
    }

    /// The next option.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Option<Result<Opt, GetoptError>> {
        if !self.joined.is_empty() {
            return Some(self.next_short());
        }
        loop {
            let word = self.words.get(self.at)?;
            self.at += 1;
            if word == "--" {
                self.positionals.extend_from_slice(&self.words[self.at..]);
                self.at = self.words.len();
                return None;
            }
            if let Some(name) = word.strip_prefix("--")
                && !self.long.is_empty()
            {
                return Some(self.next_long(name));
            }
            match word.strip_prefix('-') {
                Some(letters) if !letters.is_empty() => {
                    self.joined = letters;
                    return Some(self.next_short());
                }
                _ => self.positionals.push(word.clone()),
            }
        }
    }

    fn next_short(&mut self) -> Result<Opt, GetoptError> {
        let mut chars = self.joined.chars();
        let letter = chars.next().expect("the caller has looked");
        self.joined = chars.as_str();
        let known = if letter == ':' {
            None
        } else {
            self.short.find(letter)
        };
        let Some(at) = known else {
            return Err(GetoptError::Unknown(format!(
                "invalid option -- '{letter}'"
            )));
        };
        if !self.short[at + letter.len_utf8()..].starts_with(':') {
            return Ok(Opt {
                value: letter,
                arg: String::new(),
            });
        }
        if !self.joined.is_empty() {
            return Ok(Opt {
                value: letter,
                arg: std::mem::take(&mut self.joined).to_owned(),
            });
        }
        match self.next_word() {
            Some(arg) => Ok(Opt { value: letter, arg }),
            None => {
                let text = format!("option requires an argument -- '{letter}'");
                Err(GetoptError::MissingArgument(text, format!("-{letter}")))
            }
        }
    }

    fn next_word(&mut self) -> Option<String> {
        let word = self.words.get(self.at)?;
        self.at += 1;
        Some(word.clone())
    }

    fn next_long(&mut self, text: &str) -> Result<Opt, GetoptError> {
        let (name, arg) = match text.split_once('=') {
            Some((name, arg)) => (name, Some(arg.to_owned())),
            None => (text, None),
        };
        let exact = self.long.iter().find(|l| l.name == name);
        let candidates: Vec<&Long> = self
            .long
            .iter()
            .filter(|l| l.name.starts_with(name))
            .collect();
        let same = candidates
            .windows(2)
            .all(|w| w[0].value == w[1].value && w[0].arg == w[1].arg);
        let found = match exact {
            Some(l) => *l,
            None if candidates.is_empty() => {
                return Err(GetoptError::Unknown(format!(
                    "unrecognized option '--{text}'"
                )));
            }
            None if !same => {
                let all: Vec<String> = candidates
                    .iter()
                    .map(|l| format!(" '--{}'", l.name))
                    .collect();
                let text = format!(
                    "option '--{text}' is ambiguous; possibilities:{}",
                    all.concat()
                );
                return Err(GetoptError::Unknown(text));
            }
            None => *candidates[0],
        };
        match (found.arg, arg) {
            (Arg::No, None) => Ok(Opt {
                value: found.value,
                arg: String::new(),
            }),
            (Arg::No, Some(_)) => Err(GetoptError::Unknown(format!(
                "option '--{}' doesn't allow an argument",
                found.name
            ))),
            (Arg::Required, Some(arg)) => Ok(Opt {
                value: found.value,
                arg,
            }),
            (Arg::Required, None) => match self.next_word() {
                Some(arg) => Ok(Opt {
                    value: found.value,
                    arg,
                }),
                None => {
                    let text = format!("option '--{}' requires an argument", found.name);
                    Err(GetoptError::MissingArgument(
                        text,
                        format!("--{}", found.name),
                    ))
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(words: &[&str]) -> Vec<String> {
        let words: Vec<String> = words.iter().map(|w| (*w).to_owned()).collect();
        let long = [
            long("read-only", Arg::No, 'r'),
            long("readable", Arg::No, 'R'),
            long("cache", Arg::Required, 't'),
        ];
        let mut options = Getopt::new(&words, "rt:", &long);
        std::iter::from_fn(|| options.next())
            .filter_map(|o| o.err())
            .map(|e| e.text().to_owned())
            .collect()
    }

    #[test]
    fn wrong_options_get_the_messages_of_getopt() {
        assert_eq!(
            errors(&["-x", "-t"]),
            [
                "invalid option -- 'x'",
                "option requires an argument -- 't'"
            ]
        );
        assert_eq!(errors(&["--foo=1"]), ["unrecognized option '--foo=1'"]);
        assert_eq!(
            errors(&["--read"]),
            ["option '--read' is ambiguous; possibilities: '--read-only' '--readable'"]
        );
        assert_eq!(
            errors(&["--read-only=1"]),
            ["option '--read-only' doesn't allow an argument"]
        );
        assert_eq!(
            errors(&["--cac"]),
            ["option '--cache' requires an argument"]
        );
        assert_eq!(
            errors(&["--cac=x", "--read-", "--", "-x"]),
            Vec::<String>::new()
        );
    }
}
