// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that arrives when it is touched: four threads in place of vCPUs read a memory whose contents are in a file,
//! while the rest of it comes behind them. `cargo run -p async-pf --example pager`; needs a userfaultfd (root, or what the
//! error says).

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use async_pf::pager::{Lost, PagedSlot, Pager, PagerConfig, PagerEvents};
use async_pf::{FilePiece, SparseSource};
use memslots::uffd::{Features, Modes, Uffd};
use memslots::{Backing, Gfn, Mapping, PAGE_SIZE};
use vm_memory::GuestAddress;

const PAGES: u64 = 4096;

/// A monitor would stop the guest, or give it a machine check.
struct Say;

impl PagerEvents for Say {
    fn lost(&self, lost: &Lost<'_>) {
        eprintln!("gfn {:#x} will not come: {}", lost.gfn.0, lost.reason);
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    // A snapshot: the first three quarters are in a file, the last is zeros.
    let mut file = tempfile::tempfile()?;
    let stored = PAGES * 3 / 4;
    for page in 0..stored {
        file.write_all(&[page as u8 | 1; PAGE_SIZE as usize])?;
    }
    let piece = FilePiece {
        first: Gfn(0),
        pages: stored,
        offset: 0,
    };
    let source = SparseSource::new(file, [piece], Gfn(0)..Gfn(PAGES))?;

    // The pager starts before anything can touch the memory.
    let uffd = Uffd::open(Features::POISON, Features::EVENT_REMOVE)?;
    let memory = Backing::anonymous(PAGES * PAGE_SIZE);
    let memory = Arc::new(Mapping::new(&memory, GuestAddress(0))?);
    let registration = uffd.register_all(&memory, Modes::MISSING)?;
    let slot = PagedSlot::new(&registration, Gfn(0), Arc::new(source))?;
    let config = PagerConfig {
        workers: 2,
        events: Arc::new(Say),
        ..PagerConfig::default()
    };
    let pager = Pager::start(&uffd, vec![slot], config)?;

    thread::scope(|scope| {
        for vcpu in 0..4 {
            let host = memory.host();
            scope.spawn(move || {
                for step in 0..PAGES {
                    let page = (step * 1_597 + vcpu * 1_024) % PAGES;
                    let at = (host.0 + (page * PAGE_SIZE) as usize) as *const u8;
                    // SAFETY: within the mapping, which outlives the scope; read volatile, as guest memory is.
                    let byte = unsafe { at.read_volatile() };
                    assert_eq!(byte, if page < stored { page as u8 | 1 } else { 0 });
                }
            });
        }
        pager.prefetch_rest();
    });
    assert!(pager.wait(Duration::from_secs(60)), "everything comes");

    let stats = pager.stats();
    println!(
        "{} pages came by {} fetches, {} of them before anyone waited; {} are zeros",
        stats.placed, stats.fetches, stats.ahead, stats.zeros
    );
    println!(
        "{} faults: half within {:?}, 99 % within {:?}, the longest {:?}",
        stats.faults,
        stats.latency.percentile(50.0),
        stats.latency.percentile(99.0),
        stats.latency.max()
    );
    for (below, count) in stats.latency.buckets() {
        println!("{count:8} below {below:?}");
    }
    // The fill role of the registration, for whoever answers faults from now on: a balloon's, say.
    // Not by `?`: the error has the pager, and to drop it poisons what is missing.
    let finished = pager.finish();
    assert!(finished.is_ok(), "everything has come: {finished:?}");
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pager: {error}");
            ExitCode::FAILURE
        }
    }
}
