// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory from one process's mapping to another's through a socket: a migration's sender and receiver against plain
//! `write(2)` and `read(2)` of 1 MiB between two mappings of the same size, in one run, turn by turn. The memory is noise,
//! so that nothing of it is left out; then what zstd and TLS cost, and what zeros do: bytes of guest memory a second, whatever of them is sent.
//!
//! `cargo bench -p reference-vmm --bench migration [-- MiB]`

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::io::{self, Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use reference_vmm::migration::address::Address;
use reference_vmm::migration::codec::{Compression, Decoder, Encoder, Frame, Sink};
use reference_vmm::migration::tls::{Tls, TlsFiles};
use reference_vmm::migration::transport::{Connection, Listener, connect};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const PIECE: usize = 1 << 20;
const TURNS: usize = 7;

type Memory = GuestMemoryMmap<()>;

fn memory(bytes: usize) -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), bytes)]).unwrap()
}

/// What is in guest memory.
#[derive(Clone, Copy)]
enum Contents {
    Noise,
    /// This program, again and again.
    Program,
    Zeros,
}

fn fill(memory: &Memory, bytes: usize, contents: Contents) {
    let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    let mut program = program.iter().copied().cycle();
    let mut state = 1_u64;
    let mut page = [0; 4096];
    for at in (0..bytes).step_by(page.len()) {
        for word in page.as_chunks_mut::<8>().0 {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(99);
            *word = match contents {
                Contents::Noise => (state ^ (state >> 29)).to_le_bytes(),
                Contents::Program => std::array::from_fn(|_| program.next().unwrap()),
                Contents::Zeros => [0; 8],
            };
        }
        memory.write_slice(&page, GuestAddress(at as u64)).unwrap();
    }
}

struct Guest<'a>(&'a Memory);

impl Sink for Guest<'_> {
    fn pages(&mut self, address: u64, contents: &[u8]) -> io::Result<()> {
        let written = self.0.write_slice(contents, GuestAddress(address));
        written.map_err(io::Error::other)
    }

    fn zeros(&mut self, _: u64, _: u64) -> io::Result<()> {
        // Memory that is as it was made.
        Ok(())
    }
}

/// How it goes over.
#[derive(Clone, Copy)]
struct Way<'a> {
    connections: usize,
    tcp: bool,
    tls: Option<&'a Tls>,
    /// None is the plain copy.
    codec: Option<(Compression, bool)>,
}

fn send(mut to: Connection, from: &Memory, at: usize, len: usize, way: Way<'_>) {
    let Some((compression, checksums)) = way.codec else {
        for at in (at..at + len).step_by(PIECE) {
            let host = from.get_host_address(GuestAddress(at as u64)).unwrap();
            // SAFETY: within the mapping, which nobody writes to meanwhile.
            let piece = unsafe { std::slice::from_raw_parts(host, PIECE) };
            to.write_all(piece).unwrap();
        }
        return;
    };
    let mut encoder = Encoder::new(compression).unwrap();
    encoder.set_checksums(checksums);
    let copy = |at, into: &mut [u8]| {
        let read = from.read_slice(into, GuestAddress(at));
        read.map_err(io::Error::other)
    };
    encoder.pages(at as u64, len as u64, copy, &mut to).unwrap();
    encoder.mark(0, &mut to).unwrap();
}

fn receive(mut from: Connection, to: &Memory, at: usize, len: usize, way: Way<'_>) {
    if way.codec.is_none() {
        for at in (at..at + len).step_by(PIECE) {
            let host = to.get_host_address(GuestAddress(at as u64)).unwrap();
            // SAFETY: within the mapping; each thread has a part of it for itself.
            let piece = unsafe { std::slice::from_raw_parts_mut(host, PIECE) };
            from.read_exact(piece).unwrap();
        }
        return;
    }
    let mut decoder = Decoder::new().unwrap();
    while decoder.frame(&mut from, &mut Guest(to)).unwrap() == Frame::Pages {}
}

