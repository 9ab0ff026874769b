// SPDX-License-Identifier: MIT OR Apache-2.0
//! Secrets as command lines describe them: `--object secret,id=ID,data=...|file=...,format=raw|base64[,keyid=ID,iv=...]`. Called by the tools.
//!
//! With `keyid`, the bytes are encrypted with another secret: AES-256 in CBC mode with the padding of PKCS #7, so that command lines and files may be seen by
//! others as long as one key is not. No message repeats the bytes.

use std::fs::File;
use std::io::Read;

use base64ct::{Base64, Encoding};
use blockcore::{BlockError, OptionValue, Options, Result, Secret, Secrets};
use zeroize::Zeroizing;

use crate::algorithm::CipherAlg;
use crate::block_cipher::block_cipher;
use crate::modes;
use crate::sector::SECTOR_BYTES;

/// The types of objects that QEMU's tools have and this crate has not.
const OTHER_TYPES: [&str; 13] = [
    "authz-list",
    "authz-list-file",
    "authz-pam",
    "authz-simple",
    "iothread",
    "main-loop",
    "pr-manager-helper",
    "secret_keyring",
    "thread-context",
    "throttle-group",
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-creds-x509",
];

const MEMBERS: [&str; 5] = ["data", "file", "format", "iv", "keyid"];

/// The longest file that is read for a secret, in bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Bytes of a block of AES.
const BLOCK_BYTES: usize = 16;

/// What a definition came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Defined {
    /// There is one more secret.
    Added,
    /// The definition asked for help, which is this text.
    Help(String),
}

fn invalid<T>(text: impl Into<String>) -> Result<T> {
    Err(BlockError::invalid(text))
}

/// Adds the secret that the argument of `--object` describes: `secret,id=...`, or the same as JSON. Reads a file where it names one, and waits for it.
///
/// # Errors
/// `InvalidArgument` and `NotFound` in the words of QEMU's tools; those of reading the file; `Unsupported` for objects that are no secrets.
pub fn define(text: &str, secrets: &Secrets) -> Result<Defined> {
    let mut options = match parse(text)? {
        Parsed::Options(options) => options,
        Parsed::Help(text) => return Ok(Defined::Help(text)),
    };
    let Some(kind) = options.take_str("qom-type") else {
        return invalid("Parameter 'qom-type' is missing");
    };
    check_type(&kind)?;
    let Some(id) = take_text(&mut options, "id")? else {
        return invalid("Parameter 'id' is missing");
    };
    let [data, file, format, iv, keyid] = take_members(&mut options)?;
    let is_base64 = match format.as_deref() {
        None | Some("raw") => false,
        Some("base64") => true,
        Some(other) => {
            return invalid(format!(
                "Parameter 'format' does not accept value '{other}'"
            ));
        }
    };
    if let Some(key) = options.keys().next() {
        return invalid(match key.split_once('.') {
            Some((parent, _)) => format!("Parameters '{parent}.*' are unexpected"),
            None => format!("Parameter '{key}' is unexpected"),
        });
    }
    check_id(&id)?;
    let bytes = match (data, file) {
        (Some(_), Some(_)) => return invalid("'file' and 'data' are mutually exclusive"),
        (None, None) => return invalid("Either 'file' or 'data' must be provided"),
        (Some(data), None) => Zeroizing::new(data.into_bytes()),
        (None, Some(file)) => read_file(&file)?,
    };
    let secret = match keyid {
        Some(keyid) => decrypt(bytes, is_base64, iv, &secrets.get(&keyid)?)?,
        None if is_base64 => decode(&bytes)?,
        None => bytes,
    };
    secrets.add(&id, Secret::new(secret.to_vec()))?;
    Ok(Defined::Added)
}

enum Parsed {
    Options(Options),
    Help(String),
}

/// Reads the syntax. The first word may leave out that it is the type.
fn parse(text: &str) -> Result<Parsed> {
    if text.starts_with('{') {
        let options = Options::from_json(text).map_err(|e| {
            // Here nobody says that it is about options.
            let told = e.text();
            let plain = told.strip_prefix("Could not parse the JSON options: ");
            BlockError::invalid(plain.unwrap_or(&told))
        })?;
        return Ok(Parsed::Options(options));
    }
    let first = text.split(',').next().unwrap_or_default();
    let all = match first.is_empty() || first.contains('=') {
        true => text.to_owned(),
        false => format!("qom-type={text}"),
    };
    let wants_help = |word: &String| word == "help" || word == "?";
    if wants_help(&first.to_owned()) {
        return Ok(Parsed::Help(
            "List of user creatable objects:\n  secret\n".to_owned(),
        ));
    }
    let bare = Options::short_switches(&all);
    if bare.iter().any(|(word, _)| wants_help(word)) {
        check_type(first.trim_start_matches("qom-type="))?;
        let members = MEMBERS.map(|m| match m {
            "format" => format!("  {m}=<QCryptoSecretFormat>\n"),
            _ => format!("  {m}=<string>\n"),
        });
        return Ok(Parsed::Help(format!(
            "secret options:\n{}",
            members.concat()
        )));
    }
    if let Some((word, _)) = bare.iter().find(|(word, _)| !word.is_empty()) {
        return invalid(format!("Expected '=' after parameter '{word}'"));
    }
    match all.is_empty() {
        true => Ok(Parsed::Options(Options::new())),
        // An error would repeat a part of the text, which may be the secret.
        false => Options::from_dotted(&all)
            .map(Parsed::Options)
            .or_else(|_| invalid("Invalid parameter ''")),
    }
}

