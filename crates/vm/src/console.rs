//! The log of the serial console. What is in it comes from the guest.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use crate::file;

/// A guest that talks without end must not fill the base OS's disk.
const MAX_LOG: u64 = 8 << 20;
/// So much is kept, and read, of the end.
const KEPT: u64 = 256 << 10;

/// The last lines, without control characters: a terminal may show them.
pub(crate) fn tail(log: &Path, lines: usize) -> io::Result<String> {
    let text = printable(&String::from_utf8_lossy(&file::read_end(log, KEPT)?));
    let start = text.trim_end().rmatch_indices('\n').nth(lines.saturating_sub(1)).map_or(0, |(at, _)| at + 1);
    Ok(if lines == 0 { String::new() } else { text[start..].trim_end().to_owned() })
}

/// Moves a log aside for the next one.
pub(crate) fn rotate(log: &Path) -> io::Result<()> {
    match std::fs::rename(log, old(log)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Empties a log that has grown too large; its end is kept aside. Whoever writes to it must append.
pub(crate) fn trim(log: &Path) -> io::Result<()> {
    if std::fs::metadata(log)?.len() <= MAX_LOG {
        return Ok(());
    }
    file::replace(&old(log), &file::read_end(log, KEPT)?)?;
    File::options().write(true).open(log)?.set_len(0)
}

fn old(log: &Path) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(".old");
    name.into()
}

/// Removes control characters but line ends and tabs, and with them the escape sequences that they begin.
fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\n' | '\t' => out.push(c),
            '\u{1b}' => {
                if chars.next_if_eq(&'[').is_some() {
                    while chars.next_if(|c| matches!(c, ' '..='?')).is_some() {}
                    chars.next_if(|c| matches!(c, '@'..='~'));
                }
            }
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_tail_has_as_many_lines_as_asked() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        std::fs::write(&log, "one\r\ntwo\r\n\u{1b}[1;31mthree\u{1b}[0m\r\n").unwrap();
        assert_eq!(tail(&log, 0).unwrap(), "");
        assert_eq!(tail(&log, 2).unwrap(), "two\nthree");
        assert_eq!(tail(&log, 9).unwrap(), "one\ntwo\nthree");
    }

    #[test]
    fn a_log_that_grew_too_large_is_emptied_and_its_end_kept() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut text = vec![b'a'; MAX_LOG as usize];
        trim_leaves(&log, &text, text.len());
        text.extend(b"end");
        trim_leaves(&log, &text, 0);
        assert!(std::fs::read(old(&log)).unwrap().ends_with(b"aend"));
    }

    fn trim_leaves(log: &Path, text: &[u8], expected: usize) {
        std::fs::write(log, text).unwrap();
        trim(log).unwrap();
        assert_eq!(std::fs::metadata(log).unwrap().len(), expected as u64);
    }

    proptest! {
        #[test]
        fn nothing_printed_controls_the_terminal(text: String) {
            let clean = printable(&text);
            prop_assert!(clean.chars().all(|c| !c.is_control() || matches!(c, '\n' | '\t')));
        }
    }
}
