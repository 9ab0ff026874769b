// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`CreatePlan`]: what a new image is to be, checked, before anything is written. `QEMU: bdrv_img_create`.
//!
//! A plan is made from names and texts as a user gives them: the options have to be ones that the format knows, a backing file has to be there and to say
//! its length when none is given. Only [`CreatePlan::run`] touches the new file.

use blockcore::{
    BlockError, CreateOption, Diagnostics, ErrorKind, OpenOptions, OpenPolicy, OptionKind, Options,
    Registry, Result,
    name::resolve_beside,
    size::{SizeError, parse_size_to},
};

/// What a user asks for.
#[derive(Clone, Debug, Default)]
pub struct CreateRequest {
    /// The format's name.
    pub format: String,
    /// The file to make.
    pub filename: String,
    /// Options of the format, as texts.
    pub options: Options,
    /// The length in bytes; that of the backing file if not given, here or in the options.
    pub size: Option<u64>,
    /// The image that shows through.
    pub backing: Option<String>,
    /// Its format.
    pub backing_format: Option<String>,
    /// Don't open the backing file: it may not be there yet.
    pub backing_unchecked: bool,
}

/// What a new image is to be.
#[derive(Clone, Debug)]
pub struct CreatePlan {
    format: String,
    filename: String,
    known: Vec<CreateOption>,
    options: Options,
}

/// The options that images of `format` can be created with; with a file name, those of its protocol too.
///
/// # Errors
/// A format or protocol that is unknown, or can't create.
pub fn known_options(
    registry: &Registry,
    format: &str,
    filename: Option<&str>,
) -> Result<Vec<CreateOption>> {
    let unknown = || {
        BlockError::new(
            ErrorKind::NotFound,
            format!("Unknown file format '{format}'"),
        )
    };
    let driver = registry.driver(format).map_err(|_| unknown())?;
    let protocol = filename.map(|f| registry.protocol_for(f)).transpose()?;
    let mut known = driver.create_options().to_vec();
    if known.is_empty() {
        return Err(BlockError::unsupported(format!(
            "Format driver '{format}' does not support image creation"
        )));
    }
    let Some(protocol) = protocol else {
        return Ok(known);
    };
    if protocol.create_options().is_empty() {
        let name = protocol.format_name();
        return Err(BlockError::unsupported(format!(
            "Protocol driver '{name}' does not support image creation"
        )));
    }
    for option in protocol.create_options() {
        if known.iter().all(|k| k.name != option.name) {
            known.push(*option);
        }
    }
    Ok(known)
}

impl CreatePlan {
    /// Checks a request, and opens the backing file to see that it is there and how long it is.
    ///
    /// # Errors
    /// The first thing that makes no sense, in QEMU's words.
    pub async fn new(
        registry: &Registry,
        request: CreateRequest,
        diagnostics: &Diagnostics,
    ) -> Result<CreatePlan> {
        let known = known_options(registry, &request.format, Some(&request.filename))?;
        let mut options = check_options(&known, request.options)?;
        let knows = |name: &str| known.iter().any(|k| k.name == name);
        if let Some(size) = request.size {
            if options.contains("size") {
                return Err(BlockError::invalid(
                    "The image size must be specified only once",
                ));
            }
            options.set("size", size.to_string());
        }
        let not_for = |what: &str| {
            BlockError::invalid(format!(
                "{what} not supported for file format '{}'",
                request.format
            ))
        };
        if let Some(backing) = &request.backing {
            if !knows("backing_file") {
                return Err(not_for("Backing file"));
            }
            options.set("backing_file", backing.as_str());
        }
        if let Some(format) = &request.backing_format {
            if !knows("backing_fmt") {
                return Err(not_for("Backing file format"));
            }
            options.set("backing_fmt", format.as_str());
        }
        check_backing(
            registry,
            &request.filename,
            &mut options,
            request.backing_unchecked,
            diagnostics,
        )
        .await?;
        if !options.contains("size") {
            return Err(BlockError::invalid("Image creation needs a size parameter"));
        }
        Ok(CreatePlan {
            format: request.format,
            filename: request.filename,
            known,
            options,
        })
    }

    /// The plan as one line: `Formatting 'x', fmt=qcow2 cluster_size=65536 ...`.
    pub fn describe(&self) -> String {
        let mut out = format!("Formatting '{}', fmt={}", self.filename, self.format);
        for option in &self.known {
            let given = self.options.get_str(option.name);
            let Some(value) = given.or_else(|| option.default.map(str::to_owned)) else {
                continue;
            };
            let value = match option.kind {
                OptionKind::String => value.replace(',', ",,"),
                _ => value,
            };
            out.push_str(&format!(" {}={value}", option.name));
        }
        out
    }

