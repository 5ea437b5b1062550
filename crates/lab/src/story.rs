//! What the product promises, told on a lab: found, invite, join, reach by name, open.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    Account, Browser, Console, Lab, LabConfig, LabError, Person, Record, Screen,
    console::tail,
    process::{MARK, command_as, run},
    screen::seconds,
    sweep,
};

/// The clan that is founded.
pub const CLAN: &str = "family";
/// The service that the founder's machine offers.
pub const SERVICE: &str = "web";

/// How long a machine may take to meet the other one after its controller runs.
const MEET_LIMIT: Duration = Duration::from_secs(60);
/// How long the best path may take to appear; the story goes on without it.
const DIRECT_LIMIT: Duration = Duration::from_secs(10);
/// How long a command in a guest may take, under emulation.
const GUEST_LIMIT: Duration = Duration::from_secs(45);
const MANAGER_LIMIT: Duration = Duration::from_secs(20);

/// How long each step took, and what is up afterwards.
#[derive(Debug, Default)]
pub struct Report {
    steps: Vec<(String, Duration)>,
    stays: Vec<(String, String)>,
    /// The invitation link that was redeemed.
    pub link: String,
    /// The founder's page, as the second person's browser got it.
    pub page: String,
}

impl Report {
    /// The table that ends the story.
    pub fn print(&self, screen: &Screen, total: Duration) {
        screen.heading("How long it took");
        let rest = total.saturating_sub(self.steps.iter().map(|(_, took)| *took).sum());
        let width = self.steps.iter().map(|(title, _)| title.chars().count()).max().unwrap_or(0).max(30);
        let row = |title: &str, took: Duration| screen.line(&format!("   {title:<width$} {:>9}", seconds(took)));
        for (title, took) in &self.steps {
            row(title, *took);
        }
        row("Networks and folders", rest);
        row("Together", total);
        screen.heading("What is up");
        for (what, value) in &self.stays {
            screen.line(&format!("   {what:<22} {value}"));
        }
    }
}

/// Tells the whole story.
///
/// # Errors
/// At the first promise that is not kept.
pub fn tell(lab: &mut Lab) -> Result<Report, LabError> {
    let screen = lab.screen().clone();
    let mut report = Report::default();
    let mut teller = Teller { screen: screen.clone(), report: &mut report, number: 0 };

    teller.step("The founder creates a clan", || found(lab))?;
    let link = teller.step("The founder invites somebody", || invite(lab))?;
    teller.step("The second person joins", || join(lab, &link))?;
    teller.step("The machines meet", || meet(lab))?;
    teller.step("Each reaches the other by name", || reach(lab))?;
    let page = teller.step("The second person opens the founder's service", || open(lab))?;
    teller.step("The web page shows it all", || look(lab))?;

    report.link = link;
    report.page = page;
    report.stays = stays(lab)?;
    Ok(report)
}

struct Teller<'a> {
    screen: Screen,
    report: &'a mut Report,
    number: usize,
}

impl Teller<'_> {
    fn step<T>(&mut self, title: &str, act: impl FnOnce() -> Result<(T, String), LabError>) -> Result<T, LabError> {
        self.number += 1;
        self.screen.step(self.number, title);
        let began = Instant::now();
        let (value, seen) = act()?;
        self.screen.seen(&seen, began.elapsed());
        self.report.steps.push((title.to_owned(), began.elapsed()));
        Ok(value)
    }
}

fn found(lab: &mut Lab) -> Result<((), String), LabError> {
    let screen = lab.screen().clone();
    screen.command("founder", "clan manager &");
    let founder = lab.person("founder");
    founder.start_manager(MANAGER_LIMIT)?;
    founder.clan(&["create", CLAN, "--person", "founder", "--machine", "founder"])?.success()?;
    Ok(((), format!("the clan `{CLAN}` has its first machine, founder.{CLAN}.clan")))
}

fn invite(lab: &mut Lab) -> Result<(String, String), LabError> {
    let finished = lab.person("founder").clan(&["invite"])?.success()?;
    let link = link_in(&finished.stdout)?;
    let shown: String = link.chars().take(24).collect();
    Ok((link, format!("{shown}… (whoever has the whole link may join, once)")))
}

