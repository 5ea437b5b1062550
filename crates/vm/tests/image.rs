//! A whole guest: boots a clan image, whose folder the variable CLAN_TEST_IMAGE names.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    env,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use clan_types::{ByteSize, Timestamp};
use clan_vm::{
    AccelKind, Begin, Console, ExitReason, ImageFiles, Qemu, UdpForward, Vm, VmSpec, copy_data_disk, create_data_disk,
};
use clan_wire::{
    agent::{AgentRequest, AgentResponse, ENTROPY, MAX_MESSAGE, Renewal},
    codec,
    mux::{Event, Mux, Role},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::{timeout, timeout_at},
};

const BOOT_LIMIT: Duration = Duration::from_secs(40);

/// A machine that a failing test takes with it.
struct Running(Vm);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
    }
}

/// One question to the agent, and its answer.
async fn ask(port: &mut UnixStream, request: &AgentRequest) -> AgentResponse {
    // A session that repeats the nonce of the one before is taken for it.
    static SESSIONS: AtomicU64 = AtomicU64::new(0);
    let nonce = u64::from(std::process::id()) << 32 | SESSIONS.fetch_add(1, Ordering::Relaxed);
    let mut mux = Mux::new(Role::Host, nonce, "test", Instant::now());
    let (mut stream, mut answer, mut buffer) = (None, Vec::new(), [0; 4096]);
    loop {
        while let Some(bytes) = mux.poll_transmit() {
            port.write_all(&bytes).await.unwrap();
        }
        let due = mux.next_timeout().unwrap_or_else(|| Instant::now() + BOOT_LIMIT);
        match timeout_at(due.into(), port.read(&mut buffer)).await {
            Ok(read) => match read.unwrap() {
                0 => panic!("the port closed"),
                length => mux.handle_bytes(&buffer[..length]),
            },
            Err(_) => mux.handle_timeout(Instant::now()),
        }
        while let Some(event) = mux.poll_event() {
            match event {
                Event::Started { .. } => {
                    let id = mux.open().unwrap();
                    let bytes = codec::encode(request, MAX_MESSAGE).unwrap();
                    assert_eq!(mux.send(id, &bytes), bytes.len());
                    mux.fin(id);
                    stream = Some(id);
                }
                Event::Data(id, bytes) if Some(id) == stream => answer.extend(bytes),
                Event::Fin(id) if Some(id) == stream => {
                    return codec::decode(&answer[codec::PREFIX..]).unwrap();
                }
                Event::Reset(id) if Some(id) == stream => panic!("the agent refuses"),
                _ => {}
            }
        }
    }
}

fn spec(folder: &Path, begin: Begin) -> VmSpec {
    let image = PathBuf::from(env::var_os("CLAN_TEST_IMAGE").expect("CLAN_TEST_IMAGE names an image's folder"));
    VmSpec {
        dir: folder.join("vm"),
        name: "image".into(),
        image: ImageFiles {
            kernel: image.join("kernel"),
            initramfs: image.join("initramfs"),
            root: image.join("root.erofs"),
            layer: image.join("layer.erofs"),
            boot: image.join("boot.img"),
        },
        data_disk: folder.join("data.ext4"),
        passphrase: None,
        memory: ByteSize::from_mib(256),
        cpus: 1,
        accelerator: AccelKind::Tcg,
        forwards: vec![UdpForward { host: "127.0.0.1:0".parse().unwrap(), guest_port: 41640 }],
        qemu: Qemu::Search,
        begin,
    }
}

#[tokio::test]
#[ignore = "needs an image: set CLAN_TEST_IMAGE to its folder"]
async fn an_image_boots_twice_on_its_data_disk_and_powers_off_on_request() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path(), Begin::Boot);
    create_data_disk(&spec.data_disk, ByteSize::from_mib(512)).await.unwrap();
    for _ in 0..2 {
        let start = Instant::now();
        let vm = Running(Vm::start(spec.clone()).await.unwrap());
        let Running(vm) = &vm;
        println!("monitor after {:?}", start.elapsed());
        let mut port = vm.connect_agent().await.unwrap();
        let answer = timeout(BOOT_LIMIT, ask(&mut port, &AgentRequest::Ping)).await;
        let answer = answer.unwrap_or_else(|_| panic!("no answer; console:\n{}", vm.console_tail(40).unwrap()));
        println!("{answer:?} after {:?}; {:?}", start.elapsed(), vm.host_stats().unwrap());
        assert!(matches!(&answer, AgentResponse::Pong { problems, .. } if problems.is_empty()), "{answer:?}");
        drop(port);
        let mut port = vm.connect_agent().await.unwrap();
        timeout(BOOT_LIMIT, ask(&mut port, &AgentRequest::PowerOffNow)).await.unwrap();
        let exit = timeout(BOOT_LIMIT, vm.wait_exit()).await;
        let exit = exit.unwrap_or_else(|_| panic!("still there; console:\n{}", vm.console_tail(40).unwrap()));
        assert_eq!(exit.reason, ExitReason::PoweredOff, "console:\n{}", vm.console_tail(40).unwrap());
        println!("ended {:?} after the start", start.elapsed());
    }
}

