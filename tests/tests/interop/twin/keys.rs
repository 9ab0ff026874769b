// SPDX-License-Identifier: MIT OR Apache-2.0
//! Encrypted images: how they are made and named, and passwords that come and go.

use super::features::History;
use super::{Writer, pick};

const SLOTS: usize = 8;

/// Which passwords open an image.
pub struct Keys {
    is_luks: bool,
    /// The number of the password in each slot.
    slots: [Option<usize>; SLOTS],
}

impl Keys {
    /// The option with a password that opens the image.
    pub fn option(&self) -> String {
        let key = self.slots.iter().flatten().next();
        let key = key.expect("an image without a password is not made");
        format!("encrypt.key-secret=s{key}")
    }

    /// The image by its options.
    pub fn options(&self) -> String {
        format!("driver=qcow2,file.filename=t.qcow2,{}", self.option())
    }

    fn with(&self, slots: [Option<usize>; SLOTS]) -> Option<Keys> {
        let is_luks = self.is_luks;
        let is_open = slots.iter().any(Option::is_some);
        is_open.then_some(Keys { is_luks, slots })
    }
}

impl Writer<'_> {
    /// Options that make an image an encrypted one.
    pub fn keys(&mut self, options: &mut Vec<String>) -> Keys {
        self.line(
            "S='--object secret,id=s0,data=first --object secret,id=s1,data=second --object secret,id=s2,data=dGhpcmQ=,format=base64'",
        );
        let is_luks = self.random.below(3) > 0;
        let format = if is_luks { "luks" } else { "aes" };
        options.push(format!("encrypt.format={format},encrypt.key-secret=s0"));
        if is_luks {
            let ciphers = [
                "",
                ",encrypt.cipher-alg=aes-128",
                ",encrypt.cipher-alg=serpent-256,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256",
                ",encrypt.cipher-alg=twofish-256,encrypt.hash-alg=sha512",
                ",encrypt.cipher-alg=cast5-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=plain,encrypt.hash-alg=sha1",
            ];
            let cipher = pick(self.random, &ciphers);
            options.push(format!("encrypt.iter-time=1{cipher}"));
        }
        let mut slots = [None; SLOTS];
        slots[0] = Some(0);
        Keys { is_luks, slots }
    }

    /// `amend` of the key slots: what it should do is noted, so that a password is known that opens the image.
    pub fn change_keys(&mut self, history: &mut History) {
        let image = history.image();
        let keys = history.keys.as_ref().expect("the image is encrypted");
        let mut slots = keys.slots;
        let slot = self.random.below(SLOTS + 1);
        let (key, is_given) = (self.random.below(3), self.random.below(2) == 0);
        let mut options = match is_given {
            true => format!("encrypt.keyslot={slot},"),
            false => String::new(),
        };
        if self.random.below(2) == 0 {
            options +=
                &format!("encrypt.state=active,encrypt.new-secret=s{key},encrypt.iter-time=1");
            let free = slots.iter().position(Option::is_none);
            let wanted = if is_given { Some(slot) } else { free };
            if let Some(place) = wanted.and_then(|at| slots.get_mut(at)) {
                // One that is in use is not overwritten.
                place.get_or_insert(key);
            }
        } else if is_given && slot < SLOTS {
            options += "encrypt.state=inactive";
            slots[slot] = None;
        } else {
            options += &format!("encrypt.state=inactive,encrypt.old-secret=s{key}");
            let is_slot = |at: usize| !is_given || at == slot;
            for (at, place) in slots.iter_mut().enumerate() {
                if *place == Some(key) && is_slot(at) {
                    *place = None;
                }
            }
        }
        self.img(&format!("amend -o {options} {image}"));
        let keys = history.keys.as_ref().expect("the image is encrypted");
        // The last one stays.
        if keys.is_luks
            && let Some(keys) = keys.with(slots)
        {
            history.keys = Some(keys);
        }
    }
}
