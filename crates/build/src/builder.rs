//! The build, step by step.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use clan_types::{ByteSize, FileHash, ImageId};
use clan_wire::image::{FileRole, ImageFile, Manifest};
use tokio_util::sync::CancellationToken;

use crate::{
    BuildError, ImageStore, Progress, Recipe, Step,
    elf::Elf,
    erofs,
    files::{free_space, hash_file, io_error, link_or_copy},
    initramfs::KernelBundle,
    kernel, layer,
    lock::Held,
    process::{Tool, find},
    root::{self, Source},
};

/// Needed where packages are installed: packages, kernel and the installed system.
const SPACE_INSTALL: u64 = 1 << 30;
/// Needed in the cache: archive, unpacked system and packed system.
const SPACE_CACHE: u64 = 1 << 30;
/// Needed in the cache when the system is there already.
const SPACE_LAYER: u64 = 300 << 20;
/// Cached systems that are kept.
const KEPT_ROOTS: usize = 3;
/// Least memory for systemd, the controller and a web server.
const MEMORY_MIN: ByteSize = ByteSize::from_mib(256);
const WORK: &str = "work";

/// Builds images as an ordinary user.
#[derive(Debug, Clone)]
pub struct Builder {
    /// Where intermediate results and logs are kept; may be deleted at any time between builds.
    pub cache_dir: PathBuf,
    /// Where images go.
    pub store: ImageStore,
    /// HTTP proxy for package downloads, as a URL; `None` is the environment's `http_proxy`.
    pub proxy: Option<String>,
    /// Package mirror, as a URL; `None` is `http://deb.debian.org`.
    pub mirror: Option<String>,
}

/// A packed system with its kernel, in the cache.
struct CachedRoot {
    dir: PathBuf,
    root: ImageFile,
    kernel: ImageFile,
}

impl Builder {
    /// Builds the image of a recipe and puts it into the store, unless it is there already. Outputs of tools are kept in
    /// `<cache_dir>/logs`. One build at a time uses a cache directory ([`BuildError::Busy`]).
    pub async fn build(
        &self,
        recipe: &Recipe,
        progress: impl FnMut(Progress) + Send,
        cancel: CancellationToken,
    ) -> Result<ImageId, BuildError> {
        let mut report = Report { sink: progress, step: Step::Check, done: 0.0 };
        report.begin(Step::Check);
        let this = self.clone();
        let lock = blocking(move || this.lock()).await?;
        let result = self.build_locked(recipe, &mut report, &cancel).await;
        // Also after a failure, and even if the caller wants nothing more: half a system is large.
        if let Err(error) = self.clear_work(&CancellationToken::new()).await {
            tracing::debug!(%error, "the work directory stays until the next build");
        }
        drop(lock);
        if result.is_ok() {
            report.finish();
        }
        result
    }

    async fn build_locked<F: FnMut(Progress) + Send>(
        &self,
        recipe: &Recipe,
        report: &mut Report<F>,
        cancel: &CancellationToken,
    ) -> Result<ImageId, BuildError> {
        let source = Source::new(self.mirror.as_deref(), self.proxy.as_deref())?;
        root::check_packages(recipe)?;
        let wanted = recipe.clone();
        let agent = blocking(move || {
            check_program(&wanted.clan_executable)?;
            read_agent(&wanted.agent_executable)
        })
        .await?;
        self.clear_work(cancel).await?;
        let key = root::key(recipe, &source);
        let cached = self.cached_root(&key).await?;
        let space = if cached.is_some() { (0, SPACE_LAYER) } else { (SPACE_INSTALL, SPACE_CACHE) };
        let this = self.clone();
        blocking(move || this.check_for(space)).await?;

        let root = match cached {
            Some(root) => root,
            None => self.build_root(recipe, &source, &key, report, cancel).await?,
        };
        self.assemble(recipe, root, agent, report, cancel).await
    }

    /// Looks for what a build needs (tools, subordinate ids, disk space) without starting one. Blocks for some
    /// milliseconds.
    pub fn check(&self) -> Result<(), BuildError> {
        fs::create_dir_all(&self.cache_dir).map_err(io_error(Step::Check, "create", &self.cache_dir))?;
        self.check_for((SPACE_INSTALL, SPACE_CACHE))
    }

