//! QEMU's command line.

use std::{
    ffi::OsString,
    net::Ipv4Addr,
    os::fd::RawFd,
    path::{Path, PathBuf},
};

use clan_wire::agent::TEMPLATE;
use serde_json::{Value, json};

use crate::{AccelKind, Begin, VmError, VmSpec, preflight::Emulator};

/// Names inside the virtual machine's directory, which is QEMU's working directory: relative, because the path of a
/// Unix socket is limited to 107 bytes.
pub(crate) const QMP: &str = "qmp.sock";
pub(crate) const AGENT: &str = "agent.sock";
pub(crate) const CONTROL: &str = "control.sock";
pub(crate) const CONSOLE: &str = "console.sock";
pub(crate) const CONSOLE_LOG: &str = "console.log";
/// The kernel, until the guest has it.
pub(crate) const KERNEL: &str = "kernel";

/// What QEMU calls the data disk.
pub(crate) const DATA_NODE: &str = "data";

/// What QEMU calls the passphrase of an encrypted data disk.
const DATA_KEY: &str = "data-key";

/// The machine type that guests are tested with; a newer QEMU still emulates it. Others use their newest.
pub(crate) const PINNED_MACHINE: &str = "pc-q35-7.2";
pub(crate) const ANY_MACHINE: &str = "q35";

/// A firmware that does no more than a kernel needs which is loaded directly: 0.2 s less of a boot under emulation than
/// SeaBIOS. QEMU finds it by its name where it finds its other files.
pub(crate) const QUICK_FIRMWARE: &str = "qboot.rom";

/// Bounds the code cache of the emulation, which else takes several hundred MiB; in MiB. With half of this, a boot
/// takes a third longer: what was dropped is translated again.
const TCG_CACHE: u32 = 64;

/// What the guest's kernel and agent are told. Without a getty, systemd does not wait for the console's device node;
/// `panic=-1` resets at once, which ends QEMU. `no_timer_check`: where QEMU is held up at the wrong moment, the kernel else
/// takes its timer for a broken one, and panics. The rest spares emulated boots work for nothing: trying ciphers out, patching the
/// kernel for one processor, preparing probes that nobody sets.
const KERNEL_COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=4 panic=-1 net.ifnames=0 systemd.getty_auto=0 \
     no_timer_check cryptomgr.notests noreplace-smp initcall_blacklist=init_kprobe_trace \
     clan.root=vda clan.layers=vdb clan.data=vdc clan.boot=vdd";

/// The arguments for a virtual machine. `direct` says whether its data disk can bypass the base OS's page cache, `apart`
/// whether its network is a namespace of its own.
pub(crate) fn arguments(
    spec: &VmSpec,
    emulator: Emulator,
    kernel: &Path,
    direct: bool,
    apart: bool,
    inherited: Inherited,
) -> Result<Vec<OsString>, VmError> {
    let mut args = Args(Vec::new());
    args.pair("-name", format!("clan-{}", spec.name));
    args.pair("-machine", format!("{},dump-guest-core=off,vmport=off", emulator.machine));
    match spec.accelerator {
        AccelKind::Kvm => args.pair("-accel", "kvm").pair("-cpu", "host"),
        AccelKind::Tcg => args.pair("-accel", format!("tcg,tb-size={TCG_CACHE}")).pair("-cpu", "max"),
    };
    if emulator.quick_firmware && spec.accelerator == AccelKind::Tcg {
        args.pair("-bios", QUICK_FIRMWARE);
    }
    args.pair("-m", format!("{}M", spec.memory.as_mib())).pair("-smp", spec.cpus.to_string());
    args.flag("-nodefaults").flag("-no-user-config").flag("-no-reboot").pair("-display", "none");
    args.pair("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");

    args.pair("-kernel", absolute(kernel)?).pair("-initrd", absolute(&spec.image.initramfs)?);
    match spec.begin {
        Begin::Boot => args.pair("-append", KERNEL_COMMAND_LINE),
        // A saved guest was told the same.
        Begin::BootToSave | Begin::Saved(_) => args.pair("-append", format!("{KERNEL_COMMAND_LINE} {TEMPLATE}")),
    };
    if let (Begin::Saved(_), Some(state)) = (&spec.begin, inherited.state) {
        args.pair("-incoming", format!("fd:{state}"));
    }

    args.pair("-qmp", format!("unix:{QMP},server=on,wait=off"));
    // INVARIANT: of a guest whose disk is encrypted, nothing is written down in the clear.
    let kept = if spec.passphrase.is_some() { String::new() } else { format!(",logfile={CONSOLE_LOG},logappend=on") };
    args.pair("-chardev", format!("{}{kept}", socket("console", CONSOLE)));
    args.pair("-serial", "chardev:console");
    args.pair("-device", "virtio-serial-pci,id=ports");
    for (id, path, name) in [("agent", AGENT, clan_wire::agent::PORT), ("control", CONTROL, clan_wire::control::PORT)] {
        args.pair("-chardev", socket(id, path));
        args.pair("-device", format!("virtserialport,id={id},bus=ports.0,chardev={id},name={name}"));
    }
    args.pair("-device", "virtio-rng-pci");
    args.pair("-device", "virtio-balloon-pci,free-page-reporting=on,deflate-on-oom=on");

    // The guest names its disks in this order.
    args.disk("root", shared(&spec.image.root)?);
    args.disk("layer", shared(&spec.image.layer)?);
    if spec.passphrase.is_some() {
        // INVARIANT: no secret is an argument. QEMU reads this to its end, once.
        let key = inherited.key.ok_or(VmError::BadSpec("its passphrase is not handed over"))?;
        args.pair("-object", format!("secret,id={DATA_KEY},file=/proc/self/fd/{key}"));
        args.disk(DATA_NODE, encrypted(&spec.data_disk, direct)?);
    } else {
        args.disk(DATA_NODE, writable(&spec.data_disk, direct)?);
    }
    args.disk("boot", shared(&spec.image.boot)?);

    // IPv4 only: the network's router advertisements would change the guest's addresses seconds after boot, and make its
    // QUIC endpoint start over.
    // Beware: through this network's gateway (10.0.2.2) the guest reaches what listens on the loopback of the namespace
    // that QEMU is in; see `network`.
    let forwards = spec.forwards.iter().map(|f| format!(",hostfwd={}", forward_rule(f, apart)));
    args.pair("-netdev", format!("user,id=net,ipv6=off{}", forwards.collect::<String>()));
    // No boot ROM: the kernel is loaded directly.
    args.pair("-device", "virtio-net-pci,netdev=net,romfile=");
    Ok(args.0)
}

