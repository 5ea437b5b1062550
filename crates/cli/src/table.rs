//! Tables for people: aligned columns, no lines; the last column wraps where the terminal ends.

use crate::printer::{Printer, Tone, harmless};

/// The last column gets at least so much room, whatever the terminal's width.
const NARROWEST: usize = 12;

/// One cell.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cell {
    text: String,
    tone: Option<Tone>,
}

impl Cell {
    /// A cell with a tone.
    pub(crate) fn toned(tone: Tone, text: impl Into<String>) -> Self {
        Self { tone: Some(tone), ..Self::from(text.into()) }
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self { text: harmless(&text).into_owned(), tone: None }
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self { text: harmless(text).into_owned(), tone: None }
    }
}

/// Rows under headings. The last column takes what room is left.
#[derive(Debug)]
pub(crate) struct Table {
    headings: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    /// An empty table.
    pub(crate) fn new(headings: &[&'static str]) -> Self {
        Self { headings: headings.to_vec(), rows: Vec::new() }
    }

    /// Adds a row.
    pub(crate) fn row<const N: usize>(&mut self, cells: [Cell; N]) {
        self.rows.push(cells.into());
    }

    /// Lines without their ends: cut to `width` columns if given; `style` colours.
    pub(crate) fn lines(&self, width: Option<usize>, style: &dyn Fn(Tone, &str) -> String) -> Vec<String> {
        let count = self.headings.len();
        let mut widths: Vec<usize> = self.headings.iter().map(|h| columns(h)).collect();
        for row in &self.rows {
            for (w, cell) in widths.iter_mut().zip(row) {
                *w = (*w).max(columns(&cell.text));
            }
        }
        let before: usize = widths[..count - 1].iter().map(|w| w + 2).sum();
        if let (Some(width), Some(last)) = (width, widths.last_mut()) {
            *last = (*last).min(width.saturating_sub(before).max(NARROWEST));
        }
        let mut lines = Vec::with_capacity(self.rows.len() + 1);
        let heading: Vec<Cell> = self.headings.iter().map(|h| Cell::toned(Tone::Faint, *h)).collect();
        for row in std::iter::once(&heading).chain(&self.rows) {
            let mut line = String::new();
            let mut owed = 0;
            let mut more = Vec::new();
            for (at, cell) in row.iter().enumerate() {
                let room = widths.get(at).copied().unwrap_or(usize::MAX);
                let mut parts = wrap(&cell.text, room).into_iter();
                let text = parts.next().unwrap_or_default();
                more.extend(parts);
                let used = columns(&text);
                if used > 0 {
                    // Blanks are written before the next word only: no line ends in blanks.
                    line.extend(std::iter::repeat_n(' ', owed));
                    owed = 0;
                    line.push_str(&cell.tone.map_or_else(|| text.clone(), |tone| style(tone, &text)));
                }
                owed += room.saturating_sub(used) + 2;
            }
            lines.push(line);
            // INVARIANT: only the last column is ever narrower than its text.
            lines.extend(more.into_iter().map(|text| format!("{}{text}", " ".repeat(before))));
        }
        lines
    }

    /// Prints the table as data.
    pub(crate) fn print(&self, printer: &Printer) -> Result<(), crate::error::CliError> {
        for line in self.lines(printer.width(), &|tone, text| printer.out_style(tone, text)) {
            printer.data(&line)?;
        }
        Ok(())
    }
}

/// `key   value` lines, for one thing rather than many. Values are made harmless.
pub(crate) fn facts(rows: &[(&str, String)]) -> Vec<String> {
    let width = rows.iter().map(|(k, _)| columns(k)).max().unwrap_or(0);
    rows.iter().map(|(k, v)| format!("  {k:<width$}  {}", harmless(v))).collect()
}

fn columns(text: &str) -> usize {
    text.chars().count()
}

/// Lines of at most `width` columns, broken between words where that is possible.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let mut word: Vec<char> = word.chars().collect();
        loop {
            let Some(line) = lines.last_mut() else { return lines };
            let gap = usize::from(!line.is_empty());
            if columns(line) + gap + word.len() <= width {
                if gap == 1 {
                    line.push(' ');
                }
                line.extend(word);
                break;
            }
            if line.is_empty() {
                line.extend(word.drain(..width.max(1)));
            }
            lines.push(String::new());
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(_: Tone, text: &str) -> String {
        text.to_owned()
    }

    #[test]
    fn columns_align_and_no_line_ends_in_blanks() {
        let mut table = Table::new(&["NAME", "STATE", "WHY"]);
        table.row(["laptop".into(), Cell::toned(Tone::Good, "running"), "".into()]);
        table.row(["a".into(), "stopped".into(), "out of memory".into()]);
        assert_eq!(
            table.lines(None, &plain),
            ["NAME    STATE    WHY", "laptop  running", "a       stopped  out of memory"]
        );
    }

    #[test]
    fn the_last_column_wraps_where_the_terminal_ends() {
        let mut table = Table::new(&["NAME", "WHY"]);
        table.row(["laptop".into(), "a very long reason indeed".into()]);
        table.row(["desk".into(), "unbreakablereason".into()]);
        assert_eq!(
            table.lines(Some(20), &plain),
            [
                "NAME    WHY",
                "laptop  a very long",
                "        reason",
                "        indeed",
                "desk    unbreakabler",
                "        eason"
            ]
        );
    }

    #[test]
    fn no_width_makes_wrapping_lose_text_or_hang() {
        for width in 1..40 {
            let joined = wrap("one two  threefourfive ü", width).concat().replace(' ', "");
            assert_eq!(joined, "onetwothreefourfiveü", "width {width}");
        }
    }

    #[test]
    fn cells_from_other_machines_stay_in_their_row() {
        let mut table = Table::new(&["TITLE"]);
        table.row(["nice\n\u{1b}[2Jevil".into()]);
        assert_eq!(table.lines(None, &plain)[1], "nice··[2Jevil");
    }
}
