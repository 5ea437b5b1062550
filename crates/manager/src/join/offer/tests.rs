//! A member that is not what it should be, over real endpoints on loopback: what a newcomer is told, and what is left of it.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use clan_api::{Agreed, JoinClan, TaskInfo};
use clan_ledger::{Applications, Body, Entry, Ledger, VmSetup};
use clan_os::channel::{recv_message, send_message, send_pages};
use clan_types::{ControlMode, FileHash, ImageId, InviteId, InviteLink, InviteSecret, MachineId, PeerAddr, Timestamp};
use clan_wire::{
    image::ImageFile,
    peer::{ALPN_IMAGE, ALPN_JOIN, ImagePart, ImageRequest, ImageResponse, JoinRequest, JoinResponse, MAX_MESSAGE},
    pieces::{PIECE, hash_of},
};
use iroh::{Endpoint, SecretKey, endpoint::Connection, endpoint::presets};
use tokio::{task::JoinHandle, time::timeout};

use super::*;
use crate::{
    authority::tests::{clan, key, say},
    images, join,
    record::{self, Phase, tests::put},
};

const LIMIT: Duration = Duration::from_secs(60);
const TIB: u64 = 1 << 40;

/// An image, as its files and its manifest.
#[derive(Clone)]
struct Image {
    manifest: Manifest,
    files: Vec<Vec<u8>>,
}

impl Image {
    fn new() -> Self {
        let files = vec![vec![1; 1000], vec![2; 1000], (0..3 * PIECE).map(|i| (i % 251) as u8).collect()];
        let roles = [FileRole::Kernel, FileRole::Initramfs, FileRole::Root];
        let file = |(role, content): (FileRole, &Vec<u8>)| ImageFile {
            role,
            size: ByteSize::from_bytes(content.len() as u64),
            hash: FileHash::from_bytes(*blake3::hash(content).as_bytes()),
        };
        let manifest = Manifest {
            version: 1,
            title: "test".into(),
            architecture: std::env::consts::ARCH.into(),
            inputs: FileHash::from_bytes([0; 32]),
            memory_min: ByteSize::from_mib(64),
            files: roles.into_iter().zip(&files).map(file).collect(),
        };
        Self { manifest, files }
    }

    /// Changed, and named by what it is then.
    fn with(change: impl FnOnce(&mut Manifest)) -> Self {
        let mut image = Self::new();
        change(&mut image.manifest);
        image
    }

    fn id(&self) -> ImageId {
        Manifest::id_of(&self.manifest.encode().unwrap())
    }

    fn content(&self, hash: &FileHash) -> &[u8] {
        let at = self.manifest.files.iter().position(|file| file.hash == *hash).unwrap();
        &self.files[at]
    }

    /// What an honest member answers.
    fn part(&self, what: &ImagePart) -> Vec<u8> {
        match what {
            ImagePart::Manifest(_) => self.manifest.encode().unwrap(),
            ImagePart::Pieces(file) => {
                let content = self.content(file);
                let size = content.len() as u64;
                let pieces = content.chunks(PIECE).enumerate();
                pieces.flat_map(|(index, piece)| hash_of(size, index as u64, piece)).collect()
            }
            ImagePart::Piece { file, index } => {
                self.content(file).chunks(PIECE).nth(*index as usize).unwrap_or_default().to_vec()
            }
        }
    }
}

/// A member of a clan that describes an image. What it gives of that is the test's to say.
struct Member {
    endpoint: Endpoint,
    ledger: Ledger,
    asked: Arc<Mutex<Vec<ImagePart>>>,
    task: JoinHandle<()>,
}

impl Member {
    async fn start(description: VmDescription, give: impl Fn(&ImagePart) -> Vec<u8> + Send + Sync + 'static) -> Self {
        Self::publishing(Body::Publish { description }, give).await
    }

