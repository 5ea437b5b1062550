//! The OpenAPI document. The functions below exist for their attributes only; the manager's router serves the paths.
#![allow(dead_code)]

use utoipa::{
    Modify, OpenApi,
    openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme},
};

use crate::*;

/// The OpenAPI document of the manager's HTTP API, as committed in `docs/openapi.json`.
pub fn openapi() -> utoipa::openapi::OpenApi {
    Document::openapi()
}

#[derive(OpenApi)]
#[openapi(
    info(title = "Clan manager", description = "The API of the manager on the base OS. Over the Unix socket it needs no token; over TCP it listens on loopback only and needs one. {clan} and {vm} accept a name, an id or a unique beginning of an id.", license(name = "MIT OR Apache-2.0")),
    paths(
        status, clans, create_clan, find_invitation, find_recovery, preview_join, join, tasks, task, task_events, cancel_task, invite, invites, revoke, set_role, rename, decide_admission, relays, set_relay, clan_log, members, machines, ping_machine, services, devices, add_device, remove_device, leave,
        add_wireguard, remove_wireguard, rules, set_rule, drop_rule, groups, set_group, drop_group,
        machine_report, machine_log, machine_journal, change_setting, revert_change, restart_machine, update_machine, machine_terminal, set_control, suggest_control,
        open_service, vms, start_vm, stop_vm, pause_vm, resume_vm, restart_vm, update_vm, preview_update, unlock_vm, lock_vm, change_passphrase, resize_vm, snapshots, make_snapshot, restore_snapshot, discard_snapshot, delete_vm, vm_logs, vm_console, vm_stats, images, build_image, verify_image, gc_images, publish_image, login
    ),
    components(schemas(ApiProblem, TaskEvent)),
    modifiers(&Security),
    security(("bearer" = []), ("cookie" = []))
)]
struct Document;

struct Security;

impl Modify for Security {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let components = document.components.get_or_insert_with(Default::default);
        components.add_security_scheme(
            "bearer",
            SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build()),
        );
        components
            .add_security_scheme("cookie", SecurityScheme::ApiKey(ApiKey::Cookie(ApiKeyValue::new("clan_session"))));
    }
}

/// Everything that a page shows, in one
#[utoipa::path(get, path = "/api/v1/status", responses((status = 200, body = Status), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn status() {}

/// The clans that this computer is in
#[utoipa::path(get, path = "/api/v1/clans", responses((status = 200, body = [ClanInfo]), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn clans() {}

/// Found a clan
#[utoipa::path(post, path = "/api/v1/clans", request_body = CreateClan, responses((status = 202, body = CreatedClan), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn create_clan() {}

/// The link in a pasted text, or the one that four words stand for
#[utoipa::path(post, path = "/api/v1/joins/invitation", request_body = FindInvitation, responses((status = 200, body = FoundInvitation), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn find_invitation() {}

/// A device link for this computer, by right of a recovery phrase
#[utoipa::path(post, path = "/api/v1/joins/recovery", request_body = FindRecovery, responses((status = 200, body = FoundInvitation), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn find_recovery() {}

/// What a link leads to
#[utoipa::path(post, path = "/api/v1/joins/preview", request_body = PreviewJoin, responses((status = 200, body = JoinPreview), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn preview_join() {}

/// Join a clan
#[utoipa::path(post, path = "/api/v1/joins", request_body = JoinClan, responses((status = 202, body = TaskInfo), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn join() {}

/// Running and recent tasks, newest first
#[utoipa::path(get, path = "/api/v1/tasks", responses((status = 200, body = [TaskInfo]), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn tasks() {}

/// One task, with its log lines
#[utoipa::path(get, path = "/api/v1/tasks/{id}", params(("id" = String, Path)), responses((status = 200, body = TaskInfo), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn task() {}

/// A task's events as server-sent events: each `data:` is one TaskEvent; ends with the task
#[utoipa::path(get, path = "/api/v1/tasks/{id}/events", params(("id" = String, Path)), responses((status = 200, body = TaskEvent, content_type = "text/event-stream"), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn task_events() {}

/// Cancel a task; what it did so far is undone
#[utoipa::path(post, path = "/api/v1/tasks/{id}/cancel", params(("id" = String, Path)), responses((status = 200, body = TaskInfo), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn cancel_task() {}

