use super::*;
use tempfile::TempDir;

const KERNEL: &[u8] = b"a kernel";
const INITRAMFS: &[u8] = b"an initramfs";

fn file(role: FileRole, content: &[u8]) -> ImageFile {
    ImageFile {
        role,
        size: ByteSize::from_bytes(content.len() as u64),
        hash: FileHash::from_bytes(*blake3::hash(content).as_bytes()),
    }
}

fn manifest(layer: &[u8]) -> Manifest {
    let contents = [
        (FileRole::Kernel, KERNEL),
        (FileRole::Initramfs, INITRAMFS),
        (FileRole::Root, b"a root"),
        (FileRole::Layer, layer),
    ];
    Manifest {
        version: 1,
        title: "test".into(),
        architecture: "x86_64".into(),
        inputs: FileHash::from_bytes([0; 32]),
        memory_min: ByteSize::from_mib(1),
        files: contents.iter().map(|(role, content)| file(*role, content)).collect(),
    }
}

fn store() -> (TempDir, ImageStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path().join("images")).unwrap();
    (dir, store)
}

fn fill(incoming: &Incoming, layer: &[u8]) {
    for file in incoming.files().iter().filter(|f| !f.is_complete()) {
        let content = match file.role {
            FileRole::Kernel => KERNEL,
            FileRole::Initramfs => INITRAMFS,
            FileRole::Root => b"a root",
            FileRole::Layer => layer,
        };
        fs::write(&file.path, content).unwrap();
    }
}

fn stored(store: &ImageStore, layer: &[u8]) -> StoredImage {
    let incoming = store.begin(manifest(layer)).unwrap();
    fill(&incoming, layer);
    incoming.finish().unwrap()
}

#[test]
fn an_image_is_there_when_it_is_complete_and_not_before() {
    let (_dir, store) = store();
    let incoming = store.begin(manifest(b"layer")).unwrap();
    let id = incoming.id();
    fill(&incoming, b"layer");
    assert_eq!(store.list(), []);
    let image = incoming.finish().unwrap();
    assert_eq!(store.list(), std::slice::from_ref(&image));
    assert_eq!(store.get(&id), Some(image.clone()));
    store.verify(&id).unwrap();
    assert_eq!(fs::read(image.path(FileRole::Layer)).unwrap(), b"layer");
}

#[test]
fn the_boot_disk_is_kernel_and_initramfs_in_whole_sectors() {
    let (_dir, store) = store();
    let disk = fs::read(stored(&store, b"layer").boot_disk()).unwrap();
    assert_eq!(disk.len(), 512);
    assert_eq!(disk[..20], [KERNEL, INITRAMFS].concat());
    assert!(disk[20..].iter().all(|b| *b == 0));
}

#[test]
fn a_missing_truncated_or_changed_file_is_named() {
    let (_dir, store) = store();
    let damages: [(Option<&[u8]>, Damage); 3] = [
        (None, Damage::Missing),
        (Some(b"lay"), Damage::Size { expected: 5, found: 3 }),
        (Some(b"laYer"), Damage::Content),
    ];
    for (content, expected) in damages {
        let incoming = store.begin(manifest(b"layer")).unwrap();
        fill(&incoming, b"layer");
        let path = incoming.file(&file(FileRole::Layer, b"layer").hash).unwrap().path;
        fs::remove_file(&path).unwrap();
        if let Some(content) = content {
            fs::write(&path, content).unwrap();
        }
        let error = incoming.finish().unwrap_err();
        let StoreError::Damaged { file, damage, .. } = error else { panic!("{error}") };
        assert_eq!((file.as_str(), damage), ("layer.erofs", expected));
        assert_eq!(store.list(), []);
    }
}

#[test]
fn an_interrupted_transfer_resumes_and_a_wrong_file_starts_over() {
    let (_dir, store) = store();
    let hash = file(FileRole::Layer, b"layer").hash;
    let incoming = store.begin(manifest(b"layer")).unwrap();
    fill(&incoming, b"lay");
    drop(incoming);
    let incoming = store.begin(manifest(b"layer")).unwrap();
    assert_eq!(incoming.file(&hash).unwrap().have, 3);
    assert!(incoming.finish().is_err());
    let incoming = store.begin(manifest(b"layer")).unwrap();
    assert_eq!(incoming.file(&hash).unwrap().have, 3, "a short file is not dropped");
    fs::write(incoming.file(&hash).unwrap().path, b"wrong").unwrap();
    assert!(incoming.finish().is_err());
    let incoming = store.begin(manifest(b"layer")).unwrap();
    assert_eq!(incoming.file(&hash).unwrap().have, 0);
    fill(&incoming, b"layer");
    incoming.finish().unwrap();
}

