// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What `cargo xtask bench io` runs on both sides of a guest's devices: `guest-io guest` in the guest measures,
//! `guest-io host` in the lab answers. Linked statically, so that a guest needs nothing else. `guest-io vsock` and
//! `guest-io records` are for the lab's tests: they look at each byte, and measure nothing.
//!
//! The guest's times are its own clock's. A disk is read and written past the page cache (`O_DIRECT`).

#[path = "guest_io/cold.rs"]
mod cold;

use std::alloc::{Layout, alloc_zeroed};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// The host's address on the tap.
const HOST: &str = "192.168.127.1";
/// Takes what it is sent.
const SINK: u16 = 5001;
/// Sends until the other side closes.
const SOURCE: u16 = 5002;
/// Echoes, over vsock.
const ECHO: u32 = 5000;
const CID_HOST: u32 = 2;
const CID_ANY: u32 = u32::MAX;

const MIB: usize = 1 << 20;
/// Bytes over TCP, each way.
const STREAM: usize = 16 * MIB;
/// Sequential bytes of the disk.
const SEQUENTIAL: usize = 32 * MIB;
const RANDOM_OPERATIONS: u32 = 1600;
const DEPTH: u32 = 16;
const ROUND_TRIPS: u32 = 1000;

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["guest"] => guest(),
        ["vsock", round] => vsock_bytes(round),
        ["round-trips"] => vsock(),
        ["records", folder] => records(Path::new(folder)),
        ["host", "unix", path] => host(Some(path)),
        ["host", "vsock"] => host(None),
        ["tap", name] => tap(name),
        ["beat"] => beat(),
        ["busy"] => busy(),
        ["cold", pages] => cold::cold(pages),
        _ => Err(io::Error::other(
            "guest, vsock ROUND, round-trips, records FOLDER, host unix PATH, host vsock, tap NAME, beat, busy, or cold PAGES",
        )),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-io: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A dot every five milliseconds, for who wants to know whether the guest goes on.
fn beat() -> io::Result<()> {
    let mut out = io::stdout();
    out.write_all(b"guest: beat\n")?;
    loop {
        out.write_all(b".")?;
        out.flush()?;
        thread::sleep(Duration::from_millis(5));
    }
}

/// Writes a word of each page of 256 MiB, again and again.
fn busy() -> io::Result<()> {
    let memory = buffer(256 << 20)?;
    let mut pass = 0_u8;
    loop {
        pass = pass.wrapping_add(1);
        for page in memory.chunks_mut(4096) {
            if let Some(first) = page.first_mut() {
                *first = pass;
            }
        }
        std::hint::black_box(&*memory);
    }
}

/// One result, as the bench reads it.
fn say(name: &str, value: f64) {
    println!("guest: io {name} {value:.3}");
}

fn guest() -> io::Result<()> {
    disk()?;
    network()?;
    vsock()
}

/// A page-aligned buffer, as `O_DIRECT` wants it. It lives as long as the process.
fn buffer(len: usize) -> io::Result<&'static mut [u8]> {
    let layout = Layout::from_size_align(len, 4096).map_err(io::Error::other)?;
    // SAFETY: the size is not 0. The memory is zeroed, `len` bytes long, and never freed.
    unsafe {
        let start = alloc_zeroed(layout);
        if start.is_null() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(std::slice::from_raw_parts_mut(start, len))
    }
}

fn disk() -> io::Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open("/dev/vda")?;
    let data = buffer(MIB)?;
    data.fill(0x5a);
    let rate = |begun: Instant| SEQUENTIAL as f64 / MIB as f64 / begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    for at in (0..SEQUENTIAL).step_by(MIB) {
        file.write_all_at(data, at as u64)?;
    }
    file.sync_data()?;
    say("disk-write-MiB/s", rate(begun));
    let begun = Instant::now();
    for at in (0..SEQUENTIAL).step_by(MIB) {
        file.read_exact_at(data, at as u64)?;
    }
    say("disk-read-MiB/s", rate(begun));

    let operations = f64::from(RANDOM_OPERATIONS);
    let begun = Instant::now();
    random(&file, 1, RANDOM_OPERATIONS, false)?;
    say(
        "disk-random-read-IOPS",
        operations / begun.elapsed().as_secs_f64(),
    );
    let begun = Instant::now();
    random(&file, 2, RANDOM_OPERATIONS, true)?;
    say(
        "disk-random-write-IOPS",
        operations / begun.elapsed().as_secs_f64(),
    );

    let file = Arc::new(file);
    let begun = Instant::now();
    let threads: Vec<_> = (0..DEPTH)
        .map(|number| {
            let file = file.clone();
            let each = RANDOM_OPERATIONS / DEPTH;
            thread::spawn(move || random(&file, 3 + number, each, false))
        })
        .collect();
    for thread in threads {
        thread
            .join()
            .map_err(|_| io::Error::other("a thread panicked"))??;
    }
    say(
        "disk-16-readers-IOPS",
        operations / begun.elapsed().as_secs_f64(),
    );
    Ok(())
}

