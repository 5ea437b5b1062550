//! Which machines of a clan are relays.

use std::net::IpAddr;

use clan_api::{ApiProblem, ErrorCode, RelayChange, RelayInfo, SetRelay};
use clan_ledger::{Body, Ledger};
use clan_types::{CertificateHash, Host, MachineId};

use crate::{authority, clan::Clan, sign};

/// Where UDP is blocked, this one mostly is not.
const DEFAULT_PORT: u16 = 443;

/// The relays of a clan.
pub(crate) async fn list(clan: &Clan) -> Result<Vec<RelayInfo>, ApiProblem> {
    let here = clan.state().await?.machine;
    Ok(tell(&sign::ledger(clan).await?, &here))
}

/// Makes a machine a relay, or makes it one no more.
pub(crate) async fn set(clan: &Clan, request: &SetRelay) -> Result<RelayChange, ApiProblem> {
    let status = clan.state().await?;
    let known = Known {
        here: status.machine,
        here_is_vm: !clan.record.get().is_integrated(),
        public: status.quic.iter().map(|addr| addr.ip()).find(is_public),
        certificates: status.machines.iter().filter_map(|m| Some((m.id, m.certificate?))).collect(),
    };
    if request.dry_run {
        return decide(&sign::ledger(clan).await?, &known, request).map(|(change, _)| change);
    }
    let (change, entries) = sign::decide_all(clan, |ledger| decide(ledger, &known, request)).await?;
    if !entries.is_empty() {
        tracing::info!(clan = %clan.name(), machine = %change.relay.machine_name, on = change.on, "relay set");
    }
    Ok(change)
}

/// What the machine here says of the others and of itself.
struct Known {
    here: MachineId,
    here_is_vm: bool,
    public: Option<IpAddr>,
    certificates: Vec<(MachineId, CertificateHash)>,
}

fn tell(ledger: &Ledger, here: &MachineId) -> Vec<RelayInfo> {
    let state = ledger.state();
    let relays = state.good_relays().filter_map(|(id, relay)| {
        Some(RelayInfo {
            machine: *id,
            machine_name: state.machine_in_good_standing(id)?.name.clone(),
            host: relay.host.clone(),
            port: relay.port,
            certificate: relay.certificate,
            this: here == id,
        })
    });
    relays.collect()
}

fn decide(ledger: &Ledger, known: &Known, request: &SetRelay) -> Result<(RelayChange, Vec<Body>), ApiProblem> {
    let here = known.here.to_string();
    let (machine, name) =
        authority::find_machine(ledger.state(), request.machine.as_deref().map_or(here.as_str(), str::trim))?;
    let present = tell(ledger, &known.here).into_iter().find(|relay| relay.machine == machine);
    if !request.on {
        let relay = present.ok_or_else(|| {
            ApiProblem::new(ErrorCode::NotFound, format!("{name} is no relay"))
                .hint("see which there are: `clan relay list`")
        })?;
        return Ok((RelayChange { relay, on: false, already: false }, vec![Body::RelayOff { machine }]));
    }
    let certificate = known.certificates.iter().find(|(id, _)| *id == machine).map(|(_, certificate)| *certificate);
    let Some(certificate) = certificate else { return Err(cannot_serve(known, &machine, name.as_str())) };
    let host = match &request.host {
        Some(text) => text.parse::<Host>().map_err(|e| ApiProblem::new(ErrorCode::BadRequest, e.to_string()))?,
        None => public_host(known, &machine, name.as_str())?,
    };
    let port = request.port.unwrap_or(DEFAULT_PORT);
    if port == 0 {
        return Err(ApiProblem::new(ErrorCode::BadRequest, "0 is no port"));
    }
    let relay = RelayInfo { machine, machine_name: name, host, port, certificate, this: known.here == machine };
    if present.as_ref() == Some(&relay) {
        return Ok((RelayChange { relay, on: true, already: true }, Vec::new()));
    }
    let body = Body::Relay { machine, host: relay.host.clone(), port, certificate };
    Ok((RelayChange { relay, on: true, already: false }, vec![body]))
}

fn cannot_serve(known: &Known, machine: &MachineId, name: &str) -> ApiProblem {
    let vm = "a virtual machine's TCP ports are not reachable from outside yet";
    let hint = "choose a machine that joined with `--integrate`";
    if known.here == *machine && known.here_is_vm {
        return ApiProblem::new(ErrorCode::Conflict, format!("{name} cannot be a relay")).why(vm).hint(hint);
    }
    ApiProblem::new(ErrorCode::Conflict, format!("{name} has not said that it can be a relay"))
        .why(format!("it was not heard of lately, or it is a virtual machine: {vm}"))
        .hint(hint)
}

