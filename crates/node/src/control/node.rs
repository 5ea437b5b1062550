//! The life of the node behind the channel: what a machine with a place in a clan runs, from its start to its end.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, PoisonError},
    time::Duration,
};

use clan_ledger::Ledger;
use clan_os::{addresses, tun::Tun, wireguard::Wireguard};
use clan_relay::Names;
use clan_store::{LedgerStore, SealKey, StoreError};
use clan_types::ClanId;
use clan_wire::control::{Environment, NodeStatus, Provision};
use iroh::{Endpoint, RelayUrl, endpoint::Connection};
use tokio::{sync::Notify, task::JoinSet, time::timeout};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{
    Controller,
    outcome::{ProvisionError, ProvisionOrNodeError},
};
use crate::{
    Host, NodeError,
    core::{Core, CoreHandle, Own, View},
    helm::{self, Helm, Possible},
    host::{self, Ports},
    join,
    mesh::{self, Mesh, MeshPlan},
    net::{self, Desks},
    own, peer, pulse, recall,
    relay::{self, Certificate},
    report::chain,
    services, sockets,
    state::Place,
    status,
    words::{self, WordsDesk},
};

/// How long closing all connections may take.
const GOODBYES: Duration = Duration::from_secs(5);

/// A machine with a place in a clan.
pub(super) struct Node {
    pub(super) place: Place,
    pub(super) core: CoreHandle,
    pub(super) endpoint: Endpoint,
    pub(super) words: Arc<WordsDesk>,
    pub(super) helm: Arc<Helm>,
    /// Absent where the computer does not let the controller carry packets.
    pub(super) mesh: Option<Mesh>,
    pub(super) tasks: JoinSet<()>,
    pub(super) cancel: CancellationToken,
}

/// A machine's two ways out: the interface of the mesh, and the endpoint on the base network.
pub(super) struct Ways {
    /// Or why there is none.
    tun: Result<Tun, NodeError>,
    pub(super) endpoint: Endpoint,
    ports: Ports,
    names: Names,
    /// Relays that the endpoint was introduced to.
    introduced: Vec<RelayUrl>,
    /// The connection on which the machine was admitted a moment ago.
    admitted_by: Option<Connection>,
}

/// [`Ways`] that are being opened before the machine has its place.
pub(super) struct Early {
    clan: ClanId,
    opening: AbortOnDropHandle<Result<Ways, NodeError>>,
}

/// What a node writes to and reads from, opened.
pub(super) struct Files {
    store: LedgerStore,
    certificate: Option<Arc<Certificate>>,
}

/// What most requests need of a node, without holding its lock.
pub(crate) struct Access {
    pub(crate) core: CoreHandle,
    pub(super) words: Arc<WordsDesk>,
    pub(super) wireguard: Option<Arc<Wireguard>>,
    pub(crate) helm: Arc<Helm>,
    pub(crate) endpoint: Endpoint,
    /// The node ends.
    pub(crate) over: CancellationToken,
}

