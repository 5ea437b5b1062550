//! How a VM is started.

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use clan_api::{ApiProblem, ErrorCode, VmState};
use clan_build::StoredImage;
use clan_vm::{AccelKind, Begin, ImageFiles, UdpForward, Vm, VmError, VmSpec, probe};
use clan_wire::image::FileRole;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    owner::{Loop, Running},
    turns::Short,
};
use crate::{
    disk::DiskError,
    fetch::blocking,
    link, lock, problem,
    record::{ClanRecord, Fresh, Ports},
    snapshots,
    template::{Kind, Staging},
};

const PORT_ATTEMPTS: u32 = 8;
/// UDP ports in the guest.
pub(crate) const GUEST_QUIC: u16 = 41640;
pub(crate) const GUEST_WIREGUARD: u16 = 41641;

impl Loop {
    pub(super) async fn start(&mut self) {
        self.show(VmState::Starting, None);
        for _ in 0..PORT_ATTEMPTS {
            match self.try_start().await {
                Ok(()) => return,
                Err(StartError::Template { name, error }) => {
                    self.config.templates.remove(&name);
                    tracing::warn!(%error, "the template is of no use: the VM boots");
                    let why = "the VM did not go on from its template: it boots instead";
                    self.note = Some(ApiProblem::new(ErrorCode::VmFailed, why));
                }
                Err(StartError::Vm(VmError::PortBusy { addr })) => {
                    tracing::info!(port = addr.port(), "another program uses the VM's port: choosing others");
                    match free_ports() {
                        Ok(ports) => {
                            if let Err(error) = self.record.update(|r| r.ports = ports) {
                                return self.fail(problem::disk(&error));
                            }
                        }
                        Err(error) => {
                            return self.fail(
                                ApiProblem::new(ErrorCode::PortBusy, "no free UDP port was found")
                                    .why(error.to_string()),
                            );
                        }
                    }
                }
                Err(StartError::Vm(VmError::AlreadyRunning { .. })) => {
                    return match Vm::adopt(&self.record.paths().vm()).await {
                        Ok(Some(vm)) => self.attach(vm, None, None, None),
                        Ok(None) => self.died(
                            ApiProblem::new(ErrorCode::VmFailed, "the VM's directory is in use, but no VM answers"),
                            Duration::ZERO,
                        ),
                        Err(error) => self.died(problem::vm(&error), Duration::ZERO),
                    };
                }
                Err(StartError::Vm(error @ (VmError::DiedAtStart { .. } | VmError::SilentAtStart { .. }))) => {
                    return self.died(problem::vm(&error), Duration::ZERO);
                }
                // Somebody was faster.
                Err(StartError::Vm(VmError::TooLarge { asked, available })) => {
                    return self.wait_for_memory(asked, Short { left: available, budget: None });
                }
                Err(StartError::Locked) => return self.rest(),
                // Nothing would be gained by trying again.
                Err(error) => return self.fail(error.problem()),
            }
        }
        self.fail(ApiProblem::new(ErrorCode::PortBusy, "no free UDP port was found for the VM"));
    }

    async fn try_start(&mut self) -> Result<(), StartError> {
        let accelerator = probe::accelerator(&self.config.cache).await;
        let record = self.late_template(accelerator.kind).await?;
        let passphrase = self.record.passphrase();
        if record.encrypted && passphrase.is_none() {
            return Err(StartError::Locked);
        }
        let image = record.image.ok_or(StartError::NoImage)?;
        let stored = self.config.images.get(&image).ok_or(StartError::ImageGone)?;
        let any = |port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        let spec = VmSpec {
            dir: self.record.paths().vm(),
            name: record.name.to_string(),
            image: files_of(&stored),
            data_disk: self.record.paths().data_disk(),
            passphrase: passphrase.filter(|_| record.encrypted),
            memory: record.memory,
            cpus: record.cpus,
            accelerator: accelerator.kind,
            forwards: vec![
                UdpForward { host: any(record.ports.quic), guest_port: GUEST_QUIC },
                UdpForward { host: any(record.ports.wireguard), guest_port: GUEST_WIREGUARD },
            ],
            qemu: self.config.qemu.clone(),
            begin: Begin::Boot,
        };
        let (begin, staging) = self.begin(&record, accelerator.kind);
        let spec = VmSpec { begin, ..spec };
        self.record.update(|r| (r.fresh, r.paused) = (None, false)).map_err(StartError::Disk)?;
        let vm = match (Vm::start(spec).await, &record.fresh) {
            (Ok(vm), _) => vm,
            // Refused before QEMU has read the state: the disk is as it was.
            (Err(error @ (VmError::PortBusy { .. } | VmError::TooLarge { .. })), fresh) => {
                self.record.update(|r| r.fresh.clone_from(fresh)).map_err(StartError::Disk)?;
                return Err(StartError::Vm(error));
            }
            (
                Err(error @ (VmError::DiedAtStart { .. } | VmError::SilentAtStart { .. })),
                Some(Fresh::Template(name)),
            ) => {
                return Err(StartError::Template { name: name.clone(), error });
            }
            (Err(error), _) => return Err(StartError::Vm(error)),
        };
        let template = match &record.fresh {
            Some(Fresh::Template(name)) => Some(name.clone()),
            _ => None,
        };
        tracing::info!(clan = %record.name, pid = vm.pid(), accelerator = ?accelerator.kind, template, "started the VM");
        self.attach(vm, Some(accelerator.kind), staging, template);
        Ok(())
    }

