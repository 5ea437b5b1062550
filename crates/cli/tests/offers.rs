//! What is offered, and what an update would take: how it is shown before anything happens.

mod common;

use clan_types::{ClanId, ImageId};
use common::{Computer, link};
use serde_json::{Value, json};
use snapbox::str;

fn problem(code: &str, status: u16, message: &str, why: Option<&str>, hint: &str) -> String {
    let mut problem = json!({"type": format!("urn:clan:problem:{code}"), "code": code, "message": message, "hints": [hint], "status": status});
    if let Some(why) = why {
        problem["why"] = why.into();
    }
    problem.to_string()
}

#[test]
fn a_link_to_a_clan_that_is_here_names_it() {
    let computer = Computer::new();
    let already = problem(
        "already_joined",
        409,
        "this computer is in the clan `family` already",
        None,
        "see it with `clan status`; to join anew, leave it first: `clan leave family`",
    );
    computer.manager(&[("POST /api/v1/joins/preview", 409, already)]);
    computer.clan(&["join", &link(), "--yes"]).assert().code(1).stdout_eq("").stderr_eq(str![[r#"
error: this computer is in the clan `family` already
hint: see it with `clan status`; to join anew, leave it first: `clan leave family`

"#]]);
    computer.clan(&["join", &link(), "--dry-run", "--json"]).assert().code(1).stdout_eq("").stderr_eq(str![[r#"
{"type":"urn:clan:problem:already_joined","code":"already_joined","message":"this computer is in the clan `family` already","hints":["see it with `clan status`; to join anew, leave it first: `clan leave family`"],"status":409,"exit":1}

"#]]);
}

#[test]
fn an_image_that_is_not_the_clans_is_refused_with_who_gave_it() {
    let computer = Computer::new();
    let false_one = problem(
        "untrusted",
        502,
        "the image that is offered is not the clan's",
        Some("a false one came from laptop, and no other machine of the link gives it"),
        "tell whoever invited you, and ask for a link that another machine of the clan made",
    );
    computer.manager(&[("POST /api/v1/joins/preview", 502, false_one)]);
    computer.clan(&["join", &link(), "--yes"]).assert().code(1).stdout_eq("").stderr_eq(str![[r#"
error: the image that is offered is not the clan's
why: a false one came from laptop, and no other machine of the link gives it
hint: tell whoever invited you, and ask for a link that another machine of the clan made

"#]]);
}

fn container(missing: u64) -> String {
    json!({"clan": ClanId::from_bytes([1; 32]), "clan_name": "family", "fingerprint": "k3f9 2d8s 7qpa", "inviter": "anna", "role": "member", "expires": 4_000_000_000_000u64,
        "people": ["anna"], "machines": ["laptop"], "control_mode": "local", "integrated": null, "vm": null, "warnings": [],
        "network_layer": "mesh", "applications": ["web", "wiki"],
        "container": {"image": ImageId::from_bytes([9; 32]), "image_title": "Debian 12, small", "unpacked": 360u64 << 20, "memory": 512u64 << 20, "cpus": 2, "problem": null,
            "download": {"total": 180u64 << 20, "missing": missing}}})
    .to_string()
}

#[test]
fn a_container_says_what_it_takes_and_how_much_of_it_has_to_come() {
    let computer = Computer::new();
    computer.manager(&[("POST /api/v1/joins/preview", 200, container(60 << 20))]);
    computer.clan(&["join", &link(), "--container", "--dry-run"]).assert().success().stderr_eq("").stdout_eq(str![[
        r#"
  Clan          family
  Fingerprint   k3f9 2d8s 7qpa
  Invited by    anna
  Your role     member
  Expires       in [..]
  Members       1 person, 1 machine
  Will run      a container: Debian 12, small
  Image         beeqscijbe
  Apart         less than a virtual machine: it shares this computer's kernel
  Takes         at most 512 MiB of memory, 2 processors, where that can be bounded
  Disk          the image's 180 MiB, some 360 MiB to unpack it, and what it writes
  Download      60 MiB of 180 MiB; the rest is here
  Applications  web, wiki
  Network       mesh: encrypted, and directly between machines where that works
  Control       local: only you steer it

"#
    ]]);
    let computer = Computer::new();
    computer.manager(&[("POST /api/v1/joins/preview", 200, container(0))]);
    let shown = computer.clan(&["join", &link(), "--container", "--dry-run"]).assert().success();
    let shown = String::from_utf8_lossy(&shown.get_output().stdout).into_owned();
    assert!(shown.contains("nothing: its 180 MiB are here already"), "{shown}");
}

#[test]
fn the_size_that_a_person_asks_for_is_what_the_offer_is_judged_by() {
    let computer = Computer::new();
    let asked = computer.manager(&[]);
    computer.clan(&["join", &link(), "--memory", "1G", "--disk", "4G", "--cpus", "1", "--dry-run"]).assert().code(1);
    let expected =
        format!(r#"POST /api/v1/joins/preview {{"link":"{}","memory":1073741824,"disk":4294967296,"cpus":1}}"#, link());
    assert_eq!(asked.all(), [expected]);
}

#[test]
fn a_container_has_memory_and_processors_at_most_and_no_disk() {
    let computer = Computer::new();
    let asked = computer.manager(&[]);
    computer.clan(&["join", &link(), "--container", "--memory", "256M", "--cpus", "1", "--dry-run"]).assert().code(1);
    let asked = asked.all();
    for part in [r#""container":true"#, r#""memory":268435456"#, r#""cpus":1"#] {
        assert!(asked[0].contains(part), "{part} is missing in: {asked:?}");
    }
    let wrong = computer.clan(&["join", &link(), "--container", "--disk", "4G"]).assert().code(2);
    assert!(String::from_utf8_lossy(&wrong.get_output().stderr).contains("cannot be used with"));
}

fn plan(change: impl FnOnce(&mut Value)) -> String {
    let mut plan = json!({"clan": "family", "flavour": "vm", "before": ImageId::from_bytes([8; 32]), "image": ImageId::from_bytes([9; 32]), "image_title": "Debian 12, small",
        "source": "members", "download": {"total": 180u64 << 20, "missing": 24u64 << 20}});
    change(&mut plan);
    plan.to_string()
}

const PREVIEW: &str = "POST /api/v1/vms/family/update/preview";

#[test]
fn an_update_tells_which_image_and_how_much_has_to_come_and_needs_yes() {
    let computer = Computer::new();
    let asked = computer.manager(&[(PREVIEW, 200, plan(|_| ()))]);
    computer.clan(&["vm", "update", "family"]).assert().code(1).stdout_eq("").stderr_eq(str![[r#"
  Runs now    baeaqcaiba
  Next        Debian 12, small (beeqscijbe)
  Comes from  members of the clan
  Download    24 MiB of 180 MiB; the rest is here
error: this needs your consent, and there is no terminal to ask on
hint: add `--yes` to update without being asked; `--dry-run` shows the image

"#]]);
    computer.clan(&["vm", "update", "family", "--dry-run"]).assert().success().stderr_eq("").stdout_eq(str![[r#"
  Runs now    baeaqcaiba
  Next        Debian 12, small (beeqscijbe)
  Comes from  members of the clan
  Download    24 MiB of 180 MiB; the rest is here

"#]]);
    assert!(asked.all().iter().all(|asked| asked.starts_with(PREVIEW)), "nothing was done: {:?}", asked.all());
}

#[test]
fn what_was_shown_is_what_a_machine_is_updated_to() {
    let computer = Computer::new();
    let asked = computer.manager(&[(PREVIEW, 200, plan(|_| ()))]);
    computer.clan(&["vm", "update", "family", "--yes"]).assert().code(1);
    let image = ImageId::from_bytes([9; 32]);
    let update = format!(r#"POST /api/v1/vms/family/update {{"image":"{image}"}}"#);
    assert_eq!(asked.all(), [format!("{PREVIEW} {{}}"), update]);

    let computer = Computer::new();
    let build = plan(|plan| {
        plan["image"] = Value::Null;
        plan["source"] = "build".into();
    });
    let asked = computer.manager(&[(PREVIEW, 200, build)]);
    computer.clan(&["vm", "update", "family", "--build", "--yes"]).assert().code(1);
    let update = r#"POST /api/v1/vms/family/update {"build":true}"#;
    assert_eq!(asked.all(), [format!(r#"{PREVIEW} {{"build":true}}"#), update.to_owned()]);
}

#[test]
fn what_a_clan_wants_beyond_what_was_agreed_to_is_said_before_an_update() {
    let computer = Computer::new();
    let wants = "The clan's description asks for 1 GiB of memory: yours keeps its 512 MiB. `clan vm resize --memory 1G` gives it more.";
    computer.manager(&[(PREVIEW, 200, plan(|plan| plan["stays"] = json!([wants])))]);
    computer.clan(&["vm", "update", "family", "--dry-run"]).assert().success().stderr_eq(str![[r#"
warning: The clan's description asks for 1 GiB of memory: yours keeps its 512 MiB. `clan vm resize --memory 1G` gives it more.

"#]]);
    computer.clan(&["vm", "update", "family"]).assert().code(1).stderr_eq(str![[r#"
  Runs now    baeaqcaiba
  Next        Debian 12, small (beeqscijbe)
  Comes from  members of the clan
  Download    24 MiB of 180 MiB; the rest is here
warning: The clan's description asks for 1 GiB of memory: yours keeps its 512 MiB. `clan vm resize --memory 1G` gives it more.
error: this needs your consent, and there is no terminal to ask on
hint: add `--yes` to update without being asked; `--dry-run` shows the image

"#]]);
}

#[test]
fn what_was_shown_of_a_clan_is_what_is_joined() {
    let computer = Computer::new();
    let asked = computer.manager(&[("POST /api/v1/joins/preview", 200, container(0))]);
    computer.clan(&["join", &link(), "--container", "--machine", "desk", "--yes"]).assert().code(1);
    let image = ImageId::from_bytes([9; 32]);
    let agreed = format!(r#""agreed":{{"image":"{image}","network_layer":"mesh","applications":["web","wiki"]}}"#);
    assert!(asked.all()[1].starts_with("POST /api/v1/joins ") && asked.all()[1].contains(&agreed), "{:?}", asked.all());

    let mut vm: Value = serde_json::from_str(&container(0)).unwrap();
    vm["vm"] = json!({"image": image, "image_title": "Debian 12, small", "download": vm["container"]["download"], "memory": 512u64 << 20,
        "disk": 2u64 << 30, "cpus": 2, "accelerator": {"kind": "kvm", "reason": "it works"}});
    vm["container"] = Value::Null;
    let computer = Computer::new();
    let asked = computer.manager(&[("POST /api/v1/joins/preview", 200, vm.to_string())]);
    computer.clan(&["join", &link(), "--machine", "desk", "--yes"]).assert().code(1);
    let size = r#""memory":536870912,"disk":2147483648,"cpus":2"#;
    assert!(asked.all()[1].contains(size) && asked.all()[1].contains(&agreed), "{:?}", asked.all());
}

#[test]
fn a_publication_is_shown_with_all_that_belongs_to_it_and_signed_as_shown() {
    let computer = Computer::new();
    let vm = |image: u8, control: &str, apps: &[&str]| {
        json!({"image": ImageId::from_bytes([image; 32]), "title": "Debian 12, small", "memory": 512u64 << 20, "cpus": 1, "disk": 2u64 << 30,
            "network_layer": "mesh", "control_mode": control, "applications": apps})
    };
    let plan =
        json!({"clan": "family", "before": vm(8, "local", &[]), "after": vm(9, "shared", &["web"]), "entries": 0})
            .to_string();
    let asked = computer.manager(&[("POST /api/v1/clans/family/image", 200, plan)]);
    let published = ["image", "publish", "beeq", "--clan", "family", "--control", "shared", "--apps", "web", "--yes"];
    computer.clan(&published).assert().success().stdout_eq("").stderr_eq(str![[r#"
Image         Debian 12, small (beeqscijbe), so far Debian 12, small (baeaqcaiba)
Memory        512 MiB
Processors    1
Disk          up to 2 GiB
Network       mesh
Control       shared, so far local
Applications  web, so far none that is named
Newcomers to family run it from now on.

"#]]);
    let image = ImageId::from_bytes([9; 32]);
    assert!(
        asked.all()[0].contains(r#""control_mode":"shared","applications":["web"],"dry_run":true"#),
        "{:?}",
        asked.all()
    );
    let signed = format!(
        r#"{{"image":"{image}","memory":536870912,"cpus":1,"disk":2147483648,"network_layer":"mesh","control_mode":"shared","applications":["web"],"dry_run":false}}"#
    );
    assert!(asked.all()[1].ends_with(&signed), "{:?}", asked.all());
    computer.clan(&["image", "publish", "beeq", "--clan", "family", "--apps", "Not a name"]).assert().code(2);
}

#[test]
fn a_machine_that_runs_what_is_published_is_left_alone() {
    let computer = Computer::new();
    let same = plan(|plan| plan["before"] = plan["image"].clone());
    let asked = computer.manager(&[(PREVIEW, 200, same)]);
    computer.clan(&["vm", "update", "family", "--yes"]).assert().success().stdout_eq("").stderr_eq(str![[r#"
It runs exactly this image already.

"#]]);
    assert_eq!(asked.all().len(), 1);
}

#[test]
fn downloads_that_broke_off_are_collected_even_if_every_image_is_run() {
    let computer = Computer::new();
    let left = json!({"removed": [], "unfinished": 1, "freed": 60u64 << 20}).to_string();
    computer.manager(&[
        ("DELETE /api/v1/images?dry_run=true", 200, left.clone()),
        ("DELETE /api/v1/images?dry_run=false", 200, left),
    ]);
    computer.clan(&["image", "gc", "--dry-run"]).assert().success().stdout_eq("").stderr_eq(str![[r#"
Would remove 1 download that broke off, 60 MiB.

"#]]);
    computer.clan(&["image", "gc", "--yes"]).assert().success().stdout_eq("").stderr_eq(str![[r#"
Removed 1 download that broke off, 60 MiB.

"#]]);
}
