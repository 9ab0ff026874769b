// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask demo`: the main job on a real backing chain. Four images of odd sizes, raw at the bottom, are made by our
//! `qemu-img` and driven through our `qemu-io`; every command is shown before its output. A byte vector follows along, and
//! at the end the chain must read as that vector does, `check` must find nothing, and an installed QEMU must agree.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{build_tools, installed_qemu, run, shown};

/// No multiple of any cluster, not even of a sector: what lies past its end up to the next sector reads as zero.
const BASE_BYTES: usize = 3_000_001;
const TOP_BYTES: usize = 3_147_264;

/// The chain's directory, the tools, and what the top image must read as.
struct Demo {
    dir: PathBuf,
    tools: PathBuf,
    model: Vec<u8>,
}

/// Builds the tools, runs the walk, and removes its directory unless `keep` is set or something failed.
pub fn demo(keep: bool) -> Result<(), String> {
    println!("Building the tools ...");
    let tools = build_tools()?;
    let dir = std::env::temp_dir().join(format!("blocklayer-demo-{}", std::process::id()));
    fs::create_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let mut demo = Demo {
        dir,
        tools,
        model: Vec::new(),
    };
    let result = demo.walk();
    if keep || result.is_err() {
        println!("\nThe images are in {}", demo.dir.display());
    } else {
        fs::remove_dir_all(&demo.dir).map_err(|e| format!("{}: {e}", demo.dir.display()))?;
    }
    result
}

impl Demo {
    fn walk(&mut self) -> Result<(), String> {
        self.make_chain()?;
        self.drive()?;
        self.look()?;
        self.verify()?;
        self.ask_qemu()?;
        println!(
            "\nSUCCESS: the chain reads as it should, byte for byte, and every image is sound."
        );
        Ok(())
    }

    fn make_chain(&mut self) -> Result<(), String> {
        title(
            "A chain of four images: three qcow2 layers over raw, none a whole number of clusters long",
        );
        self.model = content(BASE_BYTES);
        let base = self.dir.join("base.raw");
        fs::write(&base, &self.model).map_err(|e| format!("{}: {e}", base.display()))?;
        println!("(base.raw: {BASE_BYTES} bytes of deterministic content)");
        self.model.resize(TOP_BYTES, 0);
        let layers: [(&str, &[&str]); 3] = [
            (
                "one.qcow2",
                &["-o", "compat=0.10", "-b", "base.raw", "-F", "raw"],
            ),
            (
                "two.qcow2",
                &["-o", "cluster_size=4k", "-b", "one.qcow2", "-F", "qcow2"],
            ),
            ("top.qcow2", &["-b", "two.qcow2", "-F", "qcow2"]),
        ];
        let sizes = ["3050k", "3060k", "3147264"];
        for ((name, options), size) in layers.into_iter().zip(sizes) {
            let mut arguments = vec!["create", "-f", "qcow2"];
            arguments.extend_from_slice(options);
            arguments.extend([name, size]);
            self.img(&arguments)?;
        }
        Ok(())
    }

    fn drive(&mut self) -> Result<(), String> {
        title("Writes into the lower layers, each before anything is stacked on the bytes");
        self.write("one.qcow2", 0x11, 700_000, 200_000)?;
        self.write("two.qcow2", 0x22, 1_400_000, 5_000)?;
        title("The top image: reads through the chain, writes, zero writes, discards");
        self.io("top.qcow2", &["length", "read -v 2999990 16"])?;
        self.write("top.qcow2", 0x33, 70_000, 3)?;
        self.write("top.qcow2", 0x44, 2_500_000, 131_072)?;
        self.zero("top.qcow2", 1_040_000, 200_000)?;
        self.io("top.qcow2", &["discard 2555904 65536"])?;
        self.model[2_555_904..2_555_904 + 65_536].fill(0);
        title("The tail: 1536 bytes of a cluster behind the end of every image below");
        let edge = 3_145_728;
        self.zero("top.qcow2", edge + 512, 512)?;
        println!(
            "(part of the cluster was zeroed, the rest reads as zero anyhow: a zero cluster, nothing allocated)"
        );
        self.io("top.qcow2", &[&format!("alloc {edge} 1536")])?;
        self.write("top.qcow2", 0x55, edge + 1024, 512)?;
        self.zero("top.qcow2", edge, 512)?;
        self.io(
            "top.qcow2",
            &[
                &format!("read -P 0 {edge} 1024"),
                &format!("read -P 0x55 {} 512", edge + 1024),
            ],
        )
    }

