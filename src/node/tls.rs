//! TLS of the client listener, and who a client's certificate says it is.

use std::path::Path;
use std::time::Duration;

use tonic::transport::{Certificate, Identity, ServerTlsConfig};
use x509_parser::extensions::GeneralName;

use super::config::{ClientAuth, TlsSection};
use crate::base::Principal;

/// A client that takes longer for its handshake is dropped.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// Reads certificates and key; none where TLS is not configured. The text of an error names the file.
pub fn load(tls: &TlsSection) -> Result<Option<ServerTlsConfig>, String> {
    let (Some(cert), Some(key)) = (&tls.cert, &tls.key) else {
        return Ok(None);
    };
    install_provider();
    let identity = Identity::from_pem(read("tls.cert", cert)?, read("tls.key", key)?);
    let mut config = ServerTlsConfig::new().identity(identity).timeout(HANDSHAKE_MAX);
    if let Some(ca) = &tls.client_ca {
        let pem = read("tls.client_ca", ca)?;
        let optional = tls.client_auth == ClientAuth::Optional;
        config = config
            .client_ca_root(Certificate::from_pem(pem))
            .client_auth_optional(optional);
    }
    Ok(Some(config))
}

/// One process-wide choice, so that no other crate's default can come between.
pub fn install_provider() {
    // Set already: the same one.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// A PEM file.
pub fn read(key: &str, path: &Path) -> Result<Vec<u8>, String> {
    let pem = std::fs::read(path).map_err(|error| format!("{key}: cannot read {}: {error}", path.display()))?;
    if !pem.windows(11).any(|window| window == b"-----BEGIN ") {
        return Err(format!("{key}: {} is not a PEM file", path.display()));
    }
    Ok(pem)
}

/// Who a verified client certificate (DER) says it is; none if it names nobody.
pub fn principal(certificate: &[u8]) -> Option<Principal> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let names: Vec<String> = certificate
        .subject_alternative_name()
        .ok()
        .flatten()
        .map(|extension| extension.value.general_names.iter().filter_map(name).collect())
        .unwrap_or_default();
    let common = certificate
        .subject()
        .iter_common_name()
        .filter_map(|name| name.as_str().ok())
        .find(|name| is_plain(name));
    let subject = common.map(str::to_owned).or_else(|| names.first().cloned())?;
    Some(Principal::Certificate { subject, names })
}

fn name(name: &GeneralName<'_>) -> Option<String> {
    let text = match name {
        GeneralName::RFC822Name(text) | GeneralName::DNSName(text) | GeneralName::URI(text) => *text,
        GeneralName::OtherName(..)
        | GeneralName::X400Address(_)
        | GeneralName::DirectoryName(_)
        | GeneralName::EDIPartyName(_)
        | GeneralName::IPAddress(_)
        | GeneralName::RegisteredID(_)
        | GeneralName::Invalid(..) => return None,
    };
    is_plain(text).then(|| text.to_owned())
}

/// Names go into logs and, one day, into rules: an empty one, or one with control characters, is no name.
fn is_plain(text: &str) -> bool {
    !text.is_empty() && text.len() <= 255 && !text.chars().any(char::is_control)
}
