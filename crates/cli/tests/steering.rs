//! Steering machines, as the command line tells it.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

mod common;

use clan_types::{ClanId, MachineId, PersonId};
use common::Computer;
use serde_json::{Value, json};
use snapbox::cmd::OutputAssert;

const NOW: u64 = 1_790_000_000_000;
const CLANS: &str = "GET /api/v1/clans";

fn clans() -> String {
    json!([{"id": ClanId::from_bytes([1; 32]), "name": "family", "fingerprint": "k3f9", "phase": "ready", "person": PersonId::from_bytes([1; 32]), "role": "admin",
        "machine_name": "laptop", "online": true, "as_of": NOW, "people": [], "machines": [], "services": [], "problems": []}]).to_string()
}

fn path(what: &str) -> &'static str {
    let (method, what) = what.split_once(' ').unwrap();
    Box::leak(format!("{method} /api/v1/clans/{}/machines/desk/{what}", ClanId::from_bytes([1; 32])).into_boxed_str())
}

fn entry(number: u64, more: Value) -> Value {
    let mut entry = json!({"number": number, "at": NOW + number, "person": PersonId::from_bytes([1; 32]), "person_name": "anna", "from": MachineId::from_bytes([1; 32]),
        "from_name": "laptop", "here": false});
    for (name, value) in more.as_object().unwrap() {
        entry[name] = value.clone();
    }
    entry
}

fn setting() -> Value {
    entry(3, json!({"deed": "setting", "setting": "announce", "before": "on", "after": "off"}))
}

