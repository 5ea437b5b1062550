//! From the kernel's hand-over to the guest's own init.

use std::{
    ffi::{CStr, CString},
    fs::{self, File},
    io,
    path::Path,
    process::ExitCode,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::Access,
    io::Errno,
    mount::{MountFlags, mount, mount_move},
    process::{Pid, Signal, WaitOptions, chroot, kill_process, setsid, waitpid},
    system::finit_module,
};

use crate::{
    cmdline::{CmdlineError, Disks},
    disk, log,
    port::Conversation,
    renew,
    start::Start,
};

/// How long a disk may take to appear.
const DISK_PATIENCE: Duration = Duration::from_secs(20);
const INIT: &CStr = c"/sbin/init";
/// How the copy that stays is named. Systemd lets programs of root whose name begins with `@` live through the shutdown.
const RESIDENT: &CStr = c"@clan-agent";
/// Is there once virtio-serial ports can be.
const PORTS: &str = "/sys/class/virtio-ports";
/// The data disk carries the root file system, so systemd cannot release it as it stops the mounts. This leaves it to the
/// last step of the shutdown, which makes it read-only, so that it is clean at the next start.
const DATA_MOUNT: &str = "[Unit]\nDefaultDependencies=no\n";
const DATA_MOUNT_AT: &str = "/new/run/systemd/system/data.mount.d";
/// `MODULE_INIT_COMPRESSED_FILE`.
const COMPRESSED: i32 = 4;

/// A step that failed, and so stops the start.
#[derive(Debug, thiserror::Error)]
enum BootError {
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    #[error("the disk {0} did not appear")]
    NoDisk(String),
    #[error("cannot {action}: {error}")]
    Step { action: String, error: io::Error },
}

/// Adds to an error what was attempted.
trait Attempt<T> {
    fn attempt(self, action: impl FnOnce() -> String) -> Result<T, BootError>;
}

impl<T, E: Into<io::Error>> Attempt<T> for Result<T, E> {
    fn attempt(self, action: impl FnOnce() -> String) -> Result<T, BootError> {
        self.map_err(|error| BootError::Step { action: action(), error: error.into() })
    }
}

/// Starts the guest, and answers the manager meanwhile. If that fails, stays as its only program. Never ends: the kernel would
/// panic.
pub(crate) fn boot() -> ExitCode {
    let begin = Instant::now();
    let start = Arc::new(Start::default());
    if let Err(error) = kernel_mounts() {
        note(&start, &error.to_string());
    }
    log::open();
    let mut answering = None;
    load_modules(&start, || {
        if answering.is_none() && Path::new(PORTS).exists() {
            let conversation = Conversation::new(start.clone());
            answering = Some(thread::spawn(|| conversation.while_starting()));
        }
    });
    log::info(&format!("modules loaded after {} ms", begin.elapsed().as_millis()));
    // The new root is entered only once everything in it is in place.
    match stack_disks().and_then(|disks| enter(&disks)) {
        Ok(()) => {
            start.enter();
            if let Err(error) = disk::grow(0) {
                note(&start, &format!("the data disk is not used to its end: {error}"));
            }
            log::info(&format!("root file system ready after {} ms", begin.elapsed().as_millis()));
        }
        Err(error) => {
            note(&start, &error.to_string());
            start.fail();
        }
    }
    // A process of several threads is not to be copied.
    start.end();
    let conversation = answering.and_then(|thread| thread.join().ok());
    let conversation = conversation.unwrap_or_else(|| Conversation::new(start.clone()));
    let conversation = if start.has_root() { start_init(conversation, &start) } else { conversation };
    log::error("the guest was not started; waiting for the manager");
    conversation.for_ever()
}

fn note(start: &Start, text: &str) {
    log::error(text);
    start.note(text.to_owned());
}

fn kernel_mounts() -> Result<(), BootError> {
    for (kind, at) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        directory(at)?;
        match mount(kind, at, kind, MountFlags::empty(), None) {
            // The kernel may have done it.
            Err(Errno::BUSY) => {}
            other => other.attempt(|| format!("mount {at}"))?,
        }
    }
    Ok(())
}

/// Loads what the image's builder listed, and tells after each. A module that does not load is a problem, but maybe not one
/// for this guest.
fn load_modules(start: &Start, mut loaded: impl FnMut()) {
    let list = match fs::read_to_string("/modules.list") {
        Ok(list) => list,
        Err(error) => return note(start, &format!("cannot read /modules.list: {error}")),
    };
    for path in list.lines().map(str::trim).filter(|path| !path.is_empty()) {
        let flags = if path.ends_with(".ko") { 0 } else { COMPRESSED };
        let outcome = File::open(path).and_then(|file| match finit_module(&file, c"", flags) {
            Err(Errno::EXIST) => Ok(()),
            other => Ok(other?),
        });
        if let Err(error) = outcome {
            note(start, &format!("cannot load {path}: {error}"));
        }
        loaded();
    }
}