/// 4 KiB operations at places that a seed decides.
fn random(file: &File, seed: u32, operations: u32, write: bool) -> io::Result<()> {
    let data = buffer(4096)?;
    let mut state = u64::from(seed) << 32 | 0x9e37_79b9;
    for _ in 0..operations {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let at = state % (SEQUENTIAL as u64 / 4096) * 4096;
        if write {
            file.write_all_at(data, at)?;
        } else {
            file.read_exact_at(data, at)?;
        }
    }
    Ok(())
}

fn network() -> io::Result<()> {
    let mut data = vec![0x5a; 256 << 10];
    let rate = |begun: Instant, bytes| bytes as f64 / MIB as f64 / begun.elapsed().as_secs_f64();
    let mut sink = TcpStream::connect((HOST, SINK))?;
    let begun = Instant::now();
    for _ in (0..STREAM).step_by(data.len()) {
        sink.write_all(&data)?;
    }
    // The host closes when it has all.
    sink.shutdown(std::net::Shutdown::Write)?;
    while sink.read(&mut data)? > 0 {}
    say("tcp-send-MiB/s", rate(begun, STREAM));

    let mut source = TcpStream::connect((HOST, SOURCE))?;
    let begun = Instant::now();
    let mut bytes = 0;
    while bytes < STREAM {
        match source.read(&mut data)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            some => bytes += some,
        }
    }
    say("tcp-receive-MiB/s", rate(begun, bytes));
    Ok(())
}

fn vsock() -> io::Result<()> {
    let mut socket = vsock_connect(CID_HOST, ECHO)?;
    let mut data = [7; 64];
    let begun = Instant::now();
    for _ in 0..ROUND_TRIPS {
        socket.write_all(&data)?;
        socket.read_exact(&mut data)?;
    }
    let micros = begun.elapsed().as_secs_f64() * 1e6;
    say("vsock-round-trip-us", micros / f64::from(ROUND_TRIPS));
    Ok(())
}

/// A stream to the host's echo at port 5001, with both ends' half closes, and an echo at port 1234 of one connection.
fn vsock_bytes(round: &str) -> io::Result<()> {
    const LEN: usize = 8 * MIB;
    const OUT: u32 = 5001;
    const IN: u32 = 1234;
    let noise = |at: usize| (at.wrapping_mul(0x9e37_79b1) >> 11) as u8;

    let mut out = vsock_connect(CID_HOST, OUT)?;
    let mut writer = out.try_clone()?;
    let writing = thread::spawn(move || -> io::Result<()> {
        let data: Vec<u8> = (0..LEN).map(noise).collect();
        // Sizes from a byte up, and ends that are nobody's multiple.
        let mut rest = &data[..];
        let mut len = 1;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(len.min(rest.len()));
            writer.write_all(now)?;
            (rest, len) = (later, len * 3 % 200_001 + 1);
        }
        // SAFETY: no memory is passed.
        match unsafe { libc::shutdown(writer.as_raw_fd(), libc::SHUT_WR) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    });
    let mut back = Vec::new();
    out.read_to_end(&mut back)?;
    let joined = writing.join();
    joined.map_err(|_| io::Error::other("a thread panicked"))??;
    let same = back.len() == LEN && back.iter().enumerate().all(|(at, byte)| *byte == noise(at));
    if !same {
        let got = back.len();
        return Err(io::Error::other(format!(
            "{got} bytes came back, not those"
        )));
    }
    println!("guest: vsock out {LEN}");
    match vsock_connect(CID_HOST, OUT + 1) {
        Err(error) => println!("guest: vsock refused {}", error.kind()),
        Ok(_) => {
            return Err(io::Error::other(
                "nobody listens there, and it is connected",
            ));
        }
    }

    let listener = vsock_listener(IN)?;
    println!("guest: vsock listening {round}");
    let none = std::ptr::null_mut();
    // SAFETY: null takes no address back.
    let peer = unsafe { libc::accept(listener.as_raw_fd(), none, none.cast()) };
    if peer < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: new, and ours alone.
    let mut peer = unsafe { File::from_raw_fd(peer) };
    let echoed = io::copy(&mut peer.try_clone()?, &mut peer)?;
    println!("guest: vsock in {echoed}");
    Ok(())
}

/// Bytes of a record.
const RECORD: usize = 4096;

/// The record of that number, which the tests know as well: each 8 bytes of it follow from the number.
fn record(number: u64) -> Vec<u8> {
    (0..RECORD as u64 / 8)
        .flat_map(|at| {
            (number << 16 | at)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .to_le_bytes()
        })
        .collect()
}

