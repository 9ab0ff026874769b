// SPDX-License-Identifier: MIT OR Apache-2.0
//! `qemu-img map`.

use blockcore::Backend;
use blockjob::{Extent, Extents};
use toolkit::getopt::{Arg, Long, long};

use crate::Tool;
use crate::console::Outcome;
use crate::image::Image;
use crate::number::MAX;
use crate::options::{IMAGE_OPTS, OBJECT, OUTPUT, Output, Words};

const LONG: &[Long] = &[
    long("help", Arg::No, 'h'),
    long("format", Arg::Required, 'f'),
    long("image-opts", Arg::No, IMAGE_OPTS),
    long("start-offset", Arg::Required, 's'),
    long("max-length", Arg::Required, 'l'),
    long("output", Arg::Required, OUTPUT),
    long("force-share", Arg::No, 'U'),
    long("object", Arg::Required, OBJECT),
];

impl Tool {
    pub(crate) async fn map(&self, args: &[String]) -> Outcome {
        let (mut format, mut image_opts) = (None, false);
        let (mut force_share, mut output) = (false, Output::Human);
        let (mut start, mut length) = (0, MAX);
        let mut words = Words::new(self, "map", args, "f:s:l:hU", LONG);
        while let Some(option) = words.next()? {
            match option.value {
                'f' => format = Some(option.arg),
                'U' => force_share = true,
                OUTPUT => output = words.output(&option.arg)?,
                's' => start = self.number("start offset", &option.arg, 0, MAX)?,
                'l' => length = self.number("max length", &option.arg, 0, MAX)?,
                _ => image_opts = true,
            }
        }
        let name = words.one_positional()?;
        self.check_image_opts(image_opts, format.as_deref())?;
        let image = Image {
            force_share,
            ..Image::new(name, format, image_opts)
        };
        let disk = self.open(image).await?;
        let printed = self.print_map(&disk, start, length, output).await;
        let closed = self.close(disk).await;
        printed.and(closed)
    }

    async fn print_map(&self, disk: &Backend, start: u64, length: u64, output: Output) -> Outcome {
        match output {
            Output::Human => {
                let [a, b, c, d] = ["Offset", "Length", "Mapped to", "File"];
                self.console.line(&format!("{a:<16}{b:<16}{c:<16}{d}"));
            }
            Output::Json => self.console.print("["),
        }
        let mut extents = Extents::new(disk, start, length);
        let mut count = 0;
        loop {
            let next = extents.next().await.map_err(|e| {
                let text = format!("Could not read file metadata: {}", e.strerror());
                self.console.fail(&text)
            })?;
            let extent = match next {
                Some(extent) => extent,
                // An empty range still is an entry.
                None if count == 0 => Extent {
                    start,
                    ..Extent::default()
                },
                None => break,
            };
            match output {
                Output::Human => self.print_row(&extent)?,
                Output::Json => {
                    let separator = if count > 0 { ",\n" } else { "" };
                    self.console
                        .print(&format!("{separator}{}", json_entry(&extent)));
                }
            }
            count += 1;
        }
        if output == Output::Json {
            self.console.line("]");
        }
        Ok(())
    }

    fn print_row(&self, extent: &Extent) -> Outcome {
        if !extent.data || extent.zero {
            return match extent.data && extent.offset.is_none() {
                true => Err(self.unmappable()),
                false => Ok(()),
            };
        }
        let Some(offset) = extent.offset else {
            return Err(self.unmappable());
        };
        let file = extent.file.as_ref().map(|f| f.full_name());
        let file = file.as_deref().unwrap_or("");
        let hex = |n: u64| {
            if n == 0 {
                "0".to_owned()
            } else {
                format!("{n:#x}")
            }
        };
        self.console.line(&format!(
            "{:<16}{:<16}{:<16}{file}",
            hex(extent.start),
            hex(extent.length),
            hex(offset)
        ));
        Ok(())
    }

    fn unmappable(&self) -> crate::console::Failed {
        self.console
            .fail("File contains external, encrypted or compressed clusters.")
    }
}

fn json_entry(e: &Extent) -> String {
    let mut out = format!(
        "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \"compressed\": {}",
        e.start, e.length, e.depth, e.present, e.zero, e.data, e.compressed
    );
    if let Some(offset) = e.offset {
        out.push_str(&format!(", \"offset\": {offset}"));
    }
    out.push('}');
    out
}
