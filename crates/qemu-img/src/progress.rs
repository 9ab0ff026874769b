// SPDX-License-Identifier: MIT OR Apache-2.0
//! `-p`: the share that is done, printed in place.

use std::sync::Mutex;

use blockcore::AmendProgress;
use blockjob::{Job, Progress};

use crate::console::Console;

fn print(console: &Console, percent: f64) {
    console.print(&format!("    ({percent:3.2}/100%)\r"));
    console.flush();
}

/// A job; with `shown`, one whose progress is printed, when it is more than `step` percent further.
pub(crate) fn job(console: &Console, shown: bool, step: f64) -> Job {
    if !shown {
        return Job::new();
    }
    print(console, 0.0);
    let console = console.clone();
    let last = Mutex::new(0.0);
    Job::observed(move |progress: Progress| {
        let percent = if progress.done == 0 {
            0.0
        } else {
            progress.fraction() * 100.0
        };
        let mut last = last
            .lock()
            .expect("no code panics while it holds this lock");
        if percent - *last > step || (percent >= 100.0 && *last < 100.0) {
            *last = percent;
            print(&console, percent);
        }
    })
}

/// The progress of an amending; with `shown`, it is printed. It may go back, since how many steps there are becomes known on the way.
pub(crate) fn amend(console: &Console, shown: bool) -> AmendProgress {
    if !shown {
        return AmendProgress::default();
    }
    print(console, 0.0);
    let console = console.clone();
    let last = Mutex::new(0.0);
    AmendProgress::observed(move |done, total| {
        let percent = match total {
            0 => 0.0,
            _ => done as f64 * 100.0 / total as f64,
        };
        let mut last = last
            .lock()
            .expect("no code panics while it holds this lock");
        let is_end = percent == 0.0 || percent == 100.0;
        if is_end || percent > *last + 1.0 || percent < *last {
            *last = percent;
            print(&console, percent);
        }
    })
}

/// The last step, whatever was printed before.
pub(crate) fn complete(console: &Console, shown: bool) {
    if shown {
        print(console, 100.0);
    }
}

/// Leaves the line.
pub(crate) fn end(console: &Console, shown: bool) {
    if shown {
        console.line("");
    }
}
