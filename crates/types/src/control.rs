//! Control modes of machines.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Who may steer a machine's controller. Which mode it is, is always the base OS user's to say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ControlMode {
    /// The base OS user.
    #[default]
    Local,
    /// The clan's admins.
    Remote,
    /// Both.
    Shared,
}

impl ControlMode {
    /// Whether the base OS user steers.
    pub const fn is_for_user(self) -> bool {
        matches!(self, Self::Local | Self::Shared)
    }

    /// Whether the clan's admins steer.
    pub const fn is_for_admins(self) -> bool {
        matches!(self, Self::Remote | Self::Shared)
    }
}

/// The text names no control mode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a control mode: use local, shared or remote")]
pub struct ControlModeError(String);

impl fmt::Display for ControlMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Local => "local",
            Self::Remote => "remote",
            Self::Shared => "shared",
        })
    }
}

impl FromStr for ControlMode {
    type Err = ControlModeError;
    fn from_str(text: &str) -> Result<Self, ControlModeError> {
        match text {
            "local" => Ok(Self::Local),
            "remote" => Ok(Self::Remote),
            "shared" => Ok(Self::Shared),
            other => Err(ControlModeError(other.chars().take(40).collect())),
        }
    }
}
