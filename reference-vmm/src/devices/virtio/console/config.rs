// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `--console` and `--port`: where the ports of a machine lead to.

use std::collections::HashSet;
use std::fs::OpenOptions;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::super::block::lock::is_locked;
use super::control::Size;
use super::host::{Host, Output, Shared};
use super::input::InputQueue;
use super::{Console, MOST_PORTS, NamedPort, Resizer};
use crate::config::is_about_the_path;
use crate::gdb::{Address, ListenError, Listener};

/// What errors of the console have in the place of a port's name.
const HVC0: &str = "hvc0";

/// Where hvc0 leads to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleConfig {
    /// There is none.
    #[default]
    Off,
    /// The monitor's stdin and stdout.
    Stdio,
    /// A file, emptied first, that gets the output. No input.
    File(PathBuf),
    /// A socket that one at a time may connect to.
    Unix(PathBuf),
}

impl ConsoleConfig {
    /// From the command line: `stdio`, `off`, `file=PATH` or `unix=PATH`.
    ///
    /// # Errors
    /// [`ConsoleError::Console`].
    pub fn parse(text: &str) -> Result<Self, ConsoleError> {
        match text.split_once('=') {
            None if text == "stdio" => Ok(ConsoleConfig::Stdio),
            None if text == "off" => Ok(ConsoleConfig::Off),
            Some(("file", path)) => Ok(ConsoleConfig::File(path.into())),
            Some(("unix", path)) => Ok(ConsoleConfig::Unix(path.into())),
            _ => Err(ConsoleError::Console { given: text.into() }),
        }
    }
}

/// A named port.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "RawPort")]
pub struct PortConfig {
    /// By which the guest finds it.
    pub name: String,
    /// Where it leads to.
    pub to: PortEnd,
}

/// Where a named port leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortEnd {
    /// A file, emptied first, that gets the output. No input.
    File(PathBuf),
    /// A socket that one at a time may connect to.
    Unix(PathBuf),
}

/// As it is in JSON: `{"name": "agent", "unix": "/run/agent.sock"}`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPort {
    name: String,
    #[serde(default)]
    unix: Option<PathBuf>,
    #[serde(default)]
    file: Option<PathBuf>,
}

impl TryFrom<RawPort> for PortConfig {
    type Error = ConsoleError;

    fn try_from(RawPort { name, unix, file }: RawPort) -> Result<Self, ConsoleError> {
        let to = match (unix, file) {
            (Some(path), None) => PortEnd::Unix(path),
            (None, Some(path)) => PortEnd::File(path),
            (None, None) => return Err(refused(&name, "unix=PATH or file=PATH is missing")),
            (Some(_), Some(_)) => return Err(refused(&name, "either unix=PATH or file=PATH")),
        };
        Ok(PortConfig { name, to })
    }
}

impl PortConfig {
    /// From the command line: `name=NAME,unix=PATH` or `name=NAME,file=PATH`. A path with a comma can be given in a JSON
    /// file only.
    ///
    /// # Errors
    /// [`ConsoleError::Port`].
    pub fn parse(text: &str) -> Result<Self, ConsoleError> {
        let (mut name, mut unix, mut file) = (None, None, None);
        for option in text.split(',') {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            let place = match key {
                "name" => &mut name,
                "unix" => &mut unix,
                "file" => &mut file,
                _ => {
                    let why = format!("{option}: not one of name=NAME, unix=PATH, file=PATH");
                    return Err(refused(text, &why));
                }
            };
            if place.replace(value.to_owned()).is_some() {
                return Err(refused(text, &format!("{option}: {key} is there twice")));
            }
        }
        let name = name.ok_or_else(|| refused(text, "name=NAME is missing"))?;
        let (unix, file) = (unix.map(PathBuf::from), file.map(PathBuf::from));
        RawPort { name, unix, file }.try_into()
    }
}

