//! The manager as a service of the user, and as what the desktop opens invitations with.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::Args;
use crate::{
    args::Global,
    context::data_dir,
    error::CliError,
    printer::Printer,
    systemd::{self, executable, quoted, setting},
};

const SOCKET: &str = "clan-manager.socket";
const SERVICE: &str = "clan-manager.service";
const HANDLER: &str = "clan-open.desktop";
/// For systemd to say what it is about.
#[cfg(feature = "manager")]
const JOBS_LIMIT: std::time::Duration = std::time::Duration::from_secs(5);
const SCHEME: &str = "x-scheme-handler/clan";

/// Writes the units and the desktop's entry, and starts the manager.
pub(super) fn install(args: &Args, global: &Global, printer: &Printer) -> Result<(), CliError> {
    let places = Places::find()?;
    let data = std::path::absolute(data_dir(global)?)
        .map_err(|e| CliError::refused("service", "that is no path of a data folder").why(e))?;
    // Where systemd does not answer, nothing is left behind.
    systemctl(&["daemon-reload"])?;
    write(&places.units.join(SOCKET), &socket(args, &data)?)?;
    write(&places.units.join(SERVICE), &service(args, global, &data)?)?;
    write(&places.applications.join(HANDLER), &handler(global, &data)?)?;
    systemctl(&["daemon-reload"])?;
    systemctl(&["enable", "--now", SOCKET])?;
    systemctl(&["enable", "--now", SERVICE])?;
    let opens = desktop("xdg-mime", &["default", HANDLER, SCHEME]);
    let _ = desktop("update-desktop-database", &[&places.applications.display().to_string()]);
    printer.talk("The manager runs, and starts whenever you log in.");
    printer.talk("To have it, and your virtual machines, without you logged in: loginctl enable-linger");
    printer.talk(if opens {
        "A click on an invitation opens it."
    } else {
        "Clicks on invitations are not opened by it: this computer has no desktop that could be told (xdg-mime)."
    });
    Ok(())
}

/// Ends the manager, and removes what `install` wrote. Clans stay.
pub(super) fn uninstall(printer: &Printer) -> Result<(), CliError> {
    let places = Places::find()?;
    let written = [places.units.join(SOCKET), places.units.join(SERVICE), places.applications.join(HANDLER)];
    if !written.iter().any(|path| path.exists()) {
        return Err(CliError::refused("not_found", "there is no service of the manager")
            .why(format!("{} is not there", written[1].display())));
    }
    // Where systemd does not answer, it runs nothing either. Half of it may have been removed by hand.
    let runs = systemctl(&["daemon-reload"]).is_ok();
    for unit in [SOCKET, SERVICE].into_iter().filter(|unit| runs && places.units.join(unit).exists()) {
        systemctl(&["disable", "--now", unit])?;
    }
    for path in &written {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(CliError::refused("service", format!("cannot remove {}", path.display())).why(error));
            }
            _ => {}
        }
    }
    if runs {
        systemctl(&["daemon-reload"])?;
    }
    let _ = desktop("update-desktop-database", &[&places.applications.display().to_string()]);
    printer.talk("The manager is stopped, and its service is gone. Your clans stay where they are.");
    Ok(())
}

/// Prints both units.
pub(super) fn print(args: &Args, global: &Global, printer: &Printer) -> Result<(), CliError> {
    let data = data_dir(global)?;
    for (name, text) in [(SOCKET, socket(args, &data)?), (SERVICE, service(args, global, &data)?)] {
        printer.data(&format!("# {name}"))?;
        text.lines().try_for_each(|line| printer.data(line))?;
    }
    Ok(())
}

/// Whether this is the service, which its systemd stops to start it again at once.
#[cfg(feature = "manager")]
pub(super) async fn restarts() -> bool {
    // systemd.exec(5): older ones than 248 do not tell, and then the virtual machines are stopped and started.
    let is_service = env::var("SYSTEMD_EXEC_PID").is_ok_and(|pid| pid == std::process::id().to_string());
    if !is_service {
        return false;
    }
    let mut command = tokio::process::Command::new("systemctl");
    command.args(["--user", "list-jobs", "--plain", "--no-legend", "--no-pager"]).stdin(Stdio::null());
    match tokio::time::timeout(JOBS_LIMIT, command.kill_on_drop(true).output()).await {
        Ok(Ok(output)) => is_restarted(&String::from_utf8_lossy(&output.stdout)),
        _ => false,
    }
}

/// Whether the service is being restarted, by systemd's list of jobs: number, unit, type, state.
#[cfg(feature = "manager")]
fn is_restarted(jobs: &str) -> bool {
    jobs.lines().any(|line| {
        let mut words = line.split_whitespace().skip(1);
        words.next() == Some(SERVICE) && words.next().is_some_and(|kind| kind.ends_with("restart"))
    })
}

