//! Clans: founding and joining them, who is in them, and what they decided.

use hyper::Method;

use super::{ClientError, ManagerClient, segment};
use crate::{
    AddDevice, AdmissionDecision, ClanInfo, ClanLog, ClanLogQuery, CreateClan, CreateInvite, CreatedClan,
    DecideAdmission, DeviceInfo, DeviceOffer, FindInvitation, FindRecovery, FoundInvitation, Invite, InviteInfo,
    JoinClan, JoinPreview, MachineInfo, PersonInfo, PreviewJoin, RemoveDeviceQuery, RemovedDevice, Rename, Renamed,
    Revocation, Revoke, RoleChange, SetRole, TaskInfo,
};

impl ManagerClient {
    /// Founds a clan.
    pub async fn create_clan(&self, request: &CreateClan) -> Result<CreatedClan, ClientError> {
        self.post("/clans", request).await
    }

    /// The link in a pasted text, or the one that four words stand for, which may take as long as a search of the LAN or at a relay.
    pub async fn find_invitation(&self, request: &FindInvitation) -> Result<FoundInvitation, ClientError> {
        self.post("/joins/invitation", request).await
    }

    /// A device link for this computer, by right of a recovery phrase.
    pub async fn find_recovery(&self, request: &FindRecovery) -> Result<FoundInvitation, ClientError> {
        self.post("/joins/recovery", request).await
    }

    /// The devices of this person.
    pub async fn devices(&self, clan: &str) -> Result<Vec<DeviceInfo>, ClientError> {
        self.get(&format!("/clans/{}/devices", segment(clan))).await
    }

    /// A link for another device, or a new recovery phrase.
    pub async fn add_device(&self, clan: &str, request: &AddDevice) -> Result<DeviceOffer, ClientError> {
        self.post(&format!("/clans/{}/devices", segment(clan)), request).await
    }

    /// Puts a device out, by its name or the beginning of its id.
    pub async fn remove_device(
        &self,
        clan: &str,
        device: &str,
        query: RemoveDeviceQuery,
    ) -> Result<RemovedDevice, ClientError> {
        let path = format!("/clans/{}/devices/{}?dry_run={}", segment(clan), segment(device), query.dry_run);
        self.call(Method::DELETE, &path, None).await
    }

    /// What a link leads to. Asks machines of the clan, and may take as long as they do.
    pub async fn preview_join(&self, request: &PreviewJoin) -> Result<JoinPreview, ClientError> {
        self.post("/joins/preview", request).await
    }

    /// Joins a clan.
    pub async fn join(&self, request: &JoinClan) -> Result<TaskInfo, ClientError> {
        self.post("/joins", request).await
    }

    /// The clans that this computer is in.
    pub async fn clans(&self) -> Result<Vec<ClanInfo>, ClientError> {
        self.get("/clans").await
    }

    /// Makes an invite. `clan` is a name, an id or a unique beginning of an id, here as in the following.
    pub async fn invite(&self, clan: &str, request: &CreateInvite) -> Result<Invite, ClientError> {
        self.post(&format!("/clans/{}/invites", segment(clan)), request).await
    }

    /// The invites that were made in a clan, oldest first.
    pub async fn invites(&self, clan: &str) -> Result<Vec<InviteInfo>, ClientError> {
        self.get(&format!("/clans/{}/invites", segment(clan))).await
    }

    /// Puts a person or a machine out, or withdraws an invite.
    pub async fn revoke(&self, clan: &str, request: &Revoke) -> Result<Revocation, ClientError> {
        self.post(&format!("/clans/{}/revocations", segment(clan)), request).await
    }

    /// Gives a person another role, or finds out whether that would work.
    pub async fn set_role(&self, clan: &str, request: &SetRole) -> Result<RoleChange, ClientError> {
        self.post(&format!("/clans/{}/roles", segment(clan)), request).await
    }

    /// Gives a person or a machine another name, or finds out whether that would work.
    pub async fn rename(&self, clan: &str, request: &Rename) -> Result<Renamed, ClientError> {
        self.post(&format!("/clans/{}/names", segment(clan)), request).await
    }

    /// Lets a newcomer in who waits for it or refuses them, or finds out whether that would work.
    pub async fn decide_admission(
        &self,
        clan: &str,
        request: &DecideAdmission,
    ) -> Result<AdmissionDecision, ClientError> {
        self.post(&format!("/clans/{}/admissions", segment(clan)), request).await
    }

    /// What was decided in a clan.
    pub async fn clan_log(&self, clan: &str, query: ClanLogQuery) -> Result<ClanLog, ClientError> {
        self.get(&format!("/clans/{}/log?limit={}", segment(clan), query.limit)).await
    }

    /// The people of a clan.
    pub async fn members(&self, clan: &str) -> Result<Vec<PersonInfo>, ClientError> {
        self.get(&format!("/clans/{}/members", segment(clan))).await
    }

    /// The machines of a clan.
    pub async fn machines(&self, clan: &str) -> Result<Vec<MachineInfo>, ClientError> {
        self.get(&format!("/clans/{}/machines", segment(clan))).await
    }

    /// Leaves a clan.
    pub async fn leave(&self, clan: &str) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/clans/{}/leave", segment(clan)), &serde_json::json!({})).await
    }
}
