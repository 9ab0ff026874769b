// SPDX-License-Identifier: MIT OR Apache-2.0
//! Facts that only one format knows, as the tools print them: one line each, nested ones indented.

use serde_json::{Map, Value};

/// The lines of `data`, each with `indent` times four spaces in front. Keys lose their dashes.
pub fn lines(data: &Map<String, Value>, indent: usize) -> Vec<String> {
    let mut out = Vec::new();
    for (key, value) in data {
        push(&mut out, &key.replace('-', " "), value, indent);
    }
    out
}

fn push(out: &mut Vec<String>, label: &str, value: &Value, indent: usize) {
    let pad = "    ".repeat(indent);
    match value {
        Value::Object(members) => {
            out.push(format!("{pad}{label}:"));
            out.extend(lines(members, indent + 1));
        }
        Value::Array(items) => {
            out.push(format!("{pad}{label}:"));
            for (i, item) in items.iter().enumerate() {
                push(out, &format!("[{i}]"), item, indent + 1);
            }
        }
        Value::String(s) => out.push(format!("{pad}{label}: {s}")),
        other => out.push(format!("{pad}{label}: {other}")),
    }
}