    async fn publishing(published: Body, give: impl Fn(&ImagePart) -> Vec<u8> + Send + Sync + 'static) -> Self {
        let mut ledger = clan();
        say(&mut ledger, &key(1), published);
        let invite = InviteId::from_bytes(key(50).verifying_key().to_bytes());
        let expires = Timestamp::from_millis(1 << 45);
        say(&mut ledger, &key(1), Body::Invite { invite, role: Role::Member, uses: 1, expires, approval: false });
        // The machine that the ledger calls annas-laptop.
        let endpoint = Endpoint::builder(presets::Minimal)
            .secret_key(SecretKey::from_bytes(&key(101).to_bytes()))
            .alpns(vec![ALPN_JOIN.to_vec(), ALPN_IMAGE.to_vec()])
            .bind()
            .await
            .unwrap();
        let entries: Arc<Vec<Vec<u8>>> = Arc::new(ledger.entries().map(Entry::encode).collect());
        let (asked, give) = (Arc::<Mutex<Vec<ImagePart>>>::default(), Arc::new(give));
        let (accepting, log) = (endpoint.clone(), asked.clone());
        let task = tokio::spawn(async move {
            while let Some(incoming) = accepting.accept().await {
                let Ok(connection) = incoming.accept().unwrap().await else { continue };
                let (entries, give, log) = (entries.clone(), give.clone(), log.clone());
                if connection.alpn() == ALPN_JOIN {
                    tokio::spawn(async move { tell(&connection, &entries).await });
                } else {
                    let give = move |what: &ImagePart| {
                        log.lock().unwrap().push(what.clone());
                        give(what)
                    };
                    tokio::spawn(async move { serve(&connection, give).await });
                }
            }
        });
        Self { endpoint, ledger, asked, task }
    }

    fn link(&self) -> String {
        let secret = InviteSecret::from_bytes(key(50).to_bytes());
        let peers = vec![peer(&self.endpoint)];
        InviteLink { purpose: Purpose::Join, clan: self.ledger.clan(), secret, peers, relays: Vec::new() }.to_string()
    }

