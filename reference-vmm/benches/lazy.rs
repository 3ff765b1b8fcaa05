// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From the word to restore a guest to the first byte that it says, by the ways in which its memory may come, turn by turn in
//! one run; and the same guest booted. All of memory has something in it, and the snapshot's files are in the page cache.
//!
//! With `cold` they are not (needs to write to `/proc/sys/vm/drop_caches`), and the guest is asked something: it says a byte,
//! looks at 2048 random pages of all, and answers. Said is when the answer is there, with and without a record of what it
//! touches.
//!
//! `cargo bench -p reference-vmm --bench lazy -- [cold] [lazy] [MiB…]`; with `lazy` those ways alone.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use guests::image;
use guests::sleeper::sleeper64;
use reference_vmm::config::Config;
use reference_vmm::end::EndSignal;
use reference_vmm::lazy::LazyRequest;
use reference_vmm::main_loop::GuestSide;
use reference_vmm::memory::Memory;
use reference_vmm::snapshot::{RestoreRequest, SnapshotRequest};
use reference_vmm::vm::{BuildError, Machine, Running};
use vm_memory::{Bytes, GuestAddress};

const TURNS: usize = 9;

/// Says `x` without rest: `mov edx, 0x3f8; mov al, 'x'; 1: out dx, al; jmp 1b`.
const SAYS: [u8; 10] = [0xba, 0xf8, 0x03, 0, 0, 0xb0, b'x', 0xee, 0xeb, 0xfd];

/// Until it says `byte`, if it is sent something.
fn until(
    byte: u8,
    make: impl FnOnce(&std::io::PipeWriter, &Arc<EndSignal>) -> Result<Machine, BuildError>,
) -> Duration {
    let end = Arc::new(EndSignal::new().unwrap());
    let (mut console, writer) = std::io::pipe().unwrap();
    let begun = Instant::now();
    let running: Running = make(&writer, &end).unwrap().start().unwrap();
    running.input(b"?");
    hear(&mut console, byte);
    let took = begun.elapsed();
    // What it says next goes nowhere.
    drop(console);
    running.stop();
    took
}

fn hear(console: &mut std::io::PipeReader, byte: u8) {
    let mut said = [0];
    while said != [byte] {
        console.read_exact(&mut said).unwrap();
    }
}

fn median(mut of: Vec<Duration>) -> f64 {
    of.sort();
    of[of.len() / 2].as_secs_f64() * 1e3
}

fn forget_files(dir: &Path) {
    // What is dirty is not dropped.
    std::fs::File::open(dir.join("memory"))
        .unwrap()
        .sync_all()
        .unwrap();
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

fn measure(mib: u64, cold: bool, lazy_alone: bool) {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let (code, ready, says) = match cold {
        true => (sleeper64(), b'r', b'>'),
        false => (&SAYS[..], b'x', b'x'),
    };
    let kernel = folder.path().join("kernel");
    std::fs::write(&kernel, image::elf64(code)).unwrap();
    let config = Config {
        // Pages that it fills.
        cmdline: format!("{} ", (mib - 4) * 256),
        memory: Memory::new(mib << 20),
        coalesce_console: false,
        ..Config::new(&kernel)
    };
    let boot = || until(ready, |console, end| Machine::build(&config, console, end));
    let end = Arc::new(EndSignal::new().unwrap());
    let (mut console, writer) = std::io::pipe().unwrap();
    let running = Machine::build(&config, writer, &end)
        .unwrap()
        .start()
        .unwrap();
    hear(&mut console, ready);
    running.pause().unwrap();
    if !cold {
        for at in (4 << 20..mib << 20).step_by(4096) {
            let word = at.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            running.memory().write_obj(word, GuestAddress(at)).unwrap();
        }
    }
    running.snapshot(&SnapshotRequest::new(&dir)).unwrap();
    drop(console);
    running.stop();
    drop(running);

    let lazy = |verify, record: Option<u64>| RestoreRequest {
        verify,
        lazy: Some(LazyRequest {
            record: record.map(Duration::from_secs),
            ..LazyRequest::default()
        }),
        ..RestoreRequest::new(&dir)
    };
    let plain = |verify, map| RestoreRequest {
        verify,
        map,
        ..RestoreRequest::new(&dir)
    };
    let restore = |request: &RestoreRequest| {
        if cold {
            forget_files(&dir);
        }
        until(says, |console, end| Machine::restore(request, console, end))
    };
    let mut ways = vec![
        ("mapped, checked", plain(true, true)),
        ("mapped", plain(false, true)),
        ("read", plain(false, false)),
        ("lazy, checked", lazy(true, None)),
        ("lazy", lazy(false, None)),
    ];
    if lazy_alone {
        ways.retain(|(name, _)| name.starts_with("lazy"));
    }
    let recorded = [
        ("lazy, checked, read ahead", lazy(true, None)),
        ("lazy, read ahead", lazy(false, None)),
    ];
    let mut took: Vec<Vec<Duration>> = vec![Vec::new(); 1 + ways.len() + recorded.len()];
    let record = dir.join("working_set");
    for _ in 0..TURNS {
        if !cold && !lazy_alone {
            took[0].push(boot());
        }
        for (of, (_, request)) in took[1..].iter_mut().zip(&ways) {
            of.push(restore(request));
        }
        if cold {
            restore(&lazy(true, Some(3600)));
            assert!(record.exists());
            for (of, (_, request)) in took[1 + ways.len()..].iter_mut().zip(&recorded) {
                of.push(restore(request));
            }
            std::fs::remove_file(&record).unwrap();
        }
    }
    let names = ways.iter().chain(&recorded).map(|(name, _)| *name);
    for (name, of) in ["booted"].into_iter().chain(names).zip(took) {
        if !of.is_empty() {
            println!("{mib:5} MiB, {name:26}: {:8.2} ms", median(of));
        }
    }
}

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let cold = words.iter().any(|word| word == "cold");
    let lazy_alone = words.iter().any(|word| word == "lazy");
    let sizes: Vec<u64> = words.iter().filter_map(|arg| arg.parse().ok()).collect();
    let sizes = match sizes.is_empty() {
        true if cold => vec![1024],
        true => vec![64, 256, 1024],
        false => sizes,
    };
    sizes
        .into_iter()
        .for_each(|mib| measure(mib, cold, lazy_alone));
}