    fn check_for(&self, (install, cache): (u64, u64)) -> Result<(), BuildError> {
        check_tools()?;
        check_namespaces()?;
        let place = |path: &Path| {
            let (free, _) = free_space(path).map_err(io_error(Step::Check, "examine", path))?;
            let device = fs::metadata(path).map_err(io_error(Step::Check, "examine", path))?.dev();
            Ok::<_, BuildError>((free, device))
        };
        let ((cache_free, cache_device), temp) = (place(&self.cache_dir)?, root::temp_dir());
        let (temp_free, temp_device) = if install > 0 { place(&temp)? } else { (u64::MAX, 0) };
        let cache = if temp_device == cache_device { cache + install } else { cache };
        for (path, needed, available) in [(&self.cache_dir, cache, cache_free), (&temp, install, temp_free)] {
            if available < needed {
                let (needed, available) = (ByteSize::from_bytes(needed), ByteSize::from_bytes(available));
                return Err(BuildError::NotEnoughSpace { path: path.clone(), needed, available });
            }
        }
        Ok(())
    }

    /// The lock of the cache directory, held for a whole build.
    fn lock(&self) -> Result<Held, BuildError> {
        let logs = self.cache_dir.join("logs");
        fs::create_dir_all(&logs).map_err(io_error(Step::Check, "create", &logs))?;
        let path = self.cache_dir.join("lock");
        let held = Held::take(&path).map_err(io_error(Step::Check, "lock", &path))?;
        held.ok_or_else(|| BuildError::Busy { path: self.cache_dir.clone() })
    }

    fn work(&self) -> PathBuf {
        self.cache_dir.join(WORK)
    }

    fn log(&self, name: &str) -> PathBuf {
        self.cache_dir.join("logs").join(format!("{name}.log"))
    }

