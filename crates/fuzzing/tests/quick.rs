// SPDX-License-Identifier: MIT OR Apache-2.0
//! The fuzz targets on random bytes, for some seconds: nothing panics, nothing hangs, and the memory that a case takes is bounded.
//!
//! `BLOCKLAYER_FUZZ_CASES` says how many cases (`cargo xtask fuzz --count N`). A case that fails is printed as bytes.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use blocklayer::testing::Rng;
use blocklayer::{CheckFix, OpenOptions};
use fuzzing::{MEMORY_BYTES, seeds};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// A case that takes longer hangs, on any machine.
const CASE_TIME: Duration = Duration::from_secs(20);

/// What is being run, for whoever has to say what hangs.
static NOW: Mutex<Option<(Instant, String)>> = Mutex::new(None);

fn watch() {
    std::thread::spawn(|| {
        loop {
            std::thread::sleep(Duration::from_millis(500));
            let now = NOW.lock().unwrap();
            if let Some((since, what)) = &*now
                && since.elapsed() > CASE_TIME
            {
                eprintln!("hangs: {what}");
                std::process::abort();
            }
        }
    });
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Cases that fail, after which no more are looked for.
const FAILURES: usize = 10;

/// Runs one case, and returns the memory that it took at most, or what it was.
fn case(name: &str, bytes: &[u8], run: fn(&[u8])) -> Result<usize, String> {
    let shown = match bytes.len() {
        0..2000 => hex(bytes),
        n => format!("{n} bytes"),
    };
    let what = format!("{name} of {shown}");
    *NOW.lock().unwrap() = Some((Instant::now(), what.clone()));
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let outcome = std::panic::catch_unwind(|| run(bytes));
    let used = MEMORY.peak_usage().saturating_sub(before);
    *NOW.lock().unwrap() = None;
    match outcome {
        Ok(()) if used <= MEMORY_BYTES => Ok(used),
        Ok(()) => Err(format!("{what}: {used} bytes of memory")),
        Err(_) => Err(format!("{what}: it panics")),
    }
}

/// Keeps the image of a case that fails.
fn keep(seed: u64, name: &str, image: &[u8]) {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let path = dir.join(format!("fuzz-{seed}-{name}.qcow2"));
    if let Err(e) = std::fs::write(&path, image) {
        eprintln!("{}: {e}", path.display());
    }
}

/// A seed image with some bytes changed, most of them in its first clusters.
fn damaged_file(rng: &mut Rng) -> Vec<u8> {
    let all = seeds::all();
    let seed = &all[rng.below(all.len() as u64) as usize];
    let mut bytes = seed.bytes.clone();
    for _ in 0..rng.below(6) {
        let at = match rng.below(3) {
            0 => rng.below(bytes.len() as u64) as usize,
            _ => seed.words[rng.below(seed.words.len() as u64) as usize] + rng.below(8) as usize,
        };
        bytes[at] = rng.next_u64() as u8;
    }
    if rng.chance(10) {
        bytes.truncate(rng.below(bytes.len() as u64 + 1) as usize);
    }
    bytes
}

/// A hole of any length costs a file nothing, and so it must not cost a check one counter for each of its clusters. Part of the one test of this
/// binary, since all memory of the process is counted.
fn check_over_a_hole(image: &[u8], dir: &Path) {
    let path = dir.join("hole.qcow2");
    std::fs::write(&path, image).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(64 << 30).unwrap();
    HOLE.set(path).unwrap();
    let used = case("a check over a hole of 64 GiB", &[], |_| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build();
        runtime.unwrap().block_on(async {
            let open = OpenOptions::new().format("qcow2").read_only(true);
            let name = HOLE.get().unwrap().to_str().unwrap();
            let disk = open.open(&blocklayer::registry(), name).await.unwrap();
            let found = disk.root().driver().check(CheckFix::None).await.unwrap();
            assert_eq!(found.corruptions, 0, "{:?}", found.messages);
            disk.close().await.unwrap();
        });
    });
    let used = used.unwrap();
    println!("a check over a hole of 64 GiB: {} KiB", used >> 10);
}

/// The file of [`check_over_a_hole`].
static HOLE: OnceLock<PathBuf> = OnceLock::new();

#[test]
fn damaged_images_never_harm_the_program() {
    let seed = Rng::seed_from_env();
    let asked = std::env::var("BLOCKLAYER_FUZZ_CASES").ok();
    let cases: u64 = asked.and_then(|n| n.parse().ok()).unwrap_or(1500);
    let dir = tempfile::tempdir().unwrap();
    let tools = std::env::var_os("BLOCKLAYER_QEMU_DIR").unwrap_or_else(|| "/usr/bin".into());
    let mut images = seeds::of_qemu(tools.as_ref(), dir.path());
    let ours = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap()
        .block_on(seeds::ours());
    println!("{} images of QEMU's", images.len());
    let ours = ours.unwrap();
    check_over_a_hole(&ours[0].bytes, dir.path());
    images.extend(ours);
    seeds::use_these(images);
    watch();
    let (mut most, mut failed) = ([0; 2], Vec::new());
    for i in 0..cases {
        let mut rng = Rng::new(seed.wrapping_add(i));
        let file = damaged_file(&mut rng);
        let length = 20 + rng.below(150);
        let bytes: Vec<u8> = (0..length).map(|_| rng.next_u64() as u8).collect();
        let ran = [
            case("open", &file, fuzzing::open),
            case("operations", &bytes, fuzzing::operations),
        ];
        let seed = seed.wrapping_add(i);
        for (most, ran) in most.iter_mut().zip(&ran) {
            match ran {
                Ok(used) => *most = *used.max(most),
                Err(what) => failed.push(format!("seed {seed}: {what}")),
            }
        }
        if ran[0].is_err() {
            keep(seed, "open", &file);
        }
        if ran[1].is_err() {
            keep(seed, "operations", &fuzzing::damaged(&bytes).1);
        }
        if failed.len() >= FAILURES {
            break;
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    println!(
        "{cases} cases of each; the most memory: {} KiB (open), {} KiB (operations)",
        most[0] >> 10,
        most[1] >> 10
    );
}
