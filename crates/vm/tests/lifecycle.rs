//! Start, adopt, end: with QEMU, and guests of a few bytes.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod guest;

use std::{fs, net::UdpSocket, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use clan_types::ByteSize;
use clan_vm::{Exit, ExitReason, UdpForward, Vm, VmError, VmSpec};
use guest::{LIMIT, Running, Then, adopted, says_r, spec, started, write_console};
use serde_json::{Value, json};
use tokio::time::timeout;

async fn exit(vm: &Vm) -> ExitReason {
    let Exit { reason } = timeout(LIMIT, vm.wait_exit()).await.expect("it ends");
    assert_eq!(vm.exited(), Some(Exit { reason }));
    reason
}

/// A forward from a loopback port, and a socket that holds it.
fn busy_forward() -> (UdpForward, UdpSocket) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    (UdpForward { host: socket.local_addr().unwrap(), guest_port: 41640 }, socket)
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn a_guest_boots_and_its_monitor_answers() {
    let folder = tempfile::tempdir().unwrap();
    let vm = started(&spec(folder.path(), &Then::Halt)).await;
    says_r(&vm).await;
    let status = vm.qmp().execute("query-status", Value::Null).await.unwrap();
    assert_eq!(status["status"], "running");
    let stats = vm.host_stats().unwrap();
    assert!(stats.rss > ByteSize::from_mib(8) && stats.cpu_time > Duration::ZERO && stats.threads >= 2);
    assert_eq!(vm.quit(LIMIT).await.reason, ExitReason::Quit);
    assert!(vm.host_stats().is_err());
}

#[tokio::test]
async fn a_guest_that_has_its_kernel_leaves_none_of_the_file_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path(), &Then::Halt);
    let image = fs::read(&spec.image.kernel).unwrap();
    let vm = started(&spec).await;
    says_r(&vm).await;
    assert!(!spec.dir.join("kernel").exists());
    assert_eq!(fs::read(&spec.image.kernel).unwrap(), image, "what others boot from stays");
    let maps = fs::read_to_string(format!("/proc/{}/smaps", vm.pid())).unwrap();
    let mapped: Vec<_> = maps.split("VmFlags").filter(|map| map.contains("/kernel (deleted)")).collect();
    assert!(!mapped.is_empty(), "QEMU keeps it mapped");
    assert!(mapped.iter().all(|map| map.contains("Rss:                   0 kB")), "{mapped:?}");
}

#[tokio::test]
async fn the_ports_of_agent_and_controller_are_there() {
    let folder = tempfile::tempdir().unwrap();
    let vm = started(&spec(folder.path(), &Then::Halt)).await;
    let chardevs = vm.qmp().execute("query-chardev", Value::Null).await.unwrap();
    for name in ["agent", "control", "console"] {
        assert!(chardevs.as_array().unwrap().iter().any(|c| c["label"] == name), "{name}");
    }
    vm.connect_agent().await.unwrap();
    vm.connect_control().await.unwrap();
    vm.quit(LIMIT).await;
}

#[tokio::test]
async fn other_users_can_neither_connect_nor_read() {
    let folder = tempfile::tempdir().unwrap();
    let vm = started(&spec(folder.path(), &Then::Halt)).await;
    let dir = folder.path().join("vm");
    assert_eq!(mode(&dir), 0o700);
    for file in fs::read_dir(&dir).unwrap() {
        let path = file.unwrap().path();
        assert_eq!(mode(&path) & 0o077, 0, "{}", path.display());
    }
    vm.quit(LIMIT).await;
}

#[tokio::test]
async fn a_long_path_is_no_obstacle() {
    let folder = tempfile::tempdir().unwrap();
    let long = folder.path().join("d".repeat(120));
    fs::create_dir(&long).unwrap();
    let vm = started(&spec(&long, &Then::Halt)).await;
    vm.connect_agent().await.unwrap();
    assert_eq!(vm.quit(LIMIT).await.reason, ExitReason::Quit);
}

