// SPDX-License-Identifier: MIT OR Apache-2.0
//! What `qemu-img info` and `qemu-io info` show of a volume: nothing of it is secret.

use serde_json::{Map, Value, json};

use crate::algorithm::IvGen;
use crate::header::{Header, KeySlot};

/// The facts of a header, in the order and the words of the tools. `format` is for headers that lie in images of another format.
pub fn header_info(header: &Header, format: Option<&str>) -> Map<String, Value> {
    let mut data = Map::new();
    let mut put = |key: &str, value: Value| data.insert(key.to_owned(), value);
    let spec = &header.spec;
    put("ivgen-alg", spec.iv_gen.name().into());
    // What counts is not where the header was found, but where it says that the payload is.
    put("detached-header", (header.payload_offset == 0).into());
    put("hash-alg", header.hash.name().into());
    put("cipher-alg", spec.alg.name().into());
    put("uuid", header.uuid.as_str().into());
    if let (IvGen::Essiv, Some(hash)) = (spec.iv_gen, spec.iv_hash) {
        put("ivgen-hash-alg", hash.name().into());
    }
    if let Some(format) = format {
        put("format", format.into());
    }
    put("cipher-mode", spec.mode.name().into());
    put("slots", header.slots.iter().map(slot_info).collect());
    put("payload-offset", header.payload_offset.into());
    put("master-key-iters", header.digest_iterations.into());
    data
}

fn slot_info(slot: &KeySlot) -> Value {
    match slot.active {
        true => json!({
            "active": true,
            "iters": slot.iterations,
            "key-offset": slot.key_offset,
            "stripes": crate::af::STRIPES,
        }),
        false => json!({"active": false, "key-offset": slot.key_offset}),
    }
}
