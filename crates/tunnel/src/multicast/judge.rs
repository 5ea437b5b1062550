//! What a message may say, by who says it.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use clan_types::MachineId;

use super::message::{self, A, AAAA, CNAME, HINFO, Message, NSEC, Name, OPT, PTR, Record, SRV, Section, TXT};

const LOCAL: &[&str] = &["local"];
/// What the QUIC endpoint finds others on a LAN by. INVARIANT: it is never carried, or the tunnel would be offered as a way to
/// carry the tunnel.
const OWN_DISCOVERY: &[&str] = &["_irohv1", "_udp", "local"];

/// Who has which names and addresses.
#[derive(Debug, Default)]
pub(super) struct Clan {
    pub(super) names: BTreeMap<String, MachineId>,
    pub(super) addresses: HashMap<IpAddr, MachineId>,
}

/// Why a message is not carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It is no DNS message of the kind.
    Malformed,
    /// It is about how machines find each other on a LAN.
    Discovery,
    /// It has a record of a kind that cannot be judged.
    Kind,
    /// It claims a name that is not of a LAN, or leads to one.
    Elsewhere,
    /// It claims an address that is not its sender's.
    Address,
    /// It claims the name of another machine of the clan, or leads to it.
    Name,
}

/// Reads a message and judges what `sender` says in it.
pub(super) fn judge(bytes: &[u8], sender: &MachineId, clan: &Clan) -> Result<Message, Refusal> {
    let message = message::read(bytes).ok_or(Refusal::Malformed)?;
    let names = message.questions.iter().map(|question| &question.name).chain(message.records.iter().map(|r| &r.name));
    if names.chain(message.records.iter().filter_map(|r| r.target.as_ref())).any(|name| name.is_in(OWN_DISCOVERY)) {
        return Err(Refusal::Discovery);
    }
    for record in &message.records {
        if !message.response && record.section == Section::Answers {
            clan.known(bytes, record)?;
        } else {
            clan.claimed(bytes, record, sender)?;
        }
    }
    Ok(message)
}

impl Clan {
    /// What is said in one's own name.
    fn claimed(&self, bytes: &[u8], record: &Record, sender: &MachineId) -> Result<(), Refusal> {
        match record.kind {
            OPT if record.section == Section::Additional => return Ok(()),
            A | AAAA => {
                let address = address(bytes, record).ok_or(Refusal::Malformed)?;
                if self.addresses.get(&address) != Some(sender) {
                    return Err(Refusal::Address);
                }
            }
            CNAME | PTR | HINFO | TXT | SRV | NSEC => {}
            _ => return Err(Refusal::Kind),
        }
        if let Some(address) = reverse(&record.name) {
            if self.addresses.get(&address) != Some(sender) {
                return Err(Refusal::Address);
            }
        } else if !record.name.is_in(LOCAL) {
            return Err(Refusal::Elsewhere);
        }
        // What lists services may point to another's.
        let leads = record.target.as_ref().filter(|_| record.kind != PTR || reverse(&record.name).is_some());
        if record.target.as_ref().is_some_and(|target| !target.is_in(LOCAL)) {
            return Err(Refusal::Elsewhere);
        }
        let others = |name: &Name| self.machine_of(name).is_some_and(|machine| machine != sender);
        if others(&record.name) || leads.is_some_and(others) { Err(Refusal::Name) } else { Ok(()) }
    }

    /// What somebody who asks says to know already. It makes others keep silent, so it must not be a lie either.
    fn known(&self, bytes: &[u8], record: &Record) -> Result<(), Refusal> {
        match record.kind {
            A | AAAA => {
                let address = address(bytes, record).ok_or(Refusal::Malformed)?;
                let owner = self.addresses.get(&address).ok_or(Refusal::Address)?;
                if self.machine_of(&record.name).is_some_and(|machine| machine != owner) {
                    return Err(Refusal::Name);
                }
            }
            CNAME | PTR | HINFO | TXT | SRV | NSEC => {}
            _ => return Err(Refusal::Kind),
        }
        if record.name.is_in(LOCAL) || reverse(&record.name).is_some() { Ok(()) } else { Err(Refusal::Elsewhere) }
    }