/// A console or port cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConsoleError {
    /// Not a form of `--console`.
    #[error("{given}: not one of stdio, file=PATH, unix=PATH, off")]
    Console {
        /// What there was.
        given: String,
    },
    /// A named port cannot be so.
    #[error("{given}: {why}")]
    Port {
        /// Its name, or what there was.
        given: String,
        /// What is wrong.
        why: String,
    },
    /// A path is empty.
    #[error("{of}: its path is empty")]
    EmptyPath {
        /// `hvc0`, or a port's name.
        of: String,
    },
    /// A file is the image of a disk, of this machine or another one's: to empty it would destroy it.
    #[error("{of}: {} is a disk that is in use; name another file", path.display())]
    Disk {
        /// `hvc0`, or a port's name.
        of: String,
        /// The file.
        path: PathBuf,
    },
    /// A file cannot be written.
    #[error("{of}: cannot write {}: {source}", path.display())]
    File {
        /// `hvc0`, or a port's name.
        of: String,
        /// The file.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
    /// Nobody can connect.
    #[error("{of}: cannot listen at {}: {why}", path.display())]
    Socket {
        /// `hvc0`, or a port's name.
        of: String,
        /// The socket.
        path: PathBuf,
        /// Why.
        why: String,
        /// By the path that was given.
        users_fault: bool,
    },
    /// The host refused what every console needs.
    #[error("cannot make a console: {0}")]
    Host(#[from] io::Error),
}

impl ConsoleError {
    /// The flag that it is about.
    pub fn flag(&self) -> &'static str {
        match self {
            ConsoleError::Console { .. } | ConsoleError::Host(_) => "--console",
            ConsoleError::Port { .. } => "--port",
            ConsoleError::EmptyPath { of }
            | ConsoleError::Disk { of, .. }
            | ConsoleError::File { of, .. }
            | ConsoleError::Socket { of, .. } => match of.as_str() {
                HVC0 => "--console",
                _ => "--port",
            },
        }
    }

    /// Whether the user asked for what cannot be (exit status 2), and not the host refused (1).
    pub fn is_users_fault(&self) -> bool {
        match self {
            ConsoleError::File { source, .. } => is_about_the_path(source),
            ConsoleError::Socket { users_fault, .. } => *users_fault,
            ConsoleError::Host(_) => false,
            _ => true,
        }
    }
}

fn refused(given: &str, why: &str) -> ConsoleError {
    ConsoleError::Port {
        given: given.into(),
        why: why.into(),
    }
}

/// Refuses what cannot be, without looking at the host.
///
/// # Errors
/// [`ConsoleError`].
pub fn check(console: &ConsoleConfig, ports: &[PortConfig]) -> Result<(), ConsoleError> {
    if let ConsoleConfig::File(path) | ConsoleConfig::Unix(path) = console {
        check_path(HVC0, path)?;
    }
    let mut names = HashSet::new();
    for PortConfig { name, to } in ports {
        let wrong = |why| Err(refused(name, why));
        if name.is_empty() || name.len() > 64 || matches!(name.as_str(), "." | "..") {
            return wrong("a name has 1 to 64 bytes, and is not . or ..");
        }
        if name == HVC0 {
            return wrong("that is the console's name");
        }
        if name.contains(|c: char| c == '/' || c.is_control() || c.is_whitespace()) {
            return wrong("a name is that of a file in the guest: no /, no space");
        }
        if !names.insert(name) {
            return wrong("there is another port of this name");
        }
        let (PortEnd::File(path) | PortEnd::Unix(path)) = to;
        check_path(name, path)?;
    }
    match ports.get(MOST_PORTS - 1) {
        Some(port) => Err(refused(
            &port.name,
            &format!("there are more than {} ports", MOST_PORTS - 1),
        )),
        None => Ok(()),
    }
}

fn check_path(of: &str, path: &Path) -> Result<(), ConsoleError> {
    match path.as_os_str().is_empty() {
        true => Err(ConsoleError::EmptyPath { of: of.into() }),
        false => Ok(()),
    }
}

/// What becomes of a file that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Files {
    /// It is emptied: a new machine.
    Empty,
    /// It is written on: a machine that was restored.
    Keep,
}

/// A console on stdin and stdout, as the main thread has it.
#[derive(Clone, Debug)]
pub struct Stdio {
    /// Who has stdin's bytes.
    pub input: InputQueue,
    /// Who is told the terminal's size.
    pub resizer: Resizer,
}

/// Consoles, and what the main thread needs of them.
#[derive(Debug, Default)]
pub struct Opened {
    /// hvc0.
    pub console: Option<Console>,
    /// A device with the named ports.
    pub ports: Option<Console>,
    /// With `stdio`.
    pub stdio: Option<Stdio>,
}

