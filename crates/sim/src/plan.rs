//! What a seed stands for.

use crate::dice::Dice;

/// What happens in a run, as far as its seed decides it beforehand.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What everything comes from.
    pub seed: u64,
    /// Machines of the founders' clan before anything happens.
    pub machines: usize,
    /// Of its people, so many begin as admins, with one machine each; the rest as members.
    pub admins: usize,
    /// How many members are hostile.
    pub hostile: usize,
    /// How long faults last, virtual milliseconds.
    pub faulty_ms: u64,
    /// What people do meanwhile.
    pub deeds: usize,
    /// Crashes in the middle of writes.
    pub crashes: usize,
    /// Partitions.
    pub partitions: usize,
    /// Disks that are full for a while.
    pub full_disks: usize,
    /// Files that are damaged behind the database's back.
    pub rot: usize,
    /// Clocks that are off by up to days for a while.
    pub skews: usize,
    /// Disks that are put back to what they were some time before.
    pub restores: usize,
    /// Nobody remembers what was on a disk that was put back. For seeing that the simulation notices; never by chance.
    pub forgetful_managers: bool,
    /// Disks that say they have forced out what they have not. For seeing that the simulation notices; never by chance.
    pub lying_disks: bool,
    /// Messages lost, in a thousand.
    pub loss: u32,
    /// Messages that come twice, in a thousand.
    pub duplication: u32,
    /// Messages that are held up and overtaken, in a thousand.
    pub reordering: u32,
}

impl Plan {
    /// A plan for each seed; most are small, so that many can be run.
    pub fn of(seed: u64) -> Self {
        let mut dice = Dice::new(seed ^ 0x636c_616e);
        let machines = match dice.range(0..10) {
            0..=6 => dice.range(3..9),
            7 | 8 => dice.range(9..16),
            _ => dice.range(16..28),
        };
        let mut some = |most: u64| usize::try_from(dice.range(0..most + 1)).unwrap_or(0);
        let machines = usize::try_from(machines).unwrap_or(3);
        let faults = some(3);
        let (admins, hostile) = (1 + some(2).min(machines - 1), some(2).min(machines / 3));
        Self {
            seed,
            machines,
            admins,
            hostile,
            faulty_ms: 60_000 + 1000 * some(120) as u64,
            deeds: 6 + some(20),
            crashes: if faults == 0 { 0 } else { some(10) },
            partitions: if faults == 0 { 0 } else { some(4) },
            full_disks: some(2) * usize::from(faults > 1),
            rot: usize::from(faults > 2) * some(1),
            skews: some(2) * usize::from(faults > 1),
            lying_disks: false,
            restores: some(2) * usize::from(faults > 0),
            forgetful_managers: false,
            loss: [0, 0, 20, 150][faults],
            duplication: [0, 20, 50, 100][faults],
            reordering: [0, 20, 50, 200][faults],
        }
    }

    /// The same for a clan of so many machines: fewer faults each, because all of them matter to everybody.
    pub fn large(seed: u64, machines: usize) -> Self {
        Self { machines, admins: 3, hostile: 2, faulty_ms: 60_000, deeds: 20, ..Self::of(seed) }
    }
}
