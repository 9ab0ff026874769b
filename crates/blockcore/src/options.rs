// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`Options`]: what a node is opened or created with, as a flat list of dotted keys, and the ways to write them down.
//!
//! `json:{"driver":"qcow2","file":{"filename":"a"}}`, `driver=qcow2,file.filename=a` and
//! `Options::new().with("driver", "qcow2").with("file.filename", "a")` are the same options. Whoever understands a key *takes* it;
//! what is left at the end is an error, so that no option is ever accepted and ignored.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::Value;

use crate::error::{BlockError, Result};
use crate::size::{SizeError, parse_size_to};

/// What tools print below an error about a size.
const SUFFIX_HINT: &str = "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.";

/// The value of an option. Text that says a number or a switch is as good as the typed value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionValue {
    /// Text, as from a command line.
    Str(String),
    /// A JSON truth value.
    Bool(bool),
    /// A JSON number.
    Int(i64),
    /// JSON `null`: the thing is to be left out (`backing`).
    Null,
}

impl fmt::Display for OptionValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OptionValue::Str(s) => f.write_str(s),
            OptionValue::Bool(b) => f.write_str(if *b { "on" } else { "off" }),
            OptionValue::Int(n) => write!(f, "{n}"),
            OptionValue::Null => f.write_str("null"),
        }
    }
}

impl From<&str> for OptionValue {
    fn from(s: &str) -> Self {
        OptionValue::Str(s.to_owned())
    }
}

impl From<String> for OptionValue {
    fn from(s: String) -> Self {
        OptionValue::Str(s)
    }
}

impl From<bool> for OptionValue {
    fn from(b: bool) -> Self {
        OptionValue::Bool(b)
    }
}

impl From<i64> for OptionValue {
    fn from(n: i64) -> Self {
        OptionValue::Int(n)
    }
}

/// A flat list of dotted keys and their values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    map: BTreeMap<String, OptionValue>,
}

impl Options {
    /// No options.
    pub fn new() -> Options {
        Options::default()
    }

    /// The same options and one more.
    pub fn with(mut self, key: &str, value: impl Into<OptionValue>) -> Options {
        self.set(key, value);
        self
    }

    /// Sets an option; an earlier value is replaced.
    pub fn set(&mut self, key: &str, value: impl Into<OptionValue>) {
        self.map.insert(key.to_owned(), value.into());
    }

    /// Sets an option unless it has a value.
    pub fn set_default(&mut self, key: &str, value: impl Into<OptionValue>) {
        self.map
            .entry(key.to_owned())
            .or_insert_with(|| value.into());
    }

    /// The options of a `json:` name, or of its text without the prefix.
    ///
    /// # Errors
    /// `InvalidArgument` if the text is no JSON object, or one with fractions in it.
    pub fn from_json(text: &str) -> Result<Options> {
        let text = text.strip_prefix("json:").unwrap_or(text);
        let fail =
            |why: String| BlockError::invalid(why).context("Could not parse the JSON options");
        let why = |e: serde_json::Error| match e.is_eof() {
            true => "JSON parse error, premature EOI".to_owned(),
            false => format!("JSON parse error, {e}"),
        };
        let value: Value = serde_json::from_str(text).map_err(|e| fail(why(e)))?;
        let Value::Object(object) = value else {
            return Err(BlockError::invalid("Invalid JSON object given"));
        };
        let mut out = Options::new();
        for (key, value) in object {
            out.flatten(key, value)?;
        }
        Ok(out)
    }

    fn flatten(&mut self, key: String, value: Value) -> Result<()> {
        match value {
            Value::Null => self.set(&key, OptionValue::Null),
            Value::Bool(b) => self.set(&key, b),
            Value::String(s) => self.set(&key, s),
            Value::Number(n) => match n.as_i64() {
                Some(n) => self.set(&key, n),
                None => self.set(&key, n.to_string()),
            },
            Value::Array(items) => {
                for (i, item) in items.into_iter().enumerate() {
                    self.flatten(format!("{key}.{i}"), item)?;
                }
            }
            Value::Object(members) => {
                for (k, v) in members {
                    self.flatten(format!("{key}.{k}"), v)?;
                }
            }
        }
        Ok(())
    }

