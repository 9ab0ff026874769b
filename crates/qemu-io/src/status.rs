// SPDX-License-Identifier: MIT OR Apache-2.0
//! `alloc`, `map`, `length`, `info`: questions about the open image.

use blockcore::{Backend, Result, StatusMode};

use crate::numbers::{human, size};
use crate::session::{Call, Done, Failed, Ran, Session};

impl Session {
    pub(crate) fn length(&mut self) -> Ran {
        let length = self.backend()?.length();
        self.output.out(&format!("{}\n", human(length as f64)));
        Ok(Done::Length(length))
    }

    pub(crate) async fn alloc(&mut self, c: Call<'_>) -> Ran {
        let offset = size(&c.args[0]).or_else(|e| self.number_error(&e))?;
        let count = match c.args.get(1) {
            Some(text) => size(text).or_else(|e| self.number_error(&e))?,
            None => 512,
        };
        let backend = self.backend()?;
        let counted = self
            .wait(async { count_allocated(&backend, offset, count).await })
            .await;
        match counted {
            Ok((allocated, of)) => {
                let place = human(offset as f64);
                self.output.out(&format!(
                    "{allocated}/{of} bytes allocated at offset {place}\n"
                ));
                Ok(Done::Allocated { allocated, of })
            }
            Err(e) => self.failed("is_allocated", &e),
        }
    }

    pub(crate) async fn map(&mut self) -> Ran {
        let backend = self.backend()?;
        let length = backend.length();
        let mut at = 0;
        while at < length {
            let run = self
                .wait(async { allocation_run(&backend, at, length).await })
                .await;
            let (allocated, bytes) = match run {
                Ok(run) => run,
                Err(e) => return self.complain_of("Failed to get allocation status: ", &e),
            };
            if bytes == 0 {
                self.complain("Unexpected end of image");
                return Err(Failed::Refused);
            }
            let what = if allocated {
                "    allocated"
            } else {
                "not allocated"
            };
            let (run, place) = (human(bytes as f64), human(at as f64));
            self.output.out(&format!(
                "{run} ({bytes:#x}) bytes {what} at offset {place} ({at:#x})\n"
            ));
            at += bytes;
        }
        Ok(Done::Nothing)
    }

    pub(crate) async fn info(&mut self) -> Ran {
        let backend = self.backend()?;
        let driver = backend.root().driver();
        self.output
            .out(&format!("format name: {}\n", driver.format_name()));
        if driver.is_protocol() {
            self.output
                .out(&format!("format name: {}\n", driver.format_name()));
        }
        let Ok(info) = self.wait(driver.info()).await else {
            return Err(Failed::Refused);
        };
        self.output.out(&format!(
            "cluster size: {}\n",
            human(info.cluster_size as f64)
        ));
        self.output.out(&format!(
            "vm state offset: {}\n",
            human(info.vm_state_offset as f64)
        ));
        match self.wait(driver.specific_info()).await {
            Err(e) => return self.complain_of("", &e),
            Ok(None) => {}
            // The heading alone would say nothing.
            Ok(Some(specific)) if specific.data.is_empty() => {}
            Ok(Some(specific)) => {
                self.output.out("Format specific information:\n");
                for line in toolkit::specific::lines(&specific.data, 1) {
                    self.output.out(&format!("{line}\n"));
                }
            }
        }
        Ok(Done::Nothing)
    }
}

/// How many bytes of a range the top layer holds, and how many of the range lie on the disk.
async fn count_allocated(backend: &Backend, offset: u64, count: u64) -> Result<(u64, u64)> {
    let (mut at, mut left, mut sum) = (offset, count, 0);
    while left > 0 {
        let status = backend
            .block_status(at, left, StatusMode::AllocationOnly)
            .await?;
        if status.bytes == 0 {
            return Ok((sum, count - left));
        }
        if status.is_allocated() {
            sum += status.bytes;
        }
        at += status.bytes;
        left -= status.bytes;
    }
    Ok((sum, count))
}

/// Whether the top layer holds what lies at `at`, and for how many bytes that goes on.
async fn allocation_run(backend: &Backend, at: u64, end: u64) -> Result<(bool, u64)> {
    let first = backend
        .block_status(at, end - at, StatusMode::AllocationOnly)
        .await?;
    let mut bytes = first.bytes;
    while bytes > 0 && at + bytes < end {
        let next = backend
            .block_status(at + bytes, end - at - bytes, StatusMode::AllocationOnly)
            .await?;
        if next.is_allocated() != first.is_allocated() || next.bytes == 0 {
            break;
        }
        bytes += next.bytes;
    }
    Ok((first.is_allocated(), bytes))
}
