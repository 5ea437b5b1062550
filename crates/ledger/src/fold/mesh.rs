//! Machines of the clan, standard WireGuard machines behind them, relays.

use std::net::Ipv4Addr;

use clan_types::{MachineId, MachineName, PersonId, Role, WgPublicKey, ipv4_candidates};

use crate::{
    Machine, Node, Peer, Standing, VoidReason,
    fold::{Author, Run, allowed},
};

/// Beyond so many taken ones no IPv4 address is searched for any longer, and the machine has none (0.0.0.0).
const MAX_CANDIDATES: usize = 1000;

impl Run {
    /// Whether somebody may say that a machine does something for others.
    pub(super) fn may_offer(&self, by: &Author, machine: &MachineId) -> Result<(), VoidReason> {
        let owner = self.state.machine_in_good_standing(machine).ok_or(VoidReason::NoSubject)?.owner;
        allowed(self.may_act_on(by, &owner) && by.role >= Role::Member)
    }

    pub(super) fn enrol(
        &mut self,
        owner: PersonId,
        id: &MachineId,
        name: &MachineName,
        wg: &WgPublicKey,
    ) -> Result<(), VoidReason> {
        let taken = self.state.machines.contains_key(id) || self.is_in_use(&(*id).into());
        if taken || self.wgs.contains(wg) || self.state.peers.contains_key(wg) {
            return Err(VoidReason::KeyTaken);
        }
        let standing = if self.machines_out.contains(id) { Standing::Revoked } else { Standing::Good };
        let takes_part = standing == Standing::Good && self.state.person(&owner).is_some();
        // INVARIANT: a name that somebody took, whenever they say that they did, keeps no machine out.
        let name = if takes_part { self.node_names.give_free(name, Node::Machine(*id)) } else { name.clone() };
        self.wgs.insert(*wg);
        self.machines_of.entry(owner).or_default().insert(*id);
        let ipv4 = self.ipv4(id.as_bytes());
        self.state.machines.insert(*id, Machine { name, owner, wg: *wg, ipv4, standing });
        Ok(())
    }

    pub(super) fn ipv4(&mut self, key: &[u8; 32]) -> Ipv4Addr {
        let mut candidates = ipv4_candidates(&self.clan, key).take(MAX_CANDIDATES);
        let address = candidates.find(|address| !self.ipv4s.contains(address)).unwrap_or(Ipv4Addr::UNSPECIFIED);
        self.ipv4s.insert(address);
        address
    }

    pub(super) fn machine_out(&mut self, id: &MachineId, standing: Standing) {
        let Some(machine) = self.state.machines.get_mut(id) else { return };
        if machine.standing != Standing::Revoked {
            machine.standing = standing;
        }
        self.node_names.free(&machine.name, &Node::Machine(*id));
    }

    pub(super) fn rename_machine(&mut self, by: Author, id: &MachineId, name: &MachineName) -> Result<(), VoidReason> {
        let owner = self.state.machine_in_good_standing(id).ok_or(VoidReason::NoSubject)?.owner;
        allowed(self.may_act_on(&by, &owner))?;
        let node = Node::Machine(*id);
        if self.node_names.is_taken_from(&node, name) {
            return Err(VoidReason::NameTaken);
        }
        if let Some(machine) = self.state.machines.get_mut(id) {
            let old = std::mem::replace(&mut machine.name, name.clone());
            self.node_names.free(&old, &node);
            self.node_names.give(name.clone(), node);
        }
        Ok(())
    }

    /// Adds a peer, or moves one: behind another machine, to another name, or back after it was removed.
    pub(super) fn add_peer(
        &mut self,
        by: Author,
        wg: &WgPublicKey,
        name: &MachineName,
        via: &MachineId,
    ) -> Result<(), VoidReason> {
        self.may_offer(&by, via)?;
        if self.wgs.contains(wg) {
            return Err(VoidReason::KeyTaken);
        }
        let node = Node::Peer(*wg);
        let known = self.state.peers.get(wg).cloned();
        if known.as_ref().is_some_and(|peer| !self.may_act_on(&by, &peer.owner)) {
            return Err(VoidReason::KeyTaken);
        }
        if self.node_names.is_taken_from(&node, name) {
            return Err(VoidReason::NameTaken);
        }
        let (owner, ipv4) = match known {
            Some(peer) => {
                self.node_names.free(&peer.name, &node);
                (peer.owner, peer.ipv4)
            }
            None => (by.person, self.ipv4(wg.as_bytes())),
        };
        self.node_names.give(name.clone(), node);
        let peer = Peer { name: name.clone(), owner, via: *via, ipv4, standing: Standing::Good };
        self.state.peers.insert(*wg, peer);
        Ok(())
    }

    pub(super) fn remove_peer(&mut self, by: Author, wg: &WgPublicKey) -> Result<(), VoidReason> {
        let Peer { owner, via, .. } = *self.state.peers.get(wg).ok_or(VoidReason::NoSubject)?;
        let carries = self.state.machines.get(&via).is_some_and(|machine| machine.owner == by.person);
        allowed(carries || self.may_act_on(&by, &owner))?;
        if let Some(peer) = self.state.peers.get_mut(wg) {
            peer.standing = Standing::Left;
            self.node_names.free(&peer.name, &Node::Peer(*wg));
        }
        Ok(())
    }
}
