//! `clan create`: founds a clan.

use std::path::PathBuf;

use clan_api::{CreateClan, CreatedClan, Flavour};
use clan_types::{ByteSize, ClanName, ControlMode, MachineName, PersonName};

use crate::{
    commands::{device, join::names, passphrase::Encrypt},
    context::Context,
    error::CliError,
    printer::Tone,
    progress,
};

/// Arguments of `clan create`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  clan create family --person anna --machine laptop --memory 1G
  clan create family --encrypt          with an encrypted disk, which opens by a passphrase
  clan create family --container        without a virtual machine: a container, which needs less of a computer
  clan create family --integrate        this computer itself, without a virtual machine: see `clan controller --help`")]
pub(crate) struct Args {
    /// Name of the clan: a-z, 0-9 and inner hyphens
    name: ClanName,
    /// Your name in it [default: your login name]
    #[arg(long)]
    person: Option<PersonName>,
    /// This computer's name in it [default: its host name]
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

/// Who may steer this computer's machine.
#[derive(Debug, Default, Clone, Copy, clap::Args)]
pub(crate) struct Control {
    /// Who may steer this computer's machine: local (you), remote (the clan's admins) or shared (both) [default: local]
    #[arg(long, value_name = "MODE")]
    control: Option<ControlMode>,
}

impl Control {
    /// The mode, if one was named.
    pub(crate) fn mode(self) -> Option<clan_api::ControlMode> {
        self.control.map(Into::into)
    }

    /// What it gives others, if it gives them anything.
    pub(crate) fn warning(mode: clan_api::ControlMode, machine: Flavour) -> Option<String> {
        if mode == clan_api::ControlMode::Local {
            return None;
        }
        let what = match machine {
            Flavour::Vm => "as root in the virtual machine",
            Flavour::Container => "as root in the container",
            Flavour::Integrated => "on this computer, with the rights of your account here",
        };
        Some(format!(
            "The clan's admins will be able to open a terminal {what}, change its settings and see its log; \
             all is written down, and `clan vm control local` ends it."
        ))
    }
}

/// What the machine will be, where it is asked for so.
pub(crate) fn flavour(integrated: bool, container: bool) -> Flavour {
    match (integrated, container) {
        (true, _) => Flavour::Integrated,
        (false, true) => Flavour::Container,
        (false, false) => Flavour::Vm,
    }
}

/// Whether a container is to be the machine.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Contain {
    /// Make the clan's machine a container instead of a virtual one: for weak computers, as it shares this one's kernel,
    /// and keeps less apart
    #[arg(long, conflicts_with_all = ["integrate", "disk"])]
    pub(crate) container: bool,
}

/// Whether this computer itself is to be the machine.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Integrate {
    /// Make this computer itself the clan's machine, by the controller that runs on it, instead of a virtual one
    #[arg(long, conflicts_with_all = ["memory", "disk", "cpus"])]
    integrate: bool,
    /// Where that controller listens
    #[arg(long, value_name = "FILE", requires = "integrate", default_value = "/run/clan/controller.sock")]
    socket: PathBuf,
}

impl Integrate {
    /// The controller's socket, if the computer itself is to be the machine.
    pub(crate) fn controller(&self) -> Result<Option<String>, CliError> {
        if !self.integrate {
            return Ok(None);
        }
        let wrong = |why: &str| CliError::refused("socket", "that is no path of a controller's socket").why(why);
        // The manager has another working folder.
        let path = std::path::absolute(&self.socket).map_err(|e| wrong(&e.to_string()))?;
        path.into_os_string().into_string().map(Some).map_err(|_| wrong("it is not Unicode"))
    }
}

/// How large the virtual machine is.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Size {
    /// Memory of the virtual machine, or the most that the container takes, such as 512M or 2G
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<ByteSize>,
    /// Largest size of its disk; it takes room only as it fills
    #[arg(long, value_name = "SIZE")]
    pub(crate) disk: Option<ByteSize>,
    /// Processors of the virtual machine, or of the container
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub(crate) cpus: Option<u32>,
}

/// Founds the clan and waits until its machine runs.
pub(crate) async fn run(args: Args, context: &Context) -> Result<(), CliError> {
    let person = names::person(args.person, &[])?;
    let machine = names::machine(args.machine, &[])?;
    let Size { memory, disk, cpus } = args.size;
    let (integrate, control) = (args.integrate.controller()?, args.control.mode());
    let printer = &context.printer;
    if let Some(warning) =
        control.and_then(|mode| Control::warning(mode, flavour(integrate.is_some(), args.contain.container)))
    {
        printer.talk(&format!("{} {warning}", printer.err_style(Tone::Warn, "warning:")));
    }
    // A phrase that nobody reads would be a key that nobody has.
    let recovery = printer.is_json() || printer.stderr_is_terminal();
    let container = args.contain.container;
    let passphrase = args.encrypt.passphrase(context)?;
    let request = CreateClan {
        name: args.name,
        person,
        machine,
        memory,
        disk,
        cpus,
        integrate,
        control,
        container,
        passphrase,
        recovery,
    };
    let CreatedClan { task, recovery_phrase } = context.ask(context.client.create_clan(&request)).await?;
    let followed = progress::follow(context, task).await;
    if printer.is_json() {
        return printer.json(&CreatedClan { task: followed?, recovery_phrase });
    }
    // Even where it failed: a manager that goes on later does not know the phrase any more.
    if let Some(phrase) = &recovery_phrase {
        device::explain_phrase(printer);
        printer.talk("");
        printer.talk(&format!("    {phrase}"));
        printer.talk("");
    }
    followed?;
    printer.talk(&format!(
        "{} is founded; {} is its first machine.",
        printer.err_style(Tone::Strong, request.name.as_str()),
        request.machine
    ));
    if recovery_phrase.is_none() {
        printer.talk(&format!("For a recovery phrase: clan device add {} --recovery", request.name));
    }
    printer.talk(&format!("Invite somebody:  clan invite {}", request.name));
    printer.talk("See what it does: clan web");
    Ok(())
}

#[cfg(test)]
mod tests {
    use clan_api::ControlMode;

    use super::*;

    #[test]
    fn whoever_lets_admins_in_is_told_what_they_let_them_into() {
        let told =
            |integrated, container| Control::warning(ControlMode::Shared, flavour(integrated, container)).unwrap();
        assert!(told(false, false).contains("root in the virtual machine"));
        assert!(told(false, true).contains("root in the container"));
        assert!(told(true, false).contains("rights of your account"));
        assert_eq!(Control::warning(ControlMode::Local, Flavour::Container), None);
    }
}
