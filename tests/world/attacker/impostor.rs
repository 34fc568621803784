//! A server on the tunnel port in another's place.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio_rustls::TlsAcceptor;

use super::careless::Careless;
use super::credentials::Credentials;
use super::{provider, runtime};
use crate::namespace::Namespace;

/// Accepts everything, with a certificate of the attacker's choice; stops when dropped.
#[derive(Debug)]
pub struct Impostor {
    counts: Arc<Counts>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Counts {
    dialled: AtomicUsize,
    requests: AtomicUsize,
}

impl Impostor {
    /// Listens inside a namespace.
    ///
    /// # Panics
    /// If the address is taken.
    pub fn start(inside: &Namespace, at: SocketAddr, credentials: &Credentials) -> Self {
        let listener = inside.run(|| std::net::TcpListener::bind(at).expect("the port is free"));
        listener.set_nonblocking(true).expect("a listener can be made non-blocking");
        let acceptor = TlsAcceptor::from(Arc::new(config(credentials)));
        let counts = Arc::new(Counts::default());
        let counted = counts.clone();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            runtime().block_on(async move {
                let listener = TcpListener::from_std(listener).expect("it is non-blocking");
                tokio::select! {
                    () = accept(listener, acceptor, counted) => {}
                    _ = stopped => {}
                }
            });
        });
        Self { counts, stop: Some(stop), thread: Some(thread) }
    }

    /// Connections so far.
    pub fn dialled(&self) -> usize {
        self.counts.dialled.load(Ordering::SeqCst)
    }

    /// Requests so far: the victim took it for the true server.
    pub fn requests(&self) -> usize {
        self.counts.requests.load(Ordering::SeqCst)
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, counts: Arc<Counts>) {
    while let Ok((stream, _)) = listener.accept().await {
        counts.dialled.fetch_add(1, Ordering::SeqCst);
        tokio::spawn(serve(stream, acceptor.clone(), counts.clone()));
    }
}

async fn serve(stream: TcpStream, acceptor: TlsAcceptor, counts: Arc<Counts>) {
    let Ok(stream) = acceptor.accept(stream).await else { return };
    let Ok(mut connection) = h2::server::handshake(stream).await else { return };
    while let Some(Ok((_, mut respond))) = connection.accept().await {
        counts.requests.fetch_add(1, Ordering::SeqCst);
        let _ = respond.send_response(http::Response::new(()), false);
    }
}

fn config(credentials: &Credentials) -> ServerConfig {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider speaks TLS 1.3")
        .with_client_cert_verifier(Arc::new(Careless(provider())))
        .with_single_cert(credentials.chain.clone(), credentials.key.clone_key())
        .expect("the key is usable");
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}
