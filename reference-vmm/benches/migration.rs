// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory from one process's mapping to another's through a socket: what a migration's data connection goes through
//! on either side, its limit and its patience with it, against what one would write by hand: `write_all` and `read_exact` of
//! 1 MiB between the same two mappings, through a bare socket of the same kind. Both take turns, and a ratio is the median of
//! the turns' own. All of the memory is present before. It is noise, so that nothing of it is left out; then what zstd and
//! TLS cost, and what zeros do: bytes of guest memory a second, whatever of them is sent.
//!
//! `cargo bench -p reference-vmm --bench migration [-- MiB [ratios]]`; `ratios` leaves zstd and TLS out.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use reference_vmm::migration::address::Address;
use reference_vmm::migration::codec::{Compression, Decoder, Encoder, Frame, Sink};
use reference_vmm::migration::limit::{Limited, Limiter};
use reference_vmm::migration::link::{Patient, TICK, Watch};
use reference_vmm::migration::tls::{Tls, TlsFiles};
use reference_vmm::migration::transport::{Connection, Listener, connect};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

const PIECE: usize = 1 << 20;
const TURNS: usize = 11;

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

    fn lend(
        &mut self,
        runs: &[Range<u64>],
        fill: &mut dyn FnMut(&[VolatileSlice<'_>]),
    ) -> io::Result<bool> {
        let slice = |run: &Range<u64>| slice(self.0, run.start, run.end - run.start);
        fill(&runs.iter().map(slice).collect::<Vec<_>>());
        Ok(true)
    }
}

fn slice(memory: &Memory, at: u64, len: u64) -> VolatileSlice<'_> {
    GuestMemoryBackend::get_slice(memory, GuestAddress(at), len as usize).unwrap()
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

/// A part of memory.
#[derive(Clone, Copy)]
struct Part<'a> {
    memory: &'a Memory,
    at: usize,
    len: usize,
}

impl Part<'_> {
    fn pieces(self) -> impl Iterator<Item = *mut u8> {
        (self.at..self.at + self.len).step_by(PIECE).map(move |at| {
            let at = GuestAddress(at as u64);
            self.memory.get_host_address(at).unwrap()
        })
    }
}

fn copy_from(from: Part<'_>, to: &mut impl Write) {
    for piece in from.pieces() {
        // SAFETY: within the mapping, which nobody writes to meanwhile.
        let piece = unsafe { std::slice::from_raw_parts(piece, PIECE) };
        to.write_all(piece).unwrap();
    }
}

fn copy_to(to: Part<'_>, from: &mut impl Read) {
    for piece in to.pieces() {
        // SAFETY: within the mapping; each thread has a part of it for itself.
        let piece = unsafe { std::slice::from_raw_parts_mut(piece, PIECE) };
        from.read_exact(piece).unwrap();
    }
}

fn watch() -> Watch<'static> {
    Watch {
        quiet: Duration::from_secs(60),
        stop: &|| None,
    }
}

fn send(mut to: Connection, from: Part<'_>, (compression, checksums): (Compression, bool)) {
    to.set_patience(TICK);
    let limit = Arc::new(Limiter::new(None));
    let mut out = Limited::new(Patient::new(&mut to, watch()), limit);
    let mut encoder = Encoder::new(compression).unwrap();
    encoder.set_checksums(checksums);
    for at in (from.at as u64..(from.at + from.len) as u64).step_by(PIECE) {
        let piece = slice(from.memory, at, PIECE as u64);
        encoder.lent(&[(at, piece)], &mut out).unwrap();
    }
    encoder.mark(0, &mut out).unwrap();
}

fn receive(mut from: Connection, to: &Memory) {
    from.set_patience(TICK);
    let mut from = Patient::new(&mut from, watch());
    let mut decoder = Decoder::new().unwrap();
    while decoder.frame(&mut from, &mut Guest(to)).unwrap() == Frame::Pages {}
}

fn connected(way: Way<'_>) -> (Connection, Connection) {
    let folder = tempfile::tempdir().unwrap();
    let address = match way.tcp {
        true => "tcp:127.0.0.1:0".parse().unwrap(),
        false => Address::Unix(folder.path().join("x.sock")),
    };
    let listener = Listener::bind(&address, way.tls).unwrap();
    let soon = Instant::now() + Duration::from_secs(60);
    thread::scope(|scope| {
        let accepted = scope.spawn(|| listener.accept(soon).unwrap());
        let connected = connect(listener.address(), way.tls, soon).unwrap();
        (connected, accepted.join().unwrap())
    })
}

fn bare_tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let connected = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (connected, listener.accept().unwrap().0)
}

