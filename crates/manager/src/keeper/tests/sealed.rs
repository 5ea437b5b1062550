//! Virtual machines with encrypted disks.

use super::*;

const PASSPHRASE: &str = "correct horse";

impl Site {
    /// The same, with an encrypted disk whose passphrase nobody has said yet.
    async fn encrypted(wanted: bool) -> Self {
        let site = Self::new(HALT).await;
        let disk = site.record.paths().data_disk();
        fs::remove_file(&disk).unwrap();
        let passphrase = PASSPHRASE.parse().unwrap();
        clan_vm::create_encrypted_disk(&disk, ByteSize::from_mib(16), &passphrase).await.unwrap();
        site.record.update(|r| (r.encrypted, r.wanted) = (true, wanted)).unwrap();
        site
    }
}

#[tokio::test]
async fn a_locked_vm_says_so_starts_when_it_is_unlocked_and_again_when_it_dies() {
    let mut site = Site::encrypted(true).await;
    site.config.patience.boot = LIMIT;
    let keeper = site.keeper();
    let seen = until(&keeper, |view| view.state == VmState::Locked).await;
    let problem = seen.last().unwrap().problem.clone().unwrap();
    assert_eq!(problem.code, ErrorCode::Locked);
    assert!(problem.message.contains("clan vm unlock"), "{problem:?}");
    assert!(pids(&seen).is_empty(), "{seen:#?}");
    assert!(site.record.get().wanted, "what the person wants does not change");

    site.record.set_passphrase(Some(PASSPHRASE.parse().unwrap()));
    keeper.want(true).await.unwrap();
    let first = pids(&until(&keeper, |view| view.pid.is_some()).await)[0];
    keeper.vm().unwrap().kill().unwrap();
    until(&keeper, |view| view.pid.is_some_and(|pid| pid != first)).await;
    end(site, keeper).await;
}

#[tokio::test]
async fn the_next_manager_finds_what_runs_and_locks_what_has_ended() {
    let mut site = Site::encrypted(true).await;
    site.config.patience.boot = LIMIT;
    site.config.keep_vms.keep();
    site.record.set_passphrase(Some(PASSPHRASE.parse().unwrap()));
    let keeper = site.keeper();
    let pid = pids(&until(&keeper, |view| view.pid.is_some()).await)[0];
    site.cancel.cancel();
    keeper.join().await;

    site.cancel = CancellationToken::new();
    let paths = site.record.paths().clone();
    site.record = Arc::new(RecordCell::new(paths.clone(), ClanRecord::load(&paths).unwrap()));
    assert!(site.record.is_locked());
    let keeper = site.keeper();
    assert_eq!(pids(&until(&keeper, |view| view.pid.is_some()).await), [pid]);
    keeper.vm().unwrap().kill().unwrap();
    until(&keeper, |view| view.state == VmState::Locked && view.pid.is_none()).await;
    end(site, keeper).await;
}

#[tokio::test]
async fn nothing_of_an_encrypted_vm_becomes_a_template_and_none_is_begun_with() {
    let site = Site::encrypted(false).await;
    let record = ClanRecord { fresh: Some(Fresh::Empty), ..site.record.get() };
    assert_eq!(Kind::of(&record, AccelKind::Tcg, &Qemu::Search), None);
    let plain = ClanRecord { encrypted: false, ..record };
    assert!(Kind::of(&plain, AccelKind::Tcg, &Qemu::Search).is_some());
    let keeper = site.keeper();
    until(&keeper, |view| view.state == VmState::Locked).await;
    site.record.set_passphrase(Some(PASSPHRASE.parse().unwrap()));
    keeper.want(false).await.unwrap();
    until(&keeper, |view| view.state == VmState::Stopped).await;
    end(site, keeper).await;
}