/// The link among what `clan invite` prints.
///
/// # Errors
/// When there is none.
pub fn link_in(stdout: &str) -> Result<String, LabError> {
    let found = stdout.split_whitespace().find(|word| word.starts_with("clan://join/"));
    found.map(str::to_owned).ok_or_else(|| LabError::Promise(format!("`clan invite` prints no link but: {stdout}")))
}

fn join(lab: &mut Lab, link: &str) -> Result<((), String), LabError> {
    lab.screen().command("second", "clan manager &");
    let second = lab.person("second");
    second.start_manager(MANAGER_LIMIT)?;
    // Typed, not an argument: those are for everybody on the computer to see.
    second.clan_typing(&["join", "--yes", "--person", "second", "--machine", "second"], link)?.success()?;
    Ok(((), format!("second.{CLAN}.clan is a machine of the clan")))
}

fn meet(lab: &mut Lab) -> Result<((), String), LabError> {
    for (person, other) in [("founder", "second"), ("second", "founder")] {
        let person = lab.person(person);
        // The way inside QUIC comes first and works; plain UDP follows once a probe on it was answered.
        let direct = || Ok((path_to(&person.clan_json(&["status"])?, other) == Some("direct")).then_some(()));
        let _ = until(DIRECT_LIMIT, "a direct path", direct);
    }
    let mut paths = Vec::new();
    for (person, other) in [("founder", "second"), ("second", "founder")] {
        let person = lab.person(person);
        let path = until(MEET_LIMIT, &format!("a path from {} to {other}", person.name()), || {
            let status = person.clan_json(&["status"])?;
            Ok(path_to(&status, other).map(str::to_owned))
        })?;
        paths.push(format!("{} → {other} {path}", person.name()));
    }
    Ok(((), paths.join(", ")))
}

/// How `machine` is reached, in a manager's status.
pub fn path_to<'a>(status: &'a Value, machine: &str) -> Option<&'a str> {
    machines(status).find(|m| m["name"] == machine)?["path"]["kind"].as_str()
}

/// The machines of the story's clan, in a manager's status.
pub fn machines(status: &Value) -> impl Iterator<Item = &Value> {
    let clans = status["clans"].as_array().map(Vec::as_slice).unwrap_or_default();
    clans
        .iter()
        .filter(|clan| clan["name"] == CLAN)
        .flat_map(|clan| clan["machines"].as_array().map(Vec::as_slice).unwrap_or_default())
}

fn reach(lab: &mut Lab) -> Result<((), String), LabError> {
    // The second person offers no service; but an owner reaches every machine's SSH port, by the rules that hold at first.
    for (person, other, port) in [("founder", "second", 22), ("second", "founder", 80)] {
        let mut console = lab.person(person).console(CLAN)?;
        let name = format!("{other}.{CLAN}.clan");
        in_guest(&mut console, &format!("ping -c 2 -W 5 {name}"), lab.screen())?;
        // A refusal is an answer of the other machine too: it came through the tunnel.
        let tcp = format!(
            "timeout 10 bash -c 'exec 3<>/dev/tcp/{name}/{port} && echo connected' 2>&1 | grep -oE 'connected|Connection refused' | head -n 1 | grep ."
        );
        let said = in_guest(&mut console, &tcp, lab.screen())?;
        if other == "founder" && !said.contains("connected") {
            return Err(LabError::Promise(format!("the founder's web server refuses {person}: {said}")));
        }
    }
    Ok(((), format!("ping and TCP from each VM to the other, as founder.{CLAN}.clan and second.{CLAN}.clan")))
}

/// Runs a command in a guest and demands that it succeeds.
///
/// # Errors
/// When it fails or does not answer.
pub fn in_guest(console: &mut Console, command: &str, screen: &Screen) -> Result<String, LabError> {
    screen.command("  (guest)", command.split(" 2>&1 | ").next().unwrap_or(command));
    let (output, status) = console.run(command, GUEST_LIMIT)?;
    for line in output.lines().rev().take(3).collect::<Vec<_>>().into_iter().rev() {
        screen.said(line);
    }
    if status != 0 {
        return Err(LabError::Command {
            command: format!("{command} (in the guest)"),
            status: format!("exit status {status}"),
            output,
        });
    }
    Ok(output)
}