#[tokio::test]
async fn power_off_and_reset_are_told_apart() {
    for (then, expected) in [(Then::PowerOffWhenTold, ExitReason::PoweredOff), (Then::ResetWhenTold, ExitReason::Reset)]
    {
        let folder = tempfile::tempdir().unwrap();
        let vm = started(&spec(folder.path(), &then)).await;
        says_r(&vm).await;
        write_console(&vm).await;
        assert_eq!(exit(&vm).await, expected);
    }
}

#[tokio::test]
async fn a_killed_machine_is_reported_to_all_who_wait() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path(), &Then::Halt);
    let vm = started(&spec).await;
    let other: Vm = (*vm).clone();
    let waiting = tokio::spawn(async move { exit(&other).await });
    vm.kill().unwrap();
    assert_eq!(exit(&vm).await, ExitReason::Signalled(9));
    assert_eq!(waiting.await.unwrap(), ExitReason::Signalled(9));
    vm.kill().unwrap();
    assert!(vm.qmp().execute("query-status", Value::Null).await.is_err());
    assert!(!Path::new(&format!("/proc/{}", vm.pid())).exists(), "it is reaped");
    // And the directory is free again.
    started(&spec).await.quit(LIMIT).await;
}

#[tokio::test]
async fn a_stopped_qemu_is_killed_after_the_grace() {
    let folder = tempfile::tempdir().unwrap();
    let vm = started(&spec(folder.path(), &Then::Halt)).await;
    let pid = rustix::process::Pid::from_raw(vm.pid().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    assert_eq!(vm.quit(Duration::from_millis(100)).await.reason, ExitReason::Signalled(9));
}

#[tokio::test]
async fn a_second_start_is_refused_while_the_first_runs() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path(), &Then::Halt);
    let vm = started(&spec).await;
    let refused = Vm::start(spec).await;
    assert!(matches!(refused, Err(VmError::AlreadyRunning { pid }) if pid == Some(vm.pid())), "{refused:?}");
    vm.quit(LIMIT).await;
}

#[tokio::test]
async fn of_many_starts_at_once_one_wins() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path(), &Then::Halt);
    let starts: Vec<_> = (0..4).map(|_| tokio::spawn(Vm::start(spec.clone()))).collect();
    let mut running = Vec::new();
    for start in starts {
        match start.await.unwrap() {
            Ok(vm) => running.push(Running::new(vm)),
            Err(error) => assert!(matches!(error, VmError::AlreadyRunning { .. }), "{error:?}"),
        }
    }
    assert_eq!(running.len(), 1);
    running[0].quit(LIMIT).await;
}

#[tokio::test]
async fn a_data_disk_belongs_to_one_machine_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let mut spec = spec(folder.path(), &Then::Halt);
    let vm = started(&spec).await;
    spec.dir = folder.path().join("other");
    let refused = Vm::start(spec.clone()).await;
    assert!(matches!(&refused, Err(VmError::Locked { path }) if *path == spec.data_disk), "{refused:?}");
    vm.quit(LIMIT).await;
}

#[tokio::test]
async fn a_machine_is_adopted_and_tells_how_it_ended() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path(), &Then::PowerOffWhenTold);
    let vm = started(&spec).await;
    let pid = vm.pid();
    vm.leave();
    let vm = adopted(&spec.dir).await;
    assert_eq!(vm.pid(), pid);
    assert_eq!(vm.qmp().execute("query-status", Value::Null).await.unwrap()["status"], "running");
    assert!(matches!(Vm::start(spec).await, Err(VmError::AlreadyRunning { .. })));
    says_r(&vm).await;
    write_console(&vm).await;
    assert_eq!(exit(&vm).await, ExitReason::PoweredOff);
}

#[tokio::test]
async fn nothing_is_adopted_where_nothing_runs() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path(), &Then::Halt);
    assert!(Vm::adopt(&spec.dir).await.unwrap().is_none());
    started(&spec).await.quit(LIMIT).await;
    assert!(Vm::adopt(&spec.dir).await.unwrap().is_none());
}