#[test]
fn files_of_another_image_need_no_transfer() {
    let (_dir, store) = store();
    stored(&store, b"one");
    let incoming = store.begin(manifest(b"two")).unwrap();
    let missing: Vec<_> = incoming.files().into_iter().filter(|f| !f.is_complete()).map(|f| f.role).collect();
    assert_eq!(missing, [FileRole::Layer]);
    fill(&incoming, b"two");
    let id = incoming.finish().unwrap().id;
    store.verify(&id).unwrap();
}

#[test]
fn a_damaged_file_of_another_image_is_not_shared() {
    let (_dir, store) = store();
    let other = stored(&store, b"one");
    fs::write(other.path(FileRole::Root), b"A root").unwrap();
    let incoming = store.begin(manifest(b"two")).unwrap();
    let root = incoming.files().into_iter().find(|f| f.role == FileRole::Root).unwrap();
    assert_eq!(root.have, 0);
    fill(&incoming, b"two");
    incoming.finish().unwrap();
}

#[test]
fn an_image_is_fetched_by_one_at_a_time() {
    let (_dir, store) = store();
    let first = store.begin(manifest(b"layer")).unwrap();
    assert!(matches!(store.begin(manifest(b"layer")), Err(StoreError::Busy(id)) if id == first.id()));
    store.begin(manifest(b"other")).unwrap();
    drop(first);
    store.begin(manifest(b"layer")).unwrap();
}

#[test]
fn damage_of_a_stored_image_is_found() {
    let (_dir, store) = store();
    let image = stored(&store, b"layer");
    fs::write(image.boot_disk(), [1; 512]).unwrap();
    let error = store.verify(&image.id).unwrap_err();
    assert!(
        matches!(&error, StoreError::Damaged { file, damage: Damage::Content, .. } if file == "boot.img"),
        "{error}"
    );
    fs::write(image.path(FileRole::Root), b"A root").unwrap();
    let error = store.verify(&image.id).unwrap_err();
    assert!(matches!(&error, StoreError::Damaged { file, .. } if file == "root.erofs"), "{error}");
    fs::write(image.dir.join(MANIFEST), b"junk").unwrap();
    assert_eq!(store.list(), []);
    // What cannot be read is replaced by a complete image.
    stored(&store, b"layer");
    store.verify(&image.id).unwrap();
}

#[test]
fn collection_keeps_what_is_asked_for_and_what_is_under_way() {
    let (_dir, store) = store();
    let (keep, go) = (stored(&store, b"one"), stored(&store, b"two"));
    let under_way = store.begin(manifest(b"three")).unwrap();
    drop(store.begin(manifest(b"four")).unwrap());
    assert_eq!(store.gc(&[keep.id]).unwrap(), [go.id]);
    assert_eq!(store.list(), [keep]);
    assert_eq!(fs::read_dir(store.dir()).unwrap().count(), 2);
    fill(&under_way, b"three");
    under_way.finish().unwrap();
    assert!(matches!(store.remove(&go.id), Err(StoreError::Unknown(_))));
}

#[test]
fn what_is_missing_counts_what_other_images_have_and_what_arrived_before_a_cut() {
    let (_dir, store) = store();
    let layer = vec![7; 40 << 10];
    let all = manifest(&layer).total_size().as_bytes();
    assert_eq!(store.missing(&manifest(&layer)), all);
    stored(&store, b"another");
    let layer_only = layer.len() as u64;
    assert_eq!(store.missing(&manifest(&layer)), layer_only, "the others are another image's, too");
    // At its full length from the start, with some of it written.
    let incoming = store.begin(manifest(&layer)).unwrap();
    let place = incoming.files().into_iter().find(|f| f.role == FileRole::Layer).unwrap().path;
    let part = File::create(format!("{}.part", place.display())).unwrap();
    part.set_len(layer_only).unwrap();
    assert_eq!(store.missing(&manifest(&layer)), layer_only);
    std::os::unix::fs::FileExt::write_all_at(&part, &layer[..16 << 10], 8 << 10).unwrap();
    part.sync_all().unwrap();
    // Some file systems take a little more than was written.
    let missing = store.missing(&manifest(&layer));
    assert!((layer_only - (24 << 10)..=layer_only - (16 << 10)).contains(&missing), "{missing}");
    assert_eq!(store.left_over(), Vec::<PathBuf>::new(), "somebody is at it");
    let staged = incoming.dir.clone();
    drop(incoming);
    assert_eq!(store.left_over(), [staged]);
    stored(&store, &layer);
    assert_eq!(store.missing(&manifest(&layer)), 0);
    assert_eq!(store.left_over(), Vec::<PathBuf>::new());
}

