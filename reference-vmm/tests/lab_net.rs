// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio-net under stock Debian kernels, at a tap in a network namespace of the test's own, with TCP of the host's.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;
#[path = "support/tap.rs"]
mod tap;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread::JoinHandle;
use std::time::Duration;

use support::lab::{alone, lab_file, no_complaints, scripted};

const LIMIT: Duration = Duration::from_secs(240);
const HOST: [u8; 4] = [192, 168, 77, 1];
/// Of each stream, bytes.
const LEN: usize = 4 << 20;

/// Serves `count` connections to this port, one after the other: what is sent comes back behind its end.
fn echo(port: u16, count: usize) -> JoinHandle<()> {
    let listener = TcpListener::bind((std::net::Ipv4Addr::from(HOST), port)).unwrap();
    std::thread::spawn(move || {
        for _ in 0..count {
            let (mut peer, _) = listener.accept().unwrap();
            let mut all = Vec::new();
            let mut from = Read::by_ref(&mut peer).take(LEN as u64);
            from.read_to_end(&mut all).unwrap();
            assert_eq!(all.len(), LEN);
            peer.write_all(&all).unwrap();
        }
    })
}

/// Sets the tap down for who connects.
fn down_at(port: u16) {
    let listener = TcpListener::bind((std::net::Ipv4Addr::from(HOST), port)).unwrap();
    std::thread::spawn(move || {
        drop(listener.accept().unwrap());
        tap::set_up("vm0", false);
    });
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn linux_has_a_network_at_a_tap_through_a_rebind_and_sees_that_the_tap_is_down() {
    let _turn = alone();
    let script = "
        cd /tmp
        up() { ifconfig eth0 192.168.77.2 up; ping -c 3 192.168.77.1; }
        pass() {
            head -c 4194304 /dev/urandom >sent
            nc 192.168.77.1 1001 <sent | head -c 4194304 >back
            cmp sent back && echo guest: passed
        }
        up
        grep -x 1400 /sys/class/net/eth0/mtu
        grep -x 02:00:00:00:00:77 /sys/class/net/eth0/address
        echo guest: queues $(ls -d /sys/class/net/eth0/queues/rx-* | wc -l)
        echo guest: features $(cat /sys/class/net/eth0/device/features)
        pass
        device=$(basename $(readlink /sys/class/net/eth0/device))
        echo $device >/sys/bus/virtio/drivers/virtio_net/unbind
        echo $device >/sys/bus/virtio/drivers/virtio_net/bind
        up
        pass
        grep -x 1 /sys/class/net/eth0/carrier
        nc 192.168.77.1 1002 </dev/null || true
        while grep -qx 1 /sys/class/net/eth0/carrier; do ping -c 1 -W 1 192.168.77.1 >/dev/null || true; done
        echo guest: no carrier
        grep $device /proc/interrupts
    ";
    for (kernel, irqchip, cpus, queues) in [
        ("vmlinuz-cloud-6.1", "split", "1", 1),
        ("vmlinuz-6.12", "kernel", "2", 2),
    ] {
        tap::alone();
        let flags = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        tap::make_up("vm0", flags);
        tap::set_address("vm0", HOST);
        let echo = echo(1001, 2);
        down_at(1002);
        let net = format!("tap=vm0,mac=02:00:00:00:00:77,mtu=1400,queues={queues}");
        let ended = scripted(kernel, "virtio_net", script)
            .arg("--initrd")
            .arg(lab_file("initrd-devices.cpio.gz"))
            .args(["--net", &net])
            .args(["--irqchip", irqchip, "--cpus", cpus])
            .limit(LIMIT)
            .output();
        ended.expect_status(0);
        let text = ended.text();
        for expected in [
            "guest: script done".to_owned(),
            "guest: no carrier".to_owned(),
            format!("guest: queues {queues}"),
        ] {
            assert!(text.contains(&expected), "{expected}\n{ended}");
        }
        assert_eq!(text.matches("guest: passed").count(), 2, "{ended}");
        no_complaints(&ended);
        echo.join().unwrap();
    }
}
