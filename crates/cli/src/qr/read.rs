//! Reading a QR code from a PNG or JPEG picture. Pictures come from strangers: size is checked before anything is
//! decoded.

use std::{fmt::Display, fs::File, io::Cursor, io::Read as _, path::Path};

use png::{ColorType, Transformations};
use zune_jpeg::{
    JpegDecoder,
    zune_core::{colorspace::ColorSpace, options::DecoderOptions},
};

use crate::error::CliError;

/// INVARIANT: no more of a file is read.
const MAX_FILE: u64 = 32 << 20;
/// INVARIANT: a picture with a longer side, or with more pixels, is refused before it is decoded.
const MAX_SIDE: usize = 12_000;
const MAX_PIXELS: usize = 64 << 20;
/// A large picture is looked at in these sizes of its longer side: codes are found best where a module has a few pixels.
const SIZES: [usize; 3] = [1000, 2000, MAX_SIDE];

/// The text of the QR code in a picture.
pub(crate) fn read(path: &Path) -> Result<String, CliError> {
    let name = path.display();
    let unreadable = |e: std::io::Error| CliError::refused("picture", format!("{name} cannot be read")).why(e);
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(unreadable)?;
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    let refused = |why: String| {
        CliError::refused("picture", format!("{name} is not a picture that can be read"))
            .why(why)
            .hint("give a PNG or JPEG picture of the QR code")
    };
    if bytes.len() as u64 > MAX_FILE {
        return Err(refused(format!("it is larger than {} MiB", MAX_FILE >> 20)));
    }
    let picture = if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        png_luma(&bytes)
    } else if bytes.starts_with(&[0xff, 0xd8, 0xff]) {
        jpeg_luma(bytes)
    } else {
        Err("it is neither PNG nor JPEG".to_owned())
    };
    picture.map_err(refused)?.text().ok_or_else(|| {
        CliError::refused("picture", format!("there is no QR code in {name}, or none that can be read"))
            .hint("the whole code must be in the picture, sharp, with white around it")
    })
}

/// The first QR code in an image of these brightnesses.
pub(super) fn in_luma(width: usize, height: usize, luma: impl FnMut(usize, usize) -> u8) -> Option<String> {
    let mut prepared = rqrr::PreparedImage::prepare_from_greyscale(width, height, luma);
    prepared.detect_grids().iter().find_map(|grid| grid.decode().ok()).map(|(_, text)| text)
}

/// Brightnesses, row by row.
struct Picture {
    width: usize,
    height: usize,
    luma: Vec<u8>,
}

impl Picture {
    fn text(&self) -> Option<String> {
        let longer = self.width.max(self.height);
        let mut tried = 0;
        for size in SIZES {
            let step = longer.div_ceil(size).max(1);
            if step == tried {
                continue;
            }
            tried = step;
            let (width, height) = (self.width / step, self.height / step);
            // A camera takes white on black, too.
            for flip in [0, 0xff] {
                if let Some(text) = in_luma(width, height, |x, y| self.mean(x * step, y * step, step) ^ flip) {
                    return Some(text);
                }
            }
        }
        None
    }

    fn mean(&self, x: usize, y: usize, step: usize) -> u8 {
        let rows = (y..y + step).filter_map(|y| self.luma.get(y * self.width + x..y * self.width + x + step));
        let (sum, count) = rows.flatten().fold((0, 0), |(sum, count), luma| (sum + usize::from(*luma), count + 1));
        u8::try_from(sum / count.max(1)).unwrap_or(u8::MAX)
    }
}

fn check(width: usize, height: usize) -> Result<(), String> {
    if width == 0 || height == 0 {
        return Err("it is empty".to_owned());
    }
    if width > MAX_SIDE || height > MAX_SIDE || width * height > MAX_PIXELS {
        return Err(format!("it is too large: {width} by {height} pixels"));
    }
    Ok(())
}

fn png_luma(bytes: &[u8]) -> Result<Picture, String> {
    let why = |e: png::DecodingError| e.to_string();
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), png::Limits { bytes: 5 * MAX_PIXELS });
    decoder.set_transformations(Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().map_err(why)?;
    let (width, height) = (reader.info().width as usize, reader.info().height as usize);
    check(width, height)?;
    let size = reader.output_buffer_size().ok_or("it is too large")?;
    let mut raw = vec![0; size];
    let frame = reader.next_frame(&mut raw).map_err(why)?;
    let channels = match frame.color_type {
        ColorType::Grayscale => 1,
        ColorType::GrayscaleAlpha => 2,
        ColorType::Rgb => 3,
        ColorType::Rgba => 4,
        ColorType::Indexed => return Err("its colours are unknown".to_owned()),
    };
    let luma = raw.chunks_exact(channels).take(width * height).map(|pixel| match *pixel {
        [luma] => luma,
        [luma, alpha] => over_white(luma, alpha),
        [r, g, b] => brightness(r, g, b),
        [r, g, b, alpha] => over_white(brightness(r, g, b), alpha),
        _ => 0xff,
    });
    Ok(Picture { width, height, luma: luma.collect() })
}

