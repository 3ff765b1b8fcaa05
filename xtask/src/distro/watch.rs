// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Runs the monitor where the KVM is, in the lab machine or on this host: makes the tap, tells how the guest is reached,
//! and leaves its console to the terminal, or talks to it by script.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::LAB_PORTS;
use super::console::Console;
use crate::failure::{Context, Failure, Result};
use crate::host;
use crate::ui::say;

/// The command line's word for this part inside the lab: not for people.
pub(crate) const WATCH_COMMAND: &str = "boot-distro-watch";

/// The guest's end of its network, as `after.sh` has it, and ours.
const GUEST: &str = "192.168.127.2";
const OURS: &str = "192.168.127.1";
const MASK: &str = "255.255.255.0";
const TAP: &str = "guest0";
const CID: u32 = 3;
/// Where sshd listens, on the network and on vsock.
const SSH: u16 = 22;

/// An emulated machine within an emulated machine needs a minute or two for a login, and a busy host several.
const PATIENCE: Duration = Duration::from_secs(600);

/// What is to be run, and how.
pub(super) struct Watch {
    /// Whether a person is at the console.
    pub(super) interactive: bool,
    pub(super) busybox: PathBuf,
    /// The guest's disk. The guest may write to it.
    pub(super) disk: PathBuf,
    /// The ports of the lab's host, where this runs in the lab: they lead to [`LAB_PORTS`].
    pub(super) forwarded: Option<[u16; 2]>,
    /// The monitor, and its options but for the devices.
    pub(super) monitor: Vec<OsString>,
}

/// What [`Watch::into_words`] has written.
pub(crate) fn command(words: Vec<OsString>) -> Result<i32> {
    Watch::from_words(words)
        .ok_or_else(|| Failure::usage("this command is not for people: cargo xtask boot --distro"))?
        .run()
}

impl Watch {
    /// As words of a command line.
    pub(super) fn into_words(self) -> Vec<OsString> {
        let ports = self.forwarded.unwrap_or_default();
        let mut words: Vec<OsString> = vec![
            if self.interactive {
                "terminal"
            } else {
                "script"
            }
            .into(),
            self.busybox.into(),
            self.disk.into(),
        ];
        words.extend(ports.map(|port| port.to_string().into()));
        words.extend(self.monitor);
        words
    }

    fn from_words(words: Vec<OsString>) -> Option<Watch> {
        let mut words = words.into_iter();
        let interactive = match words.next()?.to_str()? {
            "terminal" => true,
            "script" => false,
            _ => return None,
        };
        let (busybox, disk) = (words.next()?.into(), words.next()?.into());
        let mut port = || words.next()?.to_str()?.parse().ok();
        let ports: [u16; 2] = [port()?, port()?];
        Some(Watch {
            interactive,
            busybox,
            disk,
            forwarded: ports.iter().all(|port| *port != 0).then_some(ports),
            monitor: words.collect(),
        })
    }

    /// To the guest's end; the monitor's exit status, or 1 where the script found something amiss.
    pub(super) fn run(self) -> Result<i32> {
        let _tap = Tap::make(&self.busybox)?;
        let vsock = Socket::free();
        if self.forwarded.is_some() {
            lab_network(&self.busybox)?;
            forward(LAB_PORTS[0], || {
                TcpStream::connect((GUEST, SSH)).map(Peer::Tcp)
            })?;
            let path = vsock.0.clone();
            forward(LAB_PORTS[1], move || connect_vsock(&path).map(Peer::Unix))?;
        }
        let (program, options) = self
            .monitor
            .split_first()
            .ok_or_else(|| Failure::usage("no VMM was given"))?;
        let mut disk = OsString::from("path=");
        disk.push(&self.disk);
        let mut uds = OsString::from(format!("cid={CID},uds="));
        uds.push(&vsock.0);
        let mut command = Command::new(program);
        command.args(options);
        command.arg("--disk").arg(disk);
        command.arg("--net").arg(format!("tap={TAP}"));
        command.arg("--vsock").arg(uds);
        command.arg("--rng");
        say(self.how_to_reach(&vsock.0));
        if self.interactive {
            let status = command
                .status()
                .context(|| format!("{} does not start", program.display()))?;
            return Ok(code(status));
        }
        by_script(command, &vsock.0)
    }

