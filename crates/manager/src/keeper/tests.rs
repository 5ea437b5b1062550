//! The keeper with real QEMU, and guests of a few bytes: no agent ever answers in one.

use std::{fs, time::Duration};

use clan_types::{ByteSize, FileHash, ImageId};
use clan_vm::{Begin, VmSpec};
use clan_wire::image::{FileRole, ImageFile, Manifest};
use tokio::time::timeout;

mod crashed;
mod sealed;

use super::*;
use crate::{
    paths::Paths,
    record::{ClanRecord, Fresh, Phase},
    template::Kind,
};

/// For what an idle computer does in a fraction of a second.
const LIMIT: Duration = Duration::from_secs(60);

/// A 32-bit ELF file with the note that names the PVH entry point: says X on the serial port, then does as the code says.
fn kernel(then: &[u8]) -> Vec<u8> {
    const BASE: u32 = 0x10_0000;
    const CODE: u32 = 52 + 2 * 32 + 20;
    let say = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'X', 0xee, 0xb0, b'\n', 0xee];
    let length = CODE + (say.len() + then.len()) as u32;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 3, 0];
    let header = [1, BASE + CODE, 52, 0, 0, 32 << 16 | 52, 2, 0];
    let loaded = [1, 0, BASE, BASE, length, length, 5, 4096];
    let noted = [4, CODE - 20, BASE + CODE - 20, BASE + CODE - 20, 20, 20, 4, 4];
    let note = [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), BASE + CODE];
    let words = header.iter().chain(&loaded).chain(&noted).chain(&note);
    elf.extend(words.flat_map(|word| word.to_le_bytes()));
    elf.extend(say);
    elf.extend(then);
    elf
}

const HALT: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfd];
const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xfa, 0xf4, 0xeb, 0xfd];

/// An image of a few bytes; another one for another `filling`.
fn put_image(images: &ImageStore, then: &[u8], filling: u8) -> ImageId {
    let contents = [
        (FileRole::Kernel, kernel(then)),
        (FileRole::Initramfs, b"initramfs".to_vec()),
        (FileRole::Root, vec![filling; 1 << 20]),
        (FileRole::Layer, vec![255; 1 << 20]),
    ];
    let hash = |content: &[u8]| FileHash::from_bytes(*blake3::hash(content).as_bytes());
    let files = contents.iter().map(|(role, content)| ImageFile {
        role: *role,
        size: ByteSize::from_bytes(content.len() as u64),
        hash: hash(content),
    });
    let manifest = Manifest {
        version: 1,
        title: "a few bytes".into(),
        architecture: "x86_64".into(),
        inputs: hash(b"inputs"),
        memory_min: ByteSize::from_mib(16),
        files: files.collect(),
    };
    let incoming = images.begin(manifest).unwrap();
    for (_, content) in &contents {
        fs::write(incoming.file(&hash(content)).unwrap().path, content).unwrap();
    }
    incoming.finish().unwrap().id
}

/// A clan on disk, whose image has a kernel of ours.
struct Site {
    _folder: tempfile::TempDir,
    config: KeeperConfig,
    record: Arc<RecordCell>,
    cancel: CancellationToken,
}

impl Site {
    async fn new(then: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::new(folder.path());
        let images = ImageStore::open(folder.path().join("images")).unwrap();
        let image = put_image(&images, then, 0);
        let record = ClanRecord {
            image: Some(image),
            memory: ByteSize::from_mib(32),
            cpus: 1,
            disk: ByteSize::from_mib(1),
            wanted: true,
            ports: free_ports().unwrap(),
            ..crate::record::tests::record(1, Phase::Ready)
        };
        crate::record::tests::put(&paths, &record, None);
        let record = Arc::new(RecordCell::new(paths.clan(&record.id), record));
        fs::write(record.paths().data_disk(), vec![0; 1 << 20]).unwrap();
        // Whatever KVM is like here: these guests are emulated.
        clan_vm::probe::distrust(&paths.cache(), "This is a test.").await;
        let config = KeeperConfig {
            images,
            templates: Templates::open(folder.path().join("templates")),
            turns: Turns::for_this_computer(None),
            cache: paths.cache(),
            qemu: Qemu::Search,
            trees: crate::trees::Trees::open(folder.path().join("trees")),
            program: "/nonexistent/clan".into(),
            keep_vms: Default::default(),
            patience: Patience {
                template: Duration::from_millis(500),
                kvm: Duration::from_millis(500),
                boot: Duration::from_secs(2),
            },
        };
        Self { _folder: folder, config, record, cancel: CancellationToken::new() }
    }

