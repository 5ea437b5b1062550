//! What the machines say of themselves.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use clan_types::{CertificateHash, ClanId, ControlMode, MachineId, Timestamp};
use clan_wire::{
    beacon::{Beacon, BeaconError, ServiceOffer, SignedBeacon},
    image::Manifest,
};
use ed25519_dalek::SigningKey;

/// A beacon made further in the future than this is refused: its machine's clock is wrong, or it lies.
const MAX_AHEAD: Duration = Duration::from_secs(600);
/// A clock that differs this much from the others' is worth a sentence.
const WORTH_SAYING: Duration = Duration::from_secs(120);

/// What the machine says of itself in its beacons.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Own {
    /// Where its QUIC endpoint may be reached.
    pub quic: Vec<SocketAddr>,
    /// Where its WireGuard socket may be reached.
    pub wireguard: Vec<SocketAddr>,
    /// What it offers.
    pub services: Vec<ServiceOffer>,
    /// The encoded manifest of the image that it runs; empty where there is none.
    pub manifest: Vec<u8>,
    /// The certificate that it would show as a relay.
    pub certificate: Option<CertificateHash>,
    /// Who may steer it.
    pub control: ControlMode,
}

impl Own {
    fn beacon(&self, clan: ClanId, machine: MachineId, made: Timestamp, version: &str) -> Beacon {
        Beacon {
            clan,
            machine,
            made,
            version: version.to_owned(),
            quic: self.quic.clone(),
            wireguard: self.wireguard.clone(),
            services: self.services.clone(),
            image: (!self.manifest.is_empty()).then(|| Manifest::id_of(&self.manifest)),
            certificate: self.certificate,
            control: self.control,
        }
    }
}

/// The latest beacon of each machine, expired ones included: their addresses are still the best guess.
#[derive(Default)]
pub(crate) struct Beacons {
    signed: BTreeMap<MachineId, SignedBeacon>,
    opened: Arc<BTreeMap<MachineId, Beacon>>,
    /// How far ahead of ours the clock of each linked machine was, milliseconds.
    offsets: BTreeMap<MachineId, i64>,
    /// When our own last beacon was made, or the last that others still have of an earlier run.
    own_made: Timestamp,
}

/// What became of a beacon.
pub(crate) enum Taken {
    /// It is news.
    New,
    /// It is an earlier one of our own, later than any we have made since: make another.
    OurOwn,
    /// It is known, or not to be believed.
    Nothing,
}

impl Beacons {
    pub(crate) fn opened(&self) -> &Arc<BTreeMap<MachineId, Beacon>> {
        &self.opened
    }

    pub(crate) fn signed(&self) -> impl Iterator<Item = (&MachineId, &SignedBeacon)> {
        self.signed.iter()
    }

    pub(crate) fn get(&self, machine: &MachineId) -> Option<&Beacon> {
        self.opened.get(machine)
    }

    /// Forgets machines for which `stays` is false.
    pub(crate) fn retain(&mut self, stays: impl Fn(&MachineId) -> bool) {
        self.offsets.retain(|machine, _| stays(machine));
        if self.signed.keys().all(&stays) {
            return;
        }
        self.signed.retain(|machine, _| stays(machine));
        Arc::make_mut(&mut self.opened).retain(|machine, _| stays(machine));
    }

    /// Makes our own.
    pub(crate) fn announce(
        &mut self,
        own: &Own,
        clan: ClanId,
        key: &SigningKey,
        version: &str,
        wall: Timestamp,
    ) -> Result<SignedBeacon, BeaconError> {
        let machine = MachineId::from_bytes(key.verifying_key().to_bytes());
        // A clock that was put back a little would have others ignore us until it has caught up.
        let made = if self.own_made <= wall.plus(MAX_AHEAD) {
            wall.max(self.own_made.plus(Duration::from_millis(1)))
        } else {
            wall
        };
        let beacon = own.beacon(clan, machine, made, version);
        let signed = SignedBeacon::sign(&beacon, key)?;
        self.own_made = made;
        self.hold(signed.clone(), beacon);
        Ok(signed)
    }

    /// Takes a beacon that came from the machine `from`. `belongs` says whether a machine is in good standing.
    pub(crate) fn take(
        &mut self,
        from: &MachineId,
        this: &MachineId,
        signed: &SignedBeacon,
        clan: &ClanId,
        wall: Timestamp,
        belongs: impl Fn(&MachineId) -> bool,
    ) -> Taken {
        // Each arrives from many machines: the same bytes need no second check of their signature.
        if self.signed.values().any(|known| known == signed) {
            return Taken::Nothing;
        }
        let Ok(beacon) = signed.open() else { return Taken::Nothing };
        if beacon.clan != *clan || !belongs(&beacon.machine) {
            return Taken::Nothing;
        }
        let believable = |made: Timestamp| made <= wall.plus(MAX_AHEAD);
        if beacon.machine == *this {
            let later = believable(beacon.made) && beacon.made > self.own_made;
            if later {
                self.own_made = beacon.made;
            }
            return if later { Taken::OurOwn } else { Taken::Nothing };
        }
        if beacon.machine == *from {
            let millis = |t: Timestamp| i64::try_from(t.as_millis()).unwrap_or(i64::MAX);
            self.offsets.insert(*from, millis(beacon.made).saturating_sub(millis(wall)));
        }
        // One that was believed while our own clock was ahead does not keep out the true ones.
        let newer = self.get(&beacon.machine).is_none_or(|old| old.made < beacon.made || !believable(old.made));
        if !newer || !believable(beacon.made) {
            return Taken::Nothing;
        }
        self.hold(signed.clone(), beacon);
        Taken::New
    }

    /// What is to be said of this machine's clock, if most of the machines that it talks to have another time.
    pub(crate) fn clock_problem(&self) -> Option<String> {
        let mut offsets: Vec<_> = self.offsets.values().copied().collect();
        offsets.sort_unstable();
        let median = *offsets.get(offsets.len() / 2)?;
        let off = Duration::from_millis(median.unsigned_abs());
        (off >= WORTH_SAYING).then(|| {
            let side = if median > 0 { "behind" } else { "ahead of" };
            let (amount, unit) = match off.as_secs() {
                s if s >= 2 * 86_400 => (s / 86_400, "days"),
                s if s >= 2 * 3600 => (s / 3600, "hours"),
                s => (s / 60, "minutes"),
            };
            format!("this machine's clock is {amount} {unit} {side} the other machines' clocks; set it right")
        })
    }

    fn hold(&mut self, signed: SignedBeacon, beacon: Beacon) {
        self.signed.insert(beacon.machine, signed);
        Arc::make_mut(&mut self.opened).insert(beacon.machine, beacon);
    }
}
