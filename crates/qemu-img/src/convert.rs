// SPDX-License-Identifier: MIT OR Apache-2.0
//! `qemu-img convert`.

use blockcore::{Backend, Diagnostics, Options, SnapshotSelector, WriteFlags, chain_is_zero};
use blockjob::convert::MAX_PARALLEL;
use blockjob::create::{check_options, known_options};
use blockjob::{ConvertOptions, CreatePlan, CreateRequest, convert};
use toolkit::cache::CacheMode;
use toolkit::getopt::{Arg, Long, long};

use crate::Tool;
use crate::bitmap::CopyBitmaps;
use crate::console::Outcome;
use crate::create::CreateOptions;
use crate::image::Image;
use crate::options::{IMAGE_OPTS, OBJECT, OWN, Words};
use crate::progress;

const TARGET_IMAGE_OPTS: char = OWN as char;
const TARGET_IS_ZERO: char = (OWN + 1) as char;
const BITMAPS: char = (OWN + 2) as char;
const SKIP_BROKEN_BITMAPS: char = (OWN + 3) as char;
const SALVAGE: char = (OWN + 4) as char;

const LONG: &[Long] = &[
    long("help", Arg::No, 'h'),
    long("quiet", Arg::No, 'q'),
    long("progress", Arg::No, 'p'),
    long("source-format", Arg::Required, 'f'),
    long("source-image-opts", Arg::No, IMAGE_OPTS),
    long("image-opts", Arg::No, IMAGE_OPTS),
    long("source-snapshot", Arg::Required, 'l'),
    long("source-cache", Arg::Required, 'T'),
    long("target-format", Arg::Required, 'O'),
    long("target-image-opts", Arg::No, TARGET_IMAGE_OPTS),
    long("target-options", Arg::Required, 'o'),
    long("compress", Arg::No, 'c'),
    long("target-cache", Arg::Required, 't'),
    long("backing", Arg::Required, 'B'),
    long("backing-format", Arg::Required, 'F'),
    long("no-create", Arg::No, 'n'),
    long("target-is-zero", Arg::No, TARGET_IS_ZERO),
    long("sparse-size", Arg::Required, 'S'),
    long("bitmaps", Arg::No, BITMAPS),
    long("skip-broken-bitmaps", Arg::No, SKIP_BROKEN_BITMAPS),
    long("force-share", Arg::No, 'U'),
    long("rate", Arg::Required, 'r'),
    long("parallel", Arg::Required, 'm'),
    long("copy-range-offloading", Arg::No, 'C'),
    long("salvage", Arg::No, SALVAGE),
    long("oob-writes", Arg::No, 'W'),
    long("object", Arg::Required, OBJECT),
];

/// The largest run of zeroes that can be asked for, in bytes.
const SPARSE_BYTES_MAX: u64 = 16 << 20;

/// A command line, checked as far as it can be without looking at images.
struct Request {
    sources: Vec<Image>,
    snapshot: Option<SnapshotSelector>,
    target: String,
    target_format: Option<String>,
    target_image_opts: bool,
    target_cache: CacheMode,
    create: bool,
    options: CreateOptions,
    backing: Option<String>,
    backing_format: Option<String>,
    target_is_zero: bool,
    bitmaps: CopyBitmaps,
    sparse_bytes: u64,
    compressed: bool,
    parallel: usize,
    in_order: bool,
    salvage: bool,
    quiet: bool,
    show: bool,
}

impl Tool {
    pub(crate) async fn convert(&self, args: &[String]) -> Outcome {
        let Some(request) = self.convert_request(args)? else {
            return Ok(());
        };
        let job = progress::job(&self.console, request.show, 1.0);
        let result = self.convert_images(&request, &job).await;
        if result.is_ok() {
            progress::complete(&self.console, request.show);
        }
        progress::end(&self.console, request.show);
        result
    }

