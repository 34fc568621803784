//! TLS that is spoken on a workload's behalf, because a rule of its own side asks for it (policy C, T-20).
//!
//! [`prepare`] finds out what to show and what to expect before anything is dialled: a rule whose files cannot be used denies.
//! [`speak`] makes the handshake; the server is judged within it, before a byte of the application goes out.

use std::{io, sync::Arc, time::Duration};

use node_core::{
    attest::Attested,
    snapshot::{Originated, Proof},
};
use rustls::{ClientConfig, pki_types::ServerName};
use spiffe_id::SpiffeId;
use tokio::{
    net::TcpStream,
    time::{Instant, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    Shared,
    carry::Side,
    record::Ending,
    tunnel::{HANDSHAKE_SECONDS, HandshakeFailed, negotiated},
};
use crate::{
    certs::{server_name, verify::peer_of},
    telemetry::{Reason, RouteReason, Tls},
};

/// What a handshake needs.
pub(super) struct Prepared {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    is_mesh: bool,
    is_mutual: bool,
}

/// A server that proved what was asked of it.
pub(super) struct Spoken {
    pub(super) stream: TlsStream<TcpStream>,
    pub(super) tls: Tls,
    /// Whether a certificate was held out to it as well.
    pub(super) is_mutual: bool,
    /// Who it is in the mesh; `None`: a server outside of it.
    pub(super) peer: Option<SpiffeId>,
}

/// Finds certificates and roots.
pub(super) async fn prepare(
    shared: &Shared,
    source: &Attested,
    originated: &Originated,
) -> Result<Prepared, Ending> {
    let unusable =
        |problem: &dyn ToString| Ending::denied(Reason::Route(RouteReason::ClientRule), problem.to_string());
    let sni = originated.sni.as_deref().unwrap_or_default();
    let name = server_name(sni).map_err(|unnamed| unusable(&unnamed))?;
    match &originated.proof {
        Proof::Mesh(allowed) => {
            let held = Instant::now() + shared.holds.certificate;
            let credentials = shared
                .credentials
                .wait(source.identity(), held)
                .await
                .map_err(|late| Ending::failed(Reason::HoldCertificate, late))?;
            let config = credentials.mesh_client(Arc::clone(allowed), originated.is_http2);
            Ok(Prepared { config, name, is_mesh: true, is_mutual: true })
        }
        Proof::Files { files, names } => {
            let found = shared.files.material(files.as_ref()).await;
            let material = found.map_err(|fault| unusable(&fault))?;
            let config = material.client(names, originated.is_http2);
            let config = config.map_err(|unnamed| unusable(&unnamed))?;
            let is_mutual = files.as_ref().is_some_and(|files| files.client_certificate.is_some());
            Ok(Prepared { config, name, is_mesh: false, is_mutual })
        }
    }
}

/// Makes the handshake.
pub(super) async fn speak(prepared: Prepared, server: TcpStream) -> Result<Spoken, Ending> {
    server.arm();
    let Prepared { config, name, is_mesh, is_mutual } = prepared;
    let handshake = TlsConnector::from(config).connect(name, server);
    let done = match timeout(Duration::from_secs(HANDSHAKE_SECONDS), handshake).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(HandshakeFailed::new(error)),
        Err(_) => Err(HandshakeFailed::TimedOut),
    };
    let stream = done.map_err(|failed| not_spoken(&failed))?;
    let session = stream.get_ref().1;
    let peer = match is_mesh {
        true => {
            let peer = peer_of(session.peer_certificates());
            Some(peer.map_err(|refused| not_spoken(&refused.into()))?.identity)
        }
        false => None,
    };
    let tls = negotiated(session);
    Ok(Spoken { stream, tls, is_mutual, peer })
}

fn not_spoken(failed: &HandshakeFailed) -> Ending {
    if failed.is_refusal() {
        return Ending::denied(failed.reason(), failed);
    }
    Ending::failed(failed.reason(), format!("the server does not speak TLS 1.3 with this side: {failed}"))
}

impl Side for TlsStream<TcpStream> {
    fn arm(&self) {
        self.get_ref().0.arm();
    }

    fn settle(&self) {
        self.get_ref().0.settle();
    }

    fn is_lost(&self, _error: &io::Error) -> bool {
        false
    }

    /// In TLS 1.3 the server judges the client when the client believes the handshake done.
    fn refusal(&self, error: &io::Error) -> Option<String> {
        let rustls::Error::AlertReceived(alert) = error.get_ref()?.downcast_ref()? else { return None };
        Some(format!("the server refused this side: {alert:?}"))
    }
}
