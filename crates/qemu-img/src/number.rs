// SPDX-License-Identifier: MIT OR Apache-2.0
//! Numbers as the command line says them and as people read them. `QEMU: cvtnum_full`, `size_to_str`.

use blockcore::size::{SizeError, parse_size};

use crate::Tool;
use crate::console::Outcome;

/// The largest number that arguments without a limit of their own may have.
pub(crate) const MAX: u64 = i64::MAX as u64;
/// The largest number where a C `int` holds it.
pub(crate) const INT_MAX: u64 = i32::MAX as u64;

impl Tool {
    /// The number that the argument `what` says, which lies within `min..=max`.
    pub(crate) fn number(&self, what: &str, text: &str, min: u64, max: u64) -> Outcome<u64> {
        match parse_size(text) {
            Ok(n) if (min..=max).contains(&n) => Ok(n),
            Err(SizeError::Syntax) => {
                let text = format!("Invalid {what} specified: '{text}'.");
                Err(self.console.fail(&text))
            }
            Ok(_) | Err(SizeError::Range) => {
                let text = format!("Invalid {what} specified. Must be between {min} and {max}.");
                Err(self.console.fail(&text))
            }
        }
    }
}

/// A number of bytes for people: three digits and a unit.
///
/// Units change at 1000, so that there never are four digits: 1000 bytes are 0.977 KiB.
pub(crate) fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let mut unit = 0;
    let mut divisor = 1u64;
    while unit + 1 < UNITS.len() && u128::from(bytes) >= 1000 * u128::from(divisor) {
        unit += 1;
        divisor <<= 10;
    }
    let value = bytes as f64 / divisor as f64;
    format!("{} {}B", three_digits(value), UNITS[unit])
}

/// As the C library's `%0.3g`, for values from 0 up to 1000.
fn three_digits(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let scientific = format!("{value:.2e}");
    let exponent: i32 = scientific
        .split_once('e')
        .and_then(|(_, e)| e.parse().ok())
        .unwrap_or(0);
    if exponent >= 3 {
        return "1e+03".to_owned();
    }
    let text = format!("{value:.*}", (2 - exponent).max(0) as usize);
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (197120, "192 KiB"),
            (1376256, "1.31 MiB"),
            (1000448, "977 KiB"),
            (1200128, "1.14 MiB"),
            (10229, "9.99 KiB"),
            (10239, "10 KiB"),
            (1023 * 1024, "0.999 MiB"),
            (1 << 62, "4 EiB"),
        ] {
            assert_eq!(human_size(bytes), text, "{bytes}");
        }
    }
}