    /// Reads the command line. `None`: it asked for help only.
    fn convert_request(&self, args: &[String]) -> Outcome<Option<Request>> {
        let fail = |text: &str| self.console.fail(text);
        let later = |what: &str| fail(&format!("{what} is not supported yet"));
        let (mut format, mut image_opts, mut force_share) = (None, false, false);
        let (mut source_cache, mut target_cache) = ("writeback".to_owned(), "unsafe".to_owned());
        let (mut offload, mut rate) = (false, false);
        let mut sparse_given = false;
        let mut request = Request {
            sources: Vec::new(),
            snapshot: None,
            target: String::new(),
            target_format: None,
            target_image_opts: false,
            target_cache: crate::image::WRITEBACK,
            create: true,
            options: CreateOptions::default(),
            backing: None,
            backing_format: None,
            target_is_zero: false,
            bitmaps: CopyBitmaps::default(),
            sparse_bytes: 4096,
            compressed: false,
            parallel: 8,
            in_order: true,
            salvage: false,
            quiet: false,
            show: false,
        };
        let short = "hf:O:B:CcF:o:l:S:pt:T:qnm:WUr:";
        let mut words = Words::new(self, "convert", args, short, LONG);
        while let Some(option) = words.next()? {
            let arg = option.arg;
            match option.value {
                'q' => request.quiet = true,
                'p' => request.show = true,
                'f' => format = Some(arg),
                IMAGE_OPTS => image_opts = true,
                'l' => request.snapshot = Some(self.source_snapshot(&arg)?),
                'T' => source_cache = arg,
                'O' => request.target_format = Some(arg),
                TARGET_IMAGE_OPTS => request.target_image_opts = true,
                'o' => request.options.push(&self.console, arg)?,
                'c' => request.compressed = true,
                't' => target_cache = arg,
                'B' => request.backing = Some(arg),
                'F' => request.backing_format = Some(arg),
                'n' => request.create = false,
                TARGET_IS_ZERO => request.target_is_zero = true,
                'S' => {
                    request.sparse_bytes = self.sparse_size(&arg)?;
                    sparse_given = true;
                }
                BITMAPS => request.bitmaps.copy = true,
                SKIP_BROKEN_BITMAPS => request.bitmaps.skip_broken = true,
                'U' => force_share = true,
                'r' => {
                    self.number("rate limit", &arg, 0, i64::MAX as u64)?;
                    rate = true;
                }
                'm' => {
                    let max = MAX_PARALLEL as u64;
                    let n = self.number("number of coroutines", &arg, 1, max)?;
                    request.parallel = n as usize;
                }
                'C' => offload = true,
                SALVAGE => request.salvage = true,
                _ => request.in_order = false,
            }
        }
        request.show = request.show && !request.quiet;
        let mut positionals = words.positionals();
        if request.options.asks_for_help() {
            let format = request.target_format.as_deref().unwrap_or("raw");
            let target = positionals.pop().filter(|_| !positionals.is_empty());
            self.list_create_options(format, target.as_deref())?;
            return Ok(None);
        }
        self.check_image_opts(image_opts, format.as_deref())?;
        if request.bitmaps.skip_broken && !request.bitmaps.copy {
            return Err(fail("Use of --skip-broken-bitmaps requires --bitmaps"));
        }
        if offload && request.compressed {
            return Err(fail("Cannot enable copy offloading when -c is used"));
        }
        if offload && sparse_given {
            return Err(fail("Cannot enable copy offloading when -S is used"));
        }
        if request.create && request.target_image_opts {
            return Err(fail("--target-image-opts requires use of -n flag"));
        }
        if !request.create && !request.options.is_empty() {
            return Err(fail("-o has no effect when skipping image creation"));
        }
        if request.create && request.target_is_zero {
            return Err(fail("--target-is-zero requires use of -n flag"));
        }
        let refused = [
            (offload, "--copy-range-offloading (-C)"),
            (rate, "--rate (-r)"),
        ];
        if let Some((_, what)) = refused.into_iter().find(|(given, _)| *given) {
            return Err(later(what));
        }
        request.target = match positionals.pop() {
            Some(target) if !positionals.is_empty() => target,
            _ => return Err(fail("Must specify image file name")),
        };
        let text = format!("Invalid source cache option: {source_cache}");
        let cache = self.cache_mode(&source_cache, &text)?;
        request.sources = positionals
            .into_iter()
            .map(|name| Image {
                cache,
                force_share,
                no_share: true,
                ..Image::new(name, format.clone(), image_opts)
            })
            .collect();
        let text = format!("Invalid cache option: {target_cache}");
        request.target_cache = self.cache_mode(&target_cache, &text)?;
        Ok(Some(request))
    }

