//! The side that waits: which words a machine knows, and what became of them.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use clan_types::{Channel, MachineId, Timestamp, Words};
use clan_wire::words::{MAX_CHANNELS, WordsRefusal};
use spake2::Password;
use zeroize::Zeroizing;

use crate::spake::{self, Agreement, Run, SHARE, Seeded};

/// How long words are valid.
pub const LIFETIME: Duration = Duration::from_secs(600);
/// How long it is remembered what became of them, so that whoever comes late is told.
const MEMORY: Duration = Duration::from_secs(1200);
/// Longest link.
pub const MAX_LINK: usize = 3 << 10;
/// Conversations about one set of words. Each costs the machine a key agreement.
const MAX_CONVERSATIONS: u32 = 64;
/// Conversations at one time.
const MAX_AT_ONCE: usize = 16;

/// Tells conversations apart: unique among those that are under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ConversationId(pub u64);

/// Why words cannot be waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Others with the same first word are open, or were lately.
    #[error("words with the same beginning are in use")]
    ChannelTaken,
    /// So many are open.
    #[error("this machine waits for {MAX_CHANNELS} other invitations in words")]
    TooMany,
    /// The link does not fit.
    #[error("the link is too long to be given for words")]
    TooLong,
}

/// What the inviter should know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Report {
    /// Somebody gave wrong words; they are void.
    Void {
        /// The first word.
        channel: Channel,
        /// When.
        at: Timestamp,
    },
}

struct Code {
    password: Password,
    link: Zeroizing<Vec<u8>>,
    opened: Timestamp,
    expires: Timestamp,
    fate: Fate,
    conversations: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Open,
    Used,
    Void { at: Timestamp },
}

struct Conversation {
    channel: Channel,
    /// When the words were opened that it is about: later ones may have the same channel.
    opened: Timestamp,
    agreement: Agreement,
}

/// The words that one machine waits for.
pub struct Codes {
    machine: MachineId,
    codes: BTreeMap<Channel, Code>,
    conversations: HashMap<ConversationId, Conversation>,
}

impl Codes {
    /// None yet. `machine` is the endpoint that newcomers reach.
    pub fn new(machine: MachineId) -> Self {
        Self { machine, codes: BTreeMap::new(), conversations: HashMap::new() }
    }

    /// Waits for words, and gives the link for them, once, until [`LIFETIME`] is over.
    pub fn open(&mut self, words: &Words, link: Zeroizing<Vec<u8>>, now: Timestamp) -> Result<Timestamp, OpenError> {
        self.forget(now);
        if link.len() > MAX_LINK {
            return Err(OpenError::TooLong);
        }
        if self.codes.contains_key(&words.channel()) {
            return Err(OpenError::ChannelTaken);
        }
        if self.codes.len() >= MAX_CHANNELS {
            // What is over makes room for what is to come.
            let over = self.codes.iter().filter(|(_, code)| code.problem(now).is_some());
            let oldest = over.min_by_key(|(_, code)| code.opened).map(|(channel, _)| *channel);
            self.codes.remove(&oldest.ok_or(OpenError::TooMany)?);
        }
        let expires = now.plus(LIFETIME);
        let code =
            Code { password: spake::password(words), link, opened: now, expires, fate: Fate::Open, conversations: 0 };
        self.codes.insert(words.channel(), code);
        Ok(expires)
    }

    /// Takes a newcomer's share, on the connection of the endpoint `newcomer`: gives ours. `seed` is 32 fresh random bytes.
    pub fn begin(
        &mut self,
        id: ConversationId,
        newcomer: &MachineId,
        channel: Channel,
        share: &[u8],
        seed: &[u8; 32],
        now: Timestamp,
    ) -> Result<Vec<u8>, WordsRefusal> {
        self.forget(now);
        let code = self.codes.get_mut(&channel).ok_or(WordsRefusal::NotOpen)?;
        if let Some(problem) = code.problem(now) {
            return Err(problem);
        }
        if share.len() != SHARE || self.conversations.contains_key(&id) {
            return Err(WordsRefusal::Malformed);
        }
        if self.conversations.len() >= MAX_AT_ONCE || code.conversations >= MAX_CONVERSATIONS {
            return Err(WordsRefusal::Busy);
        }
        code.conversations += 1;
        let (a, b) = spake::identities(channel, newcomer, &self.machine);
        let (run, ours) = Run::start_b_with_rng(&code.password, &a, &b, Seeded::new(seed));
        let agreement = spake::agree(run, share).ok_or(WordsRefusal::Malformed)?;
        self.conversations.insert(id, Conversation { channel, opened: code.opened, agreement });
        Ok(ours)
    }

    /// Takes a newcomer's tag: gives the sealed link, once.
    ///
    /// INVARIANT: words have one guess. A tag that does not fit makes them void before anything is answered.
    pub fn confirm(&mut self, id: ConversationId, tag: &[u8; 32], now: Timestamp) -> Result<Vec<u8>, WordsRefusal> {
        let conversation = self.conversations.remove(&id).ok_or(WordsRefusal::Malformed)?;
        let code = self.codes.get_mut(&conversation.channel).filter(|code| code.opened == conversation.opened);
        let code = code.ok_or(WordsRefusal::NotOpen)?;
        if let Some(problem) = code.problem(now) {
            return Err(problem);
        }
        let link = std::mem::take(&mut code.link);
        if !conversation.agreement.is_confirmed_by(tag) {
            code.fate = Fate::Void { at: now };
            return Err(WordsRefusal::Void);
        }
        code.fate = Fate::Used;
        conversation.agreement.seal(&link).ok_or(WordsRefusal::Malformed)
    }

    /// A conversation ended, however.
    pub fn hang_up(&mut self, id: ConversationId) {
        self.conversations.remove(&id);
    }

    /// Which channels to announce: those of words that are over, too, so that whoever comes late is told why.
    pub fn channels(&self) -> Vec<Channel> {
        self.codes.keys().copied().collect()
    }

    /// What the inviter should know.
    pub fn reports(&self) -> Vec<Report> {
        let voids = self.codes.iter().filter_map(|(channel, code)| match code.fate {
            Fate::Void { at } => Some(Report::Void { channel: *channel, at }),
            Fate::Open | Fate::Used => None,
        });
        voids.collect()
    }

    /// Forgets what is long over. Gives when the next is.
    pub fn forget(&mut self, now: Timestamp) -> Option<Timestamp> {
        self.codes.retain(|_, code| now < code.opened.plus(MEMORY));
        for code in self.codes.values_mut().filter(|code| now > code.expires) {
            code.link = Zeroizing::default();
        }
        self.codes.values().map(|code| code.opened.plus(MEMORY)).min()
    }
}

impl Code {
    /// Why the words are over, if they are.
    fn problem(&self, now: Timestamp) -> Option<WordsRefusal> {
        match self.fate {
            Fate::Used => Some(WordsRefusal::Used),
            Fate::Void { .. } => Some(WordsRefusal::Void),
            // A clock that was set back does not make them last longer than it would have.
            Fate::Open if now > self.expires || now < self.opened => Some(WordsRefusal::Expired),
            Fate::Open => None,
        }
    }
}

#[cfg(test)]
mod tests;
