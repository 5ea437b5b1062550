//! Relays: machines that pass packets on between machines that do not reach each other.

use clan_types::{CertificateHash, Host, MachineId, MachineName};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A machine of a clan that is a relay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RelayInfo {
    /// The machine.
    #[schema(value_type = String)]
    pub machine: MachineId,
    /// Its name.
    #[schema(value_type = String)]
    pub machine_name: MachineName,
    /// Where it is reached from everywhere.
    #[schema(value_type = String)]
    pub host: Host,
    /// Port: TCP, and UDP for telling machines their addresses.
    pub port: u16,
    /// The certificate that it shows.
    #[schema(value_type = String)]
    pub certificate: CertificateHash,
    /// Whether it is this computer's machine.
    pub this: bool,
}

/// Makes a machine a relay, or makes it one no more.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetRelay {
    /// Name or id of the machine; default: this computer's.
    pub machine: Option<String>,
    /// Whether it is to be one.
    pub on: bool,
    /// Where it is reached from everywhere: an address or a name. Default: the public address of this computer's machine.
    pub host: Option<String>,
    /// Port, default 443.
    pub port: Option<u16>,
    /// Only find out whether it would work, and what it would do.
    #[serde(default)]
    pub dry_run: bool,
}

/// What became of a relay, or would.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RelayChange {
    /// The relay, as it is or was.
    pub relay: RelayInfo,
    /// Whether it is one now.
    pub on: bool,
    /// It was so before.
    pub already: bool,
}