fn check_type(kind: &str) -> Result<()> {
    match kind {
        "secret" => Ok(()),
        other if OTHER_TYPES.contains(&other) => Err(BlockError::unsupported(format!(
            "Objects of type '{other}' are not supported yet"
        ))),
        other => invalid(format!(
            "Parameter 'qom-type' does not accept value '{other}'"
        )),
    }
}

fn check_id(id: &str) -> Result<()> {
    let is_good = id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
    if is_good {
        return Ok(());
    }
    let hint = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.";
    Err(BlockError::invalid("Parameter 'id' expects an identifier").hint(hint))
}

fn take_text(options: &mut Options, key: &str) -> Result<Option<String>> {
    match options.take(key) {
        None => Ok(None),
        Some(OptionValue::Str(text)) => Ok(Some(text)),
        Some(_) => invalid(format!(
            "Invalid parameter type for '{key}', expected: string"
        )),
    }
}

fn take_members(options: &mut Options) -> Result<[Option<String>; 5]> {
    let mut taken: [Option<String>; 5] = Default::default();
    for (value, key) in taken.iter_mut().zip(MEMBERS) {
        *value = take_text(options, key)?;
    }
    Ok(taken)
}

fn read_file(name: &str) -> Result<Zeroizing<Vec<u8>>> {
    let fail = |e: std::io::Error, what: &str| {
        BlockError::from_io(e).context(format!("Unable to read {name}: {what} file “{name}”"))
    };
    let file = File::open(name).map_err(|e| fail(e, "Failed to open"))?;
    // Room for all at once: a vector that grows leaves what it has outgrown behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(FILE_BYTES_MAX as usize + 64));
    let read = file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes);
    read.map_err(|e| fail(e, "Error reading"))?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return invalid(format!(
            "Unable to read {name}: it is too long for a secret"
        ));
    }
    Ok(bytes)
}

/// Decodes base64; line ends count for nothing.
fn decode(text: &[u8]) -> Result<Zeroizing<Vec<u8>>> {
    let joined: Vec<u8> = text.iter().copied().filter(|b| *b != b'\n').collect();
    let joined = Zeroizing::new(joined);
    let mut bytes = Zeroizing::new(vec![0; joined.len() / 4 * 3]);
    match Base64::decode(&*joined, &mut bytes) {
        Ok(decoded) => Ok(Zeroizing::new(decoded.to_vec())),
        Err(_) => invalid("Base64 data contains invalid characters"),
    }
}

