//! What the manager says to its controller, in streams of [`crate::mux`]: over the virtio-serial port [`PORT`] of a VM, or
//! over a Unix socket, where the controller runs on the base OS itself or in a container.
//!
//! Each stream carries one length-prefixed [`ControlRequest`], then one or more length-prefixed [`ControlResponse`]s;
//! after [`ControlResponse::Connected`] and [`ControlResponse::Raw`] the stream carries raw bytes. A ledger may be of any
//! size: it follows a [`ControlRequest::Provision`], a [`ControlRequest::Remember`] or a [`ControlResponse::Entries`] in [`crate::peer::EntryPage`]s.

use std::{
    fmt,
    net::{Ipv6Addr, SocketAddr},
};

use clan_types::{
    ByteSize, CertificateHash, ClanId, ClanName, ControlMode, DeviceId, ImageId, MachineId, MachineName, PeerAddr,
    PersonId, PersonName, RelayAddr, Role, ServiceName, Timestamp, WgPublicKey, Words,
};
use serde::{Deserialize, Serialize};

use crate::{
    beacon::ServiceKind,
    peer::{EncodedEntry, InviteProof, JoinRefusal, Vector},
};

/// Name of the virtio-serial port.
pub const PORT: &str = "clan.control.0";
/// Largest message.
pub const MAX_MESSAGE: usize = 4 << 20;

/// From the manager.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ControlRequest {
    /// Who are you? Answered by [`ControlResponse::Identity`].
    Identify,
    /// Gives a new machine its place in a clan; the ledger as the manager knows it follows in pages. Answered by [`ControlResponse::Provisioned`] once it is in the mesh's
    /// ledger (for a newcomer: once it was admitted), or by [`ControlResponse::Refused`].
    Provision(Box<Provision>),
    /// Tells what the machine cannot see from inside; sent whenever the channel starts or something of it changes.
    /// Answered by [`ControlResponse::Done`].
    SetEnvironment(Environment),
    /// Adds an entry that the person signed. Answered by [`ControlResponse::Done`] once it is on disk.
    Append(EncodedEntry),
    /// The entries that the manager lacks, whose ledger has this. Answered by [`ControlResponse::Entries`].
    Entries(Vector),
    /// The state of the clan, now. Answered by [`ControlResponse::Status`].
    Status,
    /// The state and statistics, now and whenever they change, at most once a second.
    /// Answered by [`ControlResponse::Status`] and [`ControlResponse::Stats`] until the stream ends.
    Watch,
    /// Opens a TCP connection to a service. Answered by [`ControlResponse::Connected`], then raw bytes both ways.
    Connect {
        /// The service.
        service: ServiceName,
        /// On which machine, if it matters.
        machine: Option<MachineName>,
    },
    /// The journal. Answered by [`ControlResponse::Raw`], then text.
    Journal {
        /// So many lines back.
        lines: u32,
        /// And go on.
        follow: bool,
    },
    /// Announces that this machine leaves the clan: answered by [`ControlResponse::Done`] when another
    /// one has heard it, by [`ControlResponse::Unheard`] when none has in time.
    Farewell {
        /// The person's entry that removes the machine (and the person, if it was their last one).
        entry: EncodedEntry,
    },
    /// Forgets the clan, with the machine's keys and everything it knew, whether it left or never quite came in: what the
    /// removal of its disk is to a VM. Answered by [`ControlResponse::Done`]; the machine can then join a clan anew.
    Forget,
    /// Waits for a newcomer who was told these words, and gives them the link, once. Never logged.
    /// Answered by [`ControlResponse::Done`].
    OpenWords {
        /// The words.
        words: Words,
        /// What to give.
        link: SecretText,
    },
    /// Other machines that were heard of lately, which could admit a newcomer in place of this one: for invitation links.
    /// Answered by [`ControlResponse::Peers`].
    Peers,
    /// Sends one echo to a machine over the mesh. Answered by [`ControlResponse::Pong`].
    Ping {
        /// The machine; for a standard WireGuard machine, its key.
        machine: MachineId,
    },
    /// What the machine's ledger was, as far as the manager, whose memory is not on its disk, has more: it follows in pages.
    /// Sent at the beginning, before which the machine countersigns nothing. Answered by [`ControlResponse::Remembered`].
    Remember {
        /// The disk was put back to an earlier state since the machine was last sure.
        restored: bool,
    },
    /// Has the machine agree to be added to a clan, with both its keys. Answered by [`ControlResponse::Consent`].
    Consent {
        /// The clan.
        clan: ClanId,
        /// The device that adds it.
        device: DeviceId,
    },
    /// Says who may steer this machine from now on. Answered by [`ControlResponse::Done`].
    SetControlMode(ControlMode),
    /// Opens a conversation of [`crate::helm`] with a machine of the clan, this one perhaps. Answered by
    /// [`ControlResponse::Connected`], then the conversation.
    Steer {
        /// The machine.
        machine: MachineId,
    },
    /// Ends the controller in good order, and so the container that it is in; a VM is switched off by its agent. Answered by
    /// [`ControlResponse::Done`].
    Stop,
    /// The manager is there for an order of those who may steer the machine. Answered by [`ControlResponse::Connected`], then, when
    /// there is one, by a conversation of [`crate::order`].
    Orders,
    /// The base OS user gives the machine another image, and its journal shall tell of it. Answered by [`ControlResponse::Done`].
    NoteImage {
        /// The image that it has.
        before: ImageId,
        /// The image that it gets.
        after: ImageId,
    },
}

