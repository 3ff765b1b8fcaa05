// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM inside a program of one's own: `cargo run --example embed -- KERNEL [INITRD]` boots a kernel
//! with 512 MiB and two vCPUs, its console on stdout, and says how it ended.

use std::error::Error;
use std::os::fd::AsFd;
use std::sync::Arc;

use reference_vmm::config::Config;
use reference_vmm::end::EndSignal;
use reference_vmm::memory::Memory;
use reference_vmm::vm::Machine;
use vmm_sys_util::poll::{PollContext, WatchingEvents};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1);
    let kernel = args.next().ok_or("usage: embed KERNEL [INITRD]")?;
    let config = Config {
        initrd: args.map(Into::into).collect(),
        memory: Memory::new(512 << 20),
        cpus: 2,
        ..Config::new(kernel)
    };

    let end = Arc::new(EndSignal::new()?);
    let machine = Machine::build(&config, std::io::stdout().as_fd(), &end)?;
    let running = machine.start()?;

    // A program with an event loop adds the descriptor of `end` to it; this one has nothing else to
    // wait for.
    let ended: PollContext<u32> = PollContext::new()?;
    ended.add_fd_with_events(&*end, WatchingEvents::empty().set_read(), 0)?;
    ended.wait()?;
    running.stop();
    println!("the guest has ended: {:?}", end.get());
    Ok(())
}
