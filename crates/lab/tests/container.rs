//! Machines that are containers, of ordinary users: they meet, serve, survive what is killed, keep apart what they promise to, and
//! leave nothing. Needs root, for network namespaces, and what `make deps` installs; no virtual machine is started.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

mod boxes;
mod people;

use std::{fs, io::Write, thread, time::Instant};

use boxes::{HEAL, MANAGER, alive, kill_all, name, online, pinged, running, tree, with_boxes};
use clan_lab::{Browser, Lab, LabError, Person, Screen, story};
use people::promise;
use serde_json::Value;

const CLAN: &str = "boxes";
/// What a service on the base OS's loopback would give away.
const SECRET: &str = "what only this computer may read";

#[test]
fn containers_meet_survive_and_leave_nothing() {
    with_boxes("boxes", false, tell);
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
    let sized = second.clan(&["join", &link, "--container", "--disk", "1G", "--yes"])?;
    promise(sized.status.code() == Some(2), || format!("a container has a disk: {}", sized.output()))?;

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
    bounded(second, &preview["warnings"])?;
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

/// All of it is in a group of its own, or it is said why not, and its priority is lower.
fn bounded(second: &mut Person, warnings: &Value) -> Result<(), LabError> {
    let vms = second.clan_json(&["vm", "list"])?;
    let tree = tree(running(second)?);
    let read = |pid: &u32, file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    if let Some(why) = vms[0]["unlimited"].as_str() {
        promise(warnings.to_string().contains(why), || format!("it was not said before: {warnings}"))?;
        let listed = second.clan(&["vm", "list"])?.success()?.output();
        promise(listed.contains(why), || format!("`clan vm list` does not say why: {listed}"))?;
        // nice, the 19th field of proc_pid_stat(5).
        let nice = |pid| {
            let stat = read(pid, "stat");
            stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(16)?.parse::<i32>().ok())
        };
        return promise(tree.iter().all(|pid| nice(pid).is_some_and(|nice| nice >= 5)), || {
            format!("a process of {tree:?} has no lower priority")
        });
    }
    let outside = tree.iter().find(|pid| !read(pid, "cgroup").contains("/clan-vm-"));
    promise(outside.is_none(), || format!("{outside:?} is in no group of the container's"))
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
        kill_all(&[victim]);
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

fn offered(person: &Person) -> Result<Option<()>, LabError> {
    let services = person.clan_json(&["service", "list"])?;
    let web = services.as_array().into_iter().flatten().find(|s| s["name"] == "web" && s["healthy"] == true);
    Ok(web.map(|_: &Value| ()))
}
