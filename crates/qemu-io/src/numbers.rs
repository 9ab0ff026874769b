// SPDX-License-Identifier: MIT OR Apache-2.0
//! Numbers as `qemu-io` reads and prints them.

use std::time::Duration;

use blockcore::size::parse_size;

/// The longest request, in bytes.
pub const REQUEST_BYTES_MAX: u64 = blockcore::MAX_REQUEST_BYTES;

/// Reads an offset or a length; the error is the line to print.
pub fn size(text: &str) -> Result<u64, String> {
    size_shown_as(text, text)
}

/// As [`size`], where the line shows another word in its place.
pub fn size_shown_as(text: &str, shown: &str) -> Result<u64, String> {
    parse_size(text).map_err(|e| format!("Parsing error: {e} -- {shown}"))
}

/// Reads a pattern byte: decimal, `0x..` or octal `0..`, up to 255.
pub fn pattern(text: &str) -> Result<u8, String> {
    let value = strtol(text).filter(|n| (0..=255).contains(n));
    value
        .map(|n| n as u8)
        .ok_or_else(|| format!("{text} is not a valid pattern byte"))
}

/// A whole number by the rules of C's `strtol` with base 0; `None` if anything is behind it, or nothing there.
pub fn strtol(text: &str) -> Option<i64> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\r', '\u{b}', '\u{c}']);
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let (digits, base) = match digits
        .strip_prefix("0x")
        .or_else(|| digits.strip_prefix("0X"))
    {
        Some(hex) => (hex, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (&digits[1..], 8),
        None => (digits, 10),
    };
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(base)) {
        return None;
    }
    let value = i64::from_str_radix(digits, base).unwrap_or(i64::MAX);
    Some(if negative { -value } else { value })
}

/// A number of bytes for people: `1.500 KiB`, `1 MiB`, `512 bytes`.
pub fn human(value: f64) -> String {
    const UNITS: [&str; 6] = ["EiB", "PiB", "TiB", "GiB", "MiB", "KiB"];
    let unit = UNITS
        .iter()
        .enumerate()
        .find(|(i, _)| value >= (1u64 << (60 - 10 * i)) as f64);
    let (number, unit) = match unit {
        Some((_, name)) if value.is_infinite() => ("inf".to_owned(), *name),
        Some((i, name)) => (
            format!("{:.3}", value / (1u64 << (60 - 10 * i)) as f64),
            *name,
        ),
        None => (format!("{value:.6}"), "bytes"),
    };
    // Only the digits in front of ".000" are wanted, also where others follow.
    let number = number.split(".000").next().unwrap_or_default();
    format!("{number} {unit}")
}

/// A duration: `00.04 sec`, and from a second on (or if `clock`) `0:00:01.25`.
pub fn time(elapsed: Duration, clock: bool) -> String {
    let micros = elapsed.as_micros() as u64;
    let hundredths = micros % 1_000_000 / 10_000;
    let seconds = micros / 1_000_000;
    if seconds == 0 && !clock {
        return format!("{:05.2} sec", micros as f64 / 1e6);
    }
    format!(
        "{}:{:02}:{:02}.{hundredths:02}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_look_as_they_always_did() {
        assert_eq!(human(512.0), "512 bytes");
        assert_eq!(human(94.643515), "94.643515 bytes");
        assert_eq!(human(1331.0), "1.300 KiB");
        assert_eq!(human(1048576000.0), "1000 MiB");
        assert_eq!(human(f64::INFINITY), "inf EiB");
        assert_eq!(time(Duration::from_millis(40), false), "00.04 sec");
        assert_eq!(time(Duration::from_millis(1250), false), "0:00:01.25");
        assert_eq!(time(Duration::from_millis(0), true), "0:00:00.00");
    }

    #[test]
    fn pattern_bytes_are_c_numbers() {
        assert_eq!(pattern("0xcd"), Ok(0xcd));
        assert_eq!(pattern("010"), Ok(8));
        assert_eq!(pattern("205"), Ok(205));
        for bad in ["256", "-1", "x", "", "0x", "1k", "08"] {
            assert_eq!(
                pattern(bad),
                Err(format!("{bad} is not a valid pattern byte"))
            );
        }
    }
}
