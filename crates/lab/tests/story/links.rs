//! Invitation links that must not work.

use std::time::Duration;

use clan_lab::{Lab, LabError, Person, story};
use clan_types::InviteLink;

use crate::{Checked, Checks, refused};

const MANAGER: Duration = Duration::from_secs(20);

/// `used` is a link for one person, whom it let in.
pub(crate) fn check(checks: &mut Checks, lab: &mut Lab, used: &str) {
    checks.that("a stranger's manager starts", || lab.person("stranger").start_manager(MANAGER));
    let stranger = &*lab.person("stranger");
    checks.that("a used link is refused", || attempt(stranger, used, &["used"]));
    checks.that("a truncated link is called damaged", || {
        attempt(stranger, &used[..used.len() - 9], &["incomplete or damaged"])
    });
    checks.that("a tampered link is called damaged", || attempt(stranger, &tampered(used), &["incomplete or damaged"]));
    checks.that("a foreign link is told apart", || {
        attempt(stranger, "https://example.org/join/me", &["not a clan link"])
    });

    let invited = lab.person("founder").clan(&["invite", "--expires", "1s"]).and_then(clan_lab::Finished::success);
    // That it has expired is what is tested; the clan's own clocks decide, so there is nothing to wait for but time.
    std::thread::sleep(Duration::from_millis(1500));
    let stranger = &*lab.person("stranger");
    checks.that("an expired link is refused", || attempt(stranger, &story::link_in(&invited?.stdout)?, &["expired"]));

    let invited = lab.person("founder").clan(&["invite"]).and_then(clan_lab::Finished::success);
    let stranger = &*lab.person("stranger");
    checks.that("a link with an old address still finds its machine on the same LAN", || {
        let link = with_old_addresses(&story::link_in(&invited?.stdout)?);
        stranger.clan_typing(&["join", "--dry-run"], &link)?.success().map(drop)
    });

    words(checks, lab);

    let status = lab.person("stranger").clan_json(&["status"]);
    checks.that("a refused link leaves no machine behind", || {
        let status = status?;
        let empty = status["clans"].as_array().is_some_and(Vec::is_empty)
            && status["vms"].as_array().is_some_and(Vec::is_empty);
        if empty { Ok(()) } else { Err(LabError::Promise(status.to_string())) }
    });
}

/// Four words find the inviter's machine on the same LAN, once; a wrong guess makes them void.
fn words(checks: &mut Checks, lab: &mut Lab) {
    let told = |lab: &mut Lab| {
        let invite = lab.person("founder").clan_json(&["invite"])?;
        invite["words"].as_str().map(str::to_owned).ok_or_else(|| LabError::Promise(format!("no words: {invite}")))
    };
    let right = told(lab);
    let guess = told(lab).map(|words| format!("{} zoo zoo zoo", words.split(' ').next().unwrap_or_default()));
    let stranger = &*lab.person("stranger");
    let look = |words: &str| stranger.clan_typing(&["join", "--dry-run"], words);
    checks.that("four words lead to the clan", || {
        look(right.as_ref().map_err(|e| LabError::Promise(e.to_string()))?)?.success().map(drop)
    });
    checks.that("words work once", || refused(&look(&right?)?, &["used already"]));
    checks.that("wrong words are void at the first guess", || {
        let guess = guess?;
        refused(&look(&guess)?, &["void"])?;
        refused(&look(&guess)?, &["void"])
    });
}

fn attempt(person: &Person, link: &str, words: &[&str]) -> Checked {
    refused(&person.clan_typing(&["join", "--yes", "--person", "stranger", "--machine", "stranger"], link)?, words)
}

/// The link, as if the machine had moved to another address since it was made.
fn with_old_addresses(link: &str) -> String {
    let mut link: InviteLink = link.parse().unwrap();
    for peer in &mut link.peers {
        peer.addrs = vec!["203.0.113.99:9".parse().unwrap()];
    }
    link.to_string()
}

/// One character in the middle is another.
fn tampered(link: &str) -> String {
    let middle = link.len() / 2;
    let other = if &link[middle..=middle] == "A" { "B" } else { "A" };
    format!("{}{other}{}", &link[..middle], &link[middle + 1..])
}