    fn sparse_size(&self, text: &str) -> Outcome<u64> {
        match blockcore::size::parse_size(text) {
            Ok(n) if n <= SPARSE_BYTES_MAX && n.is_multiple_of(512) => Ok(n),
            Err(blockcore::size::SizeError::Syntax) => {
                let text = format!("Invalid buffer size for sparse output specified: '{text}'.");
                Err(self.console.fail(&text))
            }
            _ => Err(self.console.fail(&format!("Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to {SPARSE_BYTES_MAX}. Select 0 to disable sparse detection (fully allocates output)."))),
        }
    }

    async fn convert_images(&self, request: &Request, job: &blockjob::Job) -> Outcome {
        let mut sources = Vec::new();
        for image in &request.sources {
            match self.open(image.clone()).await {
                Ok(disk) => sources.push(disk),
                Err(failed) => return self.close_all(sources, Err(failed)).await,
            }
        }
        if let Some(which) = &request.snapshot
            && let Err(failed) = self.load_source_snapshot(&sources, which).await
        {
            return self.close_all(sources, Err(failed)).await;
        }
        let copied = self.convert_open(request, &sources, job).await;
        self.close_all(sources, copied).await
    }

    async fn close_all(&self, disks: Vec<Backend>, mut result: Outcome) -> Outcome {
        for disk in disks {
            let closed = self.close(disk).await;
            result = result.and(closed);
        }
        result
    }

    async fn convert_open(
        &self,
        request: &Request,
        sources: &[Backend],
        job: &blockjob::Job,
    ) -> Outcome {
        let total: u64 = sources.iter().map(Backend::length).sum();
        let mut backing = request.backing.clone();
        if request.target_is_zero && backing.is_some() {
            let text = "Cannot use --target-is-zero when the destination image has a backing file";
            return Err(self.console.fail(text));
        }
        let mut options = Options::new();
        if request.create {
            let plan = self.create_target(request, sources, total).await?;
            backing = plan.option("backing_file").or(backing);
            // What it was encrypted with opens it.
            for key in ["key-secret", "encrypt.key-secret"] {
                if let Some(secret) = plan.option(key) {
                    options.set(key, secret);
                }
            }
        } else {
            self.check_one_source(sources, backing.is_some())?;
            self.check_source_bitmaps(sources, request.bitmaps)?;
        }
        let format = request.target_format.clone();
        let target = self
            .open(Image {
                writable: true,
                cache: request.target_cache,
                options,
                ..Image::new(
                    request.target.as_str(),
                    match (request.create, request.target_image_opts) {
                        (_, true) => None,
                        (_, false) => Some(format.unwrap_or_else(|| "raw".to_owned())),
                    },
                    request.target_image_opts,
                )
            })
            .await?;
        let copied = async {
            if request.bitmaps.copy {
                self.check_target_bitmaps(&target)?;
            }
            self.copy_to(request, sources, &target, total, backing.is_some(), job)
                .await?;
            match sources {
                [source] if request.bitmaps.copy => self.copy_bitmaps(source, &target).await,
                _ => Ok(()),
            }
        };
        let copied = copied.await;
        let closed = self.close(target).await;
        copied.and(closed)
    }

    /// Makes the target. Its backing file is not looked at here: opening the target does that.
    async fn create_target(
        &self,
        request: &Request,
        sources: &[Backend],
        total: u64,
    ) -> Outcome<CreatePlan> {
        let format = request.target_format.as_deref().unwrap_or("raw");
        let plain = |e| self.console.block_error("", &e);
        let known = known_options(&self.registry, format, Some(&request.target)).map_err(plain)?;
        let given = request.options.parse().map_err(plain)?;
        let mut options = check_options(&known, given).map_err(plain)?;
        let has_backing = request.backing.is_some() || options.contains("backing_file");
        let has_format = request.backing_format.is_some() || options.contains("backing_fmt");
        let knows_backing = known_options(&self.registry, format, None)
            .is_ok_and(|known| known.iter().any(|o| o.name == "backing_file"));
        self.check_one_source(sources, has_backing && knows_backing)?;
        if request.compressed {
            self.check_compression(format, &options)?;
        }
        // The length is that of the sources, whatever the options say.
        options.take("size");
        if has_backing && !has_format && knows_backing {
            let text = "Use of backing file requires explicit backing format";
            return Err(self.console.fail(text));
        }
        self.check_source_bitmaps(sources, request.bitmaps)?;
        let create = CreateRequest {
            format: format.to_owned(),
            filename: request.target.clone(),
            options,
            size: Some(total),
            backing: request.backing.clone(),
            backing_format: request.backing_format.clone(),
            backing_unchecked: true,
        };
        let diagnostics = self.console.diagnostics();
        let plan = CreatePlan::new(&self.registry, create, &diagnostics)
            .await
            .map_err(plain)?;
        plan.run(&self.registry, &diagnostics).await.map_err(|e| {
            let prefix = format!("{}: error while converting {format}: ", request.target);
            self.console.block_error(&prefix, &e)
        })?;
        Ok(plan)
    }

