//! From the bytes of a question to the bytes of the answer: no I/O.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, AAAA, NS, PTR, SOA},
    },
};

use super::Zone;

/// How long others may remember an answer, in seconds: names move when machines come and go.
const TTL: u32 = 5;
const ZONE: &str = "clan.";
const HEADER: usize = 12;

/// What to do with a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Send this.
    Reply(Vec<u8>),
    /// The name is not ours: pass the question on, or send this refusal.
    Forward {
        /// The refusal.
        refusal: Vec<u8>,
    },
    /// Say nothing: this is not a question.
    Ignore,
}

/// Answers one message, of any content.
pub fn answer(bytes: &[u8], zone: &Zone) -> Answer {
    // A response must never be answered, or two servers could keep one another busy.
    if bytes.len() < HEADER || bytes[2] & 0x80 != 0 {
        return Answer::Ignore;
    }
    let id = u16::from_be_bytes([bytes[0], bytes[1]]);
    let Ok(question) = Message::from_vec(bytes) else {
        return reply(&Message::error_msg(id, OpCode::Query, ResponseCode::FormErr));
    };
    let mut response = Message::response(id, question.metadata.op_code);
    response.metadata.recursion_desired = question.metadata.recursion_desired;
    response.queries.clone_from(&question.queries);
    if let Some(edns) = &question.edns {
        let mut own = hickory_proto::op::Edns::new();
        own.set_max_payload(1232).set_version(0);
        response.edns = Some(own);
        if edns.version() > 0 {
            response.metadata.response_code = ResponseCode::BADVERS;
            return reply(&response);
        }
    }
    if question.metadata.message_type != MessageType::Query || question.metadata.op_code != OpCode::Query {
        response.metadata.response_code = ResponseCode::NotImp;
        return reply(&response);
    }
    let [query] = &question.queries[..] else {
        response.metadata.response_code = ResponseCode::FormErr;
        return reply(&response);
    };
    let Some(found) = look_up(query, zone) else {
        response.metadata.response_code = ResponseCode::Refused;
        return match reply(&response) {
            Answer::Reply(refusal) => Answer::Forward { refusal },
            other => other,
        };
    };
    response.metadata.authoritative = true;
    match found {
        Found::Records(records) => response.answers = records,
        Found::NoData(apex) => response.authorities = soa(&apex),
        Found::NoName(apex) => {
            response.metadata.response_code = ResponseCode::NXDomain;
            response.authorities = soa(&apex);
        }
    }
    reply(&response)
}

/// The answer, cut to `limit` bytes as DNS cuts: without records, and with the flag that says so.
pub(super) fn truncate(bytes: Vec<u8>, limit: usize) -> Vec<u8> {
    if bytes.len() <= limit {
        return bytes;
    }
    let shortened = Message::from_vec(&bytes).ok().and_then(|message| {
        let mut message = message.truncate();
        message.metadata.truncation = true;
        message.to_vec().ok()
    });
    shortened.unwrap_or_default()
}

/// How long an answer to this question may be over UDP.
pub(super) fn udp_limit(bytes: &[u8]) -> usize {
    let asked = Message::from_vec(bytes).map_or(512, |message| message.max_payload());
    usize::from(asked).clamp(512, 1232)
}

fn reply(message: &Message) -> Answer {
    message.to_vec().map_or(Answer::Ignore, Answer::Reply)
}

enum Found {
    Records(Vec<Record>),
    /// The name exists, without such a record. Holds the zone's top.
    NoData(Name),
    NoName(Name),
}

