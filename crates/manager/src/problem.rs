//! Every library's error as the person sees it: what happened, why, what to do.

use std::{error::Error, io, path::Path};

use clan_api::{ApiProblem, ErrorCode};
use clan_build::{BuildError, StoreError};
use clan_types::{ByteSize, LinkError, NameError, WordsError};
use clan_vm::VmError;
use clan_wire::{peer::JoinRefusal, words::WordsRefusal};

use crate::{disk::DiskError, guest::GuestError};

const ASK_AGAIN: &str = "ask for a new link: `clan invite` makes one";

/// A VM that takes more memory than all together may have.
pub(crate) fn beyond_budget(needed: ByteSize, budget: ByteSize) -> ApiProblem {
    ApiProblem::new(
        ErrorCode::TooSmall,
        format!("the VM needs {needed} of memory, and virtual machines here may have {budget} together"),
    )
    .hint("give it less: `--memory 256M`")
    .hint("or start the manager with more: `clan manager --vm-memory`")
}

/// An error's sources, joined.
pub(crate) fn sources(error: &dyn Error) -> Option<String> {
    let mut text = String::new();
    let mut next = error.source();
    while let Some(source) = next {
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&source.to_string());
        next = source.source();
    }
    (!text.is_empty()).then_some(text)
}

/// An error with its sources.
pub(crate) fn with_sources(error: &dyn Error) -> String {
    sources(error).map_or_else(|| error.to_string(), |why| format!("{error}: {why}"))
}

fn plain(code: ErrorCode, error: &dyn Error) -> ApiProblem {
    let mut problem = ApiProblem::new(code, error.to_string());
    problem.why = sources(error);
    problem
}

fn install(package: &str) -> String {
    format!("install it: `sudo apt install {package}`")
}

pub(crate) fn free_space(path: &Path) -> String {
    format!("free some space where {} is, or use another data folder with `--data`", path.display())
}

/// A file operation that failed.
fn file(error: &dyn Error, source: &io::Error, path: &Path) -> ApiProblem {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            let why = match available(path) {
                Some(free) => format!("{source}; {free} free"),
                None => source.to_string(),
            };
            ApiProblem::new(ErrorCode::DiskFull, format!("the disk is full: {error}")).why(why).hint(free_space(path))
        }
        io::ErrorKind::PermissionDenied => plain(ErrorCode::PermissionDenied, error)
            .hint(format!("make {} yours, or use another data folder with `--data`", path.display())),
        io::ErrorKind::ReadOnlyFilesystem => {
            plain(ErrorCode::PermissionDenied, error).hint("use another data folder with `--data`")
        }
        _ => plain(ErrorCode::Internal, error),
    }
}

/// Free space where a path is, or where it would be.
pub(crate) fn available(path: &Path) -> Option<ByteSize> {
    let existing = path.ancestors().find(|p| p.exists())?;
    let stat = rustix::fs::statvfs(existing).ok()?;
    Some(ByteSize::from_bytes(stat.f_bavail.saturating_mul(stat.f_frsize)))
}

pub(crate) fn disk(error: &DiskError) -> ApiProblem {
    match error {
        DiskError::Io { path, source, .. } if source.kind() == io::ErrorKind::NotFound => {
            plain(ErrorCode::DamagedFile, error).hint(format!("restore {} from a backup", path.display()))
        }
        DiskError::Io { path, source, .. } => file(error, source, path),
        DiskError::Corrupt { kept, .. } => plain(ErrorCode::DamagedFile, error)
            .hint(format!("restore it from a backup; what is left of it is {}", kept.display())),
        DiskError::DamagedSecret { path } => plain(ErrorCode::DamagedFile, error)
            .hint(format!("it is kept as it is: restore {} from a backup", path.display())),
        DiskError::Exposed { path, .. } => plain(ErrorCode::PermissionDenied, error)
            .hint(format!("if nobody has used it: `chmod 600 {}`", path.display())),
        DiskError::NewerVersion { .. } => plain(ErrorCode::DamagedFile, error).hint("update Clan"),
        DiskError::InUse { .. } => plain(ErrorCode::Conflict, error).hint("stop the other manager"),
        DiskError::ForeignClan { .. } | DiskError::NoRandomness { .. } => plain(ErrorCode::Internal, error),
    }
}