/// Which of QEMU's descriptors is what.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Inherited {
    /// The saved state to begin with.
    pub(crate) state: Option<RawFd>,
    /// The passphrase of its data disk.
    pub(crate) key: Option<RawFd>,
}

/// As QEMU writes it in its error message, too. In a namespace of its own, what comes in comes for any address.
pub(crate) fn forward_rule(forward: &crate::UdpForward, apart: bool) -> String {
    let host = if apart { (Ipv4Addr::UNSPECIFIED, forward.host.port()).into() } else { forward.host };
    format!("udp:{host}-:{}", forward.guest_port)
}

struct Args(Vec<OsString>);

impl Args {
    fn flag(&mut self, name: &str) -> &mut Self {
        self.0.push(name.into());
        self
    }

    fn pair(&mut self, name: &str, value: impl Into<OsString>) -> &mut Self {
        self.0.push(name.into());
        self.0.push(value.into());
        self
    }

    fn disk(&mut self, id: &str, mut node: Value) {
        node["node-name"] = id.into();
        self.pair("-blockdev", node.to_string());
        self.pair("-device", format!("virtio-blk-pci,drive={id},serial={id}"));
    }
}

fn socket(id: &str, path: &str) -> String {
    format!("socket,id={id},path={path},server=on,wait=off")
}

/// A disk that several virtual machines may have open.
fn shared(path: &Path) -> Result<Value, VmError> {
    Ok(json!({
        "driver": "raw",
        "read-only": true,
        "file": { "driver": "file", "filename": text(path)?, "read-only": true },
    }))
}

/// INVARIANT: QEMU locks the file, so no two virtual machines ever write to one disk.
fn writable(path: &Path, direct: bool) -> Result<Value, VmError> {
    let cache = json!({ "direct": direct, "no-flush": false });
    Ok(json!({
        "driver": "raw",
        "discard": "unmap",
        "detect-zeroes": "unmap",
        "cache": cache,
        "file": { "driver": "file", "filename": text(path)?, "locking": "on", "discard": "unmap", "cache": cache },
    }))
}

/// The same, behind a passphrase. Nothing is given back of it: a hole would read as noise.
fn encrypted(path: &Path, direct: bool) -> Result<Value, VmError> {
    let cache = json!({ "direct": direct, "no-flush": false });
    Ok(json!({
        "driver": "luks",
        "key-secret": DATA_KEY,
        "discard": "ignore",
        "detect-zeroes": "off",
        "cache": cache,
        "file": { "driver": "file", "filename": text(path)?, "locking": "on", "discard": "ignore", "cache": cache },
    }))
}

fn absolute(path: &Path) -> Result<PathBuf, VmError> {
    std::path::absolute(path).map_err(VmError::io("resolve", path))
}

