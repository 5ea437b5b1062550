//! What a person asks right after they did something is answered by what is, not by what the controller told some time ago: this
//! one never tells anything of itself.

#![allow(clippy::unwrap_used, reason = "the helpers of these tests fail the test")]

use std::{path::Path, sync::Arc, time::Duration};

use clan_api::{AddWireguard, CreateClan, ManagerClient, SetRelay, TaskEvent, TaskState};
use clan_ledger::{Entry, KeyProof, Ledger};
use clan_manager::{Manager, Options};
use clan_os::channel::{Channel, Stream, recv_message, recv_page, send_message, send_pages};
use clan_store::LedgerStore;
use clan_types::{CertificateHash, ClanId, MachineId, Role, WgPublicKey, mesh_address};
use clan_wire::control::{ControlRequest, ControlResponse, MAX_MESSAGE, MachineStatus, NodeStatus, PersonStatus};
use ed25519_dalek::SigningKey;
use tokio::{net::UnixListener, sync::Mutex, time::timeout};
use tokio_util::sync::CancellationToken;

const LIMIT: Duration = Duration::from_secs(60);

fn key() -> SigningKey {
    SigningKey::from_bytes(&[7; 32])
}

fn machine() -> MachineId {
    MachineId::from_bytes(key().verifying_key().to_bytes())
}

/// What a controller that was asked, and never reports, holds.
#[derive(Default)]
struct Silent {
    clan: Option<ClanId>,
    entries: Vec<Vec<u8>>,
}

impl Silent {
    fn answer(&mut self, request: ControlRequest) -> ControlResponse {
        match request {
            ControlRequest::Identify => ControlResponse::Identity {
                machine: machine(),
                wireguard: WgPublicKey::from_bytes([8; 32]),
                clan: self.clan,
                version: "test".into(),
            },
            ControlRequest::Consent { clan, device } => {
                let proof = KeyProof::of_machine(&key(), &clan, &device.into(), &WgPublicKey::from_bytes([8; 32]));
                ControlResponse::Consent(proof.halves())
            }
            ControlRequest::Provision(provision) => {
                self.clan = Some(provision.clan);
                ControlResponse::Provisioned
            }
            ControlRequest::Append(entry) => {
                self.entries.push(entry);
                ControlResponse::Done
            }
            // As if the manager had remembered nothing.
            ControlRequest::Entries(_) => ControlResponse::Entries(self.ledger().vector()),
            ControlRequest::Remember { .. } => ControlResponse::Remembered { sure: true },
            ControlRequest::Status => ControlResponse::Status(Box::new(self.status())),
            _ => ControlResponse::Failed("this controller does not report".into()),
        }
    }

    fn ledger(&self) -> Ledger {
        let mut ledger = Ledger::open(self.clan.unwrap());
        ledger.insert_all(self.entries.iter().filter_map(|bytes| Entry::decode(bytes).ok()));
        ledger
    }

    fn status(&self) -> NodeStatus {
        let (clan, ledger) = (self.clan.unwrap(), self.ledger());
        let state = ledger.state();
        let status = |(id, machine): (&MachineId, &clan_ledger::Machine)| MachineStatus {
            id: *id,
            name: machine.name.clone(),
            owner: machine.owner,
            address: mesh_address(&clan, id),
            this: true,
            path: None,
            last_seen: None,
            version: None,
            certificate: Some(CertificateHash::from_bytes([9; 32])),
            relay: None,
            wireguard: vec!["203.0.113.7:51820".parse().unwrap()],
            behind: None,
            control: None,
            image: None,
        };
        NodeStatus {
            clan,
            clan_name: state.clan_name.clone().unwrap(),
            machine: machine(),
            control: clan_types::ControlMode::Local,
            quic: vec!["203.0.113.7:7000".parse().unwrap()],
            relays: Vec::new(),
            people: state
                .people
                .iter()
                .map(|(id, person)| PersonStatus { id: *id, name: person.name.clone(), role: person.role })
                .collect(),
            pending: Vec::new(),
            machines: state.machines.iter().map(status).collect(),
            services: Vec::new(),
            entries: self.entries.len() as u64,
            problems: vec!["its fan is loud".into()],
        }
    }
}

/// Serves managers until the test ends.
fn serve(socket: &Path) {
    let (door, silent) = (UnixListener::bind(socket).unwrap(), Arc::new(Mutex::new(Silent::default())));
    tokio::spawn(async move {
        while let Ok((stream, _)) = door.accept().await {
            let (_, mut incoming, driver) = Channel::guest(stream, "test", CancellationToken::new());
            let silent = silent.clone();
            tokio::spawn(driver);
            tokio::spawn(async move {
                while let Some(stream) = incoming.accept().await {
                    tokio::spawn(converse(stream, silent.clone()));
                }
            });
        }
    });
}

