//! What a build tells about itself while it runs.

use std::fmt;

/// The steps of a build, in the order in which they run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// Looking for tools, disk space and an image that is there already.
    Check,
    /// Downloading and installing the distribution's packages.
    Packages,
    /// Packing the distribution into a read-only file system.
    Root,
    /// Unpacking the kernel.
    Kernel,
    /// Writing the initramfs.
    Initramfs,
    /// Packing the `clan` executable and its units.
    Layer,
    /// Putting the image into the store.
    Store,
}

impl Step {
    /// All steps, in order.
    pub const ALL: [Self; 7] =
        [Self::Check, Self::Packages, Self::Root, Self::Kernel, Self::Initramfs, Self::Layer, Self::Store];
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Check => "checking what is there",
            Self::Packages => "installing packages",
            Self::Root => "packing the system",
            Self::Kernel => "unpacking the kernel",
            Self::Initramfs => "writing the initramfs",
            Self::Layer => "packing clan",
            Self::Store => "storing the image",
        })
    }
}

/// One report of progress.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// The step that is under way.
    pub step: Step,
    /// How much of the whole build is done, 0 to 1; `None` when this report changes nothing about it. Never decreases.
    pub fraction: Option<f32>,
    /// A line of a tool's output.
    pub line: Option<String>,
}
