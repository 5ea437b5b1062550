//! `clan-lab`: the product's story on one machine.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use clan_lab::{
    Interrupt, Lab, LabConfig, LabError, Record, Screen,
    bench::{self, BenchConfig, EndConfig},
    bench_vm::{self, VmBenchConfig},
    five,
    fleet::{self, Fleet, Place},
    matrix::{self, Conditions, Troubles},
    nat::Nat,
    story, sweep,
};
use clap::{Parser, Subcommand};
use rustix::process::Signal;

/// Two people's computers and an internet on this machine, in network namespaces.
#[derive(Debug, Parser)]
#[command(name = "clan-lab", version, max_term_width = 100)]
struct Cli {
    /// Name of the lab: in front of the names of its namespaces
    #[arg(long, global = true, default_value = "clan")]
    prefix: String,
    /// Folder for data, images and logs [default: clan-lab in the user's state folder]
    #[arg(long, global = true, value_name = "DIR")]
    state: Option<PathBuf>,
    /// User that the managers run as [default: who called sudo, else clan-lab]
    #[arg(long, global = true, value_name = "NAME")]
    user: Option<String>,
    /// Folder with `clan` and `clan-agent` [default: where this program is]
    #[arg(long, global = true, value_name = "DIR")]
    programs: Option<PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Tell the story: found, invite, join, reach, open. On a terminal it stays up until Ctrl-C
    Run {
        /// Capture what crosses the lab's internet into this file
        #[arg(long, value_name = "FILE")]
        capture: Option<PathBuf>,
        /// Let the second person get the image from the founder, even if they have it from last time
        #[arg(long)]
        fresh_second: bool,
        /// End when the story is through, even on a terminal
        #[arg(long)]
        once: bool,
    },
    /// Five machines without virtual ones, behind routers: found, invite, join, reach, and a table of how fast. On a terminal
    /// it stays up until Ctrl-C
    Five {
        /// What stands before each of the four that join, such as full-cone,carrier,symmetric,udp-blocked
        #[arg(long, value_name = "KINDS", value_delimiter = ',')]
        routers: Vec<Nat>,
        /// End when the table is printed, even on a terminal
        #[arg(long)]
        once: bool,
    },
    /// Every kind of router against every other: whether machines reach each other, how, how fast, and what they survive
    Matrix {
        /// Computers behind each kind
        #[arg(long, default_value_t = 2)]
        each: usize,
        /// How often the uplink of a computer is changed under running streams
        #[arg(long, default_value_t = 14)]
        switches: usize,
        /// How often a relay is killed under running streams, and as often cut off
        #[arg(long, default_value_t = 2)]
        deaths: usize,
        /// Where to write what was seen
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// A shell, or a command, on a computer of `five`, as its ordinary user
    On {
        /// The computer
        name: String,
        /// The command; a shell if there is none
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// End a lab, whatever state it is in; images and caches stay
    Stop,
    /// Print a fresh link to a person's web page
    Web {
        /// founder or second
        #[arg(default_value = "founder")]
        person: String,
    },
    /// Print the folder where images, caches and logs are kept
    Where,
    /// End the lab and remove its images, caches and logs too
    Clean,
    /// Measure the mesh beside its rivals, in two namespaces of its own
    BenchMesh {
        /// How often each network is measured
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// Seconds for each of the four throughput measurements
        #[arg(long, default_value_t = 4)]
        seconds: u64,
        /// Only these networks, separated by commas
        #[arg(long, value_delimiter = ',', value_name = "NAMES")]
        only: Vec<String>,
        /// Where `scripts/rivals` unpacked the rivals
        #[arg(long, default_value = "target/rivals", value_name = "DIR")]
        rivals: PathBuf,
        /// A cable that takes single packets only, as a plain network card does
        #[arg(long)]
        plain: bool,
        /// Where to keep the numbers
        #[arg(long, default_value = "target/bench/mesh.json", value_name = "FILE")]
        out: PathBuf,
    },
    /// Measure VMs beside a plain Debian: boots, templates, memory; and how long they take into the mesh
    BenchVm {
        /// How often everything is measured
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// An image's folder, to leave out the mesh and the lab
        #[arg(long, value_name = "DIR")]
        image: Option<PathBuf>,
        /// Where `scripts/plain-debian` put its files
        #[arg(long, default_value = "target/plain-debian", value_name = "DIR")]
        debian: PathBuf,
        /// Where to keep the numbers
        #[arg(long, default_value = "target/bench/vm.json", value_name = "FILE")]
        out: PathBuf,
    },
    /// One end of our own tunnel, for `bench-mesh`
    #[command(hide = true)]
    TunnelEnd {
        #[arg(long)]
        number: usize,
        #[arg(long)]
        peer: SocketAddr,
        #[arg(long)]
        rules: bool,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let screen = Screen::stdout();
    match dispatch(&cli, &screen) {
        Ok(()) => ExitCode::SUCCESS,
        Err(LabError::Interrupted) => ExitCode::SUCCESS,
        Err(error) => {
            screen.failed(&error.chain());
            ExitCode::FAILURE
        }
    }
}

fn dispatch(cli: &Cli, screen: &Screen) -> Result<(), LabError> {
    if !rustix::process::geteuid().is_root() {
        return Err(LabError::NeedsRoot);
    }
    let beside = || std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_owned())).unwrap_or_default();
    let mut config = LabConfig::new(cli.programs.clone().unwrap_or_else(beside));
    config.prefix.clone_from(&cli.prefix);
    config.state.clone_from(&cli.state);
    config.account.clone_from(&cli.user);
    match &cli.verb {
        Verb::Run { capture, fresh_second, once } => {
            config.capture.clone_from(capture);
            config.fresh_second = *fresh_second;
            run(&config, screen, *once)
        }
        Verb::Five { routers, once } => five(&apart(config), screen, routers, *once),
        Verb::Matrix { each, switches, deaths, out } => {
            let troubles = Troubles { switches: *switches, deaths: *deaths };
            matrix(&apart(config), screen, *each, troubles, out.as_deref())
        }
        Verb::On { name, command } => on(&apart(config), name, command),
        Verb::Stop => {
            let apart = apart(config.clone());
            // Where neither is up, that is said once.
            if Record::load(&config.prefix)?.is_some() || Record::load(&apart.prefix)?.is_none() {
                stop(&config, screen)?;
            }
            if Record::load(&apart.prefix)?.is_some() {
                stop(&apart, screen)?;
            }
            apart.state.as_deref().map_or(Ok(()), fleet::clear)
        }
        Verb::Web { person } => web(&config, screen, person),
        Verb::Where => {
            screen.line(&config.state_root()?.display().to_string());
            Ok(())
        }
        Verb::Clean => {
            stop(&config, screen)?;
            let root = config.state_root()?;
            story::clean(&root)?;
            screen.line(&format!("{} is gone.", root.display()));
            Ok(())
        }
        Verb::BenchMesh { rounds, seconds, only, rivals, plain, out } => {
            on_signals(config.interrupt.clone())?;
            let config = BenchConfig {
                prefix: config.prefix,
                rounds: *rounds,
                seconds: *seconds,
                only: only.clone(),
                rivals: rivals.clone(),
                plain: *plain,
                out: out.clone(),
                interrupt: config.interrupt,
            };
            bench::run(&config, screen)
        }
        Verb::BenchVm { rounds, image, debian, out } => {
            on_signals(config.interrupt.clone())?;
            config.any_ports = true;
            let (image, debian, out) = (image.clone(), debian.clone(), out.clone());
            bench_vm::run(&VmBenchConfig { lab: config, rounds: *rounds, image, debian, out }, screen)
        }
        Verb::TunnelEnd { number, peer, rules } => {
            bench::tunnel_end(&EndConfig { number: *number, peer: *peer, rules: *rules })
        }
    }
}

fn run(config: &LabConfig, screen: &Screen, once: bool) -> Result<(), LabError> {
    let interrupt = config.interrupt.clone();
    on_signals(interrupt.clone())?;
    screen.heading("Clan: two people, two computers, one private network");
    let began = Instant::now();
    let mut lab = Lab::up(config, screen)?;
    let told = story::tell(&mut lab);
    let ended = match &told {
        Ok(report) => {
            report.print(screen, began.elapsed());
            if screen.is_terminal() && !once {
                stay(&mut lab, &interrupt, screen);
            }
            Ok(())
        }
        Err(LabError::Interrupted) => Ok(()),
        Err(error) => {
            screen.failed(&error.chain());
            story::post_mortem(&mut lab);
            Err(())
        }
    };
    screen.line("Taking the lab down …");
    let record = lab.record().clone();
    lab.down()?;
    screen.line(&format!(
        "Nothing runs any more. Images, caches and logs stay in {}; `make clean-lab` removes them.",
        record.state_root.display()
    ));
    // The failure itself was told above, before the lab went down.
    ended.map_err(|()| {
        LabError::Promise(format!("The story was not told to its end; the logs are in {}", record.logs().display()))
    })
}

/// The five are a lab of their own, beside that of the story.
fn apart(mut config: LabConfig) -> LabConfig {
    config.prefix.push('5');
    // Without an account there is nothing, and the lab says so.
    if let Ok(root) = config.state_root() {
        config.state = Some(root.join("five"));
    }
    config
}

fn five(config: &LabConfig, screen: &Screen, routers: &[Nat], once: bool) -> Result<(), LabError> {
    let interrupt = config.interrupt.clone();
    on_signals(interrupt.clone())?;
    screen.heading("Clan: five machines, no virtual ones, one private network");
    let mut fleet = Fleet::up(config, &five::specs(routers), screen)?;
    let told = five::tell(&mut fleet);
    match &told {
        Ok(report) => {
            report.print(screen);
            if screen.is_terminal() && !once {
                play(&mut fleet, &interrupt, screen);
            }
        }
        Err(LabError::Interrupted) => {}
        Err(error) => {
            screen.failed(&error.chain());
            for computer in fleet.computers() {
                for kind in ["controller", "manager"] {
                    screen.heading(&format!("The end of the log of {}'s {kind}", computer.name()));
                    computer.log_tail(kind, 15).lines().for_each(|line| screen.said(line));
                }
            }
        }
    }
    screen.line("Taking the lab down …");
    let logs = fleet.record().logs();
    fleet.down()?;
    screen.line("Nothing runs any more.");
    match told {
        Ok(_) | Err(LabError::Interrupted) => Ok(()),
        Err(_) => Err(LabError::Promise(format!("It was not told to its end; the logs are in {}", logs.display()))),
    }
}

fn matrix(
    config: &LabConfig,
    screen: &Screen,
    each: usize,
    troubles: Troubles,
    out: Option<&Path>,
) -> Result<(), LabError> {
    on_signals(config.interrupt.clone())?;
    screen.heading("Clan: every kind of router against every other");
    let mut fleet = Fleet::up(config, &matrix::specs(each), screen)?;
    let told = matrix::tell(&mut fleet).and_then(|mut report| {
        matrix::trouble(&mut fleet, &mut report, troubles)?;
        Ok(report)
    });
    if let Err(error) = &told {
        screen.failed(&error.chain());
    }
    let logs = fleet.record().logs();
    fleet.down()?;
    let report =
        told.map_err(|_| LabError::Promise(format!("it was not told to its end; logs: {}", logs.display())))?;
    let date = std::process::Command::new("date").args(["-u", "+%Y-%m-%d"]).output();
    let conditions = Conditions {
        date: date.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default(),
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
        processors: thread::available_parallelism().map_or(0, usize::from),
    };
    let document = report.document(&conditions);
    match out {
        Some(file) => std::fs::write(file, document)
            .map_err(|error| LabError::Promise(format!("cannot write {}: {error}", file.display()))),
        None => {
            document.lines().for_each(|line| screen.line(line));
            Ok(())
        }
    }
}

/// Keeps everything up to play with.
fn play(fleet: &mut Fleet, interrupt: &Interrupt, screen: &Screen) {
    let names: Vec<String> = fleet.computers().map(|computer| computer.name().to_owned()).collect();
    let first = names.last().cloned().unwrap_or_default();
    let program = std::env::current_exe().map_or_else(|_| "clan-lab".into(), |exe| exe.display().to_string());
    screen.heading("It stays up to play with");
    screen.line(&format!("   computers   {}", names.join(", ")));
    screen.line(&format!("   a shell     {program} on {first}"));
    screen.line(&format!("   a command   {program} on {first} clan status"));
    screen.line(&format!("   by name     {program} on {first} ping {}", five::host_name(five::FOUNDER)));
    screen.line(&format!("   logs        {}", fleet.record().logs().display()));
    screen.line("   to stop     Ctrl-C here, or `make stop` anywhere");
    while !interrupt.is_set() {
        thread::sleep(Duration::from_millis(100));
    }
    screen.line("");
}

/// Becomes a program on a computer.
fn on(config: &LabConfig, name: &str, command: &[String]) -> Result<(), LabError> {
    use std::os::unix::process::CommandExt;
    let record = Record::load(&config.prefix)?.filter(Record::is_running);
    let record = record.ok_or_else(|| LabError::Promise("the five are not up: start them with `make lab`".into()))?;
    let place = Place::find(&record, config, name)?;
    let (program, arguments) = match command.split_first() {
        Some((program, arguments)) => (program.as_str(), arguments),
        None => ("/bin/bash", command),
    };
    let mut command = place.command(program)?;
    command.args(arguments).env("PS1", format!("{name}$ "));
    if let Some(terminal) = std::env::var_os("TERM") {
        command.env("TERM", terminal);
    }
    let source = command.exec();
    Err(LabError::Io { what: format!("run {program} on {name}"), source })
}

/// Keeps everything up, and shows that it is.
fn stay(lab: &mut Lab, interrupt: &Interrupt, screen: &Screen) {
    let began = Instant::now();
    while !interrupt.is_set() {
        screen.status(&format!(
            "up for {} min · {} · Ctrl-C or `make stop` ends everything ",
            began.elapsed().as_secs() / 60,
            story::glance(lab)
        ));
        let pause = Instant::now();
        while pause.elapsed() < Duration::from_secs(5) && !interrupt.is_set() {
            thread::sleep(Duration::from_millis(100));
        }
    }
    screen.line("");
}

fn stop(config: &LabConfig, screen: &Screen) -> Result<(), LabError> {
    let Some(record) = Record::load(&config.prefix)? else {
        screen.line("No lab is up.");
        return Ok(());
    };
    if record.is_running() {
        screen.line(&format!("Asking process {} to take its lab down …", record.pid()));
        record.ask_to_end(Signal::TERM, Duration::from_secs(45));
    }
    if let Some(record) = Record::load(&config.prefix)? {
        record.ask_to_end(Signal::KILL, Duration::from_secs(5));
        sweep(&record)?;
    }
    screen.line("Nothing of the lab is left but its images, caches and logs.");
    Ok(())
}

fn web(config: &LabConfig, screen: &Screen, person: &str) -> Result<(), LabError> {
    let record = Record::load(&config.prefix)?.filter(Record::is_running);
    let record = record.ok_or_else(|| LabError::Promise("no lab is up: start one with `make run`".into()))?;
    screen.line(&story::web_link(&record, config, person)?);
    Ok(())
}

fn on_signals(interrupt: Interrupt) -> Result<(), LabError> {
    let failed = |source| LabError::Io { what: "listen for signals".into(), source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let (mut int, mut term, mut hup) = {
        use tokio::signal::unix::{SignalKind, signal};
        let _inside = runtime.enter();
        let listen = |kind| signal(kind).map_err(failed);
        (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?, listen(SignalKind::hangup())?)
    };
    let wait = move || {
        runtime.block_on(async move {
            loop {
                tokio::select! {
                    _ = int.recv() => {}
                    _ = term.recv() => {}
                    _ = hup.recv() => {}
                }
                interrupt.set();
            }
        });
    };
    thread::Builder::new().name("lab-signals".into()).spawn(wait).map(|_| ()).map_err(failed)
}
