// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Unix stream sockets that are found by a path: one that listens, and a connection to one. Neither blocks, but for a
//! moment where several processes replace sockets in one folder at once.
//!
//! A listening one is its user's alone from the moment when it exists (mode 0600, set before it is bound), and its
//! file goes with it. What stands at the path already is left alone, unless it is a socket that nobody listens at.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::config::is_about_the_path;

/// Bytes that a socket's path can have. One byte of the kernel's 108 is for the zero behind it.
pub const MAX_PATH: usize = 107;

/// A path cannot be listened at. Who shows it says which path of what.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// There is something else, which is left alone.
    #[error("what is there is no socket, and is left alone; name another path")]
    Occupied,
    /// Another process listens there, or has a socket of another kind there.
    #[error(
        "another process listens there, or this one for something else, or has a socket of another kind there; name another path"
    )]
    InUse,
    /// The system refused.
    #[error("cannot listen there: {0}")]
    Refused(io::Error),
}

impl BindError {
    /// Whether another path would do, whatever becomes of this one; a path in use is the host's state.
    pub fn is_users_fault(&self) -> bool {
        match self {
            BindError::Occupied => true,
            BindError::InUse => false,
            BindError::Refused(error) => is_about_the_path(error),
        }
    }
}

/// A socket that listens. Dropped, it is closed, and its file removed.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, which is removed at the end if it is this one still.
    file: Option<(u64, u64)>,
}

impl Listener {
    /// Device and inode of its file, by which who connects can tell it from another at the same path.
    pub fn file(&self) -> Option<(u64, u64)> {
        self.file
    }

    /// Listens at `path`, for up to `backlog` connections that wait to be accepted. A socket that nobody listens at any
    /// more, which a killed monitor leaves behind, is replaced; any other file is left alone.
    ///
    /// # Errors
    /// [`BindError`]; nothing was made.
    pub fn bind(path: &Path, backlog: i32) -> Result<Self, BindError> {
        let _replacing = remove_stale(path)?;
        let listener = bind_private(path, backlog).map_err(|error| match error.kind() {
            // Since the path was found free.
            io::ErrorKind::AddrInUse => BindError::InUse,
            _ => BindError::Refused(error),
        })?;
        let file = fs::symlink_metadata(path).ok();
        Ok(Listener {
            listener,
            path: path.to_owned(),
            file: file.map(|file| (file.dev(), file.ino())),
        })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Who has connected, as a socket that does not block.
    ///
    /// # Errors
    /// `WouldBlock` where nobody has; else the host's.
    pub fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    /// Removes the socket's file, if it is this one's still.
    pub(crate) fn unlink(&self) {
        let Some(ours) = self.file else {
            return;
        };
        let path = &self.path;
        let found = fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()));
        if found.is_ok_and(|found| found == ours)
            && let Err(error) = fs::remove_file(path)
        {
            log::warn!("cannot remove the socket {}: {error}", path.display());
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.unlink();
    }
}

/// Connects to the socket at `path`, and does not wait: a Unix socket is connected at once or refused.
///
/// # Errors
/// `ENOENT` and `ECONNREFUSED`: nobody listens there. `WouldBlock`: as many as it takes wait there to be accepted.
/// `InvalidInput`: it is no stream socket, or can be none.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    connect_by(socket()?.into(), path)
}

/// The same, and where as many as it takes wait there to be accepted, waits up to `timeout`, which is not 0. The socket
/// blocks, and its writes have the same limit.
///
/// # Errors
/// As [`connect`]'s; `WouldBlock` after the time.
pub fn connect_within(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let until = Instant::now() + timeout;
    loop {
        let stream = UnixStream::from(socket()?);
        stream.set_nonblocking(false)?;
        let left = until.saturating_duration_since(Instant::now());
        // unix(7) has a connection wait by the limit of writes.
        stream.set_write_timeout(Some(left.max(Duration::from_millis(1))))?;
        match connect_by(stream, path) {
            // By a signal, or for this process was stopped: it waits on.
            Err(error) if error.kind() == io::ErrorKind::Interrupted && Instant::now() < until => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Err(error) => return Err(error),
            Ok(stream) => {
                stream.set_write_timeout(Some(timeout))?;
                return Ok(stream);
            }
        }
    }
}

fn connect_by(stream: UnixStream, path: &Path) -> io::Result<UnixStream> {
    let address = socket_address(path)?;
    let len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: the address is initialised and as long as is said, and is only read.
    if unsafe { libc::connect(stream.as_raw_fd(), (&raw const address).cast(), len) } < 0 {
        let error = io::Error::last_os_error();
        let other =
            is_other(path, &error).map(|is| io::Error::new(io::ErrorKind::InvalidInput, is));
        return Err(other.unwrap_or(error));
    }
    Ok(stream)
}

/// Whether somebody may listen at `path`, now or later: it leads to a socket, or to nothing.
///
/// # Errors
/// What is there instead.
pub(crate) fn may_lead_to_one(path: &Path) -> io::Result<()> {
    let other = kind_of_other(path).map(wanted);
    other.map_or(Ok(()), |what| {
        Err(io::Error::new(io::ErrorKind::InvalidInput, what))
    })
}