    /// Whether the format, or its protocol, has an option of this name.
    pub fn knows(&self, name: &str) -> bool {
        self.known.iter().any(|k| k.name == name)
    }

    /// The value of an option, given or worked out.
    pub fn option(&self, name: &str) -> Option<String> {
        self.options.get_str(name)
    }

    /// Makes the image. An existing file is replaced.
    ///
    /// *If the future is dropped*: the file is there and no valid image, or not there, or done.
    ///
    /// # Errors
    /// The driver's.
    pub async fn run(&self, registry: &Registry, diagnostics: &Diagnostics) -> Result<()> {
        registry
            .create(
                &self.format,
                &self.filename,
                self.options.clone(),
                diagnostics.clone(),
            )
            .await
    }
}

/// Refuses what is not among the known options, and writes sizes as plain numbers.
///
/// # Errors
/// `InvalidArgument` with QEMU's text.
pub fn check_options(known: &[CreateOption], given: Options) -> Result<Options> {
    let mut out = Options::new();
    for (key, value) in given.iter() {
        let Some(option) = known.iter().find(|k| k.name == key) else {
            return Err(BlockError::invalid(format!("Invalid parameter '{key}'")));
        };
        let text = value.to_string();
        match option.kind {
            OptionKind::String => out.set(key, text),
            OptionKind::Bool => {
                let mut one = Options::new().with(key, text.as_str());
                one.take_bool(key)?;
                // Shown as it was written.
                out.set(key, text);
            }
            OptionKind::Number => {
                let mut one = Options::new().with(key, text);
                let number = one.take_number(key)?.unwrap_or_default();
                // Shown as QEMU shows it.
                out.set(key, (number as i64).to_string());
            }
            OptionKind::Size => out.set(key, option_size(key, &text)?.to_string()),
        }
    }
    Ok(out)
}

/// The size that a text says, as the value of an option.
///
/// # Errors
/// `InvalidArgument` with QEMU's text.
pub fn option_size(key: &str, text: &str) -> Result<u64> {
    let error = match parse_size_to(text, u64::MAX) {
        Ok(n) => return Ok(n),
        Err(SizeError::Range) => {
            return Err(BlockError::invalid(format!(
                "Value '{text}' is out of range for parameter '{key}'"
            )));
        }
        Err(SizeError::Syntax) => {
            format!("Parameter '{key}' expects a non-negative number below 2^64")
        }
    };
    Err(BlockError::invalid(error).hint(
        "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.",
    ))
}

/// Looks at the backing file, if there is to be one, and takes the length from it where none is given.
async fn check_backing(
    registry: &Registry,
    filename: &str,
    options: &mut Options,
    unchecked: bool,
    diagnostics: &Diagnostics,
) -> Result<()> {
    let Some(backing) = options.get_str("backing_file") else {
        return Ok(());
    };
    if backing == filename {
        return Err(BlockError::invalid(
            "Error: Trying to create an image with the same filename as the backing file",
        ));
    }
    if backing.is_empty() {
        return Err(BlockError::invalid(
            "Expected backing file name, got empty string",
        ));
    }
    let format = options.get_str("backing_fmt");
    let no_format = || BlockError::invalid("Backing file specified without backing format");
    if unchecked {
        return if format.is_none() {
            Err(no_format())
        } else {
            Ok(())
        };
    }
    let mut open = OpenOptions::new()
        .read_only(true)
        .no_io(true)
        .probe(true)
        .policy(OpenPolicy::Everything)
        .diagnostics(diagnostics.clone());
    if let Some(format) = &format {
        open = open.format(format);
    }
    let opened = open
        .open(registry, &resolve_beside(filename, &backing))
        .await;
    let disk = opened.map_err(|e| {
        let hint = match e.hint_text() {
            Some(hint) => format!("{hint}\nCould not open backing image."),
            None => "Could not open backing image.".to_owned(),
        };
        e.hint(hint)
    })?;
    let (length, found) = (disk.length(), disk.root().format_name());
    disk.close().await?;
    if format.is_none() {
        return Err(no_format().hint(format!("Detected format of {found}.")));
    }
    options.set_default("size", length.to_string());
    Ok(())
}
