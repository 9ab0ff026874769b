// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command line of the program.

use blocklayer::Registry;
use blocklayer::luks::secret_object::{self, Defined};
use toolkit::getopt::{Arg, Getopt, Long, long};

use crate::admin::OpenRequest;
use crate::output::{Output, print_error};
use crate::repl;
use crate::session::{Done, Session};

const SHORT: &str = "hVc:d:f:rsnCmki:t:T:U";
const OBJECT: char = '\u{1}';
const IMAGE_OPTS: char = '\u{2}';
const LONG: &[Long] = &[
    long("help", Arg::No, 'h'),
    long("version", Arg::No, 'V'),
    long("cmd", Arg::Required, 'c'),
    long("format", Arg::Required, 'f'),
    long("read-only", Arg::No, 'r'),
    long("snapshot", Arg::No, 's'),
    long("nocache", Arg::No, 'n'),
    long("copy-on-read", Arg::No, 'C'),
    long("misalign", Arg::No, 'm'),
    long("native-aio", Arg::No, 'k'),
    long("aio", Arg::Required, 'i'),
    long("discard", Arg::Required, 'd'),
    long("cache", Arg::Required, 't'),
    long("trace", Arg::Required, 'T'),
    long("force-share", Arg::No, 'U'),
    long("object", Arg::Required, OBJECT),
    long("image-opts", Arg::No, IMAGE_OPTS),
];

/// What the command line asks for.
struct Plan {
    commands: Vec<String>,
    open: OpenRequest,
    misalign: bool,
    image_opts: bool,
    registry: Registry,
}

/// The end of the program before any command: its exit status.
struct Exit(i32);

/// Runs the program; `argv` begins with the program's own name. Gives back the exit status.
pub async fn main(argv: Vec<String>) -> i32 {
    let argv0 = argv
        .first()
        .cloned()
        .unwrap_or_else(|| "qemu-io".to_owned());
    let prog = argv0.rsplit('/').next().unwrap_or(&argv0).to_owned();
    let plan = match parse(&argv0, &prog, argv.get(1..).unwrap_or_default()) {
        Ok(plan) => plan,
        Err(Exit(status)) => return status,
    };
    let mut session = Session::for_process(plan.registry, &prog);
    session.misalign = plan.misalign;
    session.image_opts = plan.image_opts;
    let mut failed = false;
    if plan.open.path.is_some() && session.open_image(plan.open).await.is_err() {
        session.flush_output();
        return 1;
    }
    if plan.commands.is_empty() {
        failed |= repl::run(&mut session).await;
    }
    for command in &plan.commands {
        let outcome = session.run(command).await;
        failed |= outcome.result.is_err();
        if outcome.result == Ok(Done::Quit) {
            break;
        }
    }
    session.close().await;
    session.flush_output();
    i32::from(failed)
}

fn parse(argv0: &str, prog: &str, words: &[String]) -> Result<Plan, Exit> {
    let mut plan = Plan {
        commands: Vec::new(),
        open: OpenRequest::default(),
        misalign: false,
        image_opts: false,
        registry: blocklayer::registry(),
    };
    let complain = |text: &str| {
        print_error(&format!("{prog}: {text}"));
        Exit(1)
    };
    let mut options = Getopt::new(words, SHORT, LONG);
    while let Some(option) = options.next() {
        let option = match option {
            Ok(option) => option,
            Err(e) => {
                print_error(&format!("{argv0}: {}", e.text()));
                show(&usage(prog));
                return Err(Exit(1));
            }
        };
        let arg = option.arg.as_str();
        match option.value {
            'h' => {
                show(&usage(prog));
                return Err(Exit(0));
            }
            'V' => {
                let version = env!("CARGO_PKG_VERSION");
                show(&format!(
                    "{prog} version 10.0.2 (blocklayer {version})\nWritten by the blocklayer developers; the interface is that of QEMU's qemu-io.\n"
                ));
                return Err(Exit(0));
            }
            'c' => plan.commands.push(arg.to_owned()),
            'f' => plan.open.format = Some(arg.to_owned()),
            'r' => plan.open.read_only = true,
            's' => plan.open.snapshot = true,
            'n' => plan.open.no_cache(),
            'C' => plan.open.copy_on_read = true,
            'm' => plan.misalign = true,
            'k' => plan.open.set_aio("native").map_err(|e| complain(&e))?,
            'i' => plan.open.set_aio(arg).map_err(|e| complain(&e))?,
            'd' => plan.open.set_discard(arg).map_err(|e| complain(&e))?,
            't' => plan.open.set_cache(arg).map_err(|e| complain(&e))?,
            'T' => return Err(complain("--trace is not supported yet")),
            'U' => plan.open.force_share = true,
            OBJECT => match secret_object::define(arg, plan.registry.secrets()) {
                Ok(Defined::Added) => {}
                Ok(Defined::Help(text)) => {
                    show(&text);
                    return Err(Exit(0));
                }
                Err(e) => return Err(complain(&toolkit::error_lines(&e))),
            },
            IMAGE_OPTS => plan.image_opts = true,
            other => unreachable!("getopt gave {other}"),
        }
    }
    let mut files = options.positionals();
    if files.len() > 1 {
        show(&usage(prog));
        return Err(Exit(1));
    }
    if plan.open.format.is_some() && plan.image_opts {
        return Err(complain("--image-opts and -f are mutually exclusive"));
    }
    plan.open.path = files.pop();
    Ok(plan)
}

/// Prints to standard output, at once.
fn show(text: &str) {
    let mut output = Output::process();
    output.out(text);
    output.flush();
}

fn usage(prog: &str) -> String {
    format!(
        "Usage: {prog} [OPTIONS]... [-c STRING]... [file]
Reads and writes disk images, command by command

  --object OBJECTDEF   define a secret: secret,id=ID,data=TEXT or file=NAME
  --image-opts         the file argument is a list of options
  -c, --cmd STRING     run this command; may be given several times
  -f, --format FMT     the format of the image
  -r, --read-only      open the image read-only
  -s, --snapshot       let a temporary overlay take the writes
  -n, --nocache        bypass the host's cache, as -t none
  -C, --copy-on-read   copy what is read from backing files (not supported yet)
  -m, --misalign       use buffers that are not aligned
  -k, --native-aio     the kernel's asynchronous I/O, as -i native
  -i, --aio=MODE       the I/O engine (threads, native or io_uring)
  -t, --cache=MODE     the cache mode (none, writeback, writethrough,
                       directsync or unsafe)
  -d, --discard=MODE   what discards do (unmap or ignore)
  -T, --trace SPEC     trace events (not supported yet)
  -U, --force-share    take no locks
  -h, --help           show this text
  -V, --version        show the version

'{prog} -c help' lists the commands.
"
    )
}
