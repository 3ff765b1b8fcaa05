// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is behind the API: a machine that runs, and what it was configured to be.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use memslots::HugePages;
use serde_json::{Value, json};

use super::router::{Action, Outcome};
use super::worker::Busy;
use crate::config::Config;
use crate::devices::virtio::block::{Cache, Io};
use crate::end::{Chain, EndSignal, GuestEnd};
use crate::lazy::LazyProgress;
use crate::main_loop::GuestSide;
use crate::migration::outgoing::{Outgoing, OutgoingError};
use crate::migration::record::MigrationRecord;
use crate::migration::recover::Recover;
use crate::priority::step_back;
use crate::snapshot::SnapshotReport;
use crate::snapshot::files::HostFiles;
use crate::vm::{ControlError, RunState, Running};

/// Who does what a client asks for.
pub trait Monitor: Sync {
    /// Does it. One that is [long](Action::is_long) is done on a thread that does one after another, one in the
    /// [background](Action::is_background) on one more; others meanwhile on the server's own, where all clients wait while
    /// this blocks.
    fn perform(&self, action: Action) -> Outcome;

    /// The same of something [long](Action::is_long). What it has to wait for, for somebody who is away, it waits for as long
    /// as it is `wanted`: who asked for it may be gone.
    fn perform_while(&self, action: Action, _wanted: &dyn Fn() -> bool) -> Outcome {
        self.perform(action)
    }

    /// Why something [long](Action::is_long) is not begun, in words. Called on the server's own thread, and does not block.
    fn busy(&self, with: Busy) -> String {
        with.to_string()
    }

    /// Whether the guest runs, and who asks for that has what he asks for. Called on the server's own thread, and does not
    /// block.
    fn runs(&self) -> bool {
        false
    }

    /// Why what waits is never begun, in words, when the server is stopped. Called on the server's own thread, and does not
    /// block.
    fn ends(&self) -> String {
        "this was not begun: the monitor ends".into()
    }

    /// Called on the server's thread when who asked for something long has been given its outcome, or is gone.
    fn answered(&self) {}
}

/// A machine that runs.
pub struct Machine<'a> {
    running: &'a Running,
    end: &'a EndSignal,
    outgoing: Outgoing,
    machine_config: Value,
    vm_config: Value,
    /// Which of those that are never done side by side is.
    at_work: Mutex<Option<&'static str>>,
}

const BACKGROUND: &str = "a snapshot is being taken in the background";
const MIGRATION: &str = "the guest is being moved to another host";

