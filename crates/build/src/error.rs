//! Why a build failed. What to do about it is said at the edge.

use std::{io, path::PathBuf};

use clan_types::ByteSize;

use crate::{Step, process::cause, store::StoreError};

/// Why no image was built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A program that the build needs is not installed.
    #[error("`{tool}` is not installed")]
    MissingTool {
        /// The program.
        tool: &'static str,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// `/etc/subuid` or `/etc/subgid` gives this user no ids, so a root file system cannot be made without root.
    #[error("user `{user}` has no subordinate ids in {file}")]
    NoSubordinateIds {
        /// The user, by name or number.
        user: String,
        /// The file that should name them.
        file: &'static str,
    },
    /// The kernel or its policy refuses user namespaces to ordinary users.
    #[error("this system does not let ordinary users create user namespaces: {reason}")]
    NoUserNamespaces {
        /// What the attempt said.
        reason: String,
    },
    /// Too little space, found before starting.
    #[error("{path} has {available} free, the build needs {needed}", path = path.display())]
    NotEnoughSpace {
        /// Where.
        path: PathBuf,
        /// How much the build needs there.
        needed: ByteSize,
        /// How much there is.
        available: ByteSize,
    },
    /// The disk filled up on the way.
    #[error("the disk is full ({step})")]
    DiskFull {
        /// The step that was under way.
        step: Step,
        /// The last lines of the tool that met it.
        tail: Vec<String>,
    },
    /// Packages could not be downloaded.
    #[error("packages could not be downloaded from {mirror}: {}", cause(tail).unwrap_or("no answer"))]
    Download {
        /// The package mirror.
        mirror: String,
        /// What the package manager said.
        tail: Vec<String>,
        /// The whole output.
        log: PathBuf,
    },
    /// A tool failed.
    #[error("`{tool}` failed ({status}): {}", cause(tail).unwrap_or("it said nothing"))]
    ToolFailed {
        /// The tool.
        tool: &'static str,
        /// The step it was for.
        step: Step,
        /// Exit status or signal.
        status: String,
        /// The last lines of its output.
        tail: Vec<String>,
        /// The whole output.
        log: PathBuf,
    },
    /// A program that should go into the image cannot.
    #[error("{path} cannot go into an image: {reason}", path = path.display())]
    BadExecutable {
        /// The program.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Another build uses the same cache directory.
    #[error("another build is under way in {path}", path = path.display())]
    Busy {
        /// The cache directory.
        path: PathBuf,
    },
    /// The recipe names something that is not a package.
    #[error("`{package}` is not the name of a package")]
    BadPackage {
        /// What it names.
        package: String,
    },
    /// A proxy or mirror is not a URL.
    #[error("`{url}` is not a URL of a {what}")]
    BadUrl {
        /// What it should name.
        what: &'static str,
        /// The text.
        url: String,
    },
    /// The kernel package does not hold what it should.
    #[error("the kernel cannot be used")]
    Kernel(#[from] KernelError),
    /// The kernel's modules do not hold what they should.
    #[error("the kernel modules cannot be used")]
    Modules(#[from] ModuleError),
    /// The image could not be stored.
    #[error("the image could not be stored")]
    Store(#[from] StoreError),
    /// Reading or writing a file failed.
    #[error("could not {action} {path}", path = path.display())]
    Io {
        /// What was attempted, as an infinitive.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The caller cancelled the build.
    #[error("the build was cancelled")]
    Cancelled,
}

/// Why a compressed kernel cannot be unpacked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// The kernel package holds no kernel.
    #[error("the kernel package holds no kernel")]
    Missing,
    /// Not an x86 boot image, or cut short.
    #[error("the kernel is not an x86 boot image, or is damaged")]
    NotABootImage,
    /// Compressed in a way that is not supported.
    #[error("the kernel is compressed with {0}, which is not supported")]
    Compression(&'static str),
    /// The compressed part is damaged.
    #[error("the compressed kernel is damaged")]
    Damaged,
    /// Unpacked, but cannot be started directly.
    #[error("the kernel has no PVH entry point")]
    NoPvhEntry,
}

/// Why modules cannot be put into the initramfs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModuleError {
    /// The kernel package has no module index.
    #[error("the kernel package has no module index")]
    NoIndex,
    /// A line of the index makes no sense.
    #[error("line {line} of the module index makes no sense")]
    BadIndex {
        /// Counted from 1.
        line: usize,
    },
    /// A needed module is neither there nor built in.
    #[error("the kernel has no module `{0}`")]
    Missing(String),
    /// Modules need each other in a circle.
    #[error("module `{0}` needs itself")]
    Cycle(String),
    /// A module is compressed, which the agent cannot load.
    #[error("module `{0}` is compressed, which is not supported")]
    Compressed(String),
}