/// Decrypts what another secret has encrypted.
fn decrypt(
    bytes: Zeroizing<Vec<u8>>,
    is_base64: bool,
    iv: Option<String>,
    key: &Secret,
) -> Result<Zeroizing<Vec<u8>>> {
    let alg = CipherAlg::Aes256;
    if key.as_bytes().len() != alg.key_bytes() {
        return invalid(format!("Key should be {} bytes in length", alg.key_bytes()));
    }
    let Some(iv) = iv else {
        return invalid("IV is required to decrypt secret");
    };
    let iv = decode(iv.as_bytes())?;
    let Ok(mut iv) = <[u8; BLOCK_BYTES]>::try_from(&iv[..]) else {
        let text = format!(
            "IV should be {BLOCK_BYTES} bytes in length not {}",
            iv.len()
        );
        return invalid(text);
    };
    let mut bytes = if is_base64 { decode(&bytes)? } else { bytes };
    if !bytes.len().is_multiple_of(BLOCK_BYTES) {
        return invalid(format!(
            "Length {} must be a multiple of block size {BLOCK_BYTES}",
            bytes.len()
        ));
    }
    let cipher = block_cipher(alg, key.as_bytes());
    for piece in bytes.chunks_mut(SECTOR_BYTES) {
        let next = piece.last_chunk().copied();
        modes::cbc_decrypt(&*cipher, iv, piece);
        iv = next.expect("a piece has whole blocks");
    }
    let padding = usize::from(bytes.last().copied().unwrap_or(0));
    let len = bytes.len();
    let is_sound = (1..=BLOCK_BYTES).contains(&padding)
        && bytes
            .iter()
            .rev()
            .take(padding)
            .all(|b| usize::from(*b) == padding);
    if !is_sound {
        // It says no more of what was decrypted than that.
        return invalid("Incorrect number of padding bytes found on decrypted data");
    }
    bytes.truncate(len - padding);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MASTER: &str = "0123456789abcdef0123456789abcdef";
    const IV: &str = "AAECAwQFBgcICQoLDA0ODw==";
    /// `hello`, encrypted by OpenSSL with the two above.
    const ENCRYPTED: &str = "MYNSl5uYV6V9tOH5RSXtDA==";

    fn defined(text: &str) -> Result<Vec<u8>> {
        let secrets = Secrets::new();
        secrets.add("m", Secret::new(MASTER))?;
        assert_eq!(define(text, &secrets)?, Defined::Added);
        Ok(secrets.get("s")?.as_bytes().to_vec())
    }

    #[test]
    fn secrets_come_as_text_as_base64_as_json_and_encrypted() {
        for text in [
            "secret,id=s,data=hello".to_owned(),
            "id=s,qom-type=secret,data=hello,format=raw".to_owned(),
            "secret,id=s,data=aGVsbG8=,format=base64".to_owned(),
            "secret,id=s,data=aGVs\nbG8=\n,format=base64".to_owned(),
            r#"{"qom-type":"secret","id":"s","data":"hello"}"#.to_owned(),
            format!("secret,id=s,data={ENCRYPTED},keyid=m,iv={IV},format=base64"),
        ] {
            assert_eq!(defined(&text).unwrap(), b"hello", "{text}");
        }
        assert_eq!(defined("secret,id=s,data=h,,i").unwrap(), b"h,i");
    }

    #[test]
    fn what_makes_no_sense_is_told() {
        let told = |text: &str| defined(text).unwrap_err().text();
        let cases = [
            ("", "Parameter 'qom-type' is missing"),
            ("id=s", "Parameter 'qom-type' is missing"),
            (
                "foo,id=s",
                "Parameter 'qom-type' does not accept value 'foo'",
            ),
            (
                "iothread,id=s",
                "Objects of type 'iothread' are not supported yet",
            ),
            ("secret", "Parameter 'id' is missing"),
            ("secret,id=3,data=a", "Parameter 'id' expects an identifier"),
            ("secret,id=s", "Either 'file' or 'data' must be provided"),
            (
                "secret,id=s,data=a,file=b",
                "'file' and 'data' are mutually exclusive",
            ),
            ("secret,id=s,file", "Expected '=' after parameter 'file'"),
            ("secret,id=s,data=a,x=1", "Parameter 'x' is unexpected"),
            ("secret,id=s,data.x=1", "Parameters 'data.*' are unexpected"),
            ("secret,=x", "Invalid parameter ''"),
            (
                "secret,id=s,data=a,format=rot13",
                "Parameter 'format' does not accept value 'rot13'",
            ),
            (
                "secret,id=s,data=a*b=,format=base64",
                "Base64 data contains invalid characters",
            ),
            (
                "secret,id=s,file=not/there",
                "Unable to read not/there: Failed to open file “not/there”: No such file or directory",
            ),
            (
                "secret,id=m,data=a",
                "attempt to add duplicate property 'm' to object (type 'container')",
            ),
            ("secret,id=s,data=a,keyid=none", "No secret with id 'none'"),
            (
                "secret,id=s,data=a,keyid=m",
                "IV is required to decrypt secret",
            ),
            (
                "secret,id=s,data=a,keyid=m,iv=AAAA",
                "IV should be 16 bytes in length not 3",
            ),
            (
                r#"{"qom-type":"secret","id":"s","data":3}"#,
                "Invalid parameter type for 'data', expected: string",
            ),
            (r#"{"qom-type":"secret""#, "JSON parse error, premature EOI"),
        ];
        for (text, expected) in cases {
            assert_eq!(told(text), expected, "{text}");
        }
        let long = format!("secret,id=s,data=AAAA,keyid=m,iv={IV},format=base64");
        assert_eq!(told(&long), "Length 3 must be a multiple of block size 16");
        // With another IV the padding comes out wrong.
        let other = format!(
            "secret,id=s,data={ENCRYPTED},keyid=m,iv={},format=base64",
            IV.replace("ODw", "OAA")
        );
        assert_eq!(
            told(&other),
            "Incorrect number of padding bytes found on decrypted data"
        );
    }

    #[test]
    fn help_is_given() {
        for (text, first) in [
            ("help", "List of user creatable objects:"),
            ("secret,help", "secret options:"),
        ] {
            let Defined::Help(text) = define(text, &Secrets::new()).unwrap() else {
                panic!("{text} defined something");
            };
            assert_eq!(text.lines().next(), Some(first));
        }
    }
}