    fn keeper(&self) -> Keeper {
        Keeper::spawn(self.record.clone(), self.config.clone(), self.cancel.clone())
    }

    fn spec(&self, begin: Begin) -> VmSpec {
        let record = self.record.get();
        let stored = self.config.images.get(&record.image.unwrap()).unwrap();
        VmSpec {
            dir: self.record.paths().vm(),
            name: record.name.to_string(),
            image: start::files_of(&stored),
            data_disk: self.record.paths().data_disk(),
            passphrase: None,
            memory: record.memory,
            cpus: record.cpus,
            accelerator: AccelKind::Tcg,
            forwards: Vec::new(),
            qemu: Qemu::Search,
            begin,
        }
    }
}

/// What was shown, until it is as asked for.
async fn until(keeper: &Keeper, met: impl Fn(&VmView) -> bool) -> Vec<VmView> {
    let (mut view, mut seen) = (keeper.watch(), Vec::new());
    let watched = timeout(LIMIT, async {
        loop {
            let now = view.borrow_and_update().clone();
            seen.push(now.clone());
            if met(&now) {
                return;
            }
            view.changed().await.unwrap();
        }
    });
    assert!(watched.await.is_ok(), "not in time: {seen:#?}");
    seen
}

fn pids(seen: &[VmView]) -> Vec<u32> {
    let mut pids: Vec<u32> = seen.iter().filter_map(|view| view.pid).collect();
    pids.dedup();
    pids
}

async fn end(site: Site, keeper: Keeper) {
    timeout(LIMIT, keeper.destroy()).await.unwrap();
    assert!(Vm::adopt(&site.record.paths().vm()).await.unwrap().is_none(), "nothing runs any more");
}

#[tokio::test]
async fn a_guest_that_never_answers_is_tried_twice_and_given_up_with_the_end_of_its_console() {
    let site = Site::new(HALT).await;
    let keeper = site.keeper();
    let seen = until(&keeper, |view| view.state == VmState::Failed).await;
    assert_eq!(pids(&seen).len(), 2, "{seen:#?}");
    let again = seen.iter().find(|view| view.state == VmState::Starting && view.problem.is_some()).unwrap();
    assert!(again.problem.as_ref().unwrap().message.contains("did not answer"), "{again:?}");
    let problem = seen.last().unwrap().problem.clone().unwrap();
    assert!(problem.message.contains("did not answer") && problem.why.unwrap().contains('X'), "{seen:#?}");
    assert!(keeper.vm().is_none());
    assert!(site.record.get().wanted, "what the person wants does not change");
    end(site, keeper).await;
}

#[tokio::test]
async fn a_guest_that_is_silent_after_a_template_boots_once_and_the_template_is_gone() {
    let site = Site::new(HALT).await;
    let kind = Kind::of(&site.record.get(), AccelKind::Tcg, &Qemu::Search).unwrap();
    let staging = site.config.templates.begin(kind.clone()).unwrap();
    let vm =
        Vm::start(VmSpec { dir: site.record.paths().dir.join("first"), ..site.spec(Begin::BootToSave) }).await.unwrap();
    vm.save(&staging.state()).await.unwrap();
    vm.quit(LIMIT).await;
    staging.commit(&site.record.paths().data_disk()).unwrap();
    let name = site.config.templates.find(&kind).unwrap().name;
    site.record.update(|record| record.fresh = Some(Fresh::Template(name))).unwrap();

    let keeper = site.keeper();
    let seen = until(&keeper, |view| {
        view.pid.is_some() && view.problem.as_ref().is_some_and(|p| p.message.contains("boots instead"))
    });
    let seen = seen.await;
    assert_eq!(pids(&seen).len(), 2, "{seen:#?}");
    assert!(site.config.templates.find(&kind).is_none(), "nobody else comes to grief by it");
    let line = fs::read(format!("/proc/{}/cmdline", pids(&seen)[1])).unwrap();
    assert!(!line.split(|byte| *byte == 0).any(|word| word == b"-incoming"));
    end(site, keeper).await;
}

