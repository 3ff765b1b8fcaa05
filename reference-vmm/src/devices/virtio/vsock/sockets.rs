// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The host's sockets: one that programs connect to, and those that the guest connects to.

use std::ffi::OsString;
use std::fmt::Debug;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use crate::unix_socket::{self, BindError, Listener};

/// So many programs can wait to be accepted: a guest's driver that is not ready yet accepts nobody.
const BACKLOG: i32 = 128;

/// Where a guest's connections end on the host. None of it blocks.
pub trait Sockets: Send + Debug + 'static {
    /// Readable when somebody has connected.
    fn listener(&self) -> RawFd;
    /// Who has connected, as a socket that does not block.
    ///
    /// # Errors
    /// `WouldBlock` where nobody has; else the host's.
    fn accept(&self) -> io::Result<UnixStream>;
    /// Connects to the host's `port` for the guest, at once.
    ///
    /// # Errors
    /// The host's: nobody listens there.
    fn connect(&self, port: u32) -> io::Result<UnixStream>;
    /// Where programs connect.
    fn path(&self) -> &Path;
}

/// `PATH`, and `PATH_1`, `PATH_2` … beside it.
#[derive(Debug)]
pub struct UnixSockets {
    listener: Listener,
}

impl UnixSockets {
    /// Listens at `path`, which is its user's alone.
    ///
    /// # Errors
    /// [`BindError`]; nothing was made.
    pub fn listen(path: &Path) -> Result<Self, BindError> {
        let listener = Listener::bind(path, BACKLOG)?;
        Ok(UnixSockets { listener })
    }
}

impl Sockets for UnixSockets {
    fn listener(&self) -> RawFd {
        self.listener.as_raw_fd()
    }

    fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept()
    }

    fn connect(&self, port: u32) -> io::Result<UnixStream> {
        unix_socket::connect(&port_path(self.path(), port))
    }

    fn path(&self) -> &Path {
        self.listener.path()
    }
}

/// `PATH_PORT`: where the guest's connections to `port` go.
pub fn port_path(path: &Path, port: u32) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(format!("_{port}"));
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ports_path_is_the_path_with_the_port_behind_it() {
        let path = port_path(Path::new("/run/v.sock"), u32::MAX);
        assert_eq!(path, Path::new("/run/v.sock_4294967295"));
    }
}