/// What the shell on a guest's console answers.
async fn shell(console: &mut Console, command: &str) -> String {
    static COMMANDS: AtomicU64 = AtomicU64::new(0);
    let number = COMMANDS.fetch_add(1, Ordering::Relaxed);
    // What is typed is echoed: only what the shell makes of it has no quotes.
    let line = format!("\necho beg\"\"in{number}; {command}; echo e\"\"nd{number}\n");
    console.write_all(line.as_bytes()).await.unwrap();
    let (first, last) = (format!("begin{number}"), format!("end{number}"));
    let (mut said, mut buffer) = (String::new(), [0; 4096]);
    loop {
        if let Some((_, after)) = said.split_once(&first)
            && let Some((between, _)) = after.split_once(&last)
        {
            return between.trim().to_owned();
        }
        let length = timeout(BOOT_LIMIT, console.read(&mut buffer)).await.unwrap_or_else(|_| panic!("{said}")).unwrap();
        said.push_str(&String::from_utf8_lossy(&buffer[..length]));
    }
}

#[tokio::test]
#[ignore = "needs an image: set CLAN_TEST_IMAGE to its folder"]
async fn guests_from_one_template_answer_at_once_and_differ() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let first = spec(folder.path(), Begin::BootToSave);
    create_data_disk(&first.data_disk, ByteSize::from_mib(512)).await.unwrap();
    let start = Instant::now();
    let vm = Running(Vm::start(first.clone()).await.unwrap());
    let mut port = vm.0.connect_agent().await.unwrap();
    loop {
        match timeout(BOOT_LIMIT, ask(&mut port, &AgentRequest::Seal)).await.unwrap() {
            AgentResponse::Done => break,
            AgentResponse::Failed(_) if start.elapsed() < BOOT_LIMIT => {}
            other => panic!("{other:?}; console:\n{}", vm.0.console_tail(40).unwrap()),
        }
        drop(port);
        tokio::time::sleep(Duration::from_millis(300)).await;
        port = vm.0.connect_agent().await.unwrap();
    }
    drop(port);
    println!("at the gate after {:?}", start.elapsed());
    // Until the rest of the system has settled.
    let mut before = vm.0.host_stats().unwrap().cpu_time;
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = vm.0.host_stats().unwrap().cpu_time;
        if now - before < Duration::from_millis(100) || start.elapsed() > BOOT_LIMIT {
            break;
        }
        before = now;
    }
    println!("settled after {:?}", start.elapsed());
    let saving = Instant::now();
    vm.0.save(&state).await.unwrap();
    println!("saved in {:?}: {:?}", saving.elapsed(), std::fs::metadata(&state).unwrap().len());
    vm.0.quit(Duration::from_secs(2)).await;
    let mut told = Vec::new();
    for name in ["one", "two"] {
        let copy = VmSpec {
            dir: folder.path().join(name),
            data_disk: folder.path().join(format!("data-{name}")),
            begin: Begin::Saved(state.clone()),
            ..first.clone()
        };
        copy_data_disk(&first.data_disk, &copy.data_disk).unwrap();
        let start = Instant::now();
        let vm = Running(Vm::start(copy).await.unwrap());
        println!("monitor after {:?}", start.elapsed());
        let now = Timestamp::from_millis(1_800_000_000_000);
        let renewal = Renewal { now, entropy: vec![told.len() as u8 + 1; ENTROPY] };
        let mut port = vm.0.connect_agent().await.unwrap();
        let answer = timeout(BOOT_LIMIT, ask(&mut port, &AgentRequest::Renew(renewal.into()))).await.unwrap();
        println!("renewed after {:?}", start.elapsed());
        assert_eq!(answer, AgentResponse::Done);
        drop(port);
        let mut port = vm.0.connect_agent().await.unwrap();
        let answer = timeout(BOOT_LIMIT, ask(&mut port, &AgentRequest::Ping)).await.unwrap();
        println!("{answer:?} after {:?}, {:?}", start.elapsed(), vm.0.host_stats().unwrap());
        let AgentResponse::Pong { boot_id, .. } = answer else { panic!("{answer:?}") };
        drop(port);
        let mut console = vm.0.connect_console().await.unwrap();
        let machine_id = shell(&mut console, "cat /etc/machine-id").await;
        let mac = shell(&mut console, "cat /sys/class/net/eth0/address").await;
        assert_eq!(shell(&mut console, "date -u +%Y").await, "2027");
        println!("{machine_id} {mac}");
        let keys =
            shell(&mut console, "until [ -s /data/clan/machine.key ]; do sleep 0.1; done; md5sum /data/clan/*.key")
                .await;
        println!("{keys} after {:?}", start.elapsed());
        told.push((boot_id, machine_id, mac, keys));
    }
    let ((b1, i1, m1, k1), (b2, i2, m2, k2)) = (&told[0], &told[1]);
    assert!(b1 != b2 && i1 != i2 && m1 != m2 && k1 != k2, "{told:?}");
}
