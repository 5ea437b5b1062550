//! Machines of a clan on loopback: real endpoints, real ledgers on disk, everything but the packet device.

use std::{io::Write, net::Ipv4Addr, sync::Arc, time::Duration};

use clan_ledger::{AuthorId, Body, Ledger};
use clan_os::channel::{recv_message, send_message};
use clan_relay::Names;
use clan_store::LedgerStore;
use clan_types::{ByteSize, ClanId, FileHash, InviteId, MachineId, PeerAddr, PersonId, Role, Timestamp, WgPublicKey};
use clan_wire::{
    beacon::{ServiceKind, ServiceOffer},
    control::Redeem,
    image::{FileRole, ImageFile, Manifest},
    peer::{
        ALPN_IMAGE, EncodedEntry, ImagePart, ImageRequest, ImageResponse, InviteProof, JoinRefusal, MAX_IMAGE_MESSAGE,
    },
    pieces::PIECE,
};
use ed25519_dalek::SigningKey;
use iroh::{Endpoint, endpoint::Connection};
use tokio::{task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    Computer, Host,
    core::{Core, CoreHandle, Own, View, now},
    helm::{Helm, Possible},
    image::{Disks, ImageServer},
    join::{self, RedeemError},
    mesh,
    net::{self, Desks},
    peer,
    sockets::Alarm,
    words::{self as desk, WordsDesk},
};

mod devices;
mod large;
mod memory;
mod places;
mod recall;
mod words;

const LIMIT: Duration = Duration::from_secs(20);
/// Whoever is put out is cut off by every machine that can be reached within this time.
const CUT_OFF: Duration = Duration::from_secs(3);

pub(crate) struct Machine {
    pub(crate) core: CoreHandle,
    pub(crate) endpoint: Endpoint,
    pub(crate) key: SigningKey,
    images: Arc<ImageServer>,
    pub(crate) words: Arc<WordsDesk>,
    pub(crate) helm: Arc<Helm>,
    cancel: CancellationToken,
    tasks: JoinSet<()>,
    pub(crate) dir: tempfile::TempDir,
}

impl Machine {
    /// A machine with its own ledger file, serving on a loopback port.
    async fn start(
        key: SigningKey,
        clan: &ClanId,
        entries: &[EncodedEntry],
        endpoint: Endpoint,
        bootstrap: Vec<PeerAddr>,
    ) -> Self {
        Self::start_admitted(key, clan, entries, endpoint, bootstrap, None).await
    }

    async fn start_admitted(
        key: SigningKey,
        clan: &ClanId,
        entries: &[EncodedEntry],
        endpoint: Endpoint,
        bootstrap: Vec<PeerAddr>,
        admitted_by: Option<Connection>,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = LedgerStore::open(dir.path().join("ledger.redb"), clan).unwrap();
        let entries: Vec<_> = entries.iter().map(|entry| clan_ledger::Entry::decode(entry).unwrap()).collect();
        store.append_all(&entries).unwrap();
        let mut ledger = Ledger::open(*clan);
        ledger.insert_all(entries);
        let own = Own { quic: endpoint.bound_sockets(), ..Own::default() };
        let family = "family".parse().unwrap();
        let (core, handle, dials) = Core::new(key.clone(), ledger, store, own, bootstrap, family, None);
        let cancel = CancellationToken::new();
        let images = Arc::new(ImageServer::new(Some(Disks::at(
            &dir.path().join("root"),
            &dir.path().join("layer"),
            &dir.path().join("boot"),
        ))));
        let mut tasks = JoinSet::new();
        tasks.spawn(core.run(cancel.clone()));
        let words = Arc::new(WordsDesk::new(handle.view().machine));
        let host = Host::Computer(Computer {
            socket: "/nowhere".into(),
            user: rustix::process::geteuid().as_raw(),
            port: None,
            interface: None,
            names: crate::Names::Aside,
            multicast: true,
        });
        let helm = Helm::load(dir.path(), &host, Possible::default(), handle.view().machine).unwrap();
        let helm = Arc::new(helm);
        tasks.spawn(net::accept(
            endpoint.clone(),
            Desks { core: handle.clone(), images: images.clone(), words: words.clone(), helm: helm.clone() },
            cancel.clone(),
            Alarm::new(cancel.clone()),
        ));
        tasks.spawn(desk::announce(words.clone(), endpoint.clone(), handle.clone(), cancel.clone()));
        tasks.spawn(peer::dial(endpoint.clone(), handle.clone(), dials, admitted_by, cancel.clone()));
        Self { core: handle, endpoint, key, images, words, helm, cancel, tasks, dir }
    }

