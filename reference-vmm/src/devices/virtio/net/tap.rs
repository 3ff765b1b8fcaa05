// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The tap: an Ethernet interface of the host whose other side is a descriptor (Linux,
//! Documentation/networking/tuntap.rst). Each frame goes with a `virtio_net_hdr_v1` before it (`IFF_VNET_HDR`), which
//! is the guest's own header: checksums and segmentation are handed through.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{c_int, c_short, c_uint};

use super::iovecs::{IoVecs, write_bytes};

/// Where taps are opened.
pub const DEVICE: &str = "/dev/net/tun";

/// `virtio_net_hdr_v1`, bytes (virtio 1.2, 5.1.6).
pub const HEADER: usize = 12;

/// What the kernel may leave to the guest: checksums, segmentation. Bits are `TUN_F_…`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload(pub c_uint);

impl Offload {
    /// Nothing.
    pub const NONE: Offload = Offload(0);
    /// Checksums and TCP: every kernel that this runs on.
    pub const TCP: Offload =
        Offload(libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN);
    /// UDP as well, from Linux 6.2 on. The kernel takes both or none.
    pub const UDP: Offload = Offload(Offload::TCP.0 | libc::TUN_F_USO4 | libc::TUN_F_USO6);
}

/// One queue of a tap.
///
/// # Contract
/// - The descriptor is nonblocking, can be polled, and stays the same.
/// - A frame is read and written as a whole, with its [`HEADER`] before it.
pub trait Tap: AsRawFd + Send + Sync + 'static {
    /// Reads a frame, with what `into` has no room for in `rest`.
    ///
    /// # Errors
    /// `EAGAIN`: there is none. `EBADFD`: it is detached, or its interface is gone.
    fn read(&self, into: &mut IoVecs<'_>, rest: &mut [u8]) -> io::Result<usize>;

    /// Writes a frame.
    ///
    /// # Errors
    /// `EAGAIN`: no room; it becomes writable. `EIO`: the interface is down. `EINVAL`: the kernel does not like the
    /// frame.
    fn write(&self, from: &IoVecs<'_>) -> io::Result<usize>;

    /// Writes a frame that was copied together.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    fn write_bytes(&self, frame: &[u8]) -> io::Result<usize>;

    /// Gives the queue frames or none (`TUNSETQUEUE`). What waits in it when it gets none is lost.
    ///
    /// # Errors
    /// The host's.
    fn set_attached(&self, attached: bool) -> io::Result<()>;

    /// What the guest takes over, for the whole interface.
    ///
    /// # Errors
    /// The host's.
    fn set_offload(&self, offload: Offload) -> io::Result<()>;

    /// Leaves the interface to another process. The descriptor stays, and gives no frames.
    ///
    /// # Errors
    /// The host's; it is still this process's.
    fn let_go(&self) -> io::Result<()> {
        Ok(())
    }

    /// Attaches it to the interface that it let go of, as it was first.
    ///
    /// # Errors
    /// `EBUSY`: another process has it. Else the host's.
    fn take_back(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Why a tap cannot be attached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TapError {
    /// No interface of that name.
    #[error(
        "there is no tap {name:?}: make one with `ip tuntap add {name} mode tap user $USER{how}` and `ip link set {name} up`",
        how = multi(*queues)
    )]
    NoSuchTap {
        /// The name.
        name: String,
        /// How many queues were asked for.
        queues: u16,
    },
    /// An interface of another kind.
    #[error("the interface {name:?} is no tap: make one with `ip tuntap add NAME mode tap`")]
    NotATap {
        /// Its name.
        name: String,
    },
    /// It was made for one queue.
    #[error(
        "the tap {name:?} has one queue, and queues={queues} is asked for: make it with `ip tuntap add {name} mode \
         tap multi_queue`"
    )]
    OneQueue {
        /// Its name.
        name: String,
        /// How many were asked for.
        queues: u16,
    },
    /// Somebody has it.
    #[error("the tap {name:?} is busy: another process has it open")]
    Busy {
        /// Its name.
        name: String,
    },
    /// It is not this user's.
    #[error(
        "no permission for the tap {name:?}: make it this user's with `ip tuntap add {name} mode tap user {user}`, or \
         give the process CAP_NET_ADMIN"
    )]
    Permission {
        /// Its name.
        name: String,
        /// The user's number.
        user: u32,
    },
    /// No taps on this host.
    #[error("cannot open {DEVICE}, which taps need (`modprobe tun` makes it where it is missing)")]
    Device(#[source] io::Error),
    /// Anything else.
    #[error("the tap {name:?}: {what} is refused")]
    Refused {
        /// Its name.
        name: String,
        /// The call.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
}

fn multi(queues: u16) -> &'static str {
    match queues {
        0 | 1 => "",
        _ => " multi_queue",
    }
}

impl TapError {
    /// Whether the user asked for what is not there; else the host refused.
    pub fn is_users_fault(&self) -> bool {
        matches!(
            self,
            TapError::NoSuchTap { .. } | TapError::NotATap { .. } | TapError::OneQueue { .. }
        )
    }
}

