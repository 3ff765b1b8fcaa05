// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A virtio device of one's own: it gives text back in capitals.

use std::{env, error::Error, io, process::ExitCode, sync::Arc};

use reference_vmm::devices::virtio::any::Devices;
use reference_vmm::devices::virtio::device::{Activation, Assignment, Cx, Handler, VirtioDevice};
use reference_vmm::devices::virtio::fault::Fault;
use reference_vmm::{config::Config, end::Chain, end::EndSignal, vm::Machine};
use vmm_sys_util::poll::PollContext;

/// Its configuration space: how many bytes of a request it reads at most, as a `le32`.
pub struct Capitals(pub u32);

impl VirtioDevice for Capitals {
    type Handler = Capitalizer;
    type State = ();
    const DEVICE_ID: u32 = 63; // of no kind that virtio 1.2 knows
    const NAME: &'static str = "virtio-capitals";

    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.0.to_le_bytes().into_iter().skip(offset as usize);
        data.iter_mut()
            .zip(config)
            .for_each(|(to, from)| *to = from);
    }
    fn activate(&mut self, _: &Activation) -> Result<Vec<Assignment<Capitalizer>>, Fault> {
        let (queues, handler) = (vec![0], Capitalizer(self.0));
        Ok(vec![Assignment { queues, handler }])
    }
    fn retire(&mut self, _: Vec<Capitalizer>) {}
    fn state(&self) {}
}

/// What runs on its thread. A request is text to read and, behind it, room for the answer.
pub struct Capitalizer(u32);

impl Handler for Capitalizer {
    fn notified(&mut self, cx: &mut Cx<'_>, queue: usize) -> Result<(), Fault> {
        let memory = &**cx.memory;
        while let Some(chain) = cx.queues[queue].pop(memory)? {
            let mut text = vec![0; chain.readable.len().min(self.0) as usize];
            chain.reader(memory).read(&mut text)?;
            text.make_ascii_uppercase();
            let written = chain.writer(memory).write(&text)?;
            cx.queues[queue].add_used(memory, chain, written as u32)?;
        }
        Ok(())
    }
}

/// A machine that has one: `cargo run -p reference-vmm --example own_device -- KERNEL`.
pub fn main() -> ExitCode {
    let Err(error) = run() else {
        return ExitCode::SUCCESS;
    };
    eprintln!("own_device: {}", Chain(&*error));
    ExitCode::FAILURE
}

fn run() -> Result<(), Box<dyn Error>> {
    let config = Config::new(env::args_os().nth(1).ok_or("usage: own_device KERNEL")?);
    let end = Arc::new(EndSignal::new()?);
    let mut devices = Devices::open(&config, std::io::stdout())?;
    devices.add("capitals", Capitals(4096));
    let machine = Machine::build_with(&config, devices, io::stdout(), &end)?;
    let running = machine.start()?;
    let ended = PollContext::new()?;
    ended.add(&*end, 0u32)?;
    ended.wait()?;
    running.stop();
    Ok(())
}
