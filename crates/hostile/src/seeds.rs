//! Where fuzzing begins: one well-formed input or two of each kind.

use clan_ledger::Entry;
use clan_types::{
    ByteSize, CertificateHash, ControlMode, FileHash, ImageId, InviteLink, InviteSecret, PeerAddr, Purpose, RelayAddr,
    Words,
};
use clan_wire::{
    agent::{AgentRequest, AgentResponse},
    beacon::Beacon,
    control::{ControlRequest, ControlResponse, Environment},
    helm::{
        Actor, Answer, Call, Deed, Ends, Greeting, Input, JournalEntry, OpenTerminal, Output, Proof, Refusal, Request,
        Size,
    },
    image::{FileRole, ImageFile, Manifest},
    order::{Asks, Says},
    peer::{EntryPage, ImagePart, ImageRequest, InviteProof, JoinRefusal, JoinRequest, JoinResponse, PeerMessage},
    words::{WordsRefusal, WordsRequest, WordsResponse, announcement},
};
use serde::Serialize;

use crate::clan;

/// Target and input.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let ledger = clan::ledger();
    let encoded: Vec<Vec<u8>> = ledger.entries().map(Entry::encode).collect();
    let content = |entry: &Vec<u8>| entry[66.min(entry.len())..entry.len().saturating_sub(64)].to_vec();
    let mut seeds = Vec::new();
    for entry in &encoded {
        seeds.push(("entry", [&[0xff], &entry[..]].concat()));
        let part = [&[1], &content(entry)[..]].concat();
        seeds.push(("entry", [vec![0], framed(&part), framed(&part)].concat()));
        seeds.push(("peer", framed(&[&[1], &content(entry)[..]].concat())));
        seeds.push(("join", [vec![0], framed(&content(entry))].concat()));
    }
    let messages = [
        PeerMessage::Vector(ledger.vector()),
        PeerMessage::Entries(encoded.clone()),
        PeerMessage::Hello { clan: ledger.clan(), vector: vec![] },
    ];
    seeds.extend(messages.iter().map(|message| ("peer", framed(&with(9, message)))));
    let machine = clan::machine(clan::MEMBER);
    let addrs = vec!["192.0.2.1:41640".parse().expect("an address"), "[2001:db8::1]:1".parse().expect("an address")];
    let beacon = Beacon {
        clan: ledger.clan(),
        machine,
        made: clan::now(1).wall,
        version: "0.1.0".into(),
        quic: addrs.clone(),
        wireguard: addrs.clone(),
        services: vec![],
        image: Some(ImageId::from_bytes([1; 32])),
        certificate: Some(CertificateHash::from_bytes([5; 32])),
        control: ControlMode::Remote,
    };
    seeds.push(("peer", framed(&[&[0], &bytes(&beacon)[64..]].concat())));
    let proof = InviteProof::new(&clan::key(50), &ledger.clan(), &clan::machine(clan::STRANGER));
    let what = ImagePart::Piece { file: FileHash::from_bytes([1; 32]), index: 3 };
    seeds.push(("join", with(9, &JoinRequest::Preview { proof: proof.clone(), have: ledger.vector() })));
    seeds.push(("join", with(9, &JoinRequest::Stay)));
    seeds.push(("join", with(9, &JoinRequest::Redeem { entries: encoded.clone(), have: vec![] })));
    seeds.push(("join", with(1, &JoinResponse::Refused(JoinRefusal::NameTaken { name: "bob".into() }))));
    seeds.push(("join", with(2, &ImageRequest { proof: Some(proof), what })));
    let file = |role| ImageFile { role, size: ByteSize::from_mib(1), hash: FileHash::from_bytes([2; 32]) };
    let manifest = Manifest {
        version: 1,
        title: "Debian".into(),
        architecture: "x86_64".into(),
        inputs: FileHash::from_bytes([0; 32]),
        memory_min: ByteSize::from_mib(256),
        files: [FileRole::Kernel, FileRole::Initramfs, FileRole::Root, FileRole::Layer].map(file).to_vec(),
    };
    seeds.push(("manifest", bytes(&manifest)));
    let (quic, wireguard) = (addrs.clone(), addrs.clone());
    let environment = Environment { quic, wireguard, manifest: bytes(&manifest), pieces: vec![7; 64] };
    seeds.push(("control", with(0, &ControlRequest::SetEnvironment(environment))));
    seeds.push(("control", with(1, &AgentRequest::SetClock(clan::now(1).wall))));
    seeds.push(("control", with(2, &AgentResponse::Failed("no".into()))));
    seeds.push(("control", with(3, &ControlResponse::Entries(vec![([7; 32], 3)]))));
    seeds.push(("join", with(4, &EntryPage { entries: encoded, more: true })));
    let peers = vec![PeerAddr { machine, addrs }];
    let certificate = CertificateHash::from_bytes([4; 32]);
    let relays = vec![RelayAddr { host: "203.0.113.7".parse().expect("a host"), port: 443, certificate }];
    let link = InviteLink {
        purpose: Purpose::Join,
        clan: ledger.clan(),
        secret: InviteSecret::from_bytes([3; 32]),
        peers,
        relays,
    };
    seeds.push(("link", [&[0, 2], &bytes(&link)[..]].concat()));
    seeds.push(("link", [&[1], link.to_string().as_bytes()].concat()));
    seeds.push(("mux", [vec![0], framed(&[2, 2]), framed(&[&[3, 2][..], b"data"].concat()), framed(&[5, 2])].concat()));
    seeds.push(("mux", [vec![1], framed(&[0xfe]), framed(&[0xfd, 1, 2, 3]), framed(&[0xff, 0xc1, b'm'])].concat()));
    for name in ["\u{5}alice\u{6}family\u{4}clan\0", "\u{7}example\u{3}org\0"] {
        let question = [b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00", name.as_bytes(), b"\x00\x1c\x00\x01"];
        seeds.push(("dns", question.concat()));
    }
    seeds.push(("probe", [framed(&[0, 1, 2, 3]), framed(&[1; 60]), framed(&[2; 60]), framed(&[0x80; 80])].concat()));
    let (syn, data) =
        ([&[0, 80, 0, 80][..], &[0; 16]].concat(), [&[0, 80, 0, 80][..], &[0; 9], &[0x10], &[7; 60]].concat());
    let streams = [(0x80, &data), (0x81, &data), (0x80, &syn), (0x89, &data), (0x90, &data)];
    let packets = streams.map(|(kind, body)| framed(&[&[kind], &body[..]].concat()));
    seeds.push(("packet", packets.concat()));
    seeds.push(("packet", [framed(&[&[0], &data[..]].concat()), packets[0].clone(), framed(&[0x20; 40])].concat()));
    seeds.push(("packet", framed(&[&[0x40, 1, 1, 54, 0, 20, 0, 20, 0, 16, 0, 0x45], &[0; 80][..]].concat())));
    let channel = Words::from_entropy([7; 6]).channel();
    let (begin, tag) = (WordsRequest::Begin { channel, share: vec![0x41; 33] }, WordsRequest::Confirm { tag: [1; 32] });
    seeds.extend(crate::multicast::seeds().into_iter().map(|seed| ("multicast", seed)));
    seeds.push(("words", [&[0], announcement(&[channel]).as_bytes()].concat()));
    seeds.push(("words", [&[1], Words::from_entropy([7; 6]).to_string().as_bytes()].concat()));
    seeds.push(("words", with(2, &WordsResponse::Refused(WordsRefusal::Busy))));
    seeds.push(("words", [vec![3], framed(&with(1, &begin)), framed(&with(1, &tag))].concat()));
    seeds.push(("words", [vec![4], framed(&[0x42; 33]), framed(&[9; 64])].concat()));
    seeds.extend(helm());
    seeds.extend(monitor());
    seeds
}