/// A queue of a tap of the kernel's.
#[derive(Debug)]
pub struct KernelTap {
    file: File,
    name: String,
    /// It was attached with these (`IFF_…`).
    flags: c_int,
    /// It has been let go of.
    free: AtomicBool,
}

/// A tap's queues, and what was found out about it.
#[derive(Debug)]
pub struct Opened {
    /// Its queues, all attached.
    pub queues: Vec<KernelTap>,
    /// What its kernel can leave to a guest.
    pub offload: Offload,
    /// Whether it is up (`IFF_UP`); none if the kernel did not say.
    pub up: Option<bool>,
    /// Its MTU, bytes; none if the kernel did not say.
    pub mtu: Option<u32>,
}

impl KernelTap {
    /// Attaches `queues` queues of the tap `name`, which exists.
    ///
    /// # Errors
    /// [`TapError`]; nothing is attached.
    pub fn open(name: &str, queues: u16) -> Result<Opened, TapError> {
        let missing = || TapError::NoSuchTap {
            name: name.to_owned(),
            queues,
        };
        let text = CString::new(name).map_err(|_| missing())?;
        // Without a look the kernel would make one for who may.
        // SAFETY: a string that ends in 0 and lives through the call.
        if unsafe { libc::if_nametoindex(text.as_ptr()) } == 0 {
            return Err(missing());
        }
        let refused = |what| {
            move |source| TapError::Refused {
                name: name.to_owned(),
                what,
                source,
            }
        };
        let mut taps = Vec::with_capacity(queues.into());
        let mut flags = match queues {
            1 => 0,
            _ => libc::IFF_MULTI_QUEUE,
        };
        while taps.len() < usize::from(queues) {
            match Self::attach(name, flags)? {
                Ok(tap) => taps.push(tap),
                // Either the number of queues is the other, or the interface is no tap.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) && taps.is_empty() => {
                    let other = flags ^ libc::IFF_MULTI_QUEUE;
                    match Self::attach(name, other)? {
                        Ok(tap) if queues == 1 => {
                            taps.push(tap);
                            flags = other;
                        }
                        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                            let name = name.to_owned();
                            return Err(TapError::NotATap { name });
                        }
                        Err(error) if queues == 1 => return Err(not_attached(name, error)),
                        _ => {
                            let name = name.to_owned();
                            return Err(TapError::OneQueue { name, queues });
                        }
                    }
                }
                Err(error) => return Err(not_attached(name, error)),
            }
        }
        let mut offload = Offload::NONE;
        for (at, tap) in taps.iter().enumerate() {
            for (what, number, value) in FRAMES {
                set_int(tap, number, value).map_err(refused(what))?;
            }
            if at == 0 {
                offload = tap.probe_offload().map_err(refused("TUNSETOFFLOAD"))?;
            }
        }
        let (up, mtu) = look(&text);
        Ok(Opened {
            queues: taps,
            offload,
            up,
            mtu,
        })
    }

    /// Attaches a queue; the inner error is `TUNSETIFF`'s.
    fn attach(name: &str, flags: c_int) -> Result<io::Result<Self>, TapError> {
        let file = device().map_err(TapError::Device)?;
        let flags = flags | libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let name = name.to_owned();
        let attached = attach(&file, &name, flags);
        let free = AtomicBool::new(false);
        Ok(attached.map(|()| KernelTap {
            file,
            name,
            flags,
            free,
        }))
    }

    /// Whether the interface stays when nobody has it open.
    fn is_persistent(&self) -> io::Result<bool> {
        let mut request = request(b"");
        // SAFETY: the request is a whole ifreq, which the kernel writes during the call.
        result(unsafe { libc::ioctl(self.as_raw_fd(), libc::TUNGETIFF, &mut request) })?;
        // SAFETY: the kernel has filled in this member, and every value of its bytes is one.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        Ok(c_int::from(flags) & IFF_PERSIST != 0)
    }

    /// Has this descriptor be `file`'s, whose own goes.
    fn become_like(&self, file: &File) -> io::Result<()> {
        let (from, to) = (file.as_raw_fd(), self.as_raw_fd());
        // SAFETY: both are open; what this one was is closed, and the number stays its owner's.
        result(unsafe { libc::dup3(from, to, libc::O_CLOEXEC) }.min(0))
    }

    fn probe_offload(&self) -> io::Result<Offload> {
        let found = match self.set_offload(Offload::UDP) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                self.set_offload(Offload::TCP).map(|()| Offload::TCP)
            }
            set => set.map(|()| Offload::UDP),
        }?;
        self.set_offload(Offload::NONE)?;
        Ok(found)
    }
}

fn set_int(tap: &impl AsRawFd, what: libc::Ioctl, value: c_int) -> io::Result<()> {
    // SAFETY: these requests read an int, which lives through the call.
    result(unsafe { libc::ioctl(tap.as_raw_fd(), what, &value) })
}

