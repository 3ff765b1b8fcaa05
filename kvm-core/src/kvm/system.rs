// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `/dev/kvm`: opened, checked, and asked what the host can do.

use std::borrow::Cow;
use std::ffi::CString;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

#[cfg(target_arch = "x86_64")]
use kvm_bindings::CpuId;
use vmm_sys_util::errno::Error as Errno;

use super::vm::{Error, VmSetup};
use crate::capability::{Capabilities, CheckExtension};

/// The API version that every KVM since Linux 2.6.22 has (`KVM_GET_API_VERSION`).
const API_VERSION: i32 = 12;
const DEV_KVM: &str = "/dev/kvm";
/// `KVM_CREATE_VM` fails with `EINTR` when a signal is pending, and so may any ioctl of what stands in for a device; so often
/// in a row is no accident.
const INTERRUPTIONS: usize = 64;

/// Why KVM cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The device could not be opened.
    #[error("cannot open {}: {errno}: {}", path.display(), advice(path, *errno))]
    Open {
        /// What was opened.
        path: PathBuf,
        /// What the system said.
        errno: Errno,
    },
    /// It opened, but is no KVM, or one of another age.
    #[error("{}", wrong_api(path, *found))]
    ApiVersion {
        /// What was opened.
        path: PathBuf,
        /// What it answered; negative when it is not KVM at all.
        found: i32,
    },
    /// It opened, and could not be asked what it is.
    #[error("cannot ask {} for its KVM API version: {errno}", path.display())]
    Ask {
        /// What was opened.
        path: PathBuf,
        /// What the system said.
        errno: Errno,
    },
}

impl OpenError {
    /// What to do where it could not be opened: the end of what the error says. Of a device that this user may not open, its
    /// mode and its group as they are now say so.
    pub fn advice(&self) -> Option<String> {
        match self {
            OpenError::Open { path, errno } => Some(advice(path, *errno).into_owned()),
            _ => None,
        }
    }
}

fn wrong_api(path: &Path, found: i32) -> String {
    let path = path.display();
    match found {
        ..0 => format!(
            "{path} is no KVM device: it has no answer to KVM_GET_API_VERSION; KVM's is usually {DEV_KVM}"
        ),
        _ => format!("{path} speaks KVM API version {found}, and {API_VERSION} is needed"),
    }
}

fn advice(path: &Path, errno: Errno) -> Cow<'static, str> {
    Cow::Borrowed(match errno.errno() {
        libc::ENOENT | libc::ENOTDIR if path != Path::new(DEV_KVM) => {
            "there is no such device; KVM's is usually /dev/kvm"
        }
        libc::ENOENT => {
            "the host offers no KVM here; load kvm_intel or kvm_amd (modprobe), switch virtualization on \
             in the firmware or in the outer hypervisor (nested), and pass the device into a container"
        }
        libc::EACCES | libc::EPERM => return Cow::Owned(permission(path, errno.errno())),
        libc::ENXIO | libc::ENODEV => {
            "the device node has no driver behind it; load kvm_intel or kvm_amd (modprobe)"
        }
        libc::EBUSY => "another hypervisor has the processor's virtualization in use",
        libc::EMFILE | libc::ENFILE => "too many files are open; raise the limit (ulimit -n)",
        _ => "see dmesg for what KVM has to say",
    })
}

/// Who may open a device that this user may not, and what helps.
fn permission(path: &Path, errno: i32) -> String {
    let shown = path.display();
    let is = path.metadata().ok();
    let mode = is.as_ref().map(|is| is.mode() & 0o777);
    let groups = || std::fs::read_to_string("/etc/group").ok();
    let name = is.and_then(|is| group_name(&groups()?, is.gid()));
    let acl = format!("until the next boot, sudo setfacl -m u:$USER:rw {shown}");
    match (errno, mode, name) {
        // Of a container's rules for devices, or a sandbox.
        (libc::EPERM, _, _) => format!(
            "it is not its mode that forbids it: in a container, pass it in (docker run --device {shown})"
        ),
        (_, Some(mode), Some(name)) if mode & 0o060 == 0o060 => format!(
            "the group {name} may open it, and this user is not in that: sudo usermod -aG {name} $USER, and log in again; or, {acl}"
        ),
        (_, Some(mode), _) if mode & 0o060 != 0o060 => format!(
            "its mode is {mode:04o}, so that no group may open it: {acl}; for good, have udev give it to one (KERNEL==\"kvm\", \
             GROUP=\"kvm\", MODE=\"0660\"), and sudo usermod -aG kvm $USER"
        ),
        _ => format!(
            "if it is this user who may not open it: sudo usermod -aG kvm $USER, and log in again (ls -l {shown} says whose it \
             is); or, {acl}"
        ),
    }
}

/// The name of a group in the text of `/etc/group`.
fn group_name(groups: &str, gid: u32) -> Option<String> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let number: u32 = fields.nth(1)?.parse().ok()?;
        (number == gid).then(|| name.to_owned())
    })
}

/// An open KVM device. Its ioctls may be called from any thread.
#[derive(Debug)]
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
}

