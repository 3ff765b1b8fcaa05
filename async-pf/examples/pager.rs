// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A pager in a page: four "vCPUs" read a memory whose contents are in a file, two workers serve
//! their faults and one guess after another meanwhile. `cargo run -p async-pf --example pager`.
//!
//! A real one differs where the comments say: faults come from a userfaultfd, and pages go into
//! guest memory by `UFFDIO_COPY`.
#![allow(clippy::unwrap_used)] // a poisoned lock ends an example

use std::collections::HashMap;
use std::error::Error;
use std::io::Write;
use std::sync::{Condvar, Mutex, mpsc};
use std::thread;

use async_pf::{FaultAnswer, FilePiece, FileSource, Outcome, PageSource, Schedule};
use memslots::Gfn;

const PAGES: u64 = 256;

fn main() -> Result<(), Box<dyn Error>> {
    let mut file = tempfile::tempfile()?;
    for page in 0..PAGES {
        file.write_all(&[page as u8; 4096])?;
    }
    let source = FileSource::new(
        file,
        [FilePiece {
            first: Gfn(0),
            pages: PAGES,
            offset: 0,
        }],
    )?;

    let schedule = Mutex::new(Schedule::<mpsc::Sender<()>>::new(Gfn(0), PAGES, 16));
    let work = Condvar::new();
    let memory = Mutex::new(HashMap::<u64, Vec<u8>>::new()); // guest memory

    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut guesses = 0..PAGES;
                loop {
                    let mut pages = schedule.lock().unwrap();
                    let job = loop {
                        if pages.is_complete() {
                            work.notify_all();
                            return;
                        }
                        match pages.start() {
                            Some(job) => break job,
                            None => match guesses.next() {
                                Some(page) => drop(pages.prefetch(Gfn(page))),
                                None => pages = work.wait(pages).unwrap(),
                            },
                        }
                    };
                    drop(pages); // never held across a fetch
                    let mut buffer = vec![0; 4096];
                    let outcome = match source.fetch(job.gfn, &mut buffer) {
                        Ok(_) => {
                            memory.lock().unwrap().insert(job.gfn.0, buffer); // UFFDIO_COPY
                            Outcome::Arrived
                        }
                        Err(error) if error.is_transient() && job.failures < 3 => Outcome::Retry,
                        Err(error) => {
                            eprintln!("{error}");
                            Outcome::GaveUp // UFFDIO_POISON
                        }
                    };
                    for waiter in schedule.lock().unwrap().finish(job.gfn, outcome).unwrap() {
                        let _gone = waiter.send(());
                    }
                    work.notify_all();
                }
            });
        }
        for vcpu in 0..4 {
            let (schedule, work, memory) = (&schedule, &work, &memory);
            scope.spawn(move || {
                let mut waited = 0;
                for step in 0..PAGES {
                    let page = (step * 37 + vcpu * 64) % PAGES;
                    let (wake, woken) = mpsc::channel();
                    // userfaultfd: UFFD_EVENT_PAGEFAULT
                    let answer = schedule.lock().unwrap().fault(Gfn(page), wake).unwrap();
                    if let FaultAnswer::Waiting { .. } = answer {
                        work.notify_one();
                        woken.recv().unwrap();
                        waited += 1;
                    }
                    assert_eq!(memory.lock().unwrap()[&page], vec![page as u8; 4096]);
                }
                println!("vCPU {vcpu}: read {PAGES} pages, waited for {waited} of them");
            });
        }
    });
    println!(
        "{} of {PAGES} pages present",
        schedule.lock().unwrap().present()
    );
    Ok(())
}