/// What is at `path` that nobody ever connects to: the system says of it what it says of a socket that nobody listens at.
fn is_other(path: &Path, error: &io::Error) -> Option<String> {
    match error.raw_os_error()? {
        libc::EPROTOTYPE => Some("a socket of another kind (of datagrams, or of packets)"),
        libc::ECONNREFUSED => kind_of_other(path),
        _ => None,
    }
    .map(wanted)
}

/// What is at `path`, if that is no socket.
fn kind_of_other(path: &Path) -> Option<&'static str> {
    let kind = fs::metadata(path).ok()?.file_type();
    match () {
        () if kind.is_socket() => None,
        () if kind.is_file() => Some("a regular file"),
        () if kind.is_dir() => Some("a directory"),
        () => Some("no socket"),
    }
}

fn wanted(is: &str) -> String {
    format!("what is there is {is}, and a stream socket is wanted")
}

/// Removes a socket that nobody listens at. Until what is given back is dropped no other process that does so too finds
/// the path free, or takes what is bound there next for the one that was to be removed.
fn remove_stale(path: &Path) -> Result<Option<FolderLock>, BindError> {
    if !socket_at(path)? {
        return Ok(None);
    }
    let lock = FolderLock::of(path).map_err(BindError::Refused)?;
    // Another process may have replaced it meanwhile.
    if !socket_at(path)? {
        return Ok(Some(lock));
    }
    // A socket of another type is told apart from one that nobody has, whether it listens or not, and its owner does not
    // notice. One of its own type would be a peer to it, or would wait in its queue.
    let probe = UnixDatagram::unbound().map_err(BindError::Refused)?;
    match probe.connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(BindError::Refused)?;
            Ok(Some(lock))
        }
        // EPROTOTYPE, or it is a datagram socket.
        _ => Err(BindError::InUse),
    }
}

/// Whether there is a socket, live or not; something else is in the way.
fn socket_at(path: &Path) -> Result<bool, BindError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(BindError::Refused(error)),
        Ok(file) if file.file_type().is_socket() => Ok(true),
        Ok(_) => Err(BindError::Occupied),
    }
}

