//! What a person sees of the lab.

use std::{
    io::{self, IsTerminal, Write},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use owo_colors::{OwoColorize, Style};

/// Writes to stdout, with colours and a status line where a terminal is.
#[derive(Clone)]
pub struct Screen {
    out: Arc<Mutex<Box<dyn Write + Send>>>,
    terminal: bool,
    colour: bool,
}

impl Screen {
    /// This process's stdout.
    pub fn stdout() -> Self {
        let terminal = io::stdout().is_terminal();
        let colour = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self { out: Arc::new(Mutex::new(Box::new(io::stdout()))), terminal, colour }
    }

    /// Plain text to `out`.
    pub fn to(out: impl Write + Send + 'static) -> Self {
        Self { out: Arc::new(Mutex::new(Box::new(out))), terminal: false, colour: false }
    }

    /// Whether a person watches.
    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// A numbered step begins.
    pub fn step(&self, number: usize, title: &str) {
        self.line(&format!(
            "\n{} {}",
            self.paint(&format!("{number}."), Style::new().bold().cyan()),
            self.paint(title, Style::new().bold())
        ));
    }

    /// A command that `who` types.
    pub fn command(&self, who: &str, command: &str) {
        self.line(&self.paint(&format!("   {who:<8} $ {command}"), Style::new().dimmed()));
    }

    /// Something that a command said.
    pub fn said(&self, text: &str) {
        if !text.trim().is_empty() {
            self.line(&self.paint(&format!("            {}", harmless(text)), Style::new().dimmed()));
        }
    }

    /// Something that was seen to hold.
    pub fn seen(&self, text: &str, took: Duration) {
        self.line(&format!(
            "   {} {text} {}",
            self.paint("ok", Style::new().green()),
            self.paint(&format!("({})", seconds(took)), Style::new().dimmed())
        ));
    }

    /// Something that went wrong.
    pub fn failed(&self, text: &str) {
        self.line(&format!("   {} {}", self.paint("failed", Style::new().red().bold()), harmless(text)));
    }

    /// A heading.
    pub fn heading(&self, text: &str) {
        self.line(&format!("\n{}", self.paint(text, Style::new().bold())));
    }

    /// Plain text.
    pub fn line(&self, text: &str) {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody may be reading any more; the lab still has to clean up.
        let _ = if self.terminal { writeln!(out, "\r\x1b[2K{text}") } else { writeln!(out, "{text}") };
        let _ = out.flush();
    }

    /// A line that the next one overwrites; only where somebody watches.
    pub fn status(&self, text: &str) {
        if self.terminal {
            let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = write!(out, "\r\x1b[2K{}", self.paint(text, Style::new().dimmed()));
            let _ = out.flush();
        }
    }

    fn paint(&self, text: &str, style: Style) -> String {
        if self.colour { text.style(style).to_string() } else { text.to_owned() }
    }
}

impl std::fmt::Debug for Screen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Screen").field("terminal", &self.terminal).finish_non_exhaustive()
    }
}

/// A duration for a table.
pub(crate) fn seconds(took: Duration) -> String {
    format!("{:.1} s", took.as_secs_f64())
}

/// Text of a guest may hold anything; a terminal must not obey it.
fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && !matches!(c, '\n' | '\t') { '\u{fffd}' } else { c }).collect()
}
