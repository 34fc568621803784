//! Who is it? Outbound: the kernel's attestation. Inbound: what the client speaks, and whose certificate it has shown.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use node_core::{
    attest::{Attested, NotAttested, attest, attest_within_host},
    policy::DenialReason,
    snapshot::Snapshot,
    workload::{ObjectName, TransportMode, Workload},
};
use rustls::server::{Accepted, Acceptor};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    time::{Instant, timeout_at},
};

use super::{accept::Site, record::Ending, tunnel::HANDSHAKE_SECONDS};
use crate::{
    certs::ALPN_MESH,
    telemetry::{HandshakeRefusal, Reason},
};

/// How long the first byte of a client is waited for where plaintext is accepted too, in milliseconds: then the server
/// may be the one that speaks first (policy A-6).
pub const FIRST_BYTE_MILLISECONDS: u64 = 100;

/// First byte of a TLS handshake record (RFC 8446, 5.1).
const TLS_HANDSHAKE: u8 = 22;

/// Bytes of a first message that are looked at: a ClientHello with a post-quantum key share has some 1.8 KiB, and a
/// record holds 16 KiB. Longer ones are no ClientHello.
pub(super) const HELLO_BYTES_MAX: usize = 20 * 1024;

/// Room for one read of it, in bytes: most ClientHellos in one piece.
const HELLO_READ_BYTES: usize = 2 * 1024;

/// Which workload the kernel says has opened an outbound connection. To be asked once: on a host the answer is used up.
pub(super) fn opener(site: &Site, client: SocketAddr, target: SocketAddr) -> Result<ObjectName, Ending> {
    if !site.is_host() {
        return Ok(site.name().clone());
    }
    site.ground()
        .origin(client, target)
        .map_err(|error| Ending::failed(Reason::System, format!("who opened it: {error}")))?
        .ok_or_else(|| Ending::denied(Reason::NotAttested, "no workload of this host opened the connection"))
}

/// Vouches for the workload that the kernel named.
pub(super) fn source(
    snapshot: &Snapshot,
    opener: &ObjectName,
    client: SocketAddr,
) -> Result<Attested, Ending> {
    attest(snapshot, opener, client.ip()).map_err(|not_attested| refused(&not_attested))
}

/// The local process of a host that dials one of the host's own services, if it is a workload's (T-27). To be asked once for
/// each connection, also for one that is then refused: the answer is used up.
pub(super) fn local_client(
    site: &Site,
    snapshot: &Snapshot,
    client: SocketAddr,
    target: SocketAddr,
) -> Result<Option<Arc<Workload>>, Ending> {
    if !site.is_host() {
        return Ok(None);
    }
    let name = site
        .ground()
        .local_client(client, target)
        .map_err(|error| Ending::failed(Reason::System, format!("whose process it is: {error}")))?;
    let Some(name) = name else { return Ok(None) };
    match attest_within_host(snapshot, &name, client.ip()) {
        Ok(attested) => Ok(Some(Arc::clone(attested.workload()))),
        // It must not pass as nobody either.
        Err(barred @ NotAttested::Barred(_)) => Err(refused(&barred)),
        Err(_) => Ok(None),
    }
}

fn refused(not_attested: &NotAttested) -> Ending {
    let reason = match not_attested {
        NotAttested::Barred(_) => Reason::Policy(DenialReason::IdentityBarred),
        NotAttested::Unknown(_)
        | NotAttested::NotEnrolled(_)
        | NotAttested::OtherNode { .. }
        | NotAttested::ForeignAddress { .. } => Reason::NotAttested,
    };
    Ending::denied(reason, not_attested)
}

/// What a client on the workload's own port began with.
pub(super) enum Spoken {
    /// A ClientHello with the mesh's ALPN.
    MeshTls(Box<Accepted>),
    /// Anything else, with what was read of it.
    Plain(Bytes),
}

/// Finds out what a client speaks, without answering it.
pub(super) async fn listen<I: AsyncRead + Unpin>(
    stream: &mut I,
    mode: TransportMode,
) -> Result<Spoken, Ending> {
    let now = Instant::now();
    let hello_deadline = now + Duration::from_secs(HANDSHAKE_SECONDS);
    let mut read = BytesMut::new();
    let first_deadline = match mode {
        TransportMode::Strict => hello_deadline,
        TransportMode::Permissive | TransportMode::Disabled => {
            now + Duration::from_millis(FIRST_BYTE_MILLISECONDS)
        }
    };
    let mut acceptor = Acceptor::default();
    let mut deadline = first_deadline;
    while read.len() < HELLO_BYTES_MAX {
        let before = read.len();
        read.reserve(HELLO_READ_BYTES);
        match timeout_at(deadline, stream.read_buf(&mut read)).await {
            Ok(Ok(0)) => break,
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(Ending::broken(Reason::ClientReset, error)),
            Err(_) if mode == TransportMode::Strict => {
                let silent = Reason::Handshake(HandshakeRefusal::TimedOut);
                return Err(Ending::failed(silent, format!("no TLS handshake within {HANDSHAKE_SECONDS} s")));
            }
            Err(_) => break,
        }
        if read[0] != TLS_HANDSHAKE {
            break;
        }
        deadline = hello_deadline;
        match offer(&mut acceptor, &read[before..]) {
            Ok(None) => {}
            Ok(Some(hello)) if is_mesh(&hello) => return Ok(Spoken::MeshTls(Box::new(hello))),
            Ok(Some(_)) | Err(_) => break,
        }
    }
    Ok(Spoken::Plain(read.freeze()))
}

/// Gives more bytes to the parser of the ClientHello.
fn offer(acceptor: &mut Acceptor, mut bytes: &[u8]) -> io::Result<Option<Accepted>> {
    while !bytes.is_empty() {
        if acceptor.read_tls(&mut bytes)? == 0 {
            break;
        }
    }
    acceptor.accept().map_err(|(error, _)| io::Error::other(error))
}

fn is_mesh(hello: &Accepted) -> bool {
    hello.client_hello().alpn().is_some_and(|mut names| names.any(|name| name == ALPN_MESH))
}