/// Adds records to a file and files to a folder until it is killed, and says of each that it is durable when `fsync`
/// has returned. Beside it another file is written and flushed all the time, of which nothing is said.
fn records(folder: &Path) -> io::Result<()> {
    let noise = File::create(folder.join("noise"))?;
    thread::spawn(move || {
        let data = vec![0xa5; 64 << 10];
        for at in (0..64).cycle() {
            let written = noise.write_all_at(&data, at * data.len() as u64);
            if let Err(error) = written.and_then(|()| noise.sync_data()) {
                println!("guest: noise {error}");
                return;
            }
        }
    });
    let file = folder.join("records");
    let options = OpenOptions::new().write(true).create(true).clone();
    let file = options.open(file)?;
    let directory = File::open(folder)?;
    directory.sync_all()?;
    for number in file.metadata()?.len() / RECORD as u64.. {
        file.write_all_at(&record(number), number * RECORD as u64)?;
        file.sync_all()?;
        println!("guest: record {number}");
        if number % 8 == 0 {
            let path = folder.join(format!("file-{number}"));
            let mut file = File::create(path)?;
            file.write_all(&record(number))?;
            file.sync_all()?;
            directory.sync_all()?;
            println!("guest: file {number}");
        }
    }
    Ok(())
}

fn vsock_connect(cid: u32, port: u32) -> io::Result<File> {
    let socket = vsock_socket()?;
    let address = vsock_address(cid, port);
    // SAFETY: the address lives through the call, and the length is its own.
    let connected = unsafe {
        let len = size_of_val(&address) as u32;
        libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len)
    };
    match connected {
        0 => Ok(File::from(socket)),
        _ => Err(io::Error::last_os_error()),
    }
}

fn vsock_listener(port: u32) -> io::Result<OwnedFd> {
    let listener = vsock_socket()?;
    let address = vsock_address(CID_ANY, port);
    // SAFETY: the address lives through the call, and the length is its own.
    let listens = unsafe {
        let len = size_of_val(&address) as u32;
        libc::bind(listener.as_raw_fd(), (&raw const address).cast(), len) == 0
            && libc::listen(listener.as_raw_fd(), 8) == 0
    };
    match listens {
        true => Ok(listener),
        false => Err(io::Error::last_os_error()),
    }
}

fn vsock_socket() -> io::Result<OwnedFd> {
    // SAFETY: it makes a descriptor or fails.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: new, and ours alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn vsock_address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all zeros are a sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as u16;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

/// Answers until it is killed; says `ready` when it listens.
fn host(unix: Option<&str>) -> io::Result<()> {
    let sink = TcpListener::bind((HOST, SINK))?;
    let source = TcpListener::bind((HOST, SOURCE))?;
    let taking = thread::spawn(move || {
        serve(&sink, |mut peer| {
            io::copy(&mut peer, &mut io::sink()).map(drop)
        })
    });
    thread::spawn(move || {
        serve(&source, |mut peer| {
            let data = vec![0x5a; 256 << 10];
            loop {
                peer.write_all(&data)?;
            }
        });
    });
    match unix {
        Some(path) => {
            let listener = UnixListener::bind(path)?;
            println!("ready");
            for peer in listener.incoming() {
                let mut peer = peer?;
                echo(&mut peer.try_clone()?, &mut peer);
            }
        }
        None => {
            let listener = vsock_listener(ECHO)?;
            println!("ready");
            loop {
                let none = std::ptr::null_mut();
                // SAFETY: null takes no address back.
                let peer = unsafe { libc::accept(listener.as_raw_fd(), none, none.cast()) };
                if peer < 0 {
                    return Err(io::Error::last_os_error());
                }
                // SAFETY: new, and ours alone.
                let mut peer = unsafe { File::from_raw_fd(peer) };
                echo(&mut peer.try_clone()?, &mut peer);
            }
        }
    }
    taking
        .join()
        .map_err(|_| io::Error::other("a thread panicked"))
}

fn serve(listener: &TcpListener, each: impl Fn(TcpStream) -> io::Result<()>) {
    for peer in listener.incoming() {
        // A guest that is ended takes its connection with it.
        let _ = peer.and_then(&each);
    }
}

fn echo(from: &mut impl Read, to: &mut impl Write) {
    let mut data = [0; 4096];
    while let Ok(some @ 1..) = from.read(&mut data) {
        if to.write_all(&data[..some]).is_err() {
            return;
        }
    }
}

/// Makes a tap that stays, with the host's address, up.
fn tap(name: &str) -> io::Result<()> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: all zeros are an ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(15)) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as i16;
    // SAFETY: the request lives through the calls; the second takes a number.
    let made = unsafe {
        libc::ioctl(tun.as_raw_fd(), TUNSETIFF, &raw mut request) == 0
            && libc::ioctl(tun.as_raw_fd(), TUNSETPERSIST, 1) == 0
    };
    if !made {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it makes a descriptor or fails.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: new, and ours alone.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let address = |octets: [u8; 4]| libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: 0,
        sin_addr: libc::in_addr {
            s_addr: u32::from_ne_bytes(octets),
        },
        sin_zero: [0; 8],
    };
    for (what, octets) in [
        (libc::SIOCSIFADDR, [192, 168, 127, 1]),
        (libc::SIOCSIFNETMASK, [255, 255, 255, 0]),
    ] {
        let address = address(octets);
        // SAFETY: a sockaddr_in is as long as a sockaddr, and the request lives through the call.
        let set = unsafe {
            request.ifr_ifru.ifru_addr =
                std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(address);
            libc::ioctl(socket.as_raw_fd(), what, &raw mut request)
        };
        if set < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    // SAFETY: the request lives through the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