impl Controller {
    pub(super) async fn take_place(&self, provision: Provision, mut known: Ledger) -> Result<Node, ProvisionError> {
        // Of a VM, which belongs to one clan, the files are made while the network is waited for. A computer that is not let in
        // keeps nothing of a clan.
        let files = self.host.is_guest().then(|| self.files(&provision.clan));
        let mut ways = match self.take_early(&provision.clan) {
            Some(ways) => ways.await?,
            None => self.ways(&provision.clan).await?,
        };
        self.tell_addresses(&ways.endpoint).await;
        let mut peers = Vec::new();
        if let Some(redeem) = provision.redeem {
            ways.introduced =
                clan_relay::introduce(&ways.endpoint, &ways.names, &redeem.relays, redeem.proof.as_ref()).await;
            let admitted = join::redeem(&ways.endpoint, &redeem, &ways.introduced, known).await?;
            known = admitted.ledger;
            ways.admitted_by = Some(admitted.connection);
            peers = redeem.peers;
            // Those of the link may all be put out before this machine has heard of others.
            let others =
                admitted.peers.into_iter().filter(|other| peers.iter().all(|peer| peer.machine != other.machine));
            let others: Vec<_> = others.collect();
            peers.extend(others);
        }
        // The services are those of the image; a computer's own are not for the clan to start.
        let offers = if self.host.is_guest() { provision.offers } else { Vec::new() };
        let clan_name = known.state().clan_name.clone();
        let place = Place { clan: provision.clan, clan_name, name: provision.name, offers, peers };
        let machine = self.identity().machine();
        helm::begin(&self.dir, provision.control).map_err(|e| ProvisionError::Failed(chain(&e)))?;
        let files = files.unwrap_or_else(|| self.files(&place.clan)).await?;
        let node = self
            .start_node(place.clone(), files, ways, None, |ledger| {
                ledger.insert_all(known.entries().cloned());
                match ledger.state().machine_in_good_standing(&machine) {
                    Some(_) => Ok(()),
                    None => Err("the clan's ledger does not name this machine".to_owned()),
                }
            })
            .await?;
        // INVARIANT: the place is written last; a machine that stopped before is provisioned again, from the start.
        place.save(&self.dir).map_err(|e| ProvisionError::Failed(chain(&e)))?;
        Ok(node)
    }

    /// Opens a machine's ways out.
    pub(super) fn ways(&self, clan: &ClanId) -> impl Future<Output = Result<Ways, NodeError>> + use<> {
        let (identity, host, dir, clan) = (self.identity(), self.host.clone(), self.dir.clone(), *clan);
        async move {
            let ports = host.ports(&dir)?;
            let tun = mesh::interface(&host.interface(&clan), &clan, &identity.machine()).await;
            // A computer changes its network; what the endpoint sends into the tunnel does not get through it.
            let found = timeout(host.network_patience(), base_address()).await.ok();
            let address = found.filter(|_| host.is_guest()).unwrap_or_else(|| own::everywhere(found));
            let bind = SocketAddr::new(address, ports.quic);
            let names = Names::default();
            let endpoint = net::endpoint(identity.endpoint_key(), bind, &names, announced(&host).is_some()).await?;
            match tun {
                Err(error) if host.is_guest() => Err(error),
                tun => Ok(Ways { tun, endpoint, ports, names, introduced: Vec::new(), admitted_by: None }),
            }
        }
    }

    /// A guest is in one clan at most: as soon as it has agreed to one, and while its manager signs, it opens its ways.
    pub(super) fn begin_early(&self, clan: &ClanId) {
        let mut early = self.early.lock().unwrap_or_else(PoisonError::into_inner);
        if self.host.is_guest() && early.as_ref().is_none_or(|early| early.clan != *clan) {
            // What belongs to another clan goes first.
            *early = None;
            *early = Some(Early { clan: *clan, opening: AbortOnDropHandle::new(tokio::spawn(self.ways(clan))) });
        }
    }

    fn take_early(&self, clan: &ClanId) -> Option<impl Future<Output = Result<Ways, NodeError>> + use<>> {
        let early = self.early.lock().unwrap_or_else(PoisonError::into_inner).take();
        let early = early.filter(|early| early.clan == *clan)?;
        Some(async move { early.opening.await.map_err(|e| NodeError::network("the QUIC endpoint", e))? })
    }

    /// Tells the endpoint which of the base OS's addresses lead to it.
    pub(super) async fn tell_addresses(&self, endpoint: &Endpoint) {
        for addr in self.environment.lock().await.quic.clone() {
            endpoint.add_external_addr(addr).await;
        }
    }

