//! What an image is built from.

use std::{fmt, path::PathBuf};

/// A release of the distribution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Suite {
    /// Debian 12.
    Bookworm,
}

impl Suite {
    /// The name that the package mirror knows.
    pub const fn codename(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
        }
    }

    /// The name for people.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Bookworm => "Debian 12",
        }
    }
}

impl fmt::Display for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.codename())
    }
}

/// What goes into an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// The distribution's release.
    pub suite: Suite,
    /// Packages beside the minimal system; what they recommend is left out.
    pub packages: Vec<String>,
    /// Becomes `/usr/bin/clan`.
    pub clan_executable: PathBuf,
    /// Becomes `/init` of the initramfs: must be statically linked.
    pub agent_executable: PathBuf,
}

/// What every guest has: an init system, tools that the controller calls, and the web server of the first service.
const PACKAGES: &[&str] = &["systemd", "systemd-sysv", "dbus", "kmod", "iproute2", "iputils-ping", "nginx-light"];

impl Recipe {
    /// The default guest.
    pub fn default_debian(clan_executable: impl Into<PathBuf>, agent_executable: impl Into<PathBuf>) -> Self {
        Self {
            suite: Suite::Bookworm,
            packages: PACKAGES.iter().map(|&p| p.to_owned()).collect(),
            clan_executable: clan_executable.into(),
            agent_executable: agent_executable.into(),
        }
    }
}
