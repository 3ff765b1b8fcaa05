// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `cargo xtask boot --distro`: a whole Debian as a guest, on virtio devices, to its login on this terminal.
//!
//! ```text
//!  this process ── lab machine ── watch (tap, checks) ── reference-vmm ── Debian's kernel, systemd, login
//!        └ the image as the machine's disk │ copied on write           └ /dev/vda, eth0, vsock, hvc0
//! ```
//!
//! [`mod@image`] makes the system, [`watch`] runs the monitor where the KVM is, [`console`] talks to the guest when nobody
//! else does. On a host with hardware KVM the lab machine falls away, and the disk is a copy in a file without a name.
//! Nothing that the guest writes stays.

mod console;
mod image;
mod watch;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::assets::Assets;
use crate::cargo;
use crate::failure::{Context, Failure, Result};
use crate::host::{self, KvmKind};
use crate::lab;
use crate::ui::say;
pub(crate) use image::{Distro, LABEL, image};
use watch::Watch;
pub(crate) use watch::{WATCH_COMMAND, command as watch_command};

/// The disk of a lab machine that has one ([`lab::Options::disk`]).
pub(crate) const LAB_DISK: &str = "/dev/vda";

/// Where the lab machine listens for this host: ssh to the guest by its network, and by vsock.
const LAB_PORTS: [u16; 2] = [2201, 2202];

/// What of `cargo xtask boot`'s options concerns the distribution.
pub(crate) struct Wanted {
    pub(crate) vmm: PathBuf,
    /// Another kernel or initramfs than the distribution's.
    pub(crate) kernel: Option<PathBuf>,
    pub(crate) initrd: Option<PathBuf>,
    /// Added to the kernel's command line.
    pub(crate) cmdline: String,
    /// The rest of the monitor's options, which it has found to be right.
    pub(crate) machine: Vec<OsString>,
    pub(crate) guest_mib: u32,
    pub(crate) force_lab: bool,
}

/// Boots the distribution; the monitor's exit status, or 1 where a check of the scripted form failed.
pub(crate) fn boot(wanted: Wanted) -> Result<i32> {
    let assets = Assets::open(false)?;
    let distro = image(&assets)?;
    let interactive = io::stdin().is_terminal();
    let (kind, reason) = host::kvm();
    let here = kind == KvmKind::Hardware && !wanted.force_lab;

    let mut cmdline = format!("root=LABEL={LABEL} console=ttyS0 loglevel=5");
    if !interactive {
        // Whoever reads this is no terminal.
        cmdline.push_str(" systemd.log_color=0");
    }
    if !wanted.cmdline.is_empty() {
        cmdline.push(' ');
        cmdline.push_str(&wanted.cmdline);
    }
    let kernel = wanted.kernel.unwrap_or_else(|| distro.kernel.clone());
    let initrd = wanted.initrd.unwrap_or_else(|| distro.initrd.clone());
    let mut monitor: Vec<OsString> = vec![wanted.vmm.into(), "run".into()];
    monitor.extend(["--kernel".into(), kernel.into_os_string()]);
    monitor.extend(["--initrd".into(), initrd.into_os_string()]);
    monitor.extend(["--cmdline".into(), cmdline.into()]);
    monitor.extend(wanted.machine);

    let mut watch = Watch {
        interactive,
        busybox: assets.busybox()?,
        disk: LAB_DISK.into(),
        forwarded: None,
        monitor,
    };
    if here {
        let disk = private_copy(&distro.disk)?;
        watch.disk = format!("/proc/{}/fd/{}", std::process::id(), disk.as_raw_fd()).into();
        return watch.run();
    }
    let reason = match kind {
        KvmKind::Hardware => "--lab was given".into(),
        _ => reason,
    };
    say(format!(
        "booting in the lab, because {reason}; its own start takes some 10 s, the login of a Debian in it a minute or two"
    ));
    let host_ports = free_ports()?;
    watch.forwarded = Some(host_ports);
    let options = lab::Options {
        stdin: true,
        // The guest's memory, and what the lab itself wants.
        memory_mib: wanted.guest_mib.clamp(512, 64 << 10) + 1024,
        disk: Some(distro.disk),
        forwards: host_ports.into_iter().zip(LAB_PORTS).collect(),
        time_limit: if interactive {
            Duration::from_secs(7 * 24 * 3600)
        } else {
            Duration::from_secs(1200)
        },
        ..lab::Options::default()
    };
    let inside: Vec<OsString> = cargo::inside_lab(WATCH_COMMAND)
        .into_iter()
        .chain(watch.into_words())
        .collect();
    lab::run(&options, &inside)
}

