//! The distribution's part of an image: packages into a tar archive, by `mmdebstrap`, without root.

use std::{
    env,
    path::{Path, PathBuf},
};

use tokio::process::Command;

use crate::{
    BuildError, Recipe,
    modules::INITRAMFS,
    process::{cause, command},
};

/// Change this when anything about the root changes that is not in the key: cached roots are then built anew.
const VERSION: u32 = 3;
/// Times of files are cut off here, so that two builds of the same packages are equal. 2023-11-14T22:13:20Z.
pub(crate) const EPOCH: u64 = 1_700_000_000;
const HOOK: &str = include_str!("hook.sh");
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";
/// Merges `/bin` and the like into `/usr` from the start: the package that does it afterwards pulls in all of Perl.
const MERGED_USR: &str = "/usr/share/mmdebstrap/hooks/merged-usr";
const DEFAULT_MIRROR: &str = "http://deb.debian.org";
/// What signs the distribution's package lists.
pub(crate) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Modules that a guest may load once it runs, as patterns; with what they need they make up `/usr/lib/modules`.
const GUEST_MODULES: &[&str] = &[
    "veth",
    "bridge",
    "dummy",
    "macvlan",
    "ipvlan",
    "vxlan",
    "wireguard",
    "nf_tables",
    "nft_.*",
    "nf_conntrack",
    "nf_nat",
    "nf_log_syslog",
    "nfnetlink_.*",
    "sch_.*",
    "fuse",
    "virtiofs",
    "virtio_mem",
    "vmw_vsock_virtio_transport",
    "loop",
    "dm_mod",
    "dm_crypt",
    "dm_snapshot",
    "dm_verity",
    "vfat",
    "nls_.*",
    "isofs",
    "squashfs",
    "zram",
    ".*_diag",
    "tcp_bbr",
    "autofs4",
];

/// Left out of every package: nobody reads manuals in a guest.
const LEFT_OUT: &[&str] = &[
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
];

/// Where packages come from.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    mirror: String,
    proxy: Option<String>,
    no_proxy: Option<String>,
}

impl Source {
    /// Checks both addresses. Without a proxy, the environment's (`http_proxy`, `no_proxy`) is used.
    pub(crate) fn new(mirror: Option<&str>, proxy: Option<&str>) -> Result<Self, BuildError> {
        let from_env = |name| env::var(name).ok();
        let proxy = proxy.map(str::to_owned).or_else(|| from_env("http_proxy")).filter(|v| !v.is_empty());
        let mirror = mirror.unwrap_or(DEFAULT_MIRROR).trim_end_matches('/').to_owned();
        for (what, url) in [("package mirror", Some(&mirror)), ("proxy", proxy.as_ref())] {
            if let Some(url) = url.filter(|url| !is_url(url)) {
                // What is before the `@` may be a password.
                let url = url.rsplit('@').next().unwrap_or_default().chars().take(100).collect();
                return Err(BuildError::BadUrl { what, url });
            }
        }
        Ok(Self { mirror, proxy, no_proxy: from_env("no_proxy") })
    }

    /// The mirror's address, for people.
    pub(crate) fn mirror(&self) -> &str {
        &self.mirror
    }

    fn lines(&self, suite: &str) -> [String; 3] {
        let mirror = &self.mirror;
        [
            format!("deb {mirror}/debian {suite} main"),
            format!("deb {mirror}/debian {suite}-updates main"),
            format!("deb {mirror}/debian-security {suite}-security main"),
        ]
    }
}

/// A plain HTTP or file address: nothing that could mean something else in a package source line.
fn is_url(url: &str) -> bool {
    let known =
        ["http://", "https://", "file:///"].iter().any(|scheme| url.len() > scheme.len() && url.starts_with(scheme));
    known && url.chars().all(|c| c.is_ascii_graphic() && !matches!(c, '"' | '\'' | '[' | ']' | '\\' | '`' | '$'))
}

/// Refuses anything but package names, so that no name becomes an option.
pub(crate) fn check_packages(recipe: &Recipe) -> Result<(), BuildError> {
    let is_name = |p: &str| {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '+' | '-' | '.');
        p.len() >= 2 && p.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()) && p.chars().all(plain)
    };
    match recipe.packages.iter().find(|p| !is_name(p)) {
        Some(package) => Err(BuildError::BadPackage { package: package.clone() }),
        None => Ok(()),
    }
}

