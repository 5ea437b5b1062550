//! What a manager that was killed leaves on disk, in every state that an image switch passes through, and what the next one
//! makes of it.

use super::*;
use crate::record::Trial;

/// A state on disk, as `machine::hold`, `update::switch` and `machine::release` write them, one after the other.
#[derive(Debug, Clone, Copy)]
struct Left {
    wanted: bool,
    held: bool,
    /// The record names the other image.
    switched: bool,
    /// It says which one to go back to.
    trial: bool,
}

const fn left(wanted: bool, held: bool, switched: bool, trial: bool) -> Left {
    Left { wanted, held, switched, trial }
}

/// Of a VM that runs: in all of them it runs again.
const OF_ONE_THAT_RUNS: [Left; 6] = [
    left(true, true, false, false),
    left(false, true, false, false),
    left(false, true, true, true),
    left(true, true, true, true),
    left(true, false, true, true),
    left(true, false, false, false),
];

/// Of one that is stopped, and stays so.
const OF_ONE_THAT_IS_STOPPED: [Left; 2] = [left(false, false, false, false), left(false, false, true, true)];

impl Site {
    fn leave(&self, left: Left, images: [ImageId; 2]) {
        let trial = Trial { previous: images[0], met: false, services: std::collections::BTreeSet::new() };
        let image = images[usize::from(left.switched)];
        let trial = left.trial.then_some(trial);
        let (wanted, held) = (left.wanted, left.held);
        self.record.update(|r| (r.wanted, r.held, r.image, r.trial) = (wanted, held, Some(image), trial)).unwrap();
    }

    /// The keeper of a manager that reads what is on disk.
    fn next_keeper(&self) -> (Arc<RecordCell>, Keeper) {
        let paths = self.record.paths().clone();
        let record = Arc::new(RecordCell::new(paths.clone(), ClanRecord::load(&paths).unwrap()));
        (record.clone(), Keeper::spawn(record, self.config.clone(), self.cancel.clone()))
    }

    fn images(&self) -> [ImageId; 2] {
        [self.record.get().image.unwrap(), put_image(&self.config.images, HALT, 1)]
    }
}

/// Which of the images a QEMU runs.
fn image_of(pid: u32, images: [ImageId; 2]) -> Vec<ImageId> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    let line = String::from_utf8_lossy(&line).into_owned();
    images.into_iter().filter(|id| line.contains(&id.to_string())).collect()
}

#[tokio::test]
async fn a_vm_that_ran_runs_again_with_the_image_that_its_record_names() {
    for state in OF_ONE_THAT_RUNS {
        let site = Site::new(HALT).await;
        let images = site.images();
        site.leave(state, images);
        let (record, keeper) = site.next_keeper();
        let seen = until(&keeper, |view| view.pid.is_some()).await;
        assert_eq!(image_of(pids(&seen)[0], images), [images[usize::from(state.switched)]], "{state:?}");
        let now = record.get();
        assert!(now.wanted && !now.held, "{state:?}: {now:?}");
        assert_eq!(now.trial.is_some(), state.trial, "it stays to be judged, and nothing else is: {state:?}");
        assert_eq!(ClanRecord::load(record.paths()).unwrap(), now);
        end(site, keeper).await;
    }
}

#[tokio::test]
async fn a_vm_that_was_stopped_stays_so_whatever_its_image_is() {
    for state in OF_ONE_THAT_IS_STOPPED {
        let site = Site::new(HALT).await;
        let images = site.images();
        site.leave(state, images);
        let (record, keeper) = site.next_keeper();
        // Answered after the keeper has looked what there is.
        keeper.want(false).await.unwrap();
        assert!(keeper.vm().is_none() && keeper.view().state == VmState::Stopped, "{state:?}");
        assert_eq!(record.get().trial.is_some(), state.trial, "{state:?}");
        end(site, keeper).await;
    }
}

#[tokio::test]
async fn a_vm_that_was_on_its_way_down_goes_down_and_comes_up_as_its_record_says() {
    let site = Site::new(HALT).await;
    let images = site.images();
    let before = Vm::start(site.spec(Begin::Boot)).await.unwrap().pid();
    site.leave(left(false, true, true, true), images);
    let (_, keeper) = site.next_keeper();
    let seen = until(&keeper, |view| view.pid.is_some_and(|pid| pid != before)).await;
    assert_eq!(pids(&seen)[0], before, "it was found");
    assert_eq!(image_of(pids(&seen)[1], images), [images[1]]);
    end(site, keeper).await;
}

#[tokio::test]
async fn what_a_killed_qemu_leaves_in_its_folder_goes() {
    let site = Site::new(HALT).await;
    let folder = site.record.paths().vm();
    let sockets = || {
        use std::os::unix::fs::FileTypeExt;
        let entries = fs::read_dir(&folder).unwrap().map(Result::unwrap);
        entries.filter(|entry| entry.file_type().unwrap().is_socket()).count()
    };
    let vm = Vm::start(site.spec(Begin::Boot)).await.unwrap();
    assert!(sockets() > 0);
    vm.kill().unwrap();
    vm.wait_exit().await;
    assert_eq!(sockets(), 0, "while somebody watches");

    drop(std::os::unix::net::UnixListener::bind(folder.join("qmp.sock")).unwrap());
    assert_eq!(sockets(), 1);
    fs::write(folder.join("pid.tmp4711"), "half").unwrap();
    assert!(Vm::adopt(&folder).await.unwrap().is_none());
    assert_eq!(sockets(), 0, "while nobody did");
    assert!(!folder.join("pid.tmp4711").exists());
}