    /// The record, by which a VM whose disk is still empty need not boot if another has left a template meanwhile: of many
    /// that were made at once, only those boot whose turn comes first.
    async fn late_template(&mut self, accelerator: AccelKind) -> Result<ClanRecord, StartError> {
        let record = self.record.get();
        let kind = Kind::of(&record, accelerator, &self.config.qemu).filter(|_| record.fresh == Some(Fresh::Empty));
        let Some(template) = kind.and_then(|kind| self.config.templates.find(&kind)) else { return Ok(record) };
        let (paths, from, size) = (self.record.paths().clone(), template.data_disk(), record.disk);
        let copied = async { blocking(move || snapshots::replace_disk(&paths, &from, size)).await? };
        match copied.await {
            // Only then: a template's disk can be booted from, and an empty one does not fit a template's state.
            Ok(()) => {
                self.record.update(|r| r.fresh = Some(Fresh::Template(template.name))).map_err(StartError::Disk)?;
            }
            Err(problem) => {
                tracing::warn!(
                    problem = problem.message,
                    why = problem.why,
                    "the template cannot be used: the VM boots"
                );
            }
        }
        Ok(self.record.get())
    }

    /// Where the guest begins, and the template it is to leave behind.
    fn begin(&self, record: &ClanRecord, accelerator: AccelKind) -> (Begin, Option<Staging>) {
        let templates = &self.config.templates;
        let kind = Kind::of(record, accelerator, &self.config.qemu);
        match (&record.fresh, kind) {
            (Some(Fresh::Template(name)), Some(kind)) => match templates.find(&kind) {
                Some(template) if template.name == *name => (Begin::Saved(template.state()), None),
                // It went away meanwhile. Its disk is one that can be booted from.
                _ => (Begin::Boot, None),
            },
            (Some(Fresh::Empty), Some(kind)) => match templates.begin(kind) {
                Some(staging) => (Begin::BootToSave, Some(staging)),
                None => (Begin::Boot, None),
            },
            _ => (Begin::Boot, None),
        }
    }

    /// Takes care of a VM that runs.
    pub(super) fn attach(
        &mut self,
        vm: Vm,
        accelerator: Option<AccelKind>,
        staging: Option<Staging>,
        template: Option<String>,
    ) {
        let (links, tracker) = (CancellationToken::new(), TaskTracker::new());
        let first = staging.map(|staging| (staging, self.record.paths().data_disk()));
        tracker.spawn(link::keep_agent(vm.clone(), self.out.clone(), first, links.clone()));
        let controller = vm.clone();
        let connect = move || {
            let vm = controller.clone();
            async move { vm.connect_control().await }
        };
        tracker.spawn(link::keep_control(
            connect,
            self.record.clone(),
            self.config.images.clone(),
            self.out.clone(),
            links.clone(),
        ));
        self.vm_publish.send_replace(Some(vm.clone()));
        self.running = Some(Running {
            vm,
            since: Instant::now(),
            accelerator,
            template,
            links,
            tracker,
            stopping: false,
            doom: None,
        });
        let paused = self.record.get().paused;
        self.show(if paused { VmState::Paused } else { VmState::Starting }, None);
    }
}

enum StartError {
    Vm(VmError),
    Disk(DiskError),
    Template { name: String, error: VmError },
    NoImage,
    ImageGone,
    Locked,
}

impl StartError {
    fn problem(&self) -> ApiProblem {
        match self {
            Self::Vm(error) | Self::Template { error, .. } => problem::vm(error),
            Self::Disk(error) => problem::disk(error),
            Self::Locked => lock::locked(),
            Self::NoImage => ApiProblem::new(ErrorCode::Conflict, "the VM has no image yet"),
            Self::ImageGone => {
                ApiProblem::new(ErrorCode::DamagedFile, "the VM's image is not on this computer any more")
            }
        }
    }
}

/// What QEMU is given of an image.
pub(super) fn files_of(image: &StoredImage) -> ImageFiles {
    ImageFiles {
        kernel: image.path(FileRole::Kernel),
        initramfs: image.path(FileRole::Initramfs),
        root: image.path(FileRole::Root),
        layer: image.path(FileRole::Layer),
        boot: image.boot_disk(),
    }
}

/// Two UDP ports that nobody uses now.
pub(crate) fn free_ports() -> std::io::Result<Ports> {
    let (quic, wireguard) =
        (UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?, UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?);
    Ok(Ports { quic: quic.local_addr()?.port(), wireguard: wireguard.local_addr()?.port() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chosen_ports_differ() {
        let ports = free_ports().unwrap();
        assert_ne!(ports.quic, ports.wireguard);
        assert!(ports.quic > 0 && ports.wireguard > 0);
    }
}
