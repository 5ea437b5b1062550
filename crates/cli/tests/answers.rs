//! How the manager's answers are shown, and what is asked of it.

mod common;

use clan_types::{ClanId, MachineId, PersonId};
use common::{Computer, link};
use serde_json::{Value, json};
use snapbox::str;

const NOW: u64 = 1_790_000_000_000;
const TASK: &str = "00000000000000aa";
const TASK_EVENTS: &str = "GET /api/v1/tasks/00000000000000aa/events";

fn clan(name: &str, byte: u8) -> Value {
    json!({
        "id": ClanId::from_bytes([byte; 32]), "name": name, "fingerprint": "k3f9 2d8s 7qpa", "phase": "ready", "person": PersonId::from_bytes([1; 32]),
        "role": "owner", "machine_name": "laptop", "online": true, "as_of": NOW, "people": [], "problems": [],
        "machines": [
            {"id": MachineId::from_bytes([1; 32]), "name": "laptop", "owner": PersonId::from_bytes([1; 32]), "owner_name": "anna", "address": "fd01::1",
             "host_name": "laptop.family.clan", "this": true, "path": {"kind": "local", "remote": null, "rtt_us": null, "why": "it is this machine"}, "last_seen": NOW, "version": "0.1.0", "control_mode": "shared"},
            {"id": MachineId::from_bytes([2; 32]), "name": "desk", "owner": PersonId::from_bytes([2; 32]), "owner_name": "ben", "address": "fd01::2",
             "host_name": "desk.family.clan", "this": false, "path": {"kind": "direct", "remote": "192.0.2.7:41641", "rtt_us": 3400, "why": "same LAN"}, "last_seen": NOW - 5000, "version": "0.1.0", "control_mode": "local"},
            {"id": MachineId::from_bytes([3; 32]), "name": "attic", "owner": PersonId::from_bytes([2; 32]), "owner_name": "ben", "address": "fd01::3",
             "host_name": "attic.family.clan", "this": false, "path": null, "last_seen": NOW - 7_200_000, "version": null}
        ],
        "services": [{"name": "web", "title": "Family\u{1b}[31m page", "kind": "http", "machine": "desk", "port": 80, "host_name": "web.family.clan", "healthy": true}]
    })
}

fn status(clans: Vec<Value>) -> Value {
    json!({
        "version": "0.1.0", "data_dir": "/home/anna/.local/share/clan", "now": NOW, "clans": clans, "tasks": [],
        "host": {"name": "laptop", "cpus": 2, "memory_total": 8u64 << 30, "memory_available": 4u64 << 30, "disk_available": 100u64 << 30},
        "accelerator": {"kind": "tcg", "reason": "there is no /dev/kvm"},
        "vms": [{"id": ClanId::from_bytes([1; 32]), "clan": "family", "machine": "laptop", "state": "running", "reason": null, "since": NOW - 200_000, "wanted": true,
            "restarts": 0, "pid": 77, "accelerator": "tcg", "memory": 512u64 << 20, "cpus": 2, "disk": 2u64 << 30, "disk_used": 90u64 << 20, "image": null,
            "quic_port": 1, "wireguard_port": 2, "control_mode": "shared", "task": null,
            "stats": {"at": NOW, "cpu_permille": 123, "memory_total": 500u64 << 20, "memory_used": 120u64 << 20, "disk_total": 2u64 << 30, "disk_used": 80u64 << 20, "net_received": 1, "net_sent": 1, "uptime_s": 200}}],
        "problems": [{"severity": "warning", "clan": null, "message": "VMs are emulated, which is slow", "hints": ["enable virtualisation in the firmware"]}]
    })
}

fn task(state: &str, steps: Value) -> Value {
    json!({"id": TASK, "kind": "join_clan", "title": "Join the clan family", "clan": "family", "state": state, "started": NOW, "finished": null, "steps": steps,
        "progress": null, "detail": null, "result": null, "problem": null, "log": []})
}

