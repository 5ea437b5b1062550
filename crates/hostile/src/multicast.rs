//! What a member says by multicast DNS. Programs read it with parsers of their own: one of those is asked whether anything
//! slipped through.

use std::{
    net::{IpAddr, Ipv6Addr},
    time::Duration,
};

use clan_tunnel::multicast::{GROUP_V6, MAX_PACKET, Multicast, PORT};
use clan_types::MachineId;
use hickory_proto::{
    op::{Message, MessageType},
    rr::{Name, RData, Record, RecordType},
};

use crate::clan;

const HERE: u8 = 1;
const THERE: u8 = 2;
/// A UDP datagram in IPv6 has its payload behind these.
const HEADERS: usize = 48;

fn id(n: u8) -> MachineId {
    MachineId::from_bytes([n; 32])
}

fn address(n: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n.into())
}

fn machine(own: u8, other: u8) -> Multicast {
    let mut machine = Multicast::new(id(own), address(own));
    machine.set_names(Some([("here".to_owned(), id(HERE)), ("there".to_owned(), id(THERE))].into()));
    machine.set_others([(address(other).into(), id(other))].into());
    machine
}

/// Messages that a member sends, and that a program here sends: whatever passes is honest, and whatever leaves is taken elsewhere.
pub fn multicast(data: &[u8]) {
    let (mut here, mut there) = (machine(HERE, THERE), machine(THERE, HERE));
    let mut now = Duration::ZERO;
    for part in clan::parts(data) {
        let Some((kind, payload)) = part.split_first() else { continue };
        now += Duration::from_secs(1);
        let port = if kind & 1 == 0 { PORT } else { 4000 };
        let alone = kind & 2 != 0;
        let to = if alone { address(HERE) } else { GROUP_V6 };
        let packet = datagram(address(THERE), to, port, if alone { 4000 } else { PORT }, payload);
        let heard = if alone { here.inbound_alone(&packet, now) } else { here.inbound(&id(THERE), &packet, now) };
        if let Some(heard) = heard {
            assert_eq!(heard.get(HEADERS..), Some(payload), "a message is handed on as it is");
            honest(payload);
        }
        // It asks whoever answers in the next part.
        if let Some(admitted) = here.outbound(&datagram(address(HERE), GROUP_V6, port, PORT, payload), now) {
            here.say(admitted, vec![id(THERE)]);
        }
        while let Some((to, copy)) = here.poll(now) {
            assert!(to == id(THERE) && copy.len() <= MAX_PACKET);
            assert!(there.inbound(&id(HERE), &copy, now).is_some(), "what leaves here is refused there");
        }
    }
}

fn datagram(from: Ipv6Addr, to: Ipv6Addr, source: u16, destination: u16, payload: &[u8]) -> Vec<u8> {
    let length = (8 + payload.len() as u16).to_be_bytes();
    let ports = [source.to_be_bytes(), destination.to_be_bytes()].concat();
    [
        &[0x60, 0, 0, 0, length[0], length[1], 17, 255][..],
        &from.octets(),
        &to.octets(),
        &ports,
        &length,
        &[0, 0],
        payload,
    ]
    .concat()
}

/// As far as another parser understands it, it says of its sender what the sender is.
fn honest(payload: &[u8]) {
    let Ok(message) = Message::from_vec(payload) else { return };
    let response = message.metadata.message_type == MessageType::Response;
    let claimed = message.authorities.iter().chain(&message.additionals);
    let claimed: Vec<&Record> = claimed.chain(message.answers.iter().filter(|_| response)).collect();
    for record in claimed {
        let name = labels(&record.name);
        assert!(matches!(name.last().map(String::as_str), Some("local" | "arpa")), "{record}");
        assert_ne!(name, ["here", "local"], "{record}");
        match &record.data {
            RData::AAAA(found) => assert_eq!(IpAddr::from(found.0), IpAddr::from(address(THERE)), "{record}"),
            RData::SRV(srv) => {
                let target = labels(&srv.target);
                assert!(target.last().is_some_and(|label| label == "local") && target != ["here", "local"], "{record}");
            }
            _ => assert_ne!(record.record_type(), RecordType::A, "it has no such address: {record}"),
        }
    }
}

fn labels(name: &Name) -> Vec<String> {
    name.iter().map(|label| label.escape_ascii().to_string().to_ascii_lowercase()).collect()
}

/// Where fuzzing begins.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let name = |text: &str| -> Vec<u8> {
        let labels = text.split('.').flat_map(|label| [&[label.len() as u8], label.as_bytes()].concat());
        labels.chain([0]).collect()
    };
    let record = |owner: &str, kind: u16, data: &[u8]| {
        let length = (data.len() as u16).to_be_bytes();
        [&name(owner)[..], &kind.to_be_bytes(), &[0x80, 1, 0, 0, 0, 120], &length, data].concat()
    };
    let header = |response: bool, counts: [u8; 4]| {
        let mut header = [0; 12];
        header[2] = if response { 0x84 } else { 0 };
        counts.into_iter().enumerate().for_each(|(at, count)| header[5 + 2 * at] = count);
        header
    };
    let service = "page._http._tcp.local";
    let host = |label: &str, n: u8| {
        let target = [&[0, 0, 0, 0, 0, 80], &name(label)[..]].concat();
        let records = [
            record("_http._tcp.local", 12, &name(service)),
            record(service, 33, &target),
            record(service, 16, b"\x06path=/"),
            record(label, 28, &address(n).octets()),
        ];
        [&header(true, [0, 4, 0, 0])[..], &records.concat()].concat()
    };
    let ask = [&header(false, [1, 1, 0, 0])[..], &name("_http._tcp.local"), &[0, 12, 0x80, 1]].concat();
    let ask = [ask, record("_http._tcp.local", 12, &name(service))].concat();
    let probe = [&header(false, [1, 0, 1, 0])[..], &name("there.local"), &[0, 255, 0x80, 1]].concat();
    let probe = [probe, record("there.local", 28, &address(THERE).octets())].concat();
    let compressed = [&header(true, [0, 1, 0, 1])[..], &record("there.local", 28, &address(THERE).octets())].concat();
    let compressed =
        [&compressed[..], &[0xc0, 12, 0, 28, 0x80, 1, 0, 0, 0, 120, 0, 16], &address(THERE).octets()].concat();
    let part = |kind: u8, message: &[u8]| [&(message.len() as u16 + 1).to_le_bytes()[..], &[kind], message].concat();
    vec![
        part(0, &host("there.local", THERE)),
        part(0, &host("here.local", HERE)),
        [part(1, &ask), part(2, &host("there.local", THERE))].concat(),
        [part(0, &probe), part(0, &compressed)].concat(),
    ]
}
