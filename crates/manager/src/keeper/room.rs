//! A computer whose disk is full, while a guest writes to its own: QEMU holds the guest, whose file systems so come to no harm.

use std::time::{Duration, Instant};

use clan_api::{ApiProblem, ErrorCode, VmState};
use clan_types::ByteSize;
use clan_vm::{QmpEvent, Vm};
use tokio::sync::broadcast::{self, error::RecvError};

use super::owner::Loop;
use crate::problem;

/// How often it is looked whether there is room again.
const LOOK_AGAIN: Duration = Duration::from_secs(3);
/// With less free than this, the guest would be held again at once.
const ROOM: ByteSize = ByteSize::from_mib(16);

/// What QEMU tells of a guest's disks.
pub(super) struct DiskEvents {
    pid: u32,
    events: broadcast::Receiver<QmpEvent>,
}

impl DiskEvents {
    pub(super) fn of(vm: &Vm) -> Self {
        Self { pid: vm.pid(), events: vm.qmp().events() }
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns when the guest is held, as there is no room on the computer.
    pub(super) async fn full(&mut self) {
        loop {
            match self.events.recv().await {
                Ok(event) if event.name == "BLOCK_IO_ERROR" && event.data["action"] == "stop" => return,
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return std::future::pending().await,
            }
        }
    }
}

impl Loop {
    pub(super) fn disk_is_full(&mut self) {
        if self.full.is_none() {
            tracing::warn!("this computer's disk is full: the VM is held until there is room");
        }
        self.full = Some(Instant::now() + LOOK_AGAIN);
        let disk = self.record.paths().data_disk();
        let problem =
            ApiProblem::new(ErrorCode::DiskFull, "this computer's disk is full, so the VM is held; it loses nothing")
                .hint(problem::free_space(disk.parent().unwrap_or(&disk)));
        self.show(VmState::Paused, Some(problem));
    }

    /// Lets the guest go on once there is room.
    pub(super) async fn look_for_room(&mut self) {
        if self.full.is_none_or(|at| at > Instant::now()) {
            return;
        }
        let Some(vm) = self.running.as_ref().map(|r| r.vm.clone()) else { return self.full = None };
        let free = problem::available(&self.record.paths().data_disk()).unwrap_or_default();
        if free < ROOM || self.record.get().paused {
            self.full = Some(Instant::now() + LOOK_AGAIN);
            return;
        }
        match vm.resume().await {
            Ok(()) => {
                self.full = None;
                tracing::info!("there is room on the disk again: the VM goes on");
                let answers = self.out.control.borrow().is_some();
                self.show(if answers { VmState::Running } else { VmState::Starting }, None);
            }
            Err(error) => {
                tracing::warn!(%error, "the VM that was held does not go on");
                self.full = Some(Instant::now() + LOOK_AGAIN);
            }
        }
    }
}
