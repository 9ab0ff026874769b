// SPDX-License-Identifier: MIT OR Apache-2.0
//! x
use blockcore::*; pub async fn check(_h: &crate::header::Header, _f: &Child, _x: CheckFix)->Result<CheckResult>{Ok(CheckResult::default())}
