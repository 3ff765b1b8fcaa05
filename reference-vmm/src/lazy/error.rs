// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why memory cannot come later, or has not come.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_pf::external::{HandOffError, MappingsError};
use async_pf::pager::StartError;
use async_pf::peer::PeerError;
use memslots::uffd::{OpenError, RegisterError};

use crate::migration::address::Address;
use crate::migration::tls::TlsError;
use crate::migration::transport::ConnectError;
use crate::snapshot::format::SnapshotId;
use crate::units;

/// Why a guest's memory cannot come later, or has not come.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LazyError {
    /// There is no userfaultfd for it; says what to do about it.
    #[error("memory cannot come later: {0}")]
    Uffd(#[from] OpenError),
    /// The kernel's userfaultfd cannot poison pages that do not come.
    #[error(
        "memory cannot come later: this kernel's userfaultfd cannot poison a page that does not come (Linux 6.6 can), and a \
         guest whose source fails would hang: restore without --lazy"
    )]
    NoPoison,
    /// The kernel does not tell of faults in such memory.
    #[error("memory cannot come later: {0}")]
    Register(#[from] RegisterError),
    /// The pager cannot be started.
    #[error("memory cannot come later: {0}")]
    Start(#[from] StartError),
    /// A thread, or an eventfd, is not to be had.
    #[error("memory cannot come later: cannot {what}: {source}")]
    Process {
        /// What it was for.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// The page-fault handler's socket cannot be connected to.
    #[error("{}", no_handler(path, source))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
    /// The page-fault handler was not given the memory.
    #[error("cannot hand the memory off to the page-fault handler at {path}: {source}")]
    HandOff {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: HandOffError,
    },
    /// Where the memory is cannot be told to it.
    #[error("cannot tell the page-fault handler at {path} where memory is: {source}")]
    Mappings {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: MappingsError,
    },
    /// The page server has said nothing since it was connected to.
    #[error(
        "the page server at {address} has said nothing for {}, which is as long as it may, and a first connection is not tried \
         again: look whether it is a `snapshot serve`, and whether that is at work",
        units::time(*.limit)
    )]
    Silent {
        /// Where.
        address: Address,
        /// For so long it may be silent.
        limit: Duration,
    },
    /// The page server cannot be asked.
    #[error("the page server at {address}: {source}")]
    PageServer {
        /// Where.
        address: Address,
        /// Why not.
        source: PeerError,
    },
    /// The page server has the memory of another snapshot.
    #[error(
        "the page server at {address} has the memory of the snapshot {theirs:016x}…, and {dir} is {id}: serve that one there, \
         or copy the directory from there without its file `memory`"
    )]
    OtherSnapshot {
        /// Where.
        address: Address,
        /// The first 16 digits of its snapshot.
        theirs: u64,
        /// The directory here.
        dir: PathBuf,
        /// The snapshot in it.
        id: SnapshotId,
    },
    /// There is no TLS for the page server.
    #[error("the page server cannot be asked: {0}")]
    Tls(#[from] TlsError),
    /// Two are to bring memory.
    #[error("--page-server and --page-handler: one of the two brings the guest's memory")]
    Both,
    /// What is to be recorded is not seen here.
    #[error(
        "--record and --page-handler: what the guest touches first, the page-fault handler in another process is told, and this \
         monitor is not; record it without one"
    )]
    Unseen,
    /// Its protocol has words for a plain file alone.
    #[error(
        "a page-fault handler is told where each page is in the file `memory`, and that of {0} is {1}: restore it without \
         one, or merge it first (snapshot merge {0} --to DIR)"
    )]
    Form(PathBuf, &'static str),
    /// What is asked for needs what the handler has.
    #[error(
        "a page-fault handler in another process has this guest's userfaultfd, which {0} needs for itself: take it without"
    )]
    External(&'static str),
    /// What a migration has sent cannot be taken away again.
    #[error("memory cannot come later: {0}")]
    Punch(#[from] memslots::PunchError),
    /// The source of a migration that the guest has come before its memory by is away for longer than a page may take.
    #[error(
        "memory is missing, and the migration's source has not been heard of for {}: the guest goes on for as long as it touches \
         none of that, and what needs all of it is refused until the source is there again",
        units::time(*.0)
    )]
    Away(Duration),
    /// A page that is wanted at once does not come.
    #[error("memory does not come: {0}")]
    Source(#[from] async_pf::SourceError),
    /// Or cannot be written.
    #[error("memory cannot be filled: {0}")]
    Write(#[from] vm_memory::GuestMemoryError),
    /// Some pages have not come, and never will.
    #[error("{pages} pages of the guest's memory have not come: {why}")]
    Lost {
        /// How many.
        pages: u64,
        /// Why the first did not.
        why: String,
    },
    /// The guest ended before its memory was there.
    #[error("the guest ended before all of its memory was there{0}")]
    Ended(String),
    /// Who asked for what needs all of it has given that up, or is gone.
    #[error("given up by who asked for it, before anything was done{0}")]
    Unwanted(String),
}

/// Why the page-fault handler's socket cannot be connected to, in words.
fn no_handler(path: &Path, source: &io::Error) -> String {
    let path = path.display();
    match source.kind() {
        io::ErrorKind::NotFound => format!(
            "nobody listens at {path}: there is no such socket; start the page-fault handler first"
        ),
        io::ErrorKind::ConnectionRefused => {
            format!("nobody listens at {path}: start the page-fault handler first")
        }
        // unix(7) says it of one that has as many as it takes, once the limit is over.
        io::ErrorKind::WouldBlock => format!(
            "the page-fault handler at {path} accepts nobody: as many as it takes wait there already; look whether it is at work"
        ),
        _ => format!("cannot connect to the page-fault handler at {path}: {source}"),
    }
}

impl LazyError {
    /// 2 the arguments or the snapshot are wrong, 1 the host refused.
    pub(crate) fn exit_status(&self) -> u8 {
        match self {
            LazyError::Form(..)
            | LazyError::OtherSnapshot { .. }
            | LazyError::Tls(_)
            | LazyError::Unseen
            | LazyError::Both => 2,
            // That nobody is there is the host's state.
            LazyError::PageServer {
                source: PeerError::Connect(source),
                ..
            } => {
                let error = source.get_ref().and_then(|error| error.downcast_ref());
                match error.is_some_and(ConnectError::is_users_fault) {
                    true => 2,
                    false => 1,
                }
            }
            LazyError::Connect { source, .. } if source.kind() == io::ErrorKind::InvalidInput => 2,
            _ => 1,
        }
    }
}
