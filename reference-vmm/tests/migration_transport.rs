// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A migration's connections: who gets one, what goes over it, and that no wait is without an end.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use async_pf::peer::Wire;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, date_time_ymd,
};
use reference_vmm::migration::address::Address;
use reference_vmm::migration::codec::{
    Compression, DecodeError, Decoder, Encoder, Frame, PAGE, Sink,
};
use reference_vmm::migration::dial::Dial;
use reference_vmm::migration::limit::{Limited, Limiter};
use reference_vmm::migration::link::{Connect, Patient, TICK, Watch, write_all};
use reference_vmm::migration::message::MOST_LINE;
use reference_vmm::migration::pages::{Parts, WritePages, is_fault};
use reference_vmm::migration::tls::{Tls, TlsError, TlsFiles};
use reference_vmm::migration::transport::{
    AcceptError, BindError, ConnectError, Connection, Listener, connect,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice,
};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

const MOMENT: Duration = Duration::from_millis(20);

struct Authority {
    folder: tempfile::TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let name = folder.path().display().to_string();
        Self::named(folder, &name)
    }

    fn named(folder: tempfile::TempDir, name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        fs::write(folder.path().join("ca.pem"), issuer.pem()).unwrap();
        Authority { folder, issuer }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A certificate for these names, and its key, as files.
    fn host(&self, file: &str, names: &[&str]) -> TlsFiles {
        self.host_with(file, names, |_| {})
    }

    fn host_with(
        &self,
        file: &str,
        names: &[&str],
        change: impl FnOnce(&mut CertificateParams),
    ) -> TlsFiles {
        let names: Vec<String> = names.iter().map(|&name| name.into()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let files = TlsFiles {
            cert: self.file(&format!("{file}.pem")),
            key: self.file(&format!("{file}.key")),
            ca: self.file("ca.pem"),
            name: None,
        };
        fs::write(&files.cert, certificate.pem()).unwrap();
        fs::write(&files.key, key.serialize_pem()).unwrap();
        fs::set_permissions(&files.key, fs::Permissions::from_mode(0o600)).unwrap();
        files
    }

    fn tls(&self) -> Tls {
        Tls::load(&self.host("host", &["127.0.0.1", "localhost", "::1"])).unwrap()
    }
}

fn expired(params: &mut CertificateParams) {
    params.not_before = date_time_ymd(2001, 1, 1);
    params.not_after = date_time_ymd(2002, 1, 1);
}

/// rustls as a peer without our checks: of these files, or without a certificate.
fn raw_client(ca: &Path, own: Option<&TlsFiles>) -> rustls::ClientConnection {
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(ca).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let config = match own {
        None => builder.with_no_client_auth(),
        Some(own) => {
            let certificate = CertificateDer::from_pem_file(&own.cert).unwrap();
            let key = PrivateKeyDer::from_pem_file(&own.key).unwrap();
            builder
                .with_client_auth_cert(vec![certificate], key)
                .unwrap()
        }
    };
    let name = ServerName::try_from("127.0.0.1").unwrap();
    rustls::ClientConnection::new(Arc::new(config), name).unwrap()
}

fn raw_server(own: &TlsFiles) -> rustls::ServerConnection {
    let certificate = CertificateDer::from_pem_file(&own.cert).unwrap();
    let key = PrivateKeyDer::from_pem_file(&own.key).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    rustls::ServerConnection::new(Arc::new(config)).unwrap()
}

fn listen(address: &str, tls: Option<&Tls>) -> Listener {
    Listener::bind(&address.parse().unwrap(), tls).unwrap()
}

fn plain(listener: &Listener) -> TcpStream {
    let Address::Tcp { host, port } = listener.address() else {
        panic!("{}", listener.address());
    };
    TcpStream::connect((host.as_str(), *port)).unwrap()
}

/// Both ends of a connection: who connected, and who accepted.
fn ends(listener: &Listener, tls: Option<&Tls>) -> (Connection, Connection) {
    thread::scope(|scope| {
        let accepted = scope.spawn(|| listener.accept(soon()).unwrap());
        let connected = connect(listener.address(), tls, soon()).unwrap();
        (connected, accepted.join().unwrap())
    })
}

/// What the two sides say of a connection that does not come about.
fn both_refuse(listener: &Listener, tls: Option<&Tls>) -> (String, String) {
    thread::scope(|scope| {
        let accepted = scope.spawn(|| listener.accept(soon()));
        let connected = connect(listener.address(), tls, soon()).unwrap_err();
        assert!(
            matches!(connected, ConnectError::Failed { .. }),
            "{connected}"
        );
        let accepted = accepted.join().unwrap().unwrap_err();
        assert!(matches!(accepted, AcceptError::Peer { .. }), "{accepted}");
        (connected.to_string(), accepted.to_string())
    })
}

fn kinds() -> Vec<(tempfile::TempDir, Listener, Option<Tls>)> {
    let authority = Authority::new();
    let tls = Tls::load(&TlsFiles {
        name: Some("localhost".into()),
        ..authority.host("host", &["localhost"])
    })
    .unwrap();
    let mut kinds = Vec::new();
    for tls in [None, Some(tls)] {
        for place in ["tcp:127.0.0.1:0", "tcp:localhost:0", "unix"] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("x.sock");
            let address = match place {
                "unix" => format!("unix:{}", path.display()),
                tcp => tcp.into(),
            };
            let listener = listen(&address, tls.as_ref());
            kinds.push((folder, listener, tls.clone()));
        }
    }
    kinds
}

