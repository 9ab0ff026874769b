// SPDX-License-Identifier: MIT OR Apache-2.0
//! The options that a new volume is made by. Called by `factory`, and by qcow2 for those below `encrypt.`.

use std::time::Duration;

use blockcore::{BlockError, CreateOption, OptionKind, Options, Result};

use crate::algorithm::{CipherAlg, CipherMode, CipherSpec, HashAlg, IvGen};
use crate::volume::NewVolume;

/// How long it takes to try a password where nothing is said, in milliseconds.
pub(crate) const ITER_TIME_MS: u64 = 2000;

const fn option(name: &'static str, kind: OptionKind, help: &'static str) -> CreateOption {
    CreateOption {
        name,
        kind,
        help,
        default: None,
    }
}

/// What `-o help` shows, in the order in which a plan shows it.
pub(crate) const CREATE_OPTIONS: &[CreateOption] = &[
    option("size", OptionKind::Size, "Length of the disk"),
    option(
        "key-secret",
        OptionKind::String,
        "Id of the secret that is the password of the first key slot",
    ),
    option(
        "cipher-alg",
        OptionKind::String,
        "Cipher with its key length: aes-256 if not given",
    ),
    option(
        "cipher-mode",
        OptionKind::String,
        "How the blocks of a sector are chained: xts if not given",
    ),
    option(
        "ivgen-alg",
        OptionKind::String,
        "Where initialisation vectors come from: plain64 if not given",
    ),
    option(
        "ivgen-hash-alg",
        OptionKind::String,
        "Hash of the key for essiv: sha256 if not given",
    ),
    option(
        "hash-alg",
        OptionKind::String,
        "Hash that passwords go through: sha256 if not given",
    ),
    option(
        "iter-time",
        OptionKind::Number,
        "Milliseconds that it takes to try a password: 2000 if not given",
    ),
    option(
        "detached-header",
        OptionKind::Bool,
        "Keep the header in a file of its own",
    ),
];

/// What can be changed later: passwords.
pub(crate) const AMEND_OPTIONS: &[CreateOption] = &[
    option(
        "state",
        OptionKind::String,
        "What becomes of key slots: active or inactive",
    ),
    option(
        "new-secret",
        OptionKind::String,
        "Id of the secret that is the password of a slot that becomes active",
    ),
    option(
        "old-secret",
        OptionKind::String,
        "Id of the secret that is the password of slots that become inactive",
    ),
    option("keyslot", OptionKind::Number, "The slot, from 0 to 7"),
    option(
        "iter-time",
        OptionKind::Number,
        "Milliseconds that it takes to try the new password: 2000 if not given",
    ),
];

/// The value of an option by its name in a table of names.
fn take_name<T>(
    options: &mut Options,
    key: &str,
    default: T,
    from_name: impl Fn(&str) -> Option<T>,
) -> Result<T> {
    let Some(name) = options.take_str(key) else {
        return Ok(default);
    };
    from_name(&name).ok_or_else(|| {
        BlockError::invalid(format!("Parameter '{key}' does not accept value '{name}'"))
    })
}

impl NewVolume {
    /// Takes what a volume is to be out of `options`: `cipher-alg`, `cipher-mode`, `ivgen-alg`, `ivgen-hash-alg`, `hash-alg`, `iter-time`.
    ///
    /// # Errors
    /// `InvalidArgument` with a text that names the option; `Unsupported` for what can't be put together.
    pub fn take(options: &mut Options) -> Result<NewVolume> {
        let alg = take_name(
            options,
            "cipher-alg",
            CipherAlg::Aes256,
            CipherAlg::from_name,
        )?;
        let mode = take_name(
            options,
            "cipher-mode",
            CipherMode::Xts,
            CipherMode::from_name,
        )?;
        let iv_gen = take_name(options, "ivgen-alg", IvGen::Plain64, IvGen::from_name)?;
        let some_hash = |name: &str| HashAlg::from_name(name).map(Some);
        let iv_default = (iv_gen == IvGen::Essiv).then_some(HashAlg::Sha256);
        let iv_hash = take_name(options, "ivgen-hash-alg", iv_default, some_hash)?;
        let hash = take_name(options, "hash-alg", HashAlg::Sha256, HashAlg::from_name)?;
        let iter_time = options.take_number("iter-time")?.unwrap_or(ITER_TIME_MS);
        let spec = CipherSpec {
            alg,
            mode,
            iv_gen,
            iv_hash,
        };
        spec.check()?;
        Ok(NewVolume {
            spec,
            hash,
            iter_time: Duration::from_millis(iter_time),
        })
    }
}