/// Make an invite
#[utoipa::path(post, path = "/api/v1/clans/{clan}/invites", params(("clan" = String, Path)), request_body = CreateInvite, responses((status = 201, body = Invite), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn invite() {}

/// The invites that were made in a clan, oldest first
#[utoipa::path(get, path = "/api/v1/clans/{clan}/invites", params(("clan" = String, Path)), responses((status = 200, body = [InviteInfo]), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn invites() {}

/// Put a person or a machine out, or withdraw an invite
#[utoipa::path(post, path = "/api/v1/clans/{clan}/revocations", params(("clan" = String, Path)), request_body = Revoke, responses((status = 201, body = Revocation, description = "Done"), (status = 200, body = Revocation, description = "What it would do, or: it was out already"), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn revoke() {}

/// The relays of a clan
#[utoipa::path(get, path = "/api/v1/clans/{clan}/relays", params(("clan" = String, Path)), responses((status = 200, body = [RelayInfo]), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn relays() {}

/// Make a machine a relay, or make it one no more
#[utoipa::path(post, path = "/api/v1/clans/{clan}/relays", params(("clan" = String, Path)), request_body = SetRelay, responses((status = 200, body = RelayChange), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn set_relay() {}

/// Give a person another role
#[utoipa::path(post, path = "/api/v1/clans/{clan}/roles", params(("clan" = String, Path)), request_body = SetRole, responses((status = 201, body = RoleChange, description = "Done"), (status = 200, body = RoleChange, description = "What it would do, or: nothing to do"), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn set_role() {}

/// Give a person or a machine another name
#[utoipa::path(post, path = "/api/v1/clans/{clan}/names", params(("clan" = String, Path)), request_body = Rename, responses((status = 201, body = Renamed, description = "Done"), (status = 200, body = Renamed, description = "What it would do, or: nothing to do"), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn rename() {}

/// Let a newcomer in who waits for it, or refuse them
#[utoipa::path(post, path = "/api/v1/clans/{clan}/admissions", params(("clan" = String, Path)), request_body = DecideAdmission, responses((status = 201, body = AdmissionDecision, description = "Done"), (status = 200, body = AdmissionDecision, description = "What it would do"), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn decide_admission() {}

/// What was decided in a clan: every entry of its ledger, newest last
#[utoipa::path(get, path = "/api/v1/clans/{clan}/log", params(("clan" = String, Path), ClanLogQuery), responses((status = 200, body = ClanLog), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn clan_log() {}

/// Admit a standard WireGuard machine, and learn what it has to be told
#[utoipa::path(post, path = "/api/v1/clans/{clan}/wireguard", params(("clan" = String, Path)), request_body = AddWireguard, responses((status = 201, body = WireguardMachine, description = "Done"), (status = 200, body = WireguardMachine, description = "What it would do"), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn add_wireguard() {}

/// Take a standard WireGuard machine out
#[utoipa::path(post, path = "/api/v1/clans/{clan}/wireguard/removals", params(("clan" = String, Path)), request_body = RemoveNamed, responses((status = 201, body = RemoveNamed, description = "Done"), (status = 200, body = RemoveNamed, description = "What it would do"), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn remove_wireguard() {}

/// The access rules in force
#[utoipa::path(get, path = "/api/v1/clans/{clan}/rules", params(("clan" = String, Path)), responses((status = 200, body = [RuleInfo]), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn rules() {}

/// Make or replace an access rule
#[utoipa::path(post, path = "/api/v1/clans/{clan}/rules", params(("clan" = String, Path)), request_body = SetRule, responses((status = 201, body = RuleInfo, description = "Done"), (status = 200, body = RuleInfo, description = "What it would do"), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn set_rule() {}

/// Take an access rule away
#[utoipa::path(post, path = "/api/v1/clans/{clan}/rules/removals", params(("clan" = String, Path)), request_body = RemoveNamed, responses((status = 201, body = RemoveNamed, description = "Done"), (status = 200, body = RemoveNamed, description = "What it would do"), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn drop_rule() {}

/// The groups
#[utoipa::path(get, path = "/api/v1/clans/{clan}/groups", params(("clan" = String, Path)), responses((status = 200, body = [GroupInfo]), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn groups() {}