#[test]
fn what_is_written_at_one_end_is_read_at_the_other() {
    let data: Vec<u8> = (0..3 << 20).map(|at: u32| (at ^ (at >> 9)) as u8).collect();
    for (_folder, listener, tls) in kinds() {
        let (mut one, mut other) = ends(&listener, tls.as_ref());
        let said = format!("{one:?}");
        assert!(said.contains(&format!("tls: {}", tls.is_some())), "{said}");
        assert!(said.contains(&listener.address().to_string()), "{said}");
        thread::scope(|scope| {
            let read = scope.spawn(|| {
                let mut read = vec![0; data.len()];
                other.read_exact(&mut read).unwrap();
                other.write_all(b"thanks").unwrap();
                other.flush().unwrap();
                read
            });
            one.write_all(&data).unwrap();
            one.flush().unwrap();
            let mut thanks = [0; 6];
            one.read_exact(&mut thanks).unwrap();
            assert_eq!(&thanks, b"thanks");
            assert!(read.join().unwrap() == data);
        });
    }
}

/// Calls until so many bytes have got on, whatever ticks come in between.
fn all(len: usize, mut call: impl FnMut(usize) -> io::Result<usize>) {
    let mut done = 0;
    while done < len {
        match call(done) {
            Ok(0) => panic!("it ended after {done} bytes"),
            Ok(more) => done += more,
            Err(error) => {
                use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
                let tick = matches!(error.kind(), Interrupted | TimedOut | WouldBlock);
                assert!(tick, "{error}");
            }
        }
    }
}

#[test]
fn both_ends_read_while_they_write_more_than_fits_between() {
    use async_pf::peer::Wire;
    let data: Vec<u8> = (0..8 << 20).map(|at: u32| (at ^ (at >> 9)) as u8).collect();
    for (_folder, listener, tls) in kinds() {
        let (one, other) = ends(&listener, tls.as_ref());
        let ends = [one.duplex(), other.duplex()];
        thread::scope(|scope| {
            for end in &ends {
                end.set_tick(Duration::from_millis(5)).unwrap();
                let data = &data;
                scope.spawn(move || all(data.len(), |done| end.write(&data[done..])));
                scope.spawn(move || {
                    let mut read = vec![0; data.len()];
                    all(data.len(), |done| end.read(&mut read[done..]));
                    assert!(read == *data);
                });
            }
        });
        // A word that is not followed by another is on its way at once.
        let [one, other] = &ends;
        all(5, |done| one.write(&b"alone"[done..]));
        let mut word = [0; 5];
        all(5, |done| other.read(&mut word[done..]));
        assert_eq!(&word, b"alone");
        // Nothing comes, and the tick does; then it is the end, for who waits as well.
        let error = other.read(&mut word).unwrap_err();
        let tick = matches!(
            error.kind(),
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
        );
        assert!(tick, "{error}");
        one.shutdown();
        let ended = (0..1000).any(|_| match other.read(&mut word) {
            Ok(0) => true,
            Ok(_) => panic!("nothing was written"),
            Err(error) => {
                let tick = matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                );
                !tick
            }
        });
        assert!(ended);
    }
}

#[test]
fn what_was_sent_one_way_arrives_though_the_sender_is_gone_before_it_is_read() {
    for (_folder, listener, tls) in kinds() {
        let (mut one, mut other) = ends(&listener, tls.as_ref());
        one.write_all(&[7; 20_000]).unwrap();
        one.flush().unwrap();
        drop(one);
        let mut read = [0; 20_000];
        other.read_exact(&mut read).unwrap();
        assert!(read == [7; 20_000]);
    }
}

#[test]
fn a_socket_whose_path_is_gone_is_not_one_that_refuses() {
    let folder = tempfile::tempdir().unwrap();
    let address = Address::Unix(folder.path().join("x.sock"));
    let dial = Dial::new(address, None);
    let kind = || dial.connect(MOMENT).unwrap_err().kind();
    assert_eq!(kind(), io::ErrorKind::NotFound);
    // One whose process was killed.
    drop(UnixListener::bind(folder.path().join("x.sock")).unwrap());
    assert_eq!(kind(), io::ErrorKind::ConnectionRefused);
}