/// What a cached root is found by: the hash of all that decides what is in it.
pub(crate) fn key(recipe: &Recipe, source: &Source) -> String {
    let mut packages = recipe.packages.clone();
    packages.sort();
    packages.dedup();
    let mut hasher = blake3::Hasher::new_derive_key("clan 2026-11 image root v1");
    let version = VERSION.to_string();
    let hook = hook(recipe);
    let fields = [version.as_str(), recipe.suite.codename(), &source.mirror, &hook].into_iter();
    for field in fields.chain(LEFT_OUT.iter().copied()).chain(packages.iter().map(String::as_str)) {
        hasher.update(&(field.len() as u64).to_le_bytes());
        hasher.update(field.as_bytes());
    }
    hasher.finalize().to_hex()[..20].to_owned()
}

/// The temporary directory in which the root is put together: it must be reachable for other users, for in the user
/// namespace the new root belongs to them. `/var/tmp` is on a disk where `/tmp` may be memory.
pub(crate) fn temp_dir() -> PathBuf {
    match env::var_os("TMPDIR") {
        Some(dir) if !dir.is_empty() => dir.into(),
        _ if Path::new("/var/tmp").is_dir() => "/var/tmp".into(),
        _ => env::temp_dir(),
    }
}

/// The command that writes `root.tar` and `kernel.tar` into a directory.
pub(crate) fn mmdebstrap(recipe: &Recipe, source: &Source, into: &Path) -> Command {
    let suite = recipe.suite.codename();
    let mut command = command("mmdebstrap");
    command.env("SOURCE_DATE_EPOCH", EPOCH.to_string()).env("TMPDIR", temp_dir()).current_dir(into);
    // In the environment, not in an option: an address may hold a password, and everybody can read options.
    if let Some(proxy) = &source.proxy {
        command.env("http_proxy", proxy).env("https_proxy", proxy);
    }
    if let Some(no_proxy) = &source.no_proxy {
        command.env("no_proxy", no_proxy);
    }
    let mode = if rustix::process::geteuid().is_root() { "root" } else { "unshare" };
    command.args(["--verbose", "--variant=minbase", "--format=tar", "--architectures=amd64"]);
    command.arg(format!("--mode={mode}")).arg(format!("--keyring={KEYRING}"));
    command.arg(format!("--include={}", recipe.packages.join(",")));
    command.args([
        "--aptopt=APT::Install-Recommends \"false\"",
        "--aptopt=Acquire::Languages \"none\"",
        "--aptopt=Acquire::Retries \"3\"",
    ]);
    command.args(LEFT_OUT.iter().map(|option| format!("--dpkgopt={option}")));
    command.arg(format!("--hook-dir={MERGED_USR}")).arg(format!("--customize-hook={}", hook(recipe)));
    command
        .args(["--customize-hook=tar-out /clan-kernel/out kernel.tar", "--customize-hook=rm -rf \"$1/clan-kernel\""]);
    command.args([suite, "root.tar"]).args(source.lines(suite));
    command
}

/// Tells failed downloads from other failures.
pub(crate) fn failure(error: BuildError, source: &Source) -> BuildError {
    let signs = [
        "Failed to fetch",
        "Could not resolve",
        "Temporary failure resolving",
        "Could not connect",
        "Connection timed out",
        "Connection failed",
    ];
    match error {
        BuildError::ToolFailed { tail, log, .. }
            if cause(&tail).is_some_and(|_| tail.iter().any(|line| signs.iter().any(|s| line.contains(s)))) =>
        {
            BuildError::Download { mirror: source.mirror().to_owned(), tail, log }
        }
        other => other,
    }
}

fn hook(recipe: &Recipe) -> String {
    let keep = GUEST_MODULES.iter().chain(INITRAMFS).copied().collect::<Vec<_>>().join("|");
    format!("META={KERNEL_PACKAGE}\nSUITE={}\nKEEP='{keep}'\n{HOOK}", recipe.suite)
}

/// Follows `mmdebstrap`'s output.
#[derive(Debug, Default)]
pub(crate) struct Follow {
    /// Where the present phase begins and ends, as fractions of the step.
    phase: (f32, f32),
    expected: f32,
    seen: f32,
}