/// Of the XDG base directory specification.
struct Places {
    units: PathBuf,
    applications: PathBuf,
}

impl Places {
    fn find() -> Result<Self, CliError> {
        let place = |variable: &str, below: &str| {
            let given = env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
            given.or_else(|| Some(PathBuf::from(env::var_os("HOME").filter(|h| !h.is_empty())?).join(below)))
        };
        let (config, data) = (place("XDG_CONFIG_HOME", ".config"), place("XDG_DATA_HOME", ".local/share"));
        let (Some(config), Some(data)) = (config, data) else {
            return Err(CliError::refused("service", "you have no home folder").why("$HOME is not set"));
        };
        Ok(Self { units: config.join("systemd/user"), applications: data.join("applications") })
    }
}

fn socket(args: &Args, data: &Path) -> Result<String, CliError> {
    Ok(format!(
        "[Unit]
Description=Clan manager, for the command line and the browser

[Socket]
ListenStream={}
SocketMode=0600
DirectoryMode=0700
ListenStream={}

[Install]
WantedBy=sockets.target
",
        setting(&data.join("run/manager.sock"))?,
        args.listen
    ))
}

fn service(args: &Args, global: &Global, data: &Path) -> Result<String, CliError> {
    let mut command = quoted(&executable()?)?;
    if global.data.is_some() {
        command.push_str(&format!(" --data {}", quoted(data)?));
    }
    command.push_str(" manager");
    if let Some(mirror) = &args.mirror {
        command.push_str(&format!(" --mirror {}", quoted(Path::new(mirror))?));
    }
    if let Some(agent) = &args.agent {
        command.push_str(&format!(" --agent {}", quoted(agent)?));
    }
    if args.keep_vms {
        command.push_str(" --keep-vms");
    }
    if let Some(memory) = args.vm_memory {
        command.push_str(&format!(" --vm-memory {}M", memory.as_mib()));
    }
    // The virtual machines outlive a manager that died; one that is told to stop stops them itself, but for a restart. Their
    // control groups are beside the service's own: what is delegated is enabled there, too, for as long as it runs.
    Ok(format!(
        "[Unit]
Description=Clan manager: your clans and their virtual machines
Requires={SOCKET}
After={SOCKET}

[Service]
ExecStart={command}
Restart=on-failure
RestartSec=2
KillMode=process
Delegate=cpu memory pids
TimeoutStopSec=120

[Install]
WantedBy=default.target
"
    ))
}

/// What the desktop runs on a click (freedesktop.org's Desktop Entry Specification).
fn handler(global: &Global, data: &Path) -> Result<String, CliError> {
    let word = |path: &Path| {
        // Inside quotes these four are escaped, and a percent sign is doubled.
        let mut text = String::new();
        for c in quoted(path)?.trim_matches('"').replace("$$", "$").chars() {
            if matches!(c, '`' | '$') {
                text.push_str("\\\\");
            }
            text.push(c);
        }
        Ok::<_, CliError>(format!("\"{text}\""))
    };
    let folder = if global.data.is_some() { format!(" --data {}", word(data)?) } else { String::new() };
    Ok(format!(
        "[Desktop Entry]
Type=Application
Name=Clan
Comment=Opens invitations to clans
Exec={}{folder} open %u
Terminal=false
NoDisplay=true
MimeType={SCHEME};
",
        word(&executable()?)?
    ))
}

fn write(path: &Path, text: &str) -> Result<(), CliError> {
    let failed = |e: io::Error| CliError::refused("service", format!("cannot write {}", path.display())).why(e);
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    fs::write(path, text).map_err(failed)
}

fn systemctl(arguments: &[&str]) -> Result<(), CliError> {
    let all: Vec<&str> = ["--user"].iter().chain(arguments).copied().collect();
    systemd::systemctl(&all, "run the manager in the foreground: `clan manager`")
}

/// Whether the desktop could be told.
fn desktop(program: &str, arguments: &[&str]) -> bool {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

#[cfg(all(test, feature = "manager"))]
mod tests {
    use super::*;

    #[test]
    fn a_restart_is_told_from_a_stop() {
        let of = |kind: &str| format!("41 clan-manager.service {kind} running\n42 other.service restart waiting\n");
        for (kind, restarted) in [("restart", true), ("try-restart", true), ("stop", false), ("start", false)] {
            assert_eq!(is_restarted(&of(kind)), restarted, "{kind}");
        }
        assert!(!is_restarted("7 clan-manager.socket restart waiting\n"));
        assert!(!is_restarted("No jobs running.\n"));
    }
}