fn public_host(known: &Known, machine: &MachineId, name: &str) -> Result<Host, ApiProblem> {
    let own = known.public.filter(|_| known.here == *machine);
    own.and_then(|ip| ip.to_string().parse().ok()).ok_or_else(|| {
        ApiProblem::new(ErrorCode::BadRequest, format!("where is {name} reached from everywhere?"))
            .why("no public address of it is known here")
            .hint("say it with `--host`: an address, or a name such as nas.example.org")
    })
}

/// Whether an address is reached from everywhere.
fn is_public(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let shared = ip.octets()[0] == 100 && ip.octets()[1] & 0xc0 == 64;
            !(ip.is_private()
                || ip.is_loopback()
                || ip.is_link_local()
                || ip.is_unspecified()
                || ip.is_multicast()
                || shared)
        }
        // Global unicast (RFC 4291).
        IpAddr::V6(ip) => ip.segments()[0] & 0xe000 == 0x2000,
    }
}

#[cfg(test)]
mod tests {
    use clan_ledger::AuthorId;
    use clan_types::WgPublicKey;
    use ed25519_dalek::SigningKey;

    use super::*;
    use crate::tasks::now;

    const CERTIFICATE: CertificateHash = CertificateHash::from_bytes([9; 32]);

    fn clan() -> (Ledger, SigningKey, MachineId) {
        let [key, nas] = [1, 2].map(|seed| SigningKey::from_bytes(&[seed; 32]));
        let machine = AuthorId::of(&nas).machine();
        let founded = Ledger::found(&key, "family".parse().unwrap(), "ada".parse().unwrap(), [7; 32], now());
        let (mut ledger, _) = founded.unwrap();
        let (by, wg) = (AuthorId::of(&key), WgPublicKey::from_bytes([3; 32]));
        let enrol = Body::enrol(&nas, &ledger.clan(), &by, "nas".parse().unwrap(), wg);
        say(&mut ledger, &key, enrol);
        (ledger, key, machine)
    }

    fn say(ledger: &mut Ledger, key: &SigningKey, body: Body) {
        let entry = ledger.author(key, body, now()).unwrap();
        ledger.insert(entry).unwrap();
    }

    fn known(machine: MachineId) -> Known {
        Known {
            here: machine,
            here_is_vm: false,
            public: Some("203.0.113.7".parse().unwrap()),
            certificates: vec![(machine, CERTIFICATE)],
        }
    }

    fn on() -> SetRelay {
        SetRelay { on: true, ..SetRelay::default() }
    }

    #[test]
    fn this_machine_becomes_one_at_its_public_address_and_ceases_to_be() {
        let (mut ledger, key, machine) = clan();
        let known = known(machine);
        let (change, bodies) = decide(&ledger, &known, &on()).unwrap();
        assert_eq!((change.relay.host.as_str(), change.relay.port, change.relay.this), ("203.0.113.7", 443, true));
        for body in bodies {
            say(&mut ledger, &key, body);
        }
        assert_eq!(tell(&ledger, &machine), [change.relay]);
        let (again, bodies) = decide(&ledger, &known, &on()).unwrap();
        assert!(again.already && bodies.is_empty());
        let (_, bodies) = decide(&ledger, &known, &SetRelay::default()).unwrap();
        for body in bodies {
            say(&mut ledger, &key, body);
        }
        assert!(tell(&ledger, &machine).is_empty());
        assert_eq!(decide(&ledger, &known, &SetRelay::default()).unwrap_err().code, ErrorCode::NotFound);
    }

    #[test]
    fn whoever_cannot_be_one_is_told_why() {
        let (ledger, _, machine) = clan();
        let vm = Known { here_is_vm: true, certificates: vec![], ..known(machine) };
        let refused = decide(&ledger, &vm, &on()).unwrap_err();
        assert!(refused.why.unwrap().contains("virtual machine"));
        let private = Known { public: None, ..known(machine) };
        assert!(decide(&ledger, &private, &on()).unwrap_err().hints.iter().any(|h| h.contains("--host")));
        let elsewhere = SetRelay { host: Some("https://nas".into()), ..on() };
        assert_eq!(decide(&ledger, &private, &elsewhere).unwrap_err().code, ErrorCode::BadRequest);
        let named = SetRelay { host: Some("nas.example.org".into()), port: Some(8443), ..on() };
        assert_eq!(decide(&ledger, &private, &named).unwrap().0.relay.port, 8443);
    }

    #[test]
    fn private_addresses_are_not_offered() {
        for (text, public) in [
            ("203.0.113.7", true),
            ("192.168.1.2", false),
            ("100.64.0.1", false),
            ("100.128.0.1", true),
            ("10.0.2.15", false),
            ("2001:db8::1", true),
            ("fd00::1", false),
            ("fe80::1", false),
        ] {
            assert_eq!(is_public(&text.parse().unwrap()), public, "{text}");
        }
    }
}