    /// The note at the start.
    fn how_to_reach(&self, vsock: &Path) -> String {
        let mut text = String::from(
            "a Debian for development: log in as root, there is no password. What it writes is gone at its end; \
             `poweroff` ends it, Ctrl-A x at once.",
        );
        match self.forwarded {
            Some([network, by_vsock]) => {
                let ssh = "ssh -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null root@127.0.0.1 -p";
                text.push_str(&format!(
                    " When it is up, from another terminal of this host:\n  by network  {ssh} {network}\n  by vsock    {ssh} {by_vsock}"
                ));
            }
            None => {
                let ssh = "ssh -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null";
                text.push_str(&format!(
                    " When it is up, from another terminal:\n  by network  {ssh} root@{GUEST}\n  by vsock    {ssh} \
                     -o ProxyCommand=\"sh -c '{{ echo CONNECT {SSH}; cat; }} | socat - UNIX-CONNECT:{}'\" root@guest",
                    vsock.display()
                ));
            }
        }
        text
    }
}

/// The exit status as a shell has it.
fn code(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Logs in, looks whether all is well, and powers off.
fn by_script(mut command: Command, vsock: &Path) -> Result<i32> {
    let begun = Instant::now();
    let mut monitor = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context(|| format!("{} does not start", command.get_program().display()))?;
    let (Some(stdin), Some(stdout)) = (monitor.stdin.take(), monitor.stdout.take()) else {
        return Err(Failure::new("the monitor has no console"));
    };
    let mut console = Console::new(stdin, stdout, io::stdout());
    let outcome = converse(&mut console, vsock, begun);
    if outcome.is_err() {
        // What it still does is of no use; it may have ended already.
        let _ = monitor.kill();
    }
    let status = monitor
        .wait()
        .context(|| "the monitor cannot be waited for".into())?;
    eprintln!(); // the guest may have left its last line open
    match outcome {
        Ok(()) => {
            say(format!(
                "the guest has powered off after {:.1} s",
                begun.elapsed().as_secs_f64()
            ));
            Ok(code(status))
        }
        Err(failure) => {
            Err(Failure::new(format!("{failure} (the monitor: {status})")).with_status(1))
        }
    }
}

fn converse(console: &mut Console, vsock: &Path, begun: Instant) -> Result<()> {
    console.log_in(PATIENCE)?;
    say(format!(
        "logged in after {:.1} s",
        begun.elapsed().as_secs_f64()
    ));
    let mut run = |command: &str| {
        say(format!("# {command}"));
        console.run(command, PATIENCE)
    };
    // Until the last job of the boot is done.
    let (status, state) = run("systemctl is-system-running --wait")?;
    if status != 0 || state.trim() != "running" {
        let (_, failed) = run("systemctl --failed --no-pager")?;
        return Err(Failure::new(format!(
            "the system is {:?}, and not running:\n{failed}",
            state.trim()
        )));
    }
    for question in ["lsblk", "ip addr"] {
        let (status, answer) = run(question)?;
        if status != 0 {
            return Err(Failure::new(format!(
                "{question} ended with {status}: {answer}"
            )));
        }
    }
    let network = TcpStream::connect((GUEST, SSH)).context(|| format!("{GUEST} port {SSH}"))?;
    let by_vsock = connect_vsock(vsock).context(|| format!("vsock port {SSH}"))?;
    say(format!(
        "by network the guest's sshd says {:?}, by vsock {:?}",
        greeting(network)?,
        greeting(by_vsock)?
    ));
    console.power_off(PATIENCE)
}

/// What sshd says first to whoever comes.
fn greeting(from: impl Read) -> Result<String> {
    let mut line = String::new();
    BufReader::new(from)
        .read_line(&mut line)
        .context(|| "sshd says nothing".into())?;
    match line.starts_with("SSH-2.0-") {
        true => Ok(line.trim_end().to_owned()),
        false => Err(Failure::new(format!("sshd says {line:?}"))),
    }
}

/// A connection to the guest's vsock port of sshd, by the convention of the unix-socket back end.
fn connect_vsock(path: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("CONNECT {SSH}\n").as_bytes())?;
    // Byte by byte, for what follows the line is the guest's.
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < 64 && byte != *b"\n" {
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    if !line.starts_with(b"OK ") {
        let told = String::from_utf8_lossy(&line).into_owned();
        return Err(io::Error::other(format!("{told:?} and not OK")));
    }
    Ok(stream)
}

/// A tap with our address, which goes with this value.
struct Tap {
    busybox: PathBuf,
}

impl Tap {
    fn make(busybox: &Path) -> Result<Tap> {
        if Path::new("/sys/class/net").join(TAP).exists() {
            return Err(Failure::new(format!(
                "there is an interface {TAP} already: another `cargo xtask boot --distro` runs, or was killed \
                 (`ip link delete {TAP}` then)"
            )));
        }
        applet(busybox, &["tunctl", "-t", TAP]).map_err(|failure| {
            Failure::new(format!(
                "the guest's tap cannot be made, which takes root and /dev/net/tun: {failure}"
            ))
        })?;
        let tap = Tap {
            busybox: busybox.to_owned(),
        };
        applet(busybox, &["ifconfig", TAP, OURS, "netmask", MASK, "up"])?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // One that has gone already is as good.
        let _ = applet(&self.busybox, &["tunctl", "-d", TAP]);
    }
}

fn applet(busybox: &Path, words: &[&str]) -> Result<String> {
    host::output_of(busybox, words.iter().map(OsStr::new))
}

/// The path of the vsock's socket, and no file there after this value.
struct Socket(PathBuf);

impl Socket {
    fn free() -> Socket {
        let name = format!("reference-vmm-{}.vsock", std::process::id());
        Socket(std::env::temp_dir().join(name))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0); // the monitor may have removed it itself
    }
}

