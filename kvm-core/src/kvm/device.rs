// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `KVM_CREATE_DEVICE`, `KVM_HAS/GET/SET_DEVICE_ATTR`: a device in the kernel and its handle; and VFIO's,
//! whose members are handles too.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings as kvm;
use kvm_ioctls::VmFd;
use vmm_sys_util::errno::Error as Errno;

use super::vm::{Vm, VmSetup};
use crate::device::{DeviceAttribute, DeviceError, DeviceKind};

/// `_IOWR(KVMIO, 0xe0, struct kvm_create_device)`.
const KVM_CREATE_DEVICE: u64 = 0xc00c_aee0;
/// `_IOW(KVMIO, 0xe1, struct kvm_device_attr)`.
const KVM_SET_DEVICE_ATTR: u64 = 0x4018_aee1;
/// `_IOW(KVMIO, 0xe2, struct kvm_device_attr)`.
const KVM_GET_DEVICE_ATTR: u64 = 0x4018_aee2;
/// `_IOW(KVMIO, 0xe3, struct kvm_device_attr)`.
const KVM_HAS_DEVICE_ATTR: u64 = 0x4018_aee3;
const _: () = assert!(size_of::<kvm::kvm_create_device>() == 0x0c);
const _: () = assert!(size_of::<kvm::kvm_device_attr>() == 0x18);

/// `KVM_CREATE_DEVICE`, of a VM.
pub trait CreateDevice {
    /// What is created.
    type Device: DeviceAttributes;

    /// Creates a device.
    ///
    /// # Errors
    /// The errno of the ioctl.
    fn create_device(&self, kind: DeviceKind) -> Result<Self::Device, Errno>;

    /// Whether it could be created (`KVM_CREATE_DEVICE_TEST`); nothing is.
    ///
    /// # Errors
    /// The errno of the ioctl, `ENODEV` where the host has none.
    fn test_device(&self, kind: DeviceKind) -> Result<(), Errno>;
}

/// The attributes of a device.
pub trait DeviceAttributes {
    /// `KVM_HAS_DEVICE_ATTR`.
    ///
    /// # Errors
    /// The errno of the ioctl, `ENXIO` where there is none such.
    fn has_attribute(&self, attribute: DeviceAttribute) -> Result<(), Errno>;

    /// `KVM_SET_DEVICE_ATTR`.
    ///
    /// # Safety
    /// `value` points to what the device's documentation says that this attribute reads.
    ///
    /// # Errors
    /// The errno of the ioctl.
    unsafe fn set_attribute(
        &self,
        attribute: DeviceAttribute,
        value: *const u8,
    ) -> Result<(), Errno>;

    /// `KVM_GET_DEVICE_ATTR`.
    ///
    /// # Safety
    /// `value` points to memory for what the device's documentation says that this attribute writes.
    ///
    /// # Errors
    /// The errno of the ioctl.
    unsafe fn get_attribute(&self, attribute: DeviceAttribute, value: *mut u8)
    -> Result<(), Errno>;
}

fn answered(ret: libc::c_int) -> Result<(), Errno> {
    if ret < 0 {
        Err(Errno::from(io::Error::last_os_error()))
    } else {
        Ok(())
    }
}

fn create(vm: &VmFd, kind: DeviceKind, flags: u32) -> Result<kvm::kvm_create_device, Errno> {
    let mut device = kvm::kvm_create_device {
        type_: kind.number(),
        fd: 0,
        flags,
    };
    // SAFETY: the kernel reads and writes one such structure there.
    answered(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CREATE_DEVICE as _, &raw mut device) })?;
    Ok(device)
}

impl CreateDevice for VmFd {
    type Device = DeviceFd;

    fn create_device(&self, kind: DeviceKind) -> Result<DeviceFd, Errno> {
        let created = create(self, kind, 0)?;
        let fd = i32::try_from(created.fd).map_err(|_| Errno::new(libc::EBADF))?;
        // SAFETY: KVM has just made this descriptor (close-on-exec), for us.
        Ok(DeviceFd(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn test_device(&self, kind: DeviceKind) -> Result<(), Errno> {
        // No descriptor is made: the field stays what it was.
        create(self, kind, kvm::KVM_CREATE_DEVICE_TEST).map(drop)
    }
}

/// A device's file descriptor. Closed when dropped; the device goes with it, or with the VM.
#[derive(Debug)]
pub struct DeviceFd(OwnedFd);

impl AsFd for DeviceFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl DeviceFd {
    fn call(&self, request: u64, attribute: DeviceAttribute, addr: u64) -> Result<(), Errno> {
        let attr = kvm::kvm_device_attr {
            flags: 0,
            group: attribute.group,
            attr: attribute.attribute,
            addr,
        };
        // SAFETY: the kernel reads one such structure there; what `addr` must be was promised to the
        // callers that have one.
        answered(unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, &raw const attr) })
    }
}

impl DeviceAttributes for DeviceFd {
    fn has_attribute(&self, attribute: DeviceAttribute) -> Result<(), Errno> {
        self.call(KVM_HAS_DEVICE_ATTR, attribute, 0)
    }

