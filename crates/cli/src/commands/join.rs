//! `clan join`: shows where a link leads, asks, and goes there.

use clan_api::{Agreed, FindInvitation, JoinClan, JoinPreview, PreviewJoin, VmPlan};
use clan_types::{ClanName, MachineName, PersonName};

use crate::{
    commands::{
        create::{Contain, Control, Integrate, Size, flavour},
        passphrase::Encrypt,
    },
    context::Context,
    error::CliError,
    invitation::{self, Given},
    printer::{Printer, Tone, harmless},
    progress, table, words,
};

/// Arguments of `clan join`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The invitation is a link in quotes, four words, or a PNG or JPEG picture of the link's QR code. Four words find the
inviter's machine on the same network; from elsewhere they do if you name a relay of the clan, too.
Other users of this computer can see what you type on the command line while it runs; without INVITATION, or with
`-`, it is read from stdin instead.")]
pub(crate) struct Args {
    /// The invitation: clan://join/…, four words, or a picture
    invitation: Vec<String>,
    /// Your name in the clan [default: your login name]
    #[arg(long)]
    person: Option<PersonName>,
    #[command(flatten)]
    place: Place,
    /// For words from another network: a relay of the clan, as the inviter sees it [port: 443]
    #[arg(long, value_name = "HOST[:PORT]")]
    relay: Option<String>,
    /// Only show where the link leads
    #[arg(long)]
    dry_run: bool,
}

impl Args {
    /// An invitation, and everything else as it is by itself.
    pub(crate) fn of(invitation: String) -> Self {
        Self { invitation: vec![invitation], person: None, place: Place::default(), relay: None, dry_run: false }
    }
}

/// What this computer will be in the clan.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Place {
    /// This computer's name in the clan [default: its host name]
    #[arg(long)]
    machine: Option<MachineName>,
    #[command(flatten)]
    size: Size,
    #[command(flatten)]
    integrate: Integrate,
    #[command(flatten)]
    control: Control,
    #[command(flatten)]
    contain: Contain,
    #[command(flatten)]
    encrypt: Encrypt,
}

/// Joins and waits until this computer's machine is in the clan.
pub(crate) async fn run(args: Args, context: &Context) -> Result<(), CliError> {
    let printer = &context.printer;
    let (link, by_words) = match invitation::given(&args.invitation, printer)? {
        Given::Link(_) if args.relay.is_some() => {
            return Err(CliError::refused("usage", "a relay is named along with words only")
                .why("a link names the relays of its clan itself")
                .hint("leave `--relay` out"));
        }
        Given::Link(link) => (link.to_string(), false),
        Given::Words(words) => {
            let request = FindInvitation { text: words.to_string(), relay: args.relay.clone() };
            let waiting = match &request.relay {
                None => "Looking for the inviter's machine on this network…",
                Some(_) => "Looking for the inviter's machine at the relay…",
            };
            let found = context.ask(context.client.find_invitation(&request));
            (progress::waiting(printer, waiting, found).await?.link, true)
        }
    };
    let outcome = go(args.person, args.place, args.dry_run, &link, context).await;
    // The words are used up, whatever became of it.
    let again = || format!("clan join '{link}'");
    match outcome {
        Ok(None) if by_words => {
            printer.talk(&format!("The words are used up now; to join: {}", again()));
            Ok(())
        }
        Err(error) if by_words => Err(error.hint(format!("the words are used up; to try again: {}", again()))),
        other => other.map(drop),
    }
}

/// Makes this computer a device by a link that was found otherwise. Gives the clan, if it came to that.
pub(crate) async fn accept(
    place: Place,
    dry_run: bool,
    link: &str,
    context: &Context,
) -> Result<Option<ClanName>, CliError> {
    go(None, place, dry_run, link, context).await
}

