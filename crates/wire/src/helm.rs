//! How a machine's controller is steered: by the base OS user, through the control port, and by the clan's admins, over QUIC.
//!
//! One conversation a stream. The machine that is steered begins, with a [`Greeting`]; a [`Call`] follows, then an
//! [`Answer`]. After [`Answer::Raw`] comes text; after [`Answer::Terminal`] both sides send frames: [`Input`] there, no more
//! than [`INPUT_WINDOW`] ahead of the program, and [`Output`] back.
//!
//! Over QUIC the stream is opened by the machine that is steered, and the caller's machine passes the bytes on without
//! reading them: its person's manager is at the other end, and signs the call.

use clan_types::{ClanId, ControlMode, DeviceId, ImageId, MachineId, MachineName, PersonId, PersonName, Timestamp};
use ed25519_dalek::{Signature, Signer, SigningKey, Verifier, VerifyingKey};
use serde::{Deserialize, Serialize};

use crate::control::GuestStats;

/// Machine to machine, on behalf of an admin.
pub const ALPN_HELM: &[u8] = b"clan/helm/1";
/// Largest [`Greeting`] and [`Call`].
pub const MAX_CALL: usize = 64 << 10;
/// Largest [`Answer`].
pub const MAX_ANSWER: usize = 512 << 10;
/// Largest frame of a terminal.
pub const MAX_FRAME: usize = 80 << 10;
/// Most bytes that may have been typed and not been taken by the program yet: what is typed into one that reads nothing waits with
/// whoever types, so that everything between is free for the rest of the conversation, and for its end.
pub const INPUT_WINDOW: usize = 256 << 10;
/// Most words of a command, and bytes of them together.
pub const MAX_WORDS: usize = 256;
/// See [`MAX_WORDS`].
pub const MAX_COMMAND: usize = 32 << 10;
/// Most bytes of a setting's name or value.
pub const MAX_VALUE: usize = 1 << 10;
/// Entries of the journal that a machine keeps.
pub const MAX_JOURNAL: usize = 256;

/// First, from the machine that is steered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Greeting {
    /// The base OS user is at the other end, by the control port: no proof is asked for.
    Here,
    /// Whoever calls signs this.
    Challenge([u8; 32]),
}

/// What somebody wants of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Who calls; `None` where the greeting asked for no proof.
    pub proof: Option<Proof>,
    /// What for.
    pub request: Request,
}

/// Shows which person calls, to one machine, from one machine, for one request, once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// The person's device.
    pub device: DeviceId,
    /// Its signature; 64 bytes.
    pub signature: Vec<u8>,
}

/// Between whom a call is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// The clan.
    pub clan: ClanId,
    /// The caller's machine.
    pub from: MachineId,
    /// The machine that is steered.
    pub to: MachineId,
    /// What it greeted with.
    pub challenge: [u8; 32],
}

impl Proof {
    /// Signs a request.
    pub fn new(key: &SigningKey, ends: &Ends, request: &Request) -> Self {
        Self::of(key, &ends.statement(request))
    }

    /// Whether the device signed this request for these ends.
    pub fn is_valid(&self, ends: &Ends, request: &Request) -> bool {
        self.covers(&ends.statement(request))
    }

    pub(crate) fn of(key: &SigningKey, statement: &[u8]) -> Self {
        let signature = key.sign(statement).to_bytes().to_vec();
        Self { device: DeviceId::from_bytes(key.verifying_key().to_bytes()), signature }
    }

    pub(crate) fn covers(&self, statement: &[u8]) -> bool {
        let (Ok(key), Ok(signature)) =
            (VerifyingKey::from_bytes(self.device.as_bytes()), Signature::from_slice(&self.signature))
        else {
            return false;
        };
        key.verify(statement, &signature).is_ok()
    }
}

impl Ends {
    fn statement(&self, request: &Request) -> Vec<u8> {
        // A request that cannot be encoded was not decoded either.
        let request = postcard::to_allocvec(request).unwrap_or_default();
        let parts: [&[u8]; 6] = [
            b"clan helm v1",
            self.clan.as_bytes(),
            self.from.as_bytes(),
            self.to.as_bytes(),
            &self.challenge,
            &request,
        ];
        parts.concat()
    }
}