#[test]
fn a_manifest_over_a_limit_is_refused() {
    let (_dir, store) = store();
    let mut two_layers = manifest(b"layer");
    two_layers.files.push(file(FileRole::Layer, b"more"));
    assert!(matches!(store.begin(two_layers), Err(StoreError::Manifest(_))));
    let mut no_kernel = manifest(b"layer");
    no_kernel.files.remove(0);
    assert!(matches!(store.begin(no_kernel), Err(StoreError::Manifest(ManifestError::Incomplete(FileRole::Kernel)))));
}

#[test]
fn the_pieces_of_an_image_lead_to_its_files_and_are_made_anew_if_they_do_not() {
    let (_dir, store) = store();
    let layer = vec![7; PIECE + 5];
    let image = stored(&store, &layer);
    let pieces = image.pieces().unwrap();
    assert_eq!(pieces.len(), 5 * 32, "one each, and two of the layer");
    let layer_file = image.manifest.file(FileRole::Layer).unwrap();
    let list = Pieces::decode(&pieces[3 * 32..], layer_file.size.as_bytes(), &layer_file.hash).unwrap();
    assert!(list.is_piece(1, &layer[PIECE..]));
    for damage in [&pieces[1..], &[], &[&[!pieces[0]], &pieces[1..]].concat()] {
        fs::write(image.dir.join(PIECES), damage).unwrap();
        assert_eq!(image.pieces().unwrap(), pieces);
        assert_eq!(fs::read(image.dir.join(PIECES)).unwrap(), pieces, "kept");
    }
    // Not of files that are damaged: nobody would take them.
    fs::remove_file(image.dir.join(PIECES)).unwrap();
    fs::write(image.path(FileRole::Layer), vec![8; PIECE + 5]).unwrap();
    assert!(matches!(image.pieces(), Err(StoreError::Damaged { damage: Damage::Content, .. })));
}

#[test]
fn several_may_ask_for_the_pieces_of_a_new_image_at_once_and_a_disk_that_refuses_them_keeps_nobody_waiting() {
    let (_dir, store) = store();
    let image = stored(&store, &vec![7; 3 * PIECE]);
    let expected = image.pieces().unwrap();
    for _ in 0..50 {
        fs::remove_file(image.dir.join(PIECES)).unwrap();
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..4).map(|_| scope.spawn(|| image.pieces())).collect();
            for pieces in all {
                assert_eq!(pieces.join().unwrap().unwrap(), expected);
            }
        });
        assert_eq!(fs::read(image.dir.join(PIECES)).unwrap(), expected, "kept");
    }
    fs::remove_file(image.dir.join(PIECES)).unwrap();
    fs::create_dir(image.dir.join(PIECES)).unwrap();
    assert_eq!(image.pieces().unwrap(), expected);
    assert!(fs::read_dir(&image.dir).unwrap().flatten().all(|e| !e.file_name().to_string_lossy().contains(".new")));
}

#[test]
fn what_does_not_belong_to_an_image_does_not_stay_with_it() {
    let (_dir, store) = store();
    let incoming = store.begin(manifest(b"layer")).unwrap();
    fill(&incoming, b"layer");
    let beginning = incoming.files()[0].path.with_extension("part");
    fs::write(&beginning, b"half a ker").unwrap();
    let image = incoming.finish().unwrap();
    let mut names: Vec<_> = fs::read_dir(&image.dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["boot.img", "initramfs", "kernel", "layer.erofs", "manifest", "root.erofs"]);
}