pub(crate) fn vm(error: &VmError) -> ApiProblem {
    match error {
        VmError::MissingQemu { package } => ApiProblem::new(ErrorCode::MissingProgram, "QEMU is not installed")
            .why("it runs the clan's virtual machine")
            .hint(install(package)),
        VmError::MissingTool { tool, package } => {
            ApiProblem::new(ErrorCode::MissingProgram, format!("`{tool}` is not installed")).hint(install(package))
        }
        VmError::Missing(missing) => ApiProblem::new(ErrorCode::MissingProgram, "containers cannot be run here")
            .why(missing.why.clone())
            .hint(missing.remedy.clone())
            .hint("or take a virtual machine: leave out `--container`"),
        VmError::MissingFile { .. } => plain(ErrorCode::DamagedFile, error),
        VmError::AlreadyRunning { .. } | VmError::Locked { .. } => {
            plain(ErrorCode::Conflict, error).hint("another manager may own it: stop that one")
        }
        VmError::PortBusy { .. } => plain(ErrorCode::PortBusy, error).hint("try again: another port will be chosen"),
        VmError::NoSpace { path, .. } => plain(ErrorCode::DiskFull, error).hint(free_space(path)),
        VmError::TooLarge { .. } => {
            plain(ErrorCode::TooSmall, error).hint("close some programs, or give the machine less with `--memory`")
        }
        VmError::WrongPassphrase { .. } => ApiProblem::new(ErrorCode::WrongPassphrase, "the passphrase is wrong")
            .why("it does not open the disk, on which nothing was changed")
            .hint("try again: capitals, blanks and the keyboard's layout count"),
        VmError::DamagedDisk { path, .. } => plain(ErrorCode::DamagedFile, error)
            .hint(format!("put a copy back: `clan vm restore`; the disk is {}", path.display())),
        VmError::BadSpec(_) => plain(ErrorCode::BadRequest, error),
        VmError::NotSaved { .. } => plain(ErrorCode::VmFailed, error),
        VmError::DiedAtStart { .. } | VmError::SilentAtStart { .. } | VmError::Process { .. } | VmError::Qmp(_) => {
            plain(ErrorCode::VmFailed, error)
        }
        VmError::ToolFailed { .. } => plain(ErrorCode::VmFailed, error),
        VmError::Io { path, source, .. } => file(error, source, path),
    }
}

pub(crate) fn build(error: &BuildError) -> ApiProblem {
    match error {
        BuildError::MissingTool { tool, package } => {
            ApiProblem::new(ErrorCode::MissingProgram, format!("`{tool}` is not installed"))
                .why("it builds the image")
                .hint(install(package))
        }
        BuildError::NoSubordinateIds { user, .. } => plain(ErrorCode::MissingProgram, error).hint(format!(
            "give it some: `sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}`"
        )),
        BuildError::NoUserNamespaces { .. } => plain(ErrorCode::PermissionDenied, error)
            .hint("allow them: `sudo sysctl kernel.unprivileged_userns_clone=1`"),
        BuildError::NotEnoughSpace { path, .. } => plain(ErrorCode::DiskFull, error).hint(free_space(path)),
        BuildError::DiskFull { .. } => {
            plain(ErrorCode::DiskFull, error).hint("free some space, or use another data folder with `--data`")
        }
        BuildError::Download { log, .. } => plain(ErrorCode::BuildFailed, error)
            .hint("check the network; a proxy is taken from the environment variable `http_proxy`")
            .hint(format!("the whole output: {}", log.display())),
        BuildError::ToolFailed { log, .. } => {
            plain(ErrorCode::BuildFailed, error).hint(format!("the whole output: {}", log.display()))
        }
        BuildError::BadExecutable { .. } => plain(ErrorCode::BuildFailed, error).hint("reinstall Clan: `make install`"),
        BuildError::Busy { .. } => plain(ErrorCode::Conflict, error).hint("wait for the other build"),
        BuildError::Store(source) => store(source),
        BuildError::Io { path, source, .. } => file(error, source, path),
        BuildError::Cancelled => crate::tasks::cancelled(),
        _ => plain(ErrorCode::BuildFailed, error),
    }
}

pub(crate) fn store(error: &StoreError) -> ApiProblem {
    match error {
        StoreError::DiskFull(path) => {
            let free = available(path).map(|free| format!("{free} free"));
            let mut problem = plain(ErrorCode::DiskFull, error).hint(free_space(path));
            problem.why = free;
            problem
        }
        StoreError::Unknown(_) | StoreError::Damaged { .. } | StoreError::Manifest(_) => {
            plain(ErrorCode::DamagedFile, error)
        }
        StoreError::Busy(_) => plain(ErrorCode::Conflict, error).hint("wait for the other task"),
        StoreError::Io { path, source, .. } => file(error, source, path),
    }
}