    /// The options of `key=value,key=value`. A comma in a value is written twice; a key without `=` is a switch.
    ///
    /// # Errors
    /// `InvalidArgument` for an empty key.
    pub fn from_dotted(text: &str) -> Result<Options> {
        let mut out = Options::new();
        for part in split_unescaped_commas(text) {
            match part.split_once('=') {
                Some(("", _)) => {
                    return Err(BlockError::invalid(format!("Invalid parameter '{part}'")));
                }
                Some((key, value)) => out.set(key, value),
                None => match part.strip_prefix("no") {
                    Some(key) if !key.is_empty() => out.set(key, "off"),
                    _ => out.set(&part, "on"),
                },
            }
        }
        Ok(out)
    }

    /// The keys of `key=value,key=value` that have no value, as `key=on` or `key=off`. The tools warn of them.
    pub fn short_switches(text: &str) -> Vec<(String, String)> {
        let mut out = Vec::new();
        for part in split_unescaped_commas(text) {
            if part.contains('=') {
                continue;
            }
            let meaning = match part.strip_prefix("no") {
                Some(key) if !key.is_empty() => format!("{key}=off"),
                _ => format!("{part}=on"),
            };
            out.push((part, meaning));
        }
        out
    }

    /// Whether there is nothing (left).
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Whether a key is there.
    pub fn contains(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// The value of a key, left in place.
    pub fn get(&self, key: &str) -> Option<&OptionValue> {
        self.map.get(key)
    }

    /// The text of a key's value, left in place.
    pub fn get_str(&self, key: &str) -> Option<String> {
        self.map.get(key).map(OptionValue::to_string)
    }

    /// All keys, in byte order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.map.keys().map(String::as_str)
    }

    /// All keys and values, in byte order of the keys.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &OptionValue)> {
        self.map.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// Takes a key.
    pub fn take(&mut self, key: &str) -> Option<OptionValue> {
        self.map.remove(key)
    }

    /// Takes a key as text.
    pub fn take_str(&mut self, key: &str) -> Option<String> {
        self.map.remove(key).map(|v| v.to_string())
    }

    /// Takes a switch.
    ///
    /// # Errors
    /// `InvalidArgument` with QEMU's text if it is neither `on` nor `off`.
    pub fn take_bool(&mut self, key: &str) -> Result<Option<bool>> {
        match self.map.remove(key) {
            None => Ok(None),
            Some(OptionValue::Bool(b)) => Ok(Some(b)),
            Some(v) => match v.to_string().as_str() {
                "on" | "yes" | "true" | "y" => Ok(Some(true)),
                "off" | "no" | "false" | "n" => Ok(Some(false)),
                _ => Err(BlockError::invalid(format!(
                    "Parameter '{key}' expects 'on' or 'off'"
                ))),
            },
        }
    }

    /// Takes a number of bytes, which may have a suffix (`64k`).
    ///
    /// # Errors
    /// `InvalidArgument` with QEMU's text.
    pub fn take_size(&mut self, key: &str) -> Result<Option<u64>> {
        self.take_size_to(key, i64::MAX as u64)
    }

    /// As [`take_size`](Options::take_size), for up to `max` bytes.
    ///
    /// # Errors
    /// As [`take_size`](Options::take_size).
    pub fn take_size_to(&mut self, key: &str, max: u64) -> Result<Option<u64>> {
        let Some(value) = self.map.remove(key) else {
            return Ok(None);
        };
        let value = value.to_string();
        parse_size_to(&value, max).map(Some).map_err(|e| match e {
            SizeError::Syntax => BlockError::invalid(format!(
                "Parameter '{key}' expects a non-negative number below 2^64"
            ))
            .hint(SUFFIX_HINT),
            SizeError::Range => BlockError::invalid(format!(
                "Value '{value}' is out of range for parameter '{key}'"
            )),
        })
    }

    /// Takes a whole number as C writes them: `16`, `0x10`, `020`. A negative one counts down from 2^64, as in QEMU.
    ///
    /// # Errors
    /// `InvalidArgument` with QEMU's text.
    pub fn take_number(&mut self, key: &str) -> Result<Option<u64>> {
        let Some(value) = self.map.remove(key) else {
            return Ok(None);
        };
        let value = value.to_string();
        match parse_c_number(&value) {
            Some(Ok(n)) => Ok(Some(n)),
            Some(Err(_)) => Err(BlockError::invalid(format!(
                "Value '{value}' is too large for parameter '{key}'"
            ))),
            None => Err(BlockError::invalid(format!(
                "Parameter '{key}' expects a number"
            ))),
        }
    }

