//! A whole guest: boots a clan image, whose folder the variable CLAN_TEST_IMAGE names.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    env,
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use clan_types::ByteSize;
use clan_vm::{AccelKind, ExitReason, ImageFiles, Qemu, UdpForward, Vm, VmSpec, create_data_disk};
use clan_wire::{
    agent::{AgentRequest, AgentResponse, MAX_MESSAGE},
    codec,
    mux::{Event, Mux, Role},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::{timeout, timeout_at},
};

const BOOT_LIMIT: Duration = Duration::from_secs(60);

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

#[tokio::test]
#[ignore = "needs an image: set CLAN_TEST_IMAGE to its folder"]
async fn an_image_boots_twice_on_its_data_disk_and_powers_off_on_request() {
    let image = PathBuf::from(env::var_os("CLAN_TEST_IMAGE").expect("CLAN_TEST_IMAGE names an image's folder"));
    let folder = tempfile::tempdir().unwrap();
    let spec = VmSpec {
        dir: folder.path().join("vm"),
        name: "image".into(),
        image: ImageFiles {
            kernel: image.join("kernel"),
            initramfs: image.join("initramfs"),
            root: image.join("root.erofs"),
            layer: image.join("layer.erofs"),
            boot: image.join("boot.img"),
        },
        data_disk: folder.path().join("data.ext4"),
        memory: ByteSize::from_mib(256),
        cpus: 1,
        accelerator: AccelKind::Tcg,
        forwards: vec![UdpForward { host: "127.0.0.1:0".parse().unwrap(), guest_port: 41640 }],
        qemu: Qemu::Search,
    };
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
