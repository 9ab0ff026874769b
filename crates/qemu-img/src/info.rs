// SPDX-License-Identifier: MIT OR Apache-2.0
//! `qemu-img info`.

use std::collections::HashSet;

use blockcore::{
    BackingName, Child, Node, Result, SnapshotInfo, SpecificInfo, name::resolve_beside,
};
use serde_json::{Map, Value, json};
use toolkit::getopt::{Arg, Long, long};

use crate::Tool;
use crate::console::Outcome;
use crate::image::Image;
use crate::json::pretty;
use crate::number::human_size;
use crate::options::{IMAGE_OPTS, OBJECT, OUTPUT, Output, Words};
use crate::snapshot_list;

const LONG: &[Long] = &[
    long("help", Arg::No, 'h'),
    long("format", Arg::Required, 'f'),
    long("image-opts", Arg::No, IMAGE_OPTS),
    long("backing-chain", Arg::No, 'b'),
    long("force-share", Arg::No, 'U'),
    long("output", Arg::Required, OUTPUT),
    long("object", Arg::Required, OBJECT),
];

/// What there is to say of a node and those below it, backing nodes left out.
struct NodeInfo {
    filename: String,
    format: &'static str,
    length: u64,
    allocated: Option<u64>,
    cluster_size: u64,
    is_encrypted: bool,
    is_dirty: bool,
    backing: Option<BackingName>,
    full_backing: Option<String>,
    specific: Option<SpecificInfo>,
    snapshots: Vec<SnapshotInfo>,
    children: Vec<(&'static str, NodeInfo)>,
}

impl Tool {
    pub(crate) async fn info(&self, args: &[String]) -> Outcome {
        let (mut format, mut image_opts, mut chain) = (None, false, false);
        let (mut force_share, mut output) = (false, Output::Human);
        let mut words = Words::new(self, "info", args, "f:hbU", LONG);
        while let Some(option) = words.next()? {
            match option.value {
                'f' => format = Some(option.arg),
                'b' => chain = true,
                'U' => force_share = true,
                OUTPUT => output = words.output(&option.arg)?,
                _ => image_opts = true,
            }
        }
        let name = words.one_positional()?;
        self.check_image_opts(image_opts, format.as_deref())?;
        let image = Image {
            force_share,
            no_backing: true,
            no_io: true,
            ..Image::new(name, format, image_opts)
        };
        let layers = self.collect(image, chain).await?;
        match output {
            Output::Human => {
                for (i, layer) in layers.iter().enumerate() {
                    if i > 0 {
                        self.console.line("");
                    }
                    self.print_node(layer, 0, "");
                }
            }
            Output::Json if chain => {
                let all = layers.iter().map(json_node).collect();
                self.console.line(&pretty(&Value::Array(all)));
            }
            Output::Json => {
                for layer in &layers {
                    self.console.line(&pretty(&json_node(layer)));
                }
            }
        }
        Ok(())
    }

    /// The image, and with `chain` the ones below it. Each is opened by itself, so that a broken link is met only where it is.
    async fn collect(&self, mut image: Image, chain: bool) -> Outcome<Vec<NodeInfo>> {
        let mut layers = Vec::new();
        let mut seen = HashSet::new();
        loop {
            if !seen.insert(image.name.clone()) {
                let text = format!("Backing file '{}' creates an infinite loop.", image.name);
                return Err(self.console.fail(&text));
            }
            let disk = self.open(image.clone()).await?;
            let info = node_info(disk.root()).await;
            self.close(disk).await?;
            let info = info.map_err(|e| self.console.block_error("", &e))?;
            let next = info.full_backing.clone();
            let next_format = info.backing.as_ref().and_then(|b| b.format.clone());
            layers.push(info);
            match next {
                Some(next) if chain => {
                    image = Image {
                        force_share: image.force_share,
                        no_backing: true,
                        no_io: true,
                        ..Image::new(next, next_format, false)
                    };
                }
                _ => return Ok(layers),
            }
        }
    }