impl Kvm {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// [`OpenError`], which says what to do.
    pub fn open() -> Result<Self, OpenError> {
        Self::open_at(DEV_KVM)
    }

    /// Opens the KVM device at `path`.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open_at(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        let path = path.as_ref();
        let open = |errno| OpenError::Open {
            path: path.to_owned(),
            errno,
        };
        let c_path = CString::new(path.as_os_str().as_bytes())
            .map_err(|_| open(Errno::new(libc::EINVAL)))?;
        let fd = kvm_ioctls::Kvm::new_with_path(&c_path).map_err(open)?;
        Self::check(fd, path)
    }

    /// Takes a KVM device that somebody else opened (a privileged parent, for example).
    ///
    /// # Errors
    /// [`OpenError::ApiVersion`] if it is none.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, OpenError> {
        // SAFETY: an open fd that we own. If it is not KVM's, its ioctls fail; `check` asks the first.
        let fd = unsafe { kvm_ioctls::Kvm::from_raw_fd(fd.into_raw_fd()) };
        Self::check(fd, Path::new("the file descriptor given"))
    }

    fn check(fd: kvm_ioctls::Kvm, path: &Path) -> Result<Self, OpenError> {
        let (path, mut errno) = (path.to_owned(), Errno::new(libc::EINTR));
        for _ in 0..INTERRUPTIONS {
            match fd.get_api_version() {
                API_VERSION => return Ok(Self { fd }),
                found @ 0.. => return Err(OpenError::ApiVersion { path, found }),
                found => {
                    errno = Errno::last();
                    match errno.errno() {
                        libc::EINTR => {}
                        // What a driver says to an ioctl that it does not know.
                        libc::ENOTTY | libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP => {
                            return Err(OpenError::ApiVersion { path, found });
                        }
                        _ => break,
                    }
                }
            }
        }
        Err(OpenError::Ask { path, errno })
    }

    /// The raw device, for what this crate does not wrap.
    #[must_use]
    pub const fn fd(&self) -> &kvm_ioctls::Kvm {
        &self.fd
    }

    /// What the host can do; each capability is asked for once, when first wanted.
    #[must_use]
    pub fn capabilities(&self) -> Capabilities<&kvm_ioctls::Kvm> {
        Capabilities::new(&self.fd)
    }

    /// `KVM_GET_SUPPORTED_CPUID`: the CPUID leaves that this host's KVM can give a guest.
    ///
    /// # Errors
    /// The errno of the ioctl.
    #[cfg(target_arch = "x86_64")]
    pub fn supported_cpuid(&self) -> Result<CpuId, Error> {
        self.fd
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(|errno| Error::SupportedCpuid { errno })
    }

    /// `KVM_CREATE_VM`: a VM in its set-up stage.
    ///
    /// # Errors
    /// The errno of the ioctl; nothing is left behind.
    pub fn create_vm(&self) -> Result<VmSetup, Error> {
        for _ in 0..INTERRUPTIONS {
            match self.fd.create_vm() {
                Ok(fd) => return Ok(VmSetup::new(fd)),
                Err(errno) if errno.errno() == libc::EINTR => {}
                Err(errno) => return Err(Error::CreateVm { errno }),
            }
        }
        Err(Error::CreateVm {
            errno: Errno::new(libc::EINTR),
        })
    }
}

impl CheckExtension for kvm_ioctls::Kvm {
    fn check_extension(&self, capability: u32) -> i32 {
        self.check_extension_raw(capability.into())
    }
}

impl CheckExtension for kvm_ioctls::VmFd {
    fn check_extension(&self, capability: u32) -> i32 {
        self.check_extension_raw(capability.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{File, Permissions};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn who_may_not_open_the_device_is_told_by_its_mode_what_helps() {
        let folder = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = folder.as_path().join("kvm");
        File::create(&path).unwrap();
        let refused = |mode, errno| {
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let error = OpenError::Open {
                path: path.clone(),
                errno: Errno::new(errno),
            };
            let said = error.to_string();
            assert!(said.ends_with(&error.advice().unwrap()), "{said}");
            said
        };
        // Nobody need be in a group that it is closed to.
        let closed = refused(0o600, libc::EACCES);
        for word in ["its mode is 0600", "no group may open it", "setfacl"] {
            assert!(closed.contains(word), "{closed}");
        }
        let open = refused(0o660, libc::EACCES);
        assert!(
            open.contains("usermod -aG ") && !open.contains("mode"),
            "{open}"
        );
        // A container's rules, or a sandbox.
        let container = refused(0o666, libc::EPERM);
        assert!(container.contains("docker run --device"), "{container}");
        std::fs::remove_file(&path).unwrap();
        let error = OpenError::Open {
            path,
            errno: Errno::new(libc::EACCES),
        };
        assert!(error.to_string().contains("usermod -aG kvm"), "{error}");
        let groups = "root:x:0:\nbad\nkvm:x:108:me\n";
        assert_eq!(group_name(groups, 108).as_deref(), Some("kvm"));
        assert_eq!(group_name(groups, 7), None);
    }
}
