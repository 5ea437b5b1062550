//! Hundreds of machines of a clan in one process, in virtual time, from one seed.
//!
//! What runs is what the product runs: [`clan_replica::Replica`], and the ledger's store with its real database, on
//! [`disk::Disk`]s in memory. What is simulated is what surrounds them: time, the network, power, people.
//!
//! A run has two parts. First everything goes wrong: messages are lost, doubled and overtake each other, the network
//! parts, power fails in the middle of writes, disks fill up, clocks are days off, members lie. Then the faults end, and after a
//! while [`check`] asks whether everybody agrees, is linked with everybody and knows everybody's beacon, whether
//! anything is lost that was acknowledged, and whether anybody has gained what nobody gave them.

#![allow(clippy::expect_used, reason = "what cannot happen is a finding")]

pub mod check;
pub mod dice;
pub mod disk;
mod end;
mod faults;
mod hostile;
mod machines;
mod network;
mod people;
mod plan;
mod traffic;
mod world;

pub use plan::Plan;
pub use world::{Outcome, Report, World, run};