    /// Opens the files of a machine in a clan, or creates them, from now on and beside whatever else is done.
    pub(super) fn files(&self, clan: &ClanId) -> impl Future<Output = Result<Files, NodeError>> + use<> {
        // What this machine has verified before it wrote it down need not be verified again at every start.
        let seal = SealKey::derive(&self.identity().signing().to_bytes());
        let (dir, clan, is_guest) = (self.dir.clone(), *clan, self.host.is_guest());
        let opening = AbortOnDropHandle::new(tokio::task::spawn_blocking(move || {
            let path = dir.join("ledger.redb");
            let open = || LedgerStore::open_sealed(&path, &clan, seal.clone());
            let store = match open() {
                // It was put aside; the replica learns from the other machines what it held.
                Err(error @ StoreError::Corrupt { .. }) => {
                    tracing::error!(why = chain(&error), "the ledger's file is damaged: it is learnt anew");
                    open()
                }
                opened => opened,
            };
            // From outside, no TCP port leads into a guest, which so is no relay.
            let certificate = (!is_guest).then(|| Certificate::load_or_create(&dir)).transpose()?;
            Ok(Files { store: store?, certificate: certificate.map(Arc::new) })
        }));
        async move { opening.await.map_err(|e| NodeError::network("the ledger's file", e))? }
    }

    /// Starts everything that a machine in a clan runs. `prepare` may add to the ledger before anybody sees it.
    pub(super) async fn start_node(
        &self,
        place: Place,
        Files { store, certificate }: Files,
        Ways { tun, endpoint, ports, names, introduced, admitted_by }: Ways,
        doubt: Option<Duration>,
        prepare: impl FnOnce(&mut Ledger) -> Result<(), String>,
    ) -> Result<Node, ProvisionOrNodeError> {
        let mut ledger = store.load().map_err(NodeError::from)?;
        let known = ledger.len();
        prepare(&mut ledger).map_err(ProvisionOrNodeError::Reason)?;
        if ledger.len() > known {
            store.append_all(ledger.entries()).map_err(NodeError::from)?;
        }
        let environment = self.environment.lock().await.clone();
        let seen = if self.host.is_guest() { None } else { own::look(&endpoint, ports).await };
        let (quic, wireguard) = seen.unwrap_or((environment.quic, environment.wireguard));
        let own = Own {
            quic,
            wireguard,
            manifest: environment.manifest,
            certificate: certificate.as_ref().map(|certificate| certificate.hash()),
            ..Own::default()
        };
        let cancel = self.cancel.child_token();
        let identity = self.identity();
        let services = self.host.is_guest().then(services::known);
        let possible = Possible { services, offers: place.offers.clone() };
        let helm = Arc::new(Helm::load(&self.dir, &self.host, possible, identity.machine()).map_err(NodeError::from)?);
        let remembered = recall::load(&self.dir);
        let bootstrap = place.peers.iter().chain(&remembered).cloned().collect();
        let clan_name = place.clan_name.clone().or_else(|| "clan".parse().ok());
        let clan_name = clan_name.ok_or_else(|| ProvisionOrNodeError::Reason("the clan has no name".to_owned()))?;
        let (core, handle, dials) =
            Core::new(identity.signing().clone(), ledger, store, own, bootstrap, clan_name, doubt);
        let mut tasks = JoinSet::new();
        tasks.spawn(core.run(cancel.clone()));
        // The others are talked to while the data plane comes up.
        tasks.spawn(peer::dial(endpoint.clone(), handle.clone(), dials, admitted_by, cancel.clone()));
        let plan = MeshPlan {
            port: ports.wireguard,
            names: self.host.names(&place.clan, &identity.machine()),
            names_may_fail: !self.host.is_guest(),
            multicast: self.host.multicast(),
        };
        let mesh = match tun {
            Ok(tun) => Mesh::start(&identity, tun, &plan, &handle, &cancel).await,
            Err(error) => Err(error),
        };
        let mesh = match mesh {
            Ok(mesh) => Some(mesh),
            // The ledger can be kept, and the clan be managed, on a computer that carries no packets.
            Err(error) if !self.host.is_guest() => {
                tracing::warn!(why = chain(&error), "no packets flow between this computer and the clan");
                handle.problem("data plane", Some(host::no_packets(&error))).await;
                None
            }
            Err(error) => {
                cancel.cancel();
                while tasks.join_next().await.is_some() {}
                return Err(error.into());
            }
        };
        let moved = Arc::new(Notify::new());
        tasks.spawn(pulse::watch(endpoint.clone(), names.clone(), handle.clone(), moved.clone(), cancel.clone()));
        if !self.host.is_guest() {
            let news = own::News { wireguard: mesh.as_ref().map(Mesh::wireguard), moved };
            tasks.spawn(own::follow(endpoint.clone(), ports, news, handle.clone(), cancel.clone()));
        }
        let words = Arc::new(WordsDesk::new(identity.machine()));
        tasks.spawn(sockets::watch(endpoint.bound_sockets(), self.alarm.clone(), cancel.clone()));
        tasks.spawn(net::accept(
            endpoint.clone(),
            Desks { core: handle.clone(), images: self.images.clone(), words: words.clone(), helm: helm.clone() },
            cancel.clone(),
            self.alarm.clone(),
        ));
        tasks.spawn(helm::keep_telling(helm.clone(), handle.clone(), cancel.clone()));
        tasks.spawn(helm::keep_announcing(helm.clone(), endpoint.clone(), announced(&self.host), cancel.clone()));
        tasks.spawn(words::announce(words.clone(), endpoint.clone(), handle.clone(), cancel.clone()));
        tasks.spawn(words::tell_relays(words.clone(), endpoint.clone(), handle.clone(), cancel.clone()));
        tasks.spawn(relay::follow(endpoint.clone(), names, introduced, handle.clone(), cancel.clone()));
        if let Some(certificate) = certificate {
            tasks.spawn(relay::serve(certificate, words.lobby(), handle.clone(), cancel.clone()));
        }
        tasks.spawn(recall::keep(self.dir.clone(), remembered, handle.clone(), cancel.clone()));
        tasks.spawn(services::run(helm.clone(), handle.clone(), self.host.starter(), cancel.clone()));
        Ok(Node { place, core: handle, endpoint, words, helm, mesh, tasks, cancel })
    }
}