fn helm() -> Vec<(&'static str, Vec<u8>)> {
    let ends = Ends {
        clan: clan::ledger().clan(),
        from: clan::machine(clan::STRANGER),
        to: clan::machine(clan::MEMBER),
        // Signed for another conversation.
        challenge: [8; 32],
    };
    let size = Size { rows: 24, columns: 80 };
    let open = OpenTerminal { command: vec!["ls".into(), "-l".into()], screen: Some((size, "xterm".into())) };
    let set = Request::Set { name: "announce".into(), value: "off".into(), dry_run: false };
    let mut seeds: Vec<Vec<u8>> = [Request::Terminal(open), set, Request::Revert { number: 3, dry_run: true }]
        .into_iter()
        .map(|request| with(0, &Call { proof: Some(Proof::new(&clan::key(50), &ends, &request)), request }))
        .collect();
    let machine = clan::machine(clan::MEMBER);
    let by = Actor { person: None, name: "bob".parse().ok(), machine, machine_name: "desk".parse().ok(), here: true };
    let what = Deed::Set { name: "announce".into(), before: "on".into(), after: "off".into(), reverts: Some(2) };
    let entry = JournalEntry { number: 3, at: clan::now(1).wall, by, what };
    seeds.push(with(1, &Greeting::Challenge([1; 32])));
    seeds.push(with(2, &Answer::Journal(vec![entry.clone(), entry])));
    seeds.push(with(2, &Answer::Refused(Refusal::NoSetting { name: "x".into(), known: vec!["announce".into()] })));
    seeds.push(with(3, &Input::Resize(size)));
    seeds.push(with(4, &Output::Data(b"hello".to_vec())));
    seeds.push(with(4, &Output::Cut(Refusal::Local)));
    seeds.push(with(4, &Output::Taken(5)));
    let image = ImageId::from_bytes([1; 32]);
    let update = Request::Update { image, dry_run: false };
    let proof = Proof::new(&clan::key(50), &ends, &update);
    seeds.push(with(0, &Call { proof: Some(proof.clone()), request: update }));
    seeds.push(with(2, &Answer::Sign { image, challenge: [3; 32] }));
    seeds.push(with(5, &Asks::Order { image, dry_run: true }));
    seeds.push(with(5, &Asks::Signed(proof)));
    seeds.push(with(6, &Says::Sign([3; 32])));
    seeds.push(with(6, &Says::Refused(Refusal::NotPublished { image })));
    seeds.into_iter().map(|seed| ("helm", seed)).collect()
}

