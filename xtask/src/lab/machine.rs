// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The lab's machine: a QEMU process that emulates an AMD host with SVM and nested paging, so that its kernel's
//! `kvm_amd` is real. It ends when this value goes, and when this process ends in whatever way.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::wire::PORT;
use super::{Options, image};
use crate::assets::{Assets, Flavour};
use crate::failure::{Context, Result};
use crate::host;

/// What the machine's console and QEMU itself have said, of which the end is kept for a failure's message.
const LOG_KEPT: usize = 16 << 10;

pub(crate) struct Machine {
    qemu: Child,
    log: Arc<Mutex<Vec<u8>>>,
    listeners: Vec<JoinHandle<()>>,
    /// The initramfs lives as long as the process that reads it.
    _initrd: File,
}

impl Machine {
    /// Starts the machine; the stream is the agent's port.
    pub(crate) fn start(assets: &Assets, options: &Options) -> Result<(Machine, UnixStream)> {
        let qemu = assets.qemu()?;
        let kernel = assets.kernel(options.kernel, Flavour::Full)?;
        let initrd = initrd_with_agent(&image::image(assets, &kernel)?)?;
        let (ours, theirs) = UnixStream::pair().context(|| "no socket pair".into())?;

        let mut command = qemu.command();
        let accel = match options.icount || options.one_thread {
            true => "tcg,thread=single",
            false => "tcg,thread=multi",
        };
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-M",
            "q35",
            "-accel",
            accel,
            "-cpu",
            "max",
        ]);
        if options.icount {
            command.args(["-smp", "1", "-icount", "shift=0,sleep=on"]);
        } else {
            command.args(["-smp", &options.cpus.to_string()]);
        }
        command.args([
            "-m",
            &options.memory_mib.to_string(),
            "-no-reboot",
            "-display",
            "none",
        ]);
        match &options.monitor {
            None => command.args(["-monitor", "none"]),
            Some(path) => {
                let mut socket = OsString::from("unix:");
                socket.push(doubled_commas(Path::new(path)));
                socket.push(",server=on,wait=off");
                command.arg("-monitor").arg(socket)
            }
        };
        command.args(["-serial", "stdio"]);
        command.arg("-kernel").arg(kernel.vmlinux());
        command
            .arg("-initrd")
            .arg(format!("/proc/self/fd/{}", initrd.as_raw_fd()));
        command.args(["-append", &command_line(options)]);
        command.args([
            "-fsdev",
            "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
        ]);
        command.args(["-device", "virtio-9p-pci,fsdev=host,mount_tag=host"]);
        if let Some(image) = &options.disk {
            let mut drive =
                OsString::from("if=none,id=disk,format=raw,snapshot=on,cache=unsafe,file=");
            drive.push(doubled_commas(image));
            command.arg("-drive").arg(drive);
            command.args(["-device", "virtio-blk-pci,drive=disk"]);
        }
        if !options.forwards.is_empty() {
            let mut network = String::from("user,id=net");
            for (here, there) in &options.forwards {
                network += &format!(",hostfwd=tcp:127.0.0.1:{here}-:{there}");
            }
            command.args(["-netdev", &network]);
            command.args(["-device", "virtio-net-pci,netdev=net,romfile="]);
        }
        command.args([
            "-chardev",
            &format!("socket,id=lab,fd={}", theirs.as_raw_fd()),
        ]);
        command.args([
            "-device",
            "virtio-serial-pci",
            "-device",
            &format!("virtserialport,chardev=lab,name={PORT}"),
        ]);

        let (console_out, console_in) = pipe()?;
        let parent = std::process::id();
        let inherited = [initrd.as_raw_fd(), theirs.as_raw_fd()];
        // SAFETY: prctl, getppid and fcntl are async-signal-safe, and nothing else is done between fork and exec.
        unsafe {
            command.pre_exec(move || {
                // QEMU ends with us, however we end; and at once if we have ended already.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                if u32::try_from(libc::getppid()) != Ok(parent) {
                    return Err(io::Error::other("the parent has ended"));
                }
                for fd in inherited {
                    if libc::fcntl(fd, libc::F_SETFD, 0) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let stderr = console_in.try_clone().context(|| "no pipe".into())?;
        command
            .stdin(Stdio::null())
            .stdout(console_in)
            .stderr(stderr);
        let child = command.spawn().context(|| "QEMU does not start".into())?;
        drop(command); // its copy of the console's end goes, so that the end of QEMU is seen
        let log = Arc::new(Mutex::new(Vec::new()));
        let listener = listen(File::from(console_out), Arc::clone(&log), options.console);
        Ok((
            Machine {
                qemu: child,
                log,
                listeners: vec![listener],
                _initrd: initrd,
            },
            ours,
        ))
    }

    /// How QEMU ended, if it does so within `patience`, and the end of what the console said. (Its end of the port closes
    /// a moment before the process is gone.)
    pub(crate) fn last_words(mut self, patience: Duration) -> String {
        let deadline = Instant::now() + patience;
        let ended = loop {
            let ended = self.qemu.try_wait().ok().flatten();
            if ended.is_some() || Instant::now() >= deadline {
                break ended;
            }
            thread::sleep(Duration::from_millis(10));
        };
        self.end();
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let words = String::from_utf8_lossy(&log).trim_end().to_owned();
        match ended {
            Some(status) => format!("{words}\n(QEMU ended: {status})"),
            None => words,
        }
    }

    fn end(&mut self) {
        // Ended already is as good.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        for listener in self.listeners.drain(..) {
            let _ = listener.join();
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}

/// A path within an option of QEMU's, where a comma begins the next word; doubled, it is one.
fn doubled_commas(path: &Path) -> OsString {
    let mut bytes = Vec::new();
    for byte in path.as_os_str().as_bytes() {
        bytes.push(*byte);
        if *byte == b',' {
            bytes.push(*byte);
        }
    }
    OsString::from_vec(bytes)
}

fn command_line(options: &Options) -> String {
    // Quick and quiet: what slows an emulated start is left out; warnings still reach the log.
    let mut line = String::from(
        "console=ttyS0 panic=-1 loglevel=4 mitigations=off nokaslr audit=0 nowatchdog no_timer_check tsc=reliable \
         random.trust_cpu=on 8250.nr_uarts=1 rcupdate.rcu_expedited=1 cryptomgr.notests=1",
    );
    // The emulated counter runs with the host's, or counts instructions as nanoseconds. On a busy host the kernel's
    // own calibration was seen to be off by a factor of seven, and the lab's clock with it.
    let tsc_khz = if options.icount {
        1_000_000
    } else {
        host::tsc_khz()
    };
    line.push_str(&format!(" tsc_early_khz={tsc_khz}"));
    if options.console {
        line.push_str(" ignore_loglevel");
    }
    line
}

/// The cached image and, behind it, this program as the agent: in a file of memory that goes with its readers.
fn initrd_with_agent(image: &Path) -> Result<File> {
    let agent = fs::read("/proc/self/exe").context(|| "this program cannot be read".into())?;
    let mut archive = crate::cpio::Archive::new();
    archive.file("agent", 0o755, &agent);
    // SAFETY: the name is a C string; the call makes a new descriptor or fails.
    let fd = unsafe { libc::memfd_create(c"lab-initrd".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(crate::failure::Failure::new(format!(
            "no memory file: {}",
            io::Error::last_os_error()
        )));
    }
    // SAFETY: a new descriptor, ours alone.
    let mut file = unsafe { File::from_raw_fd(fd) };
    let mut base = File::open(image).context(|| format!("{} cannot be opened", image.display()))?;
    io::copy(&mut base, &mut file)
        .and_then(|_| file.write_all(&archive.finish()))
        .and_then(|()| file.rewind())
        .context(|| "the initramfs cannot be put together".into())?;
    Ok(file)
}

fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let (read, write) = io::pipe().context(|| "no pipe".into())?;
    Ok((read.into(), write.into()))
}

fn listen(mut from: File, log: Arc<Mutex<Vec<u8>>>, show: bool) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            if show {
                let _ = io::stderr().write_all(&buffer[..n]); // a closed stderr has no reader to miss it
            }
            let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
            log.extend_from_slice(&buffer[..n]);
            let surplus = log.len().saturating_sub(LOG_KEPT);
            log.drain(..surplus);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comma_of_a_path_begins_no_option() {
        assert_eq!(doubled_commas(Path::new("/a,b,,c")), "/a,,b,,,,c");
        assert_eq!(doubled_commas(Path::new("/plain")), "/plain");
    }
}
