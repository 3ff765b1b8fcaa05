// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! TLS 1.3 with both sides authenticated, by rustls and ring.
//!
//! Each host has a certificate and its key, and the certificate of the authority (CA) that both sides trust. Whoever has a
//! certificate of this authority may send a guest here or receive one, so it should be one for this purpose and no other.
//! Who connects checks the name as well: the certificate of who listens is for the host that the address names, or for
//! `--tls-name`. A certificate that says what it may be used for is for `serverAuth` where one listens and `clientAuth`
//! where one connects.
//!
//! Only TLS 1.3 is spoken, a session is never taken up again, and lists of revoked certificates are not read: who must
//! lock out a key makes a new authority.
//!
//! A key that others than its owner and its group can read is refused, as `ssh` does; a group may (`ssl-cert` of Debian).

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::{ClientConnection, Resumption};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem};
use rustls::server::{ServerConnection, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore, ServerConfig};
use serde::{Deserialize, Serialize};

use super::pages::{Parts, STAGE};

/// The largest file of certificates that is read, bytes.
const MOST: u64 = 1 << 20;
/// What is read from the connection at once, bytes: rustls alone would ask for 4096.
const READ: usize = 128 << 10;
/// What who listens says when it has checked the other side. In TLS 1.3 who connects would hear of a refusal only later.
const WELCOME: u8 = b'W';

/// The files, all of them PEM, and the name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// `--tls-cert`: the own certificate, and behind it those between it and the authority's.
    pub cert: PathBuf,
    /// `--tls-key`: its key.
    pub key: PathBuf,
    /// `--tls-ca`: the authority's certificate, or several.
    pub ca: PathBuf,
    /// `--tls-name`: whom the certificate of who listens is for, instead of the host that the address names.
    #[serde(default)]
    pub name: Option<String>,
}

/// TLS cannot be had with these files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{}: {source}", file.display())]
    Read {
        /// Which.
        file: PathBuf,
        /// The errno.
        source: io::Error,
    },
    /// There is something else in it.
    #[error("{}: {why}", file.display())]
    Content {
        /// Which.
        file: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The key is no secret.
    #[error(
        "{}: others can read this key (mode {mode:04o}); chmod 600 it, and use another one if they may have",
        file.display()
    )]
    ExposedKey {
        /// The key's file.
        file: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// `--tls-name` is none.
    #[error("\"{0}\" is no name or IP address that a certificate could be for")]
    Name(String),
}

/// What was read from the files, and checked.
#[derive(Clone, Debug)]
pub struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    name: Option<ServerName<'static>>,
}