/// Make a group, or replace its members
#[utoipa::path(post, path = "/api/v1/clans/{clan}/groups", params(("clan" = String, Path)), request_body = SetGroup, responses((status = 201, body = GroupInfo, description = "Done"), (status = 200, body = GroupInfo, description = "What it would do"), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn set_group() {}

/// Take a group away
#[utoipa::path(post, path = "/api/v1/clans/{clan}/groups/removals", params(("clan" = String, Path)), request_body = RemoveNamed, responses((status = 201, body = RemoveNamed, description = "Done"), (status = 200, body = RemoveNamed, description = "What it would do"), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn drop_group() {}

/// The people of a clan
#[utoipa::path(get, path = "/api/v1/clans/{clan}/members", params(("clan" = String, Path)), responses((status = 200, body = [PersonInfo]), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn members() {}

/// The machines of a clan
#[utoipa::path(get, path = "/api/v1/clans/{clan}/machines", params(("clan" = String, Path)), responses((status = 200, body = [MachineInfo]), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn machines() {}

/// Send one echo to a machine of the clan, over its network
#[utoipa::path(post, path = "/api/v1/clans/{clan}/machines/{machine}/ping", params(("clan" = String, Path), ("machine" = String, Path)), responses((status = 200, body = Pong), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn ping_machine() {}

/// A machine as whoever may steer it sees it
#[utoipa::path(get, path = "/api/v1/clans/{clan}/machines/{machine}/report", params(("clan" = String, Path), ("machine" = String, Path)), responses((status = 200, body = MachineReport), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn machine_report() {}

/// The log lines of a machine that the caller may steer; `source` is of no concern
#[utoipa::path(get, path = "/api/v1/clans/{clan}/machines/{machine}/log", params(("clan" = String, Path), ("machine" = String, Path), LogQuery), responses((status = 200, body = String, content_type = "text/plain"), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn machine_log() {}

/// What was changed on a machine, and by whom, oldest first
#[utoipa::path(get, path = "/api/v1/clans/{clan}/machines/{machine}/journal", params(("clan" = String, Path), ("machine" = String, Path)), responses((status = 200, body = [MachineEntry]), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn machine_journal() {}

/// Change a setting of a machine
#[utoipa::path(post, path = "/api/v1/clans/{clan}/machines/{machine}/settings", params(("clan" = String, Path), ("machine" = String, Path)), request_body = ChangeSetting, responses((status = 201, body = MachineChange, description = "Done"), (status = 200, body = MachineChange, description = "What it would do, or: nothing to do"), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn change_setting() {}

/// Restore what was before an entry of a machine's journal
#[utoipa::path(post, path = "/api/v1/clans/{clan}/machines/{machine}/reverts", params(("clan" = String, Path), ("machine" = String, Path)), request_body = RevertChange, responses((status = 201, body = MachineChange, description = "Done"), (status = 200, body = MachineChange, description = "What it would do, or: nothing to do"), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn revert_change() {}

/// Start a machine anew
#[utoipa::path(post, path = "/api/v1/clans/{clan}/machines/{machine}/restart", params(("clan" = String, Path), ("machine" = String, Path)), responses((status = 201, body = MachineChange), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn restart_machine() {}

/// Give a machine another image: what the clan publishes, or what the machine ran before
#[utoipa::path(post, path = "/api/v1/clans/{clan}/machines/{machine}/update", params(("clan" = String, Path), ("machine" = String, Path)), request_body = UpdateMachine, responses((status = 202, body = MachineChange, description = "Its computer begins"), (status = 200, body = MachineChange, description = "What it would do, or: nothing to do"), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn update_machine() {}

/// A terminal on a machine: frames both ways after an upgrade to `clan-terminal`
#[utoipa::path(get, path = "/api/v1/clans/{clan}/machines/{machine}/terminal", params(("clan" = String, Path), ("machine" = String, Path), TerminalQuery), responses((status = 101, description = "Frames follow"), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn machine_terminal() {}

/// The services of a clan
#[utoipa::path(get, path = "/api/v1/clans/{clan}/services", params(("clan" = String, Path)), responses((status = 200, body = [ServiceInfo]), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn services() {}

