//! Generated protocol code and its conversion to and from the model. Everything that comes off the wire is validated
//! here before it reaches a layer above.

mod code;
mod convert_partition;
pub mod spec;

pub use code::code_name;

#[allow(clippy::all, clippy::pedantic, missing_docs)]
pub mod v1 {
    tonic::include_proto!("mainstem.v1");
}

/// What Mainstem writes into its own log and state. Not an API.
#[allow(clippy::all, clippy::pedantic, missing_docs)]
pub mod internal {
    pub use v1::*;

    pub mod v1 {
        tonic::include_proto!("mainstem.internal.v1");
    }
}

/// The public files as a `FileDescriptorSet`, for reflection and the compatibility test.
pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/mainstem.v1.bin"));
