// SPDX-License-Identifier: MIT OR Apache-2.0
//! The names of algorithms: ciphers, modes, IV generators, hashes; and [`CipherSpec`], how they are put together and written in a header.
//!
//! An algorithm has a name in options (`aes-256`) and one in headers (`aes`, with the length of the key beside it).

use blockcore::{BlockError, Result};

/// A block cipher with its key length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say all there is to say")]
pub enum CipherAlg {
    Aes128,
    Aes192,
    Aes256,
    Cast5,
    Serpent128,
    Serpent192,
    Serpent256,
    Twofish128,
    Twofish192,
    Twofish256,
}

/// How blocks of a sector are chained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say all there is to say")]
pub enum CipherMode {
    Ecb,
    Cbc,
    Ctr,
    Xts,
}

/// How a sector's number becomes an initialisation vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IvGen {
    /// The lower 32 bits of the number.
    Plain,
    /// The number.
    Plain64,
    /// The number, encrypted with a hash of the key.
    Essiv,
}

/// A hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say all there is to say")]
pub enum HashAlg {
    Md5,
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
    Ripemd160,
    Sm3,
}

const CIPHERS: [(CipherAlg, &str); 10] = [
    (CipherAlg::Aes128, "aes-128"),
    (CipherAlg::Aes192, "aes-192"),
    (CipherAlg::Aes256, "aes-256"),
    (CipherAlg::Cast5, "cast5-128"),
    (CipherAlg::Serpent128, "serpent-128"),
    (CipherAlg::Serpent192, "serpent-192"),
    (CipherAlg::Serpent256, "serpent-256"),
    (CipherAlg::Twofish128, "twofish-128"),
    (CipherAlg::Twofish192, "twofish-192"),
    (CipherAlg::Twofish256, "twofish-256"),
];

const MODES: [(CipherMode, &str); 4] = [
    (CipherMode::Ecb, "ecb"),
    (CipherMode::Cbc, "cbc"),
    (CipherMode::Ctr, "ctr"),
    (CipherMode::Xts, "xts"),
];

const IV_GENS: [(IvGen, &str); 3] = [
    (IvGen::Plain, "plain"),
    (IvGen::Plain64, "plain64"),
    (IvGen::Essiv, "essiv"),
];

const HASHES: [(HashAlg, &str); 8] = [
    (HashAlg::Md5, "md5"),
    (HashAlg::Sha1, "sha1"),
    (HashAlg::Sha224, "sha224"),
    (HashAlg::Sha256, "sha256"),
    (HashAlg::Sha384, "sha384"),
    (HashAlg::Sha512, "sha512"),
    (HashAlg::Ripemd160, "ripemd160"),
    (HashAlg::Sm3, "sm3"),
];

/// The entry of a value in a table of names.
fn name_in<T: Copy + PartialEq>(table: &[(T, &'static str)], value: T) -> &'static str {
    let found = table.iter().find(|(v, _)| *v == value);
    found
        .map(|(_, name)| *name)
        .expect("every value has a name")
}

/// The value of a name, if there is one.
fn value_in<T: Copy>(table: &[(T, &'static str)], name: &str) -> Option<T> {
    table.iter().find(|(_, n)| *n == name).map(|(v, _)| *v)
}

impl CipherAlg {
    /// The name in options: `aes-256`.
    pub fn name(self) -> &'static str {
        name_in(&CIPHERS, self)
    }

    /// The cipher of a name in options.
    pub fn from_name(name: &str) -> Option<CipherAlg> {
        value_in(&CIPHERS, name)
    }

    /// The name in headers: `aes`.
    pub fn header_name(self) -> &'static str {
        let (family, _bits) = self.name().split_once('-').expect("names have both");
        family
    }

    /// The cipher of a name in a header, for keys of so many bytes.
    pub fn from_header(name: &str, key_bytes: usize) -> Option<CipherAlg> {
        let is_it = |alg: &CipherAlg| alg.header_name() == name && alg.key_bytes() == key_bytes;
        CIPHERS.iter().map(|(alg, _)| *alg).find(is_it)
    }

    /// Bytes of a key.
    pub fn key_bytes(self) -> usize {
        match self {
            CipherAlg::Aes128
            | CipherAlg::Cast5
            | CipherAlg::Serpent128
            | CipherAlg::Twofish128 => 16,
            CipherAlg::Aes192 | CipherAlg::Serpent192 | CipherAlg::Twofish192 => 24,
            CipherAlg::Aes256 | CipherAlg::Serpent256 | CipherAlg::Twofish256 => 32,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            CipherAlg::Cast5 => 8,
            _ => 16,
        }
    }
}

impl CipherMode {
    /// The name: `xts`.
    pub fn name(self) -> &'static str {
        name_in(&MODES, self)
    }

    /// The mode of a name.
    pub fn from_name(name: &str) -> Option<CipherMode> {
        value_in(&MODES, name)
    }
}

impl IvGen {
    /// The name: `plain64`.
    pub fn name(self) -> &'static str {
        name_in(&IV_GENS, self)
    }

    /// The generator of a name.
    pub fn from_name(name: &str) -> Option<IvGen> {
        value_in(&IV_GENS, name)
    }
}

impl HashAlg {
    /// The name: `sha256`.
    pub fn name(self) -> &'static str {
        name_in(&HASHES, self)
    }

    /// The hash of a name.
    pub fn from_name(name: &str) -> Option<HashAlg> {
        value_in(&HASHES, name)
    }
}