#[test]
fn the_ends_of_a_line_say_the_same_of_it_and_those_of_a_tunnel_do_not() {
    for ((_folder, listener, tls), (_other, tunnel, its)) in kinds().into_iter().zip(kinds()) {
        let (one, other) = ends(&listener, tls.as_ref());
        let line = one.line().unwrap();
        assert_eq!(Some(line), other.line());
        assert!(line.len() <= MOST_LINE as usize, "{line}");
        // The source has its end of the one, the destination of the other, and who passes on has the two between.
        let (to_tunnel, _from) = ends(&tunnel, its.as_ref());
        assert_ne!(to_tunnel.line().unwrap(), line);
        let (_to, from_tunnel) = ends(&listener, tls.as_ref());
        assert_ne!(to_tunnel.line(), from_tunnel.line());
    }
}

#[test]
fn a_way_is_told_from_another_that_has_its_path() {
    let folder = tempfile::tempdir().unwrap();
    let address = Address::Unix(folder.path().join("wire"));
    let dial = Dial::new(address.clone(), None);
    let first = Listener::bind(&address, None).unwrap();
    let line = dial.connect(TICK).unwrap().line().unwrap().to_owned();
    assert!(dial.is_still(&line));
    // Whoever was there lives, and its inode with it.
    std::fs::remove_file(folder.path().join("wire")).unwrap();
    assert!(!dial.is_still(&line));
    let second = Listener::bind(&address, None).unwrap();
    assert!(!dial.is_still(&line));
    // Where it was told to go elsewhere, who answers or refuses is no proof, also where it was before.
    let line = dial.connect(TICK).unwrap().line().unwrap().to_owned();
    assert!(dial.is_still(&line));
    let (clone, way) = (dial.clone(), Connect::way(&dial));
    clone.go(&address, None).unwrap();
    assert!(Connect::way(&dial) != way && !dial.is_still(&line));
    drop((first, second));
}

#[test]
fn a_peer_that_takes_nothing_for_a_while_gets_each_byte_once() {
    // More than sockets hold, of which no piece is like another.
    let bytes: Vec<u8> = (0..16_u32 << 20)
        .map(|at| ((at >> 12) ^ at) as u8)
        .collect();
    for (_folder, listener, tls) in kinds() {
        let (mut one, mut other) = ends(&listener, tls.as_ref());
        one.set_patience(Duration::from_millis(1));
        let stalled = AtomicUsize::new(0);
        let got = thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut writer = one;
                let stop = || {
                    stalled.fetch_add(1, Ordering::SeqCst);
                    None
                };
                let quiet = Duration::from_secs(60);
                write_all(&mut writer, &bytes, &Watch { quiet, stop: &stop })
            });
            let mut got = vec![0; bytes.len()];
            for piece in got.chunks_mut(4 << 20) {
                // The writer has had to come again some times, and does still.
                let before = stalled.load(Ordering::SeqCst);
                while stalled.load(Ordering::SeqCst) < before + 3 && !writer.is_finished() {
                    thread::yield_now();
                }
                other.read_exact(piece).unwrap();
            }
            writer.join().unwrap().unwrap();
            assert_eq!(other.read(&mut [0]).unwrap_or(0), 0);
            got
        });
        assert!(got == bytes, "{}", listener.address());
        assert!(stalled.into_inner() > 3, "{}", listener.address());
    }
}

#[test]
fn a_unix_socket_is_its_users_alone_and_one_that_nobody_listens_at_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let address = Address::Unix(path.clone());
    let listener = Listener::bind(&address, None).unwrap();
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let error = Listener::bind(&address, None).unwrap_err();
    assert!(matches!(error, BindError::Unix { .. }), "{error}");
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn nothing_goes_beyond_this_host_without_tls() {
    for place in ["tcp:0.0.0.0:0", "tcp:[::]:0", "tcp:192.0.2.1:4444"] {
        let address: Address = place.parse().unwrap();
        let error = Listener::bind(&address, None).unwrap_err();
        assert!(matches!(error, BindError::Exposed(_)), "{error}");
        assert!(error.to_string().starts_with(place), "{error}");
        assert!(error.to_string().contains("--tls-cert"), "{error}");
        let error = connect(&address, None, soon()).unwrap_err();
        assert!(matches!(error, ConnectError::Exposed(_)), "{error}");
    }
    let tls = Authority::new().tls();
    listen("tcp:0.0.0.0:0", Some(&tls));
}

