// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is taken out of a golden script's output before it is compared.
//!
//! Called by `golden`. Some parts of the tools' output differ from run to run (times, temporary names, node numbers): those
//! are always replaced. Others are the implementation's own business only in some scripts (where in the file a cluster
//! lies, how many blocks the host allocated): a script asks for these by name in a `# filter:` line. Each filter
//! replaces the value and leaves the rest of the line to be compared.

use regex_lite::{Captures, Regex};

/// A filter that a script can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptIn {
    /// Host offsets in `qemu-img map`, human (`Mapped to`) and json (`"offset"`), and in what `amend` says of a refcount that is too large.
    Offsets,
    /// `disk size:` and `"actual-size"` in `qemu-img info`.
    DiskSize,
    /// The seconds in `Run completed in ...` of `qemu-img bench`.
    BenchTime,
}

impl OptIn {
    /// The filter with this name in a `# filter:` line.
    #[must_use]
    pub fn from_name(name: &str) -> Option<OptIn> {
        match name {
            "offsets" => Some(OptIn::Offsets),
            "disk-size" => Some(OptIn::DiskSize),
            "bench-time" => Some(OptIn::BenchTime),
            _ => None,
        }
    }
}

/// The compiled filters of one script.
pub struct Filters {
    rules: Vec<(Regex, &'static str)>,
    offsets: bool,
}

impl Filters {
    /// The filters that always apply, and the ones asked for.
    ///
    /// # Panics
    /// Never: the expressions are constants and a unit test compiles them all.
    #[must_use]
    pub fn new(opt_in: &[OptIn]) -> Filters {
        const TIME: &str = r"(?:\d+:\d\d:\d\d\.\d\d|\d\d\.\d\d sec)";
        let report = format!(
            r"(?m)(\d+ ops); {TIME} \((?:[0-9.]+|inf) (?:bytes|[KMGTPE]iB)/sec and (?:[0-9.]+|inf) ops/sec\)"
        );
        let mut rules = vec![
            (report, "$1; XX:XX:XX.X (XXX YYY/sec and XXX ops/sec)"),
            (
                r"(?m)^(\d+,\d+),\d+:\d\d:\d\d\.\d\d,(?:[0-9.]+|inf),(?:[0-9.]+|inf)$".to_owned(),
                "$1,XX:XX:XX.X,XXX,XXX",
            ),
            (r"#block\d+".to_owned(), "#blockNNN"),
        ];
        if opt_in.contains(&OptIn::Offsets) {
            rules.push((
                r"(Cluster at offset) 0x[0-9a-f]+ (has a refcount)".to_owned(),
                "$1 OFFSET $2",
            ));
        }
        if opt_in.contains(&OptIn::DiskSize) {
            rules.push((r"(?m)^( *disk size: ).*$".to_owned(), "${1}SIZE"));
            rules.push((r#"("actual-size": )\d+"#.to_owned(), "${1}SIZE"));
        }
        if opt_in.contains(&OptIn::BenchTime) {
            rules.push((
                r"Run completed in [0-9.]+ seconds\.".to_owned(),
                "Run completed in X seconds.",
            ));
        }
        if opt_in.contains(&OptIn::Offsets) {
            rules.push((r#"("offset": )\d+"#.to_owned(), "${1}OFFSET"));
        }
        let compile = |(expression, to): (String, &'static str)| {
            let regex = Regex::new(&expression).expect("filter expressions are constants");
            (regex, to)
        };
        Filters {
            rules: rules.into_iter().map(compile).collect(),
            offsets: opt_in.contains(&OptIn::Offsets),
        }
    }

    /// The text with every filtered value replaced.
    ///
    /// # Panics
    /// Never: see [`Filters::new`].
    #[must_use]
    pub fn apply(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for (regex, to) in &self.rules {
            text = regex.replace_all(&text, *to).into_owned();
        }
        if self.offsets {
            // A line of the human map: start, length and host offset in columns of 16, then the file's name.
            let human =
                Regex::new(r"(?m)^((?:0x[0-9a-f]+|0) +0x[0-9a-f]+ +)(0x[0-9a-f]+|0)( +)(\S+)$")
                    .expect("filter expressions are constants");
            text = human
                .replace_all(&text, |c: &Captures<'_>| {
                    format!("{}{:<16}{}", &c[1], "OFFSET", &c[4])
                })
                .into_owned();
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_rates_of_a_report_are_replaced_and_its_size_is_not() {
        let filters = Filters::new(&[]);
        for (from, to) in [
            (
                "1.300 KiB, 1 ops; 00.00 sec (11.655 MiB/sec and 9181.6404 ops/sec)",
                "1.300 KiB, 1 ops; XX:XX:XX.X (XXX YYY/sec and XXX ops/sec)",
            ),
            (
                "0 bytes, 1 ops; 0:00:01.25 (0 bytes/sec and 0.8000 ops/sec)",
                "0 bytes, 1 ops; XX:XX:XX.X (XXX YYY/sec and XXX ops/sec)",
            ),
            (
                "64 KiB, 1 ops; 00.00 sec (inf EiB/sec and inf ops/sec)",
                "64 KiB, 1 ops; XX:XX:XX.X (XXX YYY/sec and XXX ops/sec)",
            ),
            (
                "512,1,0:00:00.00,2458949.471,4802.636",
                "512,1,XX:XX:XX.X,XXX,XXX",
            ),
            ("node '#block123' is", "node '#blockNNN' is"),
        ] {
            assert_eq!(filters.apply(from), to);
        }
    }

    #[test]
    fn a_value_is_filtered_only_when_the_script_asks() {
        let map = "{ \"start\": 0, \"offset\": 327680}\n0x10000         0x10000         0x50000         a.qcow2\n";
        let info = "disk size: 196 KiB\n    \"actual-size\": 4096,\n";
        let bench = "Run completed in 0.123 seconds.\n";
        let none = Filters::new(&[]);
        for text in [map, info, bench] {
            assert_eq!(none.apply(text), text);
        }
        let all = Filters::new(&[OptIn::Offsets, OptIn::DiskSize, OptIn::BenchTime]);
        assert_eq!(
            all.apply(map),
            "{ \"start\": 0, \"offset\": OFFSET}\n0x10000         0x10000         OFFSET          a.qcow2\n"
        );
        assert_eq!(
            all.apply(info),
            "disk size: SIZE\n    \"actual-size\": SIZE,\n"
        );
        assert_eq!(all.apply(bench), "Run completed in X seconds.\n");
    }
}
