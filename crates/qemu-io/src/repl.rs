// SPDX-License-Identifier: MIT OR Apache-2.0
//! Commands from standard input: with line editing, history and completion at a terminal, with bare prompts from a pipe.
//!
//! Lines are read on a thread of their own, so that requests in flight go on while the program waits for one.

use std::io::{BufRead, IsTerminal};

use rustyline::completion::{Completer, FilenameCompleter, Pair};
use rustyline::error::ReadlineError;
use rustyline::history::DefaultHistory;
use rustyline::{CompletionType, Config, Context, Editor, Helper, Highlighter, Hinter, Validator};
use tokio::sync::mpsc;

use crate::command::COMMANDS;
use crate::session::{Done, Session};

/// Longer lines are cut into pieces of this many bytes.
const PIECE_BYTES: usize = 1023;

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
        let mut line = Vec::new();
        loop {
            line.clear();
            match input.read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            if line.last() == Some(&b'\n') {
                line.pop();
            }
            let whole = String::from_utf8_lossy(&line);
            for piece in pieces(&whole) {
                // Nobody listens any more: the program ends.
                if sender.blocking_send(piece.to_owned()).is_err() {
                    return;
                }
            }
        }
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

/// A line in pieces that fit the buffer it always had; an empty line is one piece.
fn pieces(line: &str) -> Vec<&str> {
    let mut out = Vec::new();
    let mut rest = line;
    while rest.len() > PIECE_BYTES {
        let mut cut = PIECE_BYTES;
        while !rest.is_char_boundary(cut) {
            cut -= 1;
        }
        let (piece, next) = rest.split_at(cut);
        out.push(piece);
        rest = next;
    }
    out.push(rest);
    out
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
    use super::pieces;

    #[test]
    fn long_lines_are_cut_as_the_old_buffer_cut_them() {
        let line = "x".repeat(2500);
        assert_eq!(
            pieces(&line).iter().map(|p| p.len()).collect::<Vec<_>>(),
            [1023, 1023, 454]
        );
        assert_eq!(pieces(""), [""]);
    }
}
