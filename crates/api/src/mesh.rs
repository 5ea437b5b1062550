//! Standard WireGuard machines, and who may reach what.

use std::net::{IpAddr, SocketAddr};

use clan_types::{ClanName, GroupName, MachineName, PersonName, RuleName};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Admits a standard WireGuard machine, such as a phone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddWireguard {
    /// Its name.
    #[schema(value_type = String)]
    pub name: MachineName,
    /// Its public key, as WireGuard programs write it (base64). The private one stays where it is.
    pub public_key: String,
    /// Name of the machine that it connects to; default: this computer's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub via: Option<MachineName>,
    /// Only find out whether it would work.
    #[serde(default)]
    pub dry_run: bool,
}

/// What a standard WireGuard machine has to be told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WireguardMachine {
    /// Its name.
    #[schema(value_type = String)]
    pub name: MachineName,
    /// The clan.
    #[schema(value_type = String)]
    pub clan_name: ClanName,
    /// Its addresses.
    #[schema(value_type = Vec<String>)]
    pub addresses: Vec<IpAddr>,
    /// Where it asks for names.
    #[schema(value_type = String)]
    pub dns: IpAddr,
    /// The clan's networks, as `address/bits`.
    pub networks: Vec<String>,
    /// Name of the machine that it connects to.
    #[schema(value_type = String)]
    pub via: MachineName,
    /// That machine's public key (base64).
    pub via_key: String,
    /// Where that machine may be reached, best first.
    #[schema(value_type = Vec<String>)]
    pub endpoints: Vec<SocketAddr>,
}

/// Takes something out that has a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RemoveNamed {
    /// Its name.
    pub name: String,
    /// Only find out whether it would work.
    #[serde(default)]
    pub dry_run: bool,
}

/// An access rule. Rules only allow: what none allows is not allowed.
///
/// People and machines are written `everybody`, `members`, `admins`, `owners` (each with those above), `person:anna`,
/// `machine:nas`, `group:kids`; what is reached as these, or `own` (machines of the same person), `services`,
/// `service:web`; ports `tcp/22`, `udp/5000-5010`, `ping`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetRule {
    /// Its name; a rule of that name is replaced.
    #[schema(value_type = String)]
    pub name: RuleName,
    /// Who may reach
    pub from: String,
    /// what,
    pub to: String,
    /// and there which ports; none: all, or a service's own.
    #[serde(default)]
    pub ports: Vec<String>,
    /// Only find out whether it would work.
    #[serde(default)]
    pub dry_run: bool,
}

/// An access rule in force; written as in [`SetRule`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RuleInfo {
    /// Its name.
    #[schema(value_type = String)]
    pub name: RuleName,
    /// Who may reach
    pub from: String,
    /// what,
    pub to: String,
    /// and there which ports; none: all, or a service's own.
    pub ports: Vec<String>,
    /// Who made it; absent: the clan began with it.
    #[schema(value_type = Option<String>)]
    pub by: Option<PersonName>,
}

/// Makes a group, or replaces its members.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetGroup {
    /// Its name.
    #[schema(value_type = String)]
    pub name: GroupName,
    /// People and machines, written as in [`SetRule`].
    pub members: Vec<String>,
    /// Only find out whether it would work.
    #[serde(default)]
    pub dry_run: bool,
}

/// A group of people and machines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GroupInfo {
    /// Its name.
    #[schema(value_type = String)]
    pub name: GroupName,
    /// Who is in it, written as in [`SetRule`].
    pub members: Vec<String>,
    /// Who said so last.
    #[schema(value_type = Option<String>)]
    pub by: Option<PersonName>,
}