/// Text that is not to be logged.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretText(String);

impl SecretText {
    /// Wraps a secret.
    pub const fn new(text: String) -> Self {
        Self(text)
    }

    /// The secret.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretText(…)")
    }
}

/// A new machine's place in a clan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provision {
    /// The clan.
    pub clan: ClanId,
    /// The machine's name in it.
    pub name: MachineName,
    /// For a newcomer: the entries to be admitted with, and whom to ask. Empty for a founder.
    pub redeem: Option<Redeem>,
    /// Services of the image to start and to offer to the clan.
    pub offers: Vec<ServiceName>,
    /// What the machine cannot see from inside.
    pub environment: Environment,
    /// Who may steer it.
    pub control: ControlMode,
}

/// How a newcomer's machine gets admitted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redeem {
    /// The newcomer's log.
    pub entries: Vec<EncodedEntry>,
    /// Machines to ask, in this order.
    pub peers: Vec<PeerAddr>,
    /// Relays at which they can be reached.
    pub relays: Vec<RelayAddr>,
    /// What this machine shows to the relays until it is admitted.
    pub proof: Option<InviteProof>,
}

/// What a machine cannot see from inside.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Environment {
    /// Base OS addresses that lead to the QUIC endpoint: the manager forwards them to the guest.
    pub quic: Vec<SocketAddr>,
    /// Base OS addresses that lead to the WireGuard socket.
    pub wireguard: Vec<SocketAddr>,
    /// The encoded [`crate::image::Manifest`] of the image that the machine runs, so that it can serve it to newcomers.
    /// Empty where there is no image.
    pub manifest: Vec<u8>,
    /// The encoded [`crate::pieces::Pieces`] of the manifest's files, in its order, one after the other: making them takes
    /// an emulated processor seconds. Empty where there is no image.
    pub pieces: Vec<u8>,
}

/// From the controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ControlResponse {
    /// See [`ControlRequest::Identify`].
    Identity {
        /// The machine's key, made in the guest.
        machine: MachineId,
        /// The machine's WireGuard key, made in the guest.
        wireguard: WgPublicKey,
        /// The clan it is provisioned for, if it is.
        clan: Option<ClanId>,
        /// Program version.
        version: String,
    },
    /// See [`ControlRequest::Provision`].
    Provisioned,
    /// The clan does not admit this machine.
    Refused(JoinRefusal),
    /// Done.
    Done,
    /// It did not work.
    Failed(String),
    /// See [`ControlRequest::Entries`]: what the machine's ledger has; the entries follow in pages.
    Entries(Vector),
    /// See [`NodeStatus`].
    Status(Box<NodeStatus>),
    /// See [`GuestStats`].
    Stats(Box<GuestStats>),
    /// Connected; raw bytes follow both ways.
    Connected,
    /// Raw bytes follow.
    Raw,
    /// See [`ControlRequest::Peers`]; best first.
    Peers(Vec<PeerAddr>),
    /// See [`ControlRequest::Ping`].
    Pong {
        /// Round trip, microseconds; `None` if no answer came within two seconds.
        rtt_us: Option<u64>,
        /// How the machine is reached after that; `None` if it is not.
        path: Option<PathStatus>,
    },
    /// See [`ControlRequest::Remember`].
    Remembered {
        /// Whether the machine is sure that it knows all that it has signed. If not, it has yet to hear from other machines.
        sure: bool,
    },
    /// Both halves of the machine's signature: see [`ControlRequest::Consent`].
    Consent([[u8; 32]; 2]),
    /// See [`ControlRequest::Farewell`]: the machine has it, and no other one was there to hear it.
    Unheard,
}

