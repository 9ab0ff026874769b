// SPDX-License-Identifier: MIT OR Apache-2.0
//! The list of internal snapshots in `info`. Dates are UTC.

use blockcore::SnapshotInfo;
use serde_json::{Value, json};

use crate::number::human_size;

const SECOND_NSEC: u64 = 1_000_000_000;

/// A text with blanks behind it, to so many bytes.
fn left(text: &str, bytes: usize) -> String {
    let blanks = bytes.saturating_sub(text.len());
    format!("{text}{:blanks$}", "")
}

/// A head line, and a line for each snapshot.
pub(crate) fn lines(snapshots: &[SnapshotInfo]) -> Vec<String> {
    let row = |id: &str, name: &str, size: &str, date: &str, clock: &str, icount: &str| {
        // The columns are as wide in bytes.
        let (id, name) = (left(id, 7), left(name, 16));
        format!("{id} {name} {size:>8} {date:>19} {clock:>15} {icount:>10}")
    };
    let head = format!(
        "{:<7} {:<16} {:>8}{:>20}{:>16}{:>11}",
        "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"
    );
    let line = |s: &SnapshotInfo| {
        let seconds = s.vm_clock_nsec / SECOND_NSEC;
        let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
        let clock = format!(
            "{hours:04}:{minutes:02}:{:02}.{:03}",
            seconds % 60,
            s.vm_clock_nsec % SECOND_NSEC / 1_000_000
        );
        let icount = s.icount.map_or("--".to_owned(), |n| n.to_string());
        row(
            &s.id,
            &s.name,
            &human_size(s.vm_state_size),
            &date(s.date_sec),
            &clock,
            &icount,
        )
    };
    std::iter::once(head)
        .chain(snapshots.iter().map(line))
        .collect()
}

/// A snapshot as `info --output=json` has it.
pub(crate) fn json(s: &SnapshotInfo) -> Value {
    let mut out = serde_json::Map::new();
    if let Some(icount) = s.icount {
        out.insert("icount".to_owned(), icount.into());
    }
    let rest = json!({
        "vm-clock-nsec": s.vm_clock_nsec % SECOND_NSEC,
        "name": s.name,
        "date-sec": s.date_sec,
        "date-nsec": s.date_nsec,
        "vm-clock-sec": s.vm_clock_nsec / SECOND_NSEC,
        "id": s.id,
        "vm-state-size": s.vm_state_size,
    });
    if let Value::Object(rest) = rest {
        out.extend(rest);
    }
    Value::Object(out)
}

/// Seconds since 1970 as `2026-11-23 14:44:48`.
fn date(seconds: u32) -> String {
    let (days, rest) = (seconds / 86400, seconds % 86400);
    let (mut year, mut day) = (1970, days);
    let leap = |y: u32| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    while day >= 365 + u32::from(leap(year)) {
        day -= 365 + u32::from(leap(year));
        year += 1;
    }
    let lengths = [
        31,
        28 + u32::from(leap(year)),
        31,
        30,
        31,
        30,
        31,
        31,
        30,
        31,
        30,
        31,
    ];
    let mut month = 0;
    while day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!(
        "{year}-{:02}-{:02} {hour:02}:{minute:02}:{second:02}",
        month + 1,
        day + 1
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(date(0), "1970-01-01 00:00:00");
        assert_eq!(date(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(date(1_795_445_088), "2026-11-23 14:44:48");
        assert_eq!(date(u32::MAX), "2106-02-07 06:28:15");
    }

    #[test]
    fn the_columns_are_where_they_always_were() {
        let one = SnapshotInfo {
            id: "1".to_owned(),
            name: "snap1".to_owned(),
            icount: Some(0),
            ..Default::default()
        };
        let lines = lines(&[one]);
        assert_eq!(
            lines[0],
            "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT"
        );
        assert_eq!(
            lines[1],
            "1       snap1                 0 B 1970-01-01 00:00:00  0000:00:00.000          0"
        );
    }
}