/// The devices of this person in a clan, past ones included, oldest first
#[utoipa::path(get, path = "/api/v1/clans/{clan}/devices", params(("clan" = String, Path)), responses((status = 200, body = [DeviceInfo]), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn devices() {}

/// Make a link that makes another computer a device of this person, or a new recovery phrase
#[utoipa::path(post, path = "/api/v1/clans/{clan}/devices", params(("clan" = String, Path)), request_body = AddDevice, responses((status = 201, body = DeviceOffer), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn add_device() {}

/// Put a device of this person out, with the machines that it added
#[utoipa::path(delete, path = "/api/v1/clans/{clan}/devices/{device}", params(("clan" = String, Path), ("device" = String, Path), RemoveDeviceQuery), responses((status = 200, body = RemovedDevice), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn remove_device() {}

/// Leave a clan
#[utoipa::path(post, path = "/api/v1/clans/{clan}/leave", params(("clan" = String, Path)), responses((status = 202, body = TaskInfo), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn leave() {}

/// A URL that opens a service in a browser
#[utoipa::path(post, path = "/api/v1/clans/{clan}/services/{name}/open", params(("clan" = String, Path), ("name" = String, Path)), responses((status = 201, body = OpenedService), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn open_service() {}

/// The VMs on this computer
#[utoipa::path(get, path = "/api/v1/vms", responses((status = 200, body = [VmInfo]), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn vms() {}

/// Start a VM
#[utoipa::path(post, path = "/api/v1/vms/{vm}/start", params(("vm" = String, Path)), responses((status = 202, body = TaskInfo), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn start_vm() {}

/// Stop a VM in good order
#[utoipa::path(post, path = "/api/v1/vms/{vm}/stop", params(("vm" = String, Path)), responses((status = 202, body = TaskInfo), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn stop_vm() {}

/// Halt a VM's processors; its memory is kept
#[utoipa::path(post, path = "/api/v1/vms/{vm}/pause", params(("vm" = String, Path)), responses((status = 202, body = TaskInfo), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn pause_vm() {}

/// Let a paused VM go on
#[utoipa::path(post, path = "/api/v1/vms/{vm}/resume", params(("vm" = String, Path)), responses((status = 202, body = TaskInfo), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn resume_vm() {}

/// Stop a VM in good order and start it again
#[utoipa::path(post, path = "/api/v1/vms/{vm}/restart", params(("vm" = String, Path)), responses((status = 202, body = TaskInfo), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn restart_vm() {}

/// Give a VM another image; its disk stays, and its previous image comes back if it is not well
#[utoipa::path(post, path = "/api/v1/vms/{vm}/update", params(("vm" = String, Path)), request_body = UpdateVm, responses((status = 202, body = TaskInfo), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn update_vm() {}

/// What giving a VM another image would do: which, where it comes from, how much of it has to come
#[utoipa::path(post, path = "/api/v1/vms/{vm}/update/preview", params(("vm" = String, Path)), request_body = UpdateVm, responses((status = 200, body = UpdatePlan), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn preview_update() {}

/// Suggest to newcomers who is to steer their machine
#[utoipa::path(post, path = "/api/v1/clans/{clan}/control", params(("clan" = String, Path)), request_body = SuggestControl, responses((status = 201, body = ControlSuggestion, description = "Done"), (status = 200, body = ControlSuggestion, description = "What it would do, or: nothing to do"), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn suggest_control() {}

/// Say who may steer this computer's machine
#[utoipa::path(post, path = "/api/v1/vms/{vm}/control", params(("vm" = String, Path)), request_body = SetControl, responses((status = 200, body = ControlChange), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn set_control() {}

/// Open the encrypted disk of a VM, which starts if it is to run
#[utoipa::path(post, path = "/api/v1/vms/{vm}/unlock", params(("vm" = String, Path)), request_body = UnlockVm, responses((status = 200, body = VmInfo), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn unlock_vm() {}

/// Forget the passphrase of a VM that does not run
#[utoipa::path(post, path = "/api/v1/vms/{vm}/lock", params(("vm" = String, Path)), responses((status = 200, body = VmInfo), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn lock_vm() {}

