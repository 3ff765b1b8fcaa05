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

use support::{Vmm, base64, lab_file, need_kvm};

const LIMIT: Duration = Duration::from_secs(180);

/// An archive (newc) with one program in it.
fn archive(name: &str, program: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, mode, data) in [(name, 0o100_755, program), ("TRAILER!!!", 0, &[])] {
        let fields = [
            1,
            mode,
            0,
            0,
            1,
            0,
            data.len(),
            0,
            0,
            0,
            0,
            name.len() + 1,
            0,
        ];
        out.extend(b"070701");
        for field in fields {
            out.extend(format!("{field:08x}").bytes());
        }
        out.extend(name.bytes().chain([0]));
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend(data);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

/// The initramfs with drivers, and `bin/guest-io` behind it.
fn initrd() -> tempfile::TempPath {
    let program = std::env::var_os("LAB_GUEST_IO").expect("LAB_GUEST_IO is not set");
    let mut bytes = std::fs::read(lab_file("initrd-devices.cpio.gz")).unwrap();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(archive("bin/guest-io", &std::fs::read(program).unwrap()));
    support::file(&bytes)
}

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
    need_kvm();
    let initrd = initrd();
    let script = "/bin/guest-io vsock first
cd /sys/bus/virtio/drivers/vmw_vsock_virtio_transport
echo virtio0 >unbind
echo virtio0 >bind
/bin/guest-io vsock second
";
    let script = base64(script);
    for (kernel, cpus) in [("vmlinuz-cloud-6.1", "1"), ("vmlinuz-6.12", "2")] {
        let folder = tempfile::tempdir().unwrap();
        let uds = folder.path().join("v.sock");
        echo(&folder.path().join("v.sock_5001"));
        let cmdline = format!(
            "console=ttyS0 quiet guest.modules=vmw_vsock_virtio_transport guest.script={script}"
        );
        let mut running = Vmm::run(lab_file(kernel))
            .arg("--initrd")
            .arg(&*initrd)
            .args(["--cmdline", &cmdline, "--cpus", cpus])
            .args(["--vsock", &format!("cid=42,uds={}", uds.display())])
            .limit(LIMIT)
            .start();
        for round in ["first", "second"] {
            running.wait_for(&format!("guest: vsock listening {round}"));
            through_the_guest(&uds, 3 << 20);
        }
        let ended = running.wait();
        ended.expect_status(0).expect_silence();
        let text = ended.text();
        let count = |line: &str| text.matches(line).count();
        assert_eq!(count("guest: vsock out 8388608"), 2, "{ended}");
        assert_eq!(count("guest: vsock in 3145728"), 2, "{ended}");
        assert_eq!(count("guest: vsock refused connection reset"), 2, "{ended}");
        assert!(text.contains("guest: script done"), "{ended}");
        for bad in ["Oops", "BUG:", "WARNING:", "guest: refused"] {
            assert!(!text.contains(bad), "{bad}\n{ended}");
        }
        assert!(!uds.exists());
    }
}
