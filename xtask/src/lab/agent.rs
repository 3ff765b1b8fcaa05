// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The lab's first process inside the emulated machine, after its init has shown the host's tree: this very
//! program. It runs one command for the host and tells its output and its exit status.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::wire::{Frame, Job, PORT};
use crate::failure::{Context, Failure, Result};

type Port = Arc<Mutex<File>>;

/// Runs the job that the host sends; does not come back, for the host ends the machine.
pub(crate) fn command() -> Result<i32> {
    let mut from_host = open_port()?;
    let to_host = Arc::new(Mutex::new(
        from_host
            .try_clone()
            .context(|| "the port cannot be shared".into())?,
    ));
    send(&to_host, &Frame::Ready)?;
    tell_of_life(Arc::clone(&to_host));
    let job = loop {
        match Frame::receive(&mut from_host)
            .context(|| "the host's side of the port is broken".into())?
        {
            Frame::Job(job) => break job,
            _ => continue, // a terminal's size may come first
        }
    };
    let status = match run(&job, from_host, &to_host) {
        Ok(status) => status,
        Err(failure) => {
            send(
                &to_host,
                &Frame::Stderr(format!("xtask: {failure}\n").into_bytes()),
            )?;
            failure.status()
        }
    };
    send(&to_host, &Frame::Exit(status))?;
    loop {
        thread::park(); // the first process must not end
    }
}

/// So that the host can tell a machine that stands still from a command that is quiet.
fn tell_of_life(to_host: Port) {
    thread::spawn(move || {
        while send(&to_host, &Frame::Alive).is_ok() {
            thread::sleep(Duration::from_secs(1));
        }
    });
}

fn send(port: &Port, frame: &Frame) -> Result<()> {
    let mut port = port.lock().unwrap_or_else(PoisonError::into_inner);
    frame
        .send(&mut *port)
        .context(|| "the host's side of the port is broken".into())
}

fn open_port() -> Result<File> {
    let ports = "/sys/class/virtio-ports";
    for entry in fs::read_dir(ports).context(|| format!("{ports} cannot be read"))? {
        let entry = entry.context(|| format!("{ports} cannot be read"))?;
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim() == PORT) {
            let device = std::path::Path::new("/dev").join(entry.file_name());
            return File::options()
                .read(true)
                .write(true)
                .open(&device)
                .context(|| format!("{} cannot be opened", device.display()));
        }
    }
    Err(Failure::new(format!(
        "this machine has no virtio port named {PORT}"
    )))
}

fn run(job: &Job, from_host: File, to_host: &Port) -> Result<i32> {
    let text = |bytes: &Vec<u8>| OsString::from_vec(bytes.clone());
    let (program, args) = job
        .argv
        .split_first()
        .ok_or_else(|| Failure::usage("no command was given"))?;
    let mut command = Command::new(text(program));
    command
        .args(args.iter().map(text))
        .env_clear()
        .current_dir(text(&job.cwd));
    for pair in &job.env {
        if let Some(at) = pair.iter().position(|b| *b == b'=') {
            command.env(text(&pair[..at].to_vec()), text(&pair[at + 1..].to_vec()));
        }
    }
    let (child, stdin, terminal, outputs) = match job.terminal {
        Some(size) => spawn_on_terminal(&mut command, size),
        None => spawn_on_pipes(&mut command),
    }
    .map_err(|error| {
        let program = String::from_utf8_lossy(program).into_owned();
        // As a shell has it: 127 not found, 126 found and not runnable.
        let status = if error.kind() == io::ErrorKind::NotFound {
            127
        } else {
            126
        };
        Failure::new(format!(
            "{program} does not start in {}: {error}",
            String::from_utf8_lossy(&job.cwd)
        ))
        .with_status(status)
    })?;
    let readers: Vec<_> = outputs
        .into_iter()
        .map(|(file, wrap)| {
            let to_host = Arc::clone(to_host);
            thread::spawn(move || forward(file, wrap, &to_host))
        })
        .collect();
    thread::spawn(move || take_input(from_host, stdin, terminal));
    let status = wait_for(child)?;
    // The command's own end is the lab's: what it left behind would hold the pipes open.
    // SAFETY: a plain call; as the first process this reaches all others and not ourselves.
    unsafe { libc::kill(-1, libc::SIGKILL) };
    for reader in readers {
        let _ = reader.join(); // a reader that panicked has nothing more to tell
    }
    Ok(status)
}

