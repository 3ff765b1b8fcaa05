// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM inside a program of one's own: `cargo run -p reference-vmm --example embed -- KERNEL [INITRD]` boots
//! a kernel with 512 MiB and two vCPUs, its console on stdout, and says how it ended. It waits until the
//! guest powers off, resets, crashes or writes to isa-debug-exit: one that only halts has not ended.

use std::error::Error;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::Arc;

use reference_vmm::config::Config;
use reference_vmm::end::{Chain, EndSignal};
use reference_vmm::memory::Memory;
use reference_vmm::vm::Machine;
use vmm_sys_util::poll::{PollContext, WatchingEvents};

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let Some(kernel) = args.next() else {
        eprintln!("usage: embed KERNEL [INITRD]");
        return ExitCode::from(2);
    };
    let config = Config {
        initrd: args.map(Into::into).collect(),
        memory: Memory::new(512 << 20),
        cpus: 2.into(),
        debug_exit: Some(0xf4), // how the project's bare-metal guests end
        ..Config::new(kernel)
    };
    match run(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("embed: {}", Chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(config: &Config) -> Result<(), Box<dyn Error>> {
    let end = Arc::new(EndSignal::new()?);
    let machine = Machine::build(config, std::io::stdout().as_fd(), &end)?;
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
