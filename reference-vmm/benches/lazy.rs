// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From the word to restore a guest to the first byte that it says, by the ways in which its memory may come, turn by turn in
//! one run; and the same guest booted. All of memory has something in it. The snapshot's files are in the page cache, and with
//! `cold` not (needs to write to `/proc/sys/vm/drop_caches`).
//!
//! The guest says a byte as its first instructions; with `cold` it reads 1024 pages, each ten behind the one before, before it
//! does, so that a record of what it touches is worth something.
//!
//! `cargo bench -p reference-vmm --bench lazy [-- cold] [-- MiB…]`

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use guests::image;
use reference_vmm::config::Config;
use reference_vmm::end::EndSignal;
use reference_vmm::lazy::LazyRequest;
use reference_vmm::memory::Memory;
use reference_vmm::snapshot::{RestoreRequest, SnapshotRequest};
use reference_vmm::vm::{BuildError, Machine, Running};
use vm_memory::{Bytes, GuestAddress};

const TURNS: usize = 9;

/// Says `x` without rest: `mov edx, 0x3f8; mov al, 'x'; 1: out dx, al; jmp 1b`.
const SAYS: [u8; 10] = [0xba, 0xf8, 0x03, 0, 0, 0xb0, b'x', 0xee, 0xeb, 0xfd];

/// Reads a word of each of 1024 pages from 4 MiB on, each 40 KiB behind the one before, and then says `x`, again and again:
/// `2: mov esi, 0x400000; mov ecx, 1024; 3: mov eax, [rsi]; add esi, 40960; dec ecx; jnz 3b;` and as above, `jmp 2b`.
const TOUCHES: [u8; 27] = [
    0xbe, 0, 0, 0x40, 0, // mov esi, 0x400000
    0xb9, 0, 4, 0, 0, // mov ecx, 1024
    0x8b, 0x06, // mov eax, [rsi]
    0x81, 0xc6, 0, 0xa0, 0, 0, // add esi, 40960
    0xff, 0xc9, // dec ecx
    0x75, 0xf4, // jnz 3b
    0xb0, b'x', // mov al, 'x'
    0xee, // out dx, al
    0xeb, 0xe5, // jmp 2b
];

fn first_byte(
    make: impl FnOnce(&std::io::PipeWriter, &Arc<EndSignal>) -> Result<Machine, BuildError>,
) -> Duration {
    let end = Arc::new(EndSignal::new().unwrap());
    let (mut console, writer) = std::io::pipe().unwrap();
    let begun = Instant::now();
    let running: Running = make(&writer, &end).unwrap().start().unwrap();
    console.read_exact(&mut [0]).unwrap();
    let took = begun.elapsed();
    // What it says next goes nowhere.
    drop(console);
    running.stop();
    took
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

fn measure(mib: u64, cold: bool) {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let mut code = vec![0xba, 0xf8, 0x03, 0, 0];
    match cold {
        true => code.extend(TOUCHES),
        false => code = SAYS.to_vec(),
    }
    let kernel = folder.path().join("kernel");
    std::fs::write(&kernel, image::elf64(&code)).unwrap();
    let config = Config {
        memory: Memory::new(mib << 20),
        coalesce_console: false,
        ..Config::new(&kernel)
    };
    let boot = || first_byte(|console, end| Machine::build(&config, console, end));
    let end = Arc::new(EndSignal::new().unwrap());
    let (mut console, writer) = std::io::pipe().unwrap();
    let running = Machine::build(&config, writer, &end)
        .unwrap()
        .start()
        .unwrap();
    console.read_exact(&mut [0]).unwrap();
    running.pause().unwrap();
    for at in (4 << 20..mib << 20).step_by(4096) {
        let word = at.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        running.memory().write_obj(word, GuestAddress(at)).unwrap();
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
        first_byte(|console, end| Machine::restore(request, console, end))
    };
    let ways = [
        ("mapped, checked", plain(true, true)),
        ("mapped", plain(false, true)),
        ("read", plain(false, false)),
        ("lazy, checked", lazy(true, None)),
        ("lazy", lazy(false, None)),
    ];
    let mut took: Vec<Vec<Duration>> = vec![Vec::new(); ways.len() + 2];
    let turns = if cold { 3 } else { TURNS };
    for _ in 0..turns {
        took[0].push(boot());
        for (of, (_, request)) in took[1..].iter_mut().zip(&ways) {
            of.push(restore(request));
        }
    }
    let recorded = dir.join("working_set");
    if cold {
        restore(&lazy(false, Some(3600)));
        assert!(recorded.exists());
        for _ in 0..turns {
            took[ways.len() + 1].push(restore(&lazy(false, None)));
        }
    }
    let names = ["booted"]
        .into_iter()
        .chain(ways.iter().map(|(name, _)| *name));
    for (name, of) in names.chain(["lazy, read ahead"]).zip(took) {
        if !of.is_empty() {
            println!("{mib:5} MiB, {name:16}: {:8.2} ms", median(of));
        }
    }
}

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let cold = words.iter().any(|word| word == "cold");
    let sizes: Vec<u64> = words.iter().filter_map(|arg| arg.parse().ok()).collect();
    let sizes = match sizes.is_empty() {
        true => vec![64, 256, 1024],
        false => sizes,
    };
    sizes.into_iter().for_each(|mib| measure(mib, cold));
}
