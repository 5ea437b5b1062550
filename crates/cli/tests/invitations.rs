//! What `clan join` understands as an invitation, and what `clan invite` gives.

mod common;

use common::Computer;
use snapbox::str;

/// Where `clan join` gets to with a link: the question to the manager.
fn asked_of(arguments: &[&str], stdin: &str, found: Option<&str>) -> Vec<String> {
    let computer = Computer::new();
    let found = found.map(|link| format!(r#"{{"link":"{link}"}}"#)).unwrap_or_default();
    let asked = computer.manager(&[("POST /api/v1/joins/invitation", 200, found)]);
    let arguments: Vec<&str> = ["join", "--dry-run"].into_iter().chain(arguments.iter().copied()).collect();
    computer.clan(&arguments).stdin(stdin.to_owned()).assert().code(1);
    asked.all()
}

fn preview(link: &str) -> String {
    format!(r#"POST /api/v1/joins/preview {{"link":"{link}"}}"#)
}

#[test]
fn a_pasted_link_may_have_quotes_words_and_line_breaks_in_it() {
    let link = common::link();
    let (front, back) = link.split_at(60);
    for pasted in [format!("  “{link}”,"), format!("Hello,\nhere: <{link}>"), format!("{front}\n{back}")] {
        assert_eq!(asked_of(&[&pasted], "", None), [preview(&link)]);
    }
    assert_eq!(asked_of(&[front, back], "", None), [preview(&link)], "broken by the shell");
    assert_eq!(asked_of(&[], &format!("\n> {front}\n> {back}\n"), None), [preview(&link)], "on stdin");
}

#[test]
fn four_words_are_looked_for_with_quotes_around_them_or_without() {
    let link = common::link();
    let looked = r#"POST /api/v1/joins/invitation {"text":"river table moon robot"}"#.to_owned();
    let all = [looked, preview(&link)];
    assert_eq!(asked_of(&["river", "table", "moon", "robot"], "", Some(&link)), all);
    assert_eq!(asked_of(&["River-Tabl-moon-ROBOT"], "", Some(&link)), all);
    assert_eq!(asked_of(&["-"], "river table\nmoon robot\n", Some(&link)), all);
    let at_relay = r#"POST /api/v1/joins/invitation {"text":"river table moon robot","relay":"203.0.113.7:8443"}"#;
    let given = ["river", "table", "moon", "robot", "--relay", "203.0.113.7:8443"];
    assert_eq!(asked_of(&given, "", Some(&link)), [at_relay.to_owned(), preview(&link)]);
}

#[test]
fn a_relay_is_named_along_with_words_only() {
    Computer::new().clan(&["join", &common::link(), "--relay", "203.0.113.7"]).assert().code(1).stderr_eq(str![[r#"
error: a relay is named along with words only
why: a link names the relays of its clan itself
hint: leave `--relay` out

"#]]);
}

#[test]
fn a_failure_after_the_words_were_used_up_says_how_to_go_on() {
    let computer = Computer::new();
    let link = common::link();
    computer.manager(&[("POST /api/v1/joins/invitation", 200, format!(r#"{{"link":"{link}"}}"#))]);
    let refused = computer.clan(&["join", "river", "table", "moon", "robot"]).assert().code(1);
    let said = String::from_utf8(refused.get_output().stderr.clone()).unwrap();
    assert!(said.contains(&format!("hint: the words are used up; to try again: clan join '{link}'")), "{said}");
}

#[test]
fn a_misspelt_word_is_named_before_anybody_is_asked() {
    Computer::new().clan(&["join", "river", "table", "mooon", "robot"]).assert().code(1).stdout_eq("").stderr_eq(str![
        [r#"
error: `mooon` is not one of the words that invitations are made of
hint: did you mean `moon`?

"#]
    ]);
}

#[test]
fn too_few_words_are_counted() {
    Computer::new().clan(&["join", "river", "table", "moon"]).assert().code(1).stdout_eq("").stderr_eq(str![[r#"
error: an invitation in words has four of them; here are 3
hint: type all four, with blanks between them: `clan join one two three four`

"#]]);
}

#[test]
fn a_picture_that_is_not_there_is_named() {
    Computer::new().clan(&["join", "invite.png"]).assert().code(1).stdout_eq("").stderr_eq(str![[r#"
error: invite.png cannot be read
why: No such file or directory (os error 2)

"#]]);
}

fn invite(words: &str) -> (&'static str, u16, String) {
    let link = common::link();
    let id = "a".repeat(52);
    let answer = format!(
        r#"{{"link":"{link}","invite":"{id}","clan_name":"family","fingerprint":"abcd-efgh","role":"member","uses":1,"expires":1{words}}}"#
    );
    ("POST /api/v1/clans/family/invites", 201, answer)
}

#[test]
fn a_written_picture_leads_to_the_link_again() {
    let computer = Computer::new();
    let asked = computer.manager(&[invite("")]);
    let dir = tempfile::tempdir().unwrap();
    let picture = dir.path().join("invite.png");
    let picture = picture.to_str().unwrap();
    let args = ["invite", "family", "--qr-file", picture];
    computer.clan(&args).assert().success().stdout_eq(format!("{}\n", common::link()));
    computer.clan(&["join", "--dry-run", picture]).assert().code(1);
    assert_eq!(asked.all()[1], preview(&common::link()));
    // The link is printed all the same, and the picture that is there stays.
    let again = computer.clan(&args).assert().code(1).stdout_eq(format!("{}\n", common::link()));
    let said = String::from_utf8(again.get_output().stderr.clone()).unwrap();
    assert!(said.contains("hint: name a file that is not there yet"), "{said}");
}

#[test]
fn the_qr_code_is_shown_where_it_is_asked_for_and_nowhere_else() {
    let computer = Computer::new();
    computer.manager(&[invite("")]);
    let stderr = |args: &[&str]| {
        let done = computer.clan(args).assert().success().stdout_eq(format!("{}\n", common::link()));
        String::from_utf8(done.get_output().stderr.clone()).unwrap()
    };
    assert_eq!(stderr(&["invite", "family"]), "");
    assert!(stderr(&["invite", "family", "--qr"]).contains('▀'));
}

#[test]
fn words_are_in_the_json_of_an_invite() {
    let computer = Computer::new();
    computer.manager(&[invite(r#","words":"river table moon robot","words_expire":2"#)]);
    let done = computer.clan(&["invite", "family", "--json"]).assert().success();
    let json: serde_json::Value = serde_json::from_slice(&done.get_output().stdout).unwrap();
    assert_eq!((&json["words"], &json["words_expire"]), (&"river table moon robot".into(), &2.into()));
}
