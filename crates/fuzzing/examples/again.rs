// SPDX-License-Identifier: MIT OR Apache-2.0
//! Does a case again that a fuzzer has kept: `cargo run -p fuzzing --example again -- open|ops FILE`. Takes the seeds that `cargo xtask fuzz` has made.

fn main() -> std::io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [target, file] = &arguments[..] else {
        eprintln!("again: open|ops FILE");
        std::process::exit(2);
    };
    let bytes = std::fs::read(file)?;
    let begun = std::time::Instant::now();
    match target.as_str() {
        "open" => fuzzing::open(&bytes),
        _ => fuzzing::operations(&bytes),
    }
    println!("{:?}", begun.elapsed());
    Ok(())
}