    /// Removes what this or an interrupted build left. Files in there may belong to subordinate ids.
    async fn clear_work(&self, cancel: &CancellationToken) -> Result<(), BuildError> {
        let work = self.work();
        let gone = blocking({
            let work = work.clone();
            move || match fs::remove_dir_all(&work) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
                result => Ok(result.is_ok()),
            }
        })
        .await?;
        if gone {
            return Ok(());
        }
        let log = self.log("clean");
        Tool { name: "rm", step: Step::Check, log: &log, cancel }.run(erofs::remove(&[work]), &mut |_| {}).await
    }

    /// The cached root with a key. A damaged one counts as none.
    async fn cached_root(&self, key: &str) -> Result<Option<CachedRoot>, BuildError> {
        let dir = self.cache_dir.join(format!("root-{key}"));
        blocking(move || {
            let Ok(sums) = fs::read_to_string(dir.join("sums")) else { return Ok(None) };
            let root = CachedRoot::open(dir)?;
            if root.sums() == sums {
                // Its age decides which cached roots go.
                let _ = File::open(root.dir.join("sums")).and_then(|f| f.set_modified(std::time::SystemTime::now()));
                return Ok(Some(root));
            }
            tracing::warn!(dir = %root.dir.display(), "a cached system is damaged and is built anew");
            Ok(None)
        })
        .await
        .or_else(|error| match error {
            BuildError::Io { .. } => Ok(None),
            other => Err(other),
        })
    }

    async fn build_root<F: FnMut(Progress) + Send>(
        &self,
        recipe: &Recipe,
        source: &Source,
        key: &str,
        report: &mut Report<F>,
        cancel: &CancellationToken,
    ) -> Result<CachedRoot, BuildError> {
        let new = self.work().join("new");
        create_dir(Step::Packages, &new)?;
        report.begin(Step::Packages);
        let mut follow = root::Follow::default();
        let log = self.log("packages");
        let tool = Tool { name: "mmdebstrap", step: Step::Packages, log: &log, cancel };
        let command = root::mmdebstrap(recipe, source, &new);
        tool.run(command, &mut |line| report.line(follow.line(line), line))
            .await
            .map_err(|error| root::failure(error, source))?;

        report.begin(Step::Root);
        let (archive, image) = (new.join("root.tar"), new.join("root.erofs"));
        let log = self.log("root");
        let command = erofs::pack_archive(&archive, &self.work().join("tree"), &image);
        Tool { name: "mkfs.erofs", step: Step::Root, log: &log, cancel }
            .run(command, &mut |line| report.line(0.0, line))
            .await?;

        report.begin(Step::Kernel);
        let (cache_dir, place) = (self.cache_dir.clone(), self.cache_dir.join(format!("root-{key}")));
        blocking(move || {
            fs::remove_file(&archive).map_err(io_error(Step::Root, "remove", &archive))?;
            let bundle = KernelBundle::read(&new.join("kernel.tar"))?;
            let path = new.join("kernel");
            fs::write(&path, kernel::extract(&bundle.vmlinuz)?).map_err(io_error(Step::Kernel, "write", &path))?;
            let root = CachedRoot::open(new.clone())?;
            let path = new.join("sums");
            fs::write(&path, root.sums()).map_err(io_error(Step::Kernel, "write", &path))?;
            if place.exists() {
                fs::remove_dir_all(&place).map_err(io_error(Step::Kernel, "remove", &place))?;
            }
            fs::rename(&new, &place).map_err(io_error(Step::Kernel, "rename", &new))?;
            prune_roots(&cache_dir);
            Ok(CachedRoot { dir: place, ..root })
        })
        .await
    }

    async fn assemble<F: FnMut(Progress) + Send>(
        &self,
        recipe: &Recipe,
        root: CachedRoot,
        agent: Vec<u8>,
        report: &mut Report<F>,
        cancel: &CancellationToken,
    ) -> Result<ImageId, BuildError> {
        report.begin(Step::Initramfs);
        let work = self.work();
        create_dir(Step::Initramfs, &work)?;
        let (tree, program, dir) = (work.join("layer"), recipe.clan_executable.clone(), work.clone());
        let root_dir = root.dir.clone();
        let (initramfs, program_hash) = blocking(move || {
            let path = dir.join("initramfs");
            let bytes = KernelBundle::read(&root_dir.join("kernel.tar"))?.initramfs(&agent)?;
            fs::write(&path, bytes).map_err(io_error(Step::Initramfs, "write", &path))?;
            Ok((image_file(Step::Initramfs, FileRole::Initramfs, &path)?, hash_file(Step::Layer, &program)?.0))
        })
        .await?;
        let inputs = inputs(recipe, &root, &initramfs, &program_hash);
        if let Some(image) = self.store.list().into_iter().find(|image| image.manifest.inputs == inputs) {
            return Ok(image.id);
        }

        report.begin(Step::Layer);
        let (program, tree_dir) = (recipe.clan_executable.clone(), tree.clone());
        blocking(move || layer::write(&tree_dir, &program)).await?;
        let (packed, log) = (work.join("layer.erofs"), self.log("layer"));
        let command = erofs::pack_directory(&tree, &packed);
        Tool { name: "mkfs.erofs", step: Step::Layer, log: &log, cancel }
            .run(command, &mut |line| report.line(0.0, line))
            .await?;
        if cancel.is_cancelled() {
            return Err(BuildError::Cancelled);
        }

        report.begin(Step::Store);
        let title = format!("{}, Clan {}", recipe.suite.title(), env!("CARGO_PKG_VERSION"));
        let store = self.store.clone();
        blocking(move || {
            let layer = image_file(Step::Layer, FileRole::Layer, &packed)?;
            let sources = [
                (root.dir.join("kernel"), root.kernel),
                (work.join("initramfs"), initramfs),
                (root.dir.join("root.erofs"), root.root),
                (packed, layer),
            ];
            let files = sources.iter().map(|(_, file)| file.clone()).collect();
            let manifest =
                Manifest { version: 1, title, architecture: "x86_64".into(), inputs, memory_min: MEMORY_MIN, files };
            let incoming = store.begin(manifest)?;
            for (path, file) in &sources {
                match incoming.file(&file.hash) {
                    Some(place) if place.have == 0 => link_or_copy(Step::Store, path, &place.path)?,
                    Some(place) if !place.is_complete() => {
                        fs::remove_file(&place.path).map_err(io_error(Step::Store, "remove", &place.path))?;
                        link_or_copy(Step::Store, path, &place.path)?;
                    }
                    _ => {}
                }
            }
            Ok(incoming.finish()?.id)
        })
        .await
    }
}

