//! What must hold, one fact per file. Each is told what is seen of the nodes from outside and says when it is broken.

pub mod acked_stays;
pub mod dense;
pub mod log_matching;
pub mod one_leader;
pub mod one_owner;
pub mod seal_before_adopt;

/// Something that must never be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    pub invariant: &'static str,
    pub what: String,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.invariant, self.what)
    }
}

pub type Verdict = Result<(), Violation>;

pub fn broken(invariant: &'static str, what: impl Into<String>) -> Violation {
    Violation {
        invariant,
        what: what.into(),
    }
}

/// All of them.
#[derive(Default)]
pub struct Invariants {
    pub one_leader: one_leader::OneLeader,
    pub log_matching: log_matching::LogMatching,
    pub acked_stays: acked_stays::AckedStays,
    pub dense: dense::Dense,
    pub one_owner: one_owner::OneOwner,
    pub seal_before_adopt: seal_before_adopt::SealBeforeAdopt,
}