/// How sectors are encrypted: cipher, mode, IV generator and its hash. Not every combination makes sense; [`check`](CipherSpec::check) tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CipherSpec {
    /// The cipher.
    pub alg: CipherAlg,
    /// How blocks are chained.
    pub mode: CipherMode,
    /// Where initialisation vectors come from.
    pub iv_gen: IvGen,
    /// What ESSIV hashes the key with; other generators carry it for nothing.
    pub iv_hash: Option<HashAlg>,
}

impl CipherSpec {
    /// Bytes of the key of all: XTS needs two keys.
    pub fn key_bytes(&self) -> usize {
        match self.mode {
            CipherMode::Xts => 2 * self.alg.key_bytes(),
            _ => self.alg.key_bytes(),
        }
    }

    /// The cipher that ESSIV encrypts sector numbers with: the same one, for a key as long as the hash.
    ///
    /// # Errors
    /// `Unsupported` if there is none.
    pub(crate) fn essiv_cipher(&self, hash: HashAlg) -> Result<CipherAlg> {
        let (family, bytes) = (self.alg.header_name(), hash.digest_bytes());
        CipherAlg::from_header(family, bytes).ok_or_else(|| {
            let spoken = match family {
                "aes" => "AES",
                "serpent" => "Serpent",
                "twofish" => "Twofish",
                _ => {
                    let text = format!("Cipher {} not supported with essiv", self.alg.name());
                    return BlockError::unsupported(text);
                }
            };
            BlockError::unsupported(format!(
                "No {spoken} cipher with key size {bytes} available"
            ))
        })
    }

    /// Refuses what can't be put together.
    ///
    /// # Errors
    /// `Unsupported`, `InvalidArgument`.
    pub fn check(&self) -> Result<()> {
        if self.mode == CipherMode::Xts && self.alg.block_bytes() != 16 {
            return Err(BlockError::unsupported("Unsupported cipher mode xts"));
        }
        match (self.iv_gen, self.iv_hash) {
            (IvGen::Essiv, None) => Err(BlockError::invalid(
                "Missing IV generator hash specification",
            )),
            (IvGen::Essiv, Some(hash)) => self.essiv_cipher(hash).map(|_| ()),
            _ => Ok(()),
        }
    }

    /// Mode and IV generator as a header has them: `cbc-essiv:sha256`.
    pub fn mode_text(&self) -> String {
        let (mode, iv_gen) = (self.mode.name(), self.iv_gen.name());
        match self.iv_hash {
            Some(hash) => format!("{mode}-{iv_gen}:{}", hash.name()),
            None => format!("{mode}-{iv_gen}"),
        }
    }

