// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest that knows what it has (`guests::keeper`), in a machine of this process: it may be stopped anywhere, and go on
//! elsewhere, and finds out if anything of it was lost.

use std::io::{PipeReader, PipeWriter, Read};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use guests::image;
use guests::keeper::{QUIT, keeper64};
use kvm_core::BusErrors;
use reference_vmm::config::{Config, Irqchip};
use reference_vmm::end::{EndSignal, GuestEnd};
use reference_vmm::main_loop::GuestSide;
use reference_vmm::memory::Memory;
use reference_vmm::snapshot::chain::Chain;
use reference_vmm::snapshot::{RestoreRequest, SnapshotRequest};
use reference_vmm::vm::{Machine, RunState, Running};
use vm_memory::{Bytes, GuestAddress};

use super::{WATCHDOG, file};

/// A guest that runs, and what it says.
pub struct Guest {
    pub running: Running,
    pub end: Arc<EndSignal>,
    pub console: PipeReader,
    pub said: Vec<u8>,
}

impl Guest {
    pub fn boot(config: &Config) -> Self {
        Self::start(|console, end| Machine::build(config, console, end).unwrap())
    }

    pub fn restore(request: &RestoreRequest) -> Self {
        Self::start(|console, end| Machine::restore(request, console, end).unwrap())
    }

    /// One that is paused before it goes on.
    pub fn restore_paused(request: &RestoreRequest) -> Self {
        let make = |console: &_, end: &_| Machine::restore(request, console, end).unwrap();
        Self::start_as(RunState::Paused, make)
    }

    pub fn start(make: impl FnOnce(&PipeWriter, &Arc<EndSignal>) -> Machine) -> Self {
        Self::start_as(RunState::Running, make)
    }

    fn start_as(
        state: RunState,
        make: impl FnOnce(&PipeWriter, &Arc<EndSignal>) -> Machine,
    ) -> Self {
        // As the program does it: where KVM does as hardware does, a vCPU's thread is told by SIGBUS of memory that did not come.
        BusErrors::install().unwrap();
        let end = Arc::new(EndSignal::new().unwrap());
        let (console, writer) = std::io::pipe().unwrap();
        let running = make(&writer, &end).start_as(state).unwrap();
        Guest {
            running,
            end,
            console,
            said: Vec::new(),
        }
    }

    /// Waits until it says something or ends.
    pub fn listen(&mut self) {
        let entry = |fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut fds = [entry(self.console.as_raw_fd()), entry(self.end.as_raw_fd())];
        // SAFETY: two pollfds.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), 2, WATCHDOG.as_millis() as i32) };
        let said = String::from_utf8_lossy(&self.said);
        assert!(ready > 0, "nothing comes behind {said:?}");
        if fds[0].revents != 0 {
            let mut chunk = [0; 64];
            let got = self.console.read(&mut chunk).unwrap();
            self.said.extend(&chunk[..got]);
        }
    }

    /// Until it has said so many bytes more.
    pub fn hear(&mut self, bytes: usize) {
        let until = self.said.len() + bytes;
        while self.said.len() < until {
            self.listen();
            assert!(!self.end.is_told(), "{:?}: {:?}", self.end.get(), self.said);
        }
    }

    pub fn snapshot(&self, request: &SnapshotRequest) {
        self.running.snapshot(request).unwrap();
    }

    /// Fails unless the chain that ends in `dir` is what the guest, paused, has byte by byte.
    pub fn is_saved_in(&self, dir: &Path) {
        let (chain, _) = Chain::open(dir).unwrap();
        chain.verify().unwrap();
        let table = self.running.memory();
        for region in table.regions() {
            let range = region.extent().guest_range();
            for address in range.step_by(4096) {
                let (mut has, mut saved) = ([0; 4096], [0xee; 4096]);
                table.read_slice(&mut has, GuestAddress(address)).unwrap();
                chain.read(address..address + 4096, &mut saved).unwrap();
                assert!(has == saved, "{address:#x} in {}", dir.display());
            }
        }
    }

    /// Lets go of it; all that it said.
    pub fn leave(mut self) -> (String, Option<GuestEnd>) {
        self.running.stop();
        let end = self.end.get().cloned();
        drop(self.running);
        self.console.read_to_end(&mut self.said).unwrap();
        (String::from_utf8(self.said).unwrap(), end)
    }

    /// Has it quit, and waits for that.
    pub fn quit(mut self) -> (String, Option<GuestEnd>) {
        assert_eq!(self.running.input(&[QUIT]), 1);
        while !self.end.is_told() {
            self.listen();
        }
        self.leave()
    }

    /// Has it quit: it has lost nothing.
    pub fn has_all(self) {
        let (said, end) = self.quit();
        assert_eq!(end, Some(GuestEnd::DebugExit(0)), "{said}");
    }
}

/// Its kernel, and a machine for it.
pub fn keeper(cpus: u32, irqchip: Irqchip) -> (tempfile::TempPath, Config) {
    let (kernel, config) = machine(keeper64(), cpus, "16M");
    (kernel, Config { irqchip, ..config })
}

/// The same for another guest that works alike: one pass after the other, on so many vCPUs.
pub fn machine(code: &[u8], cpus: u32, memory: &str) -> (tempfile::TempPath, Config) {
    let kernel = file(&image::elf64(code));
    let config = Config {
        cmdline: format!("{cpus} "),
        memory: memory.parse::<Memory>().unwrap(),
        cpus: cpus.into(),
        irqchip: Irqchip::Split,
        debug_exit: Some(0xf4),
        ..Config::new(&*kernel)
    };
    (kernel, config)
}

/// What it says in so many passes: 1 2 3 … 9 0 1 …
pub fn digits(count: usize) -> String {
    (1..=count)
        .map(|pass| char::from(b'0' + (pass % 10) as u8))
        .collect()
}
