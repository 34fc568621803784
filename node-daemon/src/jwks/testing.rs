//! An issuer of tokens and its server of keys, on loopback.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use futures_util::FutureExt as _;
use node_core::policy::tokens::encode_base64url;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

/// One key of an issuer.
pub(crate) struct Signer {
    kid: String,
    pair: EcdsaKeyPair,
}

impl Signer {
    pub(crate) fn new(kid: &str) -> Self {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("random bytes");
        Self { kid: kid.to_owned(), pair }
    }

    fn public(&self) -> Value {
        let point = self.pair.public_key().as_ref();
        let (x, y) = (encode_base64url(&point[1..33]), encode_base64url(&point[33..]));
        json!({"kty": "EC", "crv": "P-256", "kid": self.kid, "use": "sig", "x": x, "y": y})
    }

    pub(crate) fn token(&self, claims: &Value) -> String {
        let part = |value: &Value| encode_base64url(value.to_string().as_bytes());
        let header = json!({"alg": "ES256", "kid": self.kid});
        let signed = format!("{}.{}", part(&header), part(claims));
        let signature = self.pair.sign(&SystemRandom::new(), signed.as_bytes()).expect("a good key");
        format!("{signed}.{}", encode_base64url(signature.as_ref()))
    }
}

pub(crate) fn key_set(signers: &[&Signer]) -> String {
    json!({"keys": signers.iter().map(|signer| signer.public()).collect::<Vec<_>>()}).to_string()
}

/// What the server does with the next request.
#[derive(Clone)]
pub(crate) enum Mode {
    /// 200, with this text.
    Text(String),
    /// This, as it stands.
    Raw(String),
    /// Nothing, ever.
    Silent,
}

/// A server of keys.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    mode: Arc<Mutex<Mode>>,
    asked: Arc<AtomicUsize>,
}

impl Server {
    pub(crate) async fn start(mode: Mode) -> Self {
        Self::serve(mode, |stream| async { Some(stream) }).await
    }

    /// The same over TLS, with this certificate.
    pub(crate) async fn start_tls(mode: Mode, own: &rcgen::CertifiedKey<rcgen::KeyPair>) -> Self {
        let acceptor = crate::certs::testing::acceptor(own);
        Self::serve(mode, move |stream| acceptor.accept(stream).map(Result::ok)).await
    }

    async fn serve<S, F>(mode: Mode, secure: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        F: Future<Output = Option<S>> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("bound");
        let (mode, asked) = (Arc::new(Mutex::new(mode)), Arc::new(AtomicUsize::new(0)));
        let (current, count) = (Arc::clone(&mode), Arc::clone(&asked));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                let mode = current.lock().expect("no panic").clone();
                let secured = secure(stream);
                tokio::spawn(async move {
                    if let Some(stream) = secured.await {
                        answer(stream, mode).await;
                    }
                });
            }
        });
        Self { address, mode, asked }
    }

    pub(crate) fn set(&self, mode: Mode) {
        *self.mode.lock().expect("no panic") = mode;
    }

    pub(crate) fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }
}

async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin, mode: Mode) {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") && stream.read_buf(&mut request).await.unwrap_or(0) > 0 {}
    let answer = match mode {
        Mode::Text(text) => format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}", text.len()),
        Mode::Raw(text) => text,
        Mode::Silent => std::future::pending().await,
    };
    // A client that has heard enough closes early.
    let _ = stream.write_all(answer.as_bytes()).await;
    let _ = stream.shutdown().await;
}
