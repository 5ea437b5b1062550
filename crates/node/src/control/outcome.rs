//! How getting a place in a clan may fail.

use clan_wire::peer::JoinRefusal;

use crate::{NodeError, join::RedeemError, report::chain};

/// Why a machine did not get its place.
pub(super) enum ProvisionError {
    Refused(JoinRefusal),
    Failed(String),
}

/// Why a node did not start: for a reason to tell the manager, or of its own.
pub(super) enum ProvisionOrNodeError {
    Reason(String),
    Node(NodeError),
}

impl From<NodeError> for ProvisionOrNodeError {
    fn from(error: NodeError) -> Self {
        Self::Node(error)
    }
}

impl From<ProvisionOrNodeError> for NodeError {
    fn from(error: ProvisionOrNodeError) -> Self {
        match error {
            ProvisionOrNodeError::Node(error) => error,
            ProvisionOrNodeError::Reason(reason) => NodeError::network("the machine's place in its clan", reason),
        }
    }
}

impl From<ProvisionOrNodeError> for ProvisionError {
    fn from(error: ProvisionOrNodeError) -> Self {
        match error {
            ProvisionOrNodeError::Node(error) => error.into(),
            ProvisionOrNodeError::Reason(reason) => Self::Failed(reason),
        }
    }
}

impl From<NodeError> for ProvisionError {
    fn from(error: NodeError) -> Self {
        Self::Failed(chain(&error))
    }
}

impl From<RedeemError> for ProvisionError {
    fn from(error: RedeemError) -> Self {
        match error {
            RedeemError::Refused(refusal) => Self::Refused(refusal),
            RedeemError::Unreachable { .. } => Self::Failed(error.to_string()),
        }
    }
}
