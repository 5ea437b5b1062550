//! The way into the mesh: in the story's lab, the second person joins, restarts the VM and leaves, again and again.

use std::{
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use super::{Key, Results, VmBenchConfig, age, millis};
use crate::{Lab, LabError, Person, Screen, story};

const MANAGER: Duration = Duration::from_secs(20);
const LIMIT: Duration = Duration::from_secs(180);
const FOUNDER: &str = "founder";

/// Measures, and gives the folder of the image that was used.
pub(super) fn measure(config: &VmBenchConfig, screen: &Screen, results: &mut Results) -> Result<PathBuf, LabError> {
    let mut lab = Lab::up(&config.lab, screen)?;
    let measured = rounds(config, &mut lab, results);
    if measured.is_err() {
        story::post_mortem(&mut lab);
    }
    lab.down()?;
    measured
}

fn rounds(config: &VmBenchConfig, lab: &mut Lab, results: &mut Results) -> Result<PathBuf, LabError> {
    for name in [FOUNDER, "second"] {
        lab.person(name).start_manager(MANAGER)?;
    }
    let create = ["create", story::CLAN, "--person", FOUNDER, "--machine", FOUNDER];
    lab.person(FOUNDER).clan(&create)?.success()?;
    let images = lab.person(FOUNDER).clan_json(&["image", "list"])?;
    let image = images
        .as_array()
        .into_iter()
        .flatten()
        .find(|image| image["clans"].as_array().is_some_and(|clans| clans.iter().any(|clan| clan == story::CLAN)));
    let id = image.and_then(|image| image["id"].as_str());
    let id = id.ok_or_else(|| LabError::Promise(format!("no image of the clan among {images}")))?;
    let folder = lab.person(FOUNDER).data().join("images").join(id);
    let began = Instant::now();
    lab.build_another(FOUNDER)?;
    results.add(Key::Rebuild, millis(began.elapsed()));
    // The first one that joins leaves the template, of which the others come.
    for round in 0..=config.rounds {
        let link = story::link_in(&lab.person(FOUNDER).clan_quietly(&["invite"])?.success()?.stdout)?;
        let second = lab.person("second");
        let (name, began) = (format!("second{round}"), Instant::now());
        second.clan_typing(&["join", "--yes", "--person", &name, "--machine", &name], &link)?.success()?;
        let (pid, met) = meets(second, None)?;
        let restored = went_on(pid);
        results.add(if restored { Key::RestoreMesh } else { Key::FirstMesh }, millis(met));
        results.add(if restored { Key::JoinFromTemplate } else { Key::Join }, millis(began.elapsed()));
        if round > 0 {
            second.clan(&["vm", "restart", story::CLAN])?.success()?;
            let (_, met) = meets(second, Some(pid))?;
            results.add(Key::BootMesh, millis(met));
        }
        second.clan_quietly(&["leave", story::CLAN, "--yes"])?.success()?;
    }
    Ok(folder)
}

/// Waits until the person's VM, as another process than `not`, reaches the founder's. Gives the process and its age.
fn meets(person: &Person, not: Option<u32>) -> Result<(u32, Duration), LabError> {
    let began = Instant::now();
    while began.elapsed() < LIMIT {
        let status = person.clan_json(&["status"])?;
        let pid = status["vms"][0]["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
        if let Some(pid) = pid.filter(|pid| Some(*pid) != not)
            && story::path_to(&status, FOUNDER).is_some()
            && let Some(age) = age(pid)
        {
            return Ok((pid, age));
        }
        thread::sleep(Duration::from_millis(50));
    }
    Err(LabError::InVain { what: "a path to the founder's machine".into(), limit: LIMIT })
}

/// Whether a QEMU began with a saved state.
fn went_on(pid: u32) -> bool {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).any(|word| word == b"-incoming")
}
