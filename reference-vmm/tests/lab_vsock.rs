// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio-vsock under stock Debian kernels: `LAB_GUEST_IO` (xtask/src/bin/guest_io.rs) in the guest, threads of this
//! test on the host.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use support::lab::{alone, expect_done, initrd_with_guest_io, scripted};

const LIMIT: Duration = Duration::from_secs(180);

/// Echoes each connection until its end of file.
fn echo(path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        for peer in listener.incoming() {
            let mut peer = peer.unwrap();
            let mut from = peer.try_clone().unwrap();
            std::io::copy(&mut from, &mut peer).unwrap();
        }
    });
}

/// A connection to the guest's port that echoes: these bytes come back.
fn through_the_guest(uds: &Path, len: usize) {
    let mut stream = UnixStream::connect(uds).unwrap();
    stream.write_all(b"CONNECT 1234\n").unwrap();
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\n") {
        stream.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    assert!(line.starts_with(b"OK "), "{line:?}");
    let data: Vec<u8> = (0..len).map(|at| (at * 7919 / 32) as u8).collect();
    let (mut writer, sent) = (stream.try_clone().unwrap(), data.clone());
    let writing = std::thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    writing.join().unwrap();
    assert!(back == data, "{} bytes came back of {len}", back.len());
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn megabytes_go_through_a_linux_guests_sockets_both_ways_before_and_after_its_driver_is_loaded_anew()
 {
    let _turn = alone();
    let initrd = initrd_with_guest_io();
    let script = "/bin/guest-io vsock first
cd /sys/bus/virtio/drivers/vmw_vsock_virtio_transport
echo virtio0 >unbind
echo virtio0 >bind
/bin/guest-io vsock second
";
    for (kernel, cpus) in [("vmlinuz-cloud-6.1", "1"), ("vmlinuz-6.12", "2")] {
        let folder = tempfile::tempdir().unwrap();
        let uds = folder.path().join("v.sock");
        echo(&folder.path().join("v.sock_5001"));
        let mut running = scripted(kernel, "vmw_vsock_virtio_transport", script)
            .arg("--initrd")
            .arg(&*initrd)
            .args(["--cpus", cpus])
            .args(["--vsock", &format!("cid=42,uds={}", uds.display())])
            .limit(LIMIT)
            .start();
        for round in ["first", "second"] {
            running.wait_for(&format!("guest: vsock listening {round}"));
            through_the_guest(&uds, 3 << 20);
        }
        let ended = running.wait();
        expect_done(&ended);
        let text = ended.text();
        let count = |line: &str| text.matches(line).count();
        assert_eq!(count("guest: vsock out 8388608"), 2, "{ended}");
        assert_eq!(count("guest: vsock in 3145728"), 2, "{ended}");
        assert_eq!(count("guest: vsock refused connection reset"), 2, "{ended}");
        assert!(!uds.exists());
    }
}
