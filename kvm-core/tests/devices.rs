// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices in the kernel, without one: errno injection at each of their calls, and what a handle owns.
#![cfg(all(feature = "kvm", not(loom)))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::{Cell, RefCell};
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

use kvm_core::{
    CreateDevice, Device, DeviceAttribute, DeviceAttributes, DeviceError, DeviceKind, Errno,
    VfioDevice,
};

/// A VM whose VFIO device keeps a list of files, and fails where it is told to.
#[derive(Default)]
struct Host {
    create: Cell<Option<i32>>,
    set: Rc<Cell<Option<i32>>>,
    files: Rc<RefCell<Vec<i32>>>,
    closed: Rc<Cell<usize>>,
}

#[derive(Debug)]
struct Fake {
    set: Rc<Cell<Option<i32>>>,
    files: Rc<RefCell<Vec<i32>>>,
    closed: Rc<Cell<usize>>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.closed.set(self.closed.get() + 1);
    }
}

impl CreateDevice for Host {
    type Device = Fake;

    fn create_device(&self, _: DeviceKind) -> Result<Fake, Errno> {
        if let Some(errno) = self.create.get() {
            return Err(Errno::new(errno));
        }
        let (set, files) = (self.set.clone(), self.files.clone());
        let closed = self.closed.clone();
        Ok(Fake { set, files, closed })
    }

    fn test_device(&self, _: DeviceKind) -> Result<(), Errno> {
        self.create
            .get()
            .map_or(Ok(()), |errno| Err(Errno::new(errno)))
    }
}

impl DeviceAttributes for Fake {
    fn has_attribute(&self, attribute: DeviceAttribute) -> Result<(), Errno> {
        match attribute.group {
            1 => Ok(()),
            _ => Err(Errno::new(libc::ENXIO)),
        }
    }

    unsafe fn set_attribute(
        &self,
        attribute: DeviceAttribute,
        value: *const u8,
    ) -> Result<(), Errno> {
        if let Some(errno) = self.set.get() {
            return Err(Errno::new(errno));
        }
        assert_eq!(attribute.group, 1);
        // SAFETY: VFIO's attributes are an i32.
        let fd = unsafe { value.cast::<i32>().read() };
        let mut files = self.files.borrow_mut();
        match attribute.attribute {
            1 => files.push(fd),
            2 => files.retain(|other| *other != fd),
            other => panic!("{other}"),
        }
        Ok(())
    }

    unsafe fn get_attribute(&self, _: DeviceAttribute, value: *mut u8) -> Result<(), Errno> {
        // SAFETY: the test reads a u32.
        unsafe { value.cast::<u32>().write(7) };
        self.set
            .get()
            .map_or(Ok(()), |errno| Err(Errno::new(errno)))
    }
}

fn file() -> OwnedFd {
    std::fs::File::open("/dev/null").unwrap().into()
}

#[test]
fn a_file_is_in_the_device_for_as_long_as_its_handle_lives() {
    let host = Host::default();
    let vfio = VfioDevice::create(&host).unwrap();
    let (one, two) = (file(), file());
    let (fd_one, fd_two) = (one.as_raw_fd(), two.as_raw_fd());
    let one = vfio.add(one).unwrap();
    let two = vfio.add(two).unwrap();
    assert_eq!(*host.files.borrow(), [fd_one, fd_two]);
    drop(one);
    assert_eq!(*host.files.borrow(), [fd_two]);
    // The device lives for as long as one of its files does.
    drop(vfio);
    assert_eq!(host.closed.get(), 0);
    two.remove().unwrap();
    assert!(host.files.borrow().is_empty());
    assert_eq!(host.closed.get(), 1);
}

#[test]
fn any_errno_at_any_call_says_what_was_refused_and_changes_nothing() {
    for errno in 1..=133 {
        let said = Errno::new(errno).to_string();
        let host = Host::default();
        host.create.set(Some(errno));
        let error = VfioDevice::create(&host).unwrap_err();
        assert_eq!(
            error,
            DeviceError::Create {
                kind: DeviceKind::Vfio,
                errno: Errno::new(errno)
            }
        );
        assert!(
            error
                .to_string()
                .starts_with("KVM creates no VFIO device: "),
            "{error}"
        );
        assert!(error.to_string().contains(&said), "{error}");

        host.create.set(None);
        let vfio = VfioDevice::create(&host).unwrap();
        let kept = vfio.add(file()).unwrap();
        let before = host.files.borrow().clone();
        host.set.set(Some(errno));
        let refused = file();
        let fd = refused.as_raw_fd();
        let error = vfio.add(refused).unwrap_err();
        // The file is the caller's again, open.
        assert_eq!(error.file.as_raw_fd(), fd);
        assert_eq!(
            DeviceError::from(error),
            DeviceError::AddFile {
                fd,
                errno: Errno::new(errno)
            }
        );
        assert_eq!(*host.files.borrow(), before);
        let error = kept.remove().unwrap_err();
        assert!(
            matches!(error, DeviceError::RemoveFile { errno: found, .. } if found.errno() == errno)
        );
        assert_eq!(*host.files.borrow(), before);

        let attribute = DeviceAttribute {
            group: 3,
            attribute: 9,
        };
        let mut value = 5_u32;
        // SAFETY: the fake's attributes are a u32 to read and, refused, nothing to write.
        let errors = unsafe {
            let set = vfio.device().set(attribute, &value).unwrap_err();
            [set, vfio.device().get(attribute, &mut value).unwrap_err()]
        };
        assert_eq!(value, 5);
        for error in errors {
            let text = error.to_string();
            assert!(
                text.starts_with("attribute 0x9 of group 3 cannot be "),
                "{text}"
            );
            assert!(text.contains(&said), "{text}");
        }
    }
}

#[test]
fn an_attribute_is_there_or_not() {
    let device = Device::create(&Host::default(), DeviceKind::Vfio).unwrap();
    assert!(device.has(DeviceAttribute {
        group: 1,
        attribute: 1
    }));
    assert!(!device.has(DeviceAttribute {
        group: 2,
        attribute: 1
    }));
    assert_eq!(device.clone().kind(), DeviceKind::Vfio);
    let vfio = VfioDevice::create(&Host::default()).unwrap();
    assert_eq!(vfio.clone().device().kind(), DeviceKind::Vfio);
}

#[test]
fn every_kind_is_its_number_and_no_two_are_the_same() {
    let numbers: Vec<_> = DeviceKind::NAMED.iter().map(|kind| kind.number()).collect();
    // linux/kvm.h: 1 to 14, none left out.
    assert_eq!(numbers, (1..=14).collect::<Vec<_>>());
    for number in 0..100 {
        let kind = DeviceKind::from_number(number);
        assert_eq!(kind.number(), number);
        assert_eq!(
            matches!(kind, DeviceKind::Other(_)),
            !numbers.contains(&number)
        );
    }
    assert_eq!(DeviceKind::Other(77).to_string(), "device of kind 77");
}
