//! The one place that writes to the terminal: data to stdout, talk to stderr.
//!
//! Whatever other machines said (titles, reasons, names in errors) passes [`harmless`] first, so that nobody in a
//! clan can move the reader's cursor or colour a lie.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "this is the printer")]

use std::{
    borrow::Cow,
    io::{self, IsTerminal, Write},
};

use owo_colors::{OwoColorize, Style};
use serde::Serialize;

use crate::error::CliError;

/// How a word is meant; becomes a colour where colours are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    /// Headings.
    Strong,
    /// Secondary.
    Faint,
    /// Works.
    Good,
    /// Needs a look.
    Warn,
    /// Does not work.
    Bad,
}

impl Tone {
    fn style(self) -> Style {
        match self {
            Self::Strong => Style::new().bold(),
            Self::Faint => Style::new().dimmed(),
            Self::Good => Style::new().green(),
            Self::Warn => Style::new().yellow(),
            Self::Bad => Style::new().red().bold(),
        }
    }
}

/// Writes what the program has to say.
#[derive(Debug, Clone)]
pub(crate) struct Printer {
    json: bool,
    stdout_terminal: bool,
    stderr_terminal: bool,
    stdin_terminal: bool,
    stdout_colour: bool,
    stderr_colour: bool,
}

impl Printer {
    /// A printer for this process's streams.
    pub(crate) fn new(json: bool) -> Self {
        let (stdout_terminal, stderr_terminal) = (io::stdout().is_terminal(), io::stderr().is_terminal());
        // https://no-color.org: set and not empty.
        let colour = std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
            && std::env::var_os("TERM").is_none_or(|t| t != "dumb");
        Self {
            json,
            stdout_terminal,
            stderr_terminal,
            stdin_terminal: io::stdin().is_terminal(),
            stdout_colour: stdout_terminal && colour,
            stderr_colour: stderr_terminal && colour,
        }
    }

    /// Whether stdout is to be JSON.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Whether a person reads stdout.
    pub(crate) fn stdout_is_terminal(&self) -> bool {
        self.stdout_terminal
    }

    /// Whether a person reads stderr.
    pub(crate) fn stderr_is_terminal(&self) -> bool {
        self.stderr_terminal
    }

    /// Whether stderr shows colours.
    pub(crate) fn stderr_has_colour(&self) -> bool {
        self.stderr_colour
    }

    /// Whether a person can be asked: they can read the question and type an answer.
    pub(crate) fn can_ask(&self) -> bool {
        self.stdin_terminal && self.stderr_terminal
    }

    /// Columns of the terminal that reads stdout; `None` where lines may be as long as they need to be.
    pub(crate) fn width(&self) -> Option<usize> {
        if !self.stdout_terminal {
            return None;
        }
        rustix::termios::tcgetwinsize(io::stdout())
            .ok()
            .map(|s| usize::from(s.ws_col))
            .filter(|w| *w >= 20)
            .or(Some(80))
    }

    /// Columns of the terminal that reads stderr; as many as are usual where none does.
    pub(crate) fn err_width(&self) -> usize {
        let size = rustix::termios::tcgetwinsize(io::stderr()).ok();
        size.map(|s| usize::from(s.ws_col)).filter(|w| *w > 0).unwrap_or(80)
    }

    /// A word for stdout.
    pub(crate) fn out_style(&self, tone: Tone, text: &str) -> String {
        styled(self.stdout_colour, tone, text)
    }

    /// A word for stderr.
    pub(crate) fn err_style(&self, tone: Tone, text: &str) -> String {
        styled(self.stderr_colour, tone, text)
    }

    /// One line of data.
    pub(crate) fn data(&self, line: &str) -> Result<(), CliError> {
        self.raw(format!("{line}\n").as_bytes())
    }

    /// Bytes of data, as they are.
    pub(crate) fn raw(&self, bytes: &[u8]) -> Result<(), CliError> {
        let mut out = io::stdout().lock();
        out.write_all(bytes).and_then(|()| out.flush()).map_err(CliError::stdout)
    }

    /// One value of data.
    pub(crate) fn json<T: Serialize>(&self, value: &T) -> Result<(), CliError> {
        let text = serde_json::to_string_pretty(value)
            .map_err(|e| CliError::bug("the answer cannot be written as JSON", e))?;
        self.data(&text)
    }

    /// One line of talk. Talk that nobody can read is no failure.
    pub(crate) fn talk(&self, line: &str) {
        let _ = writeln!(io::stderr().lock(), "{line}");
    }

    /// A question; the answer's line follows on the same line.
    pub(crate) fn ask(&self, question: &str) {
        let mut err = io::stderr().lock();
        let _ = write!(err, "{question} ");
        let _ = err.flush();
    }

    /// The last thing a failing run says.
    pub(crate) fn error(&self, error: &CliError) {
        if error.is_silent() {
            return;
        }
        let text = if self.json { error.to_json() } else { error.render(&|tone, word| self.err_style(tone, word)) };
        self.talk(text.trim_end());
    }
}

fn styled(colour: bool, tone: Tone, text: &str) -> String {
    if colour { text.style(tone.style()).to_string() } else { text.to_owned() }
}

/// Text from elsewhere, safe to show on one line: control characters and those that reorder text become `·`.
pub(crate) fn harmless(text: &str) -> Cow<'_, str> {
    if text.chars().any(is_harmful) {
        Cow::Owned(text.chars().map(|c| if is_harmful(c) { '·' } else { c }).collect())
    } else {
        Cow::Borrowed(text)
    }
}

pub(crate) fn is_harmful(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{061c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_elsewhere_cannot_steer_the_terminal() {
        assert_eq!(harmless("\u{1b}[31mred\r\n"), "·[31mred··");
        assert_eq!(harmless("abc\u{202e}txt.exe"), "abc·txt.exe");
        assert_eq!(harmless("Nextcloud für Anna"), "Nextcloud für Anna");
    }
}
