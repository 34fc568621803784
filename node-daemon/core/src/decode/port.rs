//! Names of ports and what is spoken on them.

use super::{InvalidObject, field::Field};
use crate::workload::Protocol;

/// Longest name of a port, in bytes (RFC 6335, 5.1).
pub(super) const PORT_NAME_BYTES_MAX: usize = 15;

/// Protocol of a port (policy H-8): `appProtocol` decides where it stands, else the name up to its first `-`.
pub(super) fn protocol(app_protocol: Option<&str>, name: Option<&str>) -> Protocol {
    if let Some(word) = app_protocol {
        return named(word.strip_prefix("kubernetes.io/").unwrap_or(word));
    }
    let name = name.unwrap_or_default();
    named(name.split_once('-').map_or(name, |(prefix, _)| prefix))
}

fn named(word: &str) -> Protocol {
    let is = |known: &[&str]| known.iter().any(|candidate| candidate.eq_ignore_ascii_case(word));
    if is(&["grpc"]) {
        return Protocol::Grpc;
    }
    if is(&["http", "http2", "h2c", "ws", "grpc-web"]) {
        return Protocol::Http;
    }
    Protocol::Tcp
}

/// A port's name: letters in lower case, digits and `-`, with at least one letter.
pub(super) fn port_name(field: &Field<'_>) -> Result<String, InvalidObject> {
    let text = field.text()?;
    let fits = text.len() <= PORT_NAME_BYTES_MAX
        && super::is_label(text)
        && text.bytes().any(|byte| byte.is_ascii_lowercase());
    if !fits {
        return Err(field.refuse(
            "a port name: up to 15 of a-z, 0-9 and '-', at least one a letter",
            "give the port such a name",
        ));
    }
    Ok(text.to_owned())
}