/// Mounts the disks and stacks them at `/new`.
fn stack_disks() -> Result<Disks, BootError> {
    let cmdline = fs::read_to_string("/proc/cmdline").attempt(|| "read the kernel's command line".into())?;
    let disks = Disks::parse(&cmdline)?;
    mount_disk(&disks.root, "/root", "erofs", MountFlags::RDONLY, None)?;
    let mut lower = Vec::new();
    for (number, layer) in disks.layers.iter().enumerate() {
        let at = format!("/layer{number}");
        mount_disk(layer, &at, "erofs", MountFlags::RDONLY, None)?;
        lower.push(at);
    }
    lower.push("/root".to_owned());
    mount_disk(&disks.data, "/data", "ext4", MountFlags::NOATIME, Some(c"errors=remount-ro"))?;
    directory("/data/overlay/upper")?;
    directory("/data/overlay/work")?;
    directory("/new")?;
    // The lower layers change with every update of the image, so nothing may be recorded that refers to their inodes.
    let options = format!(
        "lowerdir={},upperdir=/data/overlay/upper,workdir=/data/overlay/work,index=off,metacopy=off,redirect_dir=off",
        lower.join(":")
    );
    let options = CString::new(options).map_err(io::Error::from).attempt(|| "name the layers".into())?;
    mount("overlay", "/new", "overlay", MountFlags::NOATIME, options.as_c_str())
        .attempt(|| "stack the root file system".into())?;
    Ok(disks)
}

fn mount_disk(name: &str, at: &str, kind: &str, flags: MountFlags, options: Option<&CStr>) -> Result<(), BootError> {
    let device = format!("/dev/{name}");
    let begin = Instant::now();
    while !Path::new(&device).exists() {
        if begin.elapsed() > DISK_PATIENCE {
            return Err(BootError::NoDisk(device));
        }
        thread::sleep(Duration::from_millis(2));
    }
    directory(at)?;
    mount(device.as_str(), at, kind, flags, options).attempt(|| format!("mount {device} as {kind}"))
}

/// Makes the stacked file system the root, of all threads of this process.
fn enter(disks: &Disks) -> Result<(), BootError> {
    rustix::fs::accessat(
        rustix::fs::CWD,
        Path::new("/new").join(INIT.to_string_lossy().trim_start_matches('/')),
        Access::EXEC_OK,
        rustix::fs::AtFlags::empty(),
    )
    .or_else(|error| {
        // An absolute symbolic link does not resolve from out here.
        fs::symlink_metadata("/new/sbin/init").map(drop).map_err(|_| error)
    })
    .attempt(|| "find /sbin/init in the image".into())?;
    for at in ["/new/data", "/new/dev", "/new/proc", "/new/run", "/new/sys"] {
        directory(at)?;
    }
    mount("tmpfs", "/new/run", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=755,size=20%")
        .attempt(|| "mount /run".into())?;
    directory(DATA_MOUNT_AT)?;
    fs::write(format!("{DATA_MOUNT_AT}/clan.conf"), DATA_MOUNT).attempt(|| "write to /run".into())?;
    if disks.template {
        renew::make_gate(Path::new("/new")).attempt(|| "make the controller wait".into())?;
    }
    for name in ["data", "dev", "sys", "proc"] {
        mount_move(format!("/{name}"), format!("/new/{name}")).attempt(|| format!("move /{name}"))?;
    }
    // What the initramfs held is memory.
    let _ = fs::remove_dir_all("/modules");
    rustix::process::chdir("/new").attempt(|| "enter the root file system".into())?;
    mount_move(".", "/").attempt(|| "move the root file system".into())?;
    chroot(".").attempt(|| "change to the root file system".into())?;
    rustix::process::chdir("/").attempt(|| "enter the root file system".into())
}

fn directory(at: &str) -> Result<(), BootError> {
    fs::create_dir_all(at).attempt(|| format!("create {at}"))
}

/// Leaves a copy of this process running, which goes on with the conversation, then becomes the guest's init. Returns only if
/// that fails.
fn start_init(conversation: Conversation, start: &Arc<Start>) -> Conversation {
    // SAFETY: this process has one thread, so the child may do anything.
    let child = match unsafe { libc::fork() } {
        0 => stay(conversation),
        child if child < 0 => {
            note(start, &format!("cannot stay beside init: {}", io::Error::last_os_error()));
            return conversation;
        }
        child => child,
    };
    // The port is the child's.
    drop(conversation);
    note(start, &format!("cannot start /sbin/init: {}", become_init()));
    if let Some(child) = Pid::from_raw(child) {
        let _ = kill_process(child, Signal::KILL);
        let _ = waitpid(Some(child), WaitOptions::empty());
    }
    Conversation::new(start.clone())
}

fn stay(conversation: Conversation) -> ! {
    let _ = setsid();
    if let Err(error) = rename(RESIDENT) {
        log::error(&format!("systemd will not let this program live through the shutdown: {error}"));
    }
    conversation.for_ever()
}

/// Changes what this process is called, and what its first argument is, by which systemd goes.
fn rename(name: &'static CStr) -> io::Result<()> {
    let begin = name.as_ptr() as usize;
    let set = |option: libc::c_int, value: usize| {
        // SAFETY: the kernel is told where to read the arguments from, for others who ask: a constant of this program, which
        // lives as long as it.
        match unsafe { libc::prctl(libc::PR_SET_MM, option, value, 0, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    rustix::thread::set_name(name)?;
    // Programs are mapped below the stack, where the arguments were: the end stays behind the beginning.
    set(libc::PR_SET_MM_ARG_START, begin)?;
    set(libc::PR_SET_MM_ARG_END, begin + name.count_bytes() + 1)
}

/// Becomes the guest's init. Returns only if that fails.
fn become_init() -> io::Error {
    let args = [INIT.as_ptr(), std::ptr::null()];
    // SAFETY: the path and the argument end with NUL, the list with a null pointer; all outlive the call.
    unsafe { libc::execv(INIT.as_ptr(), args.as_ptr()) };
    io::Error::last_os_error()
}