#[test]
fn a_certificate_of_another_authority_is_refused_by_both_sides_and_the_next_peer_is_let_in() {
    let (ours, foreign) = (Authority::new(), Authority::new());
    let (tls, stranger) = (ours.tls(), foreign.tls());
    let listener = listen("tcp:127.0.0.1:0", Some(&tls));
    let (connected, accepted) = both_refuse(&listener, Some(&stranger));
    let why = "its certificate is of another authority than --tls-ca";
    assert!(connected.ends_with(why), "{connected}");
    let why = "it refuses us: our certificate is of another authority than its";
    assert!(accepted.ends_with(why), "{accepted}");

    // Who trusts ours, and is none of ours.
    let half = TlsFiles {
        ca: foreign.file("both.pem"),
        ..foreign.host("half", &["localhost"])
    };
    let both = [&ours, &foreign].map(|of| fs::read_to_string(of.file("ca.pem")).unwrap());
    fs::write(&half.ca, both.concat()).unwrap();
    let half = Tls::load(&half).unwrap();
    let (connected, accepted) = both_refuse(&listener, Some(&half));
    let why = "it refuses us: our certificate is of another authority than its";
    assert!(connected.ends_with(why), "{connected}");
    let why = "its certificate is of another authority than --tls-ca";
    assert!(accepted.ends_with(why), "{accepted}");

    ends(&listener, Some(&tls));
}

#[test]
fn who_shows_no_certificate_or_one_that_has_expired_is_not_let_in() {
    let authority = Authority::new();
    let listener = listen("tcp:127.0.0.1:0", Some(&authority.tls()));
    let old = authority.host_with("old", &["127.0.0.1"], expired);
    for (own, why) in [
        (None, "it has shown no certificate"),
        (Some(&old), "its certificate has expired"),
    ] {
        thread::scope(|scope| {
            let accepted = scope.spawn(|| listener.accept(soon()));
            let mut peer = raw_client(&authority.file("ca.pem"), own);
            let mut socket = plain(&listener);
            let mut stream = rustls::Stream::new(&mut peer, &mut socket);
            stream.read_exact(&mut [0]).unwrap_err();
            let error = accepted.join().unwrap().unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        });
    }
}

#[test]
fn a_listener_whose_certificate_has_expired_or_is_for_another_name_is_not_connected_to() {
    let authority = Authority::new();
    let tls = authority.tls();
    let old = authority.host_with("old", &["127.0.0.1"], expired);
    let other = authority.host("other", &["elsewhere.example"]);
    for (own, why) in [
        (&old, "its certificate has expired"),
        (&other, "its certificate is for another name"),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", listener.local_addr().unwrap());
        thread::scope(|scope| {
            scope.spawn(|| {
                let (mut socket, _) = listener.accept().unwrap();
                let mut peer = raw_server(own);
                while peer.is_handshaking() && peer.complete_io(&mut socket).is_ok() {}
            });
            let error = connect(&address.parse().unwrap(), Some(&tls), soon()).unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
            assert!(error.to_string().contains(&address), "{error}");
        });
    }
    // Told the name, it is.
    let named = TlsFiles {
        name: Some("elsewhere.example".into()),
        ..authority.host("host", &["localhost"])
    };
    let listener = listen("tcp:127.0.0.1:0", Some(&Tls::load(&other).unwrap()));
    ends(&listener, Some(&Tls::load(&named).unwrap()));
}

#[test]
fn an_authoritys_own_certificate_is_refused_in_words() {
    let authority = Authority::new();
    let own = authority.host_with("own", &["127.0.0.1"], |params| {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    });
    let error = Tls::load(&own).unwrap_err().to_string();
    assert!(error.contains("is an authority's (CA:TRUE)"), "{error}");
    assert!(!error.contains("OtherError"), "{error}");
}

#[test]
fn a_listener_without_tls_that_resets_the_connection_is_asked_about() {
    let authority = Authority::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", listener.local_addr().unwrap());
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut socket, _) = listener.accept().unwrap();
            // Closed with something unread, it is reset.
            socket.read_exact(&mut [0; 8]).unwrap();
        });
        let error = connect(&address.parse().unwrap(), Some(&authority.tls()), soon()).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("does it listen with TLS?"), "{error}");
    });
}

#[test]
fn a_certificate_for_the_other_purpose_is_refused() {
    let authority = Authority::new();
    let of = |file, purpose| {
        let files = authority.host_with(file, &["127.0.0.1"], |params| {
            params.extended_key_usages = vec![purpose];
        });
        Tls::load(&files).unwrap()
    };
    let server = of("server", ExtendedKeyUsagePurpose::ServerAuth);
    let client = of("client", ExtendedKeyUsagePurpose::ClientAuth);
    ends(&listen("tcp:127.0.0.1:0", Some(&server)), Some(&client));
    both_refuse(&listen("tcp:127.0.0.1:0", Some(&client)), Some(&client));
    both_refuse(&listen("tcp:127.0.0.1:0", Some(&server)), Some(&server));
}

