//! Roles of people.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// What a person may do in a clan. Ordered: a greater role includes the lesser ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Reaches published services.
    Guest,
    /// Also offers services and enrols own machines.
    Member,
    /// Also invites, revokes members and publishes configuration.
    Admin,
    /// Also makes and unmakes admins.
    Owner,
}

/// The text names no role.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a role: use guest, member, admin or owner")]
pub struct RoleError(String);

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Guest => "guest",
            Self::Member => "member",
            Self::Admin => "admin",
            Self::Owner => "owner",
        })
    }
}

impl FromStr for Role {
    type Err = RoleError;
    fn from_str(text: &str) -> Result<Self, RoleError> {
        match text {
            "guest" => Ok(Self::Guest),
            "member" => Ok(Self::Member),
            "admin" => Ok(Self::Admin),
            "owner" => Ok(Self::Owner),
            other => Err(RoleError(other.chars().take(40).collect())),
        }
    }
}