impl Follow {
    /// The fraction of the step that is done after a line of output.
    pub(crate) fn line(&mut self, line: &str) -> f32 {
        const PHASES: [(&str, f32, f32); 8] = [
            ("I: running apt-get update", 0.01, 0.06),
            ("I: downloading packages", 0.06, 0.16),
            ("I: extracting archives", 0.16, 0.22),
            ("I: installing essential packages", 0.22, 0.5),
            ("I: installing remaining packages", 0.5, 0.78),
            ("I: running --customize-hook", 0.78, 0.8),
            ("I: kernel package", 0.8, 0.92),
            ("I: creating tarball", 0.92, 1.0),
        ];
        if let Some((_, from, to)) = PHASES.iter().find(|(start, _, _)| line.starts_with(start)) {
            self.phase = (*from, *to);
            self.seen = 0.0;
        } else if let Some((count, _)) =
            line.split_once(" upgraded, ").and_then(|(_, rest)| rest.split_once(" newly installed"))
        {
            self.expected = count.parse().unwrap_or(0.0);
        } else if ["Get:", "Unpacking ", "Setting up "].iter().any(|start| line.starts_with(start)) {
            self.seen += 1.0;
        }
        // A package of a phase shows up twice at most: unpacked and set up.
        let share = if self.expected > 0.0 { (self.seen / (2.0 * self.expected)).min(1.0) } else { 0.0 };
        self.phase.0 + (self.phase.1 - self.phase.0) * share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_not_a_package_is_refused() {
        let mut recipe = Recipe::default_debian("/clan", "/agent");
        assert!(check_packages(&recipe).is_ok());
        for name in ["--mode=root", "a,b", "", "Nginx", "a b", "./x.deb"] {
            recipe.packages = vec![name.into()];
            assert!(check_packages(&recipe).is_err(), "{name}");
        }
    }

    #[test]
    fn a_mirror_or_proxy_that_is_not_a_url_is_refused() {
        assert!(Source::new(Some("http://mirror.example/"), Some("http://user:pw@10.0.0.1:3128")).is_ok());
        assert!(matches!(
            Source::new(Some("[trusted=yes] http://x"), None),
            Err(BuildError::BadUrl { what: "package mirror", .. })
        ));
        let error = Source::new(None, Some("user:secret@10.0.0.1:3128")).unwrap_err();
        assert_eq!(error.to_string(), "`10.0.0.1:3128` is not a URL of a proxy");
    }

    #[test]
    fn a_cached_root_is_found_by_what_is_in_it() {
        let recipe = Recipe::default_debian("/clan", "/agent");
        let source = Source::new(None, None).unwrap();
        let mut shuffled = Recipe::default_debian("/other", "/paths");
        shuffled.packages.reverse();
        assert_eq!(key(&recipe, &source), key(&shuffled, &source));
        shuffled.packages.push("curl".into());
        assert_ne!(key(&recipe, &source), key(&shuffled, &source));
        assert_ne!(key(&recipe, &source), key(&recipe, &Source::new(Some("http://mirror.example"), None).unwrap()));
        assert_eq!(key(&recipe, &source), key(&recipe, &Source::new(None, Some("http://proxy:1")).unwrap()));
    }

    #[test]
    fn no_password_of_a_proxy_is_in_an_option() {
        let source = Source::new(None, Some("http://user:secret@10.0.0.1:3128")).unwrap();
        let command = mmdebstrap(&Recipe::default_debian("/clan", "/agent"), &source, Path::new("/"));
        assert!(command.as_std().get_args().all(|a| !a.to_string_lossy().contains("secret")));
    }

    #[test]
    fn progress_grows_from_phase_to_phase() {
        let mut follow = Follow::default();
        let lines = [
            "I: running apt-get update...",
            "Get:1 http://mirror/debian bookworm InRelease [151 kB]",
            "I: downloading packages with apt...",
            "0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.",
            "Get:1 http://mirror/debian bookworm/main amd64 a [1 kB]",
            "Get:2 http://mirror/debian bookworm/main amd64 b [1 kB]",
            "I: installing essential packages...",
            "Unpacking a (1) ...",
            "Setting up a (1) ...",
            "I: creating tarball...",
        ];
        let fractions: Vec<_> = lines.iter().map(|line| follow.line(line)).collect();
        assert!(fractions.is_sorted(), "{fractions:?}");
        assert!(fractions.iter().all(|f| (0.0..=1.0).contains(f)));
        assert!(fractions[8] > fractions[7]);
    }

    #[test]
    fn a_failed_download_is_told_apart() {
        let source = Source::new(None, None).unwrap();
        let failed = |line: &str| BuildError::ToolFailed {
            tool: "mmdebstrap",
            step: crate::Step::Packages,
            status: "exit status: 1".into(),
            tail: vec![line.into()],
            log: PathBuf::new(),
        };
        let error = failure(failed("E: Failed to fetch http://x/y  Could not connect to x:80"), &source);
        assert!(matches!(error, BuildError::Download { .. }));
        assert!(matches!(failure(failed("E: dpkg was interrupted"), &source), BuildError::ToolFailed { .. }));
    }
}