impl CachedRoot {
    fn open(dir: PathBuf) -> Result<Self, BuildError> {
        let root = image_file(Step::Root, FileRole::Root, &dir.join("root.erofs"))?;
        let kernel = image_file(Step::Kernel, FileRole::Kernel, &dir.join("kernel"))?;
        Ok(Self { dir, root, kernel })
    }

    /// What the files hash to, as kept beside them.
    fn sums(&self) -> String {
        format!("{} root.erofs\n{} kernel\n", self.root.hash, self.kernel.hash)
    }
}

/// Tells the caller how far the build is.
struct Report<F> {
    sink: F,
    step: Step,
    /// INVARIANT: never decreases.
    done: f32,
}

impl<F: FnMut(Progress) + Send> Report<F> {
    fn begin(&mut self, step: Step) {
        self.step = step;
        self.advance(0.0, None);
    }

    fn line(&mut self, fraction: f32, line: &str) {
        self.advance(fraction, Some(line.to_owned()));
    }

    fn finish(&mut self) {
        self.step = Step::Store;
        self.advance(1.0, None);
    }

    fn advance(&mut self, fraction: f32, line: Option<String>) {
        let (from, to) = share(self.step);
        self.done = self.done.max(from + (to - from) * fraction);
        (self.sink)(Progress { step: self.step, fraction: Some(self.done), line });
    }
}

/// Which part of a whole build's time a step takes, by measurement.
const fn share(step: Step) -> (f32, f32) {
    match step {
        Step::Check => (0.0, 0.01),
        Step::Packages => (0.01, 0.62),
        Step::Root => (0.62, 0.86),
        Step::Kernel => (0.86, 0.88),
        Step::Initramfs => (0.88, 0.9),
        Step::Layer => (0.9, 0.98),
        Step::Store => (0.98, 1.0),
    }
}

/// What decides the content of an image.
fn inputs(recipe: &Recipe, root: &CachedRoot, initramfs: &ImageFile, program: &FileHash) -> FileHash {
    let mut hasher = blake3::Hasher::new_derive_key("clan 2026-11 image inputs v1");
    for hash in [&root.root.hash, &root.kernel.hash, &initramfs.hash, program] {
        hasher.update(hash.as_bytes());
    }
    hasher.update(layer::fingerprint().as_bytes());
    hasher.update(recipe.suite.codename().as_bytes());
    hasher.update(env!("CARGO_PKG_VERSION").as_bytes());
    FileHash::from_bytes(*hasher.finalize().as_bytes())
}

fn image_file(step: Step, role: FileRole, path: &Path) -> Result<ImageFile, BuildError> {
    let (hash, size) = hash_file(step, path)?;
    Ok(ImageFile { role, size: ByteSize::from_bytes(size), hash })
}

fn create_dir(step: Step, dir: &Path) -> Result<(), BuildError> {
    fs::create_dir_all(dir).map_err(io_error(step, "create", dir))
}

/// Runs disk work away from the tasks that must stay responsive.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BuildError> + Send + 'static,
) -> Result<T, BuildError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down.
            Err(_) => Err(BuildError::Cancelled),
        },
    }
}

fn check_tools() -> Result<(), BuildError> {
    const TOOLS: [(&str, &str); 5] = [
        ("mmdebstrap", "mmdebstrap"),
        ("apt-get", "apt"),
        ("mkfs.erofs", "erofs-utils"),
        ("mkfs.ext4", "e2fsprogs"),
        ("tar", "tar"),
    ];
    const UNPRIVILEGED: [(&str, &str); 3] =
        [("unshare", "util-linux"), ("newuidmap", "uidmap"), ("newgidmap", "uidmap")];
    let unprivileged = if rustix::process::geteuid().is_root() { &[][..] } else { &UNPRIVILEGED };
    if let Some(&(tool, package)) = TOOLS.iter().chain(unprivileged).find(|(tool, _)| find(tool).is_none()) {
        return Err(BuildError::MissingTool { tool, package });
    }
    if !Path::new(root::KEYRING).exists() {
        return Err(BuildError::MissingTool { tool: root::KEYRING, package: "debian-archive-keyring" });
    }
    Ok(())
}

