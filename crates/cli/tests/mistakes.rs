//! What is said about each mistake that a person can make, word for word.

mod common;

use std::process::Stdio;

use common::Computer;
use snapbox::str;

#[test]
fn without_a_manager_it_says_how_to_start_one() {
    Computer::new().clan(&["status"]).assert().code(4).stdout_eq("").stderr_eq(str![[r#"
error: the manager is not running
why: nothing listens on [DATA]/run/manager.sock
hint: start it in another terminal: `clan manager`
hint: if it runs with another data folder, name that one: `--data DIR`

"#]]);
}

#[test]
fn a_socket_file_that_a_killed_manager_left_is_no_manager() {
    let computer = Computer::new();
    drop(computer.silent_manager());
    computer.clan(&["members"]).assert().code(4).stdout_eq("").stderr_eq(str![[r#"
error: the manager is not running
why: nothing listens on [DATA]/run/manager.sock
hint: start it in another terminal: `clan manager`
hint: if it runs with another data folder, name that one: `--data DIR`

"#]]);
}

#[test]
fn a_web_address_is_no_invitation() {
    Computer::new().clan(&["join", "https://example.org/join"]).assert().code(1).stdout_eq("").stderr_eq(str![[r#"
error: this is not a clan link
hint: an invitation starts with `clan://join/`: ask the person who invited you for it

"#]]);
}

#[test]
fn a_link_to_a_configuration_is_no_invitation() {
    Computer::new().clan(&["join", "clan://github.com/some/flake"]).assert().code(1).stdout_eq("").stderr_eq(str![[
        r#"
error: this link leads to a configuration, which this version of Clan cannot build yet
hint: an invitation starts with `clan://join/`: ask for one

"#
    ]]);
}

#[test]
fn a_truncated_link_is_incomplete() {
    let link = common::link();
    Computer::new().clan(&["join", &link[..link.len() - 7]]).assert().code(1).stdout_eq("").stderr_eq(str![[r#"
error: the invitation link is incomplete or damaged
hint: copy the whole link again, without line breaks, and put it in quotes

"#]]);
}

#[test]
fn a_link_with_a_changed_character_is_damaged() {
    let mut link = common::link();
    let at = link.len() / 2;
    let other = if &link[at..=at] == "A" { "B" } else { "A" };
    link.replace_range(at..=at, other);
    Computer::new().clan(&["join", &link]).assert().code(1).stdout_eq("").stderr_eq(str![[r#"
error: the invitation link is incomplete or damaged
hint: copy the whole link again, without line breaks, and put it in quotes

"#]]);
}

#[test]
fn a_link_of_a_newer_version_asks_for_an_update() {
    Computer::new().clan(&["join", &common::link_of_version(9)]).assert().code(1).stdout_eq("").stderr_eq(str![[r#"
error: the invitation link was made by a newer version of Clan (link version 9)
hint: update Clan on this computer, then try again

"#]]);
}

#[test]
fn a_link_on_stdin_is_checked_like_any_other() {
    Computer::new().clan(&["join", "-"]).stdin("not a link\n").assert().code(1).stdout_eq("").stderr_eq(str![[r#"
error: this is not a clan link
hint: an invitation starts with `clan://join/`: ask the person who invited you for it

"#]]);
}

#[test]
fn an_unknown_command_suggests_the_nearest() {
    Computer::new().clan(&["statsu"]).assert().code(2).stdout_eq("").stderr_eq(str![[r#"
error: unrecognized subcommand 'statsu'

  tip: a similar subcommand exists: 'status'

Usage: clan [OPTIONS] <COMMAND>

For more information, try '--help'.

"#]]);
}

#[test]
fn a_missing_argument_is_named() {
    Computer::new().clan(&["create"]).assert().code(2).stdout_eq("").stderr_eq(str![[r#"
error: the following required arguments were not provided:
  <NAME>

Usage: clan create --data <DIR> <NAME>

For more information, try '--help'.

"#]]);
}

#[test]
fn a_name_with_a_blank_says_what_names_may_hold() {
    Computer::new().clan(&["create", "My Clan"]).assert().code(2).stdout_eq("").stderr_eq(str![[r#"
error: invalid value 'My Clan' for '<NAME>': ` ` cannot be in a clan name: use a-z, 0-9 and inner hyphens

For more information, try '--help'.

"#]]);
}

#[test]
fn a_size_without_number_says_how_sizes_are_written() {
    Computer::new().clan(&["create", "family", "--memory", "much"]).assert().code(2).stdout_eq("").stderr_eq(str![[
        r#"
error: invalid value 'much' for '--memory <SIZE>': `much` is not a size: write for example 512M or 2G

For more information, try '--help'.

"#
    ]]);
}

#[test]
fn a_duration_without_unit_says_how_durations_are_written() {
    Computer::new().clan(&["invite", "--expires", "24"]).assert().code(2).stdout_eq("").stderr_eq(str![[r#"
error: invalid value '24' for '--expires <TIME>': `24` is not a duration: write for example 30m, 24h or 7d

For more information, try '--help'.

"#]]);
}

#[test]
fn an_unknown_role_lists_the_roles() {
    Computer::new().clan(&["invite", "--role", "king"]).assert().code(2).stdout_eq("").stderr_eq(str![[r#"
error: invalid value 'king' for '--role <ROLE>': `king` is not a role: use guest, member, admin or owner

For more information, try '--help'.

"#]]);
}

#[test]
fn without_a_home_it_asks_for_a_data_folder() {
    Computer::new()
        .clan(&["status"])
        .env_remove("HOME")
        .env_remove("CLAN_DATA")
        .assert()
        .code(1)
        .stdout_eq("")
        .stderr_eq(str![[r#"
error: there is no place for your data
why: neither XDG_DATA_HOME nor HOME is set
hint: name a folder: `--data DIR`

"#]]);
}

#[test]
fn with_json_an_error_is_one_object_on_stderr() {
    Computer::new().clan(&["status", "--json"]).assert().code(4).stdout_eq("").stderr_eq(str![[r#"
{"type":"urn:clan:problem:manager_not_running","code":"manager_not_running","message":"the manager is not running","why":"nothing listens on [DATA]/run/manager.sock","hints":["start it in another terminal: `clan manager`","if it runs with another data folder, name that one: `--data DIR`"],"exit":4}

"#]]);
}

#[test]
fn with_json_a_usage_error_is_one_object_too() {
    Computer::new().clan(&["--json", "statsu"]).assert().code(2).stdout_eq("").stderr_eq(str![[r#"
{"type":"urn:clan:problem:usage","code":"usage","message":"unrecognized subcommand 'statsu'","hints":["did you mean `status`?","for more information, try `--help`"],"exit":2}

"#]]);
}

#[test]
fn with_json_a_bad_link_is_one_object_too() {
    Computer::new().clan(&["join", "--json", "nonsense"]).assert().code(1).stdout_eq("").stderr_eq(str![[r#"
{"type":"urn:clan:problem:link_invalid","code":"link_invalid","message":"this is not a clan link","hints":["an invitation starts with `clan://join/`: ask the person who invited you for it"],"exit":1}

"#]]);
}

#[test]
fn a_reader_that_goes_away_ends_the_program_quietly() {
    let computer = Computer::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = std::process::Command::new(snapbox::cmd::cargo_bin!("clan"))
        .args(["completions", "bash"])
        .env_clear()
        .env("HOME", computer.data())
        .stdout(writer)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn help_names_every_exit_code() {
    Computer::new().clan(&["--help"]).assert().success().stderr_eq("").stdout_eq(str![[r#"
A private network of people and machines that nobody hosts

Usage: clan [OPTIONS] <COMMAND>

Commands:
  create       Found a clan
  invite       Make a link that lets somebody in
  invites      Show the invites that were made, and what became of them
  join         Accept an invitation
  open         Open a link that was clicked on
  device       Your devices: link a second computer, put a lost one out
  recover      Come back to a clan on a new computer, with your recovery phrase
  status       Show clans, machines and what needs attention
  members      Show who belongs to a clan
  machines     Show a clan's machines and how they are reached
  ping         See whether a machine answers, how fast, and by which path
  machine      Steer machines of the clan; admit phones and others by standard WireGuard
  rule         Who may reach what in a clan
  group        Groups of people and machines, for rules
  approve      Let somebody in whose invite asked for approval
  deny         Refuse somebody whose invite asked for approval
  role         Give a person another role
  rename       Give a person or a machine another name
  revoke       Put a person or a machine out of a clan, or withdraw an invite
  relay        Machines that pass packets on between machines that do not reach each other
  log          Show who decided what in a clan
  vm           This computer's machines in its clans
  image        What this computer's virtual machines boot from
  service      What the clan's machines offer
  web          Open the web page
  leave        Leave a clan, and delete its machine here
  manager      Run the manager: owns the virtual machines, serves the web page
  controller   Run the controller: makes a computer a clan's machine without a virtual one
  completions  Print completions for a shell

Options:
  -h, --help     Print help
  -V, --version  Print version

Global options:
      --data <DIR>         Folder with your clans, keys and images [default: $XDG_DATA_HOME/clan or
                           ~/.local/share/clan] [env: CLAN_DATA]
      --json               Print data as JSON
  -y, --yes                Answer questions with yes
      --timeout <SECONDS>  Give up when the manager has not answered for so many seconds [default:
                           60]
  -v, --verbose...         Log to stderr what the program does; twice for details

Getting started:
  clan create family            found a clan; its machine starts on this computer
  clan invite                   print a link that lets one person in
  clan join 'clan://join/…'     accept such a link
  clan web                      everything else, in the browser

Environment:
  CLAN_DATA                     the data folder, as `--data`
  CLAN_LOG                      what to log, such as `clan_manager=debug`
  NO_COLOR                      no colours if set

Exit codes:
  0    done
  1    refused, or a mistake that you can correct
  2    the command line was not understood
  3    whoever read the output went away
  4    the manager does not answer
  5    it took too long
  255  a mistake in Clan

Data goes to stdout, everything else to stderr. With --json an error is one JSON object on stderr.

"#]]);
}