/// Opens the host's sides of all ports. hvc0 has a device of its own.
///
/// # Errors
/// [`ConsoleError`], also those of [`check`]. Files may have been emptied; sockets are removed again.
pub fn open(
    console: &ConsoleConfig,
    ports: &[PortConfig],
    stdout: impl AsFd,
    files: Files,
) -> Result<Opened, ConsoleError> {
    check(console, ports)?;
    let mut opened = Opened::default();
    let mut size = Size::default();
    let mut input = None;
    let host = match console {
        ConsoleConfig::Off => None,
        ConsoleConfig::Stdio => {
            size = terminal_size(&stdout).unwrap_or_default();
            let queue = InputQueue::new()?;
            input = Some(queue.clone());
            Some(Host::Fixed {
                source: Some(Box::new(queue)),
                sink: Some(Box::new(Shared::new(stdout)?)),
            })
        }
        ConsoleConfig::File(path) => Some(open_file(HVC0, path, files)?),
        ConsoleConfig::Unix(path) => Some(open_socket(HVC0, path)?),
    };
    if let Some(host) = host {
        let console = Console::single(host, size)?;
        opened.stdio = input.map(|input| Stdio {
            input,
            resizer: console.resizer(),
        });
        opened.console = Some(console);
    }
    let named = ports.iter().map(|PortConfig { name, to }| {
        let host = match to {
            PortEnd::File(path) => open_file(name, path, files)?,
            PortEnd::Unix(path) => open_socket(name, path)?,
        };
        let name = name.clone();
        Ok(NamedPort { name, host })
    });
    let named = named.collect::<Result<Vec<_>, ConsoleError>>()?;
    if !named.is_empty() {
        opened.ports = Some(Console::multiport(None, named, Size::default())?);
    }
    Ok(opened)
}

fn open_file(of: &str, path: &Path, files: Files) -> Result<Host, ConsoleError> {
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        // A pipe or a terminal may be given as well.
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    let failed = |source| ConsoleError::File {
        of: of.into(),
        path: path.into(),
        source,
    };
    let file = file.map_err(failed)?;
    let kind = file.metadata().map_err(failed)?.file_type();
    if (kind.is_file() || kind.is_block_device()) && is_locked(&file) {
        return Err(ConsoleError::Disk {
            of: of.into(),
            path: path.into(),
        });
    }
    if kind.is_file() && files == Files::Empty {
        file.set_len(0).map_err(failed)?;
    }
    Ok(Host::Fixed {
        source: None,
        sink: Some(Box::new(Output(file))),
    })
}

fn open_socket(of: &str, path: &Path) -> Result<Host, ConsoleError> {
    // As gdb's: a socket that nobody listens at any more is replaced, any other file left alone; it is its user's alone,
    // and removed at the end.
    let listener = Listener::bind(&Address::Unix(path.into())).map_err(|error| {
        let (why, users_fault) = match &error {
            ListenError::Occupied { .. } => ("there is something that is no socket".into(), true),
            ListenError::InUse { .. } => ("another process listens there".into(), false),
            ListenError::Refused { source, .. } => (source.to_string(), is_about_the_path(source)),
        };
        ConsoleError::Socket {
            of: of.into(),
            path: path.into(),
            why,
            users_fault,
        }
    })?;
    Ok(Host::Served {
        listener: Box::new(listener),
        connection: None,
    })
}