/// The image in a new file that no name leads to, which goes with its last descriptor.
fn private_copy(image: &Path) -> Result<File> {
    let parent = image.parent().unwrap_or(Path::new("/"));
    let dir = std::ffi::CString::new(parent.as_os_str().as_encoded_bytes())
        .context(|| format!("{} is no path", parent.display()))?;
    // SAFETY: the path is a C string; the call makes a new descriptor or fails.
    let fd = unsafe {
        libc::open(
            dir.as_ptr(),
            libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC,
            0o600,
        )
    };
    if fd < 0 {
        return Err(Failure::new(format!(
            "no file in {}: {}",
            parent.display(),
            io::Error::last_os_error()
        )));
    }
    // SAFETY: a new descriptor, ours alone.
    let mut copy = unsafe { File::from_raw_fd(fd) };
    let mut from = File::open(image).context(|| format!("{} cannot be opened", image.display()))?;
    copy_data(&mut from, &mut copy).context(|| format!("{} cannot be copied", image.display()))?;
    Ok(copy)
}

/// Copies what there is and leaves the holes.
fn copy_data(from: &mut File, to: &mut File) -> io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut at = 0_i64;
    loop {
        // SAFETY: plain calls on a descriptor that we own.
        let (data, hole) = unsafe {
            let data = libc::lseek(from.as_raw_fd(), at, libc::SEEK_DATA);
            if data < 0 {
                let error = io::Error::last_os_error();
                return match error.raw_os_error() {
                    Some(libc::ENXIO) => Ok(()), // nothing but a hole is left
                    _ => Err(error),
                };
            }
            (data, libc::lseek(from.as_raw_fd(), data, libc::SEEK_HOLE))
        };
        let start = u64::try_from(data).map_err(io::Error::other)?;
        let size = u64::try_from(hole - data).map_err(io::Error::other)?;
        from.seek(SeekFrom::Start(start))?;
        to.seek(SeekFrom::Start(start))?;
        io::copy(&mut from.take(size), to)?;
        at = hole;
    }
}

/// Two TCP ports of this host that nobody uses now.
fn free_ports() -> Result<[u16; 2]> {
    // Both at once, or they would be the same.
    let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0"));
    let mut ports = [0; 2];
    for (port, listener) in ports.iter_mut().zip(listeners) {
        *port = listener
            .and_then(|listener| listener.local_addr())
            .context(|| "no free port on this host's 127.0.0.1".into())?
            .port();
    }
    Ok(ports)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::{Read, Seek, SeekFrom, Write};
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_copy_has_the_data_at_its_places_and_the_holes() {
        let dir = std::env::temp_dir().join(format!("xtask-copy-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("image");
        let mut image = File::create(&path).unwrap();
        image.set_len(64 << 20).unwrap();
        image.seek(SeekFrom::Start(8 << 20)).unwrap();
        image.write_all(&[7; 5000]).unwrap();
        image.seek(SeekFrom::Start(48 << 20)).unwrap();
        image.write_all(b"end").unwrap();
        let mut copy = private_copy(&path).unwrap();
        let meta = copy.metadata().unwrap();
        assert_eq!((meta.len(), meta.nlink()), (64 << 20, 0));
        assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
        let mut bytes = Vec::new();
        copy.rewind().unwrap();
        copy.read_to_end(&mut bytes).unwrap();
        let mut wanted = vec![0; 64 << 20];
        wanted[8 << 20..(8 << 20) + 5000].fill(7);
        wanted[48 << 20..(48 << 20) + 3].copy_from_slice(b"end");
        assert!(bytes == wanted);
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn two_ports_are_two() {
        let [one, two] = free_ports().unwrap();
        assert!(one != two && one != 0 && two != 0, "{one} {two}");
    }
}