/// Gives the clan that this computer is in now; `None` if it was only looked at.
async fn go(
    person: Option<PersonName>,
    place: Place,
    dry_run: bool,
    link: &str,
    context: &Context,
) -> Result<Option<ClanName>, CliError> {
    let printer = &context.printer;
    let Place { machine, size, integrate, control, contain: Contain { container }, encrypt } = place;
    let integrate = integrate.controller()?;
    let question = PreviewJoin {
        link: link.to_owned(),
        integrate: integrate.clone(),
        container,
        memory: size.memory,
        disk: size.disk,
        cpus: size.cpus,
    };
    let mut preview =
        progress::waiting(printer, "Asking the clan…", context.ask(context.client.preview_join(&question))).await?;
    // INVARIANT: what is shown and agreed to is what is asked for.
    let mode = control.mode().unwrap_or(preview.control_mode);
    preview.control_mode = mode;
    preview.warnings.extend(Control::warning(mode, flavour(preview.integrated.is_some(), container)));
    if dry_run {
        if printer.is_json() {
            printer.json(&preview)?;
        } else {
            facts(&preview).iter().try_for_each(|l| printer.data(l))?;
        }
        return Ok(None);
    }
    let person = match &preview.device_of {
        Some(device_of) => device_of.clone(),
        None => names::person(person, &preview.people)?,
    };
    let machine = names::machine(machine, &preview.machines)?;
    if !printer.is_json() || context.will_ask() {
        show(&preview, printer);
    }
    let question = match &preview.device_of {
        Some(_) => format!("Make this computer one of {person}'s devices in {}, as {machine}?", preview.clan_name),
        None => format!("Join {} as {person}, with this computer as {machine}?", preview.clan_name),
    };
    context.confirm(&question, "join without being asked; `--dry-run` shows where the link leads")?;
    // What an admin publishes while the person reads is not what they agree to.
    let (size, agreed) = agreed(&preview, size);
    let Size { memory, disk, cpus } = size;
    let control = Some(mode);
    let (link, passphrase) = (link.to_owned(), encrypt.passphrase(context)?);
    let request =
        JoinClan { link, person, machine, memory, disk, cpus, integrate, control, container, agreed, passphrase };
    let task = context.ask(context.client.join(&request)).await?;
    let task = progress::follow(context, task).await?;
    if printer.is_json() {
        return printer.json(&task).map(|()| Some(preview.clan_name));
    }
    printer.talk(&format!(
        "{} is now a machine of {}.",
        request.machine,
        printer.err_style(Tone::Strong, preview.clan_name.as_str())
    ));
    printer.talk(&format!("See what it offers: clan service list {}", preview.clan_name));
    Ok(Some(preview.clan_name))
}

/// What was shown, so that it is what is asked for.
fn agreed(preview: &JoinPreview, size: Size) -> (Size, Option<Agreed>) {
    let size = match &preview.vm {
        Some(vm) => Size { memory: Some(vm.memory), disk: Some(vm.disk), cpus: Some(vm.cpus) },
        None => size,
    };
    let image = preview.vm.as_ref().map(|vm| vm.image).or(preview.container.as_ref().map(|c| c.image));
    let agreed = image.map(|image| Agreed {
        image,
        network_layer: preview.network_layer.clone(),
        applications: preview.applications.clone(),
    });
    (size, agreed)
}

fn show(preview: &JoinPreview, printer: &Printer) {
    let clan = printer.err_style(Tone::Strong, preview.clan_name.as_str());
    printer.talk(&match &preview.device_of {
        Some(person) => format!("This makes this computer one of {person}'s devices in the clan {clan}."),
        None => format!("{} invites you to the clan {clan}.", preview.inviter),
    });
    printer.talk("");
    for line in facts(preview) {
        printer.talk(&line);
    }
    printer.talk("");
    for warning in &preview.warnings {
        printer.talk(&format!("{} {}", printer.err_style(Tone::Warn, "warning:"), harmless(warning)));
    }
    printer.talk(match (&preview.integrated, &preview.container) {
        (None, None) => {
            "Compare the fingerprint with what the inviter sees. The virtual machine has no access to your files."
        }
        (None, Some(_)) => "Compare the fingerprint with what the inviter sees. The container is not shown your files.",
        (Some(_), _) => {
            "Compare the fingerprint with what the inviter sees. This computer itself will be in the clan's network."
        }
    });
}

