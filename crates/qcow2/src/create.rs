// SPDX-License-Identifier: MIT OR Apache-2.0
//! x
use blockcore::*; pub fn create_options() -> &'static [CreateOption] {&[]} pub async fn create(_c: &CreateContext<'_>, _f: &str, _o: Options)->Result<()>{todo!()}
