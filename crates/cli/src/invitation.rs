//! What a person gives as an invitation: a link as it was pasted, four words, or a picture.

use std::path::Path;

use clan_types::{InviteLink, LinkError, Words};

use crate::{context::next_line, error::CliError, printer::Printer, qr};

/// Longest text that is read from stdin.
const MAX_TEXT: usize = 16 << 10;

/// An invitation, well-formed.
#[derive(Debug)]
pub(crate) enum Given {
    /// A link.
    Link(InviteLink),
    /// Words, which the manager looks for.
    Words(Words),
}

/// Takes the arguments; or stdin, if there are none.
pub(crate) fn given(arguments: &[String], printer: &Printer) -> Result<Given, CliError> {
    match arguments {
        [] => typed(printer),
        [dash] if dash == "-" => typed(printer),
        [path] if is_picture(path) => Ok(Given::Link(InviteLink::in_text(&qr::read(Path::new(path))?)?)),
        // Words may come without quotes around them, and a link broken by blanks.
        several => parse(&several.join(" ")),
    }
}

fn parse(text: &str) -> Result<Given, CliError> {
    if Words::looks_like(text.trim()) {
        return Ok(Given::Words(text.parse::<Words>()?));
    }
    Ok(Given::Link(InviteLink::in_text(text)?))
}

/// Reads lines until there is an invitation, or nothing more: a link may have been broken by whoever sent it.
fn typed(printer: &Printer) -> Result<Given, CliError> {
    if printer.can_ask() {
        printer.ask("Invitation link, or words:");
    }
    let mut text = String::new();
    loop {
        let line = next_line()?;
        text.push_str(line.as_deref().unwrap_or_default());
        // Who pressed Enter has nothing to add.
        let last = text.len() > MAX_TEXT || line.is_none_or(|line| line.trim().is_empty() && !text.trim().is_empty());
        let half = match InviteLink::in_text(&text) {
            Err(LinkError::Damaged) => true,
            _ => Words::looks_like(text.trim()) && text.parse::<Words>().is_err(),
        };
        if last || !(half || text.trim().is_empty()) {
            return parse(&text);
        }
        if half && printer.can_ask() {
            printer.ask("That is not all of it. The rest (or Enter):");
        }
    }
}

/// A file that is there, or a name that only a picture has.
fn is_picture(argument: &str) -> bool {
    let path = Path::new(argument);
    let ends = |end: &str| path.extension().is_some_and(|e| e.eq_ignore_ascii_case(end));
    !argument.contains("://") && (["png", "jpg", "jpeg"].into_iter().any(ends) || path.is_file())
}