    /// Takes all keys below `prefix.`, without the prefix.
    pub fn take_subtree(&mut self, prefix: &str) -> Options {
        let start = format!("{prefix}.");
        let keys: Vec<String> = self
            .map
            .keys()
            .filter(|k| k.starts_with(&start))
            .cloned()
            .collect();
        let mut out = Options::new();
        for key in keys {
            if let Some(value) = self.map.remove(&key) {
                out.set(&key[start.len()..], value);
            }
        }
        out
    }

    /// Whether any key lies below `prefix.`.
    pub fn has_subtree(&self, prefix: &str) -> bool {
        self.map.keys().any(|k| {
            k.strip_prefix(prefix)
                .is_some_and(|rest| rest.starts_with('.'))
        })
    }

    /// Adds what `other` has, replacing equal keys.
    pub fn merge(&mut self, other: Options) {
        self.map.extend(other.map);
    }
}

/// A whole number as `strtoull` reads it with base 0, and nothing behind it. `Some(Err)`: one that doesn't fit.
fn parse_c_number(text: &str) -> Option<Result<u64, std::num::ParseIntError>> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\r', '\u{b}', '\u{c}']);
    let (is_negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let hex = digits.strip_prefix("0x").or(digits.strip_prefix("0X"));
    let (radix, digits) = match hex {
        Some(hex) => (16, hex),
        None if digits.len() > 1 && digits.starts_with('0') => (8, &digits[1..]),
        None => (10, digits),
    };
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return None;
    }
    let number = u64::from_str_radix(digits, radix);
    Some(number.map(|n| match is_negative {
        true => n.wrapping_neg(),
        false => n,
    }))
}

/// Splits at single commas; a double comma stands for one comma of the text.
fn split_unescaped_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let last = parts.len() - 1;
        if c != ',' {
            parts[last].push(c);
        } else if chars.next_if_eq(&',').is_some() {
            parts[last].push(',');
        } else {
            parts.push(String::new());
        }
    }
    parts.retain(|p| !p.is_empty());
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_ways_to_write_options_agree() {
        let typed = Options::new()
            .with("driver", "qcow2")
            .with("file.filename", "a,b")
            .with("read-only", "on");
        assert_eq!(
            Options::from_dotted("driver=qcow2,file.filename=a,,b,read-only=on").unwrap(),
            typed
        );
        let mut json = Options::from_json(
            r#"json:{"driver":"qcow2","file":{"filename":"a,b"},"read-only":true}"#,
        )
        .unwrap();
        assert_eq!(json.take_bool("read-only").unwrap(), Some(true));
        assert_eq!(
            json.take_subtree("file").take_str("filename").as_deref(),
            Some("a,b")
        );
        assert_eq!(json.keys().collect::<Vec<_>>(), ["driver"]);
    }

    #[test]
    fn numbers_are_those_of_c() {
        let take = |text: &str| {
            let mut options = Options::new().with("n", text);
            options.take_number("n").map_err(|e| e.to_string())
        };
        for (text, value) in [
            ("16", 16),
            (" +16", 16),
            ("0x1f", 31),
            ("020", 16),
            ("0", 0),
            ("-1", u64::MAX),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(take(text), Ok(Some(value)), "{text}");
        }
        for text in ["", "-", "0x", "08", "16k", "1 ", "--1"] {
            let error = "Parameter 'n' expects a number".to_owned();
            assert_eq!(take(text), Err(error), "{text}");
        }
        let error = "Value '18446744073709551616' is too large for parameter 'n'".to_owned();
        assert_eq!(take("18446744073709551616"), Err(error));
    }

    #[test]
    fn wrong_values_are_named() {
        let mut o = Options::from_dotted("a=maybe,b=1.5x,c=z").unwrap();
        assert_eq!(
            o.take_bool("a").unwrap_err().to_string(),
            "Parameter 'a' expects 'on' or 'off'"
        );
        assert_eq!(
            o.take_size("b").unwrap_err().to_string(),
            "Parameter 'b' expects a non-negative number below 2^64"
        );
        assert_eq!(
            o.take_number("c").unwrap_err().to_string(),
            "Parameter 'c' expects a number"
        );
    }
}
