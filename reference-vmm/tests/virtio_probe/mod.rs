// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A virtio device for tests: it says what is asked of it, and does what the test wants.

// Every test binary uses its own part of this.
#![allow(dead_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

use reference_vmm::devices::virtio::device::{
    Activation, Assignment, Cx, Handler, Source, VirtioDevice,
};
use reference_vmm::devices::virtio::fault::Fault;
use reference_vmm::devices::virtio::interrupt::DriverLink;
use vmm_sys_util::epoll::EventSet;

/// A test that waits longer has failed.
pub const PATIENCE: Duration = Duration::from_secs(30);

static DEVICE_PANICS: AtomicU64 = AtomicU64::new(0);

/// How many devices' threads of this process have panicked since the first call. A device's panic is caught, and would
/// look like any other failure.
pub fn device_panics() -> u64 {
    static WATCH: Once = Once::new();
    WATCH.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if std::thread::current()
                .name()
                .is_some_and(|name| name.starts_with("test0"))
            {
                DEVICE_PANICS.fetch_add(1, Ordering::Relaxed);
            }
            before(info);
        }));
    });
    DEVICE_PANICS.load(Ordering::Relaxed)
}

/// A feature that the probe offers.
pub const FEATURE: u64 = 1 << 3;
/// The bytes of its configuration space.
pub const CONFIG_LEN: usize = 24;

/// What is asked of the device, and what it is to do.
#[derive(Default)]
pub struct Log {
    /// Features of each activation.
    pub activations: Vec<u64>,
    /// Activations whose handlers came back.
    pub retired: usize,
    /// The driver's resets.
    pub resets: usize,
    /// Calls of `notified`, by queue number.
    pub notified: Vec<u64>,
    /// Calls of `ready`: token and events.
    pub ready: Vec<(u32, EventSet)>,
    /// Handlers that have begun to rest.
    pub resting: usize,
    /// Chains that were answered.
    pub chains: u64,
    /// The last activation's way to the driver.
    pub driver: Option<DriverLink>,
    /// Configuration space.
    pub config: Vec<u8>,

    /// Rest waits until this is over.
    pub hold_rest: bool,
    /// The next activation is refused.
    pub refuse_activation: bool,
    /// The next call panics.
    pub panic_next: bool,
    /// The next call panics in its rest, too.
    pub panic_in_rest: bool,
    /// The next call of `notified` fails.
    pub fault_next: bool,
    /// What `ready` asks for: tokens with what is waited for from then on, none to forget.
    pub on_ready: Vec<(u32, Option<EventSet>)>,
    /// The same of `notified`.
    pub on_notified: Vec<(u32, Option<EventSet>)>,
}

/// The test's side.
#[derive(Clone, Default)]
pub struct Control(Arc<(Mutex<Log>, Condvar)>);

impl Control {
    pub fn log(&self) -> MutexGuard<'_, Log> {
        // A handler that panics does so with this lock let go, a test that fails may hold it.
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Activations whose handlers came back, and resets.
    pub fn ends(&self) -> (usize, usize) {
        let log = self.log();
        (log.retired, log.resets)
    }

    /// Changes what the device is to do.
    pub fn set(&self, change: impl FnOnce(&mut Log)) {
        change(&mut self.log());
        self.0.1.notify_all();
    }

    /// Waits until something has happened.
    pub fn wait(&self, until: impl Fn(&Log) -> bool) {
        let waited = self
            .0
            .1
            .wait_timeout_while(self.log(), PATIENCE, |log| !until(log));
        let late = waited.unwrap_or_else(PoisonError::into_inner).1.timed_out();
        assert!(!late, "it has not happened in {PATIENCE:?}");
    }
}

/// A device whose chains come back with their readable bytes in their writable buffers, as far as these go.
pub struct Probe {
    control: Control,
    sizes: Vec<u16>,
    /// Queues of each handler.
    handlers: Vec<Vec<u16>>,
    sources: Arc<Vec<(u32, OwnedFd, EventSet)>>,
}

impl Probe {
    /// A handler for each group of queues of these sizes. Queues are numbered in order.
    pub fn new(control: &Control, groups: &[&[u16]]) -> Self {
        let mut numbers = 0..;
        let handlers = groups
            .iter()
            .map(|sizes| numbers.by_ref().take(sizes.len()).collect());
        let handlers = handlers.collect();
        let sizes = groups.concat();
        control.set(|log| {
            log.notified.resize(sizes.len(), 0);
            log.config.resize(CONFIG_LEN, 0);
        });
        Probe {
            control: control.clone(),
            sizes,
            handlers,
            sources: Arc::default(),
        }
    }

    /// The first handler waits for these descriptors.
    pub fn with_sources(mut self, sources: Vec<(u32, OwnedFd, EventSet)>) -> Self {
        self.sources = Arc::new(sources);
        self
    }
}

