// SPDX-License-Identifier: MIT OR Apache-2.0
//! Hashes at work: digests, and PBKDF2 with HMAC (RFC 8018), which takes its time on purpose.
//!
//! The loop of PBKDF2 is here, over the crate `hmac`, and not a crate's, because it has to end when nobody waits for it any more: a header may ask for
//! four billion rounds. It is also what is measured to choose how many rounds a new key slot gets.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use digest::{Digest, FixedOutput, Update};
use hmac::{EagerHash, Hmac, KeyInit};
use rustix::time::{ClockId, clock_gettime};
use zeroize::{Zeroize, Zeroizing};

use crate::algorithm::HashAlg;

/// Calls a generic function for the type of a hash.
macro_rules! with_hash {
    ($alg:expr, $function:ident($($arg:expr),*)) => {
        match $alg {
            HashAlg::Md5 => $function::<md5::Md5>($($arg),*),
            HashAlg::Sha1 => $function::<sha1::Sha1>($($arg),*),
            HashAlg::Sha224 => $function::<sha2::Sha224>($($arg),*),
            HashAlg::Sha256 => $function::<sha2::Sha256>($($arg),*),
            HashAlg::Sha384 => $function::<sha2::Sha384>($($arg),*),
            HashAlg::Sha512 => $function::<sha2::Sha512>($($arg),*),
            HashAlg::Ripemd160 => $function::<ripemd::Ripemd160>($($arg),*),
            HashAlg::Sm3 => $function::<sm3::Sm3>($($arg),*),
        }
    };
}

/// Nobody waits for the result any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stopped;

/// How often PBKDF2 looks whether it is to stop, in rounds: every few milliseconds.
const ROUNDS_BETWEEN_LOOKS: u32 = 1 << 14;

/// How long the speed of PBKDF2 is measured.
const MEASURE: Duration = Duration::from_millis(100);

impl HashAlg {
    /// Bytes of a digest.
    pub fn digest_bytes(self) -> usize {
        match self {
            HashAlg::Md5 => 16,
            HashAlg::Sha1 | HashAlg::Ripemd160 => 20,
            HashAlg::Sha224 => 28,
            HashAlg::Sha256 | HashAlg::Sm3 => 32,
            HashAlg::Sha384 => 48,
            HashAlg::Sha512 => 64,
        }
    }

    /// The digest of all parts, one behind the other.
    pub(crate) fn digest(self, parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
        with_hash!(self, digest_of(parts))
    }

    /// Fills `out` with a key made of a password: PBKDF2. Takes as long as `rounds` says; not for an executor's thread.
    ///
    /// # Errors
    /// [`Stopped`] soon after `stop` was set.
    pub(crate) fn pbkdf2(
        self,
        password: &[u8],
        salt: &[u8],
        rounds: u32,
        out: &mut [u8],
        stop: &AtomicBool,
    ) -> Result<(), Stopped> {
        let go_on = |_: u64| match stop.load(Ordering::Relaxed) {
            true => Err(Stopped),
            false => Ok(()),
        };
        with_hash!(self, pbkdf2_of(password, salt, rounds, out, &go_on))
    }

    /// How many rounds of PBKDF2 this machine does in `time`, for keys of `key_bytes` bytes. Takes a tenth of a second of one processor.
    pub(crate) fn rounds_in(self, time: Duration, key_bytes: usize) -> u64 {
        let begin = cpu_time();
        // One block, as long as the time lasts: a key is made block by block, and each takes as long as the others.
        let mut block = vec![0; self.digest_bytes().min(key_bytes)];
        let rounds = Cell::new(0u64);
        let until_over = |done: u64| {
            rounds.set(done);
            match cpu_time().saturating_sub(begin) >= MEASURE {
                true => Err(Stopped),
                false => Ok(()),
            }
        };
        let _stopped = with_hash!(
            self,
            pbkdf2_of(b"measure", &[0; 32], u32::MAX, &mut block, &until_over)
        );
        let spent = cpu_time().saturating_sub(begin).as_nanos().max(1);
        let blocks = key_bytes.div_ceil(self.digest_bytes()).max(1);
        let in_time = u128::from(rounds.get()) * time.as_nanos() / spent;
        u64::try_from(in_time / blocks as u128).unwrap_or(u64::MAX)
    }
}

