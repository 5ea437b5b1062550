//! `clan-lab`: the product's story on one machine.

use std::{
    path::PathBuf,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use clan_lab::{Interrupt, Lab, LabConfig, LabError, Record, Screen, story, sweep};
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
        Verb::Stop => stop(&config, screen),
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
