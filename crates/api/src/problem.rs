use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Media type of a serialised [`ApiProblem`].
pub const PROBLEM_TYPE: &str = "application/problem+json";

/// Why a request or a task failed, for programs and for people (RFC 9457).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct ApiProblem {
    /// URI of the kind of problem: `urn:clan:problem:<code>`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Kind of problem, for programs.
    pub code: ErrorCode,
    /// What happened: one sentence without trailing period.
    pub message: String,
    /// Why, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// What the person can do, best first.
    #[serde(default)]
    pub hints: Vec<String>,
    /// HTTP status code.
    pub status: u16,
}

impl ApiProblem {
    /// A problem with what happened; the status follows from the code.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            kind: format!("urn:clan:problem:{code}"),
            code,
            message: message.into(),
            why: None,
            hints: Vec::new(),
            status: code.status(),
        }
    }

    /// Adds why it happened.
    #[must_use]
    pub fn why(mut self, why: impl Into<String>) -> Self {
        self.why = Some(why.into());
        self
    }

    /// Adds something that the person can do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $status:literal;)*) => {
        /// Kinds of problem.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum ErrorCode {
            $($(#[$doc])* $name,)*
        }

        impl ErrorCode {
            /// All kinds.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The HTTP status code that goes with it.
            pub const fn status(self) -> u16 {
                match self { $(Self::$name => $status,)* }
            }

            /// As in JSON.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

codes! {
    /// The request is malformed, or a value in it is.
    BadRequest = "bad_request", 400;
    /// No token, or a wrong one.
    Unauthorized = "unauthorized", 401;
    /// The request came from another web site, or for another host name.
    ForeignOrigin = "foreign_origin", 403;
    /// Not with this person's role.
    NotAllowed = "not_allowed", 403;
    /// No such clan, machine, task, service or path.
    NotFound = "not_found", 404;
    /// A name or an id prefix fits more than one.
    Ambiguous = "ambiguous", 409;
    /// Not in the present state of things, such as starting a VM of a clan that is being left.
    Conflict = "conflict", 409;
    /// This computer is in that clan already.
    AlreadyJoined = "already_joined", 409;
    /// A clan of that name is here already.
    NameTaken = "name_taken", 409;
    /// The text is not an invitation link, or it is incomplete or damaged.
    LinkInvalid = "link_invalid", 400;
    /// The link was made by a newer Clan.
    LinkNewer = "link_newer", 400;
    /// The text is not a recovery phrase.
    PhraseInvalid = "phrase_invalid", 400;
    /// The text is not four words of the list.
    WordsInvalid = "words_invalid", 400;
    /// Nobody on this network waits for these words.
    WordsUnknown = "words_unknown", 410;
    /// Wrong words were given: nobody gets another guess.
    WordsVoid = "words_void", 410;
    /// The words have been used.
    WordsUsed = "words_used", 410;
    /// The words have expired.
    WordsExpired = "words_expired", 410;
    /// The clan does not know the invite.
    InviteUnknown = "invite_unknown", 410;
    /// The invite has been used.
    InviteUsed = "invite_used", 410;
    /// The invite has expired.
    InviteExpired = "invite_expired", 410;
    /// The invite was withdrawn.
    InviteRevoked = "invite_revoked", 410;
    /// An admin has yet to approve the request to join.
    ApprovalPending = "approval_pending", 409;
    /// An admin has denied the request to join.
    AdmissionDenied = "admission_denied", 410;
    /// What was fetched is not what the link names.
    Untrusted = "untrusted", 502;
    /// No machine of the clan answers.
    Unreachable = "unreachable", 504;
    /// Something did not answer in time.
    TimedOut = "timed_out", 504;
    /// A program that is needed is not installed.
    MissingProgram = "missing_program", 424;
    /// The disk is full.
    DiskFull = "disk_full", 507;
    /// Not enough memory, disk or processors.
    TooSmall = "too_small", 507;
    /// A port is taken by another program.
    PortBusy = "port_busy", 409;
    /// The base OS denies access to something.
    PermissionDenied = "permission_denied", 403;
    /// A file on disk is damaged.
    DamagedFile = "damaged_file", 500;
    /// The image could not be built.
    BuildFailed = "build_failed", 500;
    /// The VM did not start, or ended.
    VmFailed = "vm_failed", 500;
    /// The VM is not running, or its controller does not answer yet.
    VmNotReady = "vm_not_ready", 503;
    /// The controller of an integrated machine does not run, or is another clan's.
    ControllerDown = "controller_down", 503;
    /// The VM's disk is encrypted, and the manager does not know the passphrase.
    Locked = "locked", 423;
    /// The passphrase does not open the disk.
    WrongPassphrase = "wrong_passphrase", 403;
    /// The service does not answer.
    ServiceDown = "service_down", 502;
    /// The person cancelled it.
    Cancelled = "cancelled", 409;
    /// The manager is stopping, or was stopped while it worked on this.
    Stopping = "stopping", 503;
    /// A fault of Clan's own.
    Internal = "internal", 500;
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_reads_in_json_as_it_displays() {
        for code in ErrorCode::ALL {
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
        }
    }

    #[test]
    fn a_problem_is_problem_json() {
        let problem = ApiProblem::new(ErrorCode::DiskFull, "the disk is full").why("0 bytes left").hint("free some");
        let json = serde_json::to_value(&problem).unwrap();
        assert_eq!(json["type"], "urn:clan:problem:disk_full");
        assert_eq!(json["status"], 507);
        assert_eq!(serde_json::from_value::<ApiProblem>(json).unwrap(), problem);
    }
}
