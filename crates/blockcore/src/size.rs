// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sizes as people type them: `4096`, `64k`, `1.5G`, `0x10000`. `QEMU: qemu_strtosz`.

use thiserror::Error;

/// Why a text is no size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SizeError {
    /// No number, or something behind it that is no suffix.
    #[error("non-numeric argument, or extraneous/unrecognized suffix")]
    Syntax,
    /// Negative, or above `i64::MAX`.
    #[error("argument too large")]
    Range,
}

/// Parses a size in bytes: decimal digits with an optional fraction and an optional suffix of `bkmgtpe` in either case (powers of
/// 1024), or `0x` and hexadecimal digits. Leading white space and `+` are allowed. The result is rounded half up to a byte.
///
/// ```
/// use blockcore::size::{parse_size, SizeError};
/// assert_eq!(parse_size("1.5k"), Ok(1536));
/// assert_eq!(parse_size("0x10"), Ok(16));
/// assert_eq!(parse_size("1kB"), Err(SizeError::Syntax));
/// assert_eq!(parse_size("8E"), Err(SizeError::Range));
/// ```
///
/// # Errors
/// [`SizeError`].
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    parse_size_to(text, i64::MAX as u64)
}

/// As [`parse_size`], for numbers up to `max` bytes.
///
/// # Errors
/// [`SizeError`].
pub fn parse_size_to(text: &str, max: u64) -> Result<u64, SizeError> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\r', '\u{b}', '\u{c}']);
    let (negative, digits) = match text.as_bytes().first() {
        Some(b'+') => (false, &text[1..]),
        Some(b'-') => (true, &text[1..]),
        _ => (false, text),
    };
    let value = if let Some(hex) = digits
        .strip_prefix("0x")
        .or_else(|| digits.strip_prefix("0X"))
    {
        if hex.is_empty() || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(SizeError::Syntax);
        }
        // More digits than fit are a number too large, not a mistake in writing.
        u128::from_str_radix(hex, 16).unwrap_or(u128::MAX)
    } else {
        parse_decimal(digits)?
    };
    if negative {
        return Err(SizeError::Range);
    }
    u64::try_from(value)
        .ok()
        .filter(|&v| v <= max)
        .ok_or(SizeError::Range)
}

fn parse_decimal(text: &str) -> Result<u128, SizeError> {
    let int_len = text.bytes().take_while(u8::is_ascii_digit).count();
    let (int, rest) = text.split_at(int_len);
    let (fraction, rest) = match rest.strip_prefix('.') {
        Some(rest) => rest.split_at(rest.bytes().take_while(u8::is_ascii_digit).count()),
        None => ("", rest),
    };
    if int.is_empty() && fraction.is_empty() {
        return Err(SizeError::Syntax);
    }
    let shift = match rest.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        "e" => 60,
        _ => return Err(SizeError::Syntax),
    };
    let int: u128 = if int.is_empty() {
        0
    } else {
        int.parse().unwrap_or(u128::MAX >> 64)
    };
    let scaled = int.saturating_mul(1 << shift);
    // Eighteen digits are more than a fraction of an exabyte can show.
    let digits = &fraction[..fraction.len().min(18)];
    let num: u128 = if digits.is_empty() {
        0
    } else {
        digits.parse().map_err(|_| SizeError::Syntax)?
    };
    if num == 0 {
        return Ok(scaled);
    }
    if shift == 0 {
        return Err(SizeError::Syntax);
    }
    let den = 10u128.pow(digits.len() as u32);
    Ok(scaled.saturating_add(((num << shift) + den / 2) / den))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_the_tools_read_them() {
        for (text, value) in [
            ("0", 0),
            ("010", 10),
            ("+5", 5),
            (" 7", 7),
            (".5k", 512),
            ("1.k", 1024),
            ("1.0", 1),
            ("1.3k", 1331),
            ("0x5B", 91),
            ("1e", 1 << 60),
            ("1.5G", 3 << 29),
        ] {
            assert_eq!(parse_size(text), Ok(value), "{text}");
        }
        for text in [
            "", ".", "x", "1.5", "1.5b", "0x10k", "0x", "1e3", "1KiB", "inf", "1 k",
        ] {
            assert_eq!(parse_size(text), Err(SizeError::Syntax), "{text}");
        }
        for text in [
            "-1",
            "-0",
            "8E",
            "9223372036854775808",
            "99999999999999999999999999999999999999999999",
        ] {
            assert_eq!(parse_size(text), Err(SizeError::Range), "{text}");
        }
    }
}
