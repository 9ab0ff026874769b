// SPDX-License-Identifier: MIT OR Apache-2.0
//! Commands from standard input: with line editing, history and completion at a terminal, with bare prompts from a pipe.
//!
//! Lines are read on a thread of their own, so that requests in flight go on while the program waits for one.

use std::io::{BufRead, IsTerminal, Read};

use rustyline::completion::{Completer, FilenameCompleter, Pair};
use rustyline::error::ReadlineError;
use rustyline::history::DefaultHistory;
use rustyline::{CompletionType, Config, Context, Editor, Helper, Highlighter, Hinter, Validator};
use tokio::sync::mpsc;

use crate::command::COMMANDS;
use crate::session::{Done, Session};

/// Longer lines are cut into pieces of this many bytes.
const PIECE_BYTES: u64 = 1023;

/// Runs what standard input has, and says whether any command failed.
pub(crate) async fn run(session: &mut Session) -> bool {
    if std::io::stdin().is_terminal() {
        run_terminal(session).await
    } else {
        run_pipe(session).await
    }
}

async fn run_pipe(session: &mut Session) -> bool {
    let (sender, mut lines) = mpsc::channel::<String>(64);
    std::thread::spawn(move || {
        let mut input = std::io::stdin().lock();
        // Nobody listens any more: the program ends.
        while let Some(line) = next_piece(&mut input)
            && sender.blocking_send(line).is_ok()
        {}
    });
    let mut failed = false;
    loop {
        session.output.out(&format!("{}> ", session.prog));
        session.flush_output();
        let Some(line) = session.wait(lines.recv()).await else {
            return failed;
        };
        let outcome = session.run(&line).await;
        failed |= outcome.result.is_err();
        if outcome.result == Ok(Done::Quit) {
            return failed;
        }
    }
}

/// The next line, or as much of it as fits the buffer that the tool always had; nothing at the end. What stands behind a NUL byte is not looked at.
fn next_piece(input: &mut impl BufRead) -> Option<String> {
    let mut piece = Vec::new();
    let read = input.take(PIECE_BYTES).read_until(b'\n', &mut piece);
    // An input that fails has ended.
    if !read.is_ok_and(|n| n > 0) {
        return None;
    }
    let end = piece.iter().position(|&b| b == b'\n' || b == 0);
    let text = &piece[..end.unwrap_or(piece.len())];
    Some(String::from_utf8_lossy(text).into_owned())
}

async fn run_terminal(session: &mut Session) -> bool {
    let prompt = format!("{}> ", session.prog);
    let (ask, asked) = std::sync::mpsc::channel::<()>();
    let (answer, mut answers) = mpsc::channel::<Option<String>>(1);
    std::thread::spawn(move || {
        let config = Config::builder()
            .completion_type(CompletionType::List)
            .auto_add_history(true)
            .build();
        let Ok(mut editor) = Editor::<Completion, DefaultHistory>::with_config(config) else {
            return;
        };
        editor.set_helper(Some(Completion {
            files: FilenameCompleter::new(),
        }));
        while asked.recv().is_ok() {
            let line = match editor.readline(&prompt) {
                Ok(line) => Some(line),
                Err(ReadlineError::Interrupted) => Some(String::new()),
                Err(_) => None,
            };
            if answer.blocking_send(line).is_err() {
                return;
            }
        }
    });
    let mut failed = false;
    loop {
        session.flush_output();
        if ask.send(()).is_err() {
            return failed;
        }
        let Some(Some(line)) = session.wait(answers.recv()).await else {
            return failed;
        };
        let outcome = session.run(&line).await;
        failed |= outcome.result.is_err();
        if outcome.result == Ok(Done::Quit) {
            return failed;
        }
    }
}

/// Completes command names in the first word and file names in the others.
#[derive(Helper, Hinter, Highlighter, Validator)]
struct Completion {
    files: FilenameCompleter,
}

impl Completer for Completion {
    type Candidate = Pair;

    fn complete(
        &self,
        line: &str,
        at: usize,
        context: &Context<'_>,
    ) -> rustyline::Result<(usize, Vec<Pair>)> {
        let before = &line[..at];
        if before.contains(' ') {
            return self.files.complete(line, at, context);
        }
        let names = COMMANDS
            .iter()
            .map(|c| c.name)
            .filter(|n| n.starts_with(before));
        let pair = |n: &str| Pair {
            display: n.to_owned(),
            replacement: format!("{n} "),
        };
        Ok((0, names.map(pair).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::next_piece;

    fn pieces(input: &[u8]) -> Vec<String> {
        let mut input = input;
        std::iter::from_fn(|| next_piece(&mut input)).collect()
    }

    #[test]
    fn long_lines_are_cut_as_the_old_buffer_cut_them() {
        let lengths = |n: usize| -> Vec<usize> {
            let line = format!("{}\nx", "a".repeat(n));
            pieces(line.as_bytes()).iter().map(String::len).collect()
        };
        assert_eq!(lengths(2500), [1023, 1023, 454, 1]);
        assert_eq!(lengths(1022), [1022, 1]);
        // The newline is a piece of its own, and so an empty line.
        assert_eq!(lengths(1023), [1023, 0, 1]);
    }

    #[test]
    fn an_empty_line_is_a_line_and_a_missing_newline_is_no_matter() {
        assert_eq!(pieces(b"\nlength"), ["", "length"]);
        assert_eq!(pieces(b"read 0 1\0 x\n"), ["read 0 1"]);
        assert_eq!(pieces(b""), Vec::<String>::new());
    }
}
