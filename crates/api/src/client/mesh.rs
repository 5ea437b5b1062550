//! A clan's network: relays, other WireGuard machines, who may reach what, and the services.

use hyper::Method;

use super::{ClientError, ManagerClient, segment};
use crate::{
    AddWireguard, GroupInfo, OpenedService, Pong, RelayChange, RelayInfo, RemoveNamed, RuleInfo, ServiceInfo, SetGroup,
    SetRelay, SetRule, WireguardMachine,
};

impl ManagerClient {
    /// The relays of a clan.
    pub async fn relays(&self, clan: &str) -> Result<Vec<RelayInfo>, ClientError> {
        self.get(&format!("/clans/{}/relays", segment(clan))).await
    }

    /// Makes a machine a relay, or makes it one no more.
    pub async fn set_relay(&self, clan: &str, request: &SetRelay) -> Result<RelayChange, ClientError> {
        self.post(&format!("/clans/{}/relays", segment(clan)), request).await
    }

    /// Admits a standard WireGuard machine, and says what it has to be told.
    pub async fn add_wireguard(&self, clan: &str, request: &AddWireguard) -> Result<WireguardMachine, ClientError> {
        self.post(&format!("/clans/{}/wireguard", segment(clan)), request).await
    }

    /// Takes a standard WireGuard machine out.
    pub async fn remove_wireguard(&self, clan: &str, request: &RemoveNamed) -> Result<RemoveNamed, ClientError> {
        self.post(&format!("/clans/{}/wireguard/removals", segment(clan)), request).await
    }

    /// The access rules in force.
    pub async fn rules(&self, clan: &str) -> Result<Vec<RuleInfo>, ClientError> {
        self.get(&format!("/clans/{}/rules", segment(clan))).await
    }

    /// Makes or replaces an access rule.
    pub async fn set_rule(&self, clan: &str, request: &SetRule) -> Result<RuleInfo, ClientError> {
        self.post(&format!("/clans/{}/rules", segment(clan)), request).await
    }

    /// Takes an access rule away.
    pub async fn drop_rule(&self, clan: &str, request: &RemoveNamed) -> Result<RemoveNamed, ClientError> {
        self.post(&format!("/clans/{}/rules/removals", segment(clan)), request).await
    }

    /// The groups.
    pub async fn groups(&self, clan: &str) -> Result<Vec<GroupInfo>, ClientError> {
        self.get(&format!("/clans/{}/groups", segment(clan))).await
    }

    /// Makes a group, or replaces its members.
    pub async fn set_group(&self, clan: &str, request: &SetGroup) -> Result<GroupInfo, ClientError> {
        self.post(&format!("/clans/{}/groups", segment(clan)), request).await
    }

    /// Takes a group away.
    pub async fn drop_group(&self, clan: &str, request: &RemoveNamed) -> Result<RemoveNamed, ClientError> {
        self.post(&format!("/clans/{}/groups/removals", segment(clan)), request).await
    }

    /// Sends one echo to a machine, named, over the clan's network.
    pub async fn ping(&self, clan: &str, machine: &str) -> Result<Pong, ClientError> {
        let path = format!("/clans/{}/machines/{}/ping", segment(clan), segment(machine));
        self.call(Method::POST, &path, None).await
    }

    /// The services of a clan.
    pub async fn services(&self, clan: &str) -> Result<Vec<ServiceInfo>, ClientError> {
        self.get(&format!("/clans/{}/services", segment(clan))).await
    }

    /// A URL that opens a service in a browser.
    pub async fn open_service(&self, clan: &str, service: &str) -> Result<OpenedService, ClientError> {
        self.post(&format!("/clans/{}/services/{}/open", segment(clan), segment(service)), &serde_json::json!({})).await
    }
}