/// The process at the other end of a connection, as it was when that was made (`SO_PEERCRED`); 0 of one in a namespace whose
/// processes have no number here.
///
/// # Errors
/// The errno of `getsockopt(2)`.
pub(crate) fn peer(stream: &UnixStream) -> io::Result<i32> {
    let mut who = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut size = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: an open socket, and room of that size.
    let asked = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut who).cast(),
            &mut size,
        )
    };
    match asked {
        0 => Ok(who.pid),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The lock (`flock(2)`) on a socket's folder, of who replaces a socket in it.
struct FolderLock(#[expect(dead_code, reason = "closed, it is unlocked")] File);

impl FolderLock {
    /// Others have it for a few system calls; who has it for longer is not one of us.
    const PATIENCE: Duration = Duration::from_secs(1);

    fn of(path: &Path) -> io::Result<Self> {
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let folder = File::open(folder)?;
        let begun = Instant::now();
        loop {
            // SAFETY: an open descriptor, no pointers.
            if unsafe { libc::flock(folder.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
                return Ok(FolderLock(folder));
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::WouldBlock {
                return Err(error);
            }
            if begun.elapsed() > Self::PATIENCE {
                let why = "another process has had the folder locked for a second";
                return Err(io::Error::new(io::ErrorKind::WouldBlock, why));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A listening Unix socket whose file is its user's alone from the beginning.
fn bind_private(path: &Path, backlog: i32) -> io::Result<UnixListener> {
    let address = socket_address(path)?;
    let fd = socket()?;
    let len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: the descriptor is open. On Linux the file that bind makes has the permissions of the descriptor's own
    // inode, so they are set before. The address is initialised and as long as is said.
    unsafe {
        if libc::fchmod(fd.as_raw_fd(), 0o600) < 0 {
            return Err(io::Error::last_os_error());
        }
        if libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) < 0 {
            return Err(io::Error::last_os_error());
        }
        if libc::listen(fd.as_raw_fd(), backlog) < 0 {
            let error = io::Error::last_os_error();
            let _ = fs::remove_file(path);
            return Err(error);
        }
    }
    Ok(fd.into())
}

fn socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn socket_address(path: &Path) -> io::Result<libc::sockaddr_un> {
    let bytes = path.as_os_str().as_bytes();
    // SAFETY: all zeros is an address of no family.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    if bytes.len() > MAX_PATH {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "its path has {} bytes, and a socket's has {MAX_PATH} at most",
                bytes.len()
            ),
        ));
    }
    for (slot, byte) in address.sun_path.iter_mut().zip(bytes) {
        *slot = *byte as libc::c_char;
    }
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn place(folder: &tempfile::TempDir) -> PathBuf {
        folder.path().join("x.sock")
    }

    #[test]
    fn who_waits_to_be_accepted_waits_on_when_a_signal_comes() {
        use std::os::unix::thread::JoinHandleExt;
        use std::sync::atomic::{AtomicU32, Ordering};
        static CAME: AtomicU32 = AtomicU32::new(0);
        extern "C" fn handler(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
            CAME.fetch_add(1, Ordering::Relaxed);
        }
        let signal = vmm_sys_util::signal::SIGRTMIN() + 7;
        vmm_sys_util::signal::register_signal_handler(signal, handler).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&place(&folder), 0).unwrap();
        let _first = connect(&place(&folder)).unwrap();
        let path = place(&folder);
        let (limit, begun) = (Duration::from_millis(300), Instant::now());
        let waits = std::thread::spawn(move || connect_within(&path, limit).map(drop));
        // One after another, and not for ever: a thread on which signals rain does nothing else.
        for sent in 1..=20 {
            // SAFETY: a thread that has not been joined.
            unsafe { libc::pthread_kill(waits.as_pthread_t(), signal) };
            while CAME.load(Ordering::Relaxed) < sent && !waits.is_finished() {
                std::thread::yield_now();
            }
        }
        let refused = waits.join().unwrap().unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock, "{refused}");
        assert!(begun.elapsed() >= limit);
        drop(listener);
    }

    #[test]
    fn a_socket_is_its_users_alone_and_goes_with_its_listener() {
        let folder = tempfile::tempdir().unwrap();
        let path = place(&folder);
        let listener = Listener::bind(&path, 4).unwrap();
        assert_eq!(listener.path(), path);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let would_block = listener.accept().unwrap_err();
        assert_eq!(would_block.kind(), io::ErrorKind::WouldBlock);
        let _client = connect(&path).unwrap();
        listener.accept().unwrap();
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_stream_socket_is_said_to_be_that_and_is_not_one_that_nobody_listens_at() {
        let folder = tempfile::tempdir().unwrap();
        let path = place(&folder);
        let refused = |path: &Path| connect(path).unwrap_err();
        fs::write(&path, "mine").unwrap();
        for (path, is) in [(&*path, "a regular file"), (folder.path(), "a directory")] {
            let error = refused(path);
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
            assert!(error.to_string().contains(is), "{error}");
        }
        fs::remove_file(&path).unwrap();
        let datagrams = UnixDatagram::bind(&path).unwrap();
        assert!(refused(&path).to_string().contains("another kind"));
        let taken = Listener::bind(&path, 1).unwrap_err().to_string();
        assert!(taken.contains("a socket of another kind"), "{taken}");
        drop(datagrams);
        fs::remove_file(&path).unwrap();
        drop(UnixListener::bind(&path).unwrap());
        assert_eq!(refused(&path).kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn a_socket_that_nobody_listens_at_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = place(&folder);
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        Listener::bind(&path, 4).unwrap();
    }

    #[test]
    fn of_many_that_replace_one_socket_at_once_one_has_it_and_keeps_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = place(&folder);
        for _ in 0..50 {
            drop(UnixListener::bind(&path).unwrap());
            let start = std::sync::Barrier::new(4);
            let bound = std::thread::scope(|scope| {
                let bind = || {
                    start.wait();
                    Listener::bind(&path, 4)
                };
                let threads = [(); 4].map(|()| scope.spawn(bind));
                threads.map(|thread| thread.join().unwrap())
            });
            let [one] = &bound.iter().flatten().collect::<Vec<_>>()[..] else {
                panic!("{bound:?}");
            };
            let _client = connect(&path).unwrap();
            one.accept().unwrap();
            for error in bound.iter().filter_map(|bound| bound.as_ref().err()) {
                assert!(matches!(error, BindError::InUse), "{error}");
            }
        }
    }

    #[test]
    fn a_listener_whose_backlog_is_full_is_found_in_use_without_a_wait() {
        let folder = tempfile::tempdir().unwrap();
        let path = place(&folder);
        let _listener = Listener::bind(&path, 1).unwrap();
        let mut waiting = Vec::new();
        let full = loop {
            match connect(&path) {
                Ok(stream) => waiting.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        assert!(matches!(Listener::bind(&path, 1), Err(BindError::InUse)));
    }

    #[test]
    fn what_is_there_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = place(&folder);
        let live = Listener::bind(&path, 4).unwrap();
        assert!(matches!(Listener::bind(&path, 4), Err(BindError::InUse)));
        // Who asked was no peer to it.
        let would_block = live.accept().unwrap_err();
        assert_eq!(would_block.kind(), io::ErrorKind::WouldBlock);
        connect(&path).unwrap();
        drop(live);

        fs::write(&path, "mine").unwrap();
        assert!(matches!(Listener::bind(&path, 4), Err(BindError::Occupied)));
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        fs::remove_file(&path).unwrap();
        // A link is not followed, to whatever it leads.
        std::os::unix::fs::symlink(folder.path().join("other"), &path).unwrap();
        assert!(matches!(Listener::bind(&path, 4), Err(BindError::Occupied)));
    }

    #[test]
    fn a_file_that_took_the_sockets_place_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = place(&folder);
        let listener = Listener::bind(&path, 4).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "mine").unwrap();
        drop(listener);
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }
}