    /// Whose name `<label>.local` is, if the label is that of a machine.
    fn machine_of(&self, name: &Name) -> Option<&MachineId> {
        let mut labels = name.labels();
        match (labels.next(), labels.next(), labels.next()) {
            (Some(label), Some(b"local"), None) => self.names.get(std::str::from_utf8(label).ok()?),
            _ => None,
        }
    }
}

/// The address in a record.
pub(super) fn address(bytes: &[u8], record: &Record) -> Option<IpAddr> {
    let data = bytes.get(record.data.clone())?;
    match record.kind {
        A => <[u8; 4]>::try_from(data).ok().map(IpAddr::from),
        AAAA => <[u8; 16]>::try_from(data).ok().map(IpAddr::from),
        _ => None,
    }
}

/// The address that a name of `in-addr.arpa` or `ip6.arpa` stands for.
fn reverse(name: &Name) -> Option<IpAddr> {
    let text = |label| std::str::from_utf8(label).ok();
    let labels: Vec<&[u8]> = name.labels().collect();
    match labels.as_slice() {
        [digits @ .., b"in-addr", b"arpa"] if digits.len() == 4 => {
            let mut octets = [0; 4];
            for (octet, label) in octets.iter_mut().zip(digits.iter().rev()) {
                *octet = text(label)?.parse().ok()?;
            }
            Some(Ipv4Addr::from(octets).into())
        }
        [digits @ .., b"ip6", b"arpa"] if digits.len() == 32 => {
            let mut octets = [0; 16];
            for (place, label) in digits.iter().rev().enumerate() {
                let digit = text(label).filter(|label| label.len() == 1)?;
                octets[place / 2] = octets[place / 2] << 4 | u8::from_str_radix(digit, 16).ok()?;
            }
            Some(Ipv6Addr::from(octets).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{super::message::tests::Writer, *};

    const ANN: MachineId = MachineId::from_bytes([1; 32]);
    const BOB: MachineId = MachineId::from_bytes([2; 32]);
    const ANNS: [u8; 4] = [100, 64, 0, 1];
    const BOBS: [u8; 4] = [100, 64, 0, 2];

    fn clan() -> Clan {
        let six = |n| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, n]);
        Clan {
            names: [("ann".to_owned(), ANN), ("bob".to_owned(), BOB)].into(),
            addresses: [(ANNS.into(), ANN), (BOBS.into(), BOB), (six(1), ANN), (six(2), BOB)].into(),
        }
    }

    /// What Ann is told to say.
    fn said(message: Writer) -> Result<(), Refusal> {
        judge(&message.bytes(), &ANN, &clan()).map(drop)
    }

    #[test]
    fn what_a_machine_offers_itself_is_carried() {
        let six: [u8; 16] = "fd00::1".parse::<Ipv6Addr>().unwrap().octets();
        let whole = Writer::response()
            .pointer("_services._dns-sd._udp.local", "_http._tcp.local")
            .pointer("_http._tcp.local", "Ann's page._http._tcp.local")
            .service("Ann's page._http._tcp.local", 80, "ann.local")
            .answer("Ann's page._http._tcp.local", TXT, b"\x06path=/")
            .answer("ann.local", A, &ANNS)
            .record(2, "Ann.local", AAAA, &six)
            .record(2, "ann.local", NSEC, b"\xc0\x0c\x00\x01\x40")
            .pointer("1.0.64.100.in-addr.arpa", "ann.local")
            .pointer(&format!("1.{}0.0.d.f.ip6.arpa", "0.".repeat(27)), "ann.local");
        assert_eq!(said(whole), Ok(()));
        // A computer may have another name than the clan's for it.
        assert_eq!(said(Writer::response().answer("anns-laptop.local", A, &ANNS)), Ok(()));
        assert_eq!(said(Writer::query().ask("_http._tcp.local", PTR, false)), Ok(()));
        assert_eq!(said(Writer::query().ask("ann.local", 255, true).record(1, "ann.local", A, &ANNS)), Ok(()));
        assert_eq!(said(Writer::query().ask("bob.local", A, true).record(2, "", OPT, b"")), Ok(()));
    }

    #[test]
    fn nobody_sends_others_elsewhere() {
        let response = Writer::response;
        for (message, why) in [
            (response().answer("page.local", A, &BOBS), Refusal::Address),
            (response().answer("page.local", A, &[192, 168, 1, 1]), Refusal::Address),
            (response().record(2, "page.local", AAAA, &[0; 16]), Refusal::Address),
            (response().record(1, "page.local", A, &BOBS), Refusal::Address),
            (Writer::query().record(1, "page.local", A, &BOBS), Refusal::Address),
            (Writer::query().record(2, "page.local", A, &BOBS), Refusal::Address),
            (response().answer("page.local", A, &[1, 2, 3]), Refusal::Malformed),
            (response().answer("bob.local", A, &ANNS), Refusal::Name),
            (response().answer("BOB.Local", A, &ANNS), Refusal::Name),
            (response().answer("bob.local", NSEC, b""), Refusal::Name),
            (response().service("page._http._tcp.local", 22, "bob.local"), Refusal::Name),
            (response().service("page._http._tcp.local", 22, "bank.example"), Refusal::Elsewhere),
            (response().answer("bank.example", A, &ANNS), Refusal::Elsewhere),
            (response().answer("local.example", A, &ANNS), Refusal::Elsewhere),
            (response().answer("", A, &ANNS), Refusal::Elsewhere),
            (response().pointer("_http._tcp.local", "page._http._tcp.example"), Refusal::Elsewhere),
            (response().pointer("b._dns-sd._udp.0.64.100.in-addr.arpa", "ann.local"), Refusal::Elsewhere),
            (response().pointer("2.0.64.100.in-addr.arpa", "ann.local"), Refusal::Address),
            (response().pointer("1.0.64.100.in-addr.arpa", "bob.local"), Refusal::Name),
            (response().answer("page.local", CNAME, b"\x03bob\x05local\x00"), Refusal::Name),
            (response().answer("page.local", 39, b"\x03bob\x05local\x00"), Refusal::Kind),
            (response().answer("page.local", 65, b""), Refusal::Kind),
            (response().answer("page.local", OPT, b""), Refusal::Kind),
        ] {
            let bytes = message.bytes();
            assert_eq!(judge(&bytes, &ANN, &clan()).map(drop), Err(why), "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn what_is_known_already_must_be_true() {
        let query = Writer::query;
        assert_eq!(said(query().answer("bob.local", A, &BOBS)), Ok(()));
        assert_eq!(said(query().service("page._http._tcp.local", 80, "bob.local")), Ok(()));
        assert_eq!(said(query().answer("bob.local", A, &ANNS)), Err(Refusal::Name));
        assert_eq!(said(query().answer("page.local", A, &[192, 168, 1, 1])), Err(Refusal::Address));
        assert_eq!(said(query().answer("bank.example", TXT, b"")), Err(Refusal::Elsewhere));
    }

    #[test]
    fn how_machines_find_each_other_on_a_lan_stays_there() {
        let key = "7rutqynuzu65fcdgoerbt4uoh3p62wuto2mp56x3uvhitqzssxga._irohv1._udp.local";
        assert_eq!(said(Writer::query().ask("_irohv1._udp.local", PTR, false)), Err(Refusal::Discovery));
        assert_eq!(said(Writer::response().answer(key, A, &ANNS)), Err(Refusal::Discovery));
        assert_eq!(said(Writer::response().pointer("_http._tcp.local", key)), Err(Refusal::Discovery));
    }
}
