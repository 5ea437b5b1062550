//! A click on a link, in a real browser.

use std::time::Duration;

use clan_lab::{Account, Lab, LabError, Person, story};

use crate::{Checked, Checks, chromium::Chromium, running_vm};

/// A boot beside two other guests under emulation.
const JOINED: Duration = Duration::from_secs(240);

pub(crate) fn check(checks: &mut Checks, lab: &mut Lab) {
    let mut browser = match Chromium::start(lab.account()) {
        Ok(browser) => browser,
        Err(error) => return checks.that("Chromium starts", || Err(error)),
    };
    let pictures = lab.record().logs();
    checks.that("the page shows clan, machines and service to its owner", || {
        let founder = lab.person("founder");
        browser.open(&printed(founder, &["web", "--print"])?)?;
        browser.shows("body", &[story::CLAN, "second", "Open"])?;
        browser.picture(&pictures.join("page.png"))
    });
    checks.that("a click on a link asks, and joins once the person says yes", || {
        let link = story::link_in(&lab.person("founder").clan(&["invite"])?.success()?.stdout)?;
        let stranger = lab.person("stranger");
        clicked(&mut browser, stranger, &link)?;
        browser.picture(&pictures.join("popup.png"))?;
        browser.press("dialog[open] button[type=button]")?;
        browser.gone("dialog[open]")?;
        let clans = stranger.clan_json(&["status"])?["clans"].as_array().map_or(0, Vec::len);
        if clans > 0 {
            return Err(LabError::Promise("it joined although the person said no".into()));
        }
        clicked(&mut browser, stranger, &link)?;
        browser.type_into("dialog[open] input[name=person]", "stranger")?;
        browser.press("dialog[open] button[type=submit]")?;
        story::until(JOINED, "stranger's VM", || running_vm(stranger))?;
        browser.shows("body", &[story::CLAN, "founder", "Running"])?;
        browser.picture(&pictures.join("joined.png"))?;
        stranger.clan(&["leave", story::CLAN, "--yes"])?.success().map(drop)
    });
}

/// What the desktop does on a click, up to the question.
fn clicked(browser: &mut Chromium, stranger: &Person, link: &str) -> Checked {
    browser.open("about:blank")?;
    browser.open(&printed(stranger, &["open", link, "--print"])?)?;
    let preview = stranger.clan_typing(&["join", "--dry-run", "--json"], link)?.success()?.json()?;
    let fingerprint = preview["fingerprint"].as_str().unwrap_or("a fingerprint").to_owned();
    browser.shows("dialog[open]", &["Join family?", "founder invites you", &fingerprint, "of memory", "Join"])
}

fn printed(person: &Person, arguments: &[&str]) -> Result<String, LabError> {
    let finished = person.clan_quietly(arguments)?.success()?;
    let url = finished.stdout.split_whitespace().find(|word| word.starts_with("http://")).map(str::to_owned);
    url.ok_or_else(|| LabError::Promise("no address was printed".into()))
}

#[test]
fn a_browser_is_steered() {
    let account = Account::for_lab(None).unwrap_or_else(|error| panic!("{}", error.chain()));
    let mut browser = Chromium::start(&account).unwrap_or_else(|error| panic!("{}", error.chain()));
    let mut steer = || -> Checked {
        browser.open("data:text/html,<input><button onclick=\"this.textContent='pressed '+document.querySelector('input').value\">press</button>")?;
        browser.type_into("input", "me")?;
        browser.press("button")?;
        browser.shows("body", &["pressed me"])?;
        browser.gone("dialog")
    };
    steer().unwrap_or_else(|error| panic!("{}", error.chain()));
}
