//! What is asked of, and told about, a VM beyond its state.

use clan_types::{ByteSize, ImageId, Timestamp};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A snapshot of a VM's data disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotInfo {
    /// Its name, one to 40 of a-z, 0-9 and inner hyphens.
    pub name: String,
    /// When it was made.
    #[schema(value_type = u64)]
    pub made: Timestamp,
    /// Size of the disk.
    #[schema(value_type = u64)]
    pub size: ByteSize,
    /// What it takes on this computer now.
    #[schema(value_type = u64)]
    pub used: ByteSize,
    /// The image that the VM ran.
    #[schema(value_type = Option<String>)]
    pub image: Option<ImageId>,
    /// Whether the VM ran then. The disk is as after a power cut.
    pub running: bool,
}

/// Makes a snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MakeSnapshot {
    /// Its name; one that tells the time if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Gives a VM another image. Its disk stays; it gets its previous image back if it is not well with the new one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateVm {
    /// Id of an image on this computer, or a unique beginning of one; that of this version of Clan if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
}

/// Gives a VM another size. What is absent stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResizeVm {
    /// Memory, bytes. Takes effect at the next start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub memory: Option<ByteSize>,
    /// Processors. Takes effect at the next start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    /// Size of the data disk, bytes; it only grows, at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub disk: Option<ByteSize>,
    /// Only say what would be.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
}

/// The size of a VM after a [`ResizeVm`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmSize {
    /// Memory.
    #[schema(value_type = u64)]
    pub memory: ByteSize,
    /// Processors.
    pub cpus: u32,
    /// Size of the data disk.
    #[schema(value_type = u64)]
    pub disk: ByteSize,
    /// Whether it runs with less or more memory or processors until it is started again.
    pub restart_needed: bool,
}
