// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A page-fault handler that takes its time: pages that begin with a mark come after a delay each, all others at once.
//! It takes one monitor's userfaultfd as Firecracker hands it off, and ends with the monitor.

use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::failure::{Context, Failure, Result};

const PAGE: u64 = 4096;
/// `struct uffd_msg`, and its event for a fault.
const MESSAGE: usize = 32;
const PAGE_FAULT: u8 = 0x12;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
/// More than a hand-off of a guest without holes by the dozen.
const MOST_BYTES: usize = 16 << 10;

/// A handler on a thread of its own.
pub(super) struct SlowPages(JoinHandle<Result<u64>>);

impl SlowPages {
    /// Listens at `socket` for a monitor, whose guest's memory is in `memory`.
    pub(super) fn start(
        socket: &Path,
        memory: &Path,
        mark: &'static [u8],
        delay: Duration,
    ) -> Result<Self> {
        let file = File::open(memory).context(|| format!("{} cannot be read", memory.display()))?;
        let listener = UnixListener::bind(socket);
        let listener = listener.context(|| format!("cannot listen at {}", socket.display()))?;
        Ok(Self(thread::spawn(move || {
            let failed = || "the page-fault handler".into();
            let (monitor, _) = listener.accept().context(failed)?;
            let (uffd, mappings) = receive(&monitor).context(failed)?;
            let served = Handler {
                uffd,
                mappings,
                file,
                mark,
            }
            .serve(&monitor, delay);
            served.context(failed)
        })))
    }

    /// How many pages it served until its monitor ended.
    pub(super) fn join(self) -> Result<u64> {
        let ended = self.0.join();
        ended.map_err(|_| Failure::new("the page-fault handler panicked"))?
    }
}

/// Where a stretch of guest memory is in the monitor and in the file.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Mapping {
    base: u64,
    size: u64,
    offset: u64,
}

struct Handler {
    uffd: OwnedFd,
    mappings: Vec<Mapping>,
    file: File,
    mark: &'static [u8],
}

impl Handler {
    fn serve(&self, monitor: &UnixStream, delay: Duration) -> io::Result<u64> {
        let mut faults = File::from(self.uffd.try_clone()?);
        let mut served = 0;
        // In the order in which they are due.
        let mut late: Vec<(Instant, u64, [u8; PAGE as usize])> = Vec::new();
        loop {
            let now = Instant::now();
            let due = late.iter().take_while(|(when, ..)| *when <= now).count();
            for (_, page, bytes) in late.drain(..due) {
                self.place(page, &bytes)?;
            }
            let left = late.first().map(|(when, ..)| when.duration_since(now));
            if readable([monitor.as_raw_fd(), self.uffd.as_raw_fd()], left)? {
                return Ok(served);
            }
            let mut message = [0; MESSAGE];
            match faults.read(&mut message) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                read => read?,
            };
            if message[0] != PAGE_FAULT {
                return Err(io::Error::other("no page fault was told"));
            }
            let mut address = [0; 8];
            address.copy_from_slice(&message[16..24]);
            let page = u64::from_ne_bytes(address) & !(PAGE - 1);
            let mut bytes = [0; PAGE as usize];
            let offset = self.offset(page);
            let offset = offset.ok_or_else(|| io::Error::other("a fault outside of the guest"))?;
            self.file.read_exact_at(&mut bytes, offset)?;
            served += 1;
            if bytes.starts_with(self.mark) {
                late.push((Instant::now() + delay, page, bytes));
            } else {
                self.place(page, &bytes)?;
            }
        }
    }

    fn offset(&self, page: u64) -> Option<u64> {
        let within = |of: &Mapping| page.checked_sub(of.base).filter(|into| *into < of.size);
        let mut found = self.mappings.iter();
        found.find_map(|of| Some(of.offset + within(of)?))
    }

    fn place(&self, page: u64, bytes: &[u8; PAGE as usize]) -> io::Result<()> {
        // `struct uffdio_copy`.
        let mut copy: [u64; 5] = [page, bytes.as_ptr() as u64, PAGE, 0, 0];
        // SAFETY: as many words as the call takes, and the bytes that they name.
        match unsafe { libc::ioctl(self.uffd.as_raw_fd(), UFFDIO_COPY, copy.as_mut_ptr()) } {
            0 => Ok(()),
            _ => match io::Error::last_os_error() {
                // Two faults were told on one page.
                error if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
                error => Err(error),
            },
        }
    }
}

/// Waits for so long, or until one of them can be read; whether the first can.
fn readable(fds: [RawFd; 2], left: Option<Duration>) -> io::Result<bool> {
    let mut fds = fds.map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    // Not before it is due.
    let left = left.map_or(-1, |left| left.as_millis() as libc::c_int + 1);
    // SAFETY: two pollfds.
    match unsafe { libc::poll(fds.as_mut_ptr(), 2, left) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(fds[0].revents != 0),
    }
}

/// The hand-off: one message with the descriptor, and JSON that ends where its array does.
fn receive(monitor: &UnixStream) -> io::Result<(OwnedFd, Vec<Mapping>)> {
    let mut json = vec![0; MOST_BYTES];
    let mut control = MaybeUninit::<[u64; 8]>::zeroed();
    let mut part = libc::iovec {
        iov_base: json.as_mut_ptr().cast(),
        iov_len: json.len(),
    };
    // SAFETY: all zeros are a msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    let flags = libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the buffers that the message names live through the call, and their lengths are their own.
    let got = unsafe { libc::recvmsg(monitor.as_raw_fd(), &raw mut message, flags) };
    let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the message is as recvmsg left it.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: null, or a header within the buffer, which is aligned for it.
    let header = unsafe { header.as_ref() };
    let rights =
        header.filter(|of| (of.cmsg_level, of.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS));
    let rights = rights.ok_or_else(|| io::Error::other("no userfaultfd came"))?;
    // SAFETY: SCM_RIGHTS has one descriptor at least, which is new and ours alone.
    let uffd =
        unsafe { OwnedFd::from_raw_fd(libc::CMSG_DATA(rights).cast::<RawFd>().read_unaligned()) };
    json.truncate(got);
    let mappings = mappings(&json);
    let mappings = mappings.ok_or_else(|| io::Error::other("the mappings are not as expected"))?;
    Ok((uffd, mappings))
}

fn mappings(json: &[u8]) -> Option<Vec<Mapping>> {
    let list: serde_json::Value = serde_json::from_slice(json).ok()?;
    let mapping = |of: &serde_json::Value| {
        Some(Mapping {
            base: of["base_host_virt_addr"].as_u64()?,
            size: of["size"].as_u64()?,
            offset: of["offset"].as_u64()?,
        })
    };
    list.as_array()?.iter().map(mapping).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_read_as_a_monitor_writes_them() {
        let json = br#"[{"base_host_virt_addr":4096,"size":8192,"offset":0,"page_size":4096}]"#;
        let expected = Mapping {
            base: 4096,
            size: 8192,
            offset: 0,
        };
        assert_eq!(mappings(json), Some(vec![expected]));
        for wrong in ["", "{}", r#"[{"size":1}]"#] {
            assert_eq!(mappings(wrong.as_bytes()), None, "{wrong}");
        }
    }
}