#[test]
fn one_side_with_tls_and_one_without_have_no_connection() {
    let tls = Authority::new().tls();
    let listener = listen("tcp:127.0.0.1:0", Some(&tls));
    let mut peer = plain(&listener);
    peer.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let error = listener.accept(soon()).unwrap_err();
    assert!(matches!(error, AcceptError::Peer { .. }), "{error}");
    assert!(
        error.to_string().contains("what came is not TLS"),
        "{error}"
    );
    // And hears so, in TLS's words.
    let mut heard = Vec::new();
    let _ = peer.read_to_end(&mut heard);
    assert_eq!(heard.first(), Some(&21), "an alert: {heard:?}");

    // A client of ours is told what to give, by a peer that reads a byte first as well.
    for len in [1, 64] {
        thread::scope(|scope| {
            scope.spawn(|| listener.accept(soon()).unwrap_err());
            let mut client = connect(listener.address(), None, soon()).unwrap();
            client.write_all(b"\x89RVMW\r\n\x1a").unwrap();
            let error = client.read(&mut vec![0; len]).unwrap_err();
            assert!(
                error.to_string().contains("speaks TLS: give --tls-cert"),
                "{error}"
            );
        });
    }

    for duplex in [false, true] {
        let listener = listen("tcp:127.0.0.1:0", None);
        thread::scope(|scope| {
            let there = scope.spawn(|| {
                let mut peer = listener.accept(soon()).unwrap();
                match duplex {
                    true => Wire::read(&peer.duplex(), &mut [0; 3]).unwrap_err(),
                    false => peer.read_exact(&mut [0; 3]).unwrap_err(),
                }
            });
            let error = connect(listener.address(), Some(&tls), soon()).unwrap_err();
            assert!(matches!(error, ConnectError::Failed { .. }), "{error}");
            assert!(
                error.to_string().contains("does it listen with TLS?"),
                "{error}"
            );
            let error = there.join().unwrap().to_string();
            assert!(error.contains("speaks TLS: give --tls-cert"), "{error}");
        });
    }
    // What begins so and is no record is not TLS's.
    let listener = listen("tcp:127.0.0.1:0", None);
    let (mut one, mut other) = ends(&listener, None);
    for (bytes, got) in [(&[22, 4, 0][..], 3), (&[22, 3, 3], 3)] {
        one.write_all(bytes).unwrap();
        assert_eq!(other.read(&mut [0; 3]).unwrap(), got);
    }
}

#[test]
fn a_listener_that_takes_its_time_to_let_somebody_in_is_waited_for() {
    let authority = Authority::new();
    let tls = Tls::load(&authority.host("host", &["127.0.0.1"])).unwrap();
    let own = authority.host("there", &["127.0.0.1"]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", listener.local_addr().unwrap());
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut socket, _) = listener.accept().unwrap();
            let mut peer = raw_server(&own);
            while peer.is_handshaking() {
                peer.complete_io(&mut socket).unwrap();
            }
            // Longer than who waits looks whether that is still wanted.
            thread::sleep(Duration::from_millis(200));
            peer.writer().write_all(b"W").unwrap();
            peer.write_tls(&mut socket).unwrap();
        });
        connect(&address.parse().unwrap(), Some(&tls), soon()).unwrap();
    });
}

#[test]
fn pages_connections_end_with_a_word_of_tls() {
    let tls = Authority::new().tls();
    let listener = listen("tcp:127.0.0.1:0", Some(&tls));
    let (one, mut other) = ends(&listener, Some(&tls));
    Wire::shutdown(&one.duplex());
    assert_eq!(other.read(&mut [0; 8]).unwrap(), 0, "its end");
}

#[test]
fn who_connects_and_says_nothing_holds_a_tls_listener_no_longer_than_the_deadline() {
    let tls = Authority::new().tls();
    let listener = listen("tcp:127.0.0.1:0", Some(&tls));
    let _silent = plain(&listener);
    let error = listener.accept(Instant::now() + MOMENT).unwrap_err();
    assert!(matches!(error, AcceptError::Peer { .. }), "{error}");
    assert!(
        error.to_string().ends_with("is not done in time"),
        "{error}"
    );
    ends(&listener, Some(&tls));
}