/// How frames are to come: calls and their numbers.
const FRAMES: [(&str, libc::Ioctl, c_int); 2] = [
    ("TUNSETVNETHDRSZ", libc::TUNSETVNETHDRSZ, HEADER as c_int),
    // virtio 1's header is little-endian whatever the host is.
    ("TUNSETVNETLE", libc::TUNSETVNETLE, 1),
];

/// Of what `TUNGETIFF` says: the interface is there without an owner.
const IFF_PERSIST: c_int = 0x0800;

/// The device of taps, attached to none. std opens with `O_CLOEXEC`.
fn device() -> io::Result<File> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK);
    options.open(DEVICE)
}

/// `TUNSETIFF`.
fn attach(file: &File, name: &str, flags: c_int) -> io::Result<()> {
    let mut request = request(name.as_bytes());
    request.ifr_ifru.ifru_flags = flags as c_short;
    // SAFETY: the request is a whole ifreq, which the kernel reads and writes during the call.
    result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) })
}

impl AsRawFd for KernelTap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl Tap for KernelTap {
    fn read(&self, into: &mut IoVecs<'_>, rest: &mut [u8]) -> io::Result<usize> {
        into.read_from(self.as_raw_fd(), rest)
    }

    fn write(&self, from: &IoVecs<'_>) -> io::Result<usize> {
        from.write_to(self.as_raw_fd())
    }

    fn write_bytes(&self, frame: &[u8]) -> io::Result<usize> {
        write_bytes(self.as_raw_fd(), frame)
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        let mut request = request(b"");
        let flags = match attached {
            true => libc::IFF_ATTACH_QUEUE,
            false => libc::IFF_DETACH_QUEUE,
        };
        request.ifr_ifru.ifru_flags = flags as c_short;
        // SAFETY: the request is a whole ifreq, which the kernel reads during the call.
        result(unsafe { libc::ioctl(self.as_raw_fd(), libc::TUNSETQUEUE, &request) })
    }

    fn set_offload(&self, offload: Offload) -> io::Result<()> {
        let bits = libc::c_ulong::from(offload.0);
        // SAFETY: this request takes a number, no pointer.
        result(unsafe { libc::ioctl(self.as_raw_fd(), libc::TUNSETOFFLOAD, bits) })
    }

    /// An interface that would go with its last owner is kept, and one that is gone already needs nothing.
    fn let_go(&self) -> io::Result<()> {
        match self.is_persistent() {
            Ok(true) => self.become_like(&device()?)?,
            Ok(false) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => return Ok(()),
            Err(error) => return Err(error),
        }
        // Relaxed, here and below: the device's lock orders them.
        self.free.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn take_back(&self) -> io::Result<()> {
        if !self.free.load(Ordering::Relaxed) {
            return Ok(());
        }
        // A descriptor that is made ready first: where that fails, this one is what it was.
        let file = device()?;
        attach(&file, &self.name, self.flags)?;
        for (_, number, value) in FRAMES {
            set_int(&file, number, value)?;
        }
        self.become_like(&file)?;
        self.free.store(false, Ordering::Relaxed);
        Ok(())
    }
}

fn not_attached(name: &str, source: io::Error) -> TapError {
    let name = name.to_owned();
    match source.raw_os_error() {
        Some(libc::EBUSY) => TapError::Busy { name },
        Some(libc::EPERM | libc::EACCES) => TapError::Permission {
            name,
            // SAFETY: it has no arguments and cannot fail.
            user: unsafe { libc::geteuid() },
        },
        _ => TapError::Refused {
            name,
            what: "TUNSETIFF",
            source,
        },
    }
}

/// Whether the interface is up, and its MTU.
fn look(name: &CString) -> (Option<bool>, Option<u32>) {
    // SAFETY: numbers only.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return (None, None);
    }
    // SAFETY: it was just made, and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let ask = |what: libc::Ioctl| {
        let mut request = request(name.as_bytes());
        // SAFETY: the request is a whole ifreq, which the kernel reads and writes during the call.
        let done = unsafe { libc::ioctl(socket.as_raw_fd(), what, &mut request) };
        result(done).ok().map(|()| request)
    };
    let flags = ask(libc::SIOCGIFFLAGS as libc::Ioctl);
    // SAFETY: the kernel has filled in this member, and every value of its bytes is one.
    let flags = flags.map(|request| unsafe { request.ifr_ifru.ifru_flags });
    let mtu = ask(libc::SIOCGIFMTU as libc::Ioctl);
    // SAFETY: as above.
    let mtu = mtu.map(|request| unsafe { request.ifr_ifru.ifru_mtu });
    (
        flags.map(|flags| c_int::from(flags) & libc::IFF_UP != 0),
        mtu.and_then(|mtu| u32::try_from(mtu).ok()),
    )
}

/// An ifreq with this name, as much of it as there is room for.
fn request(name: &[u8]) -> libc::ifreq {
    // SAFETY: plain numbers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name) {
        *to = *from as libc::c_char;
    }
    request
}

fn result(done: c_int) -> io::Result<()> {
    match done {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
