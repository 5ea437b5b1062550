//! Steering machines.

use super::{ByteStream, ClientError, Console, ManagerClient, Method, segment};
use crate::{
    ChangeSetting, ControlChange, ControlSuggestion, LogQuery, MachineChange, MachineEntry, MachineReport,
    RevertChange, SetControl, SuggestControl, TERMINAL_UPGRADE, TerminalQuery, UpdateMachine,
};

impl ManagerClient {
    /// Says who may steer this computer's machine.
    pub async fn set_control(&self, vm: &str, request: &SetControl) -> Result<ControlChange, ClientError> {
        self.post(&format!("/vms/{}/control", segment(vm)), request).await
    }

    /// Suggests to newcomers who is to steer their machine.
    pub async fn suggest_control(
        &self,
        clan: &str,
        request: &SuggestControl,
    ) -> Result<ControlSuggestion, ClientError> {
        self.post(&format!("/clans/{}/control", segment(clan)), request).await
    }

    /// A machine as whoever may steer it sees it.
    pub async fn machine_report(&self, clan: &str, machine: &str) -> Result<MachineReport, ClientError> {
        self.get(&at(clan, machine, "report")).await
    }

    /// A machine's log lines, as text.
    pub async fn machine_log(&self, clan: &str, machine: &str, query: LogQuery) -> Result<ByteStream, ClientError> {
        let path = format!("{}?lines={}&follow={}", at(clan, machine, "log"), query.lines, query.follow);
        Ok(ByteStream::new(self.send(Method::GET, &path, None).await?.into_body()))
    }

    /// What was changed on a machine, and by whom, oldest first.
    pub async fn machine_journal(&self, clan: &str, machine: &str) -> Result<Vec<MachineEntry>, ClientError> {
        self.get(&at(clan, machine, "journal")).await
    }

    /// Changes a setting of a machine, or finds out whether that would work.
    pub async fn change_setting(
        &self,
        clan: &str,
        machine: &str,
        request: &ChangeSetting,
    ) -> Result<MachineChange, ClientError> {
        self.post(&at(clan, machine, "settings"), request).await
    }

    /// Restores what was before an entry of a machine's journal, or finds out whether that would work.
    pub async fn revert_change(
        &self,
        clan: &str,
        machine: &str,
        request: &RevertChange,
    ) -> Result<MachineChange, ClientError> {
        self.post(&at(clan, machine, "reverts"), request).await
    }

    /// Starts a machine anew.
    pub async fn restart_machine(&self, clan: &str, machine: &str) -> Result<MachineChange, ClientError> {
        self.post(&at(clan, machine, "restart"), &serde_json::json!({})).await
    }

    /// Gives a machine another image, or finds out whether that would work.
    pub async fn update_machine(
        &self,
        clan: &str,
        machine: &str,
        request: &UpdateMachine,
    ) -> Result<MachineChange, ClientError> {
        self.post(&at(clan, machine, "update"), request).await
    }

    /// A terminal on a machine, or a command there: frames both ways.
    pub async fn machine_terminal(
        &self,
        clan: &str,
        machine: &str,
        query: &TerminalQuery,
    ) -> Result<Console, ClientError> {
        let mut path = format!("{}?", at(clan, machine, "terminal"));
        let number = |n: &Option<u16>| n.map(|n| n.to_string());
        for (name, value) in [
            ("command", query.command.clone()),
            ("rows", number(&query.rows)),
            ("columns", number(&query.columns)),
            ("term", query.term.clone()),
        ] {
            if let Some(value) = value {
                path.push_str(&format!("{name}={}&", segment(&value)));
            }
        }
        self.upgrade(path.trim_end_matches(['?', '&']), TERMINAL_UPGRADE).await
    }
}

fn at(clan: &str, machine: &str, what: &str) -> String {
    format!("/clans/{}/machines/{}/{what}", segment(clan), segment(machine))
}