#[tokio::test]
async fn a_kernel_that_resets_is_told_with_the_end_of_its_console() {
    let site = Site::new(RESET).await;
    let keeper = site.keeper();
    let seen = until(&keeper, |view| view.restarts > 0).await;
    let problem = seen.last().unwrap().problem.clone().unwrap();
    assert!(problem.message.contains("reset") && problem.why.unwrap().contains('X'), "{seen:#?}");
    end(site, keeper).await;
}

#[tokio::test]
async fn a_guest_whose_manager_was_killed_while_it_was_saved_goes_on_and_no_half_template_is_used() {
    let site = Site::new(HALT).await;
    let kind = Kind::of(&site.record.get(), AccelKind::Tcg, &Qemu::Search).unwrap();
    let staging = site.config.templates.begin(kind.clone()).unwrap();
    let vm = Vm::start(site.spec(Begin::BootToSave)).await.unwrap();
    let pid = vm.pid();
    vm.save(&staging.state()).await.unwrap();
    // The manager is killed before it has copied the disk: nothing is tidied up, and the guest holds still.
    std::mem::forget(staging);
    drop(vm);

    let templates = Templates::open(site.config.templates.dir().to_owned());
    assert!(templates.find(&kind).is_none());
    assert_eq!(fs::read_dir(templates.dir()).unwrap().count(), 0, "what was half made is gone");
    let keeper = site.keeper();
    let seen = until(&keeper, |view| view.pid.is_some()).await;
    assert_eq!(pids(&seen), [pid]);
    assert!(!keeper.vm().unwrap().is_paused().await.unwrap());
    end(site, keeper).await;
}

#[tokio::test]
async fn a_vm_whose_disk_is_empty_goes_on_from_a_template_that_another_left_meanwhile() {
    let mut site = Site::new(HALT).await;
    site.config.patience.template = LIMIT;
    let disk = site.record.paths().data_disk();
    fs::write(&disk, vec![7; 1 << 20]).unwrap();
    let kind = Kind::of(&site.record.get(), AccelKind::Tcg, &Qemu::Search).unwrap();
    let staging = site.config.templates.begin(kind).unwrap();
    let vm =
        Vm::start(VmSpec { dir: site.record.paths().dir.join("first"), ..site.spec(Begin::BootToSave) }).await.unwrap();
    vm.save(&staging.state()).await.unwrap();
    vm.quit(LIMIT).await;
    staging.commit(&disk).unwrap();
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    site.record.update(|record| record.fresh = Some(Fresh::Empty)).unwrap();

    let keeper = site.keeper();
    let seen = until(&keeper, |view| view.pid.is_some()).await;
    let line = fs::read(format!("/proc/{}/cmdline", pids(&seen)[0])).unwrap();
    assert!(line.split(|byte| *byte == 0).any(|word| word == b"-incoming"));
    assert_eq!(fs::read(&disk).unwrap(), vec![7; 1 << 20], "its disk is the one that belongs to the state");
    assert_eq!(site.record.get().fresh, None, "a state fits its disk once");
    end(site, keeper).await;
}

#[tokio::test]
async fn a_vm_beyond_what_all_may_have_is_refused_and_others_wait_for_their_share() {
    let mut site = Site::new(HALT).await;
    site.config.turns = Turns::for_this_computer(Some(ByteSize::from_mib(100)));
    let share = site.config.turns.share(ByteSize::from_mib(10));
    let keeper = site.keeper();
    let seen = until(&keeper, |view| view.queued).await;
    let told = &seen.last().unwrap().problem.as_ref().unwrap().message;
    assert!(told.contains("waits for memory, number 1 of 1") && told.contains("virtual machines may have"), "{told}");
    drop(share);
    until(&keeper, |view| view.pid.is_some() && !view.queued).await;
    timeout(LIMIT, keeper.destroy()).await.unwrap();

    site.record.update(|record| record.memory = ByteSize::from_mib(64)).unwrap();
    let keeper = site.keeper();
    let seen = until(&keeper, |view| view.state == VmState::Failed).await;
    let problem = seen.last().unwrap().problem.clone().unwrap();
    assert!(problem.hints.iter().any(|hint| hint.contains("--vm-memory")), "{problem:?}");
    end(site, keeper).await;
}
