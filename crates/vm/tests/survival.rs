//! A virtual machine and the program that started it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod guest;

use std::{
    env, fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use clan_vm::{Begin, ExitReason, Vm, VmSpec, copy_data_disk};
use guest::{LIMIT, Then, adopted, feeders, gone, kill, says_r, spec, started, write_console};
use tokio::time::timeout;

const FOLDER: &str = "CLAN_VM_TEST_FOLDER";

#[tokio::test]
#[ignore = "not a test by itself: another test runs it as a program of its own, and kills it"]
async fn starter() {
    let folder = env::var_os(FOLDER).expect("run by the other test");
    let vm = started(&spec(Path::new(&folder), &Then::PowerOffWhenTold)).await;
    println!("\nstarted {}", vm.pid());
    std::future::pending::<()>().await;
}

#[tokio::test]
#[ignore = "not a test by itself: another test runs it as a program of its own, and kills it"]
async fn saver() {
    let folder = env::var_os(FOLDER).expect("run by the other test");
    let folder = Path::new(&folder);
    let vm = started(&VmSpec { begin: Begin::BootToSave, ..spec(folder, &Then::PowerOffWhenTold) }).await;
    says_r(&vm).await;
    println!("\nstarted {}", vm.pid());
    for number in 0.. {
        vm.save(&folder.join(format!("state-{number}"))).await.unwrap();
        vm.resume().await.unwrap();
    }
}

/// Runs `starter`, and kills it once it has started the machine. Returns the machine's process.
fn start_and_die(folder: &Path) -> u32 {
    run_and_kill("starter", folder, || {})
}

/// Runs a program of this file, and kills it after it has started the machine and `wait` has returned.
fn run_and_kill(name: &str, folder: &Path, wait: impl FnOnce()) -> u32 {
    let mut program = Command::new(env::current_exe().unwrap())
        .args(["--exact", name, "--ignored", "--nocapture"])
        .env(FOLDER, folder)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(program.stdout.take().unwrap()).lines().map_while(Result::ok);
    let pid = lines.find_map(|line| line.strip_prefix("started ")?.parse().ok());
    if pid.is_some() {
        wait();
    }
    program.kill().unwrap();
    program.wait().unwrap();
    pid.expect("it starts")
}

#[tokio::test]
async fn a_machine_survives_the_program_that_started_it() {
    let folder = tempfile::tempdir().unwrap();
    let pid = start_and_die(folder.path());
    let vm = adopted(&folder.path().join("vm")).await;
    assert_eq!(vm.pid(), pid);
    says_r(&vm).await;
    write_console(&vm).await;
    assert_eq!(timeout(LIMIT, vm.wait_exit()).await.expect("it ends").reason, ExitReason::PoweredOff);
}

#[tokio::test]
async fn an_adopted_machine_can_be_killed() {
    let folder = tempfile::tempdir().unwrap();
    start_and_die(folder.path());
    let vm = adopted(&folder.path().join("vm")).await;
    // As its starter leaves it that is killed before it has taken it back.
    let kernel = folder.path().join("vm/kernel");
    fs::write(&kernel, "lent").unwrap();
    vm.kill().unwrap();
    assert_eq!(timeout(LIMIT, vm.wait_exit()).await.expect("it ends").reason, ExitReason::Signalled(9));
    assert!(Vm::adopt(&folder.path().join("vm")).await.unwrap().is_none());
    assert!(!kernel.exists());
}

#[tokio::test]
async fn a_machine_whose_starter_was_killed_while_it_saved_goes_on_and_can_be_saved_again() {
    for number in [0, 2] {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join(format!("state-{number}"));
        let deadline = Instant::now() + LIMIT;
        let pid = run_and_kill("saver", folder.path(), || {
            while !state.exists() && Instant::now() < deadline {
                std::thread::yield_now();
            }
        });
        let vm = adopted(&folder.path().join("vm")).await;
        assert_eq!(vm.pid(), pid);
        if vm.is_paused().await.unwrap() {
            vm.resume().await.unwrap();
        }
        let again = folder.path().join("again");
        vm.save(&again).await.unwrap();
        assert!(!folder.path().join("vm/save.sock").exists());
        // What was saved then is whole: another machine goes on from it.
        let data_disk = folder.path().join("data-again");
        copy_data_disk(&folder.path().join("data"), &data_disk).unwrap();
        vm.resume().await.unwrap();
        let dir = folder.path().join("vm-again");
        let first = spec(folder.path(), &Then::PowerOffWhenTold);
        let copy = started(&VmSpec { dir, data_disk, begin: Begin::Saved(again), ..first }).await;
        for vm in [&vm, &copy] {
            write_console(vm).await;
            assert_eq!(timeout(LIMIT, vm.wait_exit()).await.expect("it ends").reason, ExitReason::PoweredOff);
        }
    }
}

#[tokio::test]
async fn when_all_are_killed_nothing_is_left_whatever_the_order() {
    // The program first; then QEMU, pasta, or what pasta waits for.
    for victim in 0..3 {
        let folder = tempfile::tempdir().unwrap();
        let pid = start_and_die(folder.path());
        let feeders = feeders(pid);
        kill([pid, feeders[0], feeders[1]][victim]);
        if victim > 0 {
            // Whoever comes next ends what has no network, and says so.
            let vm = adopted(&folder.path().join("vm")).await;
            assert_eq!(timeout(LIMIT, vm.wait_exit()).await.expect("it ends").reason, ExitReason::NetworkLost);
        }
        gone(&[pid, feeders[0], feeders[1]]).await;
    }
}

#[tokio::test]
async fn a_machine_has_a_session_of_its_own_and_no_way_to_more_privileges() {
    let folder = tempfile::tempdir().unwrap();
    let vm = started(&spec(folder.path(), &Then::Halt)).await;
    let pid = rustix::process::Pid::from_raw(vm.pid().try_into().unwrap());
    assert_eq!(rustix::process::getsid(pid).unwrap(), pid.unwrap());
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    assert!(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"), "{status}");
    // Root in its own namespace can do nothing there either.
    let capabilities: Vec<_> = status.lines().filter(|line| line.starts_with("Cap")).collect();
    assert_eq!(*vm.network(), clan_vm::Network::Apart);
    assert!(
        capabilities.len() >= 5 && capabilities.iter().all(|line| line.ends_with("\t0000000000000000")),
        "{status}"
    );
    let environment = std::fs::read(format!("/proc/{}/environ", vm.pid())).unwrap();
    let names = environment.split(|b| *b == 0).filter_map(|v| v.split(|b| *b == b'=').next());
    assert!(names.filter(|n| !n.is_empty()).all(|n| n == b"PATH" || n == b"LC_ALL"));
    vm.quit(LIMIT).await;
}
