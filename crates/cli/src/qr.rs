//! QR codes: shown on a terminal, written to a picture, read from one.

mod read;

use std::{fs::OpenOptions, io::Write as _, os::unix::fs::OpenOptionsExt as _, path::Path};

use qrcode::{Color, EcLevel, QrCode, render::unicode::Dense1x2};

use crate::error::CliError;

pub(crate) use read::read;

/// Modules of white around a code (ISO/IEC 18004).
const QUIET: usize = 4;
/// Pixels of a module in a picture.
const SCALE: usize = 8;

/// The text as a QR code of half-height blocks; `None` if it is wider than so many columns.
pub(crate) fn lines(text: &str, colour: bool, columns: usize) -> Option<Vec<String>> {
    let code = QrCode::with_error_correction_level(text, EcLevel::L).ok()?;
    if code.width() + 2 * QUIET > columns {
        return None;
    }
    // With colours the code is black on white whatever the terminal's scheme. Without, it is light on dark where the
    // terminal is dark, and the other way round where not: readers take both.
    let (dark, light) = if colour { (Dense1x2::Dark, Dense1x2::Light) } else { (Dense1x2::Light, Dense1x2::Dark) };
    let text = code.render::<Dense1x2>().dark_color(dark).light_color(light).quiet_zone(true).build();
    Some(
        text.lines()
            .map(|line| if colour { format!("\u{1b}[30;107m{line}\u{1b}[0m") } else { line.to_owned() })
            .collect(),
    )
}

/// Writes the text as a QR code into a new PNG file that only its owner can read.
pub(crate) fn write(path: &Path, text: &str) -> Result<(), CliError> {
    let bytes = picture(text).map_err(|e| CliError::bug("the QR code cannot be drawn", e))?;
    let failed = |e: std::io::Error| {
        let refused = CliError::refused("qr_file", format!("the picture {} cannot be written", path.display())).why(&e);
        match e.kind() {
            std::io::ErrorKind::AlreadyExists => refused.hint("name a file that is not there yet"),
            _ => refused,
        }
    };
    // Never over a file that is there: it could be a link to somewhere, or readable by others.
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
    let written = file.write_all(&bytes).and_then(|()| file.sync_all());
    written.inspect_err(|_| drop(std::fs::remove_file(path))).map_err(failed)
}

fn picture(text: &str) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let code = QrCode::with_error_correction_level(text, EcLevel::M)?;
    let modules = code.width();
    let side = (modules + 2 * QUIET) * SCALE;
    let colours = code.to_colors();
    let mut pixels = vec![0xff; side * side];
    for (at, pixel) in pixels.iter_mut().enumerate() {
        let module = |pixels: usize| (pixels / SCALE).checked_sub(QUIET).filter(|module| *module < modules);
        if let (Some(x), Some(y)) = (module(at % side), module(at / side))
            && colours.get(y * modules + x) == Some(&Color::Dark)
        {
            *pixel = 0;
        }
    }
    let mut bytes = Vec::new();
    let side = u32::try_from(side)?;
    let mut encoder = png::Encoder::new(&mut bytes, side, side);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.write_header()?.write_image_data(&pixels)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn link() -> String {
        format!("clan://join/{}", "aB3_-".repeat(46))
    }

    /// What a camera sees of lines on a terminal.
    fn seen(lines: &[String], light_on_dark: bool) -> Option<String> {
        let rows: Vec<Vec<char>> =
            lines.iter().map(|l| l.replace("\u{1b}[30;107m", "").replace("\u{1b}[0m", "").chars().collect()).collect();
        let (width, height) = (rows[0].len() * 8, rows.len() * 16);
        read::in_luma(width, height, |x, y| {
            let upper = y % 16 < 8;
            let inked = match rows[y / 16].get(x / 8) {
                Some('█') => true,
                Some('▀') => upper,
                Some('▄') => !upper,
                _ => false,
            };
            if inked == light_on_dark { 255 } else { 0 }
        })
    }

    #[test]
    fn a_code_on_a_terminal_can_be_scanned_with_colours_and_without() {
        let lines_of = |colour| lines(&link(), colour, 80).unwrap();
        assert_eq!(seen(&lines_of(true), false), Some(link()), "black on white");
        assert_eq!(seen(&lines_of(false), true), Some(link()), "on a dark terminal");
    }

    #[test]
    fn a_code_that_is_wider_than_the_terminal_is_left_out() {
        assert!(lines(&link(), false, 80).unwrap().iter().all(|l| l.chars().count() <= 80));
        assert!(lines(&link(), false, 40).is_none());
        assert!(lines(&"a".repeat(2900), false, 80).is_none());
    }

    #[test]
    fn a_written_picture_is_read_again_and_is_its_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("invite.png");
        write(&path, &link()).unwrap();
        assert_eq!(read(&path).unwrap(), link());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(write(&path, &link()).is_err(), "never over another file");
    }
}
