//! Newcomers: what they may see, and how they are admitted.

use clan_ledger::{Body, Entry};
use clan_types::MachineId;
use clan_wire::peer::{DeviceProof, EncodedEntry, InviteProof, JoinRefusal};

use super::{Replica, Taking, Then};
use crate::{Now, Ticket, newcomer};

impl Replica {
    /// Whether the ledger may be seen for an invite, by the endpoint that shows to hold its secret.
    ///
    /// # Errors
    /// When it may not.
    pub fn preview(&self, proof: &InviteProof, endpoint: &MachineId, now: Now) -> Result<(), JoinRefusal> {
        if self.writing.is_some() || self.is_learning() {
            return Err(JoinRefusal::NotReady);
        }
        if !proof.is_valid(&self.clan(), endpoint) {
            return Err(JoinRefusal::UnknownInvite);
        }
        newcomer::check_invite(&self.state, &proof.invite, now.wall)
    }

    /// Whether the ledger may be seen by somebody who holds the key of a device of the clan, and does not know which clan
    /// it is.
    ///
    /// # Errors
    /// When nobody here has the device, or the proof was made for another machine or endpoint.
    pub fn locate(&self, proof: &DeviceProof, endpoint: &MachineId, now: Now) -> Result<(), JoinRefusal> {
        if self.writing.is_some() || self.is_learning() {
            return Err(JoinRefusal::NotReady);
        }
        if !proof.is_valid(&self.machine(), endpoint) || !newcomer::may_return(&self.state, &proof.device, now.wall)? {
            return Err(JoinRefusal::UnknownInvite);
        }
        Ok(())
    }

    /// Admits a newcomer: their entries are checked against the ledger as it is, recorded, and countersigned.
    /// `Err` is an answer that needs no write.
    pub(super) fn redeem(
        &mut self,
        ticket: Ticket,
        encoded: &[EncodedEntry],
        now: Now,
    ) -> Result<(), Result<(), JoinRefusal>> {
        if self.is_learning() {
            return Err(Err(JoinRefusal::NotReady));
        }
        let entries = newcomer::decode_newcomer(encoded).map_err(Err)?;
        if newcomer::belongs(&entries, &self.state) {
            // The answer to an earlier attempt was lost.
            return Err(Ok(()));
        }
        if newcomer::returns(&entries, &self.state, now.wall).map_err(Err)? {
            self.expect(&entries, now);
            let mut taking = Taking::default();
            for entry in &entries {
                let inserted = self.ledger.insert(entry.clone()).map_err(|_| Err(JoinRefusal::Malformed))?;
                taking.add(entry.clone(), inserted);
            }
            self.persist(taking, None, Then::Redeem { ticket, entries });
            return Ok(());
        }
        if let Some(refusal) = newcomer::awaits(&entries, &self.state) {
            return Err(Err(refusal));
        }
        // INVARIANT: a machine signs only where it knows that it has signed nothing yet.
        if self.is_in_doubt() {
            return if self.doubts.defer(ticket, encoded) { Ok(()) } else { Err(Err(JoinRefusal::NotReady)) };
        }
        let checked = self.ledger.check_redemption(&entries, now.wall).map_err(newcomer::redeem_refusal);
        let admission = checked.map_err(Err)?.id();
        self.expect(&entries, now);
        let mut taking = Taking::default();
        for entry in &entries {
            // What was checked a moment ago is not refused; if it is, the countersignature below has no effect.
            if let Ok(inserted) = self.ledger.insert(entry.clone()) {
                taking.add(entry.clone(), inserted);
            }
        }
        let countersign = self.ledger.author(&self.key, Body::Countersign { admission }, now.wall);
        if let Ok(countersign) = countersign
            && let Ok(inserted) = self.ledger.insert(countersign.clone())
        {
            taking.add(countersign, inserted);
        }
        self.persist(taking, None, Then::Redeem { ticket, entries });
        Ok(())
    }

    /// The machines that are admitted by these entries are connected already.
    fn expect(&mut self, entries: &[Entry], now: Now) {
        for entry in entries {
            if let Body::Enrol { machine, .. } = entry.body() {
                self.dialer.expect(*machine, now.at);
            }
        }
    }
}