/// Give the encrypted disk of a VM, and the copies of it, another passphrase
#[utoipa::path(post, path = "/api/v1/vms/{vm}/passphrase", params(("vm" = String, Path)), request_body = ChangePassphrase, responses((status = 202, body = TaskInfo), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn change_passphrase() {}

/// Give a VM another size, or say what it would be
#[utoipa::path(post, path = "/api/v1/vms/{vm}/size", params(("vm" = String, Path)), request_body = ResizeVm, responses((status = 200, body = VmSize), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn resize_vm() {}

/// The snapshots of a VM's disk, oldest first
#[utoipa::path(get, path = "/api/v1/vms/{vm}/snapshots", params(("vm" = String, Path)), responses((status = 200, body = [SnapshotInfo]), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn snapshots() {}

/// Make a snapshot of a VM's disk
#[utoipa::path(post, path = "/api/v1/vms/{vm}/snapshots", params(("vm" = String, Path)), request_body = MakeSnapshot, responses((status = 202, body = TaskInfo), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn make_snapshot() {}

/// Put a snapshot in the place of a VM's disk
#[utoipa::path(post, path = "/api/v1/vms/{vm}/snapshots/{name}/restore", params(("vm" = String, Path), ("name" = String, Path)), responses((status = 202, body = TaskInfo), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn restore_snapshot() {}

/// Remove a snapshot
#[utoipa::path(delete, path = "/api/v1/vms/{vm}/snapshots/{name}", params(("vm" = String, Path), ("name" = String, Path)), responses((status = 202, body = TaskInfo), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn discard_snapshot() {}

/// Delete a VM and its disk
#[utoipa::path(delete, path = "/api/v1/vms/{vm}", params(("vm" = String, Path), DeleteQuery), responses((status = 202, body = TaskInfo), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn delete_vm() {}

/// A VM's log lines
#[utoipa::path(get, path = "/api/v1/vms/{vm}/logs", params(("vm" = String, Path), LogQuery), responses((status = 200, body = String, content_type = "text/plain"), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn vm_logs() {}

/// A VM's console: raw bytes both ways after an upgrade to `clan-console`
#[utoipa::path(get, path = "/api/v1/vms/{vm}/console", params(("vm" = String, Path)), responses((status = 101, description = "Raw bytes follow"), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn vm_console() {}

/// A VM's statistics
#[utoipa::path(get, path = "/api/v1/vms/{vm}/stats", params(("vm" = String, Path)), responses((status = 200, body = VmStats), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn vm_stats() {}

/// The images on this computer
#[utoipa::path(get, path = "/api/v1/images", responses((status = 200, body = [ImageInfo]), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn images() {}

/// Build the image that a clan founded now would run
#[utoipa::path(post, path = "/api/v1/images", responses((status = 202, body = TaskInfo), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn build_image() {}

/// Compare an image with its name
#[utoipa::path(post, path = "/api/v1/images/{image}/verify", params(("image" = String, Path)), responses((status = 202, body = TaskInfo), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn verify_image() {}

/// Make an image what newcomers to a clan run
#[utoipa::path(post, path = "/api/v1/clans/{clan}/image", params(("clan" = String, Path)), request_body = PublishImage, responses((status = 201, body = Publication, description = "Done"), (status = 200, body = Publication, description = "What it would do, or: nothing to do"), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn publish_image() {}

/// Remove the images that no VM here runs
#[utoipa::path(delete, path = "/api/v1/images", params(ImageGcQuery), responses((status = 200, body = ImageGc), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn gc_images() {}

/// A URL that opens the web page, signed in; over the Unix socket only
#[utoipa::path(post, path = "/api/v1/logins", request_body = MakeLogin, responses((status = 201, body = Login), (status = "default", body = ApiProblem, content_type = "application/problem+json")))]
fn login() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_document_is_the_one_that_the_code_describes() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/openapi.json");
        let mut text = openapi().to_pretty_json().unwrap();
        text.push('\n');
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(committed == text, "docs/openapi.json is out of date: run `UPDATE=1 cargo nextest run -p clan-api`");
    }

    #[test]
    fn every_path_is_under_the_base() {
        assert!(openapi().paths.paths.keys().all(|path| path.starts_with(BASE)));
    }
}