/// What is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Statistics and settings. Answered by [`Answer::Report`].
    Report,
    /// The log of its programs. Answered by [`Answer::Raw`].
    Log {
        /// So many lines back.
        lines: u32,
        /// And go on.
        follow: bool,
    },
    /// What was changed, by whom. Answered by [`Answer::Journal`].
    Journal,
    /// Changes a setting. Answered by [`Answer::Done`].
    Set {
        /// Which.
        name: String,
        /// To what.
        value: String,
        /// Only say what would be.
        dry_run: bool,
    },
    /// Restores what was before an entry of the journal. Answered by [`Answer::Done`].
    Revert {
        /// The entry.
        number: u64,
        /// Only say what would be.
        dry_run: bool,
    },
    /// Starts the machine anew. Answered by [`Answer::Done`].
    Restart,
    /// Answered by [`Answer::Terminal`], then frames.
    Terminal(OpenTerminal),
    /// Gives the machine another image: that which the clan publishes. Answered by [`Answer::Sign`], then, like a change, once
    /// the manager of the machine's computer has agreed.
    Update {
        /// Which.
        image: ImageId,
        /// Only say what would be.
        dry_run: bool,
    },
}

/// A terminal, or a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenTerminal {
    /// The program and its arguments; a shell if there are none.
    pub command: Vec<String>,
    /// The size, and what kind of terminal it is, as in `TERM`; without one the command is run on plain pipes.
    pub screen: Option<(Size, String)>,
}

/// Rows and columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// From the machine that is steered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// See [`Request::Report`].
    Report(Box<Report>),
    /// Text follows.
    Raw,
    /// Oldest first.
    Journal(Vec<JournalEntry>),
    /// Done, and written down so.
    Done(JournalEntry),
    /// It is as it was to be already.
    Unchanged,
    /// Frames follow.
    Terminal,
    /// No, and why.
    Refused(Refusal),
    /// It did not work.
    Failed(String),
    /// The manager of the machine's computer wants an order to be signed for itself: see [`crate::order::Order`]. The caller sends
    /// the [`Proof`] of that, and gets another answer.
    Sign {
        /// The image that the order is about.
        image: ImageId,
        /// The manager's challenge.
        challenge: [u8; 32],
    },
}

/// A machine, as whoever may steer it sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Who may steer it.
    pub mode: ControlMode,
    /// What it measures.
    pub stats: GuestStats,
    /// Its settings.
    pub settings: Vec<Setting>,
}

/// A setting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// Its name.
    pub name: String,
    /// What it is now.
    pub value: String,
    /// What it means; one line.
    pub about: String,
}

/// Something that was done with a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalEntry {
    /// Counted from one; a machine's own.
    pub number: u64,
    /// When, by the machine's clock.
    pub at: Timestamp,
    /// By whom.
    pub by: Actor,
    /// What.
    pub what: Deed,
}

/// Who did something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actor {
    /// The person; `None` where the ledger does not say whose machine it is.
    pub person: Option<PersonId>,
    /// What they were called then.
    pub name: Option<PersonName>,
    /// The machine they did it from.
    pub machine: MachineId,
    /// What it was called then.
    pub machine_name: Option<MachineName>,
    /// The base OS user, at the computer itself.
    pub here: bool,
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Deed {
    /// Who may steer the machine was changed.
    Mode {
        /// Before.
        before: ControlMode,
        /// After.
        after: ControlMode,
        /// The entry that this reverts, if it does.
        reverts: Option<u64>,
    },
    /// A setting was changed.
    Set {
        /// Which.
        name: String,
        /// Before.
        before: String,
        /// After.
        after: String,
        /// The entry that this reverts, if it does.
        reverts: Option<u64>,
    },
    /// The machine was started anew.
    Restart,
    /// A terminal was opened, or a command run. What was typed is not kept.
    Terminal {
        /// When it ended; `None` while it lasts.
        ended: Option<Timestamp>,
    },
    /// The machine was given another image. One that it is not well with, it gives back by itself.
    Image {
        /// Before.
        before: ImageId,
        /// After.
        after: ImageId,
        /// The entry that this reverts, if it does.
        reverts: Option<u64>,
    },
}