fn once(from: &Memory, to: &Memory, bytes: usize, way: Way<'_>) -> Duration {
    let folder = tempfile::tempdir().unwrap();
    let address = match way.tcp {
        true => "tcp:127.0.0.1:0".parse().unwrap(),
        false => Address::Unix(folder.path().join("x.sock")),
    };
    let listener = Listener::bind(&address, way.tls).unwrap();
    let soon = Instant::now() + Duration::from_secs(60);
    let ends: Vec<_> = (0..way.connections)
        .map(|_| {
            thread::scope(|scope| {
                let accepted = scope.spawn(|| listener.accept(soon).unwrap());
                let connected = connect(listener.address(), way.tls, soon).unwrap();
                (connected, accepted.join().unwrap())
            })
        })
        .collect();
    let part = bytes / way.connections;
    let begun = Instant::now();
    thread::scope(|scope| {
        for (number, (connected, accepted)) in ends.into_iter().enumerate() {
            let at = number * part;
            scope.spawn(move || send(connected, from, at, part, way));
            scope.spawn(move || receive(accepted, to, at, part, way));
        }
    });
    begun.elapsed()
}

/// The medians of what the ways take, turn by turn.
fn race<const N: usize>(contents: Contents, bytes: usize, ways: [Way<'_>; N]) -> [f64; N] {
    let (from, to) = (memory(bytes), memory(bytes));
    fill(&from, bytes, contents);
    fill(&to, bytes, Contents::Zeros);
    let mut took = [const { Vec::new() }; N];
    for _ in 0..TURNS {
        for (way, took) in ways.iter().zip(&mut took) {
            took.push(once(&from, &to, bytes, *way));
        }
    }
    took.map(|mut took| {
        took.sort();
        bytes as f64 / took[TURNS / 2].as_secs_f64() / 1e6
    })
}

fn tls() -> Tls {
    let folder = tempfile::tempdir().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let host = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    let files = TlsFiles {
        cert: folder.path().join("cert"),
        key: folder.path().join("key"),
        ca: folder.path().join("ca"),
        name: None,
    };
    let cert = host.signed_by(&key, &issuer).unwrap();
    std::fs::write(&files.cert, cert.pem()).unwrap();
    std::fs::write(&files.key, key.serialize_pem()).unwrap();
    std::fs::write(&files.ca, issuer.pem()).unwrap();
    let secret = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&files.key, secret).unwrap();
    Tls::load(&files).unwrap()
}

fn main() {
    let mib = std::env::args().skip(1).find_map(|arg| arg.parse().ok());
    let bytes = mib.unwrap_or(512_usize) << 20;
    let plain = Way {
        connections: 1,
        tcp: false,
        tls: None,
        codec: None,
    };
    let raw = Some((Compression::None, false));
    let summed = Some((Compression::None, true));
    println!("{} MiB, MB/s, median of {TURNS}, in turns", bytes >> 20);
    println!(
        "| socket | connections | plain copy | frames | ratio | frames with checksums | ratio |"
    );
    println!("|---|---|---|---|---|---|---|");
    for (name, tcp) in [("unix", false), ("tcp", true)] {
        for connections in [1, 2] {
            let with = |codec| Way {
                connections,
                tcp,
                codec,
                ..plain
            };
            let ways = [None, raw, summed].map(with);
            let [copy, frames, sums] = race(Contents::Noise, bytes, ways);
            println!(
                "| {name} | {connections} | {copy:.0} | {frames:.0} | {:.0} % | {sums:.0} | {:.0} % |",
                100.0 * frames / copy,
                100.0 * sums / copy
            );
        }
    }
    let tls = tls();
    println!("\n| one connection | noise | a program | zeros |");
    println!("|---|---|---|---|");
    let zstd = |level| Some((Compression::Zstd { level }, true));
    for (name, tcp, tls, codec) in [
        ("unix, frames", false, None, raw),
        ("unix, zstd:-3", false, None, zstd(-3)),
        ("unix, zstd:1", false, None, zstd(1)),
        ("unix, zstd:3", false, None, zstd(3)),
        ("tcp, frames", true, None, raw),
        ("tcp with TLS, frames", true, Some(&tls), raw),
    ] {
        let way = Way {
            connections: 1,
            tcp,
            tls,
            codec,
        };
        let each = [Contents::Noise, Contents::Program, Contents::Zeros];
        let [noise, program, zeros] = each.map(|contents| race(contents, bytes / 2, [way])[0]);
        println!("| {name} | {noise:.0} | {program:.0} | {zeros:.0} |");
    }
}
