//! The controller as a service of systemd.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
};

use super::{Args, Dns};
use crate::{
    error::CliError,
    printer::Printer,
    systemd::{self, executable, quoted},
};

const UNITS: &str = "/etc/systemd/system";
const ROOT: u32 = 0;

/// Prints the unit.
pub(super) fn print(args: &Args, printer: &Printer) -> Result<(), CliError> {
    text(args)?.lines().try_for_each(|line| printer.data(line))
}

/// Writes the unit, and starts it.
pub(super) fn install(args: &Args, printer: &Printer) -> Result<(), CliError> {
    needs_root("--install")?;
    let executable = executable()?;
    if let Some(open) = replaceable(&executable) {
        return Err(CliError::refused(
            "controller",
            "a service of root must not run a program that others can replace",
        )
        .why(format!("{} is not root's alone", open.display()))
        .hint(format!(
            "copy it first: `sudo install -m 755 {} /usr/local/bin/clan`, then use that one",
            executable.display()
        )));
    }
    let path = unit_path(args);
    fs::write(&path, text(args)?)
        .map_err(|e| CliError::refused("controller", format!("cannot write {}", path.display())).why(e))?;
    systemctl(&["daemon-reload"])?;
    systemctl(&["enable", &unit_name(args)])?;
    systemctl(&["restart", &unit_name(args)])?;
    printer.talk(&format!("{} runs, now and whenever this computer starts.", unit_name(args)));
    printer.talk(&format!("Found a clan with it:  clan create NAME --integrate{}", socket_flag(args)));
    printer.talk(&format!("Or join one:           clan join LINK --integrate{}", socket_flag(args)));
    Ok(())
}

/// Ends the service, and removes its unit.
pub(super) fn uninstall(args: &Args, printer: &Printer) -> Result<(), CliError> {
    needs_root("--uninstall")?;
    let path = unit_path(args);
    if !path.exists() {
        return Err(CliError::refused("not_found", format!("there is no service {}", unit_name(args)))
            .why(format!("{} is not there", path.display())));
    }
    systemctl(&["disable", "--now", &unit_name(args)])?;
    fs::remove_file(&path)
        .map_err(|e| CliError::refused("controller", format!("cannot remove {}", path.display())).why(e))?;
    systemctl(&["daemon-reload"])?;
    let state = args.state();
    let belongs = state.join("place.json").exists();
    printer.talk(&format!("{} is gone.", unit_name(args)));
    if belongs {
        printer.talk(&format!(
            "This computer is still a machine of a clan, by the keys in {}: `clan leave` first would have told the clan.",
            state.display()
        ));
    } else if state.exists() {
        printer.talk(&format!("Its folder stays: {}", state.display()));
    }
    Ok(())
}

/// Who may steer the controller.
pub(super) fn user(args: &Args) -> Result<u32, CliError> {
    if let Some(user) = &args.user {
        return look_up(user);
    }
    let own = rustix::process::getuid().as_raw();
    let caller = std::env::var("SUDO_UID").ok().and_then(|uid| uid.parse().ok());
    match (own, caller) {
        (ROOT, Some(caller)) => Ok(caller),
        (ROOT, None) => Err(CliError::refused("controller", "who may steer this controller?")
            .why("root started it, and not by sudo")
            .hint("name the user whose manager it obeys: `--user NAME`")),
        (own, _) => Ok(own),
    }
}

/// A user's number. `id` asks wherever this computer keeps its users.
fn look_up(user: &str) -> Result<u32, CliError> {
    if let Ok(number) = user.parse() {
        return Ok(number);
    }
    let output = Command::new("id").args(["-u", "--", user]).output();
    let number = output.ok().filter(|o| o.status.success()).and_then(|o| String::from_utf8(o.stdout).ok());
    number
        .and_then(|text| text.trim().parse().ok())
        .ok_or_else(|| CliError::refused("controller", format!("this computer has no user `{user}`")))
}

fn text(args: &Args) -> Result<String, CliError> {
    let executable = executable()?;
    let mut command = format!("{} controller --name {} --user {}", quoted(&executable)?, args.name, user(args)?);
    for (flag, path) in [("--socket", &args.socket), ("--state", &args.state)] {
        if let Some(path) = path {
            command.push_str(&format!(" {flag} {}", quoted(path)?));
        }
    }
    if let Some(port) = args.port {
        command.push_str(&format!(" --port {port}"));
    }
    if let Some(interface) = &args.interface {
        command.push_str(&format!(" --interface {interface}"));
    }
    if args.no_mdns {
        command.push_str(" --no-mdns");
    }
    // Where the system's files are shut off, there is no resolv.conf to change.
    let system = match args.dns {
        Dns::None => "full",
        Dns::Resolved => {
            command.push_str(" --dns resolved");
            "full"
        }
        Dns::ResolvConf => {
            command.push_str(" --dns resolv-conf");
            "true"
        }
    };
    let home = if executable.starts_with("/home") || executable.starts_with("/root") { "read-only" } else { "true" };
    let name = &args.name;
    Ok(format!(
        "[Unit]
Description=Clan controller: makes this computer a machine of a clan
After=network-online.target nss-lookup.target
Wants=network-online.target

[Service]
ExecStart={command}
Restart=on-failure
RestartSec=2
RuntimeDirectory=clan
RuntimeDirectoryPreserve=yes
StateDirectory=clan/{name}
StateDirectoryMode=0700
LimitNOFILE=65536
CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_BIND_SERVICE CAP_CHOWN CAP_SETUID CAP_SETGID CAP_KILL
NoNewPrivileges=yes
ProtectSystem={system}
ProtectHome={home}
PrivateTmp=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native

[Install]
WantedBy=multi-user.target
"
    ))
}

/// The part of a path that somebody who is not root may replace.
fn replaceable(path: &Path) -> Option<PathBuf> {
    let open = |path: &&Path| {
        fs::metadata(path).map_or(true, |found| {
            // In a folder with the sticky bit, such as /tmp, nobody replaces what is root's.
            let others = found.mode() & 0o022 != 0 && found.mode() & 0o1000 == 0;
            found.uid() != ROOT || others
        })
    };
    path.ancestors().find(open).map(Path::to_owned)
}

fn unit_name(args: &Args) -> String {
    if args.name == "controller" {
        "clan-controller.service".into()
    } else {
        format!("clan-controller-{}.service", args.name)
    }
}

fn unit_path(args: &Args) -> PathBuf {
    Path::new(UNITS).join(unit_name(args))
}

fn socket_flag(args: &Args) -> String {
    match &args.socket {
        Some(socket) => format!(" --socket {}", socket.display()),
        None if args.name == "controller" => String::new(),
        None => format!(" --socket /run/clan/{}.sock", args.name),
    }
}

fn needs_root(flag: &str) -> Result<(), CliError> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(CliError::refused("permission_denied", "only root can install services")
        .hint(format!("`sudo clan controller {flag}`"))
        .hint("or run it in the foreground: `clan controller --help`"))
}

fn systemctl(arguments: &[&str]) -> Result<(), CliError> {
    let instead =
        "run the controller in the foreground, or by what this computer has instead: `clan controller --help`";
    systemd::systemctl(arguments, instead)
}
