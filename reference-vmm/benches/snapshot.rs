// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How long a guest stands still for a snapshot: one whose memory is written in the pause, against one in the background,
//! of the same guest, turn by turn in one run. It writes 2 MiB all the time; all of its memory is present, and zero but for
//! that, so that the disk plays no part.
//!
//! `cargo bench -p reference-vmm --bench snapshot [-- MiB…]`

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::io::{PipeReader, Read};
use std::sync::Arc;
use std::time::Duration;

use guests::image;
use guests::scribe::scribe64;
use reference_vmm::config::Config;
use reference_vmm::end::EndSignal;
use reference_vmm::memory::Memory;
use reference_vmm::snapshot::{SnapshotReport, SnapshotRequest};
use reference_vmm::vm::{Machine, Running};

const TURNS: usize = 7;

fn passes(console: &mut PipeReader, count: usize) {
    console.read_exact(&mut vec![0; count]).unwrap();
}

fn median(of: &[SnapshotReport], what: impl Fn(&SnapshotReport) -> Duration) -> Duration {
    let mut all: Vec<_> = of.iter().map(what).collect();
    all.sort();
    all[all.len() / 2]
}

fn measure(mib: u64) {
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    std::fs::write(&kernel, image::elf64(scribe64())).unwrap();
    let config = Config {
        memory: Memory {
            prefault: true,
            ..Memory::new(mib << 20)
        },
        ..Config::new(&kernel)
    };
    let end = Arc::new(EndSignal::new().unwrap());
    let (mut console, writer) = std::io::pipe().unwrap();
    let machine = Machine::build(&config, writer, &end).unwrap();
    let running: Running = machine.start().unwrap();
    passes(&mut console, 2);
    let take = |background| {
        let request = SnapshotRequest {
            background,
            ..SnapshotRequest::new(folder.path().join("s"))
        };
        running.snapshot(&request).unwrap()
    };
    let (mut plain, mut background) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        plain.push(take(false));
        background.push(take(true));
    }
    let pause = |of: &[SnapshotReport]| median(of, |report| report.paused).as_secs_f64() * 1e3;
    let took = |of: &[SnapshotReport]| median(of, |report| report.took).as_secs_f64() * 1e3;
    let costs = background.iter().filter_map(|report| report.background);
    let (pages, protecting, copied) = costs.fold((0, 0.0, 0), |(pages, time, copied), cost| {
        let time = time + cost.protecting.as_secs_f64() * 1e6;
        (pages + cost.protected, time, copied + cost.copied)
    });
    println!(
        "{mib:5} MiB: stood still for {:8.2} ms, in the background {:6.2} ms ({} pages protected in it, {:.2} us each; {} \
         copied); all of it {:6.0} and {:6.0} ms",
        pause(&plain),
        pause(&background),
        pages / TURNS as u64,
        protecting / pages.max(1) as f64,
        copied / TURNS as u64,
        took(&plain),
        took(&background),
    );
    // What it says next goes nowhere.
    drop(console);
    running.stop();
}

fn main() {
    let sizes: Vec<u64> = std::env::args()
        .filter_map(|arg| arg.parse().ok())
        .collect();
    let sizes = match sizes.is_empty() {
        true => vec![256, 1024, 4096],
        false => sizes,
    };
    sizes.into_iter().for_each(measure);
}
