//! A machine's relay on loopback, spoken to as other machines, newcomers and strangers speak to it.

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use clan_ledger::{AuthorId, Body, Entry, Ledger};
use clan_types::{CertificateHash, MachineId, RelayAddr};
use clan_wire::peer::InviteProof;
use ed25519_dalek::SigningKey;
use futures_util::{SinkExt, StreamExt};
use iroh::{Endpoint, EndpointAddr, EndpointId, RelayUrl, SecretKey, TransportAddr};
use iroh_relay::{
    client::{Client, ClientBuilder},
    protos::relay::{ClientToRelayMsg, Datagrams, RelayToClientMsg},
};
use tokio::{task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

use clan_relay::{introduce, token, verifier};

use super::*;
use crate::{
    core::now,
    net,
    tests::{Machine, founded, key},
};

const LIMIT: Duration = Duration::from_secs(10);
const HOUR: u64 = 3_600_000;

/// The founder's machine, whose relay runs on a free port.
struct Relay {
    founder: Machine,
    certificate: CertificateHash,
    port: u16,
    cancel: CancellationToken,
    task: JoinHandle<()>,
    clan: clan_types::ClanId,
}

impl Relay {
    async fn start() -> Self {
        let (founder, clan) = founded(1, now().plus(Duration::from_millis(HOUR))).await;
        let certificate = Arc::new(Certificate::load_or_create(founder.dir.path()).unwrap());
        let port = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let hash = certificate.hash();
        let cancel = CancellationToken::new();
        let task = tokio::spawn(serve(certificate, founder.words.lobby(), founder.core.clone(), cancel.clone()));
        let relay = Self { founder, certificate: hash, port, cancel, task, clan };
        relay
            .say(Body::Relay {
                machine: relay.founder.id(),
                host: "127.0.0.1".parse().unwrap(),
                port,
                certificate: hash,
            })
            .await;
        relay
    }

    /// A second machine of the founder's.
    fn enrolment(&self, machine: &SigningKey) -> Body {
        let wg = clan_types::WgPublicKey::from_bytes(machine.verifying_key().to_bytes());
        Body::enrol(machine, &self.clan, &AuthorId::of(&key(1)), "second".parse().unwrap(), wg)
    }

    /// Records what the founder decides.
    async fn say(&self, body: Body) -> Entry {
        let mut ledger = Ledger::open(self.clan);
        for entry in self.founder.core.entries().await {
            ledger.insert(Entry::decode(&entry).unwrap()).unwrap();
        }
        let entry = ledger.author(&key(1), body, now()).unwrap();
        self.founder.core.insert(vec![entry.encode()]).await.unwrap();
        entry
    }

    fn url(&self) -> RelayUrl {
        url_of(&self.addr()).unwrap()
    }

    fn addr(&self) -> RelayAddr {
        RelayAddr { host: "127.0.0.1".parse().unwrap(), port: self.port, certificate: self.certificate }
    }

    /// Connects as whoever holds the key. A refusal is an error.
    async fn connect(&self, who: &SigningKey, proof: Option<&InviteProof>) -> Result<Client, String> {
        self.connect_to(self.url(), who, proof).await
    }

    async fn connect_to(&self, url: RelayUrl, who: &SigningKey, proof: Option<&InviteProof>) -> Result<Client, String> {
        let names = Names::default();
        names.set(&self.certificate, Place::Loopback);
        let tls = verifier().client_config(iroh::tls::default_provider()).unwrap();
        let mut builder =
            ClientBuilder::new(url, SecretKey::from_bytes(&who.to_bytes()), names.resolver()).tls_client_config(tls);
        if let Some(token) = proof.and_then(token) {
            builder = builder.auth_token(token);
        }
        // The relay may still be opening its port.
        let mut last = String::new();
        for _ in 0..100 {
            match builder.connect().await {
                Ok(client) => return Ok(client),
                Err(error) => last = format!("{error:#}"),
            }
            if !last.contains("refused") {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err(last)
    }

    fn proof(&self, invite: u8, who: &SigningKey) -> InviteProof {
        InviteProof::new(&key(invite), &self.clan, &MachineId::from_bytes(who.verifying_key().to_bytes()))
    }

    async fn stop(self) {
        self.cancel.cancel();
        timeout(LIMIT, self.task).await.unwrap().unwrap();
        assert!(std::net::TcpListener::bind(("0.0.0.0", self.port)).is_ok(), "the port is free again");
    }
}

fn id(who: &SigningKey) -> EndpointId {
    EndpointId::from_bytes(&who.verifying_key().to_bytes()).unwrap()
}

/// Waits until the relay ends the connection.
async fn turned_out(client: &mut Client) -> bool {
    timeout(LIMIT, async { while let Some(Ok(_)) = client.next().await {} }).await.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn it_passes_on_what_a_newcomer_and_a_machine_of_the_clan_send_each_other() {
    let relay = Relay::start().await;
    let (member, newcomer) = (&relay.founder.key, key(40));
    let mut a = relay.connect(member, None).await.unwrap();
    let mut b = relay.connect(&newcomer, Some(&relay.proof(3, &newcomer))).await.unwrap();
    for (from, to, target) in [(&mut b, &mut a, id(member))] {
        let datagrams = Datagrams::from(b"hello");
        from.send(ClientToRelayMsg::Datagrams { dst_endpoint_id: target, datagrams }).await.unwrap();
        let arrived = timeout(LIMIT, async {
            loop {
                if let Some(Ok(RelayToClientMsg::Datagrams { remote_endpoint_id, datagrams })) = to.next().await {
                    return (remote_endpoint_id, datagrams.contents);
                }
            }
        });
        assert_eq!(arrived.await.unwrap(), (id(&newcomer), bytes::Bytes::from_static(b"hello")));
    }
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_and_forged_or_foreign_proofs_are_refused() {
    let relay = Relay::start().await;
    let (stranger, other) = (key(41), key(42));
    assert!(relay.connect(&relay.founder.key, None).await.is_ok());
    for (what, proof) in [
        ("no proof", None),
        ("an invite that nobody made", Some(relay.proof(99, &stranger))),
        ("somebody else's proof", Some(relay.proof(3, &other))),
    ] {
        let refused = relay.connect(&stranger, proof.as_ref()).await;
        assert!(refused.is_err(), "{what} lets a stranger in");
    }
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_loses_their_standing_is_turned_out() {
    let relay = Relay::start().await;
    let (newcomer, second) = (key(43), key(44));
    let machine = MachineId::from_bytes(second.verifying_key().to_bytes());
    relay.say(relay.enrolment(&second)).await;
    let mut member = relay.connect(&second, None).await.unwrap();
    let mut guest = relay.connect(&newcomer, Some(&relay.proof(3, &newcomer))).await.unwrap();

    let invite = clan_types::InviteId::from_bytes(key(3).verifying_key().to_bytes());
    relay.say(Body::RevokeInvite { invite }).await;
    assert!(turned_out(&mut guest).await, "a newcomer stays whose invite was withdrawn");
    assert!(relay.connect(&newcomer, Some(&relay.proof(3, &newcomer))).await.is_err());

    relay.say(Body::RevokeMachine { machine, last: None }).await;
    assert!(turned_out(&mut member).await, "a revoked machine stays");
    assert!(relay.connect(&second, None).await.is_err());
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_certificate_than_the_named_one_is_refused() {
    let relay = Relay::start().await;
    let foreign = CertificateHash::from_bytes([9; 32]);
    let names = Names::default();
    names.set(&foreign, Place::Loopback);
    let tls = verifier().client_config(iroh::tls::default_provider()).unwrap();
    assert!(relay.connect(&relay.founder.key, None).await.is_ok(), "it is up");
    let url = url_of(&RelayAddr { certificate: foreign, ..relay.addr() }).unwrap();
    let secret = SecretKey::from_bytes(&relay.founder.key.to_bytes());
    let refused = ClientBuilder::new(url, secret, names.resolver()).tls_client_config(tls).connect().await;
    assert!(refused.is_err());
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_ends_when_the_ledger_says_so() {
    let relay = Relay::start().await;
    let mut client = relay.connect(&relay.founder.key, None).await.unwrap();
    relay.say(Body::RelayOff { machine: relay.founder.id() }).await;
    assert!(turned_out(&mut client).await);
    assert!(std::net::TcpStream::connect(("127.0.0.1", relay.port)).is_err());
    relay.stop().await;
}

/// An endpoint that can send to nobody but relays.
async fn behind_a_wall(who: &SigningKey) -> (Endpoint, Names) {
    let names = Names::default();
    let secret = SecretKey::from_bytes(&who.to_bytes());
    let endpoint = net::builder(secret, &names).clear_ip_transports().bind().await.unwrap();
    (endpoint, names)
}

#[tokio::test(flavor = "multi_thread")]
async fn two_endpoints_meet_through_it_that_have_no_other_way() {
    let relay = Relay::start().await;
    let second = key(45);
    relay.say(relay.enrolment(&second)).await;
    let addr = relay.addr();
    let (there, there_names) = behind_a_wall(&second).await;
    introduce(&there, &there_names, std::slice::from_ref(&addr), None).await;
    timeout(LIMIT, there.online()).await.unwrap();
    let newcomer = key(46);
    let (here, names) = behind_a_wall(&newcomer).await;
    let urls = introduce(&here, &names, &[addr], Some(&relay.proof(3, &newcomer))).await;
    let target = EndpointAddr::from_parts(id(&second), urls.into_iter().map(TransportAddr::Relay));
    let accepting = tokio::spawn({
        let there = there.clone();
        async move { there.accept().await.unwrap().await.unwrap() }
    });
    let connection = timeout(LIMIT, here.connect(target, clan_wire::peer::ALPN_JOIN)).await.unwrap().unwrap();
    let accepted = timeout(LIMIT, accepting).await.unwrap().unwrap();
    assert_eq!(accepted.remote_id(), id(&newcomer));
    drop(connection);
    here.close().await;
    there.close().await;
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_comes_for_words_is_told_who_waits_and_let_in_for_that_only() {
    let relay = Relay::start().await;
    let (host, waiting) = ("127.0.0.1".parse().unwrap(), relay.founder.id());
    let [ours, foreign] = [77, 78].map(|number| clan_types::Channel::from_number(number).unwrap());
    let ask = async |channel| clan_relay::words::ask(&host, relay.port, channel).await;
    let come = async |channel| {
        let names = Names::default();
        names.set(&relay.certificate, Place::Loopback);
        let tls = verifier().client_config(iroh::tls::default_provider()).unwrap();
        let client = ClientBuilder::new(relay.url(), SecretKey::from_bytes(&key(41).to_bytes()), names.resolver());
        client.tls_client_config(tls).auth_token(clan_relay::words::pass(channel)).connect().await
    };
    // The relay is up once a machine of the clan is in.
    let _member = relay.connect(&relay.founder.key, None).await.unwrap();
    let (found, machines) = ask(ours).await.unwrap();
    assert_eq!((found, machines), (relay.addr(), Vec::new()));
    assert!(come(ours).await.is_err(), "nobody waits");

    let lobby = relay.founder.words.lobby();
    lobby.note(waiting, vec![ours]);
    lobby.note(MachineId::from_bytes([9; 32]), vec![ours]);
    assert_eq!(ask(ours).await.unwrap().1, [waiting], "and no machine that is none of the clan's");
    assert!(ask(foreign).await.unwrap().1.is_empty());
    assert!(come(foreign).await.is_err());
    come(ours).await.unwrap();

    let mut refused = 0;
    for _ in 0..40 {
        refused += usize::from(matches!(
            ask(foreign).await,
            Err(clan_relay::words::AskError::Busy | clan_relay::words::AskError::Unreachable { .. })
        ));
    }
    assert!(refused > 0, "a scanner is not served for ever");
    relay.stop().await;
}
