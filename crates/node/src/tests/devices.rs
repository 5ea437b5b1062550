//! A person's further devices, and coming back with nothing but a recovery phrase.

use clan_ledger::{DeviceKind, Standing};
use clan_types::{DEVICE_LINK, DEVICE_LINK_LIFETIME, RecoveryPhrase};
use clan_wire::peer::{ALPN_JOIN, DeviceProof, JoinRequest, JoinResponse, MAX_MESSAGE};

use super::*;

fn author(seed: u8) -> AuthorId {
    AuthorId::of(&key(seed))
}

fn ledger_of(clan: &ClanId, entries: &[EncodedEntry]) -> Ledger {
    let mut ledger = Ledger::open(*clan);
    for entry in entries {
        ledger.insert(clan_ledger::Entry::decode(entry).unwrap()).unwrap();
    }
    ledger
}

/// One more entry, as it is sent.
fn signed(ledger: &mut Ledger, by: &SigningKey, body: Body) -> EncodedEntry {
    let entry = ledger.author(by, body, now()).unwrap();
    ledger.insert(entry.clone()).unwrap();
    entry.encode()
}

fn phrase() -> RecoveryPhrase {
    RecoveryPhrase::from_entropy([42; 16])
}

fn phrase_key() -> SigningKey {
    SigningKey::from_bytes(&phrase().key_seed())
}

/// The founder (person 1, machine 2) adds a device of this key.
async fn with_device(device: &SigningKey, name: &str, kind: DeviceKind) -> (Machine, ClanId) {
    let (founder, clan) = founded(2, tomorrow()).await;
    let mut ledger = ledger_of(&clan, &founder.core.entries().await);
    let body = Body::add_device(device, &clan, &author(1), name.parse().unwrap(), kind);
    founder.core.insert(vec![signed(&mut ledger, &key(1), body)]).await.unwrap();
    (founder, clan)
}

/// The answer, and the entries that follow it.
async fn asked(host: &Machine, from: &Endpoint, request: JoinRequest) -> (JoinResponse, Vec<EncodedEntry>) {
    let connection = from.connect(net::endpoint_addr(&host.addr(), &[]).unwrap(), ALPN_JOIN).await.unwrap();
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send_message(&mut send, &request, MAX_MESSAGE).await.unwrap();
    let answer = recv_message(&mut recv, MAX_MESSAGE).await.unwrap();
    let mut entries = Vec::new();
    let mut more = !matches!(answer, JoinResponse::Refused(_));
    while more {
        let page = clan_os::channel::recv_page(&mut recv).await.unwrap();
        entries.extend(page.entries);
        more = page.more;
    }
    (answer, entries)
}

fn id(endpoint: &Endpoint) -> MachineId {
    MachineId::from_bytes(*endpoint.id().as_bytes())
}

