// SPDX-License-Identifier: MIT OR Apache-2.0
//! How the tools are told of an image, which for an encrypted one takes a password; passwords that come and go; and that the host sees nothing of what is encrypted.

use blocklayer_tests::tools::Tools;

use super::disk::{Disk, IMAGE};

/// The passwords, by their ids.
const SECRETS: [&str; 3] = [
    "secret,id=s0,data=first",
    "secret,id=s1,data=second",
    "secret,id=s2,data=third",
];

/// Bytes that may fill a sector of metadata: refcounts of one or two in any width, and bitmaps.
const IN_METADATA: [u8; 12] = [0, 1, 2, 3, 4, 0x11, 0x22, 0x33, 0x44, 0x55, 0xaa, 0xff];

impl Disk<'_> {
    /// The image by its options.
    pub fn image_options(&self) -> String {
        let key = match self.secret {
            Some(id) => format!(",encrypt.key-secret={id}"),
            None => String::new(),
        };
        let below = match self.has_secret_below {
            true => ",backing.encrypt.key-secret=s0",
            false => "",
        };
        format!("driver=qcow2,file.filename={IMAGE}{key}{below}")
    }

    fn has_secrets(&self) -> bool {
        self.secret.is_some() || self.has_secret_below
    }

    /// The passwords as words for a tool.
    pub fn secrets(&self) -> impl Iterator<Item = String> {
        let some = if self.has_secrets() {
            &SECRETS[..]
        } else {
            &[]
        };
        let words = some.iter().flat_map(|secret| ["--object", *secret]);
        words.map(str::to_owned)
    }

    /// The image as words for a tool.
    pub fn image_words(&self) -> Vec<String> {
        let words = match self.has_secrets() {
            true => vec!["--image-opts".to_owned(), self.image_options()],
            false => ["-f", "qcow2", IMAGE].map(str::to_owned).to_vec(),
        };
        self.secrets().chain(words).collect()
    }

    /// The words of a command line of `qemu-img`, in which `@` is the image.
    pub fn words(&self, line: &str) -> Vec<String> {
        let mut words = Vec::new();
        for word in line.split(' ') {
            match word {
                // This command guesses.
                "@" if line.starts_with("snapshot") && !self.has_secrets() => {
                    words.push(IMAGE.to_owned());
                }
                "@" => words.extend(self.image_words()),
                _ => words.push(word.to_owned()),
            }
        }
        if !line.contains('@') {
            words.splice(1..1, self.secrets());
        }
        words
    }

    /// The words of a session of `qemu-io`.
    pub fn io_words(&self, cache: &str, commands: &[String]) -> Vec<String> {
        let mut words = vec!["-t".to_owned(), cache.to_owned()];
        for command in commands {
            words.extend(["-c".to_owned(), command.clone()]);
        }
        words.extend(self.image_words());
        words
    }

    /// The image gets one more password, which is the one that is used from now on.
    pub fn add_key(&mut self, side: &Tools, id: &'static str) {
        let options = format!("encrypt.state=active,encrypt.new-secret={id},encrypt.iter-time=1");
        if self.try_img(side, &format!("amend -o {options} @")) {
            self.secret = Some(id);
        }
    }

    /// A password is taken away; then neither side gets in with it.
    pub fn erase_key(&mut self, side: &Tools, id: &'static str) {
        let options = format!("encrypt.state=inactive,encrypt.old-secret={id}");
        if !self.try_img(side, &format!("amend -o {options} @")) {
            return;
        }
        let good = self.secret.replace(id);
        let words = self.io_words("writeback", &["read 0 512".to_owned()]);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let told = self.sides.map(|side| {
            let output = self.bench.output(&side.qemu_io, &words);
            assert!(!output.status.success(), "{id} opens it: {}", self.story);
            output.stderr
        });
        assert_eq!(told[0], told[1], "after {}", self.story);
        self.secret = good;
    }

    /// No sector that was written shows in the files.
    pub fn check_nothing_shows(&self) {
        for name in [IMAGE, &self.data_file] {
            if !self.bench.path(name).exists() {
                continue;
            }
            let is_plain = |sector: &[u8]| {
                !IN_METADATA.contains(&sector[0]) && sector.iter().all(|b| *b == sector[0])
            };
            let plain = self.bench.read(name).chunks(512).position(is_plain);
            assert_eq!(
                plain, None,
                "a sector of {name} is not encrypted after {}",
                self.story
            );
        }
    }
}
