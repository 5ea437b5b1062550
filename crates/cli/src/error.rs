//! What is said when something does not work: what happened, why, what to do; and the exit code.

#[cfg(any(feature = "manager", feature = "controller"))]
use std::error::Error;
use std::{fmt::Display, io, process::ExitCode, time::Duration};

use clan_api::{ApiProblem, ClientError, ErrorCode};
use clan_types::{LinkError, PhraseError, WordsError};
use clap::error::{ContextKind, ContextValue};
use serde::Serialize;

use crate::{
    printer::{Tone, harmless},
    words,
};

/// How a run ends that did not succeed. The numbers are part of the interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Refused, or a mistake that the user can correct.
    Refused = 1,
    /// The command line was not understood.
    Usage = 2,
    /// The reader of stdout went away.
    BrokenPipe = 3,
    /// The manager does not answer.
    Unreachable = 4,
    /// It took too long.
    TimedOut = 5,
    /// A mistake in this program.
    Bug = 255,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An error as the user sees it. In JSON it has the shape of an [`ApiProblem`], and the exit code.
#[derive(Debug)]
pub(crate) struct CliError {
    exit: Exit,
    /// The status of a command that was run elsewhere, which is passed on.
    passed_on: Option<u8>,
    silent: bool,
    problem: Box<Problem>,
}

/// As [`ApiProblem`], with room for codes that only a command line knows.
#[derive(Debug, Serialize)]
struct Problem {
    #[serde(rename = "type")]
    kind: String,
    code: String,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
    hints: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
    exit: u8,
}

impl CliError {
    /// An error that is not the program's fault. `message` is a sentence without trailing period.
    pub(crate) fn refused(code: &str, message: impl Into<String>) -> Self {
        Self::new(Exit::Refused, code, message)
    }

    /// A mistake in this program.
    pub(crate) fn bug(message: impl Into<String>, why: impl Display) -> Self {
        Self::new(Exit::Bug, "bug", message)
            .why(why)
            .hint("this is a mistake in Clan: please report it, with what you typed")
    }

    /// A failed run about which everything has been said.
    pub(crate) fn said_already() -> Self {
        Self { silent: true, ..Self::new(Exit::Bug, "bug", "") }
    }

    /// A command that was run elsewhere, and did not succeed.
    pub(crate) fn passed_on(status: u8) -> Self {
        Self { silent: true, passed_on: Some(status), ..Self::new(Exit::Refused, "command", "") }
    }

    /// The manager did not answer in time.
    pub(crate) fn timed_out(limit: Duration) -> Self {
        Self::new(
            Exit::TimedOut,
            "timed_out",
            format!(
                "the manager did not answer within {}",
                words::count(usize::try_from(limit.as_secs()).unwrap_or(usize::MAX), "second")
            ),
        )
        .hint("it may be busy: try again, or allow more time with `--timeout`")
    }

    /// The manager went away in the middle of something.
    pub(crate) fn manager_gone(what: &str) -> Self {
        Self::new(Exit::Unreachable, "manager_gone", format!("the manager went away while it worked on: {what}"))
            .hint("start it again with `clan manager`, then see how things stand: `clan status`")
    }

    /// The manager was started again, and does not know of the task.
    pub(crate) fn not_gone_on_with(what: &str) -> Self {
        Self::new(
            Exit::Refused,
            "not_gone_on_with",
            format!("the manager was started again, and does not go on with: {what}"),
        )
        .hint("see how things stand: `clan status`")
        .hint("then run the same command again, if it is still wanted")
    }

