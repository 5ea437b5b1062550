//! Putting out, roles, names, approval, invites that were made, and the log: what is said, and what is asked of the
//! manager.

mod common;

use clan_types::{EntryId, InviteId, MachineId, PersonId};
use common::Computer;
use serde_json::{Value, json};
use snapbox::str;

const REVOKE: &str = "POST /api/v1/clans/family/revocations";

fn revocation(kind: &str, id: String, name: &str, machines: &[&str]) -> Value {
    json!({"kind": kind, "id": id, "name": name, "machines": machines, "entries": 0, "already": false})
}

fn ben() -> Value {
    revocation("person", PersonId::from_bytes([2; 32]).to_string(), "ben", &["attic", "desk"])
}

#[test]
fn putting_somebody_out_says_whom_it_takes_along_and_needs_yes() {
    let computer = Computer::new();
    let asked = computer.manager(&[(REVOKE, 200, ben().to_string())]);
    computer.clan(&["revoke", "person", "ben", "--clan", "family"]).assert().code(1).stdout_eq("").stderr_eq(str![[
        r#"
error: this needs your consent, and there is no terminal to ask on
hint: add `--yes` to revoke without being asked

"#
    ]]);
    assert_eq!(asked.all(), [format!(r#"{REVOKE} {{"kind":"person","subject":"ben","dry_run":true}}"#)]);
}

#[test]
fn a_dry_run_only_says_what_would_happen() {
    let computer = Computer::new();
    let asked = computer.manager(&[(REVOKE, 200, ben().to_string())]);
    computer
        .clan(&["revoke", "person", "ben", "--clan", "family", "--dry-run", "--yes"])
        .assert()
        .success()
        .stdout_eq("")
        .stderr_eq(str![[r#"
Would put ben out, with 2 machines (attic, desk).

"#]]);
    assert_eq!(asked.all().len(), 1);
}

#[test]
fn what_was_shown_is_what_is_put_out_by_its_id() {
    let computer = Computer::new();
    let asked = computer.manager(&[(REVOKE, 200, ben().to_string())]);
    computer
        .clan(&["revoke", "person", "ben", "--clan", "family", "--yes"])
        .assert()
        .success()
        .stdout_eq("")
        .stderr_eq(str![[r#"
ben is out, with 2 machines (attic, desk).

"#]]);
    let id = PersonId::from_bytes([2; 32]);
    assert_eq!(asked.all()[1], format!(r#"{REVOKE} {{"kind":"person","subject":"{id}","dry_run":false}}"#));
}

#[test]
fn a_machine_and_an_invite_have_their_own_words() {
    for (noun, answer, said) in [
        (
            "machine",
            revocation("machine", MachineId::from_bytes([3; 32]).to_string(), "attic", &["attic"]),
            "The machine attic is out.\n",
        ),
        (
            "invite",
            revocation("invite", InviteId::from_bytes([5; 32]).to_string(), "anna", &[]),
            "The invite auc[..] of anna is withdrawn.\n",
        ),
    ] {
        let computer = Computer::new();
        computer.manager(&[(REVOKE, 200, answer.to_string())]);
        computer
            .clan(&["revoke", noun, "abcdef", "--clan", "family", "--yes"])
            .assert()
            .success()
            .stdout_eq("")
            .stderr_eq(said);
    }
}

#[test]
fn who_is_out_already_is_no_mistake() {
    let computer = Computer::new();
    let mut out = ben();
    out["already"] = json!(true);
    out["machines"] = json!([]);
    computer.manager(&[(REVOKE, 200, out.to_string())]);
    computer
        .clan(&["revoke", "person", "ben", "--clan", "family"])
        .assert()
        .success()
        .stdout_eq("")
        .stderr_eq("ben is out already.\n");
}

#[test]
fn whoever_may_not_is_told_before_being_asked() {
    let computer = Computer::new();
    let refused = json!({"type": "urn:clan:problem:not_allowed", "code": "not_allowed", "message": "you may not put ben out",
        "why": "it takes the role admin, and you are member", "hints": ["ask somebody who may: anna (owner)"], "status": 403});
    computer.manager(&[(REVOKE, 403, refused.to_string())]);
    computer.clan(&["revoke", "person", "ben", "--clan", "family"]).assert().code(1).stdout_eq("").stderr_eq(str![[
        r#"
error: you may not put ben out
why: it takes the role admin, and you are member
hint: ask somebody who may: anna (owner)

"#
    ]]);
}

fn invites() -> Value {
    let invite = |byte: u8, state: &str, used: u32, came: Value| {
        json!({"id": InviteId::from_bytes([byte; 32]), "state": state, "role": "member", "uses": 1, "used": used, "expires": 4_000_000_000_000u64,
            "made": 1_000_000_000_000u64, "by": PersonId::from_bytes([1; 32]), "by_name": "anna", "redeemed_by": came})
    };
    json!([
        invite(5, "used", 1, json!(["ben"])),
        invite(6, "expired", 0, json!([])),
        invite(7, "withdrawn", 0, json!([])),
        invite(8, "open", 0, json!([]))
    ])
}

#[test]
fn invites_are_shown_with_what_became_of_them() {
    let computer = Computer::new();
    computer.manager(&[("GET /api/v1/clans/family/invites", 200, invites().to_string())]);
    computer.clan(&["invites", "family"]).assert().success().stderr_eq("").stdout_eq(str![[r#"
INVITE      STATE[..]ROLE    USED    BY    MADE[..]WHO CAME IN
aucqkbifau  used[..]member  1 of 1  anna  [..] ago  ben
aydambqgay  expired[..]member  0 of 1  anna  [..] ago
a4dqobyha4  withdrawn[..]member  0 of 1  anna  [..] ago
baeaqcaiba  open for [..]  member  0 of 1  anna  [..] ago

"#]]);
    computer.clan(&["invites", "family", "--open"]).assert().success().stderr_eq("").stdout_eq(str![[r#"
INVITE      STATE[..]ROLE    USED    BY    MADE[..]WHO CAME IN
baeaqcaiba  open for [..]  member  0 of 1  anna  [..] ago

"#]]);
}

#[test]
fn without_invites_it_says_how_to_make_one() {
    let computer = Computer::new();
    computer.manager(&[("GET /api/v1/clans/family/invites", 200, "[]".to_owned())]);
    computer.clan(&["invites", "family"]).assert().success().stdout_eq("").stderr_eq(str![[r#"
There are none. Make one: `clan invite`.

"#]]);
    computer.clan(&["invites", "family", "--json"]).assert().success().stdout_eq("[]\n").stderr_eq("");
}

#[test]
fn the_log_tells_who_did_what_and_why_something_has_no_effect() {
    let computer = Computer::new();
    let entry = |byte: u8, by: &str, name: &str, what: &str| json!({"id": EntryId::from_bytes([byte; 32]), "at": 1_790_000_000_000u64 + u64::from(byte) * 1000, "by": by, "author": "x", "author_name": name, "what": what});
    let mut void = entry(3, "person", "ben", "invited one person as owner (abcdefghij)");
    void["void"] = json!("its author's role does not allow it");
    let log = json!({"total": 12, "entries": [
        entry(1, "person", "anna", "invited one person as member (abcdefghij)"),
        entry(2, "machine", "laptop", "let ben\u{1b}[2J in"),
        void,
    ]});
    computer.manager(&[("GET /api/v1/clans/family/log?limit=3", 200, log.to_string())]);
    computer.clan(&["log", "family", "-n", "3"]).assert().success().stdout_eq(str![[r#"
TIME                 WHO             WHAT
2026-09-21 14:13:21  anna            invited one person as member (abcdefghij)
2026-09-21 14:13:22  machine laptop  let ben·[2J in
2026-09-21 14:13:23  ben             invited one person as owner (abcdefghij); without effect: its author's role does not allow it

"#]]).stderr_eq(str![[r#"
9 earlier entries are not shown: `clan log -n 12`

"#]]);
}

const ROLES: &str = "POST /api/v1/clans/family/roles";
const NAMES: &str = "POST /api/v1/clans/family/names";
const ADMISSIONS: &str = "POST /api/v1/clans/family/admissions";

fn role_change(from: &str, to: &str) -> Value {
    json!({"id": PersonId::from_bytes([2; 32]), "name": "ben", "from": from, "to": to, "entries": 1})
}

#[test]
fn a_role_is_given_after_asking_and_by_the_id_that_was_shown() {
    let computer = Computer::new();
    let asked = computer.manager(&[(ROLES, 200, role_change("member", "admin").to_string())]);
    computer.clan(&["role", "ben", "admin", "--clan", "family"]).assert().code(1).stdout_eq("").stderr_eq(str![[r#"
error: this needs your consent, and there is no terminal to ask on
hint: add `--yes` to change roles without being asked

"#]]);
    computer.clan(&["role", "ben", "admin", "--clan", "family", "--dry-run"]).assert().success().stderr_eq(str![[r#"
Would make ben admin, who is member.

"#]]);
    computer.clan(&["role", "ben", "admin", "--clan", "family", "--yes"]).assert().success().stdout_eq("").stderr_eq(
        str![[r#"
ben is admin now; they were member.

"#]],
    );
    let id = PersonId::from_bytes([2; 32]);
    let last = asked.all().pop().unwrap();
    assert_eq!(last, format!(r#"{ROLES} {{"person":"{id}","role":"admin","dry_run":false}}"#));
    assert_eq!(asked.all().iter().filter(|request| request.contains(r#""dry_run":false"#)).count(), 1);
}

#[test]
fn a_role_that_is_theirs_already_is_no_mistake() {
    let computer = Computer::new();
    let asked = computer.manager(&[(ROLES, 200, role_change("admin", "admin").to_string())]);
    computer.clan(&["role", "ben", "admin", "--clan", "family"]).assert().success().stdout_eq("").stderr_eq(str![[
        r#"
ben is admin already.

"#
    ]]);
    assert_eq!(asked.all().len(), 1);
    computer.clan(&["role", "ben", "king", "--clan", "family"]).assert().code(2);
}

#[test]
fn a_machine_is_renamed_without_being_asked() {
    let computer = Computer::new();
    let answer = json!({"kind": "machine", "id": "abc", "from": "laptop", "to": "nas", "entries": 1});
    let asked = computer.manager(&[(NAMES, 201, answer.to_string())]);
    computer
        .clan(&["rename", "machine", "laptop", "nas", "--clan", "family"])
        .assert()
        .success()
        .stdout_eq("")
        .stderr_eq(str![[r#"
Renamed the machine laptop to nas.

"#]]);
    let request = r#"{"kind":"machine","subject":"laptop","name":"nas","dry_run":false}"#;
    assert_eq!(asked.all(), [format!("{NAMES} {request}")]);
    let json = computer.clan(&["rename", "person", "laptop", "nas", "--clan", "family", "--json"]).assert().success();
    let shown: Value = serde_json::from_slice(&json.get_output().stdout).unwrap();
    assert_eq!(shown, answer);
}

#[test]
fn newcomers_who_wait_are_shown_and_decided_about() {
    let computer = Computer::new();
    let (ben, finn) = (PersonId::from_bytes([2; 32]), PersonId::from_bytes([3; 32]));
    let people = json!([
        {"id": ben, "name": "ben", "role": "admin", "this": true},
        {"id": finn, "name": "finn", "role": "member", "this": false, "waiting": true},
    ]);
    let decision = |approve: bool| json!({"id": finn, "name": "finn", "role": "member", "invited_by": "ben", "approve": approve, "entries": 1});
    let asked = computer.manager(&[
        ("GET /api/v1/clans/family/members", 200, people.to_string()),
        (ADMISSIONS, 200, decision(true).to_string()),
    ]);
    computer
        .clan(&["members", "family"])
        .assert()
        .success()
        .stdout_eq(str![[r#"
NAME  ROLE    KEY
ben   admin   aibaeaqcai  you
finn  member  ambqgaydam  waits for approval

"#]])
        .stderr_eq(str![[r#"
Let somebody in, or not: `clan approve NAME`, `clan deny NAME`.

"#]]);
    computer.clan(&["approve", "finn", "--clan", "family", "--dry-run"]).assert().success().stderr_eq(str![[r#"
Would let finn in as member, invited by ben.

"#]]);
    computer.clan(&["approve", "finn", "--clan", "family"]).assert().code(1).stderr_eq(str![[r#"
error: this needs your consent, and there is no terminal to ask on
hint: add `--yes` to decide without being asked

"#]]);
    computer.clan(&["approve", "finn", "--clan", "family", "--yes"]).assert().success().stdout_eq("").stderr_eq(str![
        [r#"
finn is in, as member.

"#]
    ]);
    let last = asked.all().pop().unwrap();
    assert_eq!(last, format!(r#"{ADMISSIONS} {{"person":"{finn}","approve":true,"dry_run":false}}"#));
    let computer = Computer::new();
    computer.manager(&[(ADMISSIONS, 200, decision(false).to_string())]);
    computer.clan(&["deny", "finn", "--clan", "family", "--yes"]).assert().success().stdout_eq("").stderr_eq(str![[
        r#"
finn stays out. The use of the invite stays used: to invite them again takes a new one.

"#
    ]]);
}
