// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A page-fault handler for Firecracker, or any monitor that hands its userfaultfd off as that does: waits for one at a Unix
//! socket, brings its guest's memory from a snapshot's memory file, what is touched first and the rest behind it, and ends
//! with it.
//!
//! ```text
//! page_fault_handler SOCKET MEMORY_FILE
//! ```
//!
//! The monitor is told so by `PUT /snapshot/load` with `"mem_backend": {"backend_type": "Uffd", "backend_path": SOCKET}`.

use std::env;
use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use async_pf::external::{receive, serve};
use async_pf::pager::{Lost, PagerConfig, PagerEvents};
use async_pf::{FilePiece, FileSource};
use memslots::{Gfn, PAGE_SIZE};

/// How long a monitor that has connected may take to hand off.
const PATIENCE: Duration = Duration::from_secs(5);

/// The guest has a memory error where a page is lost; the log says why.
struct Say;

impl PagerEvents for Say {
    fn lost(&self, lost: &Lost<'_>) {
        let at = lost.gfn.0.saturating_mul(PAGE_SIZE);
        eprintln!(
            "the page at {at:#x} of the file will not come: {}",
            lost.reason
        );
    }
}

/// Listens at `path`. A socket that a killed handler left there is replaced; what is another's is left alone.
///
/// # Errors
/// What is there, or the system's words.
pub fn listen(path: &str) -> Result<UnixListener, Box<dyn Error>> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(format!("{path}: {error}").into()),
        Ok(is) if !is.file_type().is_socket() => {
            let what = "what is there is no socket, and is left alone; name another path";
            return Err(format!("{path}: {what}").into());
        }
        // Asked for by a socket of another type: who listens there has no connection by it.
        Ok(_) => match UnixDatagram::unbound()?.connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path).map_err(|error| format!("{path}: {error}"))?;
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                let what = "another user's socket is there, and is left alone";
                return Err(format!("{path}: {what}: {error}").into());
            }
            _ => {
                let what = "another process listens there; name another path";
                return Err(format!("{path}: {what}").into());
            }
        },
    }
    UnixListener::bind(path).map_err(|error| format!("{path}: {error}").into())
}

fn handle(socket: &str, memory: &str) -> Result<(), Box<dyn Error>> {
    // Before a monitor finds the socket: a file that cannot be read is nobody's guest's trouble.
    let file = File::open(memory).map_err(|error| format!("{memory}: {error}"))?;
    let listener = listen(socket)?;
    let (mut monitor, _) = listener.accept()?;
    // Nobody else finds it, and a later handler can be there while this one is still at work.
    fs::remove_file(socket)?;

    let hand_off = receive(&monitor, PATIENCE)?;
    // In the file, as the monitor counts: a file that is too short is refused now, and not when a guest waits.
    let pieces = hand_off
        .mappings
        .as_slice()
        .iter()
        .map(|mapping| FilePiece {
            first: Gfn(mapping.offset / PAGE_SIZE),
            pages: mapping.size / PAGE_SIZE,
            offset: mapping.offset,
        });
    let source = Arc::new(FileSource::new(file, pieces)?);
    for mapping in hand_off.mappings.as_slice() {
        eprintln!("{:#x} bytes at {:#x}", mapping.size, mapping.base);
    }
    let config = PagerConfig {
        workers: 2,
        events: Arc::new(Say),
        ..PagerConfig::default()
    };
    let pager = serve(hand_off, source, config)?;
    pager.prefetch_rest();

    // It says nothing more; its end is the stream's.
    monitor.set_read_timeout(None)?;
    while monitor.read(&mut [0; 64])? > 0 {}
    let stats = pager.stats();
    eprintln!(
        "{} pages, {} of them before anyone waited; {} faults, half within {:?}, the longest {:?}; {} pages given back",
        stats.placed,
        stats.ahead,
        stats.faults,
        stats.latency.percentile(50.0),
        stats.latency.max(),
        stats.removed
    );
    Ok(())
}

/// The program.
pub fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [socket, memory] = &arguments[..] else {
        eprintln!("usage: page_fault_handler SOCKET MEMORY_FILE");
        return ExitCode::from(2);
    };
    match handle(socket, memory) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("page_fault_handler: {error}");
            ExitCode::FAILURE
        }
    }
}