fn jpeg_luma(bytes: Vec<u8>) -> Result<Picture, String> {
    let why = |e: &dyn Display| e.to_string();
    let options = DecoderOptions::default()
        .set_max_width(MAX_SIDE)
        .set_max_height(MAX_SIDE)
        .jpeg_set_out_colorspace(ColorSpace::Luma);
    let mut decoder = JpegDecoder::new_with_options(Cursor::new(bytes), options);
    decoder.decode_headers().map_err(|e| why(&e))?;
    let info = decoder.info().ok_or("it has no size")?;
    let (width, height) = (usize::from(info.width), usize::from(info.height));
    check(width, height)?;
    let luma = decoder.decode().map_err(|e| why(&e))?;
    if luma.len() < width * height {
        return Err("its colours are unknown".to_owned());
    }
    Ok(Picture { width, height, luma })
}

fn brightness(r: u8, g: u8, b: u8) -> u8 {
    // ITU-R BT.601, in 256ths.
    u8::try_from((77 * u32::from(r) + 150 * u32::from(g) + 29 * u32::from(b)) >> 8).unwrap_or(u8::MAX)
}

fn over_white(luma: u8, alpha: u8) -> u8 {
    let (luma, alpha) = (u32::from(luma), u32::from(alpha));
    u8::try_from((luma * alpha + 255 * (255 - alpha)) / 255).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(bytes: &[u8]) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("picture");
        std::fs::write(&path, bytes).unwrap();
        read(&path).unwrap_err().render(&|_, word| word.to_owned()).replace(&path.display().to_string(), "it")
    }

    fn png(width: u32, height: u32, colour: ColorType, data: Option<&[u8]>) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width, height);
        encoder.set_color(colour);
        let mut writer = encoder.write_header().unwrap();
        if let Some(data) = data {
            writer.write_image_data(data).unwrap();
        }
        drop(writer);
        bytes
    }

    #[test]
    fn what_is_no_picture_or_has_no_code_is_said() {
        assert!(refused(b"hello").contains("neither PNG nor JPEG"));
        assert!(refused(b"\x89PNG\r\n\x1a\nrubbish").contains("not a picture that can be read"));
        assert!(refused(&[0xff, 0xd8, 0xff, 0xe0, 1, 2, 3]).contains("not a picture that can be read"));
        assert!(refused(&png(50, 50, ColorType::Grayscale, Some(&[200; 2500]))).contains("there is no QR code in it"));
    }

    #[test]
    fn a_huge_picture_is_refused_by_its_header() {
        let text = refused(&png(100_000, 100_000, ColorType::Rgba, None));
        assert!(text.contains("too large") || text.contains("not a picture that can be read"), "{text}");
    }

    #[test]
    fn a_transparent_and_coloured_code_is_read() {
        let code = qrcode::QrCode::new("clan://join/x").unwrap();
        let modules = code.width();
        let side = (modules + 8) * 5;
        let mut pixels = Vec::new();
        for at in 0..side * side {
            let (x, y) = ((at % side / 5).wrapping_sub(4), (at / side / 5).wrapping_sub(4));
            let dark = x < modules && y < modules && code.to_colors()[y * modules + x] == qrcode::Color::Dark;
            pixels.extend_from_slice(if dark { &[10, 30, 90, 255] } else { &[0, 0, 0, 0] });
        }
        let side = u32::try_from(side).unwrap();
        let picture = png_luma(&png(side, side, ColorType::Rgba, Some(&pixels))).unwrap();
        assert_eq!(picture.text().as_deref(), Some("clan://join/x"));
    }

    #[test]
    fn noise_is_looked_at_without_a_panic() {
        let mut noise = blake3::Hasher::new().update(b"noise").finalize_xof();
        for _ in 0..20 {
            let mut luma = vec![0; 120 * 90];
            noise.fill(&mut luma);
            assert_eq!(Picture { width: 120, height: 90, luma }.text(), None);
        }
    }
}
