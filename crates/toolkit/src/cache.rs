// SPDX-License-Identifier: MIT OR Apache-2.0
//! Cache modes by name.

/// What a cache mode's name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheMode {
    /// The host's page cache is bypassed.
    pub direct: bool,
    /// `flush` does nothing on the host.
    pub no_flush: bool,
    /// Every write is made durable before it is done.
    pub write_through: bool,
}

/// The cache mode of a name: `none` or `off`, `directsync`, `writeback`, `writethrough`, `unsafe`.
pub fn parse(name: &str) -> Option<CacheMode> {
    let mode = |direct, no_flush, write_through| {
        Some(CacheMode {
            direct,
            no_flush,
            write_through,
        })
    };
    match name {
        "none" | "off" => mode(true, false, false),
        "directsync" => mode(true, false, true),
        "writeback" => mode(false, false, false),
        "writethrough" => mode(false, false, true),
        "unsafe" => mode(false, true, false),
        _ => None,
    }
}
