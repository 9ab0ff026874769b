// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table of commands. Names, argument counts and synopses are interface; the descriptions are ours.

/// What a command is called and how it is used.
#[derive(Clone, Copy, Debug)]
pub struct Command {
    /// Which it is.
    pub verb: Verb,
    /// Its name.
    pub name: &'static str,
    /// Its short name; empty if it has none.
    pub alt: &'static str,
    /// The fewest words behind it.
    pub min: usize,
    /// The most words behind it; `None`: any number.
    pub max: Option<usize>,
    /// The synopsis of its arguments.
    pub args: &'static str,
    /// One line on what it does.
    pub oneline: &'static str,
    /// Works without an open file.
    pub no_file: bool,
    /// Needs an image that is open for writing.
    pub writes: bool,
}

/// The commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Verb {
    Abort,
    AioFlush,
    AioRead,
    AioWrite,
    Alloc,
    Break,
    Close,
    Discard,
    Flush,
    Help,
    Info,
    Length,
    Map,
    Open,
    Quit,
    Read,
    Readv,
    RemoveBreak,
    Reopen,
    Resume,
    Sigraise,
    Sleep,
    Truncate,
    WaitBreak,
    Write,
    Writev,
    ZoneAppend,
    ZoneClose,
    ZoneFinish,
    ZoneOpen,
    ZoneReport,
    ZoneReset,
}

const fn cmd(
    verb: Verb,
    name: &'static str,
    alt: &'static str,
    min: usize,
    max: Option<usize>,
    args: &'static str,
    oneline: &'static str,
) -> Command {
    Command {
        verb,
        name,
        alt,
        min,
        max,
        args,
        oneline,
        no_file: false,
        writes: false,
    }
}

impl Command {
    const fn no_file(mut self) -> Command {
        self.no_file = true;
        self
    }

    const fn writes(mut self) -> Command {
        self.writes = true;
        self
    }

    /// The line that shows how the command is used, under the name it was called by.
    pub fn usage(&self, name: &str) -> String {
        // `map` has an empty synopsis, not none, and so two spaces.
        let args = match (self.verb, self.args) {
            (Verb::Map, _) => " ".to_owned(),
            (_, "") => String::new(),
            (_, args) => format!("{args} "),
        };
        format!("{name} {args}-- {}\n", self.oneline)
    }
}

