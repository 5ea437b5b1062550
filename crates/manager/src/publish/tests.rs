use clan_types::{FileHash, ImageId};
use clan_wire::image::{FileRole, ImageFile, Manifest};

use super::*;
use crate::record::{Phase, tests::record};

fn image(memory_min: ByteSize, architecture: &str) -> StoredImage {
    let file = |role| ImageFile { role, size: ByteSize::from_mib(1), hash: FileHash::from_bytes([1; 32]) };
    let manifest = Manifest {
        version: 1,
        title: "Debian\u{7}, new".into(),
        architecture: architecture.into(),
        inputs: FileHash::from_bytes([0; 32]),
        memory_min,
        files: [FileRole::Kernel, FileRole::Initramfs, FileRole::Root].map(file).to_vec(),
    };
    StoredImage { id: manifest.id().unwrap(), manifest, dir: "/nowhere".into() }
}

fn asked() -> PublishImage {
    PublishImage {
        image: "ab".into(),
        memory: None,
        cpus: None,
        disk: None,
        network_layer: None,
        control_mode: None,
        applications: None,
        dry_run: false,
    }
}

fn before() -> VmDescription {
    VmDescription {
        image: ImageId::from_bytes([9; 32]),
        title: "old".parse().unwrap(),
        memory: ByteSize::from_mib(384),
        cpus: 1,
        disk: ByteSize::from_mib(900),
    }
}

#[test]
fn what_is_not_asked_for_stays_as_it_is_in_force() {
    let (record, image) = (record(1, Phase::Ready), image(ByteSize::from_mib(64), std::env::consts::ARCH));
    let after = describe(Some(&before()), &record, &image, &asked()).unwrap();
    assert_eq!(after.title.to_string(), "Debian, new", "without control characters");
    let old = before();
    assert_eq!((after.memory, after.cpus, after.disk), (old.memory, old.cpus, old.disk));
    assert_eq!(after.image, image.id);
    // A clan that has named nothing yet: as the machine here.
    let first = describe(None, &record, &image, &asked()).unwrap();
    assert_eq!((first.memory, first.cpus, first.disk), (record.memory, record.cpus, record.disk));
    let more = PublishImage { memory: Some(ByteSize::from_mib(1024)), cpus: Some(4), ..asked() };
    let after = describe(Some(&before()), &record, &image, &more).unwrap();
    assert_eq!((after.memory, after.cpus), (ByteSize::from_mib(1024), 4));
}

fn apps(names: &[&str]) -> Vec<AppName> {
    names.iter().map(|name| name.parse().unwrap()).collect()
}

fn named(setup: &VmSetup) -> Vec<AppName> {
    setup.applications.iter().cloned().collect()
}

#[test]
fn what_a_machine_is_in_the_clan_stays_as_it_is_in_force_unless_it_is_asked_for() {
    let mut ledger = crate::authority::tests::clan();
    let offered = || apps(&["web"]);
    let (same, other) = (before().image, ImageId::from_bytes([7; 32]));
    let first = setup(ledger.state(), &same, &asked(), offered()).unwrap();
    assert_eq!((first.network.as_str(), first.control), ("mesh", ControlMode::Local));
    assert_eq!(named(&first), offered(), "what the machine here offers, which runs the image");

    let applications = Applications::new(apps(&["wiki", "mail"])).unwrap();
    let in_force = VmSetup { network: NetworkLayer::default(), control: ControlMode::Shared, applications };
    let body = Body::PublishVm { description: before(), setup: in_force.clone() };
    crate::authority::tests::say(&mut ledger, &crate::authority::tests::key(1), body);
    assert_eq!(setup(ledger.state(), &same, &asked(), offered()).unwrap(), in_force);
    let another = setup(ledger.state(), &other, &asked(), offered()).unwrap();
    assert_eq!((another.control, named(&another)), (ControlMode::Shared, offered()), "another image has others in it");

    let all = PublishImage {
        control_mode: Some(clan_api::ControlMode::Remote),
        applications: Some(apps(&["wiki", "mail", "wiki"])),
        ..asked()
    };
    let all = setup(ledger.state(), &other, &all, offered()).unwrap();
    assert_eq!((all.control, named(&all)), (ControlMode::Remote, apps(&["mail", "wiki"])));

    let many = (0..=MAX_APPLICATIONS).map(|n| format!("app{n}").parse().unwrap()).collect();
    let many = setup(ledger.state(), &other, &PublishImage { applications: Some(many), ..asked() }, Vec::new());
    assert_eq!(many.unwrap_err().code, ErrorCode::BadRequest);
}

#[test]
fn a_network_layer_that_nobody_could_run_is_not_published() {
    let ledger = crate::authority::tests::clan();
    let request = PublishImage { network_layer: Some("yggdrasil".parse().unwrap()), ..asked() };
    let problem = setup(ledger.state(), &before().image, &request, Vec::new()).unwrap_err();
    assert_eq!(problem.code, ErrorCode::Conflict);
    assert!(problem.hints.iter().any(|hint| hint.contains("--network mesh")), "{problem:?}");
}

#[test]
fn what_cannot_run_is_not_published() {
    let (record, small) = (record(1, Phase::Ready), ByteSize::from_mib(64));
    let arch = std::env::consts::ARCH;
    let code = |image: &StoredImage, request: &PublishImage| {
        describe(Some(&before()), &record, image, request).unwrap_err().code
    };
    assert_eq!(code(&image(small, "vax"), &asked()), ErrorCode::BadRequest);
    let tib = ByteSize::from_mib(1 << 20);
    assert_eq!(code(&image(tib, arch), &asked()), ErrorCode::TooSmall, "newcomers would have too little");
    let given = PublishImage { memory: Some(tib), ..asked() };
    assert_eq!(code(&image(tib, arch), &given), ErrorCode::TooSmall, "the machine here has too little");
    for cpus in [0, 256, u32::MAX] {
        assert_eq!(code(&image(small, arch), &PublishImage { cpus: Some(cpus), ..asked() }), ErrorCode::BadRequest);
    }
    let disk = Some(ByteSize::from_bytes(4096));
    assert_eq!(code(&image(small, arch), &PublishImage { disk, ..asked() }), ErrorCode::BadRequest);
}

#[test]
fn a_disk_larger_than_the_room_is_refused_with_what_to_do() {
    let problem = check_disk(ByteSize::from_mib(1 << 20), ByteSize::from_mib(5120)).unwrap_err();
    insta::assert_snapshot!(
        format!("{}\n{}", problem.message, problem.hints.join("\n")),
        @r"
    the VM's disk may grow to 1 TiB, 5 GiB are free here
    give it less: `--disk 1G`, or free some space
    "
    );
    check_disk(ByteSize::from_mib(5120), ByteSize::from_mib(5120)).unwrap();
}

#[test]
fn only_what_the_machine_here_runs_can_be_published() {
    let image = image(ByteSize::from_mib(64), std::env::consts::ARCH);
    let problem = check_runs(&record(1, Phase::Ready), &image).unwrap_err();
    assert_eq!(problem.code, ErrorCode::Conflict);
    assert!(problem.hints[0].contains("clan vm update --image"), "{:?}", problem.hints);
    check_runs(&ClanRecord { image: Some(image.id), ..record(1, Phase::Ready) }, &image).unwrap();
}