#[test]
fn a_peer_that_is_silent_is_an_error_with_the_seconds() {
    for (_folder, listener, tls) in kinds() {
        let (mut one, mut other) = ends(&listener, tls.as_ref());
        one.set_patience(MOMENT);
        let error = one.read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let said = format!("{} has sent nothing for 0.02 s", listener.address());
        assert_eq!(error.to_string(), said);

        let error = loop {
            if let Err(error) = one.write(&[1; 64 << 10]) {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let said = format!("{} has taken nothing for 0.02 s", listener.address());
        assert_eq!(error.to_string(), said);
        // What it had taken is there.
        let mut byte = [0];
        other.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [1]);
    }
}

#[test]
fn who_drips_bytes_holds_a_tls_listener_no_longer_than_the_deadline() {
    let tls = Authority::new().tls();
    let listener = listen("tcp:127.0.0.1:0", Some(&tls));
    let mut dripping = plain(&listener);
    thread::scope(|scope| {
        scope.spawn(move || {
            // The head of a record as long as one may be, of which more and more comes.
            dripping.write_all(&[22, 3, 1, 0x40, 0]).unwrap();
            while dripping.write_all(&[1]).is_ok() {
                thread::sleep(Duration::from_millis(1));
            }
        });
        let error = listener.accept(Instant::now() + MOMENT).unwrap_err();
        assert!(matches!(error, AcceptError::Peer { .. }), "{error}");
        assert!(
            error.to_string().ends_with("is not done in time"),
            "{error}"
        );
    });
    ends(&listener, Some(&tls));
}

#[test]
fn a_connection_that_is_gone_is_an_error_with_the_peer() {
    for (_folder, listener, tls) in kinds() {
        let (mut one, mut other) = ends(&listener, tls.as_ref());
        one.write_all(&[1; 8]).unwrap();
        drop(one);
        let mut read = Vec::new();
        let end = other.read_to_end(&mut read);
        assert_eq!(read, [1; 8]);
        // Without TLS it is no error of the connection's: that something is missing is the messages' to see.
        assert_eq!(end.is_err(), tls.is_some());
        if let Err(error) = end {
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
            assert!(error.to_string().ends_with("was cut"), "{error}");
        }
        let error = loop {
            if let Err(error) = other.write(&[1; 4096]) {
                break error;
            }
        };
        // Who connected has a port of its own, or no name at all.
        let peer = match listener.address() {
            Address::Unix(_) => listener.address().to_string(),
            Address::Tcp { .. } => "tcp:127.0.0.1:".to_owned(),
        };
        assert!(error.to_string().starts_with(&peer), "{error}");
    }
}

#[test]
fn where_nobody_listens_one_is_refused_and_where_nobody_connects_there_is_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.sock");
    let free = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let place = format!("tcp:{free}");
    let error = connect(&place.parse().unwrap(), None, soon()).unwrap_err();
    assert_eq!(error.to_string(), format!("nobody listens at {place}"));
    // Who removes the path of one who listens must not make him look gone.
    let place = format!("unix:{}", path.display());
    let error = connect(&place.parse().unwrap(), None, soon()).unwrap_err();
    assert!(matches!(error, ConnectError::Missing(_)), "{error}");
    assert_eq!(
        error.to_string(),
        format!("nobody listens at {place}: there is no such socket")
    );
    for (_folder, listener, _) in kinds() {
        let error = listener.accept(Instant::now() + MOMENT).unwrap_err();
        assert!(matches!(error, AcceptError::Nobody(_)), "{error}");
    }
}

#[test]
fn what_is_no_certificate_or_no_secret_key_is_refused_with_the_file() {
    let authority = Authority::new();
    let good = authority.host("host", &["localhost"]);
    let error = |files: TlsFiles| Tls::load(&files).unwrap_err().to_string();
    let missing = authority.file("missing");
    for files in [
        TlsFiles {
            cert: missing.clone(),
            ..good.clone()
        },
        TlsFiles {
            key: missing.clone(),
            ..good.clone()
        },
        TlsFiles {
            ca: missing.clone(),
            ..good.clone()
        },
    ] {
        let said = error(files);
        assert!(said.starts_with(&format!("{}: ", missing.display())));
        assert!(said.contains("No such file"), "{said}");
    }
    let swapped = TlsFiles {
        cert: good.key.clone(),
        ..good.clone()
    };
    let said = error(swapped);
    assert!(said.contains("there is no certificate in it"), "{said}");
    let swapped = TlsFiles {
        key: good.cert.clone(),
        ..good.clone()
    };
    let said = error(swapped);
    assert!(said.contains("there is no key in it"), "{said}");

    let other = authority.host("other", &["localhost"]);
    let foreign = TlsFiles {
        key: other.key.clone(),
        ..good.clone()
    };
    let said = error(foreign);
    let why = format!(
        "{}: it is not the key of the certificate {}",
        other.key.display(),
        good.cert.display()
    );
    assert_eq!(said, why);

    let old = authority.host_with("old", &["localhost"], expired);
    let said = error(old.clone());
    assert!(said.starts_with(&old.cert.display().to_string()), "{said}");
    assert!(said.contains("has expired"), "{said}");

    let of_the_same_name = {
        let name = authority.folder.path().display().to_string();
        Authority::named(tempfile::tempdir().unwrap(), &name)
    };
    for foreign in [Authority::new(), of_the_same_name] {
        let stranger = TlsFiles {
            ca: foreign.file("ca.pem"),
            ..good.clone()
        };
        let said = error(stranger);
        assert!(said.contains("is of another authority"), "{said}");
    }

    let sealed =
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
    fs::write(&other.key, sealed).unwrap();
    let said = error(other);
    assert!(said.contains("without a passphrase"), "{said}");

    for mode in [0o644, 0o604, 0o602] {
        fs::set_permissions(&good.key, fs::Permissions::from_mode(mode)).unwrap();
        let error = Tls::load(&good).unwrap_err();
        assert!(matches!(error, TlsError::ExposedKey { .. }), "{error}");
    }
    fs::set_permissions(&good.key, fs::Permissions::from_mode(0o640)).unwrap();
    Tls::load(&good).unwrap();

    let nameless = TlsFiles {
        name: Some("no name".into()),
        ..good.clone()
    };
    assert_eq!(
        error(nameless),
        "\"no name\" is no name or IP address that a certificate could be for"
    );
}

