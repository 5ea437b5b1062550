//! One file per noun or daily verb.

pub(crate) mod approve;
pub(crate) mod change;
pub(crate) mod completions;
pub(crate) mod controller;
pub(crate) mod create;
pub(crate) mod device;
pub(crate) mod group;
pub(crate) mod invite;
pub(crate) mod invites;
pub(crate) mod join;
pub(crate) mod leave;
pub(crate) mod log;
pub(crate) mod machine;
pub(crate) mod machines;
pub(crate) mod manager;
pub(crate) mod members;
pub(crate) mod recover;
pub(crate) mod relay;
pub(crate) mod rename;
pub(crate) mod revoke;
pub(crate) mod role;
pub(crate) mod rule;
pub(crate) mod service;
pub(crate) mod status;
pub(crate) mod vm;
pub(crate) mod web;
