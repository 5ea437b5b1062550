//! Machines that are containers, of ordinary users: they meet, serve, survive what is killed, keep apart what they promise to, and
//! leave nothing. Needs root, for network namespaces, and what `make deps` installs; no virtual machine is started.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

use std::{
    fs::{self, DirBuilder},
    io::Write,
    os::unix::fs::{DirBuilderExt, chown},
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use clan_lab::{Account, Browser, Lab, LabConfig, LabError, Person, Screen, leftovers, matching, story};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const CLAN: &str = "boxes";
const HEAL: Duration = Duration::from_secs(60);
const MANAGER: Duration = Duration::from_secs(20);
/// What a service on the base OS's loopback would give away.
const SECRET: &str = "what only this computer may read";

#[test]
fn containers_meet_survive_and_leave_nothing() {
    assert!(
        rustix::process::geteuid().is_root(),
        "the lab needs network namespaces: run it as root, as `make test` does"
    );
    let screen = Screen::stdout();
    // target/<triple>/<profile>/deps/<test>: the programs are two above.
    let own = std::env::current_exe().unwrap();
    let mut config = LabConfig::new(own.parent().and_then(Path::parent).unwrap());
    let account = Account::for_lab(None).unwrap_or_else(|error| panic!("{}", error.chain()));
    config.prefix = "clanbox".into();
    config.state = Some(account.state_root().with_file_name("clan-lab-boxes"));
    config.any_ports = true;
    config.fresh_second = true;
    let mut lab = Lab::up(&config, &screen).unwrap_or_else(|error| panic!("{}", error.chain()));
    let record = lab.record().clone();
    share_packages(&account.state_root().with_file_name("clan-lab-test"), lab.person("founder"), &account).unwrap();
    let told = tell(&mut lab, &screen);
    if let Err(error) = &told {
        screen.failed(&error.chain());
        story::post_mortem(&mut lab);
    }
    lab.down().unwrap_or_else(|error| panic!("{}", error.chain()));
    told.unwrap_or_else(|error| panic!("{}; the logs are in {}", error.chain(), record.logs().display()));
    let left = leftovers(&record);
    assert!(left.is_empty(), "{left:?}");
}

/// What the story has downloaded need not be downloaded again.
fn share_packages(story: &Path, person: &Person, account: &Account) -> std::io::Result<()> {
    let cache = person.data().join("cache");
    for folder in [person.data(), cache.clone()] {
        if !folder.is_dir() {
            DirBuilder::new().mode(0o700).create(&folder)?;
            chown(&folder, Some(account.uid), Some(account.gid))?;
        }
    }
    for root in fs::read_dir(story.join("founder/data/cache")).into_iter().flatten().flatten() {
        let place = cache.join(root.file_name());
        if root.file_name().to_string_lossy().starts_with("root-") && !place.exists() {
            Command::new("cp").arg("-a").args([root.path(), place]).status()?;
        }
    }
    Ok(())
}

fn tell(lab: &mut Lab, screen: &Screen) -> Result<(), LabError> {
    for name in ["founder", "second"] {
        lab.person(name).start_manager(MANAGER)?;
    }
    let step = |what: &str, began: Instant| screen.seen(what, began.elapsed());

    let began = Instant::now();
    let made = ["create", CLAN, "--container", "--person", "founder", "--machine", "founder"];
    lab.person("founder").clan(&made)?.success()?;
    step("a clan is founded from a container", began);

    let link = story::link_in(&lab.person("founder").clan(&["invite", CLAN])?.success()?.stdout)?;
    let second = lab.person("second");
    let looked = second.clan(&["join", &link, "--container", "--dry-run"])?.success()?.output();
    promise(looked.contains("a container:") && looked.contains("shares this computer's kernel"), || {
        format!("the preview does not say what will run: {looked}")
    })?;
    let preview = second.clan_json(&["join", &link, "--container", "--dry-run"])?;
    let warned = preview["warnings"].to_string();
    promise(warned.contains("shares this computer's kernel"), || format!("nobody is warned: {preview}"))?;
    promise(preview["container"]["problem"].is_null(), || format!("containers are said not to work: {preview}"))?;
    let sized = second.clan(&["join", &link, "--container", "--memory", "1G", "--yes"])?;
    promise(sized.status.code() == Some(2), || format!("a container has a size: {}", sized.output()))?;

    let began = Instant::now();
    second.clan(&["join", &link, "--container", "--yes", "--person", "second", "--machine", "second"])?.success()?;
    step("joined with a container", began);
    pinged(second, "founder")?;
    step("in the mesh", began);
    pinged(lab.person("founder"), "second")?;
    step("and back", began);
    raw(lab)?;
    step("by raw sockets, too", began);
    let second = lab.person("second");
    story::until(HEAL, "the founder's service", || offered(second))?;
    let url = story::url_in(&second.clan(&["service", "open", "web", "--print"])?.success()?.stdout)?;
    let page = story::until(HEAL, "the founder's page", || {
        let page = Browser::default().get(&url)?;
        Ok((page.status == 200).then_some(page.body))
    })?;
    promise(page.contains(CLAN) && page.contains("founder"), || format!("it is another page: {page}"))?;
    step("the founder's service answers", began);

    let vms = second.clan_json(&["vm", "list"])?;
    promise(vms[0]["flavour"] == "container", || format!("it is no container: {vms}"))?;
    for verb in [&["vm", "pause"][..], &["vm", "snapshot"], &["vm", "resize", "--disk", "9G"]] {
        let refused = second.clan(verb)?;
        let said = refused.stderr.contains("a container cannot do this");
        promise(!refused.status.success() && said, || format!("`{verb:?}`: {}", refused.output()))?;
    }
    let log = second.clan_quietly(&["vm", "logs"])?.success()?.stdout;
    promise(log.contains("controller starts"), || format!("no log: {log}"))?;
    story::until(HEAL, "statistics", || {
        let stats = second.clan_json(&["vm", "stats"])?;
        Ok((stats["latest"]["memory_used"].as_u64() > Some(0)).then_some(()))
    })?;
    isolated(second)?;
    survives(lab, screen)?;
    leaves(lab, screen)
}

/// Echoes cross each other where the kernel opens no sockets for them, either.
fn raw(lab: &mut Lab) -> Result<(), LabError> {
    for name in ["founder", "second"] {
        let range = "/proc/sys/net/ipv4/ping_group_range";
        let (said, _) =
            lab.person(name).console(CLAN)?.run(&format!("echo 65535 65535 > {range}; cat {range}"), HEAL)?;
        promise(said.split_whitespace().eq(["65535", "65535"]), || format!("{name} has such sockets: {said}"))?;
    }
    pinged(lab.person("second"), "founder")?;
    pinged(lab.person("founder"), "second")
}

/// What root in the container gets at.
fn isolated(second: &mut Person) -> Result<(), LabError> {
    let listener = second.occupy(45_999)?;
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.write_all(SECRET.as_bytes());
        }
    });
    let mut console = second.console(CLAN)?;
    let mut inside = |command: &str| console.run(command, HEAL).map(|(said, _)| said);
    let reaches = |said: &str| said.contains(SECRET);
    for address in ["127.0.0.1", "0.0.0.0", "10.0.2.2", "10.0.2.3"] {
        let said = inside(&format!("timeout 3 bash -c 'cat < /dev/tcp/{address}/45999'; echo"))?;
        promise(!reaches(&said), || format!("{address} is the base OS's loopback: {said}"))?;
    }
    let users = inside("id -u; cat /proc/self/uid_map; echo")?;
    promise(users.contains('0'), || format!("the shell is not root's: {users}"))?;
    for (attempt, why) in [
        ("unshare --user true", "makes user namespaces"),
        ("unshare --mount true", "makes mount namespaces"),
        ("mount -t tmpfs none /mnt", "mounts"),
        ("mknod /tmp/disk b 253 0", "makes devices"),
        ("echo 1 > /proc/sys/kernel/panic", "changes the kernel"),
        ("ls /run/image/../../home/* | grep .", "sees homes"),
    ] {
        let said = inside(&format!("if {attempt} 2>/dev/null; then echo it-$((1))-does; fi"))?;
        promise(!said.contains("it-1-does"), || format!("root in a container {why}: {said}"))?;
    }
    // Processes of the base OS are not there to be seen.
    let seen = inside("ls -d /proc/[0-9]* | wc -l; echo")?;
    let count = seen.lines().find_map(|line| line.trim().parse::<usize>().ok()).unwrap_or(usize::MAX);
    promise(count < 20, || format!("{count} processes are seen from inside"))?;
    // The device that leads to pasta is in another namespace, out of reach.
    let devices = inside("ip -o link; ip link set dev eth0 netns 1 2>&1; echo")?;
    promise(!devices.contains("up0"), || format!("the wire's other end is in reach: {devices}"))?;
    Ok(())
}

