//! The network lab: several people's computers on one machine.
//!
//! Each person's computer is a network namespace with a data folder and a `clan manager` that runs as an ordinary
//! user; a further namespace with a bridge plays the internet. [`Lab::up`] lays them, [`Lab::person`] runs commands as
//! that person, [`Lab::down`] leaves nothing behind, and [`sweep`] does the same for a lab whose process was killed.
//! [`story`] is what the product promises, told on such a lab; `make run` and the end-to-end test both tell it.
//!
//! Only the lab needs root, for network namespaces. The product in it does not.

mod account;
pub mod bench;
pub mod bench_vm;
mod capture;
mod console;
mod delay;
mod error;
pub mod five;
pub mod fleet;
mod http;
mod lab;
pub mod matrix;
pub mod nat;
mod net;
mod process;
mod proxy;
mod record;
mod screen;
pub mod story;
mod sweep;

pub use account::Account;
pub use capture::Capture;
pub use console::Console;
pub use delay::Delay;
pub use error::LabError;
pub use http::{Browser, Page};
pub use lab::{Interrupt, Lab, LabConfig, Person};
pub use net::{FOUNDER_ADDRESS, INTERNET_ADDRESS, PROXY_PORT, SECOND_ADDRESS, STRANGER_ADDRESS};
pub use process::{Finished, matching};
pub use record::Record;
pub use screen::Screen;
pub use sweep::{Leftovers, leftovers, sweep};