impl Tls {
    /// Reads the files. The own certificate is checked as the other side will check it: that it is the authority's, and
    /// that this is its time.
    ///
    /// # Errors
    /// [`TlsError`], with the file.
    pub fn load(files: &TlsFiles) -> Result<Self, TlsError> {
        let wrong = |file: &Path, why: String| TlsError::Content {
            file: file.to_owned(),
            why,
        };
        let name = match &files.name {
            None => None,
            Some(name) => match ServerName::try_from(name.clone()) {
                Ok(name) => Some(name),
                Err(_) => return Err(TlsError::Name(name.clone())),
            },
        };
        let chain = certificates(&files.cert)?;
        let key = key(&files.key)?;
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&files.ca)? {
            let added = roots.add(certificate);
            added.map_err(|error| {
                wrong(
                    &files.ca,
                    format!("no certificate of an authority: {error}"),
                )
            })?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(ring::default_provider());

        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone());
        let verifier = verifier
            .build()
            .map_err(|error| wrong(&files.ca, error.to_string()))?;
        if let Some((own, between)) = chain.split_first() {
            let checked = verifier.verify_client_cert(own, between, UnixTime::now());
            match checked {
                // It may be for a host that only listens.
                Ok(_)
                | Err(rustls::Error::InvalidCertificate(
                    CertificateError::InvalidPurpose
                    | CertificateError::InvalidPurposeContext { .. },
                )) => {}
                Err(error) => {
                    let ca = files.ca.display();
                    let why = format!("the other side would refuse it by {ca}: {}", plain(&error));
                    return Err(wrong(&files.cert, why));
                }
            }
        }
        // What of it fails is of the key: the certificate was read above.
        let of_key = |error: rustls::Error| wrong(&files.key, of_key(&error, &files.cert));
        let version = |error: rustls::Error| wrong(&files.key, error.to_string());

        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(version)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(of_key)?;
        // No session is taken up again, so nobody has use for tickets.
        server.send_tls13_tickets = 0;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(version)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(of_key)?;
        client.resumption = Resumption::disabled();
        Ok(Tls {
            client: Arc::new(client),
            server: Arc::new(server),
            name,
        })
    }

    /// The same, for a destination whose certificate is for `name`.
    ///
    /// # Errors
    /// [`TlsError::Name`].
    pub fn for_name(&self, name: &str) -> Result<Self, TlsError> {
        let server = ServerName::try_from(name.to_owned());
        let server = server.map_err(|_| TlsError::Name(name.to_owned()))?;
        Ok(Tls {
            name: Some(server),
            ..self.clone()
        })
    }

    /// The side that connects to `host`, which is none where the address has no host.
    pub(super) fn connecting(&self, host: Option<&str>) -> io::Result<Session> {
        let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidInput, why);
        let name = match (&self.name, host) {
            (Some(name), _) => name.clone(),
            (None, Some(host)) => ServerName::try_from(host.to_owned())
                .map_err(|_| invalid(format!("no certificate can be for \"{host}\"")))?,
            (None, None) => {
                let why = "whom the other side's certificate is for is not said: give --tls-name";
                return Err(invalid(why.into()));
            }
        };
        let client = ClientConnection::new(self.client.clone(), name).map_err(io::Error::other)?;
        Ok(Session::new(client.into()))
    }

    /// The side that listens.
    pub(super) fn accepting(&self) -> io::Result<Session> {
        let server = ServerConnection::new(self.server.clone()).map_err(io::Error::other)?;
        Ok(Session::new(server.into()))
    }
}

fn read(path: &Path) -> Result<(Vec<u8>, u32), TlsError> {
    let failed = |source| TlsError::Read {
        file: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let of = file.metadata().map_err(failed)?;
    if !of.is_file() || of.len() > MOST {
        return Err(TlsError::Content {
            file: path.to_owned(),
            why: format!("it is no file of {MOST} bytes at most"),
        });
    }
    let mut bytes = Vec::new();
    file.take(MOST).read_to_end(&mut bytes).map_err(failed)?;
    Ok((bytes, of.permissions().mode() & 0o7777))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let (bytes, _) = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let why = match found {
        Ok(found) if !found.is_empty() => return Ok(found),
        Ok(_) => "there is no certificate in it (PEM, -----BEGIN CERTIFICATE-----)".into(),
        Err(error) => format!("its PEM is damaged: {error}"),
    };
    Err(TlsError::Content {
        file: path.to_owned(),
        why,
    })
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let (bytes, mode) = read(path)?;
    let why = match PrivateKeyDer::from_pem_slice(&bytes) {
        Ok(_) if mode & 0o007 != 0 => {
            return Err(TlsError::ExposedKey {
                file: path.to_owned(),
                mode,
            });
        }
        Ok(key) => return Ok(key),
        Err(pem::Error::NoItemsFound) if bytes.windows(9).any(|text| text == b"ENCRYPTED") => {
            "the key is encrypted; give one without a passphrase".into()
        }
        Err(pem::Error::NoItemsFound) => {
            "there is no key in it (PEM, -----BEGIN PRIVATE KEY-----)".into()
        }
        Err(error) => format!("its PEM is damaged: {error}"),
    };
    Err(TlsError::Content {
        file: path.to_owned(),
        why,
    })
}

fn of_key(error: &rustls::Error, cert: &Path) -> String {
    match error {
        rustls::Error::InconsistentKeys(_) => {
            format!("it is not the key of the certificate {}", cert.display())
        }
        error => format!("this key cannot be used: {error}"),
    }
}

/// In a user's words, and in rustls's where we have none.
fn plain(error: &rustls::Error) -> String {
    use rustls::Error as E;
    match error {
        E::NoCertificatesPresented => "it has shown no certificate".into(),
        // One of the same name has another key.
        E::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            "its certificate is of another authority than --tls-ca".into()
        }
        E::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        ) => format!("its certificate has expired ({error})"),
        E::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => format!("its certificate is for another name, and --tls-name may say which ({error})"),
        E::InvalidCertificate(CertificateError::Other(other))
            if other.0.to_string().contains("CaUsedAsEndEntity") =>
        {
            "its certificate is an authority's (CA:TRUE), as one that signed itself often is, and none for a host".into()
        }
        E::AlertReceived(alert) => format!("it refuses us: {}", of_alert(*alert)),
        error => error.to_string(),
    }
}

