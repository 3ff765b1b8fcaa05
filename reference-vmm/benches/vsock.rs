// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest's socket through virtio-vsock to a program on the host, against two programs with a socket pair: a round
//! trip, and a stream each way. The guest is the tests' driver, which is a part of the times.

#![allow(missing_docs, clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use reference_vmm::devices::virtio::vsock::guest::{Guest, Ports};
use reference_vmm::devices::virtio::vsock::sockets::port_path;
use reference_vmm::devices::virtio::vsock::{Vsock, VsockConfig};

const MESSAGE: usize = 64;
const STREAM: usize = 4 << 20;

/// What the program on the host does, on a thread of its own.
fn echo(mut stream: UnixStream) {
    thread::spawn(move || {
        let mut message = [0; MESSAGE];
        while stream.read_exact(&mut message).is_ok() && stream.write_all(&message).is_ok() {}
    });
}

/// Takes a stream's bytes, and says so by one byte.
fn take(mut stream: UnixStream) {
    thread::spawn(move || {
        let mut buffer = vec![0; 256 << 10];
        let mut got = 0;
        while let Ok(len @ 1..) = stream.read(&mut buffer) {
            got += len;
            if got >= STREAM {
                got -= STREAM;
                stream.write_all(&[1]).unwrap();
            }
        }
    });
}

/// For each byte that it hears it sends a stream's bytes.
fn give(mut stream: UnixStream) {
    thread::spawn(move || {
        let data = vec![7; 256 << 10];
        let mut wish = [0];
        while stream.read_exact(&mut wish).is_ok() {
            for _ in 0..STREAM / data.len() {
                stream.write_all(&data).unwrap();
            }
        }
    });
}

struct Vsocket {
    _folder: tempfile::TempDir,
    guest: Guest,
    ports: Ports,
}

fn vsocket(buffer: u32, program: fn(UnixStream)) -> Vsocket {
    let folder = tempfile::tempdir().unwrap();
    let uds = folder.path().join("v.sock");
    let device: Vsock = VsockConfig { cid: 3, uds }.open().unwrap();
    let listener = UnixListener::bind(port_path(&folder.path().join("v.sock"), 1)).unwrap();
    let mut guest = Guest::with_buffers(device, 64, buffer);
    guest.buf_alloc = 256 << 10;
    let ports = guest.connect(1);
    assert!(guest.is_connected(ports));
    program(listener.accept().unwrap().0);
    Vsocket {
        _folder: folder,
        guest,
        ports,
    }
}

fn pair(program: fn(UnixStream)) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    program(theirs);
    ours
}

fn vsock(c: &mut Criterion) {
    let mut group = c.benchmark_group("64 bytes there and back");
    let mut ours = pair(echo);
    let mut message = [3; MESSAGE];
    group.bench_function("socket pair", |b| {
        b.iter(|| {
            ours.write_all(&message).unwrap();
            ours.read_exact(&mut message).unwrap();
        });
    });
    let mut with = vsocket(4096, echo);
    group.bench_function("vsock", |b| {
        b.iter(|| {
            with.guest.send_all(with.ports, &message);
            with.guest.read_exact(with.ports, MESSAGE)
        });
    });
    group.finish();

    let data = vec![5; STREAM];
    let mut group = c.benchmark_group("4 MiB from the guest to the host");
    group.sample_size(20);
    group.throughput(Throughput::Bytes(STREAM as u64));
    let mut ours = pair(take);
    group.bench_function("socket pair", |b| {
        b.iter(|| {
            for part in data.chunks(64 << 10) {
                ours.write_all(part).unwrap();
            }
            ours.read_exact(&mut [0]).unwrap();
        });
    });
    let mut with = vsocket(4096, take);
    group.bench_function("vsock", |b| {
        b.iter(|| {
            with.guest.send_all(with.ports, &data);
            with.guest.read_exact(with.ports, 1)
        });
    });
    group.finish();

    let mut group = c.benchmark_group("4 MiB from the host to the guest");
    group.sample_size(20);
    group.throughput(Throughput::Bytes(STREAM as u64));
    let mut ours = pair(give);
    let mut buffer = vec![0; 64 << 10];
    group.bench_function("socket pair", |b| {
        b.iter(|| {
            ours.write_all(&[1]).unwrap();
            let mut got = 0;
            while got < STREAM {
                got += ours.read(&mut buffer).unwrap();
            }
        });
    });
    for (name, len) in [
        ("vsock, buffers of 4 KiB, as Linux has them", 4096),
        ("vsock, buffers of 64 KiB", 44 + (64 << 10)),
    ] {
        let mut with = vsocket(len, give);
        group.bench_function(name, |b| {
            b.iter(|| {
                with.guest.send_all(with.ports, &[1]);
                with.guest.read_exact(with.ports, STREAM)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, vsock);
criterion_main!(benches);