fn open(lab: &mut Lab) -> Result<(String, String), LabError> {
    let screen = lab.screen().clone();
    let second = lab.person("second");
    let list = second.clan(&["service", "list"])?.success()?;
    list.stdout.lines().for_each(|line| screen.said(line));
    let finished = second.clan(&["service", "open", SERVICE, "--print"])?.success()?;
    let url = url_in(&finished.stdout)?;
    let page = until(GUEST_LIMIT, "the founder's page at the second person's browser", || {
        let page = Browser::default().get(&url)?;
        Ok((page.status == 200).then_some(page))
    })?;
    if !page.body.contains(CLAN) || !page.body.contains("founder") {
        return Err(LabError::Promise(format!(
            "the page does not name the clan and the founder's machine:\n{}",
            tail(&page.body, 2000)
        )));
    }
    Ok((page.body, format!("the founder's page came to this machine's browser through {}'s VM", second.name())))
}

/// The address among what a command prints.
///
/// # Errors
/// When there is none.
pub fn url_in(stdout: &str) -> Result<String, LabError> {
    let found = stdout.split_whitespace().find(|word| word.starts_with("http://"));
    found.map(str::to_owned).ok_or_else(|| LabError::Promise(format!("no address was printed but: {stdout}")))
}

fn look(lab: &mut Lab) -> Result<((), String), LabError> {
    let mut seen = Vec::new();
    for person in lab.people().filter(|person| person.has_manager()) {
        let finished = person.clan(&["web", "--print"])?.success()?;
        let url = url_in(&finished.stdout)?;
        let mut browser = Browser::default();
        let page = browser.get(&url)?;
        if page.status != 200 || !page.body.to_ascii_lowercase().contains("<html") {
            return Err(LabError::Promise(format!(
                "the web page answers {}:\n{}",
                page.status,
                tail(&page.body, 1000)
            )));
        }
        let origin = page.url.split('/').take(3).collect::<Vec<_>>().join("/");
        let status = browser.get(&format!("{origin}/api/v1/status"))?;
        let status: Value = serde_json::from_str(&status.body).map_err(|error| {
            LabError::Promise(format!("/api/v1/status is no JSON: {error}\n{}", tail(&status.body, 500)))
        })?;
        let pathless: Vec<&str> =
            machines(&status).filter(|m| m["path"].is_null()).filter_map(|m| m["name"].as_str()).collect();
        if machines(&status).count() != 2 || !pathless.is_empty() {
            return Err(LabError::Promise(format!(
                "{}'s page does not show both machines with a path (without: {pathless:?})",
                person.name()
            )));
        }
        if status["vms"][0]["stats"].is_null() {
            return Err(LabError::Promise(format!("{}'s page shows no statistics of the VM", person.name())));
        }
        seen.push(person.name().to_owned());
    }
    Ok(((), format!("both machines with their paths, on the pages of {}", seen.join(" and "))))
}

/// Asks until there is an answer.
pub fn until<T>(
    limit: Duration,
    what: &str,
    mut ask: impl FnMut() -> Result<Option<T>, LabError>,
) -> Result<T, LabError> {
    let began = Instant::now();
    let mut last;
    loop {
        match ask() {
            Ok(Some(value)) => return Ok(value),
            Err(LabError::Interrupted) => return Err(LabError::Interrupted),
            Ok(None) => last = None,
            Err(error) => last = Some(error),
        }
        if began.elapsed() > limit {
            return Err(last.unwrap_or_else(|| LabError::InVain { what: what.to_owned(), limit }));
        }
        thread::sleep(Duration::from_millis(300));
    }
}