fn of_alert(alert: AlertDescription) -> String {
    match alert {
        AlertDescription::CertificateRequired => "it wants a certificate".into(),
        AlertDescription::UnknownCA => "our certificate is of another authority than its".into(),
        AlertDescription::DecryptError => {
            "it cannot verify our certificate by its authority".into()
        }
        AlertDescription::CertificateExpired => "our certificate has expired by its clock".into(),
        AlertDescription::BadCertificate | AlertDescription::UnsupportedCertificate => {
            format!("our certificate is not one for this ({alert:?})")
        }
        AlertDescription::ProtocolVersion => "it does not speak TLS 1.3".into(),
        alert => format!("{alert:?}"),
    }
}

/// It can be tried again.
fn waits(error: &io::Error) -> bool {
    use io::ErrorKind::{TimedOut, WouldBlock};
    matches!(error.kind(), TimedOut | WouldBlock)
}

/// One side of a connection, without the socket.
#[derive(Debug)]
pub(super) struct Session {
    tls: rustls::Connection,
    /// What was read from the socket and not yet by rustls: `inbox[taken..there]`.
    inbox: Vec<u8>,
    taken: usize,
    there: usize,
    /// Guest memory on its way; made when it is first needed.
    stage: Vec<u8>,
    /// The welcome has been given to rustls, of the side that says it.
    welcomes: bool,
    /// Both sides have authenticated the other, and know it.
    agreed: bool,
}

impl Session {
    fn new(tls: rustls::Connection) -> Self {
        Session {
            tls,
            inbox: vec![0; READ],
            taken: 0,
            there: 0,
            stage: Vec::new(),
            welcomes: false,
            agreed: false,
        }
    }

    /// Whether one side does not know yet that the other lets it in.
    pub(super) fn is_handshaking(&self) -> bool {
        !self.agreed
    }