/// Kills one part after the other.
fn survives(lab: &mut Lab, screen: &Screen) -> Result<(), LabError> {
    let began = Instant::now();
    let second = lab.person("second");
    let before = running(second)?;
    second.kill_manager()?;
    second.start_manager(MANAGER)?;
    let found = story::until(HEAL, "the manager finding its container", || online(second))?;
    promise(found == before, || format!("process {before} became {found}"))?;
    pinged(second, "founder")?;
    screen.seen("the manager is killed, and its container goes on", began.elapsed());

    for part in ["unshare", "pasta", "bwrap", "clan"] {
        let began = Instant::now();
        let second = lab.person("second");
        let before = running(second)?;
        let tree = tree(before);
        let victim = tree.iter().copied().rfind(|pid| name(*pid).starts_with(part));
        let victim = victim.ok_or_else(|| LabError::Promise(format!("no {part} among {tree:?}")))?;
        kill_process(Pid::from_raw(victim.cast_signed()).unwrap(), Signal::KILL).unwrap();
        story::until(HEAL, "all of the container being gone", || {
            Ok(tree.iter().all(|pid| !alive(*pid)).then_some(()))
        })?;
        let after = story::until(HEAL, "the container coming back", || online(second))?;
        promise(after != before, || "it is the same process".into())?;
        pinged(second, "founder")?;
        screen.seen(&format!("{part} is killed, nothing of the container stays, and it comes back"), began.elapsed());
    }

    let began = Instant::now();
    let second = lab.person("second");
    let before = tree(running(second)?);
    second.clan(&["vm", "stop"])?.success()?;
    promise(before.iter().all(|pid| !alive(*pid)), || "a stopped container has processes".into())?;
    second.clan(&["vm", "start"])?.success()?;
    second.clan(&["vm", "restart"])?.success()?;
    pinged(second, "founder")?;
    screen.seen("stopped, started, started again", began.elapsed());
    Ok(())
}