/// One of those is done. Dropped, another may be.
struct Alone<'a>(&'a Mutex<Option<&'static str>>);

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl<'a> Machine<'a> {
    /// Begins one of those; or what is done.
    fn alone(&self, what: &'static str) -> Result<Alone<'_>, String> {
        let at_work = self.at_work.lock();
        let mut at_work = at_work.unwrap_or_else(PoisonError::into_inner);
        match *at_work {
            Some(other) => Err(format!("{other}: ask again when that is done")),
            None => {
                *at_work = Some(what);
                Ok(Alone(&self.at_work))
            }
        }
    }

    /// Pauses the guest. Where its memory waits for somebody who is away that is said, for it is so as well when it goes on, and
    /// may be why it cannot be paused.
    fn pause(&self) -> Outcome {
        let paused = self.running.pause();
        let lazy = self.running.lazy_progress();
        let waits = lazy.filter(LazyProgress::is_cut_off);
        match (paused, waits) {
            (Ok(()), None) => Outcome::Done,
            (Ok(()), Some(lazy)) => {
                let told = json!({ "state": state(RunState::Paused), "lazy": lazy });
                Outcome::Report(told.to_string())
            }
            (Err(error), waits) => {
                let waits = waits.and_then(|of| of.words()).unwrap_or_default();
                Outcome::Refused(format!("{error}{waits}"))
            }
        }
    }

    /// What asks `running`, whose end is told to `end`: it has moved, for one.
    pub fn new(running: &'a Running, end: &'a EndSignal) -> Self {
        let config = running.config();
        let tracks = running.chain().is_tracking_always();
        let machine_config = machine_config(config, tracks);
        Machine {
            running,
            end,
            // What is left to do behind it is in nobody's hurry, and the guest may begin on this same host.
            outgoing: Outgoing::telling(step_back),
            vm_config: vm_config(config, &machine_config),
            machine_config,
            at_work: Mutex::default(),
        }
    }

    /// Whether there was a migration from here, or one is under way.
    pub(super) fn has_migrated(&self) -> bool {
        self.outgoing.record().is_ok()
    }
}

impl Monitor for Machine<'_> {
    fn perform(&self, action: Action) -> Outcome {
        self.perform_while(action, &|| true)
    }

    fn perform_while(&self, action: Action, wanted: &dyn Fn() -> bool) -> Outcome {
        // Who is gone has lost the answer, and what he asked for is done all the same; unless it would wait for who is away.
        let cut_off = || {
            self.running
                .lazy_progress()
                .is_some_and(|of| of.is_cut_off())
        };
        let wanted: &dyn Fn() -> bool = &|| wanted() || !cut_off();
        let done = |result: Result<(), ControlError>| match result {
            Ok(()) => Outcome::Done,
            Err(error) => Outcome::Refused(error.to_string()),
        };
        match action {
            Action::Describe => {
                let mut who = describe(state(self.running.state()));
                if let Some(lazy) = self.running.lazy_progress() {
                    who["lazy"] = json!(lazy);
                }
                Outcome::Json(who.to_string())
            }
            Action::Version => version(),
            Action::MachineConfig => Outcome::Json(self.machine_config.to_string()),
            Action::VmConfig => Outcome::Json(self.vm_config.to_string()),
            Action::Stats => Outcome::Json(self.running.stats().json()),
            Action::Pause => self.pause(),
            Action::Resume => match self.running.resume() {
                Err(error @ ControlError::HandOver) => {
                    match self.outgoing.resume(self.running, self.end) {
                        // Paused before, it is so again.
                        Ok(()) => done(self.running.resume()),
                        Err(Some(why)) => Outcome::Refused(why.to_string()),
                        Err(None) => Outcome::Refused(error.to_string()),
                    }
                }
                other => done(other),
            },
            Action::Snapshot(request) => {
                let _alone = match request.background.then(|| self.alone(BACKGROUND)) {
                    Some(Err(why)) => return Outcome::Refused(why),
                    alone => alone,
                };
                let paused = self.running.state() == RunState::Paused;
                match self.running.snapshot_while(&request, &HostFiles, wanted) {
                    Ok(report) => {
                        log::info!("a snapshot was taken: {report:?}");
                        let told = told(&report, paused).to_string();
                        match report.background {
                            Some(_) => Outcome::Json(told),
                            None => Outcome::Report(told),
                        }
                    }
                    Err(error) => Outcome::Refused(Chain(&error).to_string()),
                }
            }
            Action::Load(_) => Outcome::Refused(
                "Loading a microVM snapshot is not allowed after starting the microVM: this monitor has its guest. Start \
                 another one for the snapshot: reference-vmm restore --from DIR, or restore --api-sock PATH and then ctl \
                 load DIR."
                    .into(),
            ),
            Action::Start => Outcome::Refused(
                "The requested operation is not supported after starting the microVM, which this monitor does by \
                 itself."
                    .into(),
            ),
            Action::Migrate(request) => {
                let not_begun = |why: &dyn std::fmt::Display| {
                    let state = match self.running.state() {
                        _ if self.outgoing.moved_to().is_some() => "is not here any more",
                        _ if self.running.is_handed_over() => "stands still here",
                        RunState::Running => "runs on here",
                        RunState::Paused => "is paused here, as it was",
                    };
                    Outcome::Refused(format!("the guest {state}, no migration was begun: {why}"))
                };
                let _alone = match self.alone(MIGRATION) {
                    Ok(alone) => alone,
                    Err(why) => return not_begun(&why),
                };
                let moved = self.outgoing.migrate_while(self.running, self.end, &request, wanted);
                // With the end of this monitor, for one, which nobody may wait for.
                if let Some(why) = self.outgoing.lost() {
                    self.end.has_cost(why);
                }
                match moved {
                    // It says where the guest is.
                    moved @ (Ok(_) | Err(OutgoingError::Migrate(_))) => recorded(moved),
                    Err(error) => not_begun(&Chain(&error)),
                }
            }
            Action::Migration => recorded(self.outgoing.record_of(self.running)),
            Action::MigrateOrder(order) => match self.outgoing.order(order) {
                Ok(()) => Outcome::Done,
                Err(error) => Outcome::Refused(Chain(&error).to_string()),
            },
            Action::Recover(Recover::To { address, tls_name }) => {
                match self.outgoing.recover(&address, tls_name.as_deref()) {
                    Ok(()) => Outcome::Done,
                    Err(error) => Outcome::Refused(Chain(&error).to_string()),
                }
            }
            Action::Recover(Recover::Listen { .. }) => Outcome::Refused(
                "no guest is waited for here, nor has come by migration: --listen (of the API: listen) is for the monitor \
                 that the guest goes to, and --to (to) for the one that it comes from"
                    .into(),
            ),
            Action::PowerButton => match self.running.press_power_button() {
                true => Outcome::Done,
                false => {
                    let why = "nobody in the guest listens to the power button: it has no ACPI, or has not \
                               come to it yet";
                    Outcome::Refused(why.into())
                }
            },
        }
    }

    fn busy(&self, with: Busy) -> String {
        match with {
            Busy::Migration => self.outgoing.under_way(),
            other => other.to_string(),
        }
    }

    fn runs(&self) -> bool {
        !self.running.stays_paused() && !self.running.is_stopping()
    }

    fn ends(&self) -> String {
        let end = self.end.get().map(ToString::to_string);
        // A crash has registers behind its first line.
        let how = end.as_deref().and_then(|end| end.lines().next());
        let how = how.unwrap_or("the monitor ends");
        format!("this was not begun, for the guest has ended: {how}")
    }

    fn answered(&self) {
        // Behind the answer, which else would be lost with the process.
        if let Some(to) = self.outgoing.moved_to() {
            self.end.tell(GuestEnd::Migrated(to));
        } else if let Some(why) = self.outgoing.lost() {
            self.end.tell(GuestEnd::Failed(why));
        }
    }
}

