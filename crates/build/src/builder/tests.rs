use super::*;
use crate::{
    elf::tests::elf_with_segment,
    modules::INITRAMFS,
    process::{Tool, command},
};
use tempfile::TempDir;

/// A builder whose cache holds a system already, so that nothing is downloaded.
fn prepared() -> (TempDir, Builder, Recipe) {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("clan"), elf_with_segment(1, b"the controller")).unwrap();
    fs::write(at("agent"), elf_with_segment(1, b"the agent")).unwrap();
    let recipe = Recipe::default_debian(at("clan"), at("agent"));
    let builder = Builder {
        cache_dir: at("cache"),
        store: ImageStore::open(at("images")).unwrap(),
        proxy: None,
        mirror: Some("http://mirror.invalid".into()),
    };
    let key = root::key(&recipe, &Source::new(builder.mirror.as_deref(), None).unwrap());
    let root = builder.cache_dir.join(format!("root-{key}"));
    fs::create_dir_all(&root).unwrap();
    fs::write(root.join("root.erofs"), "a system").unwrap();
    fs::write(root.join("kernel"), "a kernel").unwrap();
    let mut tar = tar::Builder::new(File::create(root.join("kernel.tar")).unwrap());
    let mut add = |path: &str, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, path, content).unwrap();
    };
    let dep: String = INITRAMFS.iter().map(|name| format!("kernel/{name}.ko:\n")).collect();
    add("out/vmlinuz", b"packed");
    add("out/modules/modules.dep", dep.as_bytes());
    add("out/modules/modules.builtin", b"");
    for name in INITRAMFS {
        add(&format!("out/modules/kernel/{name}.ko"), name.as_bytes());
    }
    tar.finish().unwrap();
    let sums = CachedRoot::open(root.clone()).unwrap().sums();
    fs::write(root.join("sums"), sums).unwrap();
    (dir, builder, recipe)
}

async fn build(builder: &Builder, recipe: &Recipe) -> (Result<ImageId, BuildError>, Vec<Progress>) {
    let mut seen = Vec::new();
    let result = builder.build(recipe, |p| seen.push(p), CancellationToken::new()).await;
    (result, seen)
}

#[tokio::test]
async fn equal_inputs_give_the_same_image_on_any_computer() {
    let ((_a, one, recipe_one), (_b, two, recipe_two)) = (prepared(), prepared());
    let id = build(&one, &recipe_one).await.0.unwrap();
    assert_eq!(build(&two, &recipe_two).await.0.unwrap(), id);
    one.store.verify(&id).unwrap();
    assert!(!one.work().exists());
    fs::write(&recipe_two.clan_executable, elf_with_segment(1, b"another controller")).unwrap();
    let other = build(&two, &recipe_two).await.0.unwrap();
    assert_ne!(other, id);
    let files = |id| two.store.get(id).unwrap().manifest.files;
    assert_eq!(files(&id)[..3], files(&other)[..3], "only the layer differs");
}

#[tokio::test]
async fn an_image_that_is_there_is_not_built_again() {
    let (_dir, builder, recipe) = prepared();
    let (first, seen) = build(&builder, &recipe).await;
    assert!(seen.iter().any(|p| p.step == Step::Layer));
    let fractions: Vec<_> = seen.iter().filter_map(|p| p.fraction).collect();
    assert!(fractions.is_sorted());
    assert_eq!(fractions.last(), Some(&1.0));
    let (second, seen) = build(&builder, &recipe).await;
    assert_eq!(first.unwrap(), second.unwrap());
    assert!(seen.iter().all(|p| p.step != Step::Layer));
}

#[tokio::test]
async fn two_builds_do_not_share_a_cache_at_once() {
    let (_dir, builder, recipe) = prepared();
    let lock = builder.lock().unwrap();
    assert!(matches!(build(&builder, &recipe).await.0, Err(BuildError::Busy { .. })));
    drop(lock);
    build(&builder, &recipe).await.0.unwrap();
}

#[tokio::test]
async fn a_damaged_cached_system_is_not_used() {
    let (_dir, builder, recipe) = prepared();
    let key = root::key(&recipe, &Source::new(builder.mirror.as_deref(), None).unwrap());
    assert!(builder.cached_root(&key).await.unwrap().is_some());
    let root = builder.cache_dir.join(format!("root-{key}"));
    fs::write(root.join("kernel"), "a kernel, damaged").unwrap();
    assert!(builder.cached_root(&key).await.unwrap().is_none());
    fs::remove_file(root.join("kernel")).unwrap();
    assert!(builder.cached_root(&key).await.unwrap().is_none());
}

