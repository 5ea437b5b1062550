//! Guests of a few bytes: a kernel with a PVH entry point that says R on the serial port, then does one thing.

use std::{
    fs,
    ops::Deref,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clan_types::ByteSize;
use clan_vm::{AccelKind, Begin, ImageFiles, Qemu, Vm, VmSpec};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{io::AsyncWriteExt, time::timeout};

/// For anything that an idle computer does in a fraction of a second.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// What the guest does after it said R.
#[allow(dead_code, reason = "not every test program wants every guest")]
pub(crate) enum Then {
    /// Nothing, for ever.
    Halt,
    /// Powers off when somebody writes a byte to the console.
    PowerOffWhenTold,
    /// Resets when somebody writes a byte to the console.
    ResetWhenTold,
    /// Writes to the console for ever, some ten thousand bytes a second.
    Talk,
}

fn code(then: &Then) -> Vec<u8> {
    let say_r = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'R', 0xee, 0xb0, b'\n', 0xee]; // mov dx, 0x3f8; out 'R', '\n'
    let wait = [
        0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd (line status)
        0xec, 0xa8, 0x01, // in al, dx; test al, 1
        0x74, 0xfb, // jz -5
    ];
    // ICH9: ACPI base and enable in the LPC bridge's configuration, then sleep type 0 and enable in PM1a_CNT.
    let power_off = [
        &[0xb8, 0x40, 0xf8, 0x00, 0x80, 0x66, 0xba, 0xf8, 0x0c, 0xef][..], // 0xcf8 <- 0x8000f840
        &[0xb8, 0x01, 0x06, 0x00, 0x00, 0x66, 0xba, 0xfc, 0x0c, 0xef],     // 0xcfc <- 0x601
        &[0xb8, 0x44, 0xf8, 0x00, 0x80, 0x66, 0xba, 0xf8, 0x0c, 0xef],     // 0xcf8 <- 0x8000f844
        &[0xb8, 0x80, 0x00, 0x00, 0x00, 0x66, 0xba, 0xfc, 0x0c, 0xef],     // 0xcfc <- 0x80
        &[0x66, 0xb8, 0x00, 0x20, 0x66, 0xba, 0x04, 0x06, 0x66, 0xef],     // 0x604 <- 0x2000
    ]
    .concat();
    let reset = [0xb0, 0xfe, 0xe6, 0x64]; // out 0x64, 0xfe
    let halt = [0xfa, 0xf4, 0xeb, 0xfd]; // cli; hlt; jmp -3
    let talk = [
        &[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x20, 0x74, 0xfb][..], // wait until there is room (line status)
        &[0x66, 0xba, 0xf8, 0x03, 0xb0, b'.', 0xee],                 // mov dx, 0x3f8; out '.'
        &[0xb9, 0x00, 0x80, 0x00, 0x00, 0xe2, 0xfe],                 // mov ecx, 0x8000; loop
        &[0xeb, 0xe7],                                               // jmp -25
    ]
    .concat();
    match then {
        Then::Talk => [&say_r[..], &talk].concat(),
        Then::Halt => [&say_r[..], &halt].concat(),
        Then::PowerOffWhenTold => [&say_r[..], &wait, &power_off, &halt].concat(),
        Then::ResetWhenTold => [&say_r[..], &wait, &reset, &halt].concat(),
    }
}

/// A 32-bit ELF file with the note that names the PVH entry point.
pub(crate) fn kernel(then: &Then) -> Vec<u8> {
    const BASE: u32 = 0x10_0000;
    const NOTE: u32 = 52 + 2 * 32;
    const NOTE_LEN: u32 = 20;
    const CODE: u32 = NOTE + NOTE_LEN;
    let code = code(then);
    let len = CODE + code.len() as u32;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |elf: &mut Vec<u8>, v: u16| elf.extend(v.to_le_bytes());
    let word = |elf: &mut Vec<u8>, words: &[u32]| words.iter().for_each(|v| elf.extend(v.to_le_bytes()));
    half(&mut elf, 2); // executable
    half(&mut elf, 3); // 386
    word(&mut elf, &[1, BASE + CODE, 52, 0, 0]);
    [52, 32, 2, 0, 0, 0].into_iter().for_each(|v| half(&mut elf, v));
    word(&mut elf, &[1, 0, BASE, BASE, len, len, 5, 4096]); // PT_LOAD
    word(&mut elf, &[4, NOTE, BASE + NOTE, BASE + NOTE, NOTE_LEN, NOTE_LEN, 4, 4]); // PT_NOTE
    word(&mut elf, &[4, 4, 18]); // XEN_ELFNOTE_PHYS32_ENTRY
    elf.extend(b"Xen\0");
    word(&mut elf, &[BASE + CODE]);
    elf.extend(code);
    elf
}

