// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an image is, in every way that the tools can show it.

use super::features::History;
use super::{Writer, pick};

/// What differs where clusters were freed.
const OWN_CHECK: &str =
    "grep -v -e 'Image end' -e allocated -e image-end -e fragmented | sed 's/,$//'";

impl Writer<'_> {
    /// One of the looks, in the middle of a script.
    pub fn look_at_something(&mut self, history: &History) {
        let image = history.image();
        match self.random.below(6) {
            0 => self.line(&format!(
                "qemu-img info --output=json {image} | grep -v -e actual-size -e '^        .*virtual-size' | dates"
            )),
            1 => self.line(&format!(
                "qemu-img check --output=json {image} | {OWN_CHECK}; echo \"status ${{PIPESTATUS[0]}}\""
            )),
            2 => self.line(&format!("qemu-img snapshot -l {image} | dates")),
            3 => self.compare(history),
            4 if !history.has_freed && !history.has_own_layout => {
                // Which reserved and unwritten parts count as data depends on what the host has read ahead.
                self.line("sync *; for i in *; do dd if=$i iflag=nocache count=0 status=none; done");
                self.line(&format!("qemu-img map --output=json {image}"));
            }
            _ => self.line(&format!("qemu-io -r -c info -c length {image} | grep -v vm | dates")),
        }
    }

    /// `compare` with a copy, which may have another byte somewhere, or another length.
    fn compare(&mut self, history: &History) {
        let image = history.image();
        self.line(&format!("qemu-img convert -O raw {image} copy.raw"));
        match self.random.below(3) {
            0 => {
                let at = self.random.below(self.size);
                self.line(&format!(
                    "printf x | dd of=copy.raw bs=1 seek={at} conv=notrunc status=none"
                ));
            }
            1 => {
                let bytes = self.random.below(self.size) / 512 * 512 + 512;
                self.line(&format!("truncate -s {bytes} copy.raw"));
            }
            _ => {}
        }
        let quiet = pick(self.random, &["", "", "-q "]);
        let copy = match history.keys {
            Some(_) => "driver=raw,file.filename=copy.raw",
            None => "copy.raw",
        };
        self.img(&format!("compare {quiet}{image} {copy}"));
    }

    pub fn features_look(&mut self, history: &History) {
        let image = history.image();
        if !history.has_own_layout {
            self.line(&format!("qemu-io -r -c map {image}"));
        }
        self.line(&format!("qemu-io -r -c length {image}"));
        self.line(&format!(
            "qemu-img convert -O raw {image} all.raw && md5sum < all.raw"
        ));
        for name in &history.snapshots {
            // QEMU shows as much of it as the disk is long now, and ours as much as it was.
            self.line(&format!(
                "qemu-img convert -l {name} -O raw {image} {name}.raw && head -c {} {name}.raw | md5sum",
                history.least
            ));
        }
        if history.is_raw && history.keys.is_none() {
            let name = match history.is_renamed {
                true => "another-name-for-t.data",
                false => "t.data",
            };
            self.line(&format!("head -c {} {name} | md5sum", self.size));
        }
        self.line(&format!("qemu-img snapshot -l {image} | dates"));
        self.line("qemu-img info t.qcow2 | grep -v 'file length' | dates");
        self.line(&format!(
            "qemu-img check {image} | {OWN_CHECK}; echo \"status ${{PIPESTATUS[0]}}\""
        ));
    }
}