fn stays(lab: &mut Lab) -> Result<Vec<(String, String)>, LabError> {
    let record = lab.record().clone();
    let mut stays = Vec::new();
    for person in lab.people().filter(|person| person.has_manager()) {
        let url = url_in(&person.clan_quietly(&["web", "--print"])?.success()?.stdout)?;
        stays.push((format!("{}'s web page", person.name()), url));
    }
    stays.push((String::new(), "(each link works once and for a short time; `make web` prints a fresh one)".into()));
    stays.push((
        "namespaces".into(),
        record.namespaces().iter().map(|ns| ns.name().to_owned()).collect::<Vec<_>>().join(", "),
    ));
    for person in lab.people() {
        stays.push((format!("{}'s data", person.name()), person.data().display().to_string()));
    }
    stays.push(("logs".into(), record.logs().display().to_string()));
    stays.push(("to stop".into(), "Ctrl-C here, or `make stop` anywhere".into()));
    Ok(stays)
}

/// One line on how the lab's VMs are.
pub fn glance(lab: &mut Lab) -> String {
    let look = |person: &mut Person| {
        let status = person.clan_json(&["status"]).ok();
        let state = status.as_ref().and_then(|status| status["vms"][0]["state"].as_str().map(str::to_owned));
        format!("{} {}", person.name(), state.unwrap_or_else(|| "does not answer".into()))
    };
    lab.people().map(look).collect::<Vec<_>>().join(" · ")
}

/// Shows what may explain a failure, and keeps it.
pub fn post_mortem(lab: &mut Lab) {
    let screen = lab.screen().clone();
    for person in lab.people() {
        let (log, console) = (person.log_tail(25), person.console_tail(15));
        for (title, text) in [("manager's log", log), ("VM's console", console)] {
            if !text.is_empty() {
                screen.heading(&format!("The end of {}'s {title}", person.name()));
                text.lines().for_each(|line| screen.said(line));
            }
        }
        person.keep_console_logs();
    }
}

/// Removes everything that labs keep between runs.
///
/// # Errors
/// When something cannot be removed.
pub fn clean(state_root: &Path) -> Result<(), LabError> {
    ["bin", "logs", "founder", "second", "stranger", "five"]
        .iter()
        .try_for_each(|name| sweep::remove(&state_root.join(name)))?;
    // Somebody may have put something else there; that stays.
    let _ = std::fs::remove_dir(state_root);
    Ok(())
}

/// A fresh link to the web page of one of a running lab's people.
///
/// # Errors
/// When there is no such person, or their manager does not answer.
pub fn web_link(record: &Record, config: &LabConfig, person: &str) -> Result<String, LabError> {
    if !record.people.iter().any(|known| known == person) {
        return Err(LabError::Promise(format!("the lab has no `{person}`, only {}", record.people.join(" and "))));
    }
    let account = Account::for_lab(config.account.as_deref())?;
    let mut command = command_as(&account, &record.computer(person), record.programs().join("clan").as_os_str())?;
    command
        .args(["web", "--print"])
        .stdin(std::process::Stdio::null())
        .env("HOME", record.folder(person))
        .env("CLAN_DATA", record.data(person))
        .env(MARK, &record.prefix);
    let finished = run(command, "clan web --print", MANAGER_LIMIT, &config.interrupt, |_| ())?.success()?;
    url_in(&finished.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_found_among_other_words() {
        assert_eq!(link_in("Send this:\n  clan://join/AAA\nIt works once.\n").unwrap(), "clan://join/AAA");
        assert!(link_in("nothing").is_err());
    }

    #[test]
    fn a_path_is_read_from_a_status() {
        let status = serde_json::json!({"clans": [{"name": "family", "machines": [{"name": "founder", "path": {"kind": "direct"}}, {"name": "second", "path": null}]}]});
        assert_eq!(path_to(&status, "founder"), Some("direct"));
        assert_eq!(path_to(&status, "second"), None);
    }

    #[test]
    fn waiting_ends_with_the_last_reason() {
        let error = until::<()>(Duration::ZERO, "it", || Err(LabError::Promise("because".into()))).unwrap_err();
        assert_eq!(error.to_string(), "because");
    }
}