async fn converse(mut stream: Stream, silent: Arc<Mutex<Silent>>) {
    let Ok(request) = recv_message(&mut stream, MAX_MESSAGE).await else { return };
    let mut silent = silent.lock().await;
    if matches!(request, ControlRequest::Provision(_)) {
        // It is a small clan.
        silent.entries = recv_page(&mut stream).await.unwrap().entries;
    }
    if matches!(request, ControlRequest::Remember { .. }) {
        silent.entries.extend(recv_page(&mut stream).await.unwrap().entries);
    }
    let answer = silent.answer(request);
    send_message(&mut stream, &answer, MAX_MESSAGE).await.unwrap();
    if matches!(answer, ControlResponse::Entries(_)) {
        send_pages(&mut stream, &silent.entries).await.unwrap();
    }
    drop(silent);
    // The manager closes once it has read the answer.
    let _ = recv_message::<ControlRequest, _>(&mut stream, MAX_MESSAGE).await;
}

#[tokio::test]
async fn right_after_founding_every_verb_knows_the_clan() {
    let data = tempfile::tempdir().unwrap();
    let socket = data.path().join("controller.sock");
    serve(&socket);
    let mut options = Options::new("/nonexistent/clan", "/nonexistent/clan-agent");
    options.listen.set_port(0);
    let manager = Manager::open(&data.path().join("data"), options).await.unwrap();
    let (client, cancel) = (ManagerClient::unix(manager.socket()), CancellationToken::new());
    let stop = cancel.clone();
    let running = tokio::spawn(async move { manager.run(stop).await });

    let request = CreateClan {
        control: None,
        name: "family".parse().unwrap(),
        person: "anna".parse().unwrap(),
        machine: "laptop".parse().unwrap(),
        memory: None,
        disk: None,
        cpus: None,
        container: false,
        passphrase: None,
        integrate: Some(socket.display().to_string()),
        recovery: false,
    };
    let task = client.create_clan(&request).await.unwrap().task;
    let mut events = client.task_events(task.id).await.unwrap();
    let mut state = task.state;
    while let Some(event) = timeout(LIMIT, events.next()).await.expect("an event in time") {
        if let TaskEvent::Update { task } = event.unwrap() {
            state = task.state;
        }
    }
    assert_eq!(state, TaskState::Done);

    let machines = client.machines("family").await.unwrap();
    assert_eq!((machines.len(), machines[0].name.as_str(), machines[0].this), (1, "laptop", true));
    let members = client.members("family").await.unwrap();
    assert_eq!((members.len(), members[0].role, members[0].this), (1, Role::Owner, true));
    let status = client.status().await.unwrap();
    assert_eq!((status.clans[0].role, status.clans[0].machines.len()), (Some(Role::Owner), 1));
    assert!(status.problems.iter().any(|problem| problem.message.contains("fan")), "{:?}", status.problems);
    let unknown = client.ping("family", "desk.family.clan").await.unwrap_err().to_string();
    assert!(unknown.contains("the clan family has no machine called `desk.family.clan`"), "{unknown}");
    let relay = client.set_relay("family", &SetRelay { on: true, ..SetRelay::default() }).await.unwrap();
    assert_eq!((relay.relay.host.as_str(), relay.relay.this), ("203.0.113.7", true));
    assert!(client.relays("family").await.unwrap()[0].this);
    let phone = AddWireguard {
        name: "phone".parse().unwrap(),
        public_key: "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=".into(),
        via: None,
        dry_run: false,
    };
    let phone = client.add_wireguard("family", &phone).await.unwrap();
    assert_eq!((phone.via.as_str(), phone.endpoints.len()), ("laptop", 1));

    cancel.cancel();
    timeout(LIMIT, running).await.expect("the manager stops").unwrap().unwrap();
    // What the machine told is remembered outside of it.
    let clan = data.path().join("data/clans").read_dir().unwrap().next().unwrap().unwrap().path();
    let id: ClanId = clan.file_name().unwrap().to_str().unwrap().parse().unwrap();
    let remembered = LedgerStore::open(clan.join("ledger.redb"), &id).unwrap().load().unwrap();
    assert!(remembered.state().machine_in_good_standing(&machine()).is_some(), "{remembered:?}");
}