pub(crate) fn link(error: &LinkError) -> ApiProblem {
    match error {
        LinkError::Foreign => plain(ErrorCode::LinkInvalid, error).hint("an invitation begins with `clan://join/`"),
        LinkError::NotAnInvitation => {
            plain(ErrorCode::LinkInvalid, error).hint("an invitation begins with `clan://join/`: ask for one")
        }
        LinkError::Damaged => plain(ErrorCode::LinkInvalid, error)
            .why("characters are missing or changed")
            .hint("copy the whole link, in quotes: `clan join '…'`"),
        LinkError::NewerVersion(_) => plain(ErrorCode::LinkNewer, error).hint("update Clan"),
    }
}

pub(crate) fn words(error: &WordsError) -> ApiProblem {
    let problem = plain(ErrorCode::WordsInvalid, error);
    match error {
        WordsError::Unknown { nearest: Some(word), .. } => problem.hint(format!("did you mean `{word}`?")),
        WordsError::Unknown { nearest: None, .. } => problem.hint("ask for the words again, letter by letter"),
        WordsError::Count(_) => problem.hint("type all four, with blanks between them"),
    }
}

pub(crate) fn words_refusal(refusal: WordsRefusal) -> ApiProblem {
    const NEW_WORDS: &str = "ask for new words: `clan invite` gives them with every link";
    match refusal {
        WordsRefusal::NotOpen => plain(ErrorCode::WordsUnknown, &refusal)
            .why("no machine on this network announces their first word")
            .hint("the inviter's machine must run, and be on the same network as this computer")
            .hint("from another network, name a relay of its clan: `--relay HOST`")
            .hint("words are valid for ten minutes; after that, or from elsewhere, ask for the link"),
        WordsRefusal::Void => plain(ErrorCode::WordsVoid, &refusal).hint(NEW_WORDS),
        WordsRefusal::Used => plain(ErrorCode::WordsUsed, &refusal).hint(NEW_WORDS),
        WordsRefusal::Expired => plain(ErrorCode::WordsExpired, &refusal).hint(NEW_WORDS),
        WordsRefusal::Busy => {
            plain(ErrorCode::Unreachable, &refusal).hint("try again in a moment, or ask for the link")
        }
        WordsRefusal::Malformed => {
            plain(ErrorCode::Internal, &refusal).hint("it may run another version of Clan: ask for the link")
        }
    }
}

/// A relay does not say who waits for words.
pub(crate) fn words_relay(error: &clan_relay::words::AskError) -> ApiProblem {
    use clan_relay::words::AskError;
    let problem = plain(ErrorCode::Unreachable, error);
    match error {
        AskError::Busy => problem.hint("try again in a minute, or ask for the link"),
        AskError::Unreachable { .. } | AskError::NoRelay(_) => {
            problem.hint("compare the relay's place with what the inviter sees: `clan relay list`")
        }
    }
}

/// No machine has told the relay that it waits for words that begin so.
pub(crate) fn words_unknown_at(relay: &str) -> ApiProblem {
    plain(ErrorCode::WordsUnknown, &WordsRefusal::NotOpen)
        .why(format!("no machine has told the relay at {relay} of their first word"))
        .hint("the inviter's machine must run, and the relay must be one of its clan: `clan relay list` there")
        .hint("words are valid for ten minutes; after that, ask for new ones or for the link")
}

pub(crate) fn name(error: &NameError) -> ApiProblem {
    plain(ErrorCode::BadRequest, error)
}

pub(crate) fn refusal(refusal: &JoinRefusal) -> ApiProblem {
    match refusal {
        JoinRefusal::UnknownInvite => plain(ErrorCode::InviteUnknown, refusal).hint(ASK_AGAIN),
        JoinRefusal::Used => plain(ErrorCode::InviteUsed, refusal).hint(ASK_AGAIN),
        JoinRefusal::Expired => plain(ErrorCode::InviteExpired, refusal).hint(ASK_AGAIN),
        JoinRefusal::Revoked => plain(ErrorCode::InviteRevoked, refusal).hint("ask the person who invited you"),
        JoinRefusal::NameTaken { .. } => {
            plain(ErrorCode::NameTaken, refusal).hint("choose another with `--person` or `--machine`")
        }
        JoinRefusal::ClockAhead => {
            plain(ErrorCode::BadRequest, refusal).hint("set this computer's clock: `timedatectl set-ntp true`")
        }
        JoinRefusal::NotReady => plain(ErrorCode::Unreachable, refusal).hint("try again in a minute"),
        JoinRefusal::Pending => plain(ErrorCode::ApprovalPending, refusal).hint("an admin lets you in: `clan approve`"),
        JoinRefusal::Denied => plain(ErrorCode::AdmissionDenied, refusal).hint("ask the person who invited you"),
        JoinRefusal::Malformed => {
            plain(ErrorCode::Internal, refusal).hint("the clan's machines may run another version of Clan")
        }
    }
}

