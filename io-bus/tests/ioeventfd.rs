// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! ioeventfd handles against a fake VM that refuses any call with any errno.

#![allow(clippy::unwrap_used)]

use std::error::Error as _;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use io_bus::{
    Error, IoEvent, IoEventAddress, IoEventFd, MmioAddress, PioAddress, SetIoEventFd, WriteLength,
    WriteMatch,
};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

/// What is attached; and which of the coming calls are refused, with what.
#[derive(Default)]
struct Fake {
    attached: Mutex<Vec<(IoEvent, RawFd)>>,
    calls: AtomicUsize,
    refuse: Vec<(usize, i32)>,
}

impl Fake {
    fn refusing(calls: &[(usize, i32)]) -> Self {
        Self {
            refuse: calls.to_vec(),
            ..Self::default()
        }
    }

    fn attached(&self) -> Vec<(IoEvent, RawFd)> {
        self.attached.lock().unwrap().clone()
    }

    fn events(&self) -> Vec<IoEvent> {
        self.attached().iter().map(|(event, _)| *event).collect()
    }

    fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }
}

impl SetIoEventFd for Fake {
    fn set_ioeventfd(&self, event: &IoEvent, fd: RawFd, attach: bool) -> Result<(), errno::Error> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        if let Some((_, errno)) = self.refuse.iter().find(|(n, _)| *n == call) {
            return Err(errno::Error::new(*errno));
        }
        let mut attached = self.attached.lock().unwrap();
        let place = attached.iter().position(|known| *known == (*event, fd));
        match (attach, place) {
            (true, None) => attached.push((*event, fd)),
            (true, Some(_)) => return Err(errno::Error::new(libc::EEXIST)),
            (false, Some(place)) => drop(attached.remove(place)),
            (false, None) => return Err(errno::Error::new(libc::ENOENT)),
        }
        Ok(())
    }
}

const ERRNOS: [i32; 6] = [
    libc::EEXIST,
    libc::ENOSPC,
    libc::EINVAL,
    libc::ENOMEM,
    libc::EBADF,
    libc::EINTR,
];

fn bell(address: u64) -> IoEvent {
    IoEvent {
        address: IoEventAddress::Mmio(MmioAddress(address)),
        writes: WriteMatch::U32(3),
    }
}

fn eventfd() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK).unwrap()
}

#[test]
fn a_handle_is_attached_while_it_lives() {
    let vm = Fake::default();
    let handle = IoEventFd::attach(&vm, bell(0x50), eventfd()).unwrap();
    assert_eq!(vm.events(), [bell(0x50)]);
    assert_eq!((handle.event(), handle.is_attached()), (bell(0x50), true));
    drop(handle);
    assert_eq!(vm.events(), []);
}

#[test]
fn an_eventfd_may_be_shared_with_an_event_loop() {
    let vm = Arc::new(Fake::default());
    let fd = Arc::new(eventfd());
    let mut handle = IoEventFd::attach(vm.clone(), bell(0x50), fd.clone()).unwrap();
    assert_eq!(handle.fd().as_raw_fd(), fd.as_raw_fd());
    assert_eq!(vm.attached()[0].1, fd.as_raw_fd());
    handle.detach().unwrap();
    handle.detach().unwrap();
    assert!(!handle.is_attached());
    drop(handle);
    assert_eq!(vm.calls(), 2);
}

#[test]
fn a_refused_attach_leaves_nothing_and_says_what_and_why() {
    for errno in ERRNOS {
        let vm = Fake::refusing(&[(0, errno)]);
        let error = IoEventFd::attach(&vm, bell(0x50), eventfd()).unwrap_err();
        let event = bell(0x50);
        let source = errno::Error::new(errno);
        assert_eq!(error, Error::AssignIoEventFd { event, source });
        assert!(
            error
                .to_string()
                .contains("MMIO 0x50 for 4-byte writes of 0x3")
        );
        assert_eq!(error.source().unwrap().to_string(), source.to_string());
        assert_eq!((vm.events(), vm.calls()), (vec![], 1));
    }
}

#[test]
fn a_refused_detach_leaves_it_attached_and_the_drop_tries_again() {
    for errno in ERRNOS {
        let vm = Fake::refusing(&[(1, errno)]);
        let mut handle = IoEventFd::attach(&vm, bell(0x50), eventfd()).unwrap();
        let error = handle.detach().unwrap_err();
        assert!(
            matches!(error, Error::DeassignIoEventFd { source, .. } if source.errno() == errno)
        );
        assert_eq!(
            (vm.events(), handle.is_attached()),
            (vec![bell(0x50)], true)
        );
        drop(handle);
        assert_eq!(vm.events(), []);
    }
}

#[test]
fn a_move_attaches_before_it_detaches() {
    let vm = Fake::default();
    let mut handle = IoEventFd::attach(&vm, bell(0x50), eventfd()).unwrap();
    handle.relocate(bell(0x90).address).unwrap();
    assert_eq!((vm.events(), vm.calls()), (vec![bell(0x90)], 3));
    assert_eq!(handle.event(), bell(0x90));
    // Where it is already, it stays, and KVM (which would say EEXIST) is not asked.
    handle.relocate(bell(0x90).address).unwrap();
    assert_eq!(vm.calls(), 3);
    drop(handle);
    assert_eq!(vm.events(), []);
}

#[test]
fn a_move_refused_at_either_call_changes_nothing() {
    for errno in ERRNOS {
        for call in [1, 2] {
            let vm = Fake::refusing(&[(call, errno)]);
            let mut handle = IoEventFd::attach(&vm, bell(0x50), eventfd()).unwrap();
            let error = handle.relocate(bell(0x90).address).unwrap_err();
            let refused = match error {
                Error::AssignIoEventFd { event, .. } if call == 1 => event,
                Error::DeassignIoEventFd { event, .. } if call == 2 => event,
                error => unreachable!("{error}"),
            };
            assert_eq!(refused, if call == 1 { bell(0x90) } else { bell(0x50) });
            assert_eq!(vm.events(), [bell(0x50)]);
            assert_eq!((handle.event(), handle.is_attached()), (bell(0x50), true));
            drop(handle);
            assert_eq!(vm.events(), []);
        }
    }
}

#[test]
fn a_detached_handle_moves_without_a_call() {
    let vm = Fake::default();
    let mut handle = IoEventFd::attach(&vm, bell(0x50), eventfd()).unwrap();
    handle.detach().unwrap();
    handle.relocate(bell(0x90).address).unwrap();
    assert_eq!((handle.event(), vm.calls()), (bell(0x90), 2));
}

#[test]
fn an_event_reads_as_what_it_listens_for() {
    let say = |address, writes| IoEvent { address, writes }.to_string();
    let port = IoEventAddress::Pio(PioAddress(0xf4));
    assert_eq!(
        say(port, WriteMatch::Any),
        "an ioeventfd at port 0xf4 for every write"
    );
    assert_eq!(
        say(port, WriteMatch::Length(WriteLength::Two)),
        "an ioeventfd at port 0xf4 for 2-byte writes"
    );
    assert_eq!(
        say(IoEventAddress::CcwNotify(3), WriteMatch::U64(16)),
        "an ioeventfd at subchannel 0x3 for 8-byte writes of 0x10"
    );
}
