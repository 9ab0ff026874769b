// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the rounds gave, as a table, as CSV and as a picture.

use std::fmt::Write;

/// One way of doing what a cell is about.
#[derive(Debug)]
pub struct Contestant {
    pub name: &'static str,
    /// One value for each round: seconds or KiB.
    pub values: Vec<f64>,
    /// Why there are none.
    pub excuse: Option<String>,
}

impl Contestant {
    pub fn median(&self) -> Option<f64> {
        let mut values = self.values.clone();
        values.sort_by(f64::total_cmp);
        let n = values.len();
        (n > 0).then(|| (values[n / 2] + values[(n - 1) / 2]) / 2.0)
    }
}

/// Something that is measured, and who did it.
#[derive(Debug)]
pub struct Cell {
    pub name: &'static str,
    pub unit: &'static str,
    pub contestants: Vec<Contestant>,
}

impl Cell {
    /// The best median of ours, and the best of the others with its name.
    pub fn verdict(&self) -> Option<(f64, f64, &'static str)> {
        let is_ours = |c: &&Contestant| c.name.starts_with("ours");
        let medians = |ours: bool| {
            let these = self.contestants.iter().filter(move |c| is_ours(c) == ours);
            these.filter_map(|c| Some((c.median()?, c.name)))
        };
        let ours = medians(true).min_by(|a, b| a.0.total_cmp(&b.0))?;
        let peer = medians(false).min_by(|a, b| a.0.total_cmp(&b.0))?;
        Some((ours.0, peer.0, peer.1))
    }
}

/// The table, with the excuses below it.
pub fn table(cells: &[Cell]) -> String {
    let mut out = String::new();
    let mut notes = String::new();
    for cell in cells {
        let _ok = write!(out, "{:<38}", cell.name);
        if let Some((ours, peer, name)) = cell.verdict() {
            let _ok = write!(out, "ours/best peer {:>6.2} ({name})", ours / peer);
        }
        out.push('\n');
        for c in &cell.contestants {
            match (c.median(), &c.excuse) {
                (Some(median), _) => {
                    let least = c.values.iter().copied().fold(f64::MAX, f64::min);
                    let most = c.values.iter().copied().fold(0.0, f64::max);
                    let _ok = writeln!(
                        out,
                        "    {:<22} {median:>12.4} {}   ({least:.4} to {most:.4})",
                        c.name, cell.unit
                    );
                }
                (None, excuse) => {
                    let _ok = writeln!(out, "    {:<22} {:>12}", c.name, "-");
                    if let Some(why) = excuse {
                        let _ok = writeln!(notes, "- {}, {}: {why}", cell.name, c.name);
                    }
                }
            }
        }
    }
    if !notes.is_empty() {
        out.push_str("\nWhat is missing:\n");
        out.push_str(&notes);
    }
    out
}

pub fn csv(cells: &[Cell]) -> String {
    let mut out = "cell,contestant,unit,median,rounds\n".to_owned();
    for cell in cells {
        for c in &cell.contestants {
            let median = c.median().map_or(String::new(), |m| format!("{m:.6}"));
            let rounds: Vec<String> = c.values.iter().map(|v| format!("{v:.6}")).collect();
            let _ok = writeln!(
                out,
                "\"{}\",{},{},{median},{}",
                cell.name,
                c.name,
                cell.unit,
                rounds.join(" ")
            );
        }
    }
    out
}

/// Bars, each cell's longest as wide as the others'.
pub fn svg(cells: &[Cell]) -> String {
    const BAR: f64 = 420.0;
    const LINE: usize = 16;
    let mut body = String::new();
    let mut y = 24;
    for cell in cells {
        let _ok = writeln!(
            body,
            "<text x=\"8\" y=\"{y}\" font-weight=\"bold\">{} ({})</text>",
            cell.name, cell.unit
        );
        y += LINE;
        let medians = cell.contestants.iter().filter_map(Contestant::median);
        let longest = medians.fold(f64::MIN_POSITIVE, f64::max);
        for c in &cell.contestants {
            let Some(median) = c.median() else { continue };
            let width = (median / longest * BAR).max(1.0);
            let colour = match c.name.starts_with("ours") {
                true => "#2a7",
                false => "#89a",
            };
            let _ok = writeln!(
                body,
                "<text x=\"20\" y=\"{y}\">{}</text><rect x=\"170\" y=\"{}\" width=\"{width:.1}\" height=\"11\" fill=\"{colour}\"/>\
                 <text x=\"{:.0}\" y=\"{y}\">{median:.4}</text>",
                c.name,
                y - 10,
                176.0 + width
            );
            y += LINE;
        }
        y += LINE / 2;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"700\" height=\"{y}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reports_say_who_was_how_fast_and_who_was_not() {
        let contestant = |name, values: &[f64], excuse: Option<&str>| Contestant {
            name,
            values: values.to_vec(),
            excuse: excuse.map(str::to_owned),
        };
        let cells = [Cell {
            name: "a cell",
            unit: "s",
            contestants: vec![
                contestant("ours", &[3.0, 1.0, 2.0], None),
                contestant("peer", &[4.0, 4.5], None),
                contestant("other", &[], Some("can't")),
            ],
        }];
        assert_eq!(cells[0].verdict(), Some((2.0, 4.25, "peer")));
        let table = table(&cells);
        assert!(
            table.contains("0.47 (peer)") && table.contains("other: can't"),
            "{table}"
        );
        assert!(csv(&cells).contains("\"a cell\",ours,s,2.000000,3.000000 1.000000 2.000000"));
        let svg = svg(&cells);
        assert_eq!(svg.matches("<rect x").count(), 2, "{svg}");
    }
}
