//! The networks: the bare cable, ours, and what Debian packages.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{IpAddr, Ipv4Addr},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use super::{
    EndConfig, clan,
    end::{self, ends},
    site::{CABLE, Daemon, Site, finished},
};
use crate::LabError;

/// The addresses inside networks that let one choose.
const INSIDE: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 77, 0, 1), Ipv4Addr::new(10, 77, 0, 2)];
/// Both computers.
const ENDS: [usize; 2] = [0, 1];
const PORT: u16 = 51820;
/// What `wg-quick` sets on a path of 1500 bytes, and wireguard-go by default.
const WIREGUARD_MTU: u16 = 1420;

/// A network over the cable. It ends when this is dropped.
pub(super) struct Network {
    pub(super) daemons: Vec<Daemon>,
    /// Computer 1, as computer 0 reaches it.
    pub(super) target: IpAddr,
}

pub(super) struct Candidate {
    pub(super) name: &'static str,
    kind: Kind,
    /// The package's unpacked tree.
    root: PathBuf,
}

enum Kind {
    Cable,
    /// Two integrated computers, as people run them.
    Clan,
    /// The data plane alone, with access rules or without any: what they cost, and what the rest does.
    Engine {
        rules: bool,
    },
    WireguardGo,
    Nebula,
    Tinc,
    Yggdrasil,
}

/// Everything that can be measured; rivals in the versions of Debian stable and unstable.
pub(super) fn all(rivals: &Path) -> Vec<Candidate> {
    let (stable, unstable) = (rivals.join("stable"), rivals.join("unstable"));
    let of = |name, kind, root: &Path| Candidate { name, kind, root: root.to_owned() };
    vec![
        of("cable", Kind::Cable, &stable),
        of("clan", Kind::Clan, &stable),
        of("engine", Kind::Engine { rules: true }, &stable),
        of("engine-no-rules", Kind::Engine { rules: false }, &stable),
        of("wireguard-go", Kind::WireguardGo, &unstable),
        of("wireguard-go-stable", Kind::WireguardGo, &stable),
        of("nebula", Kind::Nebula, &unstable),
        of("nebula-stable", Kind::Nebula, &stable),
        of("tinc-stable", Kind::Tinc, &stable),
        of("yggdrasil", Kind::Yggdrasil, &unstable),
        of("yggdrasil-stable", Kind::Yggdrasil, &stable),
    ]
}

impl Candidate {
    fn program(&self) -> Option<PathBuf> {
        match self.kind {
            Kind::Cable | Kind::Engine { .. } => None,
            Kind::Clan => Some(clan::program()),
            Kind::WireguardGo => Some(self.root.join("usr/bin/wireguard-go")),
            Kind::Nebula => Some(self.root.join("usr/bin/nebula")),
            Kind::Tinc => Some(self.root.join("usr/sbin/tincd")),
            Kind::Yggdrasil => Some(self.root.join("usr/sbin/yggdrasil")),
        }
    }

    pub(super) fn is_there(&self) -> bool {
        self.program().is_none_or(|program| program.is_file())
    }

    /// The version of its package.
    pub(super) fn version(&self) -> Option<String> {
        let package = match self.kind {
            Kind::Cable | Kind::Clan | Kind::Engine { .. } => return None,
            Kind::WireguardGo => "wireguard-go_",
            Kind::Nebula => "nebula_",
            Kind::Tinc => "tinc_",
            Kind::Yggdrasil => "yggdrasil_",
        };
        let packages = fs::read_dir(self.root.join("packages")).ok()?;
        let names = packages.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        names.filter_map(|name| Some(name.strip_prefix(package)?.split('_').next()?.to_owned())).next()
    }

    pub(super) fn start(&self, site: &Site) -> Result<Network, LabError> {
        match (&self.kind, self.program()) {
            (Kind::WireguardGo, Some(program)) => wireguard_go(site, &program),
            (Kind::Nebula, Some(program)) => nebula(site, &program),
            (Kind::Tinc, Some(program)) => tinc(site, &program, &self.root),
            (Kind::Yggdrasil, Some(program)) => yggdrasil(site, &program),
            (Kind::Clan, _) => clan::start(site),
            (Kind::Engine { rules }, _) => engine(site, *rules),
            _ => Ok(Network { daemons: Vec::new(), target: CABLE[1].into() }),
        }
    }
}