fn facts(preview: &JoinPreview) -> Vec<String> {
    let mut facts = vec![
        ("Clan", preview.clan_name.to_string()),
        ("Fingerprint", preview.fingerprint.clone()),
        (if preview.device_of.is_some() { "Device of" } else { "Invited by" }, preview.inviter.to_string()),
        ("Your role", preview.role.to_string()),
        ("Expires", format!("in {}", words::span(preview.expires.since(words::now())))),
        (
            "Members",
            format!("{}, {}", words::people(preview.people.len()), words::count(preview.machines.len(), "machine")),
        ),
    ];
    if let Some(vm) = &preview.vm {
        vm_facts(vm, &mut facts);
    }
    if let Some(container) = &preview.container {
        facts.extend([
            ("Will run", format!("a container: {}", container.image_title)),
            ("Image", container.image.short()),
            ("Apart", "less than a virtual machine: it shares this computer's kernel".to_owned()),
            (
                "Takes",
                format!(
                    "at most {} of memory, {}, where that can be bounded",
                    container.memory,
                    words::count(container.cpus as usize, "processor")
                ),
            ),
            (
                "Disk",
                format!(
                    "the image's {}, some {} to unpack it, and what it writes",
                    container.download.total, container.unpacked
                ),
            ),
            ("Download", words::download(&container.download)),
        ]);
        if let Some(problem) = &container.problem {
            let why = problem.why.as_deref().unwrap_or(&problem.message);
            let hint = problem.hints.first().map_or_else(String::new, |hint| format!("; {hint}"));
            facts.push(("Not now", format!("{why}{hint}")));
        }
    }
    if let Some(integrated) = &preview.integrated {
        facts.push(("Will run", "no virtual machine: this computer itself becomes the clan's machine".to_owned()));
        let state = match &integrated.problem {
            None => "it runs, and is free".to_owned(),
            Some(problem) => match problem.hints.first() {
                Some(hint) => format!("{}; {hint}", problem.message),
                None => problem.message.clone(),
            },
        };
        facts.push(("Controller", format!("{}: {state}", integrated.socket)));
    }
    if preview.integrated.is_none() {
        facts.push(("Applications", words::applications(&preview.applications)));
    }
    facts.push(("Network", words::network(&preview.network_layer)));
    facts.push(("Control", words::control_mode(preview.control_mode).to_owned()));
    if let Some(vm) = &preview.vm {
        let accelerator = &vm.accelerator;
        facts.push(("Runs by", format!("{}: {}", words::accelerator(accelerator.kind), accelerator.reason)));
    }
    table::facts(&facts)
}

fn vm_facts(vm: &VmPlan, facts: &mut Vec<(&'static str, String)>) {
    facts.extend([
        ("Will run", format!("a virtual machine: {}", vm.image_title)),
        ("Image", vm.image.short()),
        ("Memory", vm.memory.to_string()),
        ("Disk", format!("up to {}, beside the image's {}", vm.disk, vm.download.total)),
        ("Processors", vm.cpus.to_string()),
        ("Download", words::download(&vm.download)),
    ]);
}

/// Names to take where none was given.
pub(crate) mod names {
    use clan_types::{MachineName, PersonName};

    use crate::{error::CliError, words};

    /// The person's name: as given, else their login name.
    pub(crate) fn person(given: Option<PersonName>, taken: &[PersonName]) -> Result<PersonName, CliError> {
        if let Some(name) = given {
            return if taken.contains(&name) { Err(is_taken("person", name.as_str())) } else { Ok(name) };
        }
        let login = ["USER", "LOGNAME"].iter().find_map(|v| std::env::var(v).ok()).as_deref().and_then(words::label);
        let name = words::free_name(login.as_deref().unwrap_or("me"), |n| taken.iter().any(|t| t.as_str() == n));
        name.parse().map_err(|e| {
            CliError::refused("name", "your login name is no usable name").why(e).hint("give one: `--person NAME`")
        })
    }

    /// The machine's name: as given, else the host name.
    pub(crate) fn machine(given: Option<MachineName>, taken: &[MachineName]) -> Result<MachineName, CliError> {
        if let Some(name) = given {
            return if taken.contains(&name) { Err(is_taken("machine", name.as_str())) } else { Ok(name) };
        }
        let host = rustix::system::uname().nodename().to_str().ok().and_then(words::label);
        let name = words::free_name(host.as_deref().unwrap_or("computer"), |n| taken.iter().any(|t| t.as_str() == n));
        name.parse().map_err(|e| {
            CliError::refused("name", "this computer's host name is no usable name")
                .why(e)
                .hint("give one: `--machine NAME`")
        })
    }

    fn is_taken(kind: &str, name: &str) -> CliError {
        CliError::refused("name_taken", format!("the clan has a {kind} named {name} already"))
            .hint(format!("choose another name: `--{kind} NAME`"))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_name_that_was_asked_for_is_never_changed() {
            let taken: Vec<MachineName> = vec!["laptop".parse().unwrap()];
            assert!(machine(Some("laptop".parse().unwrap()), &taken).is_err());
            assert_eq!(machine(Some("desk".parse().unwrap()), &taken).unwrap().as_str(), "desk");
        }
    }
}