    /// Until both sides have authenticated the other. One that was late goes on where it was when it is called again.
    ///
    /// # Errors
    /// `InvalidData`, with why one side refuses the other; `UnexpectedEof`: it closed; the socket's.
    pub(super) fn handshake(&mut self, socket: &mut (impl Read + Write)) -> io::Result<()> {
        self.handshaken(socket).map_err(|error| match error.kind() {
            // One that was closed by who has not understood what we said.
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                io::Error::new(error.kind(), format!("{error}{}", self.ask()))
            }
            _ => error,
        })
    }

    /// Of who was connected to, and says nothing of why it closes.
    fn ask(&self) -> &'static str {
        match self.tls {
            rustls::Connection::Client(_) => {
                "; does it listen with TLS? (--tls-cert, --tls-key and --tls-ca are for both sides)"
            }
            rustls::Connection::Server(_) => "",
        }
    }

    fn handshaken(&mut self, socket: &mut (impl Read + Write)) -> io::Result<()> {
        while self.tls.is_handshaking() {
            self.send(socket)?;
            if self.tls.is_handshaking() && !self.receive(socket)? {
                let ask = self.ask();
                let why = format!("it closed the connection before TLS was agreed upon{ask}");
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why));
            }
        }
        self.send(socket)?;
        match self.tls {
            rustls::Connection::Server(_) => {
                if !std::mem::replace(&mut self.welcomes, true) {
                    self.tls.writer().write_all(&[WELCOME])?;
                }
                self.send(socket)?;
            }
            rustls::Connection::Client(_) => {
                let mut welcome = [0];
                match self.read(socket, &mut welcome) {
                    Ok(1) if welcome == [WELCOME] => {}
                    Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
                        return Err(error);
                    }
                    _ => {
                        let why = "it closed the connection instead of accepting us";
                        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why));
                    }
                }
            }
        }
        self.agreed = true;
        Ok(())
    }

    /// As `Read::read`: 0 is the end that the other side has said; one that it has not is `UnexpectedEof`.
    pub(super) fn read(
        &mut self,
        socket: &mut (impl Read + Write),
        into: &mut [u8],
    ) -> io::Result<usize> {
        loop {
            match self.tls.reader().read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return read,
            }
            // That it has closed is the reader's to say.
            self.receive(socket)?;
            self.send(socket)?;
        }
    }

    /// As `Write::write`. What it has taken is on its way, or goes with the next write or [`flush`](Self::flush): a socket
    /// that has no room fails it only where nothing was taken, so that who writes again writes nothing twice.
    pub(super) fn write(
        &mut self,
        socket: &mut (impl Read + Write),
        bytes: &[u8],
    ) -> io::Result<usize> {
        self.send(socket)?;
        let taken = self.tls.writer().write(bytes)?;
        match self.send(socket) {
            Err(error) if !waits(&error) => Err(error),
            _ => Ok(taken),
        }
    }

    /// [`read`](Self::read) into the first of this memory.
    pub(super) fn read_pages(
        &mut self,
        socket: &mut (impl Read + Write),
        parts: Parts<'_>,
    ) -> io::Result<usize> {
        let mut stage = std::mem::take(&mut self.stage);
        stage.resize(STAGE, 0);
        let room = parts.len().min(STAGE);
        let read = self.read(socket, stage.get_mut(..room).unwrap_or_default());
        if let Ok(len) = read {
            parts.copy_from(stage.get(..len).unwrap_or_default());
        }
        self.stage = stage;
        read
    }

    /// [`write`](Self::write) of the first of these bytes.
    pub(super) fn write_pages(
        &mut self,
        socket: &mut (impl Read + Write),
        parts: Parts<'_>,
    ) -> io::Result<usize> {
        let mut stage = std::mem::take(&mut self.stage);
        stage.resize(STAGE, 0);
        let len = parts.copy_to(&mut stage);
        let written = self.write(socket, stage.get(..len).unwrap_or_default());
        self.stage = stage;
        written
    }

    /// As `Write::flush`.
    pub(super) fn flush(&mut self, socket: &mut (impl Read + Write)) -> io::Result<()> {
        self.send(socket)
    }

    /// Says that nothing more comes, where the socket takes that at once. What is written behind it is not sent.
    pub(super) fn close(&mut self, socket: &mut impl Write) {
        self.tls.send_close_notify();
        // Who has gone need not hear it.
        let _ = self.send(socket);
    }

    fn send(&mut self, socket: &mut impl Write) -> io::Result<()> {
        while self.tls.wants_write() {
            match self.tls.write_tls(socket) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
            }
        }
        Ok(())
    }

    /// Reads once; false at the end.
    fn receive(&mut self, socket: &mut (impl Read + Write)) -> io::Result<bool> {
        if self.taken == self.there {
            self.there = loop {
                match socket.read(&mut self.inbox) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    read => break read?,
                }
            };
            self.taken = 0;
        }
        let mut new = self.inbox.get(self.taken..self.there).unwrap_or_default();
        let got = self.tls.read_tls(&mut new)?;
        self.taken += got;
        if let Err(error) = self.tls.process_new_packets() {
            // So that the other side hears why, where it can.
            let _ = self.send(socket);
            let why = match (&error, &self.tls) {
                (rustls::Error::InvalidMessage(_), rustls::Connection::Server(_)) => format!(
                    "what came is not TLS, which is spoken here: who connects is to have --tls-cert, --tls-key and --tls-ca \
                     as well ({error})"
                ),
                (rustls::Error::InvalidMessage(_), rustls::Connection::Client(_)) => format!(
                    "what came is not TLS: the other side listens without it, and is to have --tls-cert, --tls-key and \
                     --tls-ca as well ({error})"
                ),
                _ => plain(&error),
            };
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        Ok(got > 0)
    }
}
