// SPDX-License-Identifier: MIT OR Apache-2.0
//! Writes the seed images into a directory, one file each: `cargo run -p fuzzing --example seeds -- DIR [QEMU_DIR]`.

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let dir = std::path::PathBuf::from(arguments.next().unwrap_or_else(|| "seeds".into()));
    let tools = arguments.next().unwrap_or_else(|| "/usr/bin".into());
    std::fs::create_dir_all(&dir)?;
    let scratch = dir.join("scratch");
    let mut seeds = fuzzing::seeds::of_qemu(tools.as_ref(), &scratch);
    std::fs::remove_dir_all(&scratch)?;
    seeds.extend(fuzzing::seeds::all().iter().cloned());
    for (number, seed) in seeds.iter().enumerate() {
        let name = seed.name.replace(['=', ',', '.'], "-");
        let path = dir.join(format!("{number:02}-{name}"));
        std::fs::write(&path, &seed.bytes)?;
        if !seed.data.is_empty() {
            let mut path = path.into_os_string();
            path.push(fuzzing::seeds::DATA_SUFFIX);
            std::fs::write(path, &seed.data)?;
        }
    }
    println!("{} images in {}", seeds.len(), dir.display());
    Ok(())
}