    fn look(&self) -> Result<(), String> {
        title("The map of the chain: which bytes come from which image");
        self.img(&["map", "top.qcow2"])?;
        self.img(&["map", "--output=json", "top.qcow2"])?;
        self.io("top.qcow2", &["map"])?;
        title("Every image is sound");
        for name in ["one.qcow2", "two.qcow2", "top.qcow2"] {
            self.img(&["check", name])?;
        }
        Ok(())
    }

    fn verify(&self) -> Result<(), String> {
        title("The whole chain, flattened, against what it must read as");
        self.img(&["convert", "-O", "raw", "top.qcow2", "flat.raw"])?;
        let flat = self.dir.join("flat.raw");
        let bytes = fs::read(&flat).map_err(|e| format!("{}: {e}", flat.display()))?;
        if bytes.len() != self.model.len() {
            return Err(format!(
                "the chain is {} bytes long, not {}",
                bytes.len(),
                self.model.len()
            ));
        }
        if let Some(at) = bytes.iter().zip(&self.model).position(|(a, b)| a != b) {
            return Err(format!(
                "byte {at} reads as {:#04x}, not {:#04x}",
                bytes[at], self.model[at]
            ));
        }
        println!("({} bytes, all as expected)", bytes.len());
        self.img(&[
            "compare",
            "-f",
            "qcow2",
            "-F",
            "raw",
            "top.qcow2",
            "flat.raw",
        ])
    }

    fn ask_qemu(&self) -> Result<(), String> {
        let version = match installed_qemu() {
            Ok(version) => version,
            Err(why) => {
                println!("\n(No second opinion from QEMU: {why})");
                return Ok(());
            }
        };
        title(&format!("The second opinion: QEMU {version}"));
        let qemu = Path::new("/usr/bin");
        for name in ["one.qcow2", "two.qcow2", "top.qcow2"] {
            self.tool(qemu, "qemu-img", &["check", name])?;
        }
        let compare = [
            "compare",
            "-f",
            "qcow2",
            "-F",
            "raw",
            "top.qcow2",
            "flat.raw",
        ];
        self.tool(qemu, "qemu-img", &compare)
    }

    fn write(&mut self, image: &str, byte: u8, offset: usize, bytes: usize) -> Result<(), String> {
        self.model[offset..offset + bytes].fill(byte);
        self.io(image, &[&format!("write -P {byte:#x} {offset} {bytes}")])
    }

    fn zero(&mut self, image: &str, offset: usize, bytes: usize) -> Result<(), String> {
        self.model[offset..offset + bytes].fill(0);
        self.io(image, &[&format!("write -z {offset} {bytes}")])
    }

    fn io(&self, image: &str, commands: &[&str]) -> Result<(), String> {
        let mut arguments = Vec::new();
        for command in commands {
            arguments.extend(["-c", command]);
        }
        arguments.push(image);
        self.tool(&self.tools, "qemu-io", &arguments)
    }

    fn img(&self, arguments: &[&str]) -> Result<(), String> {
        self.tool(&self.tools, "qemu-img", arguments)
    }

    fn tool(&self, from: &Path, name: &str, arguments: &[&str]) -> Result<(), String> {
        let mut command = Command::new(from.join(name));
        command.args(arguments).current_dir(&self.dir);
        let whose = if from == self.tools { "" } else { "/usr/bin/" };
        println!("$ {whose}{}", shown(&command));
        run(&mut command)
    }
}

fn title(text: &str) {
    println!("\n== {text}");
}

/// Bytes that are the same on every run and do not repeat at any cluster size: a xorshift sequence.
fn content(bytes: usize) -> Vec<u8> {
    let mut state: u64 = 0x9E37_79B9_7F4A_7C15;
    let mut content = Vec::with_capacity(bytes + 8);
    while content.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        content.extend_from_slice(&state.to_le_bytes());
    }
    content.truncate(bytes);
    content
}