    /// As a controller does: nothing uses the endpoint any more when it is closed.
    async fn stop(mut self) {
        self.cancel.cancel();
        while self.tasks.join_next().await.is_some() {}
        self.endpoint.close().await;
    }

    pub(crate) fn id(&self) -> MachineId {
        MachineId::from_bytes(self.key.verifying_key().to_bytes())
    }

    pub(crate) fn addr(&self) -> PeerAddr {
        PeerAddr { machine: self.id(), addrs: self.endpoint.bound_sockets() }
    }

    /// Waits until what the machine knows satisfies the condition.
    pub(crate) async fn until(&self, what: &str, condition: impl Fn(&View) -> bool) {
        let mut views = self.core.watch();
        let reached = timeout(LIMIT, async { views.wait_for(|v| condition(v)).await.map(drop).unwrap() }).await;
        assert!(reached.is_ok(), "not within {LIMIT:?}: {what}");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

pub(crate) fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

pub(crate) fn person(seed: u8) -> PersonId {
    PersonId::from_bytes(key(seed).verifying_key().to_bytes())
}

pub(crate) async fn endpoint(key: &SigningKey) -> Endpoint {
    net::endpoint(
        iroh::SecretKey::from_bytes(&key.to_bytes()),
        (Ipv4Addr::LOCALHOST, 0).into(),
        &Names::default(),
        true,
    )
    .await
    .unwrap()
}

pub(crate) fn add(ledger: &mut Ledger, author: &SigningKey, body: Body) {
    let entry = ledger.author(author, body, now()).unwrap();
    ledger.insert(entry).unwrap();
}

/// A machine, added by whoever has the key `by`.
fn enrol(clan: &ClanId, by: &SigningKey, machine: &SigningKey, name: &str) -> Body {
    let wg = WgPublicKey::from_bytes(machine.verifying_key().to_bytes());
    Body::enrol(machine, clan, &AuthorId::of(by), name.parse().unwrap(), wg)
}

fn encode(ledger: &Ledger) -> Vec<EncodedEntry> {
    ledger.entries().map(clan_ledger::Entry::encode).collect()
}

/// A clan with one machine and one invite (secret `key(3)`).
pub(crate) async fn founded(uses: u32, expires: Timestamp) -> (Machine, ClanId) {
    let (founder, machine) = (key(1), key(2));
    let (mut ledger, _) =
        Ledger::found(&founder, "family".parse().unwrap(), "ada".parse().unwrap(), [9; 32], now()).unwrap();
    let clan = ledger.clan();
    add(&mut ledger, &founder, enrol(&clan, &founder, &machine, "founder"));
    let invite = InviteId::from_bytes(key(3).verifying_key().to_bytes());
    add(&mut ledger, &founder, Body::Invite { invite, role: Role::Member, uses, expires, approval: false });
    let endpoint = endpoint(&machine).await;
    (Machine::start(machine, &clan, &encode(&ledger), endpoint, vec![]).await, clan)
}

/// The log with which a newcomer asks to be admitted.
fn newcomer(clan: &ClanId, person_seed: u8, machine: &SigningKey, name: &str) -> Vec<EncodedEntry> {
    let author = key(person_seed);
    let mut ledger = Ledger::open(*clan);
    add(&mut ledger, &author, Body::admission(&key(3), clan, &person(person_seed), name.parse().unwrap()));
    add(&mut ledger, &author, enrol(clan, &author, machine, &format!("{name}s-machine")));
    encode(&ledger)
}

async fn ask(
    host: &Machine,
    machine: &SigningKey,
    entries: Vec<EncodedEntry>,
) -> (Endpoint, Result<Vec<EncodedEntry>, RedeemError>) {
    let (endpoint, outcome) = ask_one_of(vec![host.addr()], machine, entries).await;
    (endpoint, outcome.map(|admitted| encode(&admitted.ledger)))
}

async fn ask_one_of(
    peers: Vec<PeerAddr>,
    machine: &SigningKey,
    entries: Vec<EncodedEntry>,
) -> (Endpoint, Result<join::Admitted, RedeemError>) {
    let endpoint = endpoint(machine).await;
    let clan = clan_ledger::Entry::decode(&entries[0]).unwrap().clan();
    let redeem = Redeem { entries, peers, relays: Vec::new(), proof: None };
    let outcome = join::redeem(&endpoint, &redeem, &[], Ledger::open(clan)).await;
    (endpoint, outcome)
}

pub(crate) async fn joined(host: &Machine, clan: &ClanId, person_seed: u8, machine: SigningKey, name: &str) -> Machine {
    let entries = newcomer(clan, person_seed, &machine, name);
    let (endpoint, admitted) = ask_one_of(vec![host.addr()], &machine, entries).await;
    let join::Admitted { connection, ledger, .. } = admitted.unwrap();
    Machine::start_admitted(machine, clan, &encode(&ledger), endpoint, vec![host.addr()], Some(connection)).await
}

pub(crate) fn tomorrow() -> Timestamp {
    now().plus(Duration::from_secs(86_400))
}

#[tokio::test]
async fn a_newcomer_is_admitted_and_both_machines_find_each_other() {
    let (founder, clan) = founded(1, tomorrow()).await;
    let second = joined(&founder, &clan, 4, key(5), "bob").await;
    second.until("the newcomer is connected", |v| v.links.len() == 1).await;
    founder.until("the founder is connected", |v| v.links.len() == 1).await;
    for machine in [&founder, &second] {
        let stays = machine.core.view().links.values().all(|link| link.alpn() == clan_wire::peer::ALPN_JOIN);
        assert!(stays, "they go on with the connection that they have");
    }
    let offer = ServiceOffer {
        name: "web".parse().unwrap(),
        title: "Page".into(),
        kind: ServiceKind::Http,
        port: 80,
        healthy: true,
    };
    founder.core.change_own(move |own| own.services = vec![offer]).await;
    let host = founder.id();
    second.until("the service is known", move |v| v.beacons.get(&host).is_some_and(|b| b.services.len() == 1)).await;
    assert_eq!(second.core.view().state, founder.core.view().state);
}

#[tokio::test]
async fn an_invite_for_one_is_refused_the_second_time_but_its_answer_may_be_repeated() {
    let (founder, clan) = founded(1, tomorrow()).await;
    let (_first, outcome) = ask(&founder, &key(5), newcomer(&clan, 4, &key(5), "bob")).await;
    outcome.unwrap();
    let (_again, outcome) = ask(&founder, &key(5), newcomer(&clan, 4, &key(5), "bob")).await;
    assert!(outcome.is_ok(), "a lost answer can be asked for again");
    let (_second, outcome) = ask(&founder, &key(7), newcomer(&clan, 6, &key(7), "eve")).await;
    assert!(matches!(outcome, Err(RedeemError::Refused(JoinRefusal::Used))), "{outcome:?}");
    assert_eq!(founder.core.view().state.people.len(), 2);
}

#[tokio::test]
async fn an_expired_invite_and_a_taken_name_are_refused_with_their_reason() {
    let (founder, clan) = founded(5, Timestamp::from_millis(now().as_millis() - 1)).await;
    let (_e, outcome) = ask(&founder, &key(5), newcomer(&clan, 4, &key(5), "bob")).await;
    assert!(matches!(outcome, Err(RedeemError::Refused(JoinRefusal::Expired))), "{outcome:?}");

    let (founder, clan) = founded(5, tomorrow()).await;
    let (_e, outcome) = ask(&founder, &key(5), newcomer(&clan, 4, &key(5), "ada")).await;
    assert_eq!(outcome.unwrap_err().to_string(), "the name `ada` is taken in this clan");
    let mut ledger = Ledger::open(clan);
    add(&mut ledger, &key(4), Body::admission(&key(3), &clan, &person(4), "bob".parse().unwrap()));
    add(&mut ledger, &key(4), enrol(&clan, &key(4), &key(5), "founder"));
    let (_e, outcome) = ask(&founder, &key(5), encode(&ledger)).await;
    assert_eq!(outcome.unwrap_err().to_string(), "the name `founder` is taken in this clan");
    // Another choice, by the same link.
    let (_e, outcome) = ask(&founder, &key(7), newcomer(&clan, 6, &key(7), "eve")).await;
    assert!(outcome.is_ok());
}

#[tokio::test]
async fn an_invite_of_another_clan_and_one_that_was_withdrawn_are_refused_with_their_reason() {
    let (founder, clan) = founded(5, tomorrow()).await;
    let foreign = key(9);
    let mut ledger = Ledger::open(clan);
    add(&mut ledger, &key(4), Body::admission(&foreign, &clan, &person(4), "bob".parse().unwrap()));
    let (_e, outcome) = ask(&founder, &key(5), encode(&ledger)).await;
    assert_eq!(outcome.unwrap_err().to_string(), "the clan does not know this invite");

    let mut ledger = Ledger::open(clan);
    ledger.insert_all(founder.core.entries().await.iter().map(|entry| clan_ledger::Entry::decode(entry).unwrap()));
    let invite = InviteId::from_bytes(key(3).verifying_key().to_bytes());
    let entry = ledger.author(&key(1), Body::RevokeInvite { invite }, now()).unwrap();
    founder.core.insert(vec![entry.encode()]).await.unwrap();
    let (_e, outcome) = ask(&founder, &key(5), newcomer(&clan, 4, &key(5), "bob")).await;
    assert_eq!(outcome.unwrap_err().to_string(), "this invite was withdrawn");
}

#[tokio::test]
async fn a_newcomer_whose_clock_is_three_days_off_is_told_so_or_let_in() {
    let (founder, clan) = founded(5, tomorrow()).await;
    let days = Duration::from_secs(3 * 86_400);
    let log = |person_seed: u8, machine: &SigningKey, name: &str, at: Timestamp| {
        let author = key(person_seed);
        let mut ledger = Ledger::open(clan);
        for body in [
            Body::admission(&key(3), &clan, &person(person_seed), name.parse().unwrap()),
            enrol(&clan, &author, machine, &format!("{name}s-machine")),
        ] {
            let entry = ledger.author(&author, body, at).unwrap();
            ledger.insert(entry).unwrap();
        }
        encode(&ledger)
    };
    let before = founder.core.view().entries;
    let (_e, outcome) = ask(&founder, &key(5), log(4, &key(5), "bob", now().plus(days))).await;
    let told = "this computer's clock is ahead of the clan's by more than ten minutes";
    assert_eq!(outcome.unwrap_err().to_string(), told);
    assert_eq!(founder.core.view().entries, before, "nothing of it was recorded");

    // One that is behind does no harm: the clan's machines say when somebody came in.
    let past = Timestamp::from_millis(now().as_millis() - u64::try_from(days.as_millis()).unwrap());
    let (_e, outcome) = ask(&founder, &key(7), log(6, &key(7), "eve", past)).await;
    outcome.unwrap();
    let since = founder.core.view().state.person(&person(6)).unwrap().since;
    assert!(now().since(since) < Duration::from_secs(600), "{since:?}");
}

#[tokio::test]
async fn a_newcomer_cannot_smuggle_in_other_entries() {
    let (founder, clan) = founded(5, tomorrow()).await;
    let author = key(4);
    let mut ledger = Ledger::open(clan);
    add(&mut ledger, &author, Body::admission(&key(3), &clan, &person(4), "bob".parse().unwrap()));
    let invite = InviteId::from_bytes(key(8).verifying_key().to_bytes());
    add(
        &mut ledger,
        &author,
        Body::Invite { invite, role: Role::Owner, uses: 9, expires: tomorrow(), approval: false },
    );
    let before = founder.core.view().entries;
    let (_e, outcome) = ask(&founder, &key(5), encode(&ledger)).await;
    assert!(matches!(outcome, Err(RedeemError::Refused(JoinRefusal::Malformed))), "{outcome:?}");
    assert_eq!(founder.core.view().entries, before, "nothing of it was recorded");
}

#[tokio::test]
async fn a_revoked_machine_loses_its_connection_and_gets_no_other() {
    let (founder, clan) = founded(1, tomorrow()).await;
    let second = joined(&founder, &clan, 4, key(5), "bob").await;
    founder.until("connected", |v| v.links.len() == 1).await;
    let mut ledger = Ledger::open(clan);
    for entry in founder.core.entries().await {
        ledger.insert(clan_ledger::Entry::decode(&entry).unwrap()).unwrap();
    }
    let revoke = Body::RevokeMachine { machine: second.id(), last: ledger.head(AuthorId::from(second.id())) };
    let entry = ledger.author(&key(1), revoke, now()).unwrap();
    founder.core.insert(vec![entry.encode()]).await.unwrap();
    founder.until("the connection is gone", |v| v.links.is_empty()).await;
    let addr = net::endpoint_addr(&founder.addr(), &[]).unwrap();
    let connection = second.endpoint.connect(addr, clan_wire::peer::ALPN_PEER).await.unwrap();
    timeout(LIMIT, connection.closed()).await.expect("refused");
    assert!(founder.core.view().links.is_empty());
    let says_why = |v: &View| v.problems.iter().any(|p| p.starts_with("ada put this machine out of the clan"));
    second.until("it hears why", says_why).await;
}

#[tokio::test]
async fn a_machine_that_was_put_out_while_it_was_away_hears_of_it() {
    let (founder, clan) = founded(1, tomorrow()).await;
    let second = joined(&founder, &clan, 4, key(5), "bob").await;
    founder.until("connected", |v| v.links.len() == 1).await;
    let before = second.core.entries().await;
    second.cancel.cancel();
    second.endpoint.close().await;
    founder.until("away", |v| v.links.is_empty()).await;
    let mut ledger = Ledger::open(clan);
    ledger.insert_all(before.iter().map(|entry| clan_ledger::Entry::decode(entry).unwrap()));
    // Of what is written afterwards it gets nothing to see.
    let invite = InviteId::from_bytes(key(8).verifying_key().to_bytes());
    let secret = Body::Invite { invite, role: Role::Member, uses: 1, expires: tomorrow(), approval: false };
    for body in [ledger.revocation_of_machine(&second.id()), secret] {
        let entry = ledger.author(&key(1), body, now()).unwrap();
        ledger.insert(entry.clone()).unwrap();
        founder.core.insert(vec![entry.encode()]).await.unwrap();
    }
    let second = Machine::start(key(5), &clan, &before, endpoint(&key(5)).await, vec![founder.addr()]).await;
    second.until("it hears why", |v| v.problems.iter().any(|p| p.starts_with("ada put this machine out"))).await;
    assert!(!second.core.view().state.invites.contains_key(&invite));
}

#[tokio::test]
async fn a_newcomer_knows_the_other_machines_when_the_one_that_admitted_them_is_gone() {
    let (founder, clan) = founded(2, tomorrow()).await;
    let second = joined(&founder, &clan, 4, key(5), "bob").await;
    let id = second.id();
    founder.until("the second is heard of", |v| v.beacons.contains_key(&id)).await;
    let (from, admitted) = ask_one_of(vec![founder.addr()], &key(7), newcomer(&clan, 6, &key(7), "eve")).await;
    let admitted = admitted.unwrap();
    founder.cancel.cancel();
    founder.endpoint.close().await;
    let third = Machine::start(key(7), &clan, &encode(&admitted.ledger), from, admitted.peers).await;
    // The second has not heard of the newcomer: it is told by nobody, and answers all the same once it is.
    let told = encode(&admitted.ledger);
    second.core.insert(told).await.unwrap();
    third.until("connected", |v| v.links.contains_key(&id)).await;
}

#[tokio::test]
async fn a_machine_whose_ledger_is_lost_starts_and_learns_it_again() {
    let (founder, clan) = founded(1, tomorrow()).await;
    let second = joined(&founder, &clan, 4, key(5), "bob").await;
    second.until("connected", |v| v.links.len() == 1).await;
    founder.cancel.cancel();
    founder.endpoint.close().await;
    second.until("the founder is gone", |v| v.links.is_empty()).await;
    // It knows nobody: who knows it finds it.
    let back = Machine::start(key(2), &clan, &[], endpoint(&key(2)).await, vec![second.addr()]).await;
    assert!(back.core.view().problems.iter().any(|p| p.contains("learns it from the other machines")));
    back.until("everything is learnt", |v| !v.learning).await;
    assert_eq!(back.core.view().state, second.core.view().state);
    assert_eq!(back.core.view().problems, Vec::<String>::new());
}

#[tokio::test]
async fn a_person_who_is_put_out_at_one_machine_is_cut_off_by_every_other() {
    let (founder, clan) = founded(2, tomorrow()).await;
    let second = joined(&founder, &clan, 4, key(5), "bob").await;
    let third = joined(&founder, &clan, 6, key(7), "eve").await;
    let out = second.id();
    let mut cut = Vec::new();
    for machine in [&founder, &third] {
        machine.until("connected", |v| v.links.contains_key(&out)).await;
        let view = machine.core.view();
        assert!(mesh::peers_of(&view).iter().any(|p| p.id == out), "packets are exchanged");
        cut.push(view.links[&out].clone());
    }
    let mut ledger = Ledger::open(clan);
    for entry in founder.core.entries().await {
        ledger.insert(clan_ledger::Entry::decode(&entry).unwrap()).unwrap();
    }
    // As a manager does it: one entry after the other, at its own machine.
    for body in ledger.revocation_of_person(&person(4)) {
        let entry = ledger.author(&key(1), body, now()).unwrap();
        ledger.insert(entry.clone()).unwrap();
        founder.core.insert(vec![entry.encode()]).await.unwrap();
    }
    let everywhere = async {
        for machine in [&founder, &third] {
            let mut views = machine.core.watch();
            let gone = |v: &Arc<View>| !v.links.contains_key(&out) && mesh::peers_of(v).iter().all(|p| p.id != out);
            views.wait_for(gone).await.map(drop).unwrap();
        }
        for connection in &cut {
            connection.closed().await;
        }
    };
    timeout(CUT_OFF, everywhere).await.expect("its packets are dropped in time");
    let peers: Vec<_> = mesh::peers_of(&third.core.view()).into_iter().map(|p| p.id).collect();
    assert_eq!(peers, [founder.id()], "nobody else is cut off");
}

#[tokio::test]
async fn a_machine_that_was_away_catches_up() {
    let (founder, clan) = founded(3, tomorrow()).await;
    let second = joined(&founder, &clan, 4, key(5), "bob").await;
    second.until("connected", |v| v.links.len() == 1).await;
    let (key, entries) = (second.key.clone(), second.core.entries().await);
    second.cancel.cancel();
    second.endpoint.close().await;
    founder.until("the connection is gone", |v| v.links.is_empty()).await;
    let third = joined(&founder, &clan, 6, self::key(7), "eve").await;
    let back = endpoint(&key).await;
    let second = Machine::start(key, &clan, &entries, back, vec![founder.addr()]).await;
    second.until("the other newcomer is known", |v| v.state.people.len() == 3).await;
    assert_eq!(second.core.view().state, third.core.view().state);
}

#[tokio::test]
async fn the_image_goes_to_holders_of_an_invite_and_to_nobody_else() {
    let (founder, clan) = founded(1, tomorrow()).await;
    let content: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    let root = founder.dir.path().join("root");
    std::fs::File::create(&root).unwrap().write_all(&content).unwrap();
    let file = |role, hash: u8, size: u64| ImageFile {
        role,
        size: ByteSize::from_bytes(size),
        hash: FileHash::from_bytes([hash; 32]),
    };
    let manifest = Manifest {
        version: 1,
        title: "test".into(),
        architecture: "x86_64".into(),
        inputs: FileHash::from_bytes([0; 32]),
        memory_min: ByteSize::from_mib(64),
        files: vec![
            file(FileRole::Kernel, 1, 10),
            file(FileRole::Initramfs, 2, 10),
            file(FileRole::Root, 3, content.len() as u64),
        ],
    };
    // One piece, one, and two.
    founder.images.set_manifest(&manifest.encode().unwrap(), &[7; 4 * 32]);

    let stranger = key(40);
    let from = endpoint(&stranger).await;
    let connection = from.connect(net::endpoint_addr(&founder.addr(), &[]).unwrap(), ALPN_IMAGE).await.unwrap();
    let me = MachineId::from_bytes(stranger.verifying_key().to_bytes());
    let request = async |proof: Option<InviteProof>, what: ImagePart| {
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        send_message(&mut send, &ImageRequest { proof, what }, MAX_IMAGE_MESSAGE).await.unwrap();
        let response: ImageResponse = recv_message(&mut recv, MAX_IMAGE_MESSAGE).await.unwrap();
        (response, recv.read_to_end(content.len()).await.unwrap())
    };
    let piece = |file: u8, index| ImagePart::Piece { file: FileHash::from_bytes([file; 32]), index };
    assert_eq!(request(None, piece(3, 0)).await.0, ImageResponse::Denied);
    assert_eq!(
        request(Some(InviteProof::new(&key(41), &clan, &me)), piece(3, 0)).await.0,
        ImageResponse::Denied,
        "an invite of nobody's"
    );
    let proof = Some(InviteProof::new(&key(3), &clan, &me));
    let (response, bytes) = request(proof.clone(), piece(3, 0)).await;
    assert_eq!(response, ImageResponse::Bytes(PIECE as u64));
    assert!(bytes == content[..PIECE]);
    assert!(request(proof.clone(), piece(3, 1)).await.1 == content[PIECE..]);
    let (_, list) = request(proof.clone(), ImagePart::Pieces(FileHash::from_bytes([3; 32]))).await;
    assert_eq!(list, [7; 64]);
    for absent in [piece(9, 0), piece(2, 0)] {
        assert_eq!(
            request(proof.clone(), absent).await.0,
            ImageResponse::NotFound,
            "no such file, or none on the disk"
        );
    }
}
