//! The clans' machines on this computer, and the images that they run.

use hyper::Method;

use super::{ByteStream, ClientError, Console, ManagerClient, segment};
use crate::{
    CONSOLE_UPGRADE, ChangePassphrase, DeleteQuery, ImageGc, ImageInfo, LogQuery, LogSource, MakeSnapshot, Publication,
    PublishImage, ResizeVm, SnapshotInfo, TaskInfo, UnlockVm, UpdatePlan, UpdateVm, VmInfo, VmSize, VmStats,
};

impl ManagerClient {
    /// The VMs on this computer.
    pub async fn vms(&self) -> Result<Vec<VmInfo>, ClientError> {
        self.get("/vms").await
    }

    /// Starts a VM. `vm` is the name or id of its clan, here as in the following.
    pub async fn start_vm(&self, vm: &str) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/vms/{}/start", segment(vm)), &serde_json::json!({})).await
    }

    /// Stops a VM in good order.
    pub async fn stop_vm(&self, vm: &str) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/vms/{}/stop", segment(vm)), &serde_json::json!({})).await
    }

    /// Halts a VM's processors.
    pub async fn pause_vm(&self, vm: &str) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/vms/{}/pause", segment(vm)), &serde_json::json!({})).await
    }

    /// Lets a paused VM go on.
    pub async fn resume_vm(&self, vm: &str) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/vms/{}/resume", segment(vm)), &serde_json::json!({})).await
    }

    /// Stops a VM in good order and starts it again.
    pub async fn restart_vm(&self, vm: &str) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/vms/{}/restart", segment(vm)), &serde_json::json!({})).await
    }

    /// Gives a VM another image.
    pub async fn update_vm(&self, vm: &str, request: &UpdateVm) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/vms/{}/update", segment(vm)), request).await
    }

    /// Finds out what giving a VM another image would do.
    pub async fn preview_update(&self, vm: &str, request: &UpdateVm) -> Result<UpdatePlan, ClientError> {
        self.post(&format!("/vms/{}/update/preview", segment(vm)), request).await
    }

    /// Opens the encrypted disk of a VM, which starts if it is to run.
    pub async fn unlock_vm(&self, vm: &str, request: &UnlockVm) -> Result<VmInfo, ClientError> {
        self.post(&format!("/vms/{}/unlock", segment(vm)), request).await
    }

    /// Has the manager forget the passphrase of a VM that does not run.
    pub async fn lock_vm(&self, vm: &str) -> Result<VmInfo, ClientError> {
        self.post(&format!("/vms/{}/lock", segment(vm)), &serde_json::json!({})).await
    }

    /// Gives the encrypted disk of a VM another passphrase.
    pub async fn change_passphrase(&self, vm: &str, request: &ChangePassphrase) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/vms/{}/passphrase", segment(vm)), request).await
    }

    /// Gives a VM another size, or finds out what it would be.
    pub async fn resize_vm(&self, vm: &str, request: &ResizeVm) -> Result<VmSize, ClientError> {
        self.post(&format!("/vms/{}/size", segment(vm)), request).await
    }

    /// The snapshots of a VM's disk.
    pub async fn snapshots(&self, vm: &str) -> Result<Vec<SnapshotInfo>, ClientError> {
        self.get(&format!("/vms/{}/snapshots", segment(vm))).await
    }

    /// Makes a snapshot of a VM's disk.
    pub async fn make_snapshot(&self, vm: &str, request: &MakeSnapshot) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/vms/{}/snapshots", segment(vm)), request).await
    }

    /// Puts a snapshot in the place of a VM's disk.
    pub async fn restore_snapshot(&self, vm: &str, name: &str) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/vms/{}/snapshots/{}/restore", segment(vm), segment(name)), &serde_json::json!({})).await
    }

    /// Removes a snapshot.
    pub async fn discard_snapshot(&self, vm: &str, name: &str) -> Result<TaskInfo, ClientError> {
        self.call(Method::DELETE, &format!("/vms/{}/snapshots/{}", segment(vm), segment(name)), None).await
    }

    /// Deletes a VM and its disk.
    pub async fn delete_vm(&self, vm: &str, query: DeleteQuery) -> Result<TaskInfo, ClientError> {
        self.call(Method::DELETE, &format!("/vms/{}?force={}", segment(vm), query.force), None).await
    }

    /// A VM's log lines, as text.
    pub async fn vm_logs(&self, vm: &str, query: LogQuery) -> Result<ByteStream, ClientError> {
        let source = match query.source {
            LogSource::Journal => "journal",
            LogSource::Console => "console",
        };
        let path = format!("/vms/{}/logs?lines={}&follow={}&source={source}", segment(vm), query.lines, query.follow);
        Ok(ByteStream::new(self.send(Method::GET, &path, None).await?.into_body()))
    }

    /// A VM's statistics.
    pub async fn vm_stats(&self, vm: &str) -> Result<VmStats, ClientError> {
        self.get(&format!("/vms/{}/stats", segment(vm))).await
    }

    /// A VM's console: raw bytes both ways.
    pub async fn vm_console(&self, vm: &str) -> Result<Console, ClientError> {
        self.upgrade(&format!("/vms/{}/console", segment(vm)), CONSOLE_UPGRADE).await
    }

    /// The images on this computer.
    pub async fn images(&self) -> Result<Vec<ImageInfo>, ClientError> {
        self.get("/images").await
    }

    /// Builds the image that a clan founded now would run.
    pub async fn build_image(&self) -> Result<TaskInfo, ClientError> {
        self.post("/images", &serde_json::json!({})).await
    }

    /// Compares an image with its name, which is an id or a unique beginning of one.
    pub async fn verify_image(&self, image: &str) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/images/{}/verify", segment(image)), &serde_json::json!({})).await
    }

    /// Makes an image what newcomers to a clan run, or finds out what would change.
    pub async fn publish_image(&self, clan: &str, request: &PublishImage) -> Result<Publication, ClientError> {
        self.post(&format!("/clans/{}/image", segment(clan)), request).await
    }

    /// Removes the images that no VM here runs, or finds out which.
    pub async fn gc_images(&self, dry_run: bool) -> Result<ImageGc, ClientError> {
        self.call(Method::DELETE, &format!("/images?dry_run={dry_run}"), None).await
    }
}