/// What this thread has used of a processor: other threads' work must not make keys weaker.
fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

fn digest_of<D: Digest>(parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
    let mut hash = D::new();
    for part in parts {
        Digest::update(&mut hash, part);
    }
    // The way to a key leads by digests.
    let mut digest = hash.finalize();
    let copy = Zeroizing::new(digest.to_vec());
    digest.zeroize();
    copy
}

fn pbkdf2_of<D: EagerHash>(
    password: &[u8],
    salt: &[u8],
    rounds: u32,
    out: &mut [u8],
    go_on: &dyn Fn(u64) -> Result<(), Stopped>,
) -> Result<(), Stopped> {
    let keyed = <Hmac<D> as KeyInit>::new_from_slice(password);
    let keyed = keyed.expect("HMAC takes keys of any length");
    let block_bytes = <Hmac<D> as digest::OutputSizeUser>::output_size();
    for (index, block) in (1u32..).zip(out.chunks_mut(block_bytes)) {
        let first = keyed.clone().chain(salt);
        let mut round = first.chain(index.to_be_bytes()).finalize_fixed();
        block.copy_from_slice(&round[..block.len()]);
        let mut done = 1;
        while done < rounds {
            let stop_at = done.saturating_add(ROUNDS_BETWEEN_LOOKS).min(rounds);
            for _ in done..stop_at {
                round = keyed.clone().chain(&round).finalize_fixed();
                for (sum, byte) in block.iter_mut().zip(&round) {
                    *sum ^= byte;
                }
            }
            done = stop_at;
            go_on(done.into()).inspect_err(|_| block.zeroize())?;
        }
        round.zeroize();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    fn derive(hash: HashAlg, password: &[u8], salt: &[u8], rounds: u32, bytes: usize) -> String {
        let mut out = vec![0; bytes];
        let never = AtomicBool::new(false);
        hash.pbkdf2(password, salt, rounds, &mut out, &never)
            .unwrap();
        hex(&out)
    }

    #[test]
    fn pbkdf2_gives_what_the_rfcs_say() {
        // RFC 6070.
        assert_eq!(
            derive(HashAlg::Sha1, b"password", b"salt", 1, 20),
            "0c60c80f961f0e71f3a9b524af6012062fe037a6"
        );
        assert_eq!(
            derive(HashAlg::Sha1, b"password", b"salt", 4096, 20),
            "4b007901b765489abead49d926f721d065a429c1"
        );
        assert_eq!(
            derive(
                HashAlg::Sha1,
                b"passwordPASSWORDpassword",
                b"saltSALTsaltSALTsaltSALTsaltSALTsalt",
                4096,
                25
            ),
            "3d2eec4fe41c849b80c8d83662c0e44a8b291a964cf2f07038"
        );
        // RFC 7914, section 11.
        assert_eq!(
            derive(HashAlg::Sha256, b"passwd", b"salt", 1, 64),
            "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc\
             49ca9cccf179b645991664b39d77ef317c71b845b1e30bd509112041d3a19783"
        );
    }

    #[test]
    fn a_digest_is_as_long_as_it_says() {
        for name in [
            "md5",
            "sha1",
            "sha224",
            "sha256",
            "sha384",
            "sha512",
            "ripemd160",
            "sm3",
        ] {
            let hash = HashAlg::from_name(name).unwrap();
            assert_eq!(
                hash.digest(&[b"a", b"bc"]),
                hash.digest(&[b"abc"]),
                "{name}"
            );
            assert_eq!(hash.digest(&[]).len(), hash.digest_bytes(), "{name}");
        }
    }

    #[test]
    fn it_stops_when_told_to() {
        let stop = AtomicBool::new(true);
        let mut out = [0xff; 64];
        let ended = HashAlg::Sha256.pbkdf2(b"p", b"s", u32::MAX, &mut out, &stop);
        assert_eq!(ended, Err(Stopped));
    }

    #[test]
    fn rounds_are_measured_per_key() {
        let one = HashAlg::Sha1.rounds_in(Duration::from_secs(1), 20);
        let four = HashAlg::Sha1.rounds_in(Duration::from_secs(1), 80);
        assert!(one > 1000, "{one}");
        // A quarter, give or take what the machine does meanwhile.
        assert!((one / 12..one / 2).contains(&four), "{one} {four}");
    }
}