fn recorded(record: Result<MigrationRecord, OutgoingError>) -> Outcome {
    match record {
        Ok(record) => match serde_json::to_string(&record) {
            Ok(json) => Outcome::Json(json),
            Err(error) => Outcome::Refused(error.to_string()),
        },
        Err(error) => Outcome::Refused(Chain(&error).to_string()),
    }
}

/// What a snapshot cost the guest, times in microseconds. One that was `paused` before has stood still for longer.
fn told(report: &SnapshotReport, paused: bool) -> Value {
    let micros = |of: Duration| of.as_micros() as u64;
    let mut told = json!({
        "id": report.id.to_string(),
        "memory_bytes": report.memory,
        "written_bytes": report.written,
        "pause_us": (!paused).then(|| micros(report.paused)),
        "total_us": micros(report.took),
    });
    if report.ended_recording {
        told["ended_recording"] = true.into();
    }
    if let Some(cost) = report.background {
        let each = cost.protecting.as_secs_f64() * 1e6 / cost.protected.max(1) as f64;
        let each = (cost.protected > 0).then(|| (each * 1000.0).round() / 1000.0);
        told["protected_pages"] = cost.protected.into();
        told["us_per_page"] = json!(each);
        told["copied_pages"] = cost.copied.into();
    }
    told
}

/// Firecracker's word for it.
fn state(state: RunState) -> &'static str {
    match state {
        RunState::Running => "Running",
        RunState::Paused => "Paused",
    }
}

/// This program's version.
pub(super) fn version() -> Outcome {
    let version = env!("CARGO_PKG_VERSION");
    Outcome::Json(json!({ "firecracker_version": version }).to_string())
}

/// Firecracker's `InstanceInfo`.
pub(super) fn describe(state: &str) -> Value {
    json!({
        // Firecracker's for one that was given none.
        "id": "anonymous-instance",
        "state": state,
        "vmm_version": env!("CARGO_PKG_VERSION"),
        "app_name": "reference-vmm",
    })
}