#[tokio::test]
async fn a_lost_or_damaged_process_file_does_not_lose_the_machine() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path(), &Then::Halt);
    let vm = started(&spec).await;
    let pid = vm.pid();
    vm.leave();
    for content in ["", "{\"version\":1,\"pid\":1,\"start_time\":0,\"boot_id\":\"x\"}"] {
        fs::write(spec.dir.join("pid.json"), content).unwrap();
        let vm = adopted(&spec.dir).await;
        assert_eq!(vm.pid(), pid);
        vm.leave();
    }
    let vm = adopted(&spec.dir).await;
    assert_eq!(vm.quit(LIMIT).await.reason, ExitReason::Quit);
}

#[tokio::test]
async fn a_busy_port_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut spec = spec(folder.path(), &Then::Halt);
    let (forward, held) = busy_forward();
    spec.forwards = vec![forward];
    let refused = Vm::start(spec.clone()).await;
    assert!(matches!(refused, Err(VmError::PortBusy { addr }) if addr == forward.host), "{refused:?}");
    drop(held);
    started(&spec).await.quit(LIMIT).await;
    // What only QEMU can notice: the same port twice.
    spec.forwards.push(forward);
    let refused = Vm::start(spec).await;
    assert!(matches!(refused, Err(VmError::PortBusy { addr }) if addr == forward.host), "{refused:?}");
}

#[tokio::test]
async fn what_the_user_can_remedy_has_an_error_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let good = spec(folder.path(), &Then::Halt);
    let refused = |change: fn(&mut VmSpec)| {
        let mut spec = good.clone();
        change(&mut spec);
        async move { Vm::start(spec).await.expect_err("it is refused") }
    };
    let error = refused(|s| s.qemu = clan_vm::Qemu::At("/nonexistent/qemu".into())).await;
    assert!(matches!(error, VmError::MissingQemu { .. }), "{error:?}");
    let error = refused(|s| s.image.layer = "/nonexistent/layer".into()).await;
    assert!(matches!(error, VmError::MissingFile { .. }), "{error:?}");
    let error = refused(|s| s.memory = ByteSize::from_mib(1 << 30)).await;
    assert!(matches!(error, VmError::TooLarge { .. }), "{error:?}");
    let error = refused(|s| s.name = "a,b".into()).await;
    assert!(matches!(error, VmError::BadSpec(_)), "{error:?}");
}

#[tokio::test]
async fn a_qemu_that_ends_at_once_leaves_its_words() {
    let folder = tempfile::tempdir().unwrap();
    let mut spec = spec(folder.path(), &Then::Halt);
    fs::write(&spec.image.kernel, b"no kernel").unwrap();
    let error = Vm::start(spec.clone()).await.expect_err("no kernel");
    assert!(matches!(&error, VmError::DiedAtStart { log } if log.contains("qemu")), "{error:?}");
    // The directory is free again.
    spec.image.kernel = folder.path().join("kernel2");
    fs::write(&spec.image.kernel, guest::kernel(&Then::Halt)).unwrap();
    started(&spec).await.quit(LIMIT).await;
}

#[tokio::test]
async fn a_console_that_nobody_reads_does_not_hold_the_guest_up() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path(), &Then::Talk);
    let vm = started(&spec).await;
    let said = || fs::metadata(spec.dir.join("console.log")).map_or(0, |meta| meta.len());
    guest::until("the guest talks", || said() > 0).await;
    let _unread = vm.connect_console().await.unwrap();
    let before = said();
    // More than QEMU and the kernel keep for a connection, which is 280 bytes here.
    guest::until("it goes on", || said() > before + 8192).await;
    vm.quit(LIMIT).await;
}

#[tokio::test]
async fn events_arrive() {
    let folder = tempfile::tempdir().unwrap();
    let vm = started(&spec(folder.path(), &Then::Halt)).await;
    let mut events = vm.qmp().events();
    vm.qmp().execute("stop", json!({})).await.unwrap();
    let event = timeout(LIMIT, events.recv()).await.unwrap().unwrap();
    assert_eq!(event.name, "STOP");
    vm.quit(LIMIT).await;
}
