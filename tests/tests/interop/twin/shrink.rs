// SPDX-License-Identifier: MIT OR Apache-2.0
//! Makes a script that differs as short as it gets: lines are left out, many at a time first, and then single commands of what is left.

/// How often a shorter script is tried.
const TRIES_MAX: u32 = 400;

/// The script in pieces, each of which can be left out: a line, or one `-c 'COMMAND'` of a line. The comments at its head stay.
fn pieces(text: &str) -> Vec<String> {
    let mut out = Vec::new();
    for line in text.split_inclusive('\n') {
        let mut rest = line;
        while let Some(at) = rest.find(" -c '") {
            let end = rest[at + 5..].find('\'').map(|end| at + 5 + end + 1);
            let (piece, after) = rest.split_at(end.unwrap_or(rest.len()));
            let (before, command) = piece.split_at(at);
            out.extend([before, command].map(str::to_owned));
            rest = after;
        }
        out.push(rest.to_owned());
    }
    out.retain(|piece| !piece.is_empty());
    out
}

/// Leaves pieces of a script out for as long as what is left `differs`.
fn without(
    mut pieces: Vec<String>,
    tries: &mut u32,
    differs: &impl Fn(&str) -> bool,
) -> Vec<String> {
    let mut chunk = pieces.len().div_ceil(2);
    while chunk > 0 {
        let mut at = 0;
        while at < pieces.len() && *tries < TRIES_MAX {
            let end = (at + chunk).min(pieces.len());
            let is_head = pieces[at..end].iter().any(|p| p.starts_with('#'));
            let shorter = [&pieces[..at], &pieces[end..]].concat();
            *tries += u32::from(!is_head);
            match !is_head && differs(&shorter.concat()) {
                true => pieces = shorter,
                false => at = end,
            }
        }
        chunk /= 2;
    }
    pieces
}

/// The shortest script that was found to differ as this one does.
pub fn shortest(text: &str, differs: impl Fn(&str) -> bool) -> String {
    let lines = text.split_inclusive('\n').map(str::to_owned);
    let mut tries = 0;
    let lines = without(lines.collect(), &mut tries, &differs);
    without(pieces(&lines.concat()), &mut tries, &differs).concat()
}

#[test]
fn a_script_shrinks_to_the_commands_that_matter() {
    let text = "# Head.\nqemu-img create a 1M\nqemu-io -c 'write 0 1' -c 'write 2 3' -c 'read 0 1' a\necho x\nqemu-io -c 'read 5 5' a\n";
    assert_eq!(pieces(text).concat(), text);
    let differs = |text: &str| {
        let needed = ["create", "qemu-io", "write 2 3"];
        needed.iter().all(|word| text.contains(word)) && text.ends_with(" a\n")
    };
    let short = "# Head.\nqemu-img create a 1M\nqemu-io -c 'write 2 3' a\n";
    assert_eq!(shortest(text, differs), short);
}