    unsafe fn set_attribute(
        &self,
        attribute: DeviceAttribute,
        value: *const u8,
    ) -> Result<(), Errno> {
        let addr = value.expose_provenance() as u64;
        self.call(KVM_SET_DEVICE_ATTR, attribute, addr)
    }

    unsafe fn get_attribute(
        &self,
        attribute: DeviceAttribute,
        value: *mut u8,
    ) -> Result<(), Errno> {
        let addr = value.expose_provenance() as u64;
        self.call(KVM_GET_DEVICE_ATTR, attribute, addr)
    }
}

/// A device in the kernel (`struct kvm_device`). Clones are the same device (`kvm_device_get`), which is
/// closed with the last of them (`kvm_device_put`).
///
/// What KVM emulates or manages itself has a descriptor of its own (`KVM_CREATE_DEVICE`), and is set up and
/// read by attributes, each a number in a group of numbers ([`DeviceAttribute`]) with a value of a type
/// that Documentation/virt/kvm/devices/ says; hence [`Device::set`] and [`Device::get`] are unsafe. Which
/// kinds there are depends on the architecture: of x86 it is [`DeviceKind::Vfio`] alone, which
/// [`VfioDevice`] makes safe. `Vm::has_device` asks, `Vm::create_device` makes one, and a
/// [`DeviceError`] says what could not be. `D` is the descriptor, or a fake
/// ([`CreateDevice`], [`DeviceAttributes`]). What of it is saved is what its attributes say.
#[derive(Debug)]
pub struct Device<D = DeviceFd> {
    kind: DeviceKind,
    device: Arc<D>,
}

impl<D> Clone for Device<D> {
    fn clone(&self) -> Self {
        Self {
            kind: self.kind,
            device: self.device.clone(),
        }
    }
}

impl<D: DeviceAttributes> Device<D> {
    /// Creates one in a VM.
    ///
    /// # Errors
    /// [`DeviceError::Create`].
    pub fn create(
        vm: &impl CreateDevice<Device = D>,
        kind: DeviceKind,
    ) -> Result<Self, DeviceError> {
        let device = vm
            .create_device(kind)
            .map_err(|errno| DeviceError::Create { kind, errno })?;
        Ok(Self {
            kind,
            device: Arc::new(device),
        })
    }

    /// Which it is.
    #[must_use]
    pub const fn kind(&self) -> DeviceKind {
        self.kind
    }

    /// Its attributes and file descriptor.
    #[must_use]
    pub fn inner(&self) -> &D {
        &self.device
    }

    /// Whether it has an attribute.
    #[must_use]
    pub fn has(&self, attribute: DeviceAttribute) -> bool {
        self.device.has_attribute(attribute).is_ok()
    }

    /// Sets an attribute.
    ///
    /// # Safety
    /// `T` is, in size and layout, what the device's documentation says that this attribute reads.
    ///
    /// # Errors
    /// [`DeviceError::Set`].
    pub unsafe fn set<T: Copy>(
        &self,
        attribute: DeviceAttribute,
        value: &T,
    ) -> Result<(), DeviceError> {
        // SAFETY: the caller promises that `T` is what is read.
        unsafe {
            self.device
                .set_attribute(attribute, std::ptr::from_ref(value).cast())
        }
        .map_err(|errno| DeviceError::Set { attribute, errno })
    }

    /// Reads an attribute into `value`, which is unchanged if it fails.
    ///
    /// # Safety
    /// `T` is, in size and layout, what the device's documentation says that this attribute writes, and any
    /// bytes are a `T`.
    ///
    /// # Errors
    /// [`DeviceError::Get`].
    pub unsafe fn get<T: Copy>(
        &self,
        attribute: DeviceAttribute,
        value: &mut T,
    ) -> Result<(), DeviceError> {
        let mut read = *value;
        // SAFETY: the caller promises that `T` is what is written.
        unsafe { self.device.get_attribute(attribute, (&raw mut read).cast()) }
            .map_err(|errno| DeviceError::Get { attribute, errno })?;
        *value = read;
        Ok(())
    }
}

const fn vfio(attribute: u32) -> DeviceAttribute {
    DeviceAttribute {
        group: kvm::KVM_DEV_VFIO_FILE,
        attribute: attribute as u64,
    }
}

/// The VFIO device: tells KVM which VFIO groups or devices a VM has, so that it keeps their memory
/// accesses coherent and lets their interrupts bypass user space where it can. One in a VM.
/// Documentation/virt/kvm/devices/vfio.rst.
#[derive(Debug)]
pub struct VfioDevice<D: DeviceAttributes = DeviceFd>(Device<D>);

impl<D: DeviceAttributes> Clone for VfioDevice<D> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<D: DeviceAttributes> VfioDevice<D> {
    /// Creates it.
    ///
    /// # Errors
    /// [`DeviceError::Create`]; `EBUSY` where the VM has one.
    pub fn create(vm: &impl CreateDevice<Device = D>) -> Result<Self, DeviceError> {
        Device::create(vm, DeviceKind::Vfio).map(Self)
    }