fn engine(site: &Site, rules: bool) -> Result<Network, LabError> {
    let program = std::env::current_exe().map_err(LabError::io("find this program"))?;
    let mut daemons = Vec::new();
    for own in ENDS {
        let mut command = site.command(own, &program)?;
        let peer = format!("{}:{}", CABLE[1 - own], end::PORT);
        command.args(["tunnel-end", "--number", &own.to_string(), "--peer", &peer]);
        if rules {
            command.arg("--rules");
        }
        daemons.push(Daemon::start(command, &site.scratch(own)?.join("log"))?);
    }
    Ok(Network { daemons, target: EndConfig::address(1).into() })
}

fn wireguard_go(site: &Site, program: &Path) -> Result<Network, LabError> {
    let mut daemons = Vec::new();
    for own in ENDS {
        // The control socket is named after the device, for all namespaces in one folder.
        let device = format!("clb{}{own}", std::process::id() % 100_000);
        let mut command = site.command(own, program)?;
        command.args(["-f", &device]);
        daemons.push(Daemon::start(command, &site.scratch(own)?.join("log"))?);
        site.address(own, &device, &format!("{}/24", INSIDE[own]), WIREGUARD_MTU)?;
        let (keys, peer) = (ends(), 1 - own);
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let settings = format!(
            "set=1\nprivate_key={}\nlisten_port={PORT}\npublic_key={}\nendpoint={}:{PORT}\nallowed_ip={}/32\n\n",
            hex(&keys[own].secret),
            hex(keys[peer].public.as_bytes()),
            CABLE[peer],
            INSIDE[peer]
        );
        configure(&device, &settings)?;
    }
    Ok(Network { daemons, target: INSIDE[1].into() })
}

/// Speaks WireGuard's configuration protocol, once the daemon listens.
fn configure(device: &str, settings: &str) -> Result<(), LabError> {
    let path = Path::new("/var/run/wireguard").join(format!("{device}.sock"));
    let within = Duration::from_secs(5);
    let began = Instant::now();
    let mut stream = loop {
        match UnixStream::connect(&path) {
            Ok(stream) => break stream,
            Err(_) if began.elapsed() < within => thread::sleep(Duration::from_millis(20)),
            Err(error) => return Err(LabError::io(format!("connect to {}", path.display()))(error)),
        }
    };
    let mut answer = String::new();
    stream
        .write_all(settings.as_bytes())
        .and_then(|()| BufReader::new(&stream).read_line(&mut answer))
        .map_err(LabError::io(format!("configure {device}")))?;
    if answer.trim() == "errno=0" {
        return Ok(());
    }
    Err(LabError::Promise(format!("wireguard-go refuses its configuration: {answer}")))
}

fn nebula(site: &Site, program: &Path) -> Result<Network, LabError> {
    let certifier = program.with_file_name("nebula-cert");
    let shared = site.scratch(0)?;
    let file = |name: &str| shared.join(name).display().to_string();
    let certify = |arguments: &[&str]| finished(std::process::Command::new(&certifier).args(arguments)).map(drop);
    certify(&["ca", "-name", "bench", "-out-crt", &file("ca.crt"), "-out-key", &file("ca.key")])?;
    let mut daemons = Vec::new();
    for own in ENDS {
        let (crt, key) = (file(&format!("{own}.crt")), file(&format!("{own}.key")));
        certify(&[
            "sign",
            "-name",
            &own.to_string(),
            "-ip",
            &format!("{}/24", INSIDE[own]),
            "-ca-crt",
            &file("ca.crt"),
            "-ca-key",
            &file("ca.key"),
            "-out-crt",
            &crt,
            "-out-key",
            &key,
        ])?;
        let settings = format!(
            "pki: {{ca: {}, cert: {crt}, key: {key}}}\nstatic_host_map: {{\"{}\": [\"{}:4242\"]}}\n\
             lighthouse: {{am_lighthouse: {}, hosts: [{}]}}\nlisten: {{host: 0.0.0.0, port: 4242}}\ntun: {{dev: neb{own}}}\n\
             firewall:\n  outbound: [{{port: any, proto: any, host: any}}]\n  inbound: [{{port: any, proto: any, host: any}}]\n",
            file("ca.crt"),
            INSIDE[1 - own],
            CABLE[1 - own],
            own == 0,
            if own == 0 { String::new() } else { format!("\"{}\"", INSIDE[0]) },
        );
        let path = shared.join(format!("{own}.yml"));
        write(&path, &settings)?;
        let mut command = site.command(own, program)?;
        command.arg("-config").arg(&path);
        daemons.push(Daemon::start(command, &site.scratch(own)?.join("log"))?);
    }
    Ok(Network { daemons, target: INSIDE[1].into() })
}

