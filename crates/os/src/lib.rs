//! What the operating system does for a machine of a clan: network device, WireGuard, names, and the channel to the
//! base OS. Each module does one facility; each change it makes to the system is undone when its handle goes.

pub mod addresses;
pub mod channel;
pub mod dns;
pub mod resolv;
pub mod resolved;
pub mod terminal;
pub mod tun;
pub mod wireguard;