impl VirtioDevice for Probe {
    type Handler = ProbeHandler;
    type State = Vec<u8>;
    const DEVICE_ID: u32 = 0x7e57;
    const NAME: &'static str = "virtio-probe";

    fn features(&self) -> u64 {
        FEATURE
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let log = self.control.log();
        let from = usize::try_from(offset).unwrap().min(log.config.len());
        for (to, from) in data.iter_mut().zip(&log.config[from..]) {
            *to = *from;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut log = self.control.log();
        let to = usize::try_from(offset).unwrap().min(log.config.len());
        for (to, from) in log.config[to..].iter_mut().zip(data) {
            *to = *from;
        }
    }

    fn activate(
        &mut self,
        activation: &Activation,
    ) -> Result<Vec<Assignment<ProbeHandler>>, Fault> {
        let refused = {
            let mut log = self.control.log();
            log.driver = Some(activation.driver.clone());
            log.activations.push(activation.features);
            std::mem::take(&mut log.refuse_activation)
        };
        self.control.set(|_| {});
        if refused {
            return Err(Fault::Driver("the test refuses this".into()));
        }
        let mut sources = Some(self.sources.clone());
        let assign = |queues: &Vec<u16>| Assignment {
            queues: queues.clone(),
            handler: ProbeHandler {
                control: self.control.clone(),
                sources: sources.take().unwrap_or_default(),
            },
        };
        Ok(self.handlers.iter().map(assign).collect())
    }

    fn retire(&mut self, handlers: Vec<ProbeHandler>) {
        assert_eq!(handlers.len(), self.handlers.len());
        self.control.set(|log| log.retired += 1);
    }

    fn reset(&mut self) {
        self.control.set(|log| log.resets += 1);
    }

    fn state(&self) -> Vec<u8> {
        self.control.log().config.clone()
    }
}

/// What serves a group of the probe's queues.
pub struct ProbeHandler {
    control: Control,
    sources: Arc<Vec<(u32, OwnedFd, EventSet)>>,
}

impl ProbeHandler {
    fn ask(cx: &mut Cx<'_>, changes: Vec<(u32, Option<EventSet>)>) {
        for (token, interest) in changes {
            match interest {
                Some(interest) => cx.set_interest(token, interest),
                None => cx.forget_source(token),
            }
        }
    }

    fn panic_if_asked(&self, panics: impl FnOnce(&mut Log) -> &mut bool) {
        let asked = std::mem::take(panics(&mut self.control.log()));
        assert!(!asked, "the test wants this panic");
    }
}

impl Handler for ProbeHandler {
    fn sources(&self) -> Vec<Source> {
        let source = |(token, fd, interest): &(u32, OwnedFd, EventSet)| Source {
            fd: fd.as_raw_fd(),
            token: *token,
            interest: *interest,
        };
        self.sources.iter().map(source).collect()
    }

    fn notified(&mut self, cx: &mut Cx<'_>, queue: usize) -> Result<(), Fault> {
        let number = usize::from(cx.queues[queue].number());
        let (changes, fault) = {
            let mut log = self.control.log();
            log.notified[number] += 1;
            (
                std::mem::take(&mut log.on_notified),
                std::mem::take(&mut log.fault_next),
            )
        };
        self.control.set(|_| {});
        Self::ask(cx, changes);
        self.panic_if_asked(|log| &mut log.panic_next);
        if fault {
            return Err(Fault::Driver("the test wants this fault".into()));
        }
        let memory = &**cx.memory;
        while let Some(chain) = cx.queues[queue].pop(memory)? {
            let (mut reader, mut writer) = (chain.reader(memory), chain.writer(memory));
            let mut bytes = [0; 4096];
            loop {
                let len = bytes.len().min(writer.left() as usize);
                let len = reader.read(&mut bytes[..len])?;
                if len == 0 {
                    break;
                }
                writer.write(&bytes[..len])?;
            }
            let written = writer.position();
            cx.queues[queue].add_used(memory, chain, written)?;
            self.control.set(|log| log.chains += 1);
        }
        Ok(())
    }

    fn ready(&mut self, cx: &mut Cx<'_>, token: u32, events: EventSet) -> Result<(), Fault> {
        let changes = {
            let mut log = self.control.log();
            log.ready.push((token, events));
            log.on_ready.clone()
        };
        self.control.set(|_| {});
        Self::ask(cx, changes);
        self.panic_if_asked(|log| &mut log.panic_next);
        Ok(())
    }

    fn rest(&mut self, _: &mut Cx<'_>) -> Result<(), Fault> {
        self.control.set(|log| log.resting += 1);
        self.control.wait(|log| !log.hold_rest);
        self.panic_if_asked(|log| &mut log.panic_in_rest);
        Ok(())
    }
}
