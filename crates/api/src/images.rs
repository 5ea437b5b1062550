//! Images: what VMs boot from.

use clan_types::{ByteSize, ClanName, ImageId};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// An image on this computer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageInfo {
    /// Its name, which follows from its content.
    #[schema(value_type = String)]
    pub id: ImageId,
    /// One line for people.
    pub title: String,
    /// What its files take on this computer. Files that images share count for each.
    #[schema(value_type = u64)]
    pub used: ByteSize,
    /// Least memory a VM of this image needs.
    #[schema(value_type = u64)]
    pub memory_min: ByteSize,
    /// Clans whose VM here runs it.
    #[schema(value_type = Vec<String>)]
    pub clans: Vec<ClanName>,
    /// Whether its next VM need not boot, as an earlier one left a template behind.
    pub template: bool,
}

/// How to remove images that no VM here runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ImageGcQuery {
    /// Only say which.
    #[serde(default)]
    pub dry_run: bool,
}

/// Images that were removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageGc {
    /// Which.
    #[schema(value_type = Vec<String>)]
    pub removed: Vec<ImageId>,
    /// Room on the disk that this gave back, or would give.
    #[schema(value_type = u64)]
    pub freed: ByteSize,
}
