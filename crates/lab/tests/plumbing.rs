//! The lab itself, with a stand-in for the product: what `up` lays works, and `down` and `sweep` leave nothing behind.
//! Needs root, for network namespaces.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use clan_lab::{Browser, Lab, LabConfig, LabError, Record, Screen, leftovers, sweep};

/// Does what the lab expects of `clan`: `manager` listens on its Unix socket and answers HTTP on the inherited socket
/// with who and where it is; anything else is a command for the shell.
const STAND_IN: &str = r#"#!/usr/bin/perl
use strict; use IO::Socket::UNIX; use IO::Socket::INET; use IO::Select;
if ($ARGV[0] ne "manager") { exec "/bin/sh", "-c", @ARGV or die; }
die "not activated" unless $ENV{LISTEN_PID} == $$ && $ENV{LISTEN_FDS} == 1;
mkdir $ENV{CLAN_DATA}; mkdir "$ENV{CLAN_DATA}/run"; mkdir "$ENV{CLAN_DATA}/images"; mkdir "$ENV{CLAN_DATA}/clans";
my $unix = IO::Socket::UNIX->new(Local => "$ENV{CLAN_DATA}/run/manager.sock", Listen => 5) or die "unix: $!";
my $http = IO::Socket::INET->new_from_fd(3, "r+") or die "fd 3: $!";
if (fork() == 0) { $SIG{TERM} = "IGNORE"; sleep 1000; exit; }   # what a virtual machine would be
my $select = IO::Select->new($unix, $http);
while (1) {
    for my $ready ($select->can_read) {
        my $client = $ready->accept or next;
        next if $ready == $unix;
        sysread $client, my $request, 4096;
        open my $net, "<", "/proc/net/fib_trie"; my $routes = join "", <$net>;
        my $address = $routes =~ /203\.0\.113\.11\b/ ? "founder" : "second";
        my $body = "uid=$< euid=$> groups=$( home=$ENV{HOME} root=" . (exists $ENV{SUDO_UID} || exists $ENV{CARGO} ? "leaked" : "clean") . " at=$address";
        syswrite $client, "HTTP/1.1 200 OK\r\nContent-Length: " . length($body) . "\r\n\r\n$body";
    }
}
"#;

/// Plays the whole product, as far as the story looks at it.
const PLAYER: &str = r##"#!/usr/bin/perl
use strict; use IO::Socket::UNIX; use IO::Socket::INET; use IO::Select;
my $said = "@ARGV"; my $who = $ENV{HOME} =~ /founder/ ? "founder" : "second"; my $port = "$ENV{CLAN_DATA}/port";
my $path = '"path":{"kind":"direct"}';
my $status = qq({"clans":[{"name":"family","machines":[{"name":"founder",$path},{"name":"second",$path}]}],"vms":[{"state":"running","stats":{}}]});
sub url { open my $file, "<", $port or die; my $number = <$file>; "http://$_[0]:$number/?token=t\n" }
if ($said =~ /^status/) { print $status; }
elsif ($said =~ /^invite/) { print STDERR "one person, one day\n"; print "clan://join/AAAABBBBCCCCDDDD\n"; }
elsif ($said =~ /^join/) { <STDIN> eq "clan://join/AAAABBBBCCCCDDDD\n" or die "no link was typed"; }
elsif ($said =~ /^create/) { print STDERR "building\n"; }
elsif ($said =~ /^service list/) { print "web  founder  works\n"; }
elsif ($said =~ /^service open/) { print url("web.family.localhost"); }
elsif ($said =~ /^web/) { print url("127.0.0.1"); }
elsif ($said =~ /^vm console/) { exec "bash", "-c", 'ping() { echo pong; }; timeout() { echo connected; }; while read -r line; do echo "# $line"; eval "${line%$(printf "\r")}"; done'; }
elsif ($said ne "manager") { die "what is $said" }
exit unless $said eq "manager";
mkdir $ENV{CLAN_DATA}; mkdir "$ENV{CLAN_DATA}/run";
my $http = IO::Socket::INET->new_from_fd(3, "r+") or die "fd 3: $!";
open my $file, ">", $port; print $file $http->sockport; close $file;
my $unix = IO::Socket::UNIX->new(Local => "$ENV{CLAN_DATA}/run/manager.sock", Listen => 5) or die "unix: $!";
my $select = IO::Select->new($unix, $http);
while (1) {
    for my $ready ($select->can_read) {
        my $client = $ready->accept or next;
        next if $ready == $unix;
        sysread $client, my $request, 4096;
        my $body = $request =~ m{^GET /api/v1/status} ? $status : "<html>family, served by founder</html>";
        my $head = $request =~ /token=t/ ? "302 Found\r\nLocation: /\r\nSet-Cookie: session=s"
                 : $request =~ /Cookie: session=s/ ? "200 OK" : "401 Unauthorized";
        syswrite $client, "HTTP/1.1 $head\r\nContent-Length: " . length($body) . "\r\n\r\n$body";
    }
}
"##;

struct Fixture {
    config: LabConfig,
    // Last: removed after everything in it.
    folder: tempfile::TempDir,
}