fn text(path: &Path) -> Result<String, VmError> {
    let path = absolute(path)?;
    path.into_os_string().into_string().map_err(|_| VmError::BadSpec("the path of a disk is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ImageFiles, Qemu, UdpForward};
    use clan_types::ByteSize;

    fn spec() -> VmSpec {
        let file = |name: &str| PathBuf::from(format!("/images/a,b \"c\"/{name}"));
        VmSpec {
            dir: "/vm".into(),
            name: "home".into(),
            image: ImageFiles {
                kernel: file("kernel"),
                initramfs: file("initramfs"),
                root: file("root"),
                layer: file("layer"),
                boot: file("boot"),
            },
            data_disk: "/data.ext4".into(),
            passphrase: None,
            memory: ByteSize::from_mib(256),
            cpus: 2,
            accelerator: AccelKind::Tcg,
            forwards: vec![UdpForward { host: "0.0.0.0:41640".parse().unwrap(), guest_port: 41640 }],
            qemu: Qemu::default(),
            begin: Begin::Boot,
        }
    }

    fn told(spec: &VmSpec, inherited: Inherited) -> Result<Vec<OsString>, VmError> {
        let emulator = Emulator { machine: PINNED_MACHINE, quick_firmware: true };
        arguments(spec, emulator, Path::new("/vm/kernel"), true, true, inherited)
    }

    fn line(spec: &VmSpec) -> Vec<String> {
        told(spec, Inherited { state: Some(7), key: Some(9) })
            .unwrap()
            .into_iter()
            .map(|a| a.into_string().unwrap())
            .collect()
    }

    fn disks() -> Vec<Value> {
        disks_of(&spec())
    }

    fn disks_of(spec: &VmSpec) -> Vec<Value> {
        let line = line(spec);
        line.iter().filter_map(|a| serde_json::from_str(a).ok()).filter(Value::is_object).collect()
    }

    #[test]
    fn special_characters_in_a_path_stay_in_the_path() {
        let disks = disks();
        let names: Vec<_> = disks.iter().filter_map(|d| d["node-name"].as_str()).collect();
        assert_eq!(names, ["root", "layer", "data", "boot"]);
        assert_eq!(disks[0]["file"]["filename"], "/images/a,b \"c\"/root");
    }

    #[test]
    fn only_the_data_disk_is_writable_and_it_is_locked() {
        let disks = disks();
        assert_eq!(disks.len(), 4);
        for disk in disks {
            let data = disk["node-name"] == "data";
            assert_eq!(disk["read-only"] == true, !data);
            assert_eq!(disk["file"]["locking"] == "on", data);
        }
    }

    #[test]
    fn a_saved_guest_has_the_command_line_of_the_one_that_was_saved() {
        let of = |begin| {
            let mut line = line(&VmSpec { begin, ..spec() });
            let incoming = line.iter().position(|a| a == "-incoming").map(|at| line.drain(at..at + 2).nth(1).unwrap());
            (line, incoming)
        };
        let (booted, saved) = (of(Begin::BootToSave), of(Begin::Saved("/state".into())));
        assert_eq!(booted.0, saved.0);
        assert_eq!((booted.1, saved.1.as_deref()), (None, Some("fd:7")));
        assert_ne!(of(Begin::Boot).0, booted.0, "only a guest to be saved is told to wait");
    }

    #[test]
    fn an_encrypted_disk_is_opened_by_what_is_no_argument_and_its_console_not_kept() {
        let sealed = VmSpec { passphrase: Some("correct horse".parse().unwrap()), ..spec() };
        let (line, plain) = (line(&sealed), line(&spec()));
        assert!(line.iter().all(|a| !a.contains("horse")), "{line:?}");
        assert!(line.contains(&"secret,id=data-key,file=/proc/self/fd/9".to_owned()), "{line:?}");
        assert!(plain.iter().any(|a| a.contains("logfile")) && !line.iter().any(|a| a.contains("logfile")));
        let disks = disks_of(&sealed);
        let names: Vec<_> = disks.iter().filter_map(|d| d["node-name"].as_str()).collect();
        assert_eq!(names, ["root", "layer", "data", "boot"], "the guest sees the same");
        assert_eq!((&disks[2]["driver"], &disks[2]["file"]["locking"]), (&json!("luks"), &json!("on")));
        let without = told(&sealed, Inherited::default());
        assert!(matches!(without, Err(VmError::BadSpec(_))), "{without:?}");
    }

    #[test]
    fn sockets_are_named_relatively() {
        for arg in line(&spec()).iter().filter(|a| a.contains(".sock")) {
            assert!(!arg.contains('/'), "{arg}");
        }
    }
}