fn preview() -> Value {
    json!({"clan": ClanId::from_bytes([1; 32]), "clan_name": "family", "fingerprint": "k3f9 2d8s 7qpa", "inviter": "anna", "role": "member", "expires": 4_000_000_000_000u64,
        "people": ["anna"], "machines": ["laptop"], "control_mode": "shared", "integrated": null,
        "vm": {"image": clan_types::ImageId::from_bytes([9; 32]), "image_title": "Debian 12, small", "download": {"total": 180u64 << 20, "missing": 180u64 << 20},
            "memory": 512u64 << 20, "disk": 2u64 << 30, "cpus": 2, "accelerator": {"kind": "tcg", "reason": "there is no /dev/kvm"}}, "warnings": ["your computer has little memory left"]})
}

fn events(events: &[Value]) -> String {
    events.iter().map(|e| format!("data: {e}\n\n")).collect()
}

#[test]
fn status_shows_clans_machines_services_and_problems() {
    let computer = Computer::new();
    computer.manager(&[("GET /api/v1/status", 200, status(vec![clan("family", 1)]).to_string())]);
    computer.clan(&["status"]).assert().success().stderr_eq("").stdout_eq(str![[r#"
family, you are owner  k3f9 2d8s 7qpa
  laptop is running for 3 min 20 s, control shared, CPU 12 %, memory 120 MiB of 500 MiB

  MACHINE  OWNER  CONTROL  PATH            WHY
  laptop   anna   shared   this computer
  desk     ben    local    direct, 3.4 ms  same LAN
  attic    ben    -        seen 2 h ago

  SERVICE  MACHINE  STATE  ADDRESS                 TITLE
  web      desk     works  http://web.family.clan  Family·[31m page

warning: VMs are emulated, which is slow
hint: enable virtualisation in the firmware

"#]]);
}

#[test]
fn whoever_runs_another_image_than_the_clan_publishes_is_told_and_how_to_take_it() {
    let computer = Computer::new();
    let mut told = status(vec![clan("family", 1)]);
    told["vms"][0]["published"] =
        json!({"image": clan_types::ImageId::from_bytes([9; 32]), "title": "Debian 12,\u{1b}[31m newer"});
    let answers = [("GET /api/v1/status", 200, told.to_string()), ("GET /api/v1/vms", 200, told["vms"].to_string())];
    computer.manager(&answers);
    let line = "family publishes another image than laptop runs: Debian 12,·[31m newer (beeqscijbe). `clan vm update family` takes it.";
    let shown = computer.clan(&["status"]).assert().success().stderr_eq("");
    let shown = String::from_utf8_lossy(&shown.get_output().stdout).into_owned();
    assert!(shown.contains(&format!("\n  {line}\n")), "{shown}");
    computer.clan(&["vm", "list"]).assert().success().stderr_eq(format!("{line}\n"));
    let json = computer.clan(&["status", "--json"]).assert().success();
    let json: Value = serde_json::from_slice(&json.get_output().stdout).unwrap();
    assert_eq!(json["vms"][0]["published"], told["vms"][0]["published"]);
}

#[test]
fn status_of_an_empty_computer_says_how_to_begin() {
    let computer = Computer::new();
    let mut empty = status(vec![]);
    empty["vms"] = json!([]);
    empty["problems"] = json!([]);
    computer.manager(&[("GET /api/v1/status", 200, empty.to_string())]);
    computer.clan(&["status"]).assert().success().stdout_eq("").stderr_eq(str![[r#"
You are in no clan yet. Found one: `clan create NAME`. Or accept an invitation: `clan join LINK`.

"#]]);
}

#[test]
fn with_several_clans_one_must_be_named() {
    let computer = Computer::new();
    computer.manager(&[("GET /api/v1/clans", 200, json!([clan("family", 1), clan("work", 2)]).to_string())]);
    computer.clan(&["members"]).assert().code(1).stdout_eq("").stderr_eq(str![[r#"
error: which clan?
why: you are in 2: family, work
hint: name the clan in the command

"#]]);
}

#[test]
fn in_no_clan_it_says_how_to_get_into_one() {
    let computer = Computer::new();
    computer.manager(&[("GET /api/v1/clans", 200, "[]".to_owned())]);
    computer.clan(&["invite"]).assert().code(1).stdout_eq("").stderr_eq(str![[r#"
error: you are in no clan yet
hint: found one: `clan create NAME`
hint: or accept an invitation: `clan join LINK`

"#]]);
}

#[test]
fn an_invite_is_the_link_alone() {
    let computer = Computer::new();
    let invite = json!({"link": link(), "invite": clan_types::InviteId::from_bytes([5; 32]), "clan_name": "family", "fingerprint": "k3f9", "role": "guest", "uses": 2, "expires": NOW});
    let asked = computer.manager(&[("POST /api/v1/clans/family/invites", 201, invite.to_string())]);
    computer
        .clan(&["invite", "family", "--role", "guest", "--uses", "2", "--expires", "7d"])
        .assert()
        .success()
        .stderr_eq("")
        .stdout_eq(format!("{}\n", link()));
    assert_eq!(asked.all(), [r#"POST /api/v1/clans/family/invites {"role":"guest","uses":2,"expires_in":604800}"#]);
}

#[test]
fn joining_without_terminal_needs_yes_and_changes_nothing() {
    let computer = Computer::new();
    let asked = computer.manager(&[("POST /api/v1/joins/preview", 200, preview().to_string())]);
    computer.clan(&["join", &link(), "--machine", "desk"]).assert().code(1).stdout_eq("").stderr_eq(str![[r#"
anna invites you to the clan family.

  Clan          family
  Fingerprint   k3f9 2d8s 7qpa
  Invited by    anna
  Your role     member
  Expires       in [..]
  Members       1 person, 1 machine
  Will run      a virtual machine: Debian 12, small
  Image         beeqscijbe
  Memory        512 MiB
  Disk          up to 2 GiB, beside the image's 180 MiB
  Processors    2
  Download      180 MiB
  Applications  none that is named
  Network       mesh: encrypted, and directly between machines where that works
  Control       shared: you and the clan's admins steer it
  Runs by       emulation (TCG): there is no /dev/kvm

warning: your computer has little memory left
warning: The clan's admins will be able to open a terminal as root in the virtual machine, change its settings and see its log; all is written down, and `clan vm control local` ends it.
Compare the fingerprint with what the inviter sees. The virtual machine has no access to your files.
error: this needs your consent, and there is no terminal to ask on
hint: add `--yes` to join without being asked; `--dry-run` shows where the link leads

"#]]);
    assert!(asked.all().iter().all(|a| a.starts_with("POST /api/v1/joins/preview")), "only the preview was asked for");
}

#[test]
fn a_machine_name_that_is_taken_is_told_before_anything_happens() {
    let computer = Computer::new();
    computer.manager(&[("POST /api/v1/joins/preview", 200, preview().to_string())]);
    computer.clan(&["join", &link(), "--yes", "--machine", "laptop"]).assert().code(1).stdout_eq("").stderr_eq(str![[
        r#"
error: the clan has a machine named laptop already
hint: choose another name: `--machine NAME`

"#
    ]]);
}

#[test]
fn joining_tells_each_step_on_lines_where_there_is_no_terminal() {
    let computer = Computer::new();
    let step = |title, state, ms: u64| json!({"title": title, "state": state, "elapsed_ms": ms});
    let mut loading =
        task("running", json!([step("Get the image", "running", 10), step("Start the machine", "pending", 0)]));
    loading["progress"] = json!({"done": 60u64 << 20, "total": 180u64 << 20, "rate": 1u64 << 20});
    let told = [
        json!({"event": "update", "task": loading}),
        json!({"event": "log", "line": "a detail"}),
        json!({"event": "update", "task": task("running", json!([step("Get the image", "done", 12_000), step("Start the machine", "running", 5)]))}),
        json!({"event": "update", "task": task("done", json!([step("Get the image", "done", 12_000), step("Start the machine", "done", 8_400)]))}),
    ];
    computer.manager(&[
        ("POST /api/v1/joins/preview", 200, preview().to_string()),
        ("POST /api/v1/joins", 202, task("running", json!([])).to_string()),
        ("GET /api/v1/tasks/00000000000000aa/events", 200, events(&told)),
    ]);
    computer
        .clan(&["join", &link(), "--yes", "--person", "ben", "--machine", "desk"])
        .assert()
        .success()
        .stdout_eq("")
        .stderr_eq(str![[r#"
anna invites you to the clan family.

  Clan          family
  Fingerprint   k3f9 2d8s 7qpa
  Invited by    anna
  Your role     member
  Expires       in [..]
  Members       1 person, 1 machine
  Will run      a virtual machine: Debian 12, small
  Image         beeqscijbe
  Memory        512 MiB
  Disk          up to 2 GiB, beside the image's 180 MiB
  Processors    2
  Download      180 MiB
  Applications  none that is named
  Network       mesh: encrypted, and directly between machines where that works
  Control       shared: you and the clan's admins steer it
  Runs by       emulation (TCG): there is no /dev/kvm

warning: your computer has little memory left
warning: The clan's admins will be able to open a terminal as root in the virtual machine, change its settings and see its log; all is written down, and `clan vm control local` ends it.
Compare the fingerprint with what the inviter sees. The virtual machine has no access to your files.
Get the image…
  30 % (60 MiB of 180 MiB)
Get the image: done in 12 s
Start the machine…
Start the machine: done in 8.4 s
desk is now a machine of family.
See what it offers: clan service list family

"#]]);
}

#[test]
fn a_task_that_fails_says_why_and_shows_its_last_log_lines() {
    let computer = Computer::new();
    let mut failed = task("failed", json!([{"title": "Stop the machine", "state": "failed", "elapsed_ms": 30_000}]));
    failed["problem"] = json!({"type": "urn:clan:problem:vm_failed", "code": "vm_failed", "message": "the machine did not stop", "why": "it hangs", "hints": ["look at its console: `clan vm console`"], "status": 500});
    computer.manager(&[
        ("POST /api/v1/vms/family/stop", 202, task("running", json!([])).to_string()),
        (
            "GET /api/v1/tasks/00000000000000aa/events",
            200,
            events(&[
                json!({"event": "log", "line": "systemd: \u{1b}[2Jwaiting"}),
                json!({"event": "update", "task": failed}),
            ]),
        ),
    ]);
    computer.clan(&["vm", "stop", "family"]).assert().code(1).stdout_eq("").stderr_eq(str![[r#"
Stop the machine: failed after 30 s
  │ systemd: ·[2Jwaiting
error: the machine did not stop
why: it hangs
hint: look at its console: `clan vm console`

"#]]);
}

/// A task of which the manager told no end, after which another manager answers, with these tasks.
fn restarted(tasks: Value) -> Computer {
    let computer = Computer::new();
    let first = task("running", json!([{"title": "Stop the machine", "state": "running", "elapsed_ms": 1000}]));
    let mut next = task("done", json!([{"title": "Stop the machine", "state": "done", "elapsed_ms": 2000}]));
    next["id"] = json!("00000000000000bb");
    computer.manager(&[
        ("POST /api/v1/vms/family/stop", 202, first.to_string()),
        // It breaks off; and the task, of which the next manager has not heard, is answered by 404.
        (TASK_EVENTS, 200, events(&[json!({"event": "update", "task": first})])),
        ("GET /api/v1/tasks", 200, tasks.to_string()),
        ("GET /api/v1/tasks/00000000000000bb/events", 200, events(&[json!({"event": "update", "task": next})])),
    ]);
    computer
}

#[test]
fn what_the_next_manager_goes_on_with_is_followed() {
    let mut next = task("running", json!([]));
    next["id"] = json!("00000000000000bb");
    let told = restarted(json!([next])).clan(&["vm", "stop", "family"]).assert().success();
    let said = String::from_utf8_lossy(&told.get_output().stderr).into_owned();
    assert!(said.contains("The manager was started again, and goes on."), "{said}");
    assert!(said.contains("Stop the machine: done in 2.0 s"), "{said}");
}

#[test]
fn what_the_next_manager_does_not_go_on_with_is_said() {
    let mut earlier = task("running", json!([]));
    earlier["id"] = json!("00000000000000a9");
    restarted(json!([earlier])).clan(&["vm", "stop", "family"]).assert().code(1).stdout_eq("").stderr_eq(str![[r#"
Stop the machine…
error: the manager was started again, and does not go on with: Join the clan family
hint: see how things stand: `clan status`
hint: then run the same command again, if it is still wanted

"#]]);
}

#[test]
fn a_problem_of_the_manager_keeps_its_code_in_json() {
    let computer = Computer::new();
    let used = json!({"type": "urn:clan:problem:invite_used", "code": "invite_used", "message": "this invite has been used already", "hints": ["ask for a new one"], "status": 410});
    computer.manager(&[("POST /api/v1/joins/preview", 410, used.to_string())]);
    computer.clan(&["join", &link(), "--json"]).assert().code(1).stdout_eq("").stderr_eq(str![[r#"
{"type":"urn:clan:problem:invite_used","code":"invite_used","message":"this invite has been used already","hints":["ask for a new one"],"status":410,"exit":1}

"#]]);
}

#[test]
fn a_manager_that_says_nothing_is_waited_for_no_longer_than_asked() {
    let computer = Computer::new();
    let _silent = computer.silent_manager();
    computer.clan(&["status", "--timeout", "1"]).assert().code(5).stdout_eq("").stderr_eq(str![[r#"
error: the manager did not answer within 1 second
hint: it may be busy: try again, or allow more time with `--timeout`

"#]]);
}

#[test]
fn an_answer_that_is_none_of_ours_is_told_as_such() {
    let computer = Computer::new();
    computer.manager(&[("GET /api/v1/status", 200, "<html>".to_owned())]);
    computer.clan(&["status"]).assert().code(4).stdout_eq("").stderr_eq(str![[r#"
error: the manager's answer cannot be understood
why: expected value at line 1 column 1
hint: the manager may have ended just now, or be of another version: start it again with `clan manager`

"#]]);
}

#[test]
fn a_service_is_opened_by_its_address() {
    let computer = Computer::new();
    let opened = json!({"url": "http://web.family.localhost:4160/?ticket=x", "plain_url": "http://web.family.localhost:4160/", "service": "web", "machine": "desk"});
    computer.manager(&[
        ("GET /api/v1/clans", 200, json!([clan("family", 1)]).to_string()),
        (
            leaked(format!("POST /api/v1/clans/{}/services/web/open", ClanId::from_bytes([1; 32]))),
            201,
            opened.to_string(),
        ),
    ]);
    computer
        .clan(&["service", "open", "web", "--print"])
        .assert()
        .success()
        .stderr_eq("")
        .stdout_eq("http://web.family.localhost:4160/?ticket=x\n");
}

#[test]
fn leaving_without_terminal_needs_yes() {
    let computer = Computer::new();
    let asked = computer.manager(&[
        ("GET /api/v1/clans", 200, json!([clan("family", 1)]).to_string()),
        ("GET /api/v1/vms", 200, status(vec![])["vms"].to_string()),
    ]);
    computer.clan(&["leave"]).assert().code(1).stdout_eq("").stderr_eq(str![[r#"
error: this needs your consent, and there is no terminal to ask on
hint: add `--yes` to leave without being asked

"#]]);
    assert!(!asked.all().iter().any(|a| a.contains("leave")));
}

fn leaked(text: String) -> &'static str {
    text.leak()
}

#[test]
fn an_integrated_machine_is_told_from_a_virtual_one() {
    let computer = Computer::new();
    let mut vms = status(vec![])["vms"].clone();
    vms[0]["flavour"] = json!("integrated");
    vms[0]["socket"] = json!("/run/clan/controller.sock");
    let asked = computer.manager(&[
        ("GET /api/v1/clans", 200, json!([clan("family", 1)]).to_string()),
        ("GET /api/v1/vms", 200, vms.to_string()),
    ]);
    let list = computer.clan(&["vm", "list"]).assert().success();
    let text = String::from_utf8_lossy(&list.get_output().stdout).into_owned();
    assert!(text.contains("integrated") && !text.contains("90 MiB"), "{text}");
    computer.clan(&["vm", "delete", "family", "--force"]).assert().code(1);
    assert!(!asked.all().iter().any(|a| a.starts_with("DELETE")));
}

#[test]
fn joining_with_the_computer_itself_shows_what_that_means() {
    let computer = Computer::new();
    let mut integrated = preview();
    integrated["vm"] = Value::Null;
    integrated["integrated"] = json!({"socket": "/run/clan/controller.sock", "problem": {"type": "urn:clan:problem:controller_down", "code": "controller_down",
        "message": "the clan's controller does not run on this computer", "hints": ["start it: `sudo clan controller --install`"], "status": 503}});
    let asked = computer.manager(&[("POST /api/v1/joins/preview", 200, integrated.to_string())]);
    let shown = computer.clan(&["join", &link(), "--integrate", "--dry-run"]).assert().success();
    let text = String::from_utf8_lossy(&shown.get_output().stdout).into_owned();
    for part in [
        "no virtual machine: this computer itself",
        "/run/clan/controller.sock: the clan's controller does not run",
        "--install",
    ] {
        assert!(text.contains(part), "{part} is missing in: {text}");
    }
    assert!(!text.contains("Memory") && !text.contains("Image"), "{text}");
    assert!(asked.all()[0].contains(r#""integrate":"/run/clan/controller.sock""#));
    let wrong = computer.clan(&["join", &link(), "--integrate", "--memory", "1G"]).assert().code(2);
    assert!(String::from_utf8_lossy(&wrong.get_output().stderr).contains("cannot be used with"));
}

fn pong(rtt_us: Option<u64>) -> String {
    json!({
        "machine": MachineId::from_bytes([2; 32]), "name": "desk", "host_name": "desk.family.clan", "address": "fd01::2", "rtt_us": rtt_us,
        "path": {"kind": "relayed", "remote": null, "rtt_us": 5000, "why": "relayed via attic, because no address of the machine answers directly"}
    })
    .to_string()
}

#[test]
fn ping_tells_each_echo_and_why_the_path_is_no_better() {
    let computer = Computer::new();
    let asked =
        computer.manager(&[("POST /api/v1/clans/family/machines/desk%2Efamily%2Eclan/ping", 200, pong(Some(3400)))]);
    computer
        .clan(&["ping", "desk.family.clan", "--count", "2"])
        .assert()
        .success()
        .stdout_eq(str![[r#"
desk.family.clan (fd01::2): 3.4 ms, relayed: relayed via attic, because no address of the machine answers directly
desk.family.clan (fd01::2): 3.4 ms, relayed

"#]])
        .stderr_eq(str![[r#"
2 of 2 echoes answered; 3.4 ms at least, 3.4 ms on average, 3.4 ms at most

"#]]);
    assert_eq!(asked.all().len(), 2);
    let output =
        computer.clan(&["ping", "desk.family.clan", "-c", "1", "--json"]).assert().success().get_output().clone();
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&summary["sent"], &summary["received"], &summary["mean_us"]), (&json!(1), &json!(1), &json!(3400)));
    assert_eq!(summary["last"]["path"]["kind"], "relayed");
}

#[test]
fn a_machine_that_does_not_answer_is_no_success() {
    let computer = Computer::new();
    computer.manager(&[("POST /api/v1/clans/family/machines/desk/ping", 200, pong(None))]);
    computer.clan(&["ping", "desk", "--clan", "family", "-c", "1"]).assert().code(1).stderr_eq(str![[r#"
0 of 1 echo answered
error: desk does not answer
hint: see when it was last heard of: `clan machines`

"#]]);
}