type Work<'a> = Box<dyn FnOnce() + Send + 'a>;

/// What the two ends of a connection do; each closes its own.
fn work<'a>([from, to]: [Part<'a>; 2], way: Way<'_>) -> [Work<'a>; 2] {
    match (way.codec, way.tcp) {
        (Some(codec), _) => {
            let (here, there) = connected(way);
            let memory = to.memory;
            [
                Box::new(move || send(here, from, codec)),
                Box::new(move || receive(there, memory)),
            ]
        }
        (None, true) => {
            let (mut here, mut there) = bare_tcp();
            [
                Box::new(move || copy_from(from, &mut here)),
                Box::new(move || copy_to(to, &mut there)),
            ]
        }
        (None, false) => {
            let (mut here, mut there) = UnixStream::pair().unwrap();
            [
                Box::new(move || copy_from(from, &mut here)),
                Box::new(move || copy_to(to, &mut there)),
            ]
        }
    }
}

fn once(from: &Memory, to: &Memory, bytes: usize, way: Way<'_>) -> [Duration; 2] {
    let len = bytes / way.connections;
    let parts = (0..way.connections).map(|number| {
        let at = number * len;
        [from, to].map(|memory| Part { memory, at, len })
    });
    let work: Vec<_> = parts.map(|parts| work(parts, way)).collect();
    let (begun, busy) = (Instant::now(), processor_time());
    thread::scope(|scope| {
        for work in work.into_iter().flatten() {
            // So that a profiler tells them apart.
            let name = match way.codec {
                None => "copy",
                Some((_, false)) => "frames",
                Some((_, true)) => "checksums",
            };
            let builder = thread::Builder::new().name(name.into());
            builder.spawn_scoped(scope, work).unwrap();
        }
    });
    [begun.elapsed(), processor_time() - busy]
}

/// What this process has had of the processors so far: on a host that is busy with other things it says more than a clock.
fn processor_time() -> Duration {
    // SAFETY: plain numbers, which the call fills; it is of this process.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::getrusage(libc::RUSAGE_SELF, &mut usage), 0);
        usage
    };
    let of = |time: libc::timeval| {
        Duration::from_secs(time.tv_sec as u64) + Duration::from_micros(time.tv_usec as u64)
    };
    of(usage.ru_utime) + of(usage.ru_stime)
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// The medians of the ways' speeds, in MB/s, and of their ratios to the first's, in percent: by the clock, and by the
/// processors' time that they take. They take turns.
fn race<const N: usize>(
    contents: Contents,
    bytes: usize,
    ways: [Way<'_>; N],
) -> ([f64; N], [[f64; N]; 2]) {
    let (from, to) = (memory(bytes), memory(bytes));
    fill(&from, bytes, contents);
    fill(&to, bytes, Contents::Noise);
    let mut turns = [const { Vec::new() }; N];
    for _ in 0..TURNS {
        for (way, turns) in ways.iter().zip(&mut turns) {
            let took = once(&from, &to, bytes, *way);
            turns.push(took.map(|took| took.as_secs_f64()));
        }
    }
    let ratios = [0, 1].map(|which| {
        turns.each_ref().map(|took| {
            let each = took.iter().zip(&turns[0]);
            median(
                each.map(|(took, first)| 100.0 * first[which] / took[which])
                    .collect(),
            )
        })
    });
    let speeds = turns.map(|took| {
        let took = took.into_iter().map(|[clock, _]| clock).collect();
        bytes as f64 / median(took) / 1e6
    });
    (speeds, ratios)
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
    let ratios_alone = std::env::args().any(|arg| arg == "ratios");
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
        "| socket | connections | plain copy | frames | ratio | of processor time | frames with checksums | ratio | \
         of processor time |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for (name, tcp) in [("unix", false), ("tcp", true)] {
        for connections in [1, 2] {
            let with = |codec| Way {
                connections,
                tcp,
                codec,
                ..plain
            };
            let ways = [None, raw, summed].map(with);
            let (speeds, ratios) = race(Contents::Noise, bytes, ways);
            let ([copy, frames, sums], [clock, processors]) = (speeds, ratios);
            println!(
                "| {name} | {connections} | {copy:.0} | {frames:.0} | {:.0} % | {:.0} % | {sums:.0} | {:.0} % | {:.0} % |",
                clock[1], processors[1], clock[2], processors[2],
            );
        }
    }
    if ratios_alone {
        return;
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
        let [noise, program, zeros] = each.map(|contents| race(contents, bytes / 2, [way]).0[0]);
        println!("| {name} | {noise:.0} | {program:.0} | {zeros:.0} |");
    }
}
