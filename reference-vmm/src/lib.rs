// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A microVM monitor: [kvm-core], [memslots], [io-bus] and [irq-routing] composed into a machine
//! that boots unmodified Linux, and what a machine needs beside them.
//!
//! ```text
//!   cli ──► config ──► vm::Machine ──► vm::Running ──► end
//!            (plain      │   arch: boot protocols, ACPI   ▲
//!             data)      │   devices: serial, power, RTC ─┘ guest powered off, reset, crashed…
//!                        └── kvm-core, memslots, io-bus, irq-routing
//!   main_loop: console input, signals, the end       console, signals, logger, timeline, stats
//! ```
//!
//! The binary `reference-vmm` is a command line around this library ([`cli`], [`run`]); a program
//! that wants a VM of its own builds a [`config::Config`] and a [`vm::Machine`]:
//!
//! ```no_run
//! use std::sync::Arc;
//! use reference_vmm::{config::Config, end::EndSignal, vm::Machine};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let end = Arc::new(EndSignal::new()?);
//! let machine = Machine::build(&Config::new("vmlinux"), std::io::stdout(), &end)?;
//! let running = machine.start()?;
//! // … until `end.is_told()`; the descriptor of `end` is readable then.
//! running.stop();
//! # Ok(())
//! # }
//! ```
//!
//! # How to read it
//!
//! [`vm`] from top to bottom: it is the composition, and the order of set-up is there with its
//! reasons, and `exits` beside it, where each exit of a vCPU goes. Then [`memory`] (what the guest's
//! memory is made of), [`arch::boot`] (how a kernel image becomes a first instruction), [`arch::acpi`]
//! (how a kernel learns about its machine), [`devices`], and [`main_loop`].
//!
//! # Threads
//!
//! The main thread waits for events and never for a vCPU, but to stop it. Each vCPU has a thread,
//! `vcpu0` and so on, on which its exits are served; the devices hold a lock of their own each, and
//! the tables that an exit goes through are read without one. While a machine is built, a thread
//! named `cpuid` waits for KVM's slowest answer; where the build fails before it is needed, that
//! thread outlives the call by as long as the answer takes. While a guest writes much to its serial
//! port, a thread named `com1-drain` takes the output out of KVM's ring ([`devices::coalesce`]). With
//! `--gdb` a thread named `gdb` serves the debugger ([`gdb`]), and with `--api-sock` one named `api` the control socket
//! ([`api`]); without them there is nothing of that. A virtio device whose
//! driver is ready has a thread for each of its handlers, with the device's name ([`devices::virtio`]). Memory that comes
//! while the guest runs ([`lazy`]) is brought by threads named `pager-…`, and `lazy` until all of it is there.
//!
//! # Threat model
//!
//! The guest is hostile: its register values, access widths and memory contents are data, never
//! sizes or indices that are trusted. The kernel image and the initrd are too (see [`arch::boot`]).
//! The command line, the configuration file and the terminal are the user's own. There is no sandbox
//! around the monitor's process yet.
//!
//! # What is saved and restored
//!
//! All that the guest can tell of its machine ([`snapshot`]): memory, vCPUs, clocks, interrupts, devices. Not saved are the
//! contents of disks, which are only known again, unless a snapshot is asked to have them; connections; what is counted; and how a guest is watched (gdb, control
//! socket).
//!
//! # Known limits
//!
//! With 1 GiB pages the firmware lies in RAM that the guest can write; with 2 MiB pages the first
//! 2 MiB are ordinary memory. A machine has at most 18 virtio devices, and a driver that stops one queue alone
//! has to reset the device. A reset ends the monitor instead of restarting the guest. The real-time clock raises no interrupt. vCPUs number at most 255, and their APIC ids end
//! at 254: sockets or cores in numbers that are no powers of two leave ids out. Software breakpoints are not told from each other where one
//! page is mapped at several addresses; what gdb may do is not written to a log.
//!
//! [kvm-core]: kvm_core
//! [memslots]: memslots
//! [io-bus]: io_bus
//! [irq-routing]: irq_routing

pub mod api;
pub mod arch;
pub mod cli;
pub mod config;
pub mod console;
pub mod cpu_model;
pub mod cpu_report;
pub mod cpus;
pub mod ctl;
pub mod devices;
pub mod doctor;
pub mod end;
pub(crate) mod exits;
mod file_pages;
pub mod gdb;
pub mod host_memory;
pub mod kvm_stats;
pub mod lazy;
pub mod logger;
mod machine_checks;
pub mod main_loop;
mod mapped_file;
pub mod memory;
pub mod migration;
mod msrs;
mod no_wait;
mod priority;
pub mod process;
pub mod run;
pub mod signals;
pub mod snapshot;
pub mod stats;
pub mod stderr;
mod strangers;
pub mod text;
pub mod timeline;
pub mod units;
pub mod unix_socket;
pub mod vm;