fn tinc(site: &Site, program: &Path, root: &Path) -> Result<Network, LabError> {
    let libraries = format!("{0}/usr/lib/x86_64-linux-gnu:{0}/lib/x86_64-linux-gnu", root.display());
    let folders = [site.scratch(0)?, site.scratch(1)?];
    for own in ENDS {
        let hosts = folders[own].join("hosts");
        fs::create_dir_all(&hosts).map_err(LabError::io("make tinc's folder"))?;
        let connect = if own == 0 { "ConnectTo = end1\n" } else { "" };
        write(
            &folders[own].join("tinc.conf"),
            &format!(
                "Name = end{own}\nInterface = tinc{own}\nDeviceType = tun\nMode = router\nAddressFamily = ipv4\n{connect}"
            ),
        )?;
        let host = format!("Address = {}\nSubnet = {}/32\n", CABLE[own], INSIDE[own]);
        write(&hosts.join(format!("end{own}")), &host)?;
        let mut command = site.command(own, program)?;
        finished(command.env("LD_LIBRARY_PATH", &libraries).arg("-c").arg(&folders[own]).arg("-K2048"))?;
    }
    let mut daemons = Vec::new();
    for own in [1, 0] {
        let peer = 1 - own;
        let name = format!("hosts/end{peer}");
        fs::copy(folders[peer].join(&name), folders[own].join(&name)).map_err(LabError::io("exchange tinc's keys"))?;
    }
    for own in [1, 0] {
        let mut command = site.command(own, program)?;
        let pid = format!("--pidfile={}", folders[own].join("pid").display());
        command.env("LD_LIBRARY_PATH", &libraries).arg("-c").arg(&folders[own]).args(["-D", &pid]);
        daemons.push(Daemon::start(command, &folders[own].join("log"))?);
        // Its manual's advice for a path of 1500 bytes.
        site.address(own, &format!("tinc{own}"), &format!("{}/24", INSIDE[own]), 1400)?;
    }
    Ok(Network { daemons, target: INSIDE[1].into() })
}

fn yggdrasil(site: &Site, program: &Path) -> Result<Network, LabError> {
    let mut daemons = Vec::new();
    let mut target = None;
    for own in ENDS {
        let folder = site.scratch(own)?;
        let generated = finished(site.command(own, program)?.args(["-genconf", "-json"]))?;
        let unreadable = |error: serde_json::Error| LabError::Promise(format!("yggdrasil's configuration: {error}"));
        let mut settings: serde_json::Value = serde_json::from_str(&generated).map_err(unreadable)?;
        settings["Listen"] = serde_json::json!([format!("tcp://{}:7743", CABLE[own])]);
        settings["Peers"] =
            if own == 0 { serde_json::json!([format!("tcp://{}:7743", CABLE[1])]) } else { serde_json::json!([]) };
        settings["MulticastInterfaces"] = serde_json::json!([]);
        settings["IfName"] = serde_json::json!(format!("ygg{own}"));
        settings["AdminListen"] = serde_json::json!("none");
        let path = folder.join("yggdrasil.conf");
        write(&path, &settings.to_string())?;
        let mut command = site.command(own, program)?;
        command.arg("-useconffile").arg(&path);
        daemons.push(Daemon::start(command, &folder.join("log"))?);
        if own == 1 {
            let address = finished(site.command(own, program)?.arg("-useconffile").arg(&path).arg("-address"))?;
            target = address.trim().parse().ok();
        }
    }
    let target = target.ok_or_else(|| LabError::Promise("yggdrasil tells no address".into()))?;
    Ok(Network { daemons, target })
}

fn write(path: &Path, text: &str) -> Result<(), LabError> {
    fs::write(path, text).map_err(LabError::io(format!("write {}", path.display())))
}
