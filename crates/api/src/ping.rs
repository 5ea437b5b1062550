use std::net::Ipv6Addr;

use clan_types::{MachineId, MachineName};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::PathInfo;

/// What became of one echo.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pong {
    /// Key of the machine.
    #[schema(value_type = String)]
    pub machine: MachineId,
    /// Its name.
    #[schema(value_type = String)]
    pub name: MachineName,
    /// Its name in the clan's network.
    pub host_name: String,
    /// Its address there.
    #[schema(value_type = String)]
    pub address: Ipv6Addr,
    /// Round trip in microseconds; null if no answer came within two seconds.
    pub rtt_us: Option<u64>,
    /// How it is reached after that; null if it is not.
    pub path: Option<PathInfo>,
}