    /// Adds a VFIO group, or since Linux 6.6 a VFIO device (`KVM_DEV_VFIO_FILE_ADD`): before its interrupts
    /// are routed. It is taken out again when the result is dropped, which keeps the file open until then.
    ///
    /// # Errors
    /// [`RefusedFile`], with the file and [`DeviceError::AddFile`].
    pub fn add(&self, file: OwnedFd) -> Result<VfioFile<D>, RefusedFile> {
        let fd = file.as_raw_fd();
        // SAFETY: the attribute reads an i32, a file descriptor, which may be of anything.
        let added = unsafe { self.0.set(vfio(kvm::KVM_DEV_VFIO_FILE_ADD), &fd) };
        match added {
            Ok(()) => Ok(VfioFile {
                device: self.0.clone(),
                file: Some(file),
            }),
            Err(DeviceError::Set { errno, .. }) => Err(RefusedFile {
                file,
                error: DeviceError::AddFile { fd, errno },
            }),
            Err(error) => Err(RefusedFile { file, error }),
        }
    }

    /// The device.
    #[must_use]
    pub const fn device(&self) -> &Device<D> {
        &self.0
    }
}

/// A file that KVM's VFIO device did not take, given back.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct RefusedFile {
    /// The file, open.
    pub file: OwnedFd,
    /// Why.
    pub error: DeviceError,
}

impl From<RefusedFile> for DeviceError {
    fn from(refused: RefusedFile) -> Self {
        refused.error
    }
}

/// A file that KVM's VFIO device has. Dropped, it has it no more; the device lives for as long.
#[derive(Debug)]
#[must_use = "the file is removed when this is dropped"]
pub struct VfioFile<D: DeviceAttributes = DeviceFd> {
    device: Device<D>,
    file: Option<OwnedFd>,
}

impl<D: DeviceAttributes> VfioFile<D> {
    /// Takes the file out (`KVM_DEV_VFIO_FILE_DEL`), as dropping it does, and says whether that worked.
    ///
    /// # Errors
    /// [`DeviceError::RemoveFile`]: KVM has it until the VM goes.
    pub fn remove(mut self) -> Result<(), DeviceError> {
        self.take_out()
    }

    /// Once: the file is closed behind it, whatever KVM says.
    fn take_out(&mut self) -> Result<(), DeviceError> {
        let Some(file) = self.file.take() else {
            return Ok(());
        };
        let fd = file.as_raw_fd();
        // SAFETY: the attribute reads an i32, a file descriptor.
        let removed = unsafe { self.device.set(vfio(kvm::KVM_DEV_VFIO_FILE_DEL), &fd) };
        removed.map_err(|error| match error {
            DeviceError::Set { errno, .. } => DeviceError::RemoveFile { fd, errno },
            other => other,
        })
    }
}

impl<D: DeviceAttributes> Drop for VfioFile<D> {
    fn drop(&mut self) {
        if let Err(error) = self.take_out() {
            // Nothing breaks by it.
            log::warn!("{error}; it stays until the VM goes");
        }
    }
}

impl Vm {
    /// Whether this host's KVM has a device of this kind for the VM (`KVM_CREATE_DEVICE_TEST`).
    #[must_use]
    pub fn has_device(&self, kind: DeviceKind) -> bool {
        self.fd().test_device(kind).is_ok()
    }

    /// Creates a device in the kernel.
    ///
    /// # Errors
    /// [`DeviceError::Create`].
    pub fn create_device(&self, kind: DeviceKind) -> Result<Device, DeviceError> {
        Device::create(&**self.fd(), kind)
    }

    /// Creates the VFIO device.
    ///
    /// # Errors
    /// [`DeviceError::Create`].
    pub fn create_vfio_device(&self) -> Result<VfioDevice, DeviceError> {
        VfioDevice::create(&**self.fd())
    }
}

impl VmSetup {
    /// Creates a device in the kernel that has to be there before the first vCPU.
    ///
    /// # Errors
    /// [`DeviceError::Create`].
    pub fn create_device(&self, kind: DeviceKind) -> Result<Device, DeviceError> {
        Device::create(&**self.fd(), kind)
    }
}
