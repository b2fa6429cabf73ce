//! Positions and identities. Each is a type of its own without conversion to any other: a log index is never a
//! sequence, a node is never a replica.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(u64);

        impl $name {
            /// Wraps a raw number read from the wire or the disk.
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// The raw number, for the wire, the disk and messages.
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

id!(
    /// A message's place in its shard; the first is 1. Dense, never reused.
    Sequence, ""
);
id!(
    /// A shard, unique in the cluster, never reused.
    ShardId, "s"
);
id!(
    /// A Raft group.
    GroupId, "g"
);
id!(
    /// A replica of a group: a Raft node id. Never reused, not even after the replica was removed.
    ReplicaId, "r"
);
id!(
    /// A node of the cluster.
    NodeId, "n"
);
id!(
    /// A position in a group's Raft log.
    LogIndex, "#"
);
id!(
    /// A Raft term.
    Term, "t"
);
id!(
    /// A stream's epoch, raised when a mirror is promoted.
    Epoch, "e"
);
id!(
    /// A revision of a stream or of the view.
    Revision, "v"
);
id!(
    /// Microseconds since the Unix epoch.
    TimeUs, ""
);

impl Sequence {
    /// The first sequence of every shard.
    pub const FIRST: Sequence = Sequence(1);

    /// The sequence `n` places further on.
    pub const fn plus(self, n: u64) -> Self {
        Self(self.0 + n)
    }

    /// How many places this is after `earlier`; 0 if it is not after it.
    pub const fn since(self, earlier: Sequence) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl LogIndex {
    /// The index after this one.
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl TimeUs {
    /// This time and `us` microseconds.
    pub const fn plus_us(self, us: u64) -> Self {
        Self(self.0.saturating_add(us))
    }

    /// This time less `us` microseconds, not below the epoch.
    pub const fn minus_us(self, us: u64) -> Self {
        Self(self.0.saturating_sub(us))
    }
}

impl GroupId {
    /// The group that holds the cluster's own metadata.
    pub const META: GroupId = GroupId(1);
}

/// A stream's immutable identity.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(u128);

impl StreamId {
    /// Wraps 16 bytes made by the proposer of the stream.
    pub const fn new(raw: u128) -> Self {
        Self(raw)
    }

    /// The raw number.
    pub const fn get(self) -> u128 {
        self.0
    }

    /// Parses 32 hex digits.
    pub fn parse(hex: &str) -> Option<Self> {
        if hex.len() != 32 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        u128::from_str_radix(hex, 16).ok().map(Self)
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StreamId({self})")
    }
}