/// All commands, in the byte order of their names.
pub const COMMANDS: &[Command] = &[
    cmd(
        Verb::Abort,
        "abort",
        "",
        0,
        Some(0),
        "",
        "end the program with a core dump",
    )
    .no_file(),
    cmd(
        Verb::AioFlush,
        "aio_flush",
        "",
        0,
        Some(0),
        "",
        "wait for all requests in flight",
    ),
    cmd(
        Verb::AioRead,
        "aio_read",
        "",
        2,
        None,
        "[-Ciqrv] [-P pattern] off len [len..]",
        "start a read and go on",
    ),
    cmd(
        Verb::AioWrite,
        "aio_write",
        "",
        2,
        None,
        "[-Cfiqruz] [-P pattern] off len [len..]",
        "start a write and go on",
    )
    .writes(),
    cmd(
        Verb::Alloc,
        "alloc",
        "a",
        1,
        Some(2),
        "offset [count]",
        "count the allocated bytes of a range",
    ),
    cmd(
        Verb::Break,
        "break",
        "",
        2,
        Some(2),
        "event tag",
        "suspend the next request at an event",
    ),
    cmd(
        Verb::Close,
        "close",
        "c",
        0,
        Some(0),
        "",
        "close the open image",
    ),
    cmd(
        Verb::Discard,
        "discard",
        "d",
        2,
        None,
        "[-Cq] off len",
        "give back what a range holds",
    )
    .writes(),
    cmd(
        Verb::Flush,
        "flush",
        "f",
        0,
        Some(0),
        "",
        "make all completed writes durable",
    ),
    cmd(
        Verb::Help,
        "help",
        "?",
        0,
        Some(1),
        "[command]",
        "show commands, or how to use one",
    )
    .no_file(),
    cmd(
        Verb::Info,
        "info",
        "i",
        0,
        Some(0),
        "",
        "show facts about the open image",
    ),
    cmd(
        Verb::Length,
        "length",
        "l",
        0,
        Some(0),
        "",
        "show the length of the disk",
    ),
    cmd(
        Verb::Map,
        "map",
        "",
        0,
        Some(0),
        "",
        "show which ranges are allocated",
    ),
    cmd(
        Verb::Open,
        "open",
        "o",
        1,
        None,
        "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
        "open an image",
    )
    .no_file(),
    cmd(Verb::Quit, "quit", "q", 0, None, "", "end the program").no_file(),
    cmd(
        Verb::Read,
        "read",
        "r",
        2,
        None,
        "[-abCqrv] [-P pattern [-s off] [-l len]] off len",
        "read a range",
    ),
    cmd(
        Verb::Readv,
        "readv",
        "",
        2,
        None,
        "[-Cqrv] [-P pattern] off len [len..]",
        "read a range to several buffers",
    ),
    cmd(
        Verb::RemoveBreak,
        "remove_break",
        "",
        1,
        Some(1),
        "tag",
        "remove a breakpoint",
    ),
    cmd(
        Verb::Reopen,
        "reopen",
        "",
        0,
        None,
        "[(-r|-w)] [-c cache] [-o options]",
        "change how the image is open",
    ),
    cmd(
        Verb::Resume,
        "resume",
        "",
        1,
        Some(1),
        "tag",
        "let a suspended request go on",
    ),
    cmd(
        Verb::Sigraise,
        "sigraise",
        "",
        1,
        Some(1),
        "signal",
        "send a signal to this program",
    )
    .no_file(),
    cmd(
        Verb::Sleep,
        "sleep",
        "",
        1,
        Some(1),
        "",
        "wait for some milliseconds",
    )
    .no_file(),
    cmd(
        Verb::Truncate,
        "truncate",
        "t",
        1,
        Some(3),
        "[-m prealloc_mode] off",
        "change the length of the disk",
    )
    .writes(),
    cmd(
        Verb::WaitBreak,
        "wait_break",
        "",
        1,
        Some(1),
        "tag",
        "wait until a request is suspended",
    ),
    cmd(
        Verb::Write,
        "write",
        "w",
        2,
        None,
        "[-bcCfnqruz] [-P pattern | -s source_file] off len",
        "write a range",
    )
    .writes(),
    cmd(
        Verb::Writev,
        "writev",
        "",
        2,
        None,
        "[-Cfqr] [-P pattern] off len [len..]",
        "write a range from several buffers",
    )
    .writes(),
    cmd(
        Verb::ZoneAppend,
        "zone_append",
        "zap",
        3,
        Some(4),
        "offset len [len..]",
        "append to a zone",
    ),
    cmd(
        Verb::ZoneClose,
        "zone_close",
        "zc",
        2,
        Some(2),
        "offset len",
        "close zones",
    ),
    cmd(
        Verb::ZoneFinish,
        "zone_finish",
        "zf",
        2,
        Some(2),
        "offset len",
        "finish zones",
    ),
    cmd(
        Verb::ZoneOpen,
        "zone_open",
        "zo",
        2,
        Some(2),
        "offset len",
        "open zones",
    ),
    cmd(
        Verb::ZoneReport,
        "zone_report",
        "zrp",
        2,
        Some(2),
        "offset number",
        "show zones",
    ),
    cmd(
        Verb::ZoneReset,
        "zone_reset",
        "zrs",
        2,
        Some(2),
        "offset len",
        "reset zones",
    ),
];

/// The command of a name or short name.
pub fn find(name: &str) -> Option<&'static Command> {
    COMMANDS
        .iter()
        .find(|c| c.name == name || (!c.alt.is_empty() && c.alt == name))
}