/// `None`: not in a zone of ours.
fn look_up(query: &Query, zone: &Zone) -> Option<Found> {
    if query.query_class() != DNSClass::IN {
        return None;
    }
    let wants = |record| query.query_type() == record || query.query_type() == RecordType::ANY;
    let name = query.name().to_lowercase();
    let labels: Vec<String> = name.iter().map(|label| String::from_utf8_lossy(label).into_owned()).collect();
    let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
    if let Some(found) = reverse(&name, &labels, query, zone, wants(RecordType::PTR)) {
        return Some(found);
    }
    let apex = Name::from_str(ZONE).ok()?;
    let clan = zone.clan.as_str();
    // A host's short name wins over the clan's own.
    let host = match labels[..] {
        [label, "clan"] => zone.hosts.get(label),
        [label, inner, "clan"] if inner == clan => zone.hosts.get(label),
        _ => None,
    };
    if let Some(address) = host {
        let mut records = Vec::new();
        if wants(RecordType::AAAA) {
            records.push(Record::from_rdata(query.name().clone(), TTL, RData::AAAA(AAAA(*address))));
        }
        if let (true, Some(ipv4)) = (wants(RecordType::A), zone.ipv4.get(address)) {
            records.push(Record::from_rdata(query.name().clone(), TTL, RData::A(A(*ipv4))));
        }
        return Some(if records.is_empty() { Found::NoData(apex) } else { Found::Records(records) });
    }
    match labels[..] {
        ["clan"] if wants(RecordType::SOA) => Some(Found::Records(soa(&apex))),
        ["clan"] if wants(RecordType::NS) => {
            Some(Found::Records(vec![Record::from_rdata(apex.clone(), TTL, RData::NS(NS(server_name()?)))]))
        }
        ["clan"] => Some(Found::NoData(apex)),
        [inner, "clan"] if inner == clan => Some(Found::NoData(apex)),
        [.., "clan"] => Some(Found::NoName(apex)),
        _ => None,
    }
}

/// Names of addresses: ours within the clan's /48, whose zone is the twelve last digits before `ip6.arpa`.
fn reverse(name: &Name, labels: &[&str], query: &Query, zone: &Zone, wants_ptr: bool) -> Option<Found> {
    if let [d, c, b, a, "in-addr", "arpa"] = labels {
        return reverse_ipv4([a, b, c, d], query, zone, wants_ptr);
    }
    let [digits @ .., "ip6", "arpa"] = labels else { return None };
    let nibbles: Option<Vec<u8>> =
        digits.iter().rev().map(|d| if d.len() == 1 { u8::from_str_radix(d, 16).ok() } else { None }).collect();
    let sample = zone.hosts.values().next()?.octets();
    let prefix: Vec<u8> = sample[..6].iter().flat_map(|octet| [octet >> 4, octet & 15]).collect();
    let apex_labels = prefix
        .iter()
        .rev()
        .map(|n| format!("{n:x}"))
        .chain(["ip6".into(), "arpa".into()])
        .collect::<Vec<_>>()
        .join(".");
    let apex = Name::from_str(&format!("{apex_labels}.")).ok()?;
    let Some(nibbles) = nibbles else { return apex.zone_of(name).then_some(Found::NoName(apex)) };
    if nibbles.get(..prefix.len()) != Some(&prefix[..]) {
        return None;
    }
    if nibbles.len() > 32 {
        return Some(Found::NoName(apex));
    }
    let under = |address: &Ipv6Addr| {
        let digits = address.octets().into_iter().flat_map(|octet| [octet >> 4, octet & 15]);
        digits.zip(&nibbles).all(|(a, b)| a == *b)
    };
    let mut hosts = zone.hosts.iter().filter(|(_, address)| under(address)).peekable();
    if hosts.peek().is_none() {
        return Some(if nibbles.len() <= prefix.len() { Found::NoData(apex) } else { Found::NoName(apex) });
    }
    if nibbles.len() < 32 || !wants_ptr {
        return Some(Found::NoData(apex));
    }
    Some(Found::Records(hosts.filter_map(|(label, _)| pointer(label, query, zone)).collect()))
}

