// SPDX-License-Identifier: MIT OR Apache-2.0
//! `qemu-img check`. Exit status: 0 nothing found or nothing left, 1 the check could not be made, 2 corruptions, 3 leaks only, 63 a format that has no check.

use blockcore::{Backend, BlockError, CheckAborted, CheckFix, CheckResult};
use serde_json::{Map, Value};
use toolkit::getopt::{Arg, Long, long};

use crate::Tool;
use crate::console::{Failed, Outcome};
use crate::image::Image;
use crate::json::pretty;
use crate::options::{IMAGE_OPTS, OBJECT, OUTPUT, Output, Words};

const LONG: &[Long] = &[
    long("help", Arg::No, 'h'),
    long("quiet", Arg::No, 'q'),
    long("format", Arg::Required, 'f'),
    long("image-opts", Arg::No, IMAGE_OPTS),
    long("cache", Arg::Required, 'T'),
    long("force-share", Arg::No, 'U'),
    long("output", Arg::Required, OUTPUT),
    long("repair", Arg::Required, 'r'),
    long("object", Arg::Required, OBJECT),
];

impl Tool {
    pub(crate) async fn check(&self, args: &[String]) -> Outcome {
        let (mut format, mut image_opts, mut quiet) = (None, false, false);
        let (mut force_share, mut output) = (false, Output::Human);
        let (mut cache, mut fix) = ("writeback".to_owned(), CheckFix::None);
        let mut words = Words::new(self, "check", args, "f:hr:qT:U", LONG);
        while let Some(option) = words.next()? {
            match option.value {
                'q' => quiet = true,
                'f' => format = Some(option.arg),
                'T' => cache = option.arg,
                'U' => force_share = true,
                OUTPUT => output = words.output(&option.arg)?,
                'r' => {
                    fix = match option.arg.as_str() {
                        "leaks" => CheckFix::Leaks,
                        "all" => CheckFix::All,
                        word => {
                            let text =
                                format!("--repair (-r) expects 'leaks' or 'all' not '{word}'");
                            return Err(self.console.usage_error("check", &text));
                        }
                    }
                }
                _ => image_opts = true,
            }
        }
        let name = words.one_positional()?;
        self.check_image_opts(image_opts, format.as_deref())?;
        let image = Image {
            cache: self.cache_mode(&cache, &format!("Invalid source cache option: {cache}"))?,
            force_share,
            writable: fix != CheckFix::None,
            for_check: true,
            ..Image::new(name.as_str(), format, image_opts)
        };
        let disk = self.open(image).await?;
        let is_told = output == Output::Human && !quiet;
        let found = self.check_and_repair(&disk, fix, is_told).await;
        let format = disk.root().format_name();
        self.close(disk).await?;
        let found = found?;
        if found.check_errors > 0 {
            self.console.error("Check failed");
        }
        match output {
            Output::Human if quiet => {}
            Output::Human => self.console.print(&report(&found)),
            Output::Json => {
                let json = json_report(&found, &name, format);
                self.console.line(&pretty(&json));
            }
        }
        match (found.check_errors, found.corruptions, found.leaks) {
            (0, 0, 0) => Ok(()),
            (0, 0, _) => Err(Failed(3)),
            (0, _, _) => Err(Failed(2)),
            _ => Err(Failed(1)),
        }
    }

    /// Checks a disk, and once more after repairs. What was repaired is in the result.
    async fn check_and_repair(
        &self,
        disk: &Backend,
        fix: CheckFix,
        is_told: bool,
    ) -> Outcome<CheckResult> {
        let first = self.check_once(disk, fix).await?;
        if first.leaks_fixed + first.corruptions_fixed == 0 {
            return Ok(first);
        }
        if is_told {
            self.console.print(&format!(
                "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\n\
                 Double checking the fixed image now...\n",
                first.leaks_fixed, first.corruptions_fixed
            ));
        }
        let second = self.check_once(disk, CheckFix::None).await?;
        Ok(CheckResult {
            leaks_fixed: first.leaks_fixed,
            corruptions_fixed: first.corruptions_fixed,
            ..second
        })
    }

    /// Checks a disk, and prints what there is to say.
    async fn check_once(&self, disk: &Backend, fix: CheckFix) -> Outcome<CheckResult> {
        let result = disk.root().check(fix).await;
        let found = match &result {
            Ok(found) => Some(found),
            Err(e) => CheckAborted::found_before(e),
        };
        for line in found.iter().flat_map(|found| &found.messages) {
            self.console.raw_error(line);
        }
        result.map_err(|e| self.check_failed(&e))
    }

    fn check_failed(&self, e: &BlockError) -> Failed {
        if e.errno() == libc::ENOTSUP {
            self.console.error(&e.text());
            return Failed(63);
        }
        if e.text() != e.strerror() {
            self.console.block_error("", e);
        }
        self.console
            .fail(&format!("Check failed: {}", e.strerror()))
    }
}

fn report(found: &CheckResult) -> String {
    let mut out = String::new();
    if found.corruptions == 0 && found.leaks == 0 && found.check_errors == 0 {
        out.push_str("No errors were found on the image.\n");
    }
    if found.corruptions > 0 {
        out.push_str(&format!(
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.\n",
            found.corruptions
        ));
    }
    if found.leaks > 0 {
        out.push_str(&format!(
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n",
            found.leaks
        ));
    }
    if found.check_errors > 0 {
        out.push_str(&format!(
            "\n{} internal errors have occurred during the check.\n",
            found.check_errors
        ));
    }
    if found.total_clusters > 0 && found.allocated_clusters > 0 {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        out.push_str(&format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            found.allocated_clusters,
            found.total_clusters,
            percent(found.allocated_clusters, found.total_clusters),
            percent(found.fragmented_clusters, found.allocated_clusters),
            percent(found.compressed_clusters, found.allocated_clusters)
        ));
    }
    if found.image_end_offset > 0 {
        out.push_str(&format!("Image end offset: {}\n", found.image_end_offset));
    }
    out
}

/// The members come in the order in which QEMU's tool has them; counts of 0 are left out.
fn json_report(found: &CheckResult, filename: &str, format: &str) -> Value {
    let mut out = Map::new();
    let mut put = |key: &str, n: u64, always: bool| {
        if always || n > 0 {
            out.insert(key.to_owned(), n.into());
        }
    };
    put("image-end-offset", found.image_end_offset, false);
    put("compressed-clusters", found.compressed_clusters, false);
    put("total-clusters", found.total_clusters, false);
    put("corruptions", found.corruptions, false);
    put("corruptions-fixed", found.corruptions_fixed, false);
    put("check-errors", found.check_errors, true);
    put("leaks", found.leaks, false);
    put("leaks-fixed", found.leaks_fixed, false);
    put("allocated-clusters", found.allocated_clusters, false);
    out.insert("filename".to_owned(), filename.into());
    out.insert("format".to_owned(), format.into());
    if found.fragmented_clusters > 0 {
        out.insert(
            "fragmented-clusters".to_owned(),
            found.fragmented_clusters.into(),
        );
    }
    Value::Object(out)
}
