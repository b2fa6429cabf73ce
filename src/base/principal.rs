//! Who makes a request.

use std::fmt;

/// Who makes a request. Every request carries one in its extensions, from the first layer that sees it, even while
/// nobody is asked to prove anything.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Principal {
    /// The connection proved nothing.
    Anonymous,
    /// The connection proved possession of a client certificate that the configured authority signed.
    Certificate {
        /// The subject's common name; where there is none, the first subject alternative name. A certificate with
        /// neither names nobody and is refused.
        subject: String,
        /// The subject alternative names (DNS names, e-mail addresses, URIs), as written in the certificate.
        names: Vec<String>,
    },
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Principal::Anonymous => f.write_str("anonymous"),
            Principal::Certificate { subject, .. } => write!(f, "certificate:{subject}"),
        }
    }
}