    /// What a backing file shows is part of one disk, not of several.
    fn check_one_source(&self, sources: &[Backend], has_backing: bool) -> Outcome {
        if has_backing && sources.len() > 1 {
            let text = "Having a backing file for the target makes no sense when concatenating multiple input images";
            return Err(self.console.fail(text));
        }
        Ok(())
    }

    fn check_compression(&self, format: &str, options: &Options) -> Outcome {
        let factory = self.registry.driver(format);
        if !factory.is_ok_and(|f| f.supports_compressed_writes()) {
            let text = "Compression not supported for this file format";
            return Err(self.console.fail(text));
        }
        let is_encrypted = matches!(options.get_str("encryption").as_deref(), Some("on"))
            || options.contains("encrypt.format");
        if is_encrypted {
            let text = "Compression and encryption not supported at the same time";
            return Err(self.console.fail(text));
        }
        if !matches!(
            options.get_str("preallocation").as_deref(),
            None | Some("off")
        ) {
            let text = "Compression and preallocation not supported at the same time";
            return Err(self.console.fail(text));
        }
        Ok(())
    }

    async fn copy_to(
        &self,
        request: &Request,
        sources: &[Backend],
        target: &Backend,
        total: u64,
        has_backing: bool,
        job: &blockjob::Job,
    ) -> Outcome {
        if target.length() < total {
            let text = "output file is smaller than input file";
            return Err(self.console.fail(text));
        }
        let supported = target.root().driver().supported_write_flags();
        if request.compressed && !supported.contains(WriteFlags::COMPRESSED) {
            let text = "Compression not supported for this file format";
            return Err(self.console.fail(text));
        }
        let target_backing = if has_backing {
            let below = blockcore::chain_below(target.root());
            Some(below.map_or(0, |node| node.length()))
        } else {
            None
        };
        let is_new = request.create && target_backing.is_none() && request.sparse_bytes > 0;
        let zero = request.target_is_zero || (is_new && new_image_reads_zero(target).await);
        let options = ConvertOptions {
            sparse_bytes: request.sparse_bytes,
            parallel: request.parallel,
            in_order: request.in_order,
            target_is_zero: zero,
            target_backing,
            measure_first: request.show,
            compressed: request.compressed,
            salvage: request.salvage.then(|| self.salvage_warnings(request)),
        };
        convert(sources, target, &options, job)
            .await
            .map_err(|e| self.console.fail(&e.text()))
    }

    fn salvage_warnings(&self, request: &Request) -> Diagnostics {
        let (console, quiet) = (self.console.clone(), request.quiet);
        Diagnostics::new(move |line| {
            if !quiet {
                console.error(&format!("warning: {line}"));
            }
        })
    }
}

/// Whether an image that was just made surely reads as zero. One that lies in a file does, preallocated or not; on a device, what is not told apart by the
/// format is what the device held before. Where data is encrypted, holes of a file are noise.
async fn new_image_reads_zero(target: &Backend) -> bool {
    let mut node = target.root().clone();
    while let Some(child) = node.driver().primary() {
        let below = child.node().clone();
        node = below;
    }
    if node.format_name() == "file" && !target.root().driver().is_encrypted() {
        return true;
    }
    // Without an answer, zeroes are written.
    chain_is_zero(target.root(), 0, target.length())
        .await
        .unwrap_or(false)
}