fn leaves(lab: &mut Lab, screen: &Screen) -> Result<(), LabError> {
    let began = Instant::now();
    for name in ["second", "founder"] {
        let person = lab.person(name);
        let tree = tree(running(person)?);
        person.clan(&["leave", CLAN, "--yes"])?.success()?;
        promise(tree.iter().all(|pid| !alive(*pid)), || "a process is left".into())?;
        for folder in ["clans", "cache/trees"] {
            let left = fs::read_dir(person.data().join(folder)).map_or(0, Iterator::count);
            promise(left == 0, || format!("{left} things are left in {folder}"))?;
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let data = person.data().display().to_string();
        promise(!mounts.contains(&data), || "a mount is left".into())?;
    }
    screen.seen("leaving removes every trace", began.elapsed());
    Ok(())
}

fn running(person: &Person) -> Result<u32, LabError> {
    story::until(HEAL, "the container running", || online(person))
}

/// The container's first process, once its controller answers.
fn online(person: &Person) -> Result<Option<u32>, LabError> {
    let status = person.clan_json(&["status"])?;
    let pid = status["vms"][0]["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
    Ok(pid.filter(|_| status["clans"][0]["online"] == true && status["vms"][0]["state"] == "running"))
}

fn pinged(person: &Person, machine: &str) -> Result<(), LabError> {
    story::until(HEAL, "an echo", || {
        let finished = person.clan_quietly(&["ping", machine, "--count", "1"])?;
        Ok(finished.status.success().then_some(()))
    })
}

fn offered(person: &Person) -> Result<Option<()>, LabError> {
    let services = person.clan_json(&["service", "list"])?;
    let web = services.as_array().into_iter().flatten().find(|s| s["name"] == "web" && s["healthy"] == true);
    Ok(web.map(|_: &Value| ()))
}

/// A process and all that descend from it.
fn tree(root: u32) -> Vec<u32> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        next += 1;
        found.extend(matching(|path| {
            let stat = fs::read_to_string(path.join("stat")).unwrap_or_default();
            let fields = stat.rsplit_once(')').map(|(_, rest)| rest.to_owned()).unwrap_or_default();
            fields.split_whitespace().nth(1).and_then(|p| p.parse().ok()) == Some(parent)
        }));
    }
    found
}

fn name(pid: u32) -> String {
    let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    let name = program.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    name.replace("passt", "pasta")
}

fn alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

fn promise(kept: bool, what: impl FnOnce() -> String) -> Result<(), LabError> {
    if kept { Ok(()) } else { Err(LabError::Promise(what())) }
}