/// Firecracker's `MachineConfiguration`.
fn machine_config(config: &Config, tracks: bool) -> Value {
    let memory = &config.memory;
    json!({
        "vcpu_count": config.cpus.count,
        "mem_size_mib": memory.size >> 20,
        "smt": config.cpus.threads.is_some_and(|threads| threads > 1),
        "track_dirty_pages": tracks,
        "huge_pages": match (memory.hugepages, memory.thp) {
            (Some(size), _) => format!("{}M", size.bytes() >> 20),
            (None, HugePages::Advise) => "Transparent".into(),
            (None, _) => "None".into(),
        },
    })
}

/// Firecracker's `FullVmConfiguration`, as far as it has words for what this machine has.
fn vm_config(config: &Config, machine_config: &Value) -> Value {
    let path = |path: &std::path::Path| path.to_string_lossy().into_owned();
    let drives = config.disks.iter().enumerate().map(|(at, disk)| {
        let mut drive = json!({
            "drive_id": disk.id.clone().unwrap_or_else(|| format!("disk{at}")),
            "is_root_device": false,
            "cache_type": match disk.cache {
                Cache::Writeback => "Writeback",
                Cache::Unsafe => "Unsafe",
            },
            "is_read_only": disk.readonly,
            "path_on_host": path(&disk.path),
        });
        match disk.io {
            Io::Auto => {}
            Io::Uring => drive["io_engine"] = "Async".into(),
            Io::Threads => drive["io_engine"] = "Sync".into(),
        }
        drive
    });
    let nets = config.nets.iter().enumerate().map(|(at, net)| {
        let mut card = json!({ "iface_id": format!("net{at}"), "host_dev_name": net.tap });
        if let Some(mac) = net.mac {
            card["guest_mac"] = mac.to_string().into();
        }
        card
    });
    let mut boot = json!({ "boot_args": config.cmdline });
    if let Some(kernel) = &config.kernel {
        boot["kernel_image_path"] = path(kernel).into();
    }
    if let Some(initrd) = config.initrd.first() {
        boot["initrd_path"] = path(initrd).into();
    }
    let mut whole = json!({
        "boot-source": boot,
        "drives": drives.collect::<Vec<_>>(),
        "machine-config": machine_config,
        "network-interfaces": nets.collect::<Vec<_>>(),
    });
    if let Some(vsock) = &config.vsock {
        whole["vsock"] = json!({ "guest_cid": vsock.cid, "uds_path": path(&vsock.uds) });
    }
    if config.rng {
        whole["entropy"] = json!({});
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::block::DiskConfig;
    use crate::memory::Memory;

    #[test]
    fn a_machine_is_told_in_firecrackers_words() {
        let mut disk = DiskConfig::new("/d");
        (disk.readonly, disk.io) = (true, Io::Uring);
        let config = Config {
            initrd: vec!["/i".into()],
            cmdline: "quiet".into(),
            memory: Memory::new(512 << 20),
            cpus: 3.into(),
            disks: vec![disk],
            rng: true,
            ..Config::new("/k")
        };
        let machine = json!({
            "vcpu_count": 3, "mem_size_mib": 512, "smt": false, "track_dirty_pages": false, "huge_pages": "None",
        });
        assert_eq!(machine_config(&config, false), machine);
        let expected = json!({
            "boot-source": {"kernel_image_path": "/k", "initrd_path": "/i", "boot_args": "quiet"},
            "drives": [{
                "drive_id": "disk0", "is_root_device": false, "cache_type": "Writeback", "is_read_only": true,
                "path_on_host": "/d", "io_engine": "Async",
            }],
            "machine-config": machine,
            "network-interfaces": [],
            "entropy": {},
        });
        assert_eq!(vm_config(&config, &machine), expected);
    }

    #[test]
    fn whether_it_runs_is_told_in_firecrackers_words() {
        assert_eq!(describe(state(RunState::Running))["state"], "Running");
        assert_eq!(describe(state(RunState::Paused))["state"], "Paused");
    }
}