/// The lab machine's own interface, on QEMU's network of one host: its address there is always this.
fn lab_network(busybox: &Path) -> Result<()> {
    let words = ["ifconfig", "eth0", "10.0.2.15", "netmask", MASK, "up"];
    applet(busybox, &words).map(|_| ())
}

/// The two kinds of stream that lead to the guest.
enum Peer {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Takes connections to `port` of this machine, each to what `connect` makes.
fn forward(port: u16, connect: impl Fn() -> io::Result<Peer> + Send + 'static) -> Result<()> {
    let listener =
        TcpListener::bind(("0.0.0.0", port)).context(|| format!("port {port} of the lab"))?;
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            // A guest that is not up yet, or a client that has gone: the client sees its connection closed.
            let _ = match connect() {
                Ok(Peer::Tcp(guest)) => {
                    both_ways(client, guest, TcpStream::try_clone, TcpStream::shutdown)
                }
                Ok(Peer::Unix(guest)) => {
                    both_ways(client, guest, UnixStream::try_clone, UnixStream::shutdown)
                }
                Err(error) => Err(error),
            };
        }
    });
    Ok(())
}

/// Passes on what either says, to the end of each, on threads of their own.
fn both_ways<S>(
    client: TcpStream,
    guest: S,
    again: fn(&S) -> io::Result<S>,
    shutdown: fn(&S, Shutdown) -> io::Result<()>,
) -> io::Result<()>
where
    S: Read + Write + Send + 'static,
{
    let (mut client_in, mut client_out) = (client.try_clone()?, client);
    let (mut guest_in, mut guest_out) = (again(&guest)?, guest);
    thread::spawn(move || {
        // Either end may go at any time, which ends this half.
        let _ = io::copy(&mut client_in, &mut guest_out);
        let _ = shutdown(&guest_out, Shutdown::Write);
    });
    thread::spawn(move || {
        let _ = io::copy(&mut guest_in, &mut client_out);
        let _ = client_out.shutdown(Shutdown::Write);
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_to_be_run_reaches_the_lab_as_it_was() {
        let words = |forwarded| Watch {
            interactive: true,
            busybox: "/b".into(),
            disk: "/dev/vda".into(),
            forwarded,
            monitor: vec!["/vmm".into(), "run".into(), "--cpus".into(), "2".into()],
        };
        for forwarded in [None, Some([40000, 40001])] {
            let there = Watch::from_words(words(forwarded).into_words()).unwrap();
            assert!(there.interactive);
            assert_eq!(there.busybox, Path::new("/b"));
            assert_eq!(there.disk, Path::new("/dev/vda"));
            assert_eq!(there.forwarded, forwarded);
            assert_eq!(there.monitor, words(forwarded).monitor);
        }
        assert!(Watch::from_words(vec!["script".into(), "/b".into()]).is_none());
        assert!(Watch::from_words(vec!["hello".into()]).is_none());
    }

    #[test]
    fn the_note_says_how_the_guest_is_reached() {
        let mut watch = Watch::from_words(
            ["terminal", "/b", "/d", "40000", "40001"]
                .map(OsString::from)
                .into(),
        )
        .unwrap();
        let note = watch.how_to_reach(Path::new("/tmp/v"));
        assert!(
            note.contains("-p 40000") && note.contains("-p 40001"),
            "{note}"
        );
        watch.forwarded = None;
        let note = watch.how_to_reach(Path::new("/tmp/v"));
        assert!(note.contains("root@192.168.127.2"), "{note}");
        assert!(note.contains("UNIX-CONNECT:/tmp/v"), "{note}");
    }
}