/// Tries whether a user namespace can be had, and finds out why not.
fn check_namespaces() -> Result<(), BuildError> {
    let output = erofs::probe().as_std_mut().output().map_err(io_error(Step::Check, "start", Path::new("unshare")))?;
    if output.status.success() {
        return Ok(());
    }
    let uid = rustix::process::geteuid().as_raw().to_string();
    let accounts = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let user = user_name(&accounts, &uid).unwrap_or(&uid);
    for file in ["/etc/subuid", "/etc/subgid"] {
        if !has_range(&fs::read_to_string(file).unwrap_or_default(), &[user, &uid]) {
            return Err(BuildError::NoSubordinateIds { user: user.to_owned(), file });
        }
    }
    let reason = String::from_utf8_lossy(&output.stderr)
        .lines()
        .last()
        .unwrap_or("no reason given")
        .trim()
        .chars()
        .take(200)
        .collect();
    Err(BuildError::NoUserNamespaces { reason })
}

/// The name of the account with a number, from the lines of `/etc/passwd`.
fn user_name<'a>(accounts: &'a str, uid: &str) -> Option<&'a str> {
    let mut fields = accounts.lines().map(|line| line.split(':').collect::<Vec<_>>());
    fields.find(|f| f.get(2) == Some(&uid)).and_then(|f| f.first().copied())
}

/// Whether the lines of `/etc/subuid` or `/etc/subgid` give one of these names a whole range of ids.
fn has_range(lines: &str, names: &[&str]) -> bool {
    lines.lines().any(|line| {
        let mut fields = line.split(':');
        let named = fields.next().is_some_and(|name| names.contains(&name));
        named && fields.nth(1).and_then(|count| count.trim().parse::<u64>().ok()).is_some_and(|count| count >= 65536)
    })
}

/// Reads the agent. INVARIANT: it is static, for the initramfs has no loader for it.
fn read_agent(path: &Path) -> Result<Vec<u8>, BuildError> {
    let bytes = fs::read(path).map_err(io_error(Step::Check, "read", path))?;
    match Elf::parse(&bytes) {
        None => Err(BuildError::BadExecutable { path: path.to_owned(), reason: "it is not an x86-64 program" }),
        Some(elf) if elf.is_dynamic() => {
            Err(BuildError::BadExecutable { path: path.to_owned(), reason: "it is not statically linked" })
        }
        Some(_) => Ok(bytes),
    }
}

fn check_program(path: &Path) -> Result<(), BuildError> {
    let mut start = Vec::new();
    let file = File::open(path).map_err(io_error(Step::Check, "open", path))?;
    file.take(4096).read_to_end(&mut start).map_err(io_error(Step::Check, "read", path))?;
    match Elf::parse(&start) {
        Some(_) => Ok(()),
        None => Err(BuildError::BadExecutable { path: path.to_owned(), reason: "it is not an x86-64 program" }),
    }
}

/// Removes the oldest cached roots. What cannot be removed costs space only.
fn prune_roots(cache_dir: &Path) {
    let Ok(entries) = fs::read_dir(cache_dir) else { return };
    let mut roots: Vec<_> = entries
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with("root-"))
        .map(|e| (fs::metadata(e.path().join("sums")).and_then(|m| m.modified()).ok(), e.path()))
        .collect();
    roots.sort();
    roots.reverse();
    for (_, dir) in roots.into_iter().skip(KEPT_ROOTS) {
        if let Err(error) = fs::remove_dir_all(&dir) {
            tracing::debug!(dir = %dir.display(), %error, "an old cached system stays");
        }
    }
}

#[cfg(test)]
mod tests;