/// What was said on both ways out, which has all of these parts.
fn says(ended: &OutputAssert, parts: &[&str]) {
    let output = ended.get_output();
    let said = [&output.stdout[..], &output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    for part in parts {
        assert!(said.contains(part), "{part:?} is missing in: {said}");
    }
}

#[test]
fn a_journal_says_who_did_what_from_where() {
    let computer = Computer::new();
    let mode =
        json!({"deed": "control_mode", "before": "local", "after": "shared", "here": true, "person_name": "ben"});
    let back = json!({"deed": "setting", "setting": "announce", "before": "off", "after": "on", "reverts": 3, "here": true, "person_name": "ben"});
    let journal = json!([
        entry(2, mode),
        setting(),
        entry(4, back),
        entry(5, json!({"deed": "terminal", "ended": NOW + 90_005})),
        entry(6, json!({"deed": "terminal"}))
    ]);
    computer.manager(&[(CLANS, 200, clans()), (path("GET journal"), 200, journal.to_string())]);
    let told = computer.clan(&["machine", "journal", "desk"]).assert().success().stderr_eq("");
    for parts in [
        &["control from local to shared", "ben", "its own computer"][..],
        &["announce from on to off", "anna", "laptop"],
        &["announce from off to on, which takes 3 back"],
        &["terminal, for 1 min 30 s", "terminal, open"],
    ] {
        says(&told, parts);
    }
}

#[test]
fn a_change_tells_how_to_take_it_back() {
    let computer = Computer::new();
    let change = json!({"entry": setting()}).to_string();
    let asked = computer.manager(&[
        (CLANS, 200, clans()),
        (path("POST settings"), 201, change),
        (path("POST reverts"), 200, json!({"entry": null}).to_string()),
    ]);
    let set = computer.clan(&["machine", "set", "desk", "announce=off"]).assert().success().stdout_eq("");
    says(&set, &["Changed on desk: announce from on to off.", "clan machine revert desk 3"]);
    let back = computer.clan(&["machine", "revert", "desk", "3"]).assert().success().stdout_eq("");
    says(&back, &["Nothing changes: desk is set so already."]);
    says(&computer.clan(&["machine", "set", "desk", "announce"]).assert().code(2), &["write for example announce=off"]);
    assert!(asked.all().iter().any(|a| a.ends_with(r#"{"name":"announce","value":"off"}"#)), "{:?}", asked.all());
}

fn image(n: u8) -> String {
    clan_types::ImageId::from_bytes([n; 32]).to_string()
}

#[test]
fn another_image_is_shown_then_asked_about_then_ordered() {
    let computer = Computer::new();
    let change =
        json!({"entry": entry(7, json!({"deed": "image", "before": image(1), "after": image(2)}))}).to_string();
    let asked = computer.manager(&[(CLANS, 200, clans()), (path("POST update"), 200, change)]);
    let would = computer.clan(&["machine", "update", "desk", "--dry-run"]).assert().success().stdout_eq("");
    let what = format!("image from {} to {}", &image(1)[..10], &image(2)[..10]);
    says(&would, &[&format!("Would change on desk: {what}.")]);
    let unasked = computer.clan(&["machine", "update", "desk"]).assert().code(1).stdout_eq("");
    says(&unasked, &["needs your consent", "--yes", "--dry-run"]);
    let orders =
        || asked.all().iter().filter(|a| a.contains("update") && !a.contains("dry_run")).cloned().collect::<Vec<_>>();
    assert!(orders().is_empty(), "{:?}", orders());
    let done = computer.clan(&["machine", "update", "desk", "--yes"]).assert().success().stdout_eq("");
    says(&done, &["Its computer begins", &what, "clan machine revert desk 7"]);
    // What was shown is what is ordered.
    assert!(
        matches!(&orders()[..], [one] if one.ends_with(&format!(r#"{{"image":"{}"}}"#, image(2)))),
        "{:?}",
        orders()
    );
}

#[test]
fn the_image_that_a_machine_has_already_is_not_ordered() {
    let computer = Computer::new();
    let asked =
        computer.manager(&[(CLANS, 200, clans()), (path("POST update"), 200, json!({"entry": null}).to_string())]);
    says(
        &computer.clan(&["machine", "update", "desk"]).assert().success(),
        &["Nothing changes: desk is set so already."],
    );
    assert!(asked.all().iter().filter(|a| a.contains("update")).all(|a| a.contains("dry_run")), "{:?}", asked.all());
}

#[test]
fn a_refusal_says_who_may_and_how_that_is_changed() {
    let computer = Computer::new();
    let refusal = json!({"type": "urn:clan:problem:not_allowed", "code": "not_allowed", "message": "only ben steers desk, at its own computer",
        "why": "its control mode is local", "hints": ["ben can let the clan's admins do it, there: `clan vm control shared`"], "status": 403});
    computer.manager(&[(CLANS, 200, clans()), (path("GET report"), 403, refusal.to_string())]);
    let refused = computer.clan(&["machine", "stats", "desk"]).assert().code(1).stdout_eq("");
    says(&refused, &["error: only ben steers desk", "why: its control mode is local", "hint: ben can let"]);
}

#[test]
fn a_shell_needs_a_terminal_and_a_restart_an_answer() {
    let computer = Computer::new();
    let asked = computer.manager(&[(CLANS, 200, clans())]);
    says(
        &computer.clan(&["machine", "terminal", "desk"]).assert().code(1),
        &["a shell needs a terminal", "-- COMMAND"],
    );
    says(&computer.clan(&["machine", "restart", "desk"]).assert().code(1), &["needs your consent", "--yes"]);
    assert!(asked.all().iter().all(|a| a == CLANS), "{:?}", asked.all());
}

#[test]
fn others_are_let_in_after_a_question_only() {
    let computer = Computer::new();
    let control = "POST /api/v1/vms/family/control";
    let change = json!({"machine": "laptop", "before": "local", "mode": "shared"}).to_string();
    let asked = computer.manager(&[(control, 200, change), ("GET /api/v1/vms", 200, "[]".into())]);
    let unasked = computer.clan(&["vm", "control", "shared", "family"]).assert().code(1).stdout_eq("");
    says(&unasked, &["a terminal as root in the virtual machine", "needs your consent"]);
    assert!(asked.all().iter().filter(|a| a.starts_with(control)).all(|a| a.contains("dry_run")), "{:?}", asked.all());
    let done = computer.clan(&["vm", "control", "shared", "family", "--yes"]).assert().success().stdout_eq("");
    says(&done, &["The control mode of laptop is shared now; it was local."]);
    says(&computer.clan(&["vm", "control", "everybody"]).assert().code(2), &["use local, shared or remote"]);
}

#[test]
fn help_says_what_is_steered_and_by_whom() {
    let help = Computer::new().clan(&["machine", "--help"]).assert().success().stderr_eq("");
    says(&help, &["stats", "logs", "settings", "set", "journal", "revert", "restart", "terminal", "suggest", "update"]);
    let help = Computer::new().clan(&["vm", "control", "--help"]).assert().success().stderr_eq("");
    says(&help, &["local    you alone", "remote   the clan's admins", "shared   both"]);
}

#[test]
fn the_manager_of_a_service_can_be_started_again_while_its_machines_run() {
    let computer = Computer::new();
    let printed = computer.clan(&["manager", "--print-unit"]).assert().success();
    let text = String::from_utf8_lossy(&printed.get_output().stdout).into_owned();
    // Machines outlive the process, and the controllers that bound them stay enabled for as long as it runs.
    for line in ["KillMode=process", "Delegate=cpu memory pids", "Restart=on-failure"] {
        assert!(text.lines().any(|l| l == line), "{line} is missing in: {text}");
    }
}
