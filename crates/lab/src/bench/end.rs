//! One end of our own data plane, as the controller runs it but with a known key and a single peer.

use std::{
    collections::BTreeMap,
    net::{Ipv6Addr, SocketAddr},
};

use clan_os::{
    tun::Tun,
    wireguard::{Access, Carrier, Policy, Timing, Transport, WgPeer, Wireguard, WireguardConfig},
};
use clan_types::{ClanId, MachineId, WgPublicKey, mesh_address};
use tokio::signal::unix::{SignalKind, signal};
use x25519_dalek::{PublicKey, StaticSecret};

use crate::LabError;

pub(super) const PORT: u16 = 41641;
/// As the controller sets it.
const MTU: u16 = 1280;
const CARRIER_QUEUE: usize = 1024;

/// Which end, and where the other one is.
#[derive(Debug, Clone)]
pub struct EndConfig {
    /// 0 or 1.
    pub number: usize,
    /// The other end's UDP address.
    pub peer: SocketAddr,
    /// Whether access rules are in force, with a thousand other machines in them.
    pub rules: bool,
}

impl EndConfig {
    /// The mesh address of an end.
    pub(super) fn address(number: usize) -> Ipv6Addr {
        mesh_address(&ClanId::from_bytes([42; 32]), &machine(number))
    }
}

/// Keys that anybody can know: they protect nothing but a measurement.
pub(super) struct Keys {
    pub(super) secret: [u8; 32],
    pub(super) public: PublicKey,
}

pub(super) fn ends() -> [Keys; 2] {
    [51, 52].map(|byte| Keys { secret: [byte; 32], public: PublicKey::from(&StaticSecret::from([byte; 32])) })
}

/// The other end may reach what is measured, as by a rule of a clan of a thousand machines.
fn policy(peer: Ipv6Addr) -> Policy {
    const MEASURED: u16 = 5201;
    let mut policy = Policy::default();
    let ports = [Transport::Tcp, Transport::Udp].map(|transport| (transport, MEASURED..=MEASURED)).to_vec();
    let access = Access::Ports { ports, ping: true };
    for n in 0..1000u16 {
        let mut octets = peer.octets();
        octets[14..].copy_from_slice(&n.to_be_bytes());
        policy.allow(Ipv6Addr::from(octets).into(), access.clone());
    }
    policy.allow(peer.into(), access);
    policy
}

fn machine(number: usize) -> MachineId {
    MachineId::from_bytes(if number == 0 { [1; 32] } else { [2; 32] })
}

/// Runs one end until it is told to stop (SIGTERM).
///
/// # Errors
/// If the device or the port cannot be had.
pub fn tunnel_end(config: &EndConfig) -> Result<(), LabError> {
    let failed = |error: &dyn std::error::Error| LabError::Promise(format!("the tunnel's end: {error}"));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(LabError::io("start a runtime"))?;
    let (own, other) = (config.number % 2, 1 - config.number % 2);
    let peer = WgPeer {
        id: machine(other),
        public_key: WgPublicKey::from_bytes(*ends()[other].public.as_bytes()),
        addresses: vec![EndConfig::address(other).into()],
        standard: false,
        candidates: vec![config.peer],
        keepalive: None,
    };
    let rules = config.rules;
    runtime.block_on(async move {
        let tun = Tun::create(&format!("end{own}"), MTU, EndConfig::address(own)).await.map_err(|e| failed(&e))?;
        // Nothing travels here: the other half only keeps the queues open.
        let (carrier, _ends) = Carrier::channel(CARRIER_QUEUE);
        let wireguard = Wireguard::start(WireguardConfig {
            local: machine(own),
            private_key: ends()[own].secret,
            tun,
            udp_port: PORT,
            carrier,
            timing: Timing::default(),
        })
        .await
        .map_err(|e| failed(&e))?;
        wireguard.set_peers(vec![peer]).await.map_err(|e| failed(&e))?;
        if rules {
            wireguard.set_policy(policy(EndConfig::address(other)), BTreeMap::new());
        }
        let mut term = signal(SignalKind::terminate()).map_err(LabError::io("listen for signals"))?;
        term.recv().await;
        wireguard.stop().await;
        Ok(())
    })
}