    /// Stdout cannot be written to.
    pub(crate) fn stdout(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self { silent: true, ..Self::new(Exit::BrokenPipe, "broken_pipe", "whoever read the output went away") }
        } else {
            Self::refused("stdout", "the output cannot be written").why(error)
        }
    }

    /// An error of a library, with everything beneath it as the reason.
    #[cfg(any(feature = "manager", feature = "controller"))]
    pub(crate) fn from_source(code: &str, error: &dyn Error) -> Self {
        let said = Self::refused(code, error.to_string());
        match error.source() {
            Some(source) => said.why(chain(source)),
            None => said,
        }
    }

    /// A command line that was not understood.
    pub(crate) fn from_clap(error: &clap::Error) -> Self {
        let text = error.render().to_string();
        let first = text.lines().next().unwrap_or_default();
        let mut said = Self::new(Exit::Usage, "usage", first.strip_prefix("error: ").unwrap_or(first));
        for kind in [ContextKind::SuggestedArg, ContextKind::SuggestedSubcommand, ContextKind::SuggestedValue] {
            match error.get(kind) {
                Some(ContextValue::String(text)) => said = said.hint(format!("did you mean `{text}`?")),
                Some(ContextValue::Strings(texts)) if !texts.is_empty() => {
                    said = said.hint(format!("did you mean `{}`?", texts.join("` or `")))
                }
                _ => {}
            }
        }
        said.hint("for more information, try `--help`")
    }

    fn new(exit: Exit, code: &str, message: impl Into<String>) -> Self {
        let problem = Problem {
            kind: format!("urn:clan:problem:{code}"),
            code: code.to_owned(),
            message: message.into(),
            why: None,
            hints: Vec::new(),
            status: None,
            exit: exit as u8,
        };
        Self { exit, passed_on: None, silent: false, problem: Box::new(problem) }
    }

    /// Adds the reason.
    #[must_use]
    pub(crate) fn why(mut self, why: impl Display) -> Self {
        self.problem.why = Some(why.to_string());
        self
    }

    /// Adds something to do, best first.
    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.problem.hints.push(hint.into());
        self
    }

    /// How the run ends.
    pub(crate) fn exit(&self) -> ExitCode {
        self.passed_on.map_or_else(|| self.exit.into(), ExitCode::from)
    }

    /// Whether nothing is to be printed.
    pub(crate) fn is_silent(&self) -> bool {
        self.silent
    }

    /// The lines for people.
    pub(crate) fn render(&self, style: &dyn Fn(Tone, &str) -> String) -> String {
        let mut text = format!("{} {}\n", style(Tone::Bad, "error:"), harmless(&self.problem.message));
        let notes = self
            .problem
            .why
            .iter()
            .map(|w| (Tone::Warn, "why:", w))
            .chain(self.problem.hints.iter().map(|h| (Tone::Good, "hint:", h)));
        for (tone, label, body) in notes {
            for (at, line) in body.lines().filter(|l| !l.trim().is_empty()).enumerate() {
                let label = if at == 0 { style(tone, label) } else { " ".repeat(label.len()) };
                text.push_str(&format!("{label} {}\n", harmless(line)));
            }
        }
        text
    }

    /// One line of JSON.
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string(&self.problem).unwrap_or_else(|_| r#"{"code":"bug"}"#.to_owned())
    }
}

/// An error and its sources on one line.
#[cfg(any(feature = "manager", feature = "controller"))]
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(": ");
        text.push_str(&source.to_string());
        next = source.source();
    }
    text
}

impl From<ApiProblem> for CliError {
    fn from(problem: ApiProblem) -> Self {
        let exit = match problem.code {
            ErrorCode::TimedOut => Exit::TimedOut,
            ErrorCode::Internal => Exit::Bug,
            _ => Exit::Refused,
        };
        let ApiProblem { kind, code, message, why, hints, status } = problem;
        Self {
            exit,
            passed_on: None,
            silent: false,
            problem: Box::new(Problem {
                kind,
                code: code.to_string(),
                message,
                why,
                hints,
                status: Some(status),
                exit: exit as u8,
            }),
        }
    }
}

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::ManagerNotRunning { path } => {
                Self::new(Exit::Unreachable, "manager_not_running", "the manager is not running")
                    .why(format!("nothing listens on {}", path.display()))
                    .hint("start it in another terminal: `clan manager`")
                    .hint("if it runs with another data folder, name that one: `--data DIR`")
            }
            ClientError::Connect { path, source } => Self::new(
                Exit::Unreachable,
                "manager_unreachable",
                format!("cannot connect to the manager at {}", path.display()),
            )
            .why(source)
            .hint("the data folder must be yours; another one can be named with `--data DIR`"),
            ClientError::Problem(problem) => (*problem).into(),
            ClientError::Protocol { what } => Self::new(
                Exit::Unreachable,
                "manager_answer",
                "the manager's answer cannot be understood",
            )
            .why(what)
            .hint("the manager may have ended just now, or be of another version: start it again with `clan manager`"),
        }
    }
}

impl From<LinkError> for CliError {
    fn from(error: LinkError) -> Self {
        let (code, hint) = match error {
            LinkError::Foreign => {
                ("link_invalid", "an invitation starts with `clan://join/`: ask the person who invited you for it")
            }
            LinkError::NotAnInvitation => ("link_unsupported", "an invitation starts with `clan://join/`: ask for one"),
            LinkError::Damaged => {
                ("link_invalid", "copy the whole link again, without line breaks, and put it in quotes")
            }
            LinkError::NewerVersion(_) => ("link_newer", "update Clan on this computer, then try again"),
        };
        Self::refused(code, error.to_string()).hint(hint)
    }
}

impl From<WordsError> for CliError {
    fn from(error: WordsError) -> Self {
        let said = Self::refused("words_invalid", error.to_string());
        match error {
            WordsError::Unknown { nearest: Some(word), .. } => said.hint(format!("did you mean `{word}`?")),
            WordsError::Unknown { nearest: None, .. } => said.hint("ask for the words again, letter by letter"),
            WordsError::Count(_) => {
                said.hint("type all four, with blanks between them: `clan join one two three four`")
            }
        }
    }
}

impl From<PhraseError> for CliError {
    fn from(error: PhraseError) -> Self {
        let said = Self::refused("phrase_invalid", error.to_string());
        match error {
            PhraseError::Unknown { nearest: Some(word), .. } => said.hint(format!("did you mean `{word}`?")),
            PhraseError::Unknown { nearest: None, .. } | PhraseError::Checksum => {
                said.hint("compare it with what you wrote down, word by word")
            }
            PhraseError::Count(_) => said.hint("type all twelve, in their order, with blanks between them"),
        }
    }
}