    fn asked(&self) -> Vec<ImagePart> {
        self.asked.lock().unwrap().clone()
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Where an endpoint is, from here.
fn peer(endpoint: &Endpoint) -> PeerAddr {
    let loopback = |addr: SocketAddr| match addr {
        SocketAddr::V4(_) => Some(SocketAddr::from(([127, 0, 0, 1], addr.port()))),
        SocketAddr::V6(_) => None,
    };
    let machine = MachineId::from_bytes(*endpoint.id().as_bytes());
    PeerAddr { machine, addrs: endpoint.bound_sockets().into_iter().filter_map(loopback).collect() }
}

/// Gives the ledger to whoever asks.
async fn tell(connection: &Connection, entries: &[Vec<u8>]) -> Option<()> {
    loop {
        let (mut send, mut recv) = connection.accept_bi().await.ok()?;
        let _: JoinRequest = recv_message(&mut recv, MAX_MESSAGE).await.ok()?;
        send_message(&mut send, &JoinResponse::Preview, MAX_MESSAGE).await.ok()?;
        send_pages(&mut send, entries).await.ok()?;
        send.finish().ok()?;
    }
}

async fn serve(connection: &Connection, give: impl Fn(&ImagePart) -> Vec<u8>) -> Option<()> {
    loop {
        let (mut send, mut recv) = connection.accept_bi().await.ok()?;
        let request: ImageRequest = recv_message(&mut recv, MAX_MESSAGE).await.ok()?;
        let bytes = give(&request.what);
        send_message(&mut send, &ImageResponse::Bytes(bytes.len() as u64), MAX_MESSAGE).await.ok()?;
        send.write_all(&bytes).await.ok()?;
        send.finish().ok()?;
    }
}

fn describe(image: ImageId) -> VmDescription {
    VmDescription {
        image,
        title: "test".parse().unwrap(),
        memory: ByteSize::from_mib(128),
        cpus: 1,
        disk: ByteSize::from_mib(64),
    }
}

fn ask(link: &str) -> PreviewJoin {
    PreviewJoin { link: link.to_owned(), integrate: None, container: false, memory: None, disk: None, cpus: None }
}

fn request(link: &str) -> JoinClan {
    JoinClan {
        link: link.to_owned(),
        person: "zoe".parse().unwrap(),
        machine: "desk".parse().unwrap(),
        memory: None,
        disk: None,
        cpus: None,
        integrate: None,
        control: None,
        container: false,
        agreed: None,
        passphrase: None,
    }
}

/// As the command line prints it, without what is this computer's.
fn told(problem: &ApiProblem) -> String {
    let mut text = format!("[{}] {}", problem.code, problem.message);
    if let Some(why) = &problem.why {
        text.push_str(&format!("\nwhy: {why}"));
    }
    for hint in &problem.hints {
        text.push_str(&format!("\nhint: {hint}"));
    }
    text
}

/// A newcomer's computer.
struct Computer {
    dir: tempfile::TempDir,
    shared: Arc<Shared>,
}

impl Computer {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let shared = Shared::for_tests(dir.path());
        crate::disk::create_dir(&shared.paths.clans()).unwrap();
        Self { dir, shared }
    }

    fn count(&self, folder: &str) -> usize {
        std::fs::read_dir(self.dir.path().join(folder)).map_or(0, Iterator::count)
    }

    /// What asking says, and joining all the same; after which nothing is there.
    async fn refused(&self, member: &Member) -> String {
        let link = member.link();
        let shown = timeout(LIMIT, preview(&self.shared, &ask(&link))).await.unwrap().unwrap_err();
        let joined = timeout(LIMIT, join::begin(&self.shared, request(&link))).await.unwrap().err().unwrap();
        assert_eq!(told(&joined), told(&shown), "whoever does not look first is told the same");
        assert!(self.shared.clans().is_empty() && self.shared.tasks.list().is_empty());
        assert_eq!((self.count("clans"), self.count("images")), (0, 0), "nothing half-made is left");
        told(&shown)
    }

    /// How joining ends that looks well at first.
    async fn fails(&self, member: &Member) -> TaskInfo {
        let link = member.link();
        timeout(LIMIT, preview(&self.shared, &ask(&link))).await.unwrap().unwrap();
        let task = timeout(LIMIT, join::begin(&self.shared, request(&link))).await.unwrap().unwrap();
        let ended = timeout(LIMIT, task.finished()).await.unwrap();
        assert!(self.shared.clans().is_empty());
        assert_eq!(self.count("clans"), 0, "no clan is left");
        let gone = images::gc(&self.shared, false).await.unwrap();
        assert_eq!((gone.removed.len(), self.count("images")), (0, 0), "what arrived is collected");
        ended
    }
}

fn only_the_manifest(member: &Member) -> bool {
    member.asked().iter().all(|what| matches!(what, ImagePart::Manifest(_)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_description_that_asks_for_more_than_is_here_is_refused_before_anything_is_fetched() {
    let image = Image::new();
    // More than any computer has.
    const PIB: u64 = 1 << 50;
    type Change = fn(&mut VmDescription);
    let changes: [(Change, &str); 2] = [
        (|d| d.memory = ByteSize::from_bytes(PIB), "[too_small] the VM shall have 1024 TiB of memory"),
        (|d| d.disk = ByteSize::from_bytes(PIB), "[too_small] the VM's disk may grow to 1024 TiB"),
    ];
    for (change, expected) in changes {
        let mut description = describe(image.id());
        change(&mut description);
        let honest = image.clone();
        let member = Member::start(description, move |what| honest.part(what)).await;
        let computer = Computer::new();
        let said = computer.refused(&member).await;
        assert!(said.starts_with(expected) && said.contains("\nhint: give it less: `--"), "{said}");
        assert_eq!(member.asked(), [], "nothing was asked for");
        // Whoever says themselves how large it is to be is not held up by what the clan recommends.
        let sized = PreviewJoin {
            memory: Some(ByteSize::from_mib(128)),
            disk: Some(ByteSize::from_mib(64)),
            ..ask(&member.link())
        };
        let plan = preview(&computer.shared, &sized).await.unwrap().vm.unwrap();
        assert_eq!((plan.memory, plan.disk), (ByteSize::from_mib(128), ByteSize::from_mib(64)));
        assert_eq!(plan.download.missing, image.manifest.total_size());
    }
}

fn whole(image: ImageId, network: &str) -> Body {
    let applications = Applications::new(["web".parse().unwrap()]).unwrap();
    let setup = VmSetup { network: network.parse().unwrap(), control: ControlMode::Shared, applications };
    Body::PublishVm { description: describe(image), setup }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_layer_that_is_not_known_here_is_refused_before_anything_is_fetched() {
    let image = Image::new();
    let body = whole(image.id(), "yggdrasil");
    let member = Member::publishing(body, move |what| image.part(what)).await;
    let computer = Computer::new();
    insta::assert_snapshot!(computer.refused(&member).await, @r"
    [conflict] the clan's machines speak the network layer `yggdrasil`
    why: this version of Clan knows `mesh` only
    hint: update Clan on this computer, then try again
    ");
    assert_eq!(member.asked(), [], "nothing was asked for");
    let itself = PreviewJoin { integrate: Some("/run/clan/controller.sock".into()), ..ask(&member.link()) };
    let refused = preview(&computer.shared, &itself).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Conflict, "nor does this computer itself go there");
}

#[tokio::test]
async fn a_description_is_shown_whole_and_only_what_was_shown_is_joined() {
    let image = Image::new();
    let id = image.id();
    let member = Member::publishing(whole(id, "mesh"), move |what| image.part(what)).await;
    let computer = Computer::new();
    let shown = preview(&computer.shared, &ask(&member.link())).await.unwrap();
    assert_eq!((shown.network_layer.as_str(), shown.control_mode), ("mesh", clan_api::ControlMode::Shared));
    assert_eq!(shown.applications, ["web".parse().unwrap()]);
    let vm = shown.vm.unwrap();
    assert_eq!((vm.image, vm.memory, vm.disk, vm.cpus), (id, ByteSize::from_mib(128), ByteSize::from_mib(64), 1));

    // What an admin publishes while the person reads is another image, or has other applications in it.
    let agreed = Agreed { image: id, network_layer: shown.network_layer, applications: shown.applications };
    let changes: [fn(&mut Agreed); 3] = [
        |agreed| agreed.image = ImageId::from_bytes([9; 32]),
        |agreed| agreed.applications.clear(),
        |agreed| agreed.network_layer = "tinc".parse().unwrap(),
    ];
    for change in changes {
        let mut other = agreed.clone();
        change(&mut other);
        let request = JoinClan { agreed: Some(other), ..request(&member.link()) };
        let refused = timeout(LIMIT, join::begin(&computer.shared, request)).await.unwrap().err().unwrap();
        insta::allow_duplicates! {
            insta::assert_snapshot!(told(&refused), @r"
            [conflict] the clan has published another machine than the one that you agreed to
            why: an admin of the clan did so after it was shown to you
            hint: look at the new one: `clan join` shows it, and asks again
            ");
        }
        assert!(computer.shared.clans().is_empty());
        assert_eq!(computer.count("clans"), 0);
    }
    let request = JoinClan { agreed: Some(agreed), ..request(&member.link()) };
    let task = timeout(LIMIT, join::begin(&computer.shared, request)).await.unwrap().unwrap();
    assert_eq!(computer.shared.clans()[0].record.get().image, Some(id), "on disk before anything is fetched");
    task.cancel();
    timeout(LIMIT, task.finished()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_member_that_says_nothing_holds_nobody_up_and_is_let_go_of() {
    let image = Image::new();
    let (id, honest) = (image.id(), image.clone());
    let (asked, was_asked) = std::sync::mpsc::channel();
    let was_asked = Mutex::new(was_asked);
    // Gives nothing before the other was asked, which never answers.
    let gives = Member::start(describe(id), move |what| {
        was_asked.lock().unwrap().recv_timeout(LIMIT).unwrap();
        honest.part(what)
    })
    .await;
    let silent = Endpoint::builder(presets::Minimal)
        .secret_key(SecretKey::from_bytes(&key(102).to_bytes()))
        .alpns(vec![ALPN_IMAGE.to_vec()])
        .bind()
        .await
        .unwrap();
    let accepting = silent.clone();
    let let_go = tokio::spawn(async move {
        let connection = accepting.accept().await.unwrap().accept().unwrap().await.unwrap();
        let (_send, mut recv) = connection.accept_bi().await.unwrap();
        recv.read_exact(&mut [0]).await.unwrap();
        asked.send(()).unwrap();
        connection.closed().await
    });
    let mut link: InviteLink = gives.link().parse().unwrap();
    link.peers.insert(0, peer(&silent));
    let fetcher = Fetcher::open(link, None).await.unwrap();
    let manifest = timeout(LIMIT, fetcher.manifest(gives.ledger.state(), &id)).await.unwrap().unwrap();
    assert_eq!(manifest, image.manifest);
    timeout(LIMIT, let_go).await.expect("its connection ends").unwrap();
    fetcher.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manifest_that_asks_for_a_tebibyte_is_refused_by_itself() {
    let greedy = Image::with(|manifest| manifest.memory_min = ByteSize::from_bytes(TIB));
    let member = Member::start(describe(greedy.id()), move |what| greedy.part(what)).await;
    insta::assert_snapshot!(Computer::new().refused(&member).await, @r"
    [too_small] the image needs 1 TiB of memory, the VM would have 128 MiB
    hint: give the VM more with `--memory`
    ");
    assert!(only_the_manifest(&member));

    let large = Image::with(|manifest| manifest.files[2].size = ByteSize::from_bytes(TIB));
    let member = Member::start(describe(large.id()), move |what| large.part(what)).await;
    insta::assert_snapshot!(Computer::new().refused(&member).await, @r"
    [untrusted] the clan's image cannot be used
    why: the image manifest names a file of 1 TiB, and 16 GiB is the most
    hint: tell whoever invited you: an admin of the clan can publish another, `clan image publish`
    ");
    assert!(only_the_manifest(&member));

    let foreign = Image::with(|manifest| manifest.architecture = "vax\u{1b}[2J".into());
    let member = Member::start(describe(foreign.id()), move |what| foreign.part(what)).await;
    let said = Computer::new().refused(&member).await;
    assert_eq!(said, format!("[too_small] the image is for vax[2J computers, this one is {}", std::env::consts::ARCH));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manifest_that_is_not_the_clans_is_refused_and_its_giver_named() {
    let image = Image::new();
    let bytes = image.manifest.encode().unwrap();
    let id = image.id();
    let computer = Computer::new();
    // Every bit is tried where manifests are decoded; here a few, and the ends.
    let flipped = |at: usize| {
        let mut changed = bytes.clone();
        changed[at] ^= 0x20;
        changed
    };
    let longer = [bytes.as_slice(), &[0]].concat();
    let huge = vec![0; 1 << 20];
    let changed = [flipped(0), flipped(bytes.len() / 2), flipped(bytes.len() - 1), bytes[..9].to_vec(), longer, huge];
    for given in changed {
        let member = Member::start(describe(id), move |_| given.clone()).await;
        let said = computer.refused(&member).await;
        insta::allow_duplicates! {
            insta::assert_snapshot!(said, @r"
            [untrusted] the image that is offered is not the clan's
            why: a false one came from annas-laptop, and no other machine of the link gives it
            hint: tell whoever invited you, and ask for a link that another machine of the clan made
            ");
        }
        assert!(only_the_manifest(&member));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_is_not_the_clans_is_refused_and_nothing_of_the_clan_stays() {
    type Change = fn(Vec<u8>) -> Vec<u8>;
    let changes: [(Change, bool); 5] = [
        (
            |mut piece| {
                piece[0] ^= 1;
                piece
            },
            false,
        ),
        (
            |mut piece| {
                let last = piece.len() - 1;
                piece[last] ^= 0x80;
                piece
            },
            false,
        ),
        (|piece| piece[..piece.len() - 1].to_vec(), false),
        (|_| Vec::new(), false),
        (
            |mut list| {
                list[7] ^= 4;
                list
            },
            true,
        ),
    ];
    for (change, of_the_list) in changes {
        let image = Image::new();
        let root = image.manifest.file(FileRole::Root).unwrap().hash;
        let id = image.id();
        let member = Member::start(describe(id), move |what| match what {
            ImagePart::Piece { file, index: 1 } if *file == root && !of_the_list => change(image.part(what)),
            ImagePart::Pieces(file) if *file == root && of_the_list => change(image.part(what)),
            _ => image.part(what),
        })
        .await;
        let ended = Computer::new().fails(&member).await;
        insta::allow_duplicates! {
            insta::assert_snapshot!(told(&ended.problem.unwrap()), @r"
            [untrusted] the image that is offered is not the clan's
            why: a false one came from annas-laptop, and no other machine of the link gives it
            hint: tell whoever invited you, and ask for a link that another machine of the clan made
            ");
        }
    }
}

#[tokio::test]
async fn a_link_to_a_clan_that_is_here_names_it_whatever_becomes_of_it() {
    let computer = Computer::new();
    let shared = &computer.shared;
    let record = record::tests::record(1, Phase::Ready);
    put(&shared.paths, &record, None);
    let here = shared.adopt(record).unwrap();
    let secret = InviteSecret::from_bytes([2; 32]);
    let peers = vec![PeerAddr {
        machine: crate::authority::tests::machine(1),
        addrs: vec![SocketAddr::from(([127, 0, 0, 1], 9))],
    }];
    let link = InviteLink { purpose: Purpose::Join, clan: here.id(), secret, peers, relays: Vec::new() };
    let mut said = Vec::new();
    for phase in [Phase::Ready, Phase::Joining, Phase::Leaving] {
        here.record.update(|r| r.phase = phase).unwrap();
        let shown = preview(shared, &ask(&link.to_string())).await.unwrap_err();
        let joined = join::begin(shared, request(&link.to_string())).await.err().unwrap();
        assert_eq!(told(&joined), told(&shown));
        said.push(told(&shown));
    }
    insta::assert_snapshot!(said.join("\n"), @r"
    [already_joined] this computer is in the clan `family` already
    hint: see it with `clan status`; to join anew, leave it first: `clan leave family`
    [already_joined] this computer is joining the clan `family` just now
    hint: see how far it is with `clan status`
    [already_joined] this computer is leaving the clan `family` just now
    hint: try again when it has left: `clan status`
    ");
    assert_eq!(here.record.get().control, ControlMode::Shared, "it is left as it is");
}
