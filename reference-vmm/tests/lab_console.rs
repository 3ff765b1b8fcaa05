// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio-console under stock Debian kernels, in a machine of this process: hvc0 and a named port.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use reference_vmm::config::{Config, Irqchip};
use reference_vmm::devices::virtio::any::Devices;
use reference_vmm::devices::virtio::console::Console;
use reference_vmm::devices::virtio::console::config::{
    ConsoleConfig, Files, PortConfig, PortEnd, open,
};
use reference_vmm::devices::virtio::console::control::Size;
use reference_vmm::devices::virtio::console::host::{Host, stream};
use reference_vmm::end::{EndSignal, GuestEnd};
use reference_vmm::memory::Memory;
use reference_vmm::vm::Machine;
use support::lab::{alone, base64, lab_file};
use support::need_kvm;

const LIMIT: Duration = Duration::from_secs(180);

/// Runs a guest with these devices, to its end. What COM1 said.
fn run(kernel: &str, irqchip: Irqchip, cpus: u32, devices: Devices, script: &str) -> String {
    let script = base64(script);
    let config = Config {
        initrd: vec![lab_file("initrd-devices.cpio.gz")],
        cmdline: format!("console=ttyS0 quiet guest.modules=virtio_console guest.script={script}"),
        memory: Memory::new(256 << 20),
        cpus: cpus.into(),
        irqchip,
        ..Config::new(lab_file(kernel))
    };
    let (mut com1, writer) = std::io::pipe().unwrap();
    let end = Arc::new(EndSignal::new().unwrap());
    let machine = Machine::build_with(&config, devices, &writer, &end).unwrap();
    drop(writer);
    let said = std::thread::spawn(move || {
        let mut text = Vec::new();
        com1.read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    });
    let running = machine.start().unwrap();
    let mut poll = libc::pollfd {
        fd: end.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    let ended = unsafe { libc::poll(&mut poll, 1, LIMIT.as_millis() as i32) };
    if ended != 1 {
        end.tell(GuestEnd::Failed("it takes too long".into()));
    }
    running.stop();
    drop(running);
    let text = said.join().unwrap();
    assert_eq!(ended, 1, "the guest has not ended in {LIMIT:?}\n{text}");
    text
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn linux_has_a_console_and_a_port_on_both_irqchips() {
    need_kvm();
    let _turn = alone();
    // It stays open: the driver of hvc forgets its settings, and what was typed, at the last close, and who opens it while it
    // is being closed may be refused.
    let script = "
        until test -c /dev/hvc0; do sleep 0.1; done
        until command exec 3<>/dev/hvc0; do sleep 0.1; done
        until [ \"$(stty <&3 size)\" = '43 132' ]; do sleep 0.1; done
        stty <&3 raw -echo
        echo ready >&3
        head -n 1 <&3 | grep -x 'a line that was typed'
        dd if=/dev/zero bs=4096 count=64 2>/dev/null | tr '\\0' x >&3
        echo >&3
        until [ \"$(stty <&3 size)\" = '50 200' ]; do sleep 0.1; done
        until grep -x -q agent /sys/class/virtio-ports/*/name; do sleep 0.1; done
        port=/dev/$(cd /sys/class/virtio-ports; grep -l -x agent */name | cut -d/ -f1)
        cat <$port >/tmp/in
        echo got >&3
        cat /tmp/in >$port
        head -n 1 <&3 >/dev/null
        cd /sys/bus/virtio/drivers/virtio_console
        echo virtio1 >unbind
        echo virtio1 >bind
        until grep -x -q agent /sys/class/virtio-ports/*/name; do sleep 0.1; done
        cat /tmp/in >$port
    ";
    for (kernel, irqchip, cpus) in [
        ("vmlinuz-cloud-6.1", Irqchip::Split, 1),
        ("vmlinuz-6.12", Irqchip::Kernel, 2),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent.sock");
        let (host, hvc0) = UnixStream::pair().unwrap();
        let (source, sink) = stream(host.into()).unwrap();
        let host = Host::Fixed {
            source: Some(source),
            sink: Some(sink),
        };
        let console = Console::single(
            host,
            Size {
                cols: 132,
                rows: 43,
            },
        )
        .unwrap();
        let resizer = console.resizer();
        let agent = PortConfig {
            name: "agent".into(),
            to: PortEnd::Unix(path.clone()),
        };
        let ports = open(
            &ConsoleConfig::Off,
            &[agent],
            std::io::stdout(),
            Files::Empty,
        );
        let mut devices = Devices::new();
        devices.add("console", console);
        devices.add("ports", ports.unwrap().ports.unwrap());

        let data: Vec<u8> = (0..1u32 << 20).map(|n| (n >> 9 ^ n) as u8).collect();
        let sent = data;
        let host = std::thread::spawn(move || {
            hvc0.set_read_timeout(Some(LIMIT)).unwrap();
            // The guest's cat ends where nobody is connected.
            let mut port = UnixStream::connect(&path).unwrap();
            let mut lines = BufReader::new(&hvc0);
            let mut line = String::new();
            lines.read_line(&mut line).unwrap();
            assert_eq!(line.trim_end(), "ready");
            (&hvc0).write_all(b"a line that was typed\n").unwrap();
            line.clear();
            lines.read_line(&mut line).unwrap();
            assert_eq!(line.len(), 4096 * 64 + 1);
            assert!(line[..4096 * 64].bytes().all(|byte| byte == b'x'));
            resizer.resize(Size {
                cols: 200,
                rows: 50,
            });
            port.write_all(&sent).unwrap();
            drop(port);
            // A reader may miss an end behind which there is a beginning at once.
            line.clear();
            lines.read_line(&mut line).unwrap();
            assert_eq!(line.trim_end(), "got");
            // Once behind its closing of the port, once behind a reset of the device.
            for is_last in [false, true] {
                let mut port = UnixStream::connect(&path).unwrap();
                port.set_read_timeout(Some(LIMIT)).unwrap();
                let mut got = Vec::new();
                port.read_to_end(&mut got).unwrap();
                assert_eq!(got.len(), sent.len());
                assert!(got == sent);
                // A reset takes along what is still in the queue.
                if !is_last {
                    (&hvc0).write_all(b"all is here\n").unwrap();
                }
            }
        });
        let text = run(kernel, irqchip, cpus, devices, script);
        let heard = host.join();
        assert!(
            heard.is_ok() && text.contains("guest: script done"),
            "{kernel}\n{text}"
        );
        for bad in ["Oops", "BUG:", "WARNING:", "guest: refused", "soft lockup"] {
            assert!(!text.contains(bad), "{bad}\n{text}");
        }
    }
}