/// Names of second addresses. Others of 100.64.0.0/10 are not ours to deny.
fn reverse_ipv4(octets: [&str; 4], query: &Query, zone: &Zone, wants_ptr: bool) -> Option<Found> {
    let address: Ipv4Addr = octets.join(".").parse().ok()?;
    let (owner, _) = zone.ipv4.iter().find(|(_, ipv4)| **ipv4 == address)?;
    let hosts = zone.hosts.iter().filter(|(_, host)| *host == owner);
    let records: Vec<Record> = hosts.filter_map(|(label, _)| pointer(label, query, zone)).collect();
    let found = if wants_ptr { Found::Records(records) } else { Found::NoData(query.name().clone()) };
    Some(found)
}

fn pointer(label: &str, query: &Query, zone: &Zone) -> Option<Record> {
    let name = Name::from_str(&format!("{label}.{}.{ZONE}", zone.clan.as_str())).ok()?;
    Some(Record::from_rdata(query.name().clone(), TTL, RData::PTR(PTR(name))))
}

fn server_name() -> Option<Name> {
    Name::from_str("ns.clan.").ok()
}

fn soa(apex: &Name) -> Vec<Record> {
    let (Some(server), Ok(mailbox)) = (server_name(), Name::from_str("nobody.invalid.")) else { return Vec::new() };
    // Serial and timers serve secondaries, of which there are none; the last number bounds negative answers.
    vec![Record::from_rdata(apex.clone(), TTL, RData::SOA(SOA::new(server, mailbox, 1, 3600, 600, 86_400, TTL)))]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn zone() -> Zone {
        let hosts = [("alice", "fd01:203:405::1"), ("wiki", "fd01:203:405::1"), ("bob", "fd01:203:405::2")];
        Zone {
            clan: "family".parse().unwrap(),
            hosts: hosts.into_iter().map(|(l, a)| (l.to_owned(), a.parse().unwrap())).collect(),
            ipv4: [("fd01:203:405::2".parse().unwrap(), "100.70.1.2".parse().unwrap())].into(),
        }
    }

    fn ask(name: &str, record: RecordType) -> Vec<u8> {
        let mut message = Message::query();
        message.metadata.id = 4711;
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_str(name).unwrap(), record));
        message.to_vec().unwrap()
    }

    fn answered(name: &str, record: RecordType) -> Message {
        let Answer::Reply(bytes) = answer(&ask(name, record), &zone()) else { panic!("{name}: no reply") };
        let message = Message::from_vec(&bytes).unwrap();
        assert_eq!((message.metadata.id, message.metadata.message_type), (4711, MessageType::Response));
        assert!(message.metadata.authoritative);
        message
    }

    fn texts(message: &Message) -> Vec<String> {
        message.answers.iter().map(|r| r.data.to_string()).collect()
    }

    #[test]
    fn hosts_and_services_have_a_long_and_a_short_name_in_any_case() {
        for name in ["alice.family.clan.", "alice.clan.", "Wiki.FAMILY.Clan."] {
            let message = answered(name, RecordType::AAAA);
            assert_eq!(texts(&message), ["fd01:203:405::1"]);
            assert_eq!(message.answers[0].ttl, 5);
        }
    }

    #[test]
    fn second_addresses_are_told_where_there_are_any() {
        assert_eq!(texts(&answered("bob.family.clan.", RecordType::A)), ["100.70.1.2"]);
        assert_eq!(texts(&answered("bob.family.clan.", RecordType::ANY)), ["fd01:203:405::2", "100.70.1.2"]);
        assert_eq!(texts(&answered("2.1.70.100.in-addr.arpa.", RecordType::PTR)), ["bob.family.clan."]);
        let other = answer(&ask("3.1.70.100.in-addr.arpa.", RecordType::PTR), &zone());
        assert!(matches!(other, Answer::Forward { .. }), "somebody else's");
    }

    #[test]
    fn a_name_without_such_a_record_exists_all_the_same() {
        for (name, record) in
            [("alice.family.clan.", RecordType::A), ("family.clan.", RecordType::AAAA), ("clan.", RecordType::A)]
        {
            let message = answered(name, record);
            assert_eq!(message.metadata.response_code, ResponseCode::NoError);
            assert!(message.answers.is_empty());
            assert_eq!(message.authorities.len(), 1, "the SOA says how long to remember");
        }
    }

    #[test]
    fn a_name_that_is_not_there_does_not_exist() {
        for name in ["carol.family.clan.", "carol.clan.", "alice.other.clan.", "a.b.c.clan.", "www.alice.family.clan."]
        {
            let message = answered(name, RecordType::AAAA);
            assert_eq!(message.metadata.response_code, ResponseCode::NXDomain, "{name}");
            assert_eq!(message.authorities[0].record_type(), RecordType::SOA);
        }
    }

    #[test]
    fn addresses_have_names() {
        let arpa = |a: &str| Name::from(a.parse::<Ipv6Addr>().unwrap()).to_string();
        let message = answered(&arpa("fd01:203:405::1"), RecordType::PTR);
        assert_eq!(texts(&message), ["alice.family.clan.", "wiki.family.clan."]);
        assert_eq!(answered(&arpa("fd01:203:405::9"), RecordType::PTR).metadata.response_code, ResponseCode::NXDomain);
        assert!(
            matches!(answer(&ask(&arpa("fd02::1"), RecordType::PTR), &zone()), Answer::Forward { .. }),
            "another clan's"
        );
    }

    #[test]
    fn other_zones_are_passed_on() {
        for name in ["example.org.", "clan.example.org.", ".", "notclan."] {
            let Answer::Forward { refusal } = answer(&ask(name, RecordType::A), &zone()) else { panic!("{name}") };
            let refusal = Message::from_vec(&refusal).unwrap();
            assert_eq!(refusal.metadata.response_code, ResponseCode::Refused);
            assert!(!refusal.metadata.authoritative);
        }
    }

    #[test]
    fn responses_and_scraps_are_ignored_and_damaged_questions_are_told_so() {
        let mut response = ask("alice.clan.", RecordType::AAAA);
        response[2] |= 0x80;
        assert_eq!(answer(&response, &zone()), Answer::Ignore);
        assert_eq!(answer(&[0; 11], &zone()), Answer::Ignore);
        let question = ask("alice.clan.", RecordType::AAAA);
        let Answer::Reply(bytes) = answer(&question[..question.len() - 3], &zone()) else { panic!() };
        assert_eq!(Message::from_vec(&bytes).unwrap().metadata.response_code, ResponseCode::FormErr);
    }

    #[test]
    fn an_answer_that_is_too_long_says_that_it_was_cut() {
        let mut many = zone();
        many.hosts.extend((0..100).map(|n| (format!("service-{n}"), "fd01:203:405::1".parse().unwrap())));
        let question = ask(&Name::from("fd01:203:405::1".parse::<Ipv6Addr>().unwrap()).to_string(), RecordType::PTR);
        let Answer::Reply(bytes) = answer(&question, &many) else { panic!() };
        assert!(bytes.len() > 1232);
        let cut = truncate(bytes, udp_limit(&question));
        let message = Message::from_vec(&cut).unwrap();
        assert!(cut.len() <= 512 && message.metadata.truncation && message.answers.is_empty());
    }

    proptest! {
        #[test]
        fn answering_anything_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let _ = (answer(&bytes, &zone()), udp_limit(&bytes));
        }

        #[test]
        fn a_changed_question_never_panics(at in 0usize..40, by: u8, cut in 0usize..60) {
            let mut bytes = ask("alice.family.clan.", RecordType::AAAA);
            let length = bytes.len();
            bytes[at % length] ^= by;
            bytes.truncate(length.saturating_sub(cut));
            if let Answer::Reply(reply) = answer(&bytes, &zone()) {
                let _ = truncate(reply, 20);
            }
        }
    }
}