#[tokio::test]
async fn a_recovery_phrase_brings_the_owner_back_on_a_new_computer() {
    let (founder, _) = with_device(&phrase_key(), "recovery", DeviceKind::Recovery).await;
    // All that is left is the phrase, and the network that a machine of the clan is on.
    let typed: RecoveryPhrase = phrase().words().parse().unwrap();
    let recovery = SigningKey::from_bytes(&typed.key_seed());
    let from = endpoint(&key(50)).await;
    let proof = DeviceProof::new(&recovery, &founder.id(), &id(&from));
    let (JoinResponse::Preview, entries) = asked(&founder, &from, JoinRequest::Locate { proof, have: vec![] }).await
    else {
        panic!("the clan does not know the phrase")
    };
    let clan = clan_ledger::Entry::decode(&entries[0]).unwrap().clan();
    let mut ledger = ledger_of(&clan, &entries);

    // The phrase's key adds a key of this computer, which adds its machine.
    let (device, machine) = (key(51), key(52));
    let by = AuthorId::of(&recovery);
    let body = Body::add_device(&device, &clan, &by, "new-laptop".parse().unwrap(), DeviceKind::Device);
    let entries = vec![signed(&mut ledger, &recovery, body)];
    let (JoinResponse::Admitted { .. }, _) =
        asked(&founder, &from, JoinRequest::Redeem { entries, have: vec![] }).await
    else {
        panic!("the phrase adds no device")
    };
    let mine = vec![signed(&mut ledger, &device, enrol(&clan, &device, &machine, "new-laptop"))];
    let (endpoint, entries) = ask(&founder, &machine, mine).await;
    let back = Machine::start(machine, &clan, &entries.unwrap(), endpoint, vec![founder.addr()]).await;
    back.until("the new machine is connected", |v| v.links.len() == 1).await;
    let view = back.core.view();
    assert_eq!(view.state.machine_in_good_standing(&back.id()).unwrap().owner, person(1), "it is the owner's");
    assert_eq!(view.state.role_of(&person(1)), Some(Role::Owner));

    // The old device is put out; the owner stays, and can do from the new one what they could.
    let mut ledger = ledger_of(&clan, &back.core.entries().await);
    let out = ledger.revocation_of_device(&author(1).device());
    let entry = signed(&mut ledger, &device, out);
    back.core.insert(vec![entry]).await.unwrap();
    founder.until("the old device is out", |v| v.state.device_in_good_standing(&author(1).device()).is_none()).await;
    let invite = |seed: u8| InviteId::from_bytes(key(seed).verifying_key().to_bytes());
    let body =
        |seed| Body::Invite { invite: invite(seed), role: Role::Member, uses: 1, expires: tomorrow(), approval: false };
    let theirs = signed(&mut ledger_of(&clan, &founder.core.entries().await), &key(1), body(60));
    let ours = signed(&mut ledger, &device, body(61));
    back.core.insert(vec![theirs, ours]).await.unwrap();
    founder.until("the owner invites", |v| v.state.invites.contains_key(&invite(61))).await;
    assert!(!founder.core.view().state.invites.contains_key(&invite(60)), "the old device signs in vain");
    assert_eq!(founder.core.view().state.person(&person(1)).unwrap().standing, Standing::Good);
}

#[tokio::test]
async fn another_phrase_and_a_proof_for_another_machine_open_nothing() {
    let (founder, _) = with_device(&phrase_key(), "recovery", DeviceKind::Recovery).await;
    let from = endpoint(&key(50)).await;
    let other = SigningKey::from_bytes(&RecoveryPhrase::from_entropy([43; 16]).key_seed());
    for proof in [
        DeviceProof::new(&other, &founder.id(), &id(&from)),
        DeviceProof::new(&phrase_key(), &id(&from), &founder.id()),
        DeviceProof::new(&phrase_key(), &founder.id(), &founder.id()),
    ] {
        let (answer, _) = asked(&founder, &from, JoinRequest::Locate { proof, have: vec![] }).await;
        assert_eq!(answer, JoinResponse::Refused(JoinRefusal::UnknownInvite));
    }
}

#[tokio::test]
async fn who_comes_back_brings_devices_and_machines_and_nothing_else() {
    let (founder, clan) = with_device(&key(30), "tablet", DeviceKind::Device).await;
    let from = endpoint(&key(50)).await;
    let before = founder.core.entries().await;
    let invite = InviteId::from_bytes(key(8).verifying_key().to_bytes());
    let body = Body::Invite { invite, role: Role::Owner, uses: 9, expires: tomorrow(), approval: false };
    let smuggled = vec![signed(&mut ledger_of(&clan, &before), &key(30), body)];
    let (answer, _) = asked(&founder, &from, JoinRequest::Redeem { entries: smuggled, have: vec![] }).await;
    assert_eq!(answer, JoinResponse::Refused(JoinRefusal::Malformed));
    let taken = vec![signed(&mut ledger_of(&clan, &before), &key(30), enrol(&clan, &key(30), &key(31), "founder"))];
    let (answer, _) = asked(&founder, &from, JoinRequest::Redeem { entries: taken, have: vec![] }).await;
    assert_eq!(answer, JoinResponse::Refused(JoinRefusal::NameTaken { name: "founder".into() }));
    let stranger = vec![signed(&mut ledger_of(&clan, &before), &key(33), enrol(&clan, &key(33), &key(34), "trojan"))];
    let (answer, _) = asked(&founder, &from, JoinRequest::Redeem { entries: stranger, have: vec![] }).await;
    assert!(matches!(answer, JoinResponse::Refused(_)), "{answer:?}");
    assert_eq!(founder.core.entries().await.len(), before.len(), "nothing of it was recorded");
}

