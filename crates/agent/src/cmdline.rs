//! Which disk is what, from the kernel's command line.

use clan_wire::agent::TEMPLATE;

/// The disks, as names in `/dev`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Disks {
    /// Read-only root file system, erofs.
    pub(crate) root: String,
    /// Read-only layers above it, erofs, the topmost first.
    pub(crate) layers: Vec<String>,
    /// Everything that is written, ext4.
    pub(crate) data: String,
    /// Whether the guest may become a template.
    pub(crate) template: bool,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CmdlineError {
    #[error("the kernel's command line does not say {0}")]
    Missing(&'static str),
    #[error("the kernel's command line names a disk {0:?}")]
    BadName(String),
}

impl Disks {
    /// Reads `clan.root=vda clan.layers=vdb clan.data=vdc`; several layers are separated by commas.
    pub(crate) fn parse(cmdline: &str) -> Result<Self, CmdlineError> {
        let value = |key: &str| cmdline.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        let root = value("clan.root").ok_or(CmdlineError::Missing("clan.root"))?;
        let data = value("clan.data").ok_or(CmdlineError::Missing("clan.data"))?;
        let layers = value("clan.layers").unwrap_or_default().split(',').filter(|name| !name.is_empty());
        let layers = layers.map(disk).collect::<Result<_, _>>()?;
        let template = cmdline.split_whitespace().any(|word| word == TEMPLATE);
        Ok(Self { root: disk(root)?, layers, data: disk(data)?, template })
    }
}

/// INVARIANT: a name stays within `/dev` and within an option of `mount`.
fn disk(name: &str) -> Result<String, CmdlineError> {
    if !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        Ok(name.to_owned())
    } else {
        Err(CmdlineError::BadName(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_read_among_other_words() {
        let disks = Disks::parse("console=ttyS0 clan.root=vda  clan.layers=vdb,vde clan.data=vdc quiet\n").unwrap();
        assert_eq!(disks.root, "vda");
        assert_eq!(disks.layers, ["vdb", "vde"]);
        assert_eq!(disks.data, "vdc");
        assert!(!disks.template);
        assert!(Disks::parse("clan.root=vda clan.data=vdc").unwrap().layers.is_empty());
        assert!(Disks::parse("clan.root=vda clan.data=vdc clan.template\n").unwrap().template);
    }

    #[test]
    fn what_is_missing_or_no_disk_is_named() {
        assert_eq!(Disks::parse("clan.root=vda"), Err(CmdlineError::Missing("clan.data")));
        assert_eq!(Disks::parse("clan.root=../etc clan.data=vdc"), Err(CmdlineError::BadName("../etc".into())));
    }
}