/// Why somebody may not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// Not in the clan, or not who they say.
    #[error("you are not in the clan, as this machine knows it")]
    Stranger,
    /// Not an admin.
    #[error("machines of others are steered by the clan's admins and owners")]
    NotAdmin,
    /// An admin calls, and the mode is local.
    #[error("only the user of its own computer steers this machine")]
    Local,
    /// The base OS user calls, and the mode is remote.
    #[error("the clan's admins steer this machine, not the user of its own computer")]
    Remote,
    /// Whoever asks, it is done on the computer.
    #[error("{what} is the user's of its own computer to change")]
    UserOnly {
        /// What.
        what: String,
    },
    /// There is no such setting here.
    #[error("the machine has no setting `{name}`")]
    NoSetting {
        /// The name.
        name: String,
        /// Those that there are.
        known: Vec<String>,
    },
    /// The setting cannot be that.
    #[error("`{value}` is no value for `{name}`: {why}")]
    BadValue {
        /// The setting.
        name: String,
        /// The value.
        value: String,
        /// Why not.
        why: String,
    },
    /// The journal has no such entry, or has it no more.
    #[error("the machine's journal has no entry {number}")]
    NoEntry {
        /// The number.
        number: u64,
    },
    /// What the entry tells cannot be taken back.
    #[error("what entry {number} tells cannot be taken back")]
    NotRevertible {
        /// The number.
        number: u64,
    },
    /// It was changed again since.
    #[error("entry {number} is not the last word: it is `{now}` now")]
    Stale {
        /// The number.
        number: u64,
        /// What it is now.
        now: String,
    },
    /// As many terminals as may be at once.
    #[error("the machine has as many terminals open as it may have")]
    Busy,
    /// The request has no sense, or is too large.
    #[error("the request was malformed")]
    Malformed,
    /// The machine is a computer itself.
    #[error("the machine runs no image")]
    NoImage,
    /// Others have a machine run what the clan publishes, or what it ran before.
    #[error("the clan does not publish the image {}, and the machine did not run it before", image.short())]
    NotPublished {
        /// The image.
        image: ImageId,
    },
    /// The manager of the machine's computer does not do it now.
    #[error("its computer does not do it now: {why}")]
    NotNow {
        /// Why.
        why: String,
    },
}

/// To a terminal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input {
    /// What was typed.
    Data(Vec<u8>),
    /// Another size.
    Resize(Size),
    /// Nothing more will be typed.
    End,
}

/// From a terminal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Output {
    /// What it shows.
    Data(Vec<u8>),
    /// What a command without a terminal says on its second way out.
    Aside(Vec<u8>),
    /// The command ended so: its exit status, or 128 and the number of the signal that killed it. Last.
    Exit(u8),
    /// Whoever steered may not any more. Last.
    Cut(Refusal),
    /// So many more bytes of what was typed went to the program: there is room for as many. See [`INPUT_WINDOW`].
    Taken(u32),
}

impl Request {
    /// Whether it is of a size that is dealt with.
    pub fn is_bounded(&self) -> bool {
        match self {
            Self::Report
            | Self::Log { .. }
            | Self::Journal
            | Self::Revert { .. }
            | Self::Restart
            | Self::Update { .. } => true,
            Self::Set { name, value, .. } => name.len() <= MAX_VALUE && value.len() <= MAX_VALUE,
            Self::Terminal(OpenTerminal { command, screen }) => {
                let bytes: usize = command.iter().map(String::len).sum();
                let plain = |term: &str| {
                    term.len() <= 64 && term.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+".contains(&b))
                };
                // A word with a zero byte is none for the system.
                let words = command.iter().all(|word| !word.contains('\0'));
                let screen = screen.as_ref().is_none_or(|(_, term)| plain(term));
                command.len() <= MAX_WORDS && bytes <= MAX_COMMAND && words && screen
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends() -> Ends {
        let machine = |n| MachineId::from_bytes([n; 32]);
        Ends { clan: ClanId::from_bytes([1; 32]), from: machine(2), to: machine(3), challenge: [4; 32] }
    }

    #[test]
    fn a_call_is_proved_for_one_request_between_two_machines_once() {
        let key = SigningKey::from_bytes(&[5; 32]);
        let proof = Proof::new(&key, &ends(), &Request::Restart);
        assert!(proof.is_valid(&ends(), &Request::Restart));
        assert!(!proof.is_valid(&ends(), &Request::Report), "another request");
        let other = MachineId::from_bytes([9; 32]);
        for wrong in [
            Ends { clan: ClanId::from_bytes([9; 32]), ..ends() },
            Ends { from: other, ..ends() },
            Ends { to: other, ..ends() },
            Ends { challenge: [9; 32], ..ends() },
        ] {
            assert!(!proof.is_valid(&wrong, &Request::Restart), "{wrong:?}");
        }
        let forged = Proof { device: DeviceId::from_bytes([7; 32]), ..proof.clone() };
        assert!(!forged.is_valid(&ends(), &Request::Restart));
        assert!(!Proof { signature: vec![0; 63], ..proof }.is_valid(&ends(), &Request::Restart));
    }

    #[test]
    fn commands_are_bounded() {
        let terminal = |command: Vec<String>, term: &str| {
            let size = Size { rows: 1, columns: 1 };
            Request::Terminal(OpenTerminal { command, screen: Some((size, term.to_owned())) })
        };
        assert!(terminal(vec!["ls".into()], "xterm-256color").is_bounded());
        assert!(!terminal(vec!["a".into(); MAX_WORDS + 1], "xterm").is_bounded());
        assert!(!terminal(vec!["a".repeat(MAX_COMMAND + 1)], "xterm").is_bounded());
        assert!(!terminal(vec!["a\0b".into()], "xterm").is_bounded());
        assert!(!terminal(vec![], "x\nLD_PRELOAD=y").is_bounded());
    }
}