/// A virtual machine in a folder, not started.
pub(crate) fn spec(folder: &Path, then: &Then) -> VmSpec {
    let file = |name: &str, content: &[u8]| -> PathBuf {
        let path = folder.join(name);
        fs::write(&path, content).unwrap();
        path
    };
    let disk = vec![0; 1 << 20];
    VmSpec {
        dir: folder.join("vm"),
        name: "test".into(),
        image: ImageFiles {
            kernel: file("kernel", &kernel(then)),
            initramfs: file("initramfs", b"initramfs"),
            root: file("root, \"1\"", &disk),
            layer: file("layer", &disk),
            boot: file("boot", &disk),
        },
        data_disk: file("data", &disk),
        passphrase: None,
        memory: ByteSize::from_mib(32),
        cpus: 1,
        accelerator: AccelKind::Tcg,
        forwards: Vec::new(),
        qemu: Qemu::Search,
        begin: Begin::Boot,
    }
}

/// Waits for a condition.
#[allow(dead_code, reason = "not every test program wants it")]
pub(crate) async fn until(what: &str, mut met: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !met() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A running machine that a failing test takes with it.
pub(crate) struct Running(Option<Vm>);

impl Running {
    pub(crate) fn new(vm: Vm) -> Self {
        Self(Some(vm))
    }

    /// Lets go of it, and lets it run.
    #[allow(dead_code, reason = "not every test program wants it")]
    pub(crate) fn leave(mut self) {
        self.0 = None;
    }
}

impl Deref for Running {
    type Target = Vm;
    fn deref(&self) -> &Vm {
        self.0.as_ref().expect("only `leave` takes it")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(vm) = &self.0 {
            // It may have ended.
            let _ = vm.kill();
        }
    }
}

/// Starts it.
#[allow(dead_code, reason = "not every test program wants it")]
pub(crate) async fn started(spec: &VmSpec) -> Running {
    Running::new(timeout(LIMIT, Vm::start(spec.clone())).await.expect("start returns").unwrap())
}

/// Finds it again.
#[allow(dead_code, reason = "not every test program wants it")]
pub(crate) async fn adopted(dir: &Path) -> Running {
    Running::new(timeout(LIMIT, Vm::adopt(dir)).await.expect("adopt returns").unwrap().expect("it still runs"))
}

/// Waits until the guest has said R.
#[allow(dead_code, reason = "not every test program wants it")]
pub(crate) async fn says_r(vm: &Vm) {
    until("the guest says R", || vm.console_tail(1).is_ok_and(|text| text.ends_with('R'))).await;
}

/// Writes a byte to the console.
#[allow(dead_code, reason = "not every test program wants it")]
pub(crate) async fn write_console(vm: &Vm) {
    let mut console = vm.connect_console().await.unwrap();
    console.write_all(b"x").await.unwrap();
    // QEMU may be gone before this is over.
    let _ = console.shutdown().await;
}

/// The processes that make a machine's network: what lives in its namespace beside QEMU, and that one's parent.
#[allow(dead_code, reason = "not every test program wants it")]
pub(crate) fn feeders(qemu: u32) -> Vec<u32> {
    let network = |pid: u32| fs::metadata(format!("/proc/{pid}/ns/net")).map(|meta| meta.ino());
    let its = network(qemu).unwrap();
    let others = fs::read_dir("/proc").unwrap().filter_map(|e| e.unwrap().file_name().to_str()?.parse::<u32>().ok());
    let mut found = Vec::new();
    for pid in others.filter(|&pid| pid != qemu && network(pid).is_ok_and(|other| other == its)) {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let parent = stat.rsplit_once(") ").unwrap().1.split(' ').nth(1).unwrap().parse().unwrap();
        found.extend([parent, pid]);
    }
    assert_eq!(found.len(), 2, "pasta and its child: {found:?}");
    found
}

#[allow(dead_code, reason = "not every test program wants it")]
pub(crate) fn kill(pid: u32) {
    kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), Signal::KILL).unwrap();
}

/// Dead and waiting for its parent counts: in a container, nobody may wait for orphans.
#[allow(dead_code, reason = "not every test program wants it")]
pub(crate) async fn gone(pids: &[u32]) {
    let is_gone = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/stat"))
            .map_or(true, |stat| stat.rsplit_once(") ").unwrap().1.starts_with('Z'))
    };
    until("they are gone", || pids.iter().all(is_gone)).await;
}