type Wrap = fn(Vec<u8>) -> Frame;
type Spawned = (i32, Option<File>, Option<OwnedFd>, Vec<(File, Wrap)>);

fn process_id(child: &std::process::Child) -> i32 {
    i32::try_from(child.id()).unwrap_or(0)
}

fn spawn_on_pipes(command: &mut Command) -> io::Result<Spawned> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let stdin = child
        .stdin
        .take()
        .map(|pipe| File::from(OwnedFd::from(pipe)));
    let mut outputs: Vec<(File, Wrap)> = Vec::new();
    if let Some(pipe) = child.stdout.take() {
        outputs.push((File::from(OwnedFd::from(pipe)), Frame::Stdout));
    }
    if let Some(pipe) = child.stderr.take() {
        outputs.push((File::from(OwnedFd::from(pipe)), Frame::Stderr));
    }
    Ok((process_id(&child), stdin, None, outputs))
}

fn spawn_on_terminal(command: &mut Command, size: (u16, u16)) -> io::Result<Spawned> {
    let mut fds = [0; 2];
    let window = libc::winsize {
        ws_row: size.0,
        ws_col: size.1,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let [ours, theirs] = &mut fds;
    // SAFETY: openpty fills the two descriptors; the name and the settings may be null; the size lives as long as
    // the call, which does not change it.
    let failed = unsafe {
        libc::openpty(
            ours,
            theirs,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            std::ptr::from_ref(&window).cast_mut(),
        )
    } != 0;
    if failed {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both descriptors are new and ours alone.
    let (ours, theirs) = unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) };
    // The command and its children are to see the slave side alone.
    // SAFETY: a flag set on a descriptor that we own.
    unsafe { libc::fcntl(ours.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
    command
        .stdin(theirs.try_clone()?)
        .stdout(theirs.try_clone()?)
        .stderr(theirs);
    // SAFETY: setsid and ioctl are async-signal-safe, and nothing else is done between fork and exec.
    unsafe {
        command.pre_exec(|| {
            if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let child = command.spawn()?;
    // The command's own copies of the slave go, or the end of its output would never be seen.
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let master = File::from(ours);
    let (input, control) = (master.try_clone()?, OwnedFd::from(master.try_clone()?));
    Ok((
        process_id(&child),
        Some(input),
        Some(control),
        vec![(master, Frame::Stdout as Wrap)],
    ))
}

/// Passes on what the command writes until no one can write any more (a terminal says so with EIO).
fn forward(mut from: File, wrap: Wrap, to_host: &Port) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(n) => {
                if send(to_host, &wrap(buffer[..n].to_vec())).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Does what the host says while the command runs.
fn take_input(mut from_host: File, mut stdin: Option<File>, terminal: Option<OwnedFd>) {
    while let Ok(frame) = Frame::receive(&mut from_host) {
        match frame {
            Frame::Stdin(bytes) if bytes.is_empty() => match (&terminal, &mut stdin) {
                (Some(_), Some(pipe)) => {
                    let _ = pipe.write_all(&[4]); // Ctrl-D, which is how a terminal ends
                }
                _ => stdin = None,
            },
            Frame::Stdin(bytes) => {
                // A command that has closed its stdin loses nothing that it wanted.
                let refused = stdin
                    .as_mut()
                    .is_some_and(|pipe| pipe.write_all(&bytes).is_err());
                if refused {
                    stdin = None;
                }
            }
            Frame::Window(rows, columns) => {
                if let Some(terminal) = &terminal {
                    let size = libc::winsize {
                        ws_row: rows,
                        ws_col: columns,
                        ws_xpixel: 0,
                        ws_ypixel: 0,
                    };
                    // SAFETY: TIOCSWINSZ reads the size, which lives as long as the call.
                    unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
                }
            }
            _ => {}
        }
    }
}

/// The exit status of `child`, as a shell gives it. As the first process we collect everyone's orphans meanwhile.
fn wait_for(child: i32) -> Result<i32> {
    loop {
        let mut status = 0;
        // SAFETY: waitpid writes the status, which lives as long as the call.
        let ended = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        if ended == child {
            return Ok(if libc::WIFEXITED(status) {
                libc::WEXITSTATUS(status)
            } else {
                128 + libc::WTERMSIG(status)
            });
        }
        if ended < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(Failure::new(format!(
                    "the command cannot be waited for: {error}"
                )));
            }
        }
    }
}
