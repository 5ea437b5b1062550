//! A clan of two computers, founded and joined by the real commands: what people run.

use std::{
    net::{IpAddr, Ipv6Addr},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{
    candidates::Network,
    site::{Daemon, Site},
};
use crate::{LabError, net::typed, story::link_in};

const WITHIN: Duration = Duration::from_secs(20);
const NAMES: [&str; 2] = ["one", "two"];

/// The executable: beside this one.
pub(super) fn program() -> PathBuf {
    std::env::current_exe().unwrap_or_default().with_file_name("clan")
}

/// Founds a clan on computer 0 and lets computer 1 in.
pub(super) fn start(site: &Site) -> Result<Network, LabError> {
    let mut daemons = Vec::new();
    for end in [0, 1] {
        let folder = site.scratch(end)?;
        let mut controller = command(site, end)?;
        controller.args(["controller", "--user", "root", "--socket"]).arg(socket(&folder));
        controller.arg("--state").arg(folder.join("state"));
        daemons.push(Daemon::start(controller, &folder.join("controller.log"))?);
        let mut manager = command(site, end)?;
        manager.arg("manager");
        daemons.push(Daemon::start(manager, &folder.join("manager.log"))?);
        listens(&socket(&folder))?;
        listens(&folder.join("data/run/manager.sock"))?;
    }
    let found = ["create", "bench", "--person", NAMES[0], "--machine", NAMES[0], "--integrate", "--socket"];
    run(command(site, 0)?.args(found).arg(socket(&site.scratch(0)?)), "")?;
    let rule = ["rule", "add", "measured", "--from", "everybody", "--to", "everybody"];
    run(command(site, 0)?.args(rule).args(["--ports", "tcp/5201", "--ports", "udp/5201"]), "")?;
    let link = link_in(&run(command(site, 0)?.arg("invite"), "")?)?;
    let join = ["join", "--yes", "--person", NAMES[1], "--machine", NAMES[1], "--integrate", "--socket"];
    run(command(site, 1)?.args(join).arg(socket(&site.scratch(1)?)), &format!("{link}\n"))?;

    let other = || -> Result<Option<IpAddr>, LabError> {
        let machines = run(command(site, 0)?.args(["machines", "--json"]), "")?;
        let machines: Value = serde_json::from_str(&machines).unwrap_or_default();
        let other = machines.as_array().into_iter().flatten().find(|machine| machine["name"] == NAMES[1]);
        // What is carried in QUIC is not what is to be measured.
        let met = other.filter(|machine| machine["path"]["kind"] == "direct");
        Ok(met.and_then(|machine| machine["address"].as_str()?.parse::<Ipv6Addr>().ok()).map(IpAddr::from))
    };
    let began = Instant::now();
    loop {
        if let Some(target) = other()? {
            return Ok(Network { daemons, target });
        }
        if began.elapsed() > WITHIN {
            return Err(LabError::InVain { what: "the two machines meeting directly".into(), limit: WITHIN });
        }
        thread::sleep(Duration::from_millis(200));
    }
}

fn socket(folder: &Path) -> PathBuf {
    folder.join("run/controller.sock")
}

fn command(site: &Site, end: usize) -> Result<Command, LabError> {
    let folder = site.scratch(end)?;
    let mut command = site.command(end, program())?;
    command.env("CLAN_DATA", folder.join("data")).env("HOME", folder).env("NO_COLOR", "1");
    Ok(command)
}

fn listens(socket: &Path) -> Result<(), LabError> {
    let began = Instant::now();
    while UnixStream::connect(socket).is_err() {
        if began.elapsed() > WITHIN {
            return Err(LabError::InVain { what: format!("{} being listened on", socket.display()), limit: WITHIN });
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Runs a command with something typed into it; what it printed, if it succeeded.
fn run(command: &mut Command, input: &str) -> Result<String, LabError> {
    let output = command.stdin(typed(input)?).output().map_err(LabError::io("run clan"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(stdout);
    }
    let said = stdout + &String::from_utf8_lossy(&output.stderr);
    Err(LabError::Command { command: "clan".into(), status: output.status.to_string(), output: said })
}