/// Memory that frames are read into as they come.
struct Lending<'a>(VolatileSlice<'a>);

impl Sink for Lending<'_> {
    fn pages(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        panic!("a copy")
    }
    fn zeros(&mut self, address: u64, len: u64) -> io::Result<()> {
        let zeros = self.0.subslice(address as usize, len as usize).unwrap();
        zeros.copy_from(&vec![0_u8; len as usize]);
        Ok(())
    }
    fn lend(
        &mut self,
        runs: &[Range<u64>],
        fill: &mut dyn FnMut(&[VolatileSlice<'_>]),
    ) -> io::Result<bool> {
        let slice = |run: &Range<u64>| {
            let len = (run.end - run.start) as usize;
            self.0.subslice(run.start as usize, len).unwrap()
        };
        fill(&runs.iter().map(slice).collect::<Vec<_>>());
        Ok(true)
    }
}

/// A guest's memory with these contents.
fn guest(contents: &[u8]) -> GuestMemoryMmap<()> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), contents.len())]).unwrap();
    memory.write_slice(contents, GuestAddress(0)).unwrap();
    memory
}

fn all_of(memory: &GuestMemoryMmap<()>) -> VolatileSlice<'_> {
    let region = memory.find_region(GuestAddress(0)).unwrap();
    GuestMemoryRegion::as_volatile_slice(region).unwrap()
}

#[test]
fn guest_memory_goes_from_where_it_lies_to_where_it_belongs_by_every_kind_of_connection() {
    // Runs of zeros and single pages of them, and more than sockets hold.
    let zero = |page: usize| page.is_multiple_of(7) || (1000..1300).contains(&page);
    let mut here = vec![0_u8; 8 << 20];
    for (page, bytes) in here
        .chunks_mut(PAGE)
        .enumerate()
        .filter(|(page, _)| !zero(*page))
    {
        bytes.fill(page as u8 | 1);
        bytes[17] = (page >> 8) as u8;
    }
    let before = here.clone();
    let memory = guest(&here);
    for (_folder, listener, tls) in kinds() {
        let (mut one, mut other) = ends(&listener, tls.as_ref());
        one.set_patience(Duration::from_millis(1));
        let mut there = vec![5_u8; before.len()];
        let ticks = AtomicUsize::new(0);
        let sent = AtomicUsize::new(0);
        let counts = thread::scope(|scope| {
            let (ticks, sent, memory) = (&ticks, &sent, &memory);
            let sender = scope.spawn(move || {
                let stop = || {
                    ticks.fetch_add(1, Ordering::SeqCst);
                    None
                };
                let quiet = Duration::from_secs(60);
                let patient = Patient::new(&mut one, Watch { quiet, stop: &stop });
                // A limit that cuts each frame.
                let rate = NonZeroU64::new(4 << 30).unwrap();
                let mut out = Limited::new(patient, Arc::new(Limiter::new(Some(rate))));
                let mut encoder = Encoder::new(Compression::None).unwrap();
                encoder.set_checksums(false);
                let memory = all_of(memory);
                let half = memory.len() / 2;
                for (at, slice) in [(0, memory.subslice(0, half)), (half, memory.offset(half))] {
                    encoder
                        .lent(&[(at as u64, slice.unwrap())], &mut out)
                        .unwrap();
                }
                encoder.mark(7, &mut out).unwrap();
                sent.store(1, Ordering::SeqCst);
                encoder.counts()
            });
            // It has had to come again some times before anything is taken.
            while ticks.load(Ordering::SeqCst) < 3 && sent.load(Ordering::SeqCst) == 0 {
                thread::yield_now();
            }
            let mut decoder = Decoder::new().unwrap();
            let mut sink = Lending(VolatileSlice::from(&mut there[..]));
            while decoder.frame(&mut other, &mut sink).unwrap() != Frame::Mark(7) {}
            let counts = sender.join().unwrap();
            assert_eq!(decoder.counts(), counts);
            counts
        });
        assert!(there == before, "{}", listener.address());
        let zeros = (0..before.len() / PAGE).filter(|page| zero(*page)).count() as u64;
        assert_eq!(counts.zero_pages, zeros);
        assert!(ticks.into_inner() >= 3, "{}", listener.address());
    }
}