pub(crate) fn guest(error: &GuestError) -> ApiProblem {
    match error {
        GuestError::NotConnected { .. } => plain(ErrorCode::VmNotReady, error).hint("is it running? `clan vm list`"),
        GuestError::TimedOut { .. } => {
            plain(ErrorCode::TimedOut, error).hint("try again; a computer without hardware acceleration is slow")
        }
        GuestError::Channel(_) | GuestError::Message { .. } => {
            plain(ErrorCode::VmNotReady, error).hint("try again in a moment")
        }
        GuestError::Failed { .. } | GuestError::Unexpected { .. } => plain(ErrorCode::VmFailed, error),
        GuestError::Refused(reason) => refusal(reason),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// As the command line prints it.
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

    fn full() -> io::Error {
        io::Error::from(io::ErrorKind::StorageFull)
    }

    #[test]
    fn what_is_missing_is_named_with_the_command_that_installs_it() {
        insta::assert_snapshot!(told(&vm(&VmError::MissingQemu { package: "qemu-system-x86" })), @r"
        [missing_program] QEMU is not installed
        why: it runs the clan's virtual machine
        hint: install it: `sudo apt install qemu-system-x86`
        ");
        insta::assert_snapshot!(told(&build(&BuildError::MissingTool { tool: "mmdebstrap", package: "mmdebstrap" })), @r"
        [missing_program] `mmdebstrap` is not installed
        why: it builds the image
        hint: install it: `sudo apt install mmdebstrap`
        ");
    }

    #[test]
    fn a_full_disk_is_named_with_its_path_however_it_shows() {
        let path = PathBuf::from("/nowhere/clan/clan.json");
        let as_file = disk(&DiskError::Io { action: "write", path: path.clone(), source: full() });
        let as_vm = vm(&VmError::NoSpace {
            path: path.clone(),
            asked: ByteSize::from_mib(2048),
            available: ByteSize::from_mib(7),
        });
        let as_store = store(&StoreError::DiskFull(path.clone()));
        let as_build = build(&BuildError::Io { action: "write", path, source: full() });
        for problem in [&as_file, &as_vm, &as_store, &as_build] {
            assert_eq!(problem.code, ErrorCode::DiskFull, "{problem:?}");
            assert!(problem.hints[0].contains("/nowhere/clan/clan.json"), "{problem:?}");
        }
        assert!(as_vm.message.contains("2 GiB needed, 7 MiB free"), "{}", as_vm.message);
    }

    #[test]
    fn links_that_do_not_work_say_why_and_what_to_do() {
        insta::assert_snapshot!(told(&link(&LinkError::Damaged)), @r"
        [link_invalid] the invitation link is incomplete or damaged
        why: characters are missing or changed
        hint: copy the whole link, in quotes: `clan join '…'`
        ");
        insta::assert_snapshot!(told(&refusal(&JoinRefusal::Used)), @r"
        [invite_used] this invite has been used already
        hint: ask for a new link: `clan invite` makes one
        ");
        insta::assert_snapshot!(told(&refusal(&JoinRefusal::NameTaken { name: "bob".into() })), @r"
        [name_taken] the name `bob` is taken in this clan
        hint: choose another with `--person` or `--machine`
        ");
        insta::assert_snapshot!(told(&refusal(&JoinRefusal::ClockAhead)), @r"
        [bad_request] this computer's clock is ahead of the clan's by more than ten minutes
        hint: set this computer's clock: `timedatectl set-ntp true`
        ");
        insta::assert_snapshot!(told(&refusal(&JoinRefusal::Expired)), @r"
        [invite_expired] this invite has expired
        hint: ask for a new link: `clan invite` makes one
        ");
        insta::assert_snapshot!(told(&refusal(&JoinRefusal::UnknownInvite)), @r"
        [invite_unknown] the clan does not know this invite
        hint: ask for a new link: `clan invite` makes one
        ");
    }

    #[test]
    fn a_cancelled_build_is_a_cancelled_task_not_a_failure() {
        assert_eq!(build(&BuildError::Cancelled).code, ErrorCode::Cancelled);
    }
}
