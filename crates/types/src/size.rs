//! Amounts of memory and disk.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A number of bytes. Shown and parsed in binary units (`256 MiB`, `2G`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteSize(u64);

/// The text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a size: write for example 512M or 2G")]
pub struct SizeError(String);

impl ByteSize {
    /// From bytes.
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// From mebibytes.
    pub const fn from_mib(mib: u64) -> Self {
        Self(mib << 20)
    }

    /// In bytes.
    pub const fn as_bytes(self) -> u64 {
        self.0
    }

    /// In whole mebibytes, rounded down.
    pub const fn as_mib(self) -> u64 {
        self.0 >> 20
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
        if self.0 < 1024 {
            return f.pad(&format!("{} B", self.0));
        }
        let (mut whole, mut unit) = (self.0 as f64 / 1024.0, 0);
        while whole >= 1024.0 && unit + 1 < UNITS.len() {
            whole /= 1024.0;
            unit += 1;
        }
        let text = if whole >= 100.0 || whole.fract() < 0.05 {
            format!("{whole:.0} {}", UNITS[unit])
        } else {
            format!("{whole:.1} {}", UNITS[unit])
        };
        f.pad(&text)
    }
}

impl FromStr for ByteSize {
    type Err = SizeError;
    fn from_str(text: &str) -> Result<Self, SizeError> {
        let bad = || SizeError(text.chars().take(40).collect());
        let trimmed = text.trim();
        let digits = trimmed.trim_end_matches(|c: char| c.is_ascii_alphabetic() || c == ' ');
        let number: u64 = digits.parse().map_err(|_| bad())?;
        let shift =
            match trimmed[digits.len()..].trim().to_ascii_lowercase().trim_end_matches("ib").trim_end_matches('b') {
                "" => 0,
                "k" => 10,
                "m" => 20,
                "g" => 30,
                "t" => 40,
                _ => return Err(bad()),
            };
        number.checked_mul(1u64 << shift).map(Self).ok_or_else(bad)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_and_write_binary_units() {
        assert_eq!("256M".parse(), Ok(ByteSize::from_mib(256)));
        assert_eq!("2 GiB".parse(), Ok(ByteSize::from_mib(2048)));
        assert_eq!(ByteSize::from_mib(2048).to_string(), "2 GiB");
        assert_eq!(ByteSize::from_bytes(1536).to_string(), "1.5 KiB");
        assert!("99999999999T".parse::<ByteSize>().is_err());
        assert!("M".parse::<ByteSize>().is_err());
    }
}
