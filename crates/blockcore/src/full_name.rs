// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`Node::full_name`]: a name that opens what a node shows. `QEMU: bdrv_refresh_filename`.

use crate::node::Node;
use crate::options::OptionValue;

/// Options come in this order in a `json:` name; the rest follows, and then [`LAST`].
const ORDER: [&str; 5] = [
    "read-zeroes",
    "offset",
    "encrypt.key-secret",
    "header",
    "driver",
];
const LAST: &str = "key-secret";

impl Node {
    /// A name under which the same can be opened again: the file's, where that and the format say all, else `json:{...}` with the options that matter for
    /// what a guest sees.
    pub fn full_name(&self) -> String {
        self.plain_name()
            .unwrap_or_else(|| format!("json:{}", self.full_options()))
    }

    /// The options given at open that change what a guest sees.
    fn strong_options(&self) -> Vec<(&'static str, OptionValue)> {
        let options = self.options();
        let strong = self.driver().strong_options().iter();
        strong
            .filter_map(|&key| Some((key, options.get(key)?.clone())))
            .collect()
    }

    fn plain_name(&self) -> Option<String> {
        if !self.strong_options().is_empty() {
            return None;
        }
        let driver = self.driver();
        let name = match driver.primary() {
            Some(child) if !driver.is_protocol() => child.plain_name()?,
            _ => match driver.exact_filename() {
                Some(name) => name.to_owned(),
                None => self.filename().to_owned(),
            },
        };
        (!name.is_empty()).then_some(name)
    }

    fn full_options(&self) -> String {
        let driver = self.driver();
        let mut members = vec![("driver", quoted(self.format_name()))];
        let strong = self.strong_options();
        members.extend(strong.iter().map(|(k, v)| (*k, shown(v))));
        let children = driver.strong_children();
        members.extend(children.iter().map(|c| (c.name(), c.full_options())));
        match driver.primary() {
            Some(child) if !driver.is_protocol() => {
                members.push((child.name(), child.full_options()));
            }
            _ if !self.filename().is_empty() && driver.exact_filename().is_none() => {
                members.push(("filename", quoted(self.filename())));
            }
            _ => {}
        }
        let behind = |key: &str| ORDER.len() + usize::from(key == LAST);
        let place = |key: &str| {
            let found = ORDER.iter().position(|k| *k == key);
            found.unwrap_or_else(|| behind(key))
        };
        members.sort_by_key(|(key, _)| place(key));
        let members: Vec<String> = members
            .iter()
            .map(|(key, value)| format!("{}: {value}", quoted(key)))
            .collect();
        format!("{{{}}}", members.join(", "))
    }
}

fn shown(value: &OptionValue) -> String {
    match value {
        OptionValue::Str(s) => quoted(s),
        OptionValue::Bool(b) => b.to_string(),
        OptionValue::Int(n) => n.to_string(),
        OptionValue::Null => "null".to_owned(),
    }
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use crate::node::{NodeConfig, NodeFlags};
    use crate::options::Options;
    use crate::testing::MemoryDriver;

    #[tokio::test]
    async fn options_that_change_nothing_are_left_out() {
        let config = NodeConfig {
            filename: "a \"b\"".to_owned(),
            options: Options::new().with("cache-size", "1M"),
            flags: NodeFlags::default(),
            ..NodeConfig::default()
        };
        let node = crate::Node::new(Box::new(MemoryDriver::new(Vec::new())), config)
            .await
            .unwrap();
        assert_eq!(node.full_name(), "a \"b\"");
        assert_eq!(
            node.full_options(),
            r#"{"driver": "memory", "filename": "a \"b\""}"#
        );
    }
}