#[tokio::test]
async fn a_device_link_works_once_and_for_ten_minutes() {
    let link = key(70);
    let (founder, clan) = with_device(&link, &format!("{DEVICE_LINK}abc"), DeviceKind::Recovery).await;
    let from = endpoint(&key(50)).await;
    let proof = |by: &SigningKey| InviteProof::new(by, &clan, &id(&from));
    let preview = |by: &SigningKey| JoinRequest::Preview { proof: proof(by), have: vec![] };
    let (JoinResponse::Preview, entries) = asked(&founder, &from, preview(&link)).await else { panic!("no preview") };
    let mut ledger = ledger_of(&clan, &entries);
    let by = AuthorId::of(&link);
    let device = key(71);
    let body = Body::add_device(&device, &clan, &by, "tablet".parse().unwrap(), DeviceKind::Device);
    let added = vec![signed(&mut ledger, &link, body)];
    assert!(matches!(
        asked(&founder, &from, JoinRequest::Redeem { entries: added, have: vec![] }).await,
        (JoinResponse::Admitted { .. }, _)
    ));
    let over = ledger.revocation_of_device(&by.device());
    let mine = vec![
        signed(&mut ledger, &device, over),
        signed(&mut ledger, &device, enrol(&clan, &device, &key(72), "tablet")),
    ];
    assert!(matches!(
        asked(&founder, &from, JoinRequest::Redeem { entries: mine, have: vec![] }).await,
        (JoinResponse::Admitted { .. }, _)
    ));
    assert!(matches!(asked(&founder, &from, preview(&device)).await, (JoinResponse::Preview, _)), "the device stays");
    assert_eq!(asked(&founder, &from, preview(&link)).await.0, JoinResponse::Refused(JoinRefusal::UnknownInvite));

    // The same in a clan whose link is older.
    // A machine of its own: two with one key would be taken for each other.
    let (ada, machine, link) = (key(1), key(74), key(73));
    let then = Timestamp::from_millis(now().as_millis() - DEVICE_LINK_LIFETIME.as_millis() as u64 - 60_000);
    let (mut ledger, _) =
        Ledger::found(&ada, "family".parse().unwrap(), "ada".parse().unwrap(), [8; 32], then).unwrap();
    let clan = ledger.clan();
    let name = format!("{DEVICE_LINK}old").parse().unwrap();
    for body in [
        enrol(&clan, &ada, &machine, "founder"),
        Body::add_device(&link, &clan, &author(1), name, DeviceKind::Recovery),
    ] {
        let entry = ledger.author(&ada, body, then).unwrap();
        ledger.insert(entry).unwrap();
    }
    let late = Machine::start(machine.clone(), &clan, &encode(&ledger), endpoint(&machine).await, vec![]).await;
    let proof = InviteProof::new(&link, &clan, &id(&from));
    let (answer, _) = asked(&late, &from, JoinRequest::Preview { proof, have: vec![] }).await;
    assert_eq!(answer, JoinResponse::Refused(JoinRefusal::Expired));
    let body = Body::add_device(&key(71), &clan, &AuthorId::of(&link), "late".parse().unwrap(), DeviceKind::Device);
    let added = vec![signed(&mut ledger, &link, body)];
    let (answer, _) = asked(&late, &from, JoinRequest::Redeem { entries: added, have: vec![] }).await;
    assert_eq!(answer, JoinResponse::Refused(JoinRefusal::Expired));
}
