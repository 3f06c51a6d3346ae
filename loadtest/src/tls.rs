//! TLS of `wss://` URLs.
//!
//! Session resumption is left on, as browsers have it: clients that reconnect save a handshake.

use std::{io, path::PathBuf, sync::Arc};

use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{
        CertificateDer, InvalidDnsNameError, ServerName, UnixTime,
        pem::{self, PemObject as _},
    },
};

use crate::args::{ServerUrl, TlsArgs};

/// A `wss://` URL cannot be used as given.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    /// The file of `--ca` cannot be read.
    #[error("--ca {}: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The cause.
        source: pem::Error,
    },
    /// The file of `--ca` has no certificate that can be trusted.
    #[error("--ca {}: no usable certificate", file.display())]
    NoCertificate {
        /// The file.
        file: PathBuf,
    },
    /// The host of the URL is neither a name nor an address.
    #[error("{host}: {source}")]
    Host {
        /// The host.
        host: String,
        /// The cause.
        source: InvalidDnsNameError,
    },
    /// The TLS library rejects its configuration.
    #[error("TLS: {0}")]
    Config(#[from] Error),
}

impl TlsArgs {
    /// The configuration of all connections of a run, which share resumed sessions.
    pub(crate) fn client_config(&self) -> Result<Arc<ClientConfig>, TlsError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone());
        let builder = builder.with_safe_default_protocol_versions()?;
        if self.insecure {
            let verifier = Arc::new(AnyCertificate(provider));
            let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
            return Ok(Arc::new(builder.with_no_client_auth()));
        }
        let mut roots = RootCertStore::empty();
        if let Some(file) = &self.ca {
            let failed = |source| TlsError::Read { file: file.clone(), source };
            for certificate in CertificateDer::pem_file_iter(file).map_err(failed)? {
                roots.add(certificate.map_err(failed)?)?;
            }
            if roots.is_empty() {
                return Err(TlsError::NoCertificate { file: file.clone() });
            }
        } else {
            roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        }
        Ok(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()))
    }
}

/// The TLS of connections to one `wss://` URL.
#[derive(Clone, Debug)]
pub(crate) struct TlsConnector {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl TlsConnector {
    /// `None` for a `ws://` URL.
    pub(crate) fn for_url(url: &ServerUrl, args: &TlsArgs) -> Result<Option<Self>, TlsError> {
        if !url.is_tls {
            return Ok(None);
        }
        let host = url.host();
        let name = ServerName::try_from(host.to_owned())
            .map_err(|source| TlsError::Host { host: host.to_owned(), source })?;
        Ok(Some(Self { config: args.client_config()?, name }))
    }

    /// The client's half of a new connection.
    pub(crate) fn connect(&self) -> io::Result<ClientConnection> {
        ClientConnection::new(self.config.clone(), self.name.clone()).map_err(io::Error::other)
    }
}

/// Accepts any certificate (`--insecure`). The server must still prove that it has the key.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ca_file_without_certificates_is_rejected() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ca.pem");
        let config = || TlsArgs { ca: Some(file.clone()), insecure: false }.client_config();
        assert!(matches!(config(), Err(TlsError::Read { .. })));
        std::fs::write(&file, "no certificate").unwrap();
        assert!(matches!(config(), Err(TlsError::NoCertificate { .. })));
        assert!(TlsArgs::default().client_config().is_ok());
    }

    #[test]
    fn only_wss_urls_get_a_connector() {
        let connector =
            |url: &str| TlsConnector::for_url(&url.parse().unwrap(), &TlsArgs::default()).unwrap();
        assert!(connector("ws://h/").is_none());
        for url in ["wss://h/", "wss://127.0.0.1:1/", "wss://[::1]/"] {
            assert!(connector(url).unwrap().connect().is_ok(), "{url}");
        }
    }
}
