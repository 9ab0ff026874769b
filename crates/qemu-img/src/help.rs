// SPDX-License-Identifier: MIT OR Apache-2.0
//! `--help` and `--version`. The synopses are the interface's; the rest says what this tool does.

use crate::Tool;

/// The version of QEMU's tool whose interface this is.
const COMPATIBLE: &str = "10.0.2";

/// The text of `--version`.
pub(crate) fn version() -> String {
    format!(
        "qemu-img version {COMPATIBLE} (blocklayer {})\n",
        env!("CARGO_PKG_VERSION")
    )
}

/// A command: name, what it does, synopsis, options and arguments with what they mean.
struct Help {
    name: &'static str,
    what: &'static str,
    synopsis: &'static str,
    arguments: &'static [(&'static str, &'static str)],
}

const HELP: (&str, &str) = ("-h, --help", "show this text");
const QUIET: (&str, &str) = ("-q, --quiet", "print errors only");
const PROGRESS: (&str, &str) = ("-p, --progress", "show how far it is");
const FORMAT: (&str, &str) = (
    "-f, --format FMT",
    "format of FILENAME; guessed if not given",
);
const IMAGE_OPTS: (&str, &str) = (
    "--image-opts",
    "FILENAME is a list of options (driver=...,file.filename=...); excludes --format",
);
const FORCE_SHARE: (&str, &str) = (
    "-U, --force-share",
    "read the image although another process may be changing it",
);
const OUTPUT: (&str, &str) = ("--output human|json", "how to print; human if not given");
const FILENAME: (&str, &str) = ("FILENAME", "the image");