impl Fixture {
    fn new(prefix: &str) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "these tests lay network namespaces: run them as root, as `make test` does"
        );
        let folder = tempfile::Builder::new()
            .prefix("clan-lab-test-")
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir()
            .unwrap();
        let programs = folder.path().join("programs");
        fs::create_dir(&programs).unwrap();
        for name in ["clan", "clan-agent"] {
            fs::write(programs.join(name), STAND_IN).unwrap();
        }
        let mut config = LabConfig::new(programs);
        config.prefix = prefix.into();
        config.state = Some(folder.path().join("state"));
        config.any_ports = true;
        Self { config, folder }
    }

    fn up(&self) -> Lab {
        Lab::up(&self.config, &Screen::to(std::io::sink())).unwrap_or_else(|error| panic!("{}", error.chain()))
    }

    fn clan_lab(&self, verb: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_clan-lab"));
        command.arg("--prefix").arg(&self.config.prefix).arg("--state").arg(self.folder.path().join("state"));
        command.arg("--programs").arg(&self.config.programs).arg(verb).stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    /// A lab of `clan-lab run` that has come as far as its first command, which never ends.
    fn run_held(&self) -> (Child, Record) {
        let held = STAND_IN.replace(r#"if ($ARGV[0] ne "manager") {"#, r#"if ($ARGV[0] ne "manager") { sleep 1000;"#);
        fs::write(self.config.programs.join("clan"), held).unwrap();
        let mut running = self.clan_lab("run").spawn().unwrap();
        let began = Instant::now();
        loop {
            // The manager, what it started, and the command.
            if let Some(record) = self.record().filter(|record| leftovers(record).processes.len() >= 3) {
                return (running, record);
            }
            assert!(began.elapsed() < Duration::from_secs(20), "the lab does not come up");
            assert!(running.try_wait().unwrap().is_none(), "the lab ended by itself");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn record(&self) -> Option<Record> {
        Record::load(&self.config.prefix).unwrap()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if let Ok(Some(record)) = Record::load(&self.config.prefix) {
            let _ = sweep(&record);
        }
    }
}

fn exists(netns: &str) -> bool {
    Path::new("/run/netns").join(netns).exists()
}

#[test]
fn a_lab_is_laid_works_and_leaves_nothing_behind() {
    let fixture = Fixture::new("labtest-a");
    let mut lab = fixture.up();
    let record = lab.record().clone();
    assert!(["labtest-a-founder", "labtest-a-second", "labtest-a-internet"].iter().all(|name| exists(name)));

    // Each reaches the other, as an ordinary user.
    for (person, other) in [("founder", "203.0.113.12"), ("second", "203.0.113.11")] {
        let finished = lab.person(person).clan(&[&format!("ping -c 1 -W 5 {other}")]).unwrap();
        assert!(finished.status.success(), "{}", finished.output());
    }
    let finished =
        lab.person("founder").clan(&["id -u; grep NoNewPrivs /proc/self/status; env"]).unwrap().success().unwrap();
    assert!(finished.stdout.starts_with(&format!("{}\n", lab.account().uid)), "{}", finished.stdout);
    assert!(finished.stdout.contains("NoNewPrivs:\t0"), "newuidmap would not work: {}", finished.stdout);
    assert!(!finished.stdout.contains("CARGO"), "the lab's environment leaks: {}", finished.stdout);

    // The manager in there answers this machine's browser.
    for person in ["founder", "second"] {
        lab.person(person).start_manager(Duration::from_secs(10)).unwrap_or_else(|error| panic!("{}", error.chain()));
        let port = lab.person(person).port().unwrap();
        let page = Browser::default().get(&format!("http://web.family.localhost:{port}/")).unwrap();
        assert!(page.body.contains(&format!("at={person}")), "{}", page.body);
        assert!(
            page.body.contains(&format!("uid={}", lab.account().uid)) && page.body.contains("root=clean"),
            "{}",
            page.body
        );
    }
    assert!(leftovers(&record).processes.len() >= 4, "{:?}", leftovers(&record));

    lab.down().unwrap_or_else(|error| panic!("{}", error.chain()));
    assert!(leftovers(&record).is_empty(), "{:?}", leftovers(&record));
    assert!(fixture.record().is_none());
    assert!(!exists("labtest-a-founder"));
    assert!(record.data("founder").join("images").is_dir(), "images outlive the lab");
    assert!(!record.data("founder").join("clans").exists(), "clans do not");
    // Once more changes nothing.
    sweep(&record).unwrap();
}

#[test]
fn packages_are_fetched_through_the_proxy_and_nothing_of_this_machine_is() {
    let fixture = Fixture::new("labtest-b");
    let mut lab = fixture.up();
    let founder = lab.person("founder");
    let state = founder.data();
    let update = format!(
        "umask 077; mkdir -p {0}/l/partial {0}/c/partial && \
         echo 'deb [trusted=yes] http://deb.debian.org/debian bookworm-updates main' > {0}/sources && \
         apt-get update -o Dir::Etc::SourceList={0}/sources -o Dir::Etc::SourceParts=/dev/null -o Dir::State::Lists={0}/l \
         -o Dir::Cache={0}/c -o Acquire::Languages=none -o Acquire::http::Proxy=http://203.0.113.1:3128 -o APT::Update::Error-Mode=any",
        state.display()
    );
    let finished = founder.clan(&[&update]).unwrap();
    assert!(finished.status.success(), "{}", finished.output());

    let own = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = own.local_addr().unwrap().port();
    for (request, answer) in [
        (format!("GET http://127.0.0.1:{port}/ HTTP/1.0"), "502"),
        (format!("GET http://localhost:{port}/ HTTP/1.0"), "502"),
        ("CONNECT deb.debian.org:443 HTTP/1.0".to_owned(), "405"),
        ("POST http://deb.debian.org/ HTTP/1.0".to_owned(), "405"),
        ("GET / HTTP/1.0".to_owned(), "405"),
    ] {
        let ask = format!("exec 3<>/dev/tcp/203.0.113.1/3128; printf '{request}\\r\\n\\r\\n' >&3; head -n 1 <&3");
        let said = founder.clan(&[&format!("bash -c \"{ask}\"")]).unwrap();
        assert!(said.stdout.contains(answer), "{request}: {}", said.output());
    }
    lab.down().unwrap();
}

#[test]
fn a_second_lab_of_the_same_name_is_refused_and_harms_nothing() {
    let fixture = Fixture::new("labtest-c");
    let lab = fixture.up();
    let error = Lab::up(&fixture.config, &Screen::to(std::io::sink())).unwrap_err();
    assert!(matches!(error, LabError::AlreadyUp { .. }), "{error}");
    assert!(exists("labtest-c-founder"));
    lab.down().unwrap();
}

#[test]
fn a_lab_that_cannot_be_laid_leaves_nothing_behind() {
    let mut fixture = Fixture::new("labtest-d");
    fixture.config.programs = PathBuf::from("/nonexistent");
    let error = Lab::up(&fixture.config, &Screen::to(std::io::sink())).unwrap_err();
    assert!(matches!(error, LabError::NoProgram { name: "clan", .. }), "{error}");
    assert!(fixture.record().is_none());
    assert!(!exists("labtest-d-internet"));
}

#[test]
fn stop_cleans_up_after_a_lab_that_was_killed() {
    let fixture = Fixture::new("labtest-e");
    let (mut running, record) = fixture.run_held();
    running.kill().unwrap();
    assert_eq!(running.wait().unwrap().signal(), Some(9));
    assert!(!leftovers(&record).is_empty());

    assert!(fixture.clan_lab("stop").status().unwrap().success());
    assert!(leftovers(&record).is_empty(), "{:?}", leftovers(&record));
    assert!(fixture.record().is_none());
    assert!(fixture.clan_lab("stop").status().unwrap().success(), "stopping twice is fine");
    assert!(fixture.clan_lab("clean").status().unwrap().success());
    assert!(!fixture.folder.path().join("state").exists());
}

#[test]
fn stop_ends_a_running_lab_in_good_order() {
    let fixture = Fixture::new("labtest-f");
    let (mut running, record) = fixture.run_held();
    // Its parent has to take note of its end, as a shell would.
    let waiting = std::thread::spawn(move || running.wait().unwrap());
    assert!(fixture.clan_lab("stop").status().unwrap().success());
    assert!(waiting.join().unwrap().success(), "being asked to end is no failure");
    assert!(leftovers(&record).is_empty(), "{:?}", leftovers(&record));
}

#[test]
fn without_a_terminal_the_story_is_told_and_the_lab_goes_by_itself() {
    let fixture = Fixture::new("labtest-g");
    fs::write(fixture.config.programs.join("clan"), PLAYER).unwrap();
    let output = fixture.clan_lab("run").stdout(Stdio::piped()).output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{told}");
    for part in [
        "1. The founder creates a clan",
        "founder  $ clan invite",
        "7. The web page shows it all",
        "How long it took",
        "What is up",
        "http://127.0.0.1:",
    ] {
        assert!(told.contains(part), "no `{part}` in: {told}");
    }
    assert!(!told.contains("AAAABBBBCCCCDDDD"), "the whole link is shown: {told}");
    assert!(fixture.record().is_none() && !exists("labtest-g-founder"));
}

#[test]
fn a_story_that_fails_shows_why_and_the_lab_goes_all_the_same() {
    let fixture = Fixture::new("labtest-h");
    let broken = PLAYER.replace(r#"print STDERR "building\n";"#, r#"print STDERR "no room\n"; exit 1;"#);
    assert_ne!(broken, PLAYER);
    fs::write(fixture.config.programs.join("clan"), broken).unwrap();
    let output = fixture.clan_lab("run").stdout(Stdio::piped()).output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(
        told.contains("`clan create family --person founder --machine founder` ended with exit status: 1")
            && told.contains("no room"),
        "{told}"
    );
    assert!(fixture.record().is_none() && !exists("labtest-h-founder"));
    assert!(fixture.folder.path().join("state/logs/founder-manager.log").is_file(), "the logs are kept");
}
