//! A small authoritative name server for the clan's zone. Other names are passed on, or refused.

mod answer;
mod server;

pub use answer::{Answer, answer};
pub use server::{DnsError, DnsServer};

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use clan_types::ClanName;

/// The names of a clan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Zone {
    /// The clan, as in `<label>.<clan>.clan`.
    pub clan: ClanName,
    /// Host and service labels, lower case, with their addresses.
    pub hosts: BTreeMap<String, Ipv6Addr>,
    /// The second addresses of those that have one.
    pub ipv4: BTreeMap<Ipv6Addr, Ipv4Addr>,
}