    /// The combination that a header describes.
    ///
    /// # Errors
    /// `Unsupported` for what this crate doesn't know, `InvalidArgument` for what makes no sense.
    pub fn from_header(cipher: &str, mode_text: &str, key_bytes: usize) -> Result<CipherSpec> {
        let unsupported = |text: String| BlockError::unsupported(text);
        let Some((mode_name, iv_text)) = mode_text.split_once('-') else {
            let text = format!("Unexpected cipher mode string format '{mode_text}'");
            return Err(BlockError::invalid(text));
        };
        let (iv_name, iv_hash) = match iv_text.split_once(':') {
            Some((name, hash)) => (name, Some(hash)),
            None => (iv_text, None),
        };
        let mode = CipherMode::from_name(mode_name)
            .ok_or_else(|| unsupported(format!("Cipher mode '{mode_name}' not supported")))?;
        let alg_bytes = match mode {
            CipherMode::Xts if key_bytes % 2 == 1 => {
                let text = "XTS cipher key length should be a multiple of 2";
                return Err(BlockError::invalid(text));
            }
            CipherMode::Xts => key_bytes / 2,
            _ => key_bytes,
        };
        let alg = CipherAlg::from_header(cipher, alg_bytes).ok_or_else(|| {
            unsupported(format!(
                "Algorithm '{cipher}' with key size {alg_bytes} bytes not supported"
            ))
        })?;
        let iv_gen = IvGen::from_name(iv_name)
            .ok_or_else(|| unsupported(format!("IV generator '{iv_name}' not supported")))?;
        let iv_hash = iv_hash.map(hash_of_header).transpose()?;
        let spec = CipherSpec {
            alg,
            mode,
            iv_gen,
            iv_hash,
        };
        spec.check()?;
        Ok(spec)
    }
}

/// The hash that a header names.
///
/// # Errors
/// `Unsupported`.
pub(crate) fn hash_of_header(name: &str) -> Result<HashAlg> {
    HashAlg::from_name(name)
        .ok_or_else(|| BlockError::unsupported(format!("Hash algorithm '{name}' not supported")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_as_it_was_written() {
        for (alg, _) in CIPHERS {
            for (mode, _) in MODES {
                for (iv_gen, _) in IV_GENS {
                    for iv_hash in [None, Some(HashAlg::Sha256), Some(HashAlg::Md5)] {
                        let spec = CipherSpec {
                            alg,
                            mode,
                            iv_gen,
                            iv_hash,
                        };
                        let (cipher, text) = (alg.header_name(), spec.mode_text());
                        let read = CipherSpec::from_header(cipher, &text, spec.key_bytes());
                        match spec.check() {
                            Ok(()) => assert_eq!(read.unwrap(), spec),
                            Err(e) => assert_eq!(read.unwrap_err().text(), e.text()),
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_a_header_cannot_mean_is_told() {
        let told = |cipher, mode, bytes| {
            let read = CipherSpec::from_header(cipher, mode, bytes);
            read.unwrap_err().text()
        };
        assert_eq!(
            told("aes", "xts", 64),
            "Unexpected cipher mode string format 'xts'"
        );
        assert_eq!(
            told("aes", "gcm-plain64", 32),
            "Cipher mode 'gcm' not supported"
        );
        assert_eq!(
            told("aes", "xts-null", 64),
            "IV generator 'null' not supported"
        );
        assert_eq!(
            told("aes", "cbc-essiv", 32),
            "Missing IV generator hash specification"
        );
        assert_eq!(
            told("aes", "cbc-essiv:sha0", 32),
            "Hash algorithm 'sha0' not supported"
        );
        assert_eq!(
            told("aes", "cbc-essiv:sha1", 32),
            "No AES cipher with key size 20 available"
        );
        assert_eq!(
            told("cast5", "cbc-essiv:sha256", 16),
            "Cipher cast5-128 not supported with essiv"
        );
        assert_eq!(
            told("cast5", "xts-plain64", 32),
            "Unsupported cipher mode xts"
        );
        assert_eq!(
            told("aes", "xts-plain64", 33),
            "XTS cipher key length should be a multiple of 2"
        );
        assert_eq!(
            told("aes", "xts-plain64", 128),
            "Algorithm 'aes' with key size 64 bytes not supported"
        );
    }
}