/// What QEMU says to a manager that connects, asks, and hears of the guest's end.
fn monitor() -> Vec<(&'static str, Vec<u8>)> {
    let greeting = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}"#;
    let ready = r#"{"return": {}, "id": 0}"#;
    let running = r#"{"return": {"status": "running", "singlestep": false, "running": true}, "id": 1}"#;
    let refused = r#"{"error": {"class": "GenericError", "desc": "No"}, "id": 2}"#;
    let full =
        r#"{"event": "BLOCK_IO_ERROR", "data": {"action": "stop"}, "timestamp": {"seconds": 1, "microseconds": 2}}"#;
    let shutdown = r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}"#;
    let sessions =
        [vec![greeting, ready, running, refused, shutdown], vec![greeting, full, ready, running], vec![full]];
    let said = |lines: Vec<&str>| [vec![2], lines.join("\r\n").into_bytes(), b"\n".to_vec()].concat();
    sessions.into_iter().map(|lines| ("qmp", said(lines))).collect()
}

fn framed(part: &[u8]) -> Vec<u8> {
    let length = u16::try_from(part.len()).unwrap_or(u16::MAX);
    [&length.to_le_bytes(), part].concat()
}

fn bytes(message: &impl Serialize) -> Vec<u8> {
    postcard::to_allocvec(message).expect("a message of ours")
}

fn with(kind: u8, message: &impl Serialize) -> Vec<u8> {
    [vec![kind], bytes(message)].concat()
}
