//! A phone takes part: a stock `wireguard-go`, with the configuration that `clan machine add --wireguard` prints. Needs root, for
//! network namespaces.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

mod common;

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    process::Stdio,
    time::Duration,
};

use clan_lab::{
    LabError,
    five::{CLAN, ping_once},
    fleet::Fleet,
    nat::{Nat, SiteSpec},
    story::until,
};
use common::{running::Running, with_fleet};
use data_encoding::{BASE64, HEXLOWER};

const LIMIT: Duration = Duration::from_secs(30);
const DEVICE: &str = "clanphone0";

#[test]
fn a_phone_reaches_members_by_name_and_is_reached_until_it_is_removed() {
    let specs: Vec<SiteSpec> = ["front", "member", "phone"].map(|name| SiteSpec::new(name, Nat::Open)).into();
    with_fleet("clanphone", &specs, &["controller"], tell);
}

fn tell(fleet: &mut Fleet) -> Result<(), LabError> {
    fleet.computer("front").found(CLAN)?;
    let link = fleet.computer("front").invite("member")?;
    fleet.computer("member").join(&link)?.success()?;
    until(LIMIT, "the machines meeting", || ping_once(fleet.computer("member"), "front"))?;

    let added = fleet.computer("front").clan_json(&["machine", "add", "phone", "--wireguard"])?;
    let configuration = added["configuration"].as_str().unwrap_or_default().to_owned();
    let _phone = Phone::start(fleet, &configuration)?;
    until(LIMIT, "the phone reaching the machine in front of it", || ping_once(fleet.computer("phone"), "front"))?;
    until(LIMIT, "the phone reaching a member", || ping_once(fleet.computer("phone"), "member"))?;
    until(LIMIT, "a member reaching the phone", || ping_once(fleet.computer("member"), "phone"))?;
    let machines = fleet.computer("member").clan_json(&["machines"])?;
    let shown = machines.as_array().into_iter().flatten().any(|m| m["name"] == "phone" && m["behind"] == "front");
    assert!(shown, "{machines}");
    // Its second address works too.
    let ipv4 = added["addresses"][1].as_str().unwrap_or_default();
    let pinged = fleet.computer("member").run_as_root("ping", &["-c", "1", "-W", "2", ipv4], LIMIT)?;
    assert!(pinged.status.success(), "{}", pinged.output());

    fleet.computer("front").clan(&["machine", "remove", "phone", "--yes"])?.success()?;
    until(LIMIT, "the end of the phone's time", || {
        Ok(ping_once(fleet.computer("member"), "phone")?.is_none().then_some(()))
    })?;
    let address = added["dns"].as_str().unwrap_or_default();
    let pinged = fleet.computer("phone").run_as_root("ping", &["-c", "2", "-W", "1", address], LIMIT)?;
    assert!(!pinged.status.success(), "{}", pinged.output());
    Ok(())
}

/// A running `wireguard-go`. It ends with this.
struct Phone(Running);

impl Drop for Phone {
    fn drop(&mut self) {
        self.0.end();
        let _ = fs::remove_file(socket());
    }
}

fn socket() -> String {
    format!("/var/run/wireguard/{DEVICE}.sock")
}

impl Phone {
    /// Does with a configuration what `wg-quick` does.
    fn start(fleet: &mut Fleet, configuration: &str) -> Result<Self, LabError> {
        let values: BTreeMap<&str, &str> = configuration
            .lines()
            .filter_map(|line| line.split_once(" = "))
            .filter(|(key, _)| !key.starts_with('#'))
            .collect();
        let value = |key: &str| {
            values.get(key).copied().ok_or_else(|| LabError::Promise(format!("no {key} in: {configuration}")))
        };
        let hex = |key: &str| Ok::<_, LabError>(HEXLOWER.encode(&BASE64.decode(value(key)?.as_bytes()).unwrap()));
        let computer = fleet.computer("phone");
        let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/rivals/unstable/usr/bin/wireguard-go");
        let program = if unpacked.exists() { unpacked } else { "wireguard-go".into() };
        let mut command = computer.place().root_command(program)?;
        command.args(["-f", DEVICE]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let phone = Self(Running(command.spawn().expect("wireguard-go runs: install it with `make deps`")));
        let mut stream = until(LIMIT, "wireguard-go", || Ok(UnixStream::connect(socket()).ok()))?;
        let allowed: String = value("AllowedIPs")?.split(", ").map(|net| format!("allowed_ip={net}\n")).collect();
        let settings = format!(
            "set=1\nprivate_key={}\npublic_key={}\nendpoint={}\npersistent_keepalive_interval={}\n{allowed}\n",
            hex("PrivateKey")?,
            hex("PublicKey")?,
            value("Endpoint")?,
            value("PersistentKeepalive")?,
        );
        let mut answer = String::new();
        stream.write_all(settings.as_bytes()).unwrap();
        BufReader::new(&stream).read_line(&mut answer).unwrap();
        assert_eq!(answer.trim(), "errno=0");
        let ip = |arguments: &[&str]| computer.run_as_root("ip", arguments, LIMIT)?.success();
        for address in value("Address")?.split(", ") {
            ip(&["address", "add", address, "dev", DEVICE])?;
        }
        ip(&["link", "set", DEVICE, "mtu", value("MTU")?, "up"])?;
        for net in value("AllowedIPs")?.split(", ") {
            ip(&["route", "add", net, "dev", DEVICE])?;
        }
        let server = value("DNS")?.split(", ").next().unwrap_or_default().to_owned();
        fs::write(computer.place().etc().join("resolv.conf"), format!("nameserver {server}\n")).unwrap();
        Ok(phone)
    }
}