#[tokio::test]
async fn a_program_that_cannot_run_in_the_guest_is_refused() {
    let (_dir, builder, recipe) = prepared();
    fs::write(&recipe.agent_executable, elf_with_segment(3, b"/lib64/ld-linux-x86-64.so.2\0")).unwrap();
    assert!(matches!(
        build(&builder, &recipe).await.0,
        Err(BuildError::BadExecutable { reason: "it is not statically linked", .. })
    ));
    fs::write(&recipe.clan_executable, "#!/bin/sh").unwrap();
    fs::write(&recipe.agent_executable, elf_with_segment(1, b"")).unwrap();
    assert!(
        matches!(build(&builder, &recipe).await.0, Err(BuildError::BadExecutable { path, .. }) if path == recipe.clan_executable)
    );
}

#[tokio::test]
async fn a_cancelled_build_stores_nothing() {
    let (_dir, builder, recipe) = prepared();
    let cancel = CancellationToken::new();
    let inner = cancel.clone();
    let on_progress = move |p: Progress| {
        if p.step == Step::Layer {
            inner.cancel();
        }
    };
    assert!(matches!(builder.build(&recipe, on_progress, cancel).await, Err(BuildError::Cancelled)));
    assert_eq!(builder.store.list(), []);
    assert!(!builder.work().exists());
    build(&builder, &recipe).await.0.unwrap();
}

#[tokio::test]
async fn a_packed_system_is_equal_wherever_it_is_unpacked() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let names = ["etc", "usr", "bin", "zz", "a-file"];
    for (tree, order) in [("one", [0, 1, 2, 3, 4]), ("two", [4, 2, 0, 3, 1])] {
        for i in order {
            let path = at(tree).join("d").join(names[i]);
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("f"), names[i].repeat(5000)).unwrap();
        }
        let log = at("log");
        let cancel = CancellationToken::new();
        let tool = |name| Tool { name, step: Step::Root, log: &log, cancel: &cancel };
        let mut archive = command("tar");
        // The order in the archive differs with the order in which the directory was filled.
        archive.arg("-C").arg(at(tree)).args(["--numeric-owner", "-cf"]).arg(at(&format!("{tree}.tar")));
        archive.args(order.map(|i| format!("./d/{}", names[i])));
        tool("tar").run(archive, &mut |_| {}).await.unwrap();
        let pack = erofs::pack_archive(&at(&format!("{tree}.tar")), &at("tree"), &at(&format!("{tree}.erofs")));
        tool("mkfs.erofs").run(pack, &mut |_| {}).await.unwrap();
        assert!(!at("tree").exists());
    }
    assert_eq!(fs::read(at("one.erofs")).unwrap(), fs::read(at("two.erofs")).unwrap());
}

#[test]
fn subordinate_ids_are_found_by_name_or_number() {
    let lines = "anna:100000:65536\n1001:165536:65536\nbob:1:10\n";
    assert!(has_range(lines, &["anna", "1000"]));
    assert!(has_range(lines, &["carl", "1001"]));
    assert!(!has_range(lines, &["bob", "1002"]), "too few");
    assert!(!has_range("", &["anna"]));
    assert_eq!(user_name("root:x:0:0::/root:/bin/sh\nanna:x:1000:1000::/:/bin/sh\n", "1000"), Some("anna"));
}

const SMALL_DISK: &str = "CLAN_TEST_SMALL_DISK";

#[test]
fn a_disk_that_fills_up_while_an_image_is_built_is_told_and_keeps_nothing_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let ran = std::process::Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "builder::tests::on_a_small_disk", "--ignored", "--nocapture"])
        .env(SMALL_DISK, dir.path())
        // Where `prepared` has its folder.
        .env("TMPDIR", dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success() && said.contains("1 passed"), "{said}");
}

#[tokio::test]
#[ignore = "run by the test above, in a namespace"]
async fn on_a_small_disk() {
    let disk = PathBuf::from(std::env::var_os(SMALL_DISK).unwrap());
    let mount = |options: &str| {
        let mount =
            std::process::Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&disk).status();
        assert!(mount.unwrap().success());
    };
    mount("size=4g");
    for full_at in [Step::Initramfs, Step::Layer, Step::Store] {
        let (_dir, builder, recipe) = prepared();
        let filling = disk.join("filling");
        let fill = |p: Progress| {
            if p.step == full_at && !filling.exists() {
                mount("remount,size=8m");
                let free = rustix::fs::statvfs(&disk).map(|s| s.f_bavail * s.f_frsize).unwrap();
                fs::write(&filling, vec![0; usize::try_from(free).unwrap()]).unwrap();
            }
        };
        let built = builder.build(&recipe, fill, CancellationToken::new()).await;
        let full =
            matches!(&built, Err(BuildError::DiskFull { .. } | BuildError::Store(crate::StoreError::DiskFull(_))));
        assert!(full, "{full_at:?}: {built:?}");
        assert_eq!(builder.store.list(), []);
        assert!(!builder.work().exists());
        fs::remove_file(&filling).unwrap();
        mount("remount,size=4g");
        build(&builder, &recipe).await.0.unwrap();
    }
}