#[test]
fn memory_that_the_system_cannot_reach_is_an_error_of_the_memory_on_either_side() {
    let len = 4 * PAGE;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
    assert_ne!(start, libc::MAP_FAILED);
    let start: *mut u8 = start.cast();
    // SAFETY: the third page of it, to which nobody has a reference.
    let hidden = unsafe { libc::mprotect(start.add(2 * PAGE).cast(), PAGE, libc::PROT_NONE) };
    assert_eq!(hidden, 0);
    // SAFETY: it stays mapped, and who accesses it by this is the kernel alone, which may fail.
    let memory = unsafe { VolatileSlice::new(start, len) };
    for (_folder, listener, _) in kinds().into_iter().filter(|(_, _, tls)| tls.is_none()) {
        let (mut one, mut other) = ends(&listener, None);
        let slices = [memory];
        let mut parts = Parts::new(b"head", &slices);
        let error = loop {
            match one.write_pages(parts) {
                Ok(sent) => parts = parts.behind(sent),
                Err(error) => break error,
            }
        };
        assert!(is_fault(&error), "{error}");
        assert!(parts.len() >= 2 * PAGE, "{parts:?}");
        drop(one);
        let mut came = Vec::new();
        other.read_to_end(&mut came).unwrap();
        assert_eq!(came.len(), 4 + len - parts.len());

        let (mut one, mut other) = ends(&listener, None);
        let mut source = vec![9_u8; len];
        let lent = [(0, VolatileSlice::from(&mut source[..]))];
        let mut encoder = Encoder::new(Compression::None).unwrap();
        encoder.set_checksums(false);
        encoder.lent(&lent, &mut one).unwrap();
        let mut decoder = Decoder::new().unwrap();
        let error = decoder.frame(&mut other, &mut Lending(memory)).unwrap_err();
        assert!(matches!(error, DecodeError::Sink(_)), "{error}");
        let error = error.to_string();
        assert!(error.contains("cannot reach this guest memory"), "{error}");
    }
}

#[test]
fn a_guest_that_writes_while_it_is_sent_spoils_no_frame() {
    let folder = tempfile::tempdir().unwrap();
    let place = format!("unix:{}", folder.path().join("x.sock").display());
    let listener = listen(&place, None);
    let (mut one, mut other) = ends(&listener, None);
    let mut there = vec![0_u8; 300 * PAGE];
    let memory = guest(&there);
    let rounds = 50;
    let over = AtomicUsize::new(0);
    thread::scope(|scope| {
        // Pages become zero, and are zero no more, at any moment.
        let (over, memory) = (&over, &memory);
        let guest = scope.spawn(move || {
            let mut turn = 0_usize;
            while over.load(Ordering::SeqCst) == 0 {
                let page = all_of(memory)
                    .subslice(turn * 7 % 300 * PAGE, PAGE)
                    .unwrap();
                page.copy_from(&[(turn % 2) as u8 * 3; PAGE]);
                turn += 1;
            }
        });
        let sender = scope.spawn(move || {
            let mut encoder = Encoder::new(Compression::None).unwrap();
            encoder.set_checksums(false);
            for round in 0..rounds {
                // The guest stands still for the last.
                if round + 1 == rounds {
                    over.store(1, Ordering::SeqCst);
                    while !guest.is_finished() {
                        thread::yield_now();
                    }
                }
                encoder.lent(&[(0, all_of(memory))], &mut one).unwrap();
                encoder.mark(round, &mut one).unwrap();
            }
            encoder.counts()
        });
        let mut decoder = Decoder::new().unwrap();
        let mut sink = Lending(VolatileSlice::from(&mut there[..]));
        let mut marks = 0;
        while marks < rounds {
            match decoder.frame(&mut other, &mut sink).unwrap() {
                Frame::Pages => {}
                frame => {
                    assert_eq!(frame, Frame::Mark(marks));
                    marks += 1;
                }
            }
        }
        assert_eq!(decoder.counts(), sender.join().unwrap());
    });
    let mut here = vec![0; there.len()];
    all_of(&memory).copy_to(&mut here);
    assert!(there == here);
}

#[test]
fn a_unix_socket_with_tls_wants_to_know_the_name() {
    let folder = tempfile::tempdir().unwrap();
    let address = Address::Unix(folder.path().join("x.sock"));
    let tls = Authority::new().tls();
    let _listener = Listener::bind(&address, Some(&tls)).unwrap();
    let error = connect(&address, Some(&tls), soon()).unwrap_err();
    assert!(error.to_string().contains("--tls-name"), "{error}");
}

#[test]
fn who_says_nothing_where_tls_is_wanted_is_let_go_when_nobody_wants_to_hear_it() {
    let house = Authority::new();
    let listener = listen("tcp:127.0.0.1:0", Some(&house.tls()));
    let _silent = plain(&listener);
    let caller = listener.caller(soon()).unwrap();
    let asked = std::cell::Cell::new(0);
    let stop = || {
        asked.set(asked.get() + 1);
        asked.get() == 3
    };
    let why = caller.answer(soon(), &stop).unwrap_err().to_string();
    assert!(why.contains("not heard any more"), "{why}");
    assert_eq!(asked.get(), 3);
}