const COMMANDS: [Help; 11] = [
    Help {
        name: "amend",
        what: "Change what an image was created with",
        synopsis: "[-f FMT | --image-opts] [-t CACHE] [-p] [-q]
        -o OPTIONS FILENAME",
        arguments: &[
            HELP,
            QUIET,
            PROGRESS,
            FORMAT,
            IMAGE_OPTS,
            (
                "-t, --cache CACHE",
                "cache mode of FILENAME; writeback if not given",
            ),
            (
                "-o, --options OPTIONS",
                "what to change, name=value,...; help lists them",
            ),
            FILENAME,
        ],
    },
    Help {
        name: "bench",
        what: "Measure many equal requests",
        synopsis: "[-f FMT | --image-opts] [-t CACHE] [-c COUNT] [-d DEPTH]
        [-o OFFSET] [-s BUFFER_SIZE] [-S STEP_SIZE] [-i AIO] [-n]
        [-w [--pattern PATTERN] [--flush-interval INTERVAL [--no-drain]]]
        [-U] FILENAME",
        arguments: &[
            HELP,
            QUIET,
            FORMAT,
            IMAGE_OPTS,
            (
                "-t, --cache CACHE",
                "cache mode of FILENAME; writeback if not given",
            ),
            (
                "-c, --count COUNT",
                "how many requests to make; 75000 if not given",
            ),
            (
                "-s, --buffer-size BUFFER_SIZE",
                "bytes in a request; 4096 if not given",
            ),
            (
                "-d, --depth DEPTH",
                "how many requests to have in flight; 64 if not given",
            ),
            ("-o, --offset OFFSET", "where the first request begins"),
            (
                "-S, --step-size STEP_SIZE",
                "from one request's begin to the next one's; BUFFER_SIZE if not given",
            ),
            (
                "-i, --aio AIO",
                "how the host does it: threads, native or io_uring",
            ),
            ("-n, --native", "short for --aio native"),
            ("-w, --write", "write instead of reading"),
            ("--pattern PATTERN", "the byte to write; 0 if not given"),
            (
                "--flush-interval INTERVAL",
                "flush after every so many requests",
            ),
            ("--no-drain", "flush while requests are in flight"),
            FORCE_SHARE,
            FILENAME,
        ],
    },
    Help {
        name: "bitmap",
        what: "Change the persistent bitmaps of an image",
        synopsis: "( --merge SOURCE | --add | --remove | --clear |
                --enable | --disable ).. [-f FMT | --image-opts]
        [ -b SRC_FILENAME [-F SOURCE_FMT]] [-g SIZE[KMGTPE]]
        FILENAME BITMAP",
        arguments: &[
            HELP,
            FORMAT,
            IMAGE_OPTS,
            ("--add", "make a new one, which changes are marked in"),
            (
                "-g, --granularity SIZE[KMGTPE]",
                "how many bytes a bit of the new one stands for",
            ),
            ("--remove", "take it out of the image"),
            ("--clear", "forget what is marked in it"),
            (
                "--enable, --disable",
                "mark changes in it from now on, or no longer",
            ),
            ("--merge SOURCE", "mark in it what is marked in SOURCE"),
            (
                "-b, --source-file SRC_FILENAME",
                "the image that has SOURCE; FILENAME if not given",
            ),
            (
                "-F, --source-format SOURCE_FMT",
                "format of SRC_FILENAME; guessed if not given",
            ),
            FILENAME,
            ("BITMAP", "the name of the bitmap"),
        ],
    },
    Help {
        name: "check",
        what: "Look for contradictions in an image's metadata",
        synopsis: "[-f FMT | --image-opts] [-T CACHE_MODE] [-U] [-q]
        [--output human|json] FILENAME",
        arguments: &[
            HELP,
            QUIET,
            FORMAT,
            IMAGE_OPTS,
            (
                "-T, --cache CACHE_MODE",
                "cache mode of FILENAME; writeback if not given",
            ),
            FORCE_SHARE,
            OUTPUT,
            (
                "-r, --repair leaks|all",
                "repair what is found: leaked clusters only, or all that can be",
            ),
            FILENAME,
        ],
    },
    Help {
        name: "compare",
        what: "Tell whether two images read the same",
        synopsis: "[--image-opts | [-f FMT] [-F FMT]] [-s] [-p] [-q]
        [-T CACHE] [-U] FILENAME1 FILENAME2",
        arguments: &[
            HELP,
            QUIET,
            PROGRESS,
            (
                "-f, --a-format FMT",
                "format of FILENAME1; guessed if not given",
            ),
            (
                "-F, --b-format FMT",
                "format of FILENAME2; guessed if not given",
            ),
            (
                "--image-opts",
                "both names are lists of options; excludes formats",
            ),
            (
                "-s, --strict",
                "lengths and allocation have to be the same too",
            ),
            (
                "-T, --cache CACHE_MODE",
                "cache mode of both; writeback if not given",
            ),
            FORCE_SHARE,
            ("FILENAME1, FILENAME2", "the images"),
        ],
    },
    Help {
        name: "convert",
        what: "Copy images to a new one of any format",
        synopsis: "[-f SRC_FMT|--image-opts] [-T SRC_CACHE]
        [-O TGT_FMT] [-o TGT_OPTS|--target-image-opts] [-t TGT_CACHE] [-n [--target-is-zero]]
        [-B BACKING_FILENAME [-F BACKING_FMT]] [-S SPARSE_SIZE] [-m NUM_COROUTINES]
        [-W] [--salvage] [-p] [-q] [-U]
        SRC_FILENAME [SRC_FILENAME2 [...]] TGT_FILENAME",
        arguments: &[
            HELP,
            QUIET,
            PROGRESS,
            (
                "-f, --source-format SRC_FMT",
                "format of the sources; guessed if not given",
            ),
            (
                "--source-image-opts",
                "source names are lists of options; excludes --source-format",
            ),
            (
                "-l, --source-snapshot SNAPSHOT_PARAMS",
                "copy a snapshot: its id or name, or snapshot.id=...,snapshot.name=...",
            ),
            (
                "-T, --source-cache SRC_CACHE",
                "cache mode of the sources; writeback if not given",
            ),
            (
                "-O, --target-format TGT_FMT",
                "format of the target; raw if not given",
            ),
            (
                "--target-image-opts",
                "TGT_FILENAME is a list of options; needs -n",
            ),
            (
                "-o, --target-options TGT_OPTS",
                "options for creating the target; 'help' lists them",
            ),
            ("-c, --compress", "compress the target"),
            (
                "-t, --target-cache TGT_CACHE",
                "cache mode of the target; unsafe if not given",
            ),
            (
                "-B, --backing BACKING_FILENAME",
                "backing file of the target, which holds what that of the source holds",
            ),
            (
                "-F, --backing-format BACKING_FMT",
                "format of BACKING_FILENAME",
            ),
            ("-n, --no-create", "write to a target that exists"),
            ("--target-is-zero", "that target reads as zero; needs -n"),
            (
                "-S, --sparse-size SPARSE_SIZE",
                "leave out runs of zeroes this long; 4k if not given, 0 writes everything",
            ),
            ("--bitmaps", "copy persistent bitmaps, too"),
            (
                "--skip-broken-bitmaps",
                "leave out inconsistent ones; needs --bitmaps",
            ),
            FORCE_SHARE,
            ("-r, --rate RATE", "limit the speed (not supported yet)"),
            (
                "-m, --parallel NUM_COROUTINES",
                "how many pieces to copy at once, 1 to 16; 8 if not given",
            ),
            (
                "-C, --copy-range-offloading",
                "let the host copy (not supported yet)",
            ),
            ("--salvage", "replace what can't be read by zeroes"),
            (
                "-W, --oob-writes",
                "write pieces in any order: faster, but the target may be fragmented",
            ),
            ("SRC_FILENAME", "an image to copy; several are joined"),
            ("TGT_FILENAME", "where to copy to"),
        ],
    },
    Help {
        name: "create",
        what: "Make a new image",
        synopsis: "[-f FMT] [-o FMT_OPTS] [-b BACKING_FILENAME [-F BACKING_FMT]]
        [-u] [-q] FILENAME [SIZE[bkKMGTPE]]",
        arguments: &[
            HELP,
            QUIET,
            ("-f, --format FMT", "format of the image; raw if not given"),
            (
                "-o, --options FMT_OPTS",
                "options of the format; 'help' lists them",
            ),
            (
                "-b, --backing BACKING_FILENAME",
                "image that shows through where the new one holds nothing",
            ),
            (
                "-F, --backing-format BACKING_FMT",
                "format of BACKING_FILENAME",
            ),
            (
                "-u, --backing-unsafe",
                "do not look whether BACKING_FILENAME can be opened",
            ),
            ("FILENAME", "the image; a file that exists is replaced"),
            (
                "SIZE",
                "length of the disk; that of BACKING_FILENAME if not given",
            ),
        ],
    },
    Help {
        name: "info",
        what: "Say what an image is",
        synopsis: "[-f FMT | --image-opts] [-b] [-U]
        [--output human|json] FILENAME",
        arguments: &[
            HELP,
            FORMAT,
            IMAGE_OPTS,
            (
                "-b, --backing-chain",
                "go on with the backing file, and its backing file ...",
            ),
            FORCE_SHARE,
            OUTPUT,
            FILENAME,
        ],
    },
    Help {
        name: "map",
        what: "Say what an image holds, and where",
        synopsis: "[-f FMT | --image-opts] [--output human|json]
        [--start-offset OFFSET] [--max-length LENGTH] [-U] FILENAME",
        arguments: &[
            HELP,
            FORMAT,
            IMAGE_OPTS,
            ("-s, --start-offset OFFSET", "where to begin"),
            ("-l, --max-length LENGTH", "how far to go"),
            OUTPUT,
            FORCE_SHARE,
            FILENAME,
        ],
    },
    Help {
        name: "resize",
        what: "Change the length of a disk",
        synopsis: "[-f FMT | --image-opts] [--preallocation PREALLOC] [--shrink]
        [-q] FILENAME [+-]SIZE[bkKMGTPE]",
        arguments: &[
            HELP,
            QUIET,
            FORMAT,
            IMAGE_OPTS,
            ("--shrink", "really cut off what lies past the new end"),
            (
                "--preallocation PREALLOC",
                "how to allocate what is new: off, metadata, falloc, full",
            ),
            FILENAME,
            (
                "[+-]SIZE[bkKMGTPE]",
                "the new length, or by how much it changes",
            ),
        ],
    },
    Help {
        name: "snapshot",
        what: "List, take, apply and delete internal snapshots",
        synopsis: "[-f FMT | --image-opts] [-l | -a|-c|-d SNAPSHOT]
        [-U] FILENAME",
        arguments: &[
            HELP,
            QUIET,
            FORMAT,
            IMAGE_OPTS,
            FORCE_SHARE,
            (
                "-l, --list",
                "list the snapshots; so it is if nothing else is said",
            ),
            ("-c, --create SNAPSHOT", "take a snapshot with this name"),
            (
                "-a, --apply SNAPSHOT",
                "make the disk what it was in the snapshot with this id or name",
            ),
            (
                "-d, --delete SNAPSHOT",
                "delete the snapshot with this name",
            ),
            FILENAME,
        ],
    },
];

