// SPDX-License-Identifier: MIT OR Apache-2.0
//! What `qemu-img info` and `qemu-io info` show of an image beside the common facts.

use std::sync::Arc;

use blockcore::{DirtyBitmap, SpecificInfo};
use serde_json::{Map, Value, json};

use crate::crypto::Crypto;
use crate::header::{Compatible, Header};

/// The facts of a header, in the order and the words of the tools. While the image is open for writing, its bitmaps are in use.
pub fn specific_info(
    header: &Header,
    crypto: Option<&Crypto>,
    bitmaps: &[Arc<DirtyBitmap>],
    in_use: bool,
) -> SpecificInfo {
    let mut data = Map::new();
    let mut put = |key: &str, value: Value| data.insert(key.to_owned(), value);
    put(
        "compat",
        if header.version == 2 { "0.10" } else { "1.1" }.into(),
    );
    put("compression-type", header.compression_type.name().into());
    if header.version >= 3 {
        put(
            "lazy-refcounts",
            header
                .compatible
                .contains(Compatible::LAZY_REFCOUNTS)
                .into(),
        );
    }
    let stored = bitmaps.iter().filter(|b| b.is_persistent());
    let list: Vec<Value> = stored.map(|b| bitmap_info(b, in_use)).collect();
    if !list.is_empty() {
        put("bitmaps", list.into());
    }
    put("refcount-bits", (1u64 << header.refcount_order).into());
    if let Some(name) = header.data_file_name().filter(|_| header.has_data_file()) {
        put("data-file", name.into());
    }
    if let Some(crypto) = crypto {
        put("encrypt", crypto.info().into());
    }
    if header.has_data_file() {
        put("data-file-raw", header.is_data_file_raw().into());
    }
    if header.version >= 3 {
        put("corrupt", header.is_corrupt().into());
        put("extended-l2", header.has_extended_l2().into());
    }
    SpecificInfo {
        type_name: "qcow2",
        data,
    }
}

fn bitmap_info(bitmap: &DirtyBitmap, in_use: bool) -> Value {
    let mut flags = Vec::new();
    if in_use || bitmap.is_inconsistent() {
        flags.push("in-use");
    }
    if bitmap.is_enabled() {
        flags.push("auto");
    }
    json!({"flags": flags, "name": bitmap.name(), "granularity": bitmap.granularity()})
}