/// The clan as one of its machines sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// The clan.
    pub clan: ClanId,
    /// Its name.
    pub clan_name: ClanName,
    /// This machine.
    pub machine: MachineId,
    /// Who may steer it.
    pub control: ControlMode,
    /// Where this machine's QUIC endpoint may be reached, for invitation links.
    pub quic: Vec<SocketAddr>,
    /// Relays that the clan has, best first, for invitation links.
    pub relays: Vec<RelayAddr>,
    /// Its people.
    pub people: Vec<PersonStatus>,
    /// Newcomers whom an admin has yet to let in.
    pub pending: Vec<PersonStatus>,
    /// Its machines, this one included.
    pub machines: Vec<MachineStatus>,
    /// What they offer.
    pub services: Vec<ServiceStatus>,
    /// Ledger entries, void ones included.
    pub entries: u64,
    /// What needs attention, one sentence each.
    pub problems: Vec<String>,
}

/// A person, as seen by a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PersonStatus {
    /// Key.
    pub id: PersonId,
    /// Name.
    pub name: PersonName,
    /// Role.
    pub role: Role,
}

/// A machine, as seen by another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineStatus {
    /// Key.
    pub id: MachineId,
    /// Name.
    pub name: MachineName,
    /// Whose it is.
    pub owner: PersonId,
    /// Address in the mesh.
    pub address: Ipv6Addr,
    /// Whether it is the machine that reports.
    pub this: bool,
    /// How it is reached; `None` while it is not.
    pub path: Option<PathStatus>,
    /// When its last beacon was made.
    pub last_seen: Option<Timestamp>,
    /// Its program version, if known.
    pub version: Option<String>,
    /// The certificate that it would show as a relay, if known.
    pub certificate: Option<CertificateHash>,
    /// Where it is a relay, if it is one.
    pub relay: Option<RelayAddr>,
    /// Where its WireGuard socket may be reached.
    pub wireguard: Vec<SocketAddr>,
    /// The machine that speaks the mesh for it, if it is a standard WireGuard machine; its id is then its WireGuard key.
    pub behind: Option<MachineId>,
    /// Who may steer it, as it says itself, if known.
    pub control: Option<ControlMode>,
    /// The image that it runs, if known.
    pub image: Option<ImageId>,
}

/// How a machine is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathStatus {
    /// Which kind of path carries the packets.
    pub kind: PathKind,
    /// The remote address, if the path has one.
    pub remote: Option<SocketAddr>,
    /// Round trip, microseconds, if measured.
    pub rtt_us: Option<u64>,
    /// Why this path and no better one; one sentence.
    pub why: String,
}

/// Kinds of path, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum PathKind {
    /// The machine itself.
    Local,
    /// WireGuard over plain UDP.
    Direct,
    /// WireGuard inside a QUIC connection that is itself direct.
    QuicDirect,
    /// WireGuard inside a QUIC connection through a relay.
    Relayed,
}

/// A service, as seen by a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Name.
    pub name: ServiceName,
    /// One line for people.
    pub title: String,
    /// How it is spoken to.
    pub kind: ServiceKind,
    /// Where it runs.
    pub machine: MachineName,
    /// TCP port there.
    pub port: u16,
    /// Whether it works, as far as is known.
    pub healthy: bool,
}

/// What a guest measures of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GuestStats {
    /// When, by the guest's clock.
    pub at: Timestamp,
    /// Busy share of all processors since the last report, in thousandths.
    pub cpu_permille: u16,
    /// Memory of the guest.
    pub memory_total: ByteSize,
    /// Memory not available to programs.
    pub memory_used: ByteSize,
    /// Size of the data disk's file system.
    pub disk_total: ByteSize,
    /// Of which used.
    pub disk_used: ByteSize,
    /// Bytes received from the base network since boot.
    pub net_received: ByteSize,
    /// Bytes sent to the base network since boot.
    pub net_sent: ByteSize,
    /// Seconds since boot.
    pub uptime_s: u64,
    /// Systemd units of interest and whether they are active.
    pub units: Vec<UnitStatus>,
}

/// A systemd unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitStatus {
    /// Such as `nginx.service`.
    pub name: String,
    /// As `systemctl is-active` says.
    pub state: String,
}