/// Prints the help of a command; of the tool for an empty name.
pub(crate) fn print(tool: &Tool, command: &str) {
    match COMMANDS.iter().find(|c| c.name == command) {
        Some(help) => tool.console.print(&command_text(help)),
        None => tool.console.print(&tool_text(tool)),
    }
}

fn command_text(help: &Help) -> String {
    let mut out = format!(
        "{}.  Usage:\n\n  qemu-img {} {}\n\nArguments:\n",
        help.what, help.name, help.synopsis
    );
    for (option, meaning) in help.arguments {
        out.push_str(&format!("  {option}\n     {meaning}\n"));
    }
    out.push('\n');
    out
}

fn tool_text(tool: &Tool) -> String {
    let mut out = version();
    out.push_str(
        "Make, look at, copy and change disk images.  Usage:

  qemu-img [standard options] COMMAND [--help | command options]

Standard options:
  -h, --help
     show this text
  -V, --version
     show the version

Commands (qemu-img COMMAND --help tells more):

",
    );
    for help in &COMMANDS {
        out.push_str(&format!("  {} - {}\n", help.name, help.what));
    }
    out.push_str(&format!(
        "\nNot supported yet: {}\n",
        crate::LATER.join(", ")
    ));
    let formats: Vec<&str> = tool.registry.drivers().map(|d| d.format_name()).collect();
    out.push_str(&format!(
        "\nSupported image formats:\n\n  {}\n",
        formats.join(" ")
    ));
    out
}