/// The size of the terminal that this is, if it is one.
pub fn terminal_size(terminal: &impl AsFd) -> Option<Size> {
    let mut size = MaybeUninit::<libc::winsize>::uninit();
    let fd = terminal.as_fd().as_raw_fd();
    // SAFETY: the call fills `size` when it succeeds, and it is read only then.
    let size = unsafe {
        match libc::ioctl(fd, libc::TIOCGWINSZ, size.as_mut_ptr()) {
            0 => size.assume_init(),
            _ => return None,
        }
    };
    Some(Size {
        cols: size.ws_col,
        rows: size.ws_row,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_is_stdio_off_a_file_or_a_socket_in_both_forms() {
        for (text, json, expected) in [
            ("stdio", r#""stdio""#, ConsoleConfig::Stdio),
            ("off", r#""off""#, ConsoleConfig::Off),
            (
                "file=/a=b,c",
                r#"{"file": "/a=b,c"}"#,
                ConsoleConfig::File("/a=b,c".into()),
            ),
            (
                "unix=x",
                r#"{"unix": "x"}"#,
                ConsoleConfig::Unix("x".into()),
            ),
        ] {
            assert_eq!(ConsoleConfig::parse(text).unwrap(), expected);
            let parsed: ConsoleConfig = serde_json::from_str(json).unwrap();
            assert_eq!(parsed, expected);
        }
        for wrong in ["", "tty", "stdio=1", "pty=/x", "file"] {
            let error = ConsoleConfig::parse(wrong).unwrap_err();
            assert!(error.is_users_fault());
            assert!(error.to_string().contains(wrong), "{error}");
        }
    }

    #[test]
    fn a_port_has_a_name_and_one_end_in_both_forms() {
        let port = PortConfig {
            name: "org.qemu.0".into(),
            to: PortEnd::Unix("/run/x".into()),
        };
        assert_eq!(
            PortConfig::parse("name=org.qemu.0,unix=/run/x").unwrap(),
            port
        );
        let json = r#"{"name": "org.qemu.0", "unix": "/run/x"}"#;
        assert_eq!(serde_json::from_str::<PortConfig>(json).unwrap(), port);
        for wrong in [
            "",
            "name=a",
            "unix=/x",
            "name=a,unix=/x,file=/y",
            "name=a,unix=/x,unix=/y",
            "name=a,unix=/x,wait",
        ] {
            let error = PortConfig::parse(wrong).unwrap_err();
            assert!(error.is_users_fault(), "{error}");
        }
        for wrong in [
            r#"{"name": "a"}"#,
            r#"{"name": "a", "unix": "x", "file": "y"}"#,
            r#"{"name": "a", "unix": "x", "wait": true}"#,
        ] {
            serde_json::from_str::<PortConfig>(wrong).unwrap_err();
        }
    }

    #[test]
    fn a_disk_in_use_is_not_emptied_nor_written() {
        use super::super::super::block::Image;
        let image = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(image.path(), [7; 512]).unwrap();
        let console = ConsoleConfig::File(image.path().into());
        let ports = [PortConfig {
            name: "a".into(),
            to: PortEnd::File(image.path().into()),
        }];
        for readonly in [false, true] {
            let disk = Image::open(image.path(), readonly).unwrap();
            for files in [Files::Empty, Files::Keep] {
                for (console, ports) in [(&console, &[][..]), (&ConsoleConfig::Off, &ports[..])] {
                    let error = open(console, ports, io::stdout(), files).unwrap_err();
                    assert!(error.is_users_fault());
                    let text = error.to_string();
                    assert!(text.contains(image.path().to_str().unwrap()), "{text}");
                }
            }
            drop(disk);
        }
        assert_eq!(std::fs::read(image.path()).unwrap(), [7; 512]);
        open(&console, &ports, io::stdout(), Files::Empty).unwrap();
        assert_eq!(std::fs::read(image.path()).unwrap(), b"");
    }

    #[test]
    fn names_that_are_no_files_and_those_that_are_there_twice_are_refused() {
        let port = |name: &str| PortConfig {
            name: name.into(),
            to: PortEnd::Unix("/x".into()),
        };
        let check = |ports: &[PortConfig]| check(&ConsoleConfig::Off, ports);
        check(&[port("a"), port("b.c-d:0")]).unwrap();
        for name in ["", ".", "..", "a/b", "a b", "a\n", &"x".repeat(65)] {
            assert!(check(&[port(name)]).is_err(), "{name:?}");
        }
        assert!(check(&[port("a"), port("a")]).is_err());
        let many: Vec<_> = (0..MOST_PORTS).map(|n| port(&n.to_string())).collect();
        check(&many[1..]).unwrap();
        assert!(check(&many).is_err());
    }

    #[test]
    fn what_the_host_has_not_is_told_before_there_is_a_device_and_sockets_are_removed_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let (file, socket) = (path("out"), path("sock"));
        std::fs::write(&file, "before").unwrap();
        let console = ConsoleConfig::File(file.clone());
        let port = |to| PortConfig {
            name: "a".into(),
            to,
        };
        let open = |console: &_, ports: &[_], files| open(console, ports, io::stdout(), files);
        let ports = [port(PortEnd::Unix(socket.clone()))];
        drop(open(&console, &ports, Files::Keep).unwrap());
        assert_eq!(std::fs::read(&file).unwrap(), b"before");
        let opened = open(&console, &ports, Files::Empty).unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), b"");
        assert!(socket.exists() && opened.console.is_some() && opened.ports.is_some());

        // Somebody listens there, which is the host's state; it is no folder; it is no socket.
        for (to, users_fault) in [
            (PortEnd::Unix(socket.clone()), false),
            (PortEnd::File(path("none/x")), true),
            (PortEnd::Unix(file.clone()), true),
        ] {
            let error = open(&ConsoleConfig::Off, &[port(to)], Files::Empty).unwrap_err();
            assert_eq!(error.is_users_fault(), users_fault, "{error}");
        }
        drop(opened);
        assert!(!socket.exists());
    }
}
