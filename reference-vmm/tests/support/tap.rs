// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Taps in a network namespace of the test's own: for root.

#![allow(dead_code, reason = "each test has use for some")]

use std::ffi::{c_int, c_short};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

fn ioctl<T>(fd: &impl AsRawFd, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: each caller gives the type that the request has.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::Ioctl, argument) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn ifreq(name: &str, flags: c_int) -> libc::ifreq {
    // SAFETY: plain numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as c_short;
    request
}

pub fn socket(family: c_int, kind: c_int, protocol: c_int) -> OwnedFd {
    // SAFETY: numbers only.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: it was just made.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn control() -> OwnedFd {
    socket(libc::AF_INET, libc::SOCK_DGRAM, 0)
}

/// A network namespace for this test's thread, and those and the processes that it starts.
pub fn alone() {
    // SAFETY: a number only.
    let done = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    let error = io::Error::last_os_error();
    assert_eq!(done, 0, "this test is for root (unshare: {error})");
}

/// An interface of the tun driver that stays and has no user; `flags` with `IFF_TAP` or `IFF_TUN`.
pub fn make(name: &str, flags: c_int) {
    let options = OpenOptions::new().read(true).write(true).clone();
    let file = options.open("/dev/net/tun").unwrap();
    let mut request = ifreq(name, flags | libc::IFF_NO_PI);
    ioctl(&file, libc::TUNSETIFF as _, &mut request).unwrap();
    persist(&file);
}

fn persist(file: &File) {
    // SAFETY: this request takes a number.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST, 1 as c_int) };
    assert_eq!(done, 0);
}

/// A tap that is up.
pub fn make_up(name: &str, flags: c_int) {
    make(name, flags | libc::IFF_TAP);
    set_up(name, true);
}

pub fn set_up(name: &str, up: bool) {
    const SIOCSIFFLAGS: libc::c_ulong = 0x8914;
    let mut request = ifreq(name, if up { libc::IFF_UP } else { 0 });
    ioctl(&control(), SIOCSIFFLAGS, &mut request).unwrap();
}

/// Gives the interface an address of a network of 256.
pub fn set_address(name: &str, address: [u8; 4]) {
    const SIOCSIFADDR: libc::c_ulong = 0x8916;
    const SIOCSIFNETMASK: libc::c_ulong = 0x891c;
    for (call, value) in [(SIOCSIFADDR, address), (SIOCSIFNETMASK, [255, 255, 255, 0])] {
        let mut request = ifreq(name, 0);
        let [low, high] = (libc::AF_INET as u16).to_ne_bytes();
        let [a, b, c, d] = value;
        let data = [0, 0, a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0];
        request.ifr_ifru.ifru_addr = libc::sockaddr {
            sa_family: u16::from_ne_bytes([low, high]),
            sa_data: data.map(|byte: u8| byte as libc::c_char),
        };
        ioctl(&control(), call, &mut request).unwrap();
    }
}

/// Waits until the host sends by a tap: it drops what it has for one that has no user, and finds out later that it has
/// got one.
pub fn await_carrier(name: &str) {
    let mut request = ifreq(name, 0);
    let running = |request: &libc::ifreq| {
        // SAFETY: every value of these bytes is one.
        c_int::from(unsafe { request.ifr_ifru.ifru_flags }) & libc::IFF_RUNNING != 0
    };
    while !running(&request) {
        std::thread::yield_now();
        ioctl(&control(), libc::SIOCGIFFLAGS, &mut request).unwrap();
    }
    // Whoever has said so still holds the lock that this takes.
    set_up(name, true);
}