    fn print_node(&self, info: &NodeInfo, depth: usize, path: &str) {
        let pad = "    ".repeat(depth);
        let print = |text: String| self.console.line(&format!("{pad}{text}"));
        // The image itself is named as one even where it is a bare file.
        let protocol = depth > 0 && info.children.is_empty();
        let labels = if protocol {
            ["filename", "protocol type", "file length"]
        } else {
            ["image", "file format", "virtual size"]
        };
        print(format!("{}: {}", labels[0], info.filename));
        print(format!("{}: {}", labels[1], info.format));
        print(format!(
            "{}: {} ({} bytes)",
            labels[2],
            human_size(info.length),
            info.length
        ));
        let on_disk = info.allocated.map_or("unavailable".to_owned(), human_size);
        print(format!("disk size: {on_disk}"));
        if info.is_encrypted {
            print("encrypted: yes".to_owned());
        }
        if info.cluster_size > 0 {
            print(format!("cluster_size: {}", info.cluster_size));
        }
        if info.is_dirty {
            print("cleanly shut down: no".to_owned());
        }
        if let Some(backing) = &info.backing {
            let name = &backing.filename;
            match &info.full_backing {
                Some(full) if full != name => {
                    print(format!("backing file: {name} (actual path: {full})"));
                }
                _ => print(format!("backing file: {name}")),
            }
            if let Some(format) = &backing.format {
                print(format!("backing file format: {format}"));
            }
        }
        if !info.snapshots.is_empty() {
            print("Snapshot list:".to_owned());
            for line in snapshot_list::lines(&info.snapshots) {
                print(line);
            }
        }
        if let Some(specific) = info.specific.as_ref().filter(|s| !s.data.is_empty()) {
            print("Format specific information:".to_owned());
            for line in toolkit::specific::lines(&specific.data, depth + 1) {
                self.console.line(&line);
            }
        }
        for (name, child) in &info.children {
            let path = format!("{path}/{name}");
            print(format!("Child node '{path}':"));
            self.print_node(child, depth + 1, &path);
        }
    }
}

async fn node_info(node: &Node) -> Result<NodeInfo> {
    let driver = node.driver();
    // A driver without general facts has none that would be shown.
    let general = driver.info().await.unwrap_or_default();
    let mut children = Vec::new();
    let own = |c: &&Child| Some(c.name()) != driver.backing().map(Child::name);
    for child in driver.children().into_iter().filter(own) {
        children.push((child.name(), Box::pin(node_info(child.node())).await?));
    }
    let backing = driver.backing_name().filter(|b| !b.filename.is_empty());
    Ok(NodeInfo {
        filename: node.full_name(),
        format: node.format_name(),
        length: node.length(),
        // Without a number there still is all the rest to say.
        allocated: driver.allocated_size().await.unwrap_or_default(),
        cluster_size: general.cluster_size,
        is_encrypted: driver.is_encrypted(),
        is_dirty: general.is_dirty,
        full_backing: backing
            .as_ref()
            .map(|b| resolve_beside(node.filename(), &b.filename)),
        backing,
        specific: driver.specific_info().await?,
        snapshots: driver.snapshots().await?,
        children,
    })
}

/// The members come in the order in which QEMU's tool has them.
fn json_node(info: &NodeInfo) -> Value {
    let mut out = Map::new();
    let mut put = |key: &str, value: Value| {
        out.insert(key.to_owned(), value);
    };
    let child = |(name, info): &(&str, NodeInfo)| json!({"name": name, "info": json_node(info)});
    put("children", info.children.iter().map(child).collect());
    if let Some(format) = info.backing.as_ref().and_then(|b| b.format.as_deref()) {
        put("backing-filename-format", format.into());
    }
    if !info.snapshots.is_empty() {
        put(
            "snapshots",
            info.snapshots.iter().map(snapshot_list::json).collect(),
        );
    }
    put("virtual-size", info.length.into());
    put("filename", info.filename.as_str().into());
    if info.cluster_size > 0 {
        put("cluster-size", info.cluster_size.into());
    }
    put("format", info.format.into());
    if let Some(bytes) = info.allocated {
        put("actual-size", bytes.into());
    }
    if let Some(specific) = &info.specific {
        put(
            "format-specific",
            json!({"type": specific.type_name, "data": specific.data}),
        );
    }
    if let Some(full) = &info.full_backing {
        put("full-backing-filename", full.as_str().into());
    }
    if info.is_encrypted {
        put("encrypted", true.into());
    }
    if let Some(backing) = &info.backing {
        put("backing-filename", backing.filename.as_str().into());
    }
    put("dirty-flag", info.is_dirty.into());
    Value::Object(out)
}