impl Access {
    pub(crate) fn wireguard(&self) -> Option<&Wireguard> {
        self.wireguard.as_deref()
    }

    /// What the machine reports of the clan, and of itself.
    pub(crate) async fn status(&self, view: &View) -> NodeStatus {
        status::report(view, self.helm.mode(), self.wireguard()).await
    }
}

impl Node {
    pub(super) async fn take_environment(&self, environment: Environment) {
        for addr in &environment.quic {
            self.endpoint.add_external_addr(*addr).await;
        }
        self.core
            .change_own(move |own| {
                own.quic = environment.quic;
                own.wireguard = environment.wireguard;
                own.manifest = environment.manifest;
            })
            .await;
    }

    pub(super) async fn stop(mut self) {
        self.cancel.cancel();
        while self.tasks.join_next().await.is_some() {}
        if let Some(mesh) = self.mesh {
            mesh.stop().await;
        }
        // It says goodbye to every peer; one that does not answer must not keep this computer from going down.
        if tokio::time::timeout(GOODBYES, self.endpoint.close()).await.is_err() {
            tracing::debug!("the endpoint was not closed in time");
        }
    }
}

/// How the endpoint is announced on the local network from the beginning. A guest has time for that later: it hears of nobody
/// there, through a network that is QEMU's or pasta's.
fn announced(host: &Host) -> Option<bool> {
    (!host.is_guest()).then_some(true)
}

/// The address of the base network, once there is one.
async fn base_address() -> IpAddr {
    loop {
        match addresses::physical().await {
            Ok(all) => {
                if let Some(address) = all.iter().find(|a| a.is_ipv4()).or(all.first()) {
                    return *address;
                }
            }
            Err(error) => tracing::warn!(%error, "cannot list network addresses"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
