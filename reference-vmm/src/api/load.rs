// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `PUT /snapshot/load`: a monitor without a machine, which a client tells what to go on from.
//!
//! ```text
//!   the server's worker                                    the thread that makes machines
//!   Waiting::perform(Load) ──── Loads::hand_over ────────► Loads::next
//!        ▲                                                     │ the machine is made, and begins
//!        └──────────── the answer ◄──── Load::answer ◄─────────┘ Waiting::begin
//! ```
//!
//! Before that the monitor is "Not started", in Firecracker's words, and does nothing but say so. A load that fails has
//! left nothing behind, and another one may come. One that waits for a migration (`run --incoming`) is so too, but that it
//! takes no load.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use kvm_core::arch::x86_64::state::ClockRestore;
use serde_json::json;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::monitor::{Machine, Monitor, describe, version};
use super::router::{Action, Outcome};
use super::worker::Busy;
use crate::end::{Chain, EndSignal, GuestEnd};
use crate::lazy::LazySaid;
use crate::migration::address::Address;
use crate::migration::coming::Coming;
use crate::migration::dial::Also;
use crate::migration::recover::Recover;
use crate::snapshot::RestoreRequest;

/// What a client wants to go on from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadRequest {
    /// The snapshot's directory.
    pub dir: PathBuf,
    /// Whether the guest goes on at once, or is paused.
    pub resume: bool,
    /// Whether writes are tracked from here on, so that an incremental snapshot may build on this one.
    pub track: bool,
    /// Network cards, by their place, and the taps where they are now.
    pub nets: Vec<(usize, String)>,
    /// The Unix socket of the vsock device.
    pub uds: Option<PathBuf>,
    /// What the guest sees of the time between.
    pub clock: Option<ClockRestore>,
    /// Whether the guest runs before its memory is read, and how that comes.
    pub lazy: LazySaid,
}

impl LoadRequest {
    /// What is to be restored: `base`, with what the client said over it.
    pub fn over(&self, base: &RestoreRequest) -> RestoreRequest {
        let mut request = base.clone();
        request.dir.clone_from(&self.dir);
        // Later ones count.
        let nets = self.nets.iter();
        let nets = nets.map(|(number, tap)| (*number, Some(tap.clone()), None));
        request.overrides.nets.extend(nets);
        if let Some(uds) = &self.uds {
            request.overrides.uds = Some(uds.clone());
        }
        request.clock = self.clock.unwrap_or(request.clock);
        request.track |= self.track;
        self.lazy.over(&mut request.lazy);
        request
    }
}

/// A load that a client waits for. Dropped without an answer, it is refused.
#[derive(Debug)]
pub struct Load {
    /// What it asked for.
    pub request: LoadRequest,
    answer: Sender<Outcome>,
    wish: Arc<Wish>,
}

/// Whether a load is wanted still.
#[derive(Debug, Default)]
struct Wish(Mutex<Wished>);

#[derive(Debug, Default)]
struct Wished {
    /// Whoever asked for it is gone.
    gone: bool,
    /// Whom it is told while a machine is made of it.
    end: Option<Arc<EndSignal>>,
}

impl Wish {
    fn lock(&self) -> MutexGuard<'_, Wished> {
        // What is in it is whole after each statement.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_gone(&self) {
        let mut wished = self.lock();
        wished.gone = true;
        if let Some(end) = wished.end.take() {
            end.tell(GuestEnd::Failed(GONE.into()));
        }
    }
}

/// Why a load has come to nothing that nobody waits for.
const GONE: &str = "who asked for the load is gone, and it was given up: no guest has run";

impl Load {
    /// A machine is made of it, by who looks at `end` while it waits: that is told if the client goes before the machine
    /// [begins](Self::begins).
    pub fn is_made(&self, end: &Arc<EndSignal>) {
        let mut wished = self.wish.lock();
        match wished.gone {
            true => end.tell(GuestEnd::Failed(GONE.into())),
            false => wished.end = Some(Arc::clone(end)),
        }
    }

    /// The machine is there and may begin, for the client waits still; it may go from now on. False: nobody wants it.
    pub fn begins(&self) -> bool {
        let mut wished = self.wish.lock();
        wished.end = None;
        !wished.gone
    }

    /// Tells the client what came of it.
    pub fn answer(self, outcome: Outcome) {
        // One who has gone hears nothing.
        let _ = self.answer.send(outcome);
    }
}

/// How often it is looked whether a load is wanted still.
const LOOK: Duration = Duration::from_millis(100);

/// Where loads are handed over from the server to who makes machines.
#[derive(Debug)]
pub struct Loads {
    state: Mutex<State>,
    asked: EventFd,
}

#[derive(Debug, Default)]
struct State {
    loads: VecDeque<Load>,
    closed: bool,
    /// What the one that is being made waits for is another process's to bring.
    of_another: bool,
}

impl Loads {
    /// # Errors
    /// The errno of `eventfd(2)`.
    pub fn new() -> io::Result<Self> {
        Ok(Loads {
            state: Mutex::default(),
            asked: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What is in it is whole after each statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands `request` over, and waits for what comes of it. It is given up where it is not `wanted` any more before the machine
    /// is there.
    fn hand_over(&self, request: LoadRequest, wanted: &dyn Fn() -> bool) -> Outcome {
        let (answer, answers) = channel();
        let wish = Arc::<Wish>::default();
        let ends = || Outcome::Refused("the monitor ends".into());
        let mut state = self.lock();
        if state.closed {
            return ends();
        }
        state.loads.push_back(Load {
            request,
            answer,
            wish: Arc::clone(&wish),
        });
        drop(state);
        // EAGAIN: it is readable as it is.
        let _ = self.asked.write(1);
        loop {
            match answers.recv_timeout(LOOK) {
                Ok(outcome) => return outcome,
                Err(RecvTimeoutError::Disconnected) => return ends(),
                Err(RecvTimeoutError::Timeout) if wanted() => {}
                // Its answer comes all the same, when nothing of it is left.
                Err(RecvTimeoutError::Timeout) => wish.is_gone(),
            }
        }
    }

    /// A load that was handed over, if there is one. Does not block; what is polled is readable when there is one.
    pub fn next(&self) -> Option<Load> {
        // EAGAIN: there is nothing. In this order, or one that comes between would be told by nothing.
        let _ = self.asked.read();
        let mut state = self.lock();
        let load = state.loads.pop_front();
        if !state.loads.is_empty() {
            let _ = self.asked.write(1);
        }
        load
    }

    /// The machine of a load is being made, and another process brings memory that it needs first, or that is over.
    pub fn waits_for_another(&self, waits: bool) {
        self.lock().of_another = waits;
    }

    /// Refuses what waits, and what comes.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.loads.clear();
    }
}

impl AsRawFd for Loads {
    fn as_raw_fd(&self) -> RawFd {
        self.asked.as_raw_fd()
    }
}

/// A monitor that has no machine before one is loaded, or comes from elsewhere.
pub struct Waiting<'a> {
    source: Source<'a>,
    machine: OnceLock<Machine<'a>>,
}

/// Whence the machine is to come.
enum Source<'a> {
    /// A client says what it goes on from.
    Loads(&'a Loads),
    /// A snapshot, since when: another process brings memory that it needs first.
    Restore(Landing, Instant),
    /// A migration to this address brings it.
    Migration(String, Arc<Landing>, Arc<Coming>, Option<Arc<Also>>),
}

/// Between the source's word that the guest is not there any more and the first moment at which it can be asked here, a
/// client that knows of that word waits for this moment, rather than hear that there is no guest.
#[derive(Debug, Default)]
pub struct Landing {
    is_near: Mutex<bool>,
    over: Condvar,
}

/// How long a client waits for that: the machine is whole by then, and it takes milliseconds. That the source says no
/// more is heard of elsewhere.
const NEAR: Duration = Duration::from_secs(5);
/// How long, from the beginning on, who asks for something short waits for a machine whose memory another process brings.
const SOON: Duration = Duration::from_secs(1);

impl Landing {
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.is_near.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machine is whole, and may be the guest from now on.
    pub fn is_near(&self) {
        *self.lock() = true;
    }

    /// It is, or will never be.
    fn is_over(&self) {
        *self.lock() = false;
        self.over.notify_all();
    }

    /// Blocks while it is near, for so long at most; whether it is near still.
    fn wait(&self, limit: Duration) -> bool {
        let waited = self
            .over
            .wait_timeout_while(self.lock(), limit, |near| *near);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl<'a> Waiting<'a> {
    /// One whose loads go to `loads`.
    pub fn new(loads: &'a Loads) -> Self {
        Waiting {
            source: Source::Loads(loads),
            machine: OnceLock::new(),
        }
    }

    /// One that waits for a migration at `address`, and takes no load; what is known of the guest is in `coming`.
    pub fn for_migration(address: impl Into<String>, coming: Arc<Coming>) -> Self {
        Waiting {
            source: Source::Migration(address.into(), Arc::default(), coming, None),
            machine: OnceLock::new(),
        }
    }

    /// One whose machine goes on from a snapshot, of whose memory another process brings what the machine needs first. Who asks
    /// for something long waits for it.
    pub fn for_restore() -> Self {
        let landing = Landing::default();
        landing.is_near();
        Waiting {
            source: Source::Restore(landing, Instant::now()),
            machine: OnceLock::new(),
        }
    }

    /// And can be told to listen elsewhere too.
    #[must_use]
    pub fn with_ear(mut self, ear: Arc<Also>) -> Self {
        if let Source::Migration(_, _, _, also) = &mut self.source {
            *also = Some(ear);
        }
        self
    }

    /// Where it is said that the machine of a migration comes; none of one that is loaded.
    pub fn landing(&self) -> Option<Arc<Landing>> {
        match &self.source {
            Source::Loads(_) | Source::Restore(..) => None,
            Source::Migration(_, landing, ..) => Some(Arc::clone(landing)),
        }
    }

    /// From now on it is this machine. Only the first call counts.
    pub fn begin(&self, machine: Machine<'a>) {
        let _ = self.machine.set(machine);
        self.end();
    }

    /// No machine comes any more, if none has.
    pub fn end(&self) {
        match &self.source {
            Source::Loads(_) => {}
            Source::Restore(landing, _) => landing.is_over(),
            Source::Migration(_, landing, ..) => landing.is_over(),
        }
    }
}

impl Monitor for Waiting<'_> {
    fn busy(&self, with: Busy) -> String {
        match self.machine.get() {
            Some(machine) => machine.busy(with),
            None => with.to_string(),
        }
    }

    fn runs(&self) -> bool {
        self.machine.get().is_some_and(Monitor::runs)
    }

    fn ends(&self) -> String {
        match self.machine.get() {
            Some(machine) => machine.ends(),
            None => "this was not begun: the monitor ends, and has no guest".into(),
        }
    }

    fn answered(&self) {
        if let Some(machine) = self.machine.get() {
            machine.answered();
        }
    }

    fn perform(&self, action: Action) -> Outcome {
        self.perform_while(action, &|| true)
    }

    fn perform_while(&self, action: Action, wanted: &dyn Fn() -> bool) -> Outcome {
        if let (Action::Recover(Recover::Listen { address }), Source::Migration(.., Some(ear))) =
            (&action, &self.source)
        {
            return listen(ear, address);
        }
        match (self.machine.get(), &self.source) {
            (None, Source::Migration(_, landing, ..)) => {
                landing.wait(NEAR);
            }
            (None, Source::Restore(landing, _)) if action.is_long() => {
                while landing.wait(LOOK) && wanted() {}
            }
            (None, Source::Restore(landing, since)) => {
                landing.wait(SOON.saturating_sub(since.elapsed()));
            }
            _ => {}
        }
        if let Some(machine) = self.machine.get() {
            return match (&action, &self.source) {
                (Action::Migration, Source::Migration(address, _, coming, ear))
                    if !machine.has_migrated() =>
                {
                    incoming(address, "arrived", coming, ear.as_deref())
                }
                _ => machine.perform_while(action, wanted),
            };
        }
        match (action, &self.source) {
            (Action::Migration, Source::Migration(address, _, coming, ear)) => {
                incoming(address, "coming", coming, ear.as_deref())
            }
            (Action::Describe, source) => {
                let mut who = describe("Not started");
                let waits = match source {
                    Source::Restore(..) => true,
                    Source::Loads(loads) => loads.lock().of_another,
                    Source::Migration(..) => false,
                };
                if waits {
                    who["waits-for"] = MEMORY.into();
                }
                Outcome::Json(who.to_string())
            }
            (Action::Version, _) => version(),
            (_, Source::Migration(address, _, coming, _)) => {
                let how = match coming.came() {
                    None => "waited for",
                    Some(_) => "on its way",
                };
                Outcome::Refused(format!(
                    "There is no guest here yet: one is {how} at {address}, by migration. \
                     To give that up, cancel it at the source (ctl migrate-cancel there), or stop this monitor by SIGTERM."
                ))
            }
            // It was waited for, and there will be none.
            (_, Source::Restore(landing, _)) if !landing.wait(Duration::ZERO) => {
                Outcome::Refused(self.ends())
            }
            (_, Source::Restore(..)) => Outcome::Refused(format!(
                "There is no guest here yet: {MEMORY} is waited for. Ask again, or stop this monitor by SIGTERM."
            )),
            (Action::Load(request), Source::Loads(loads)) => loads.hand_over(request, wanted),
            (Action::Start, _) => Outcome::Refused(
                "This monitor waits for a snapshot, and has no kernel to boot: PUT /snapshot/load."
                    .into(),
            ),
            (_, Source::Loads(_)) => Outcome::Refused(
                "The requested operation is not supported before starting the microVM, which waits for a snapshot: ctl load DIR, or PUT \
                 /snapshot/load."
                    .into(),
            ),
        }
    }
}

/// What a machine of [`Waiting::for_restore`] waits for.
const MEMORY: &str =
    "memory that the machine needs first (of the page server or the page-fault handler)";

/// Has a destination listen at one more address.
fn listen(ear: &Also, address: &str) -> Outcome {
    let parsed = address.parse::<Address>();
    let listens = parsed
        .map_err(|error| error.to_string())
        .and_then(|address| {
            ear.listen(&address)
                .map_err(|error| Chain(&error).to_string())
        });
    match listens {
        Ok(address) => Outcome::Json(json!({ "listen": address.to_string() }).to_string()),
        Err(why) => Outcome::Refused(why),
    }
}

/// What the destination of a migration says of it: `state` as soon as a guest was offered.
fn incoming(address: &str, state: &str, coming: &Coming, ear: Option<&Also>) -> Outcome {
    let mut said = json!({ "role": "destination", "address": address, "state": "waiting" });
    if let Some(also) = ear.and_then(Also::address) {
        said["also"] = also.to_string().into();
    }
    if let Some(came) = coming.came() {
        said["state"] = state.into();
        said["guest"] = json!(came);
    }
    Outcome::Json(said.to_string())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

    use super::*;
    use crate::snapshot::SnapshotRequest;

    fn request() -> LoadRequest {
        LoadRequest {
            dir: "/s".into(),
            resume: true,
            track: false,
            nets: vec![(1, "t1".into())],
            uds: None,
            clock: None,
            lazy: LazySaid::default(),
        }
    }

    #[test]
    fn what_the_client_says_is_laid_over_what_the_command_line_said() {
        let mut base = RestoreRequest::new("");
        base.overrides.nets = vec![(1, Some("old".into()), None)];
        base.overrides.uds = Some("/old".into());
        base.clock = ClockRestore::AsSaved;
        base.verify = false;
        let over = request().over(&base);
        assert_eq!(over.dir, PathBuf::from("/s"));
        assert_eq!(
            over.overrides.nets.last(),
            Some(&(1, Some("t1".into()), None))
        );
        assert_eq!(over.overrides.uds, Some("/old".into()));
        assert_eq!((over.clock, over.verify), (ClockRestore::AsSaved, false));
        let said = LoadRequest {
            uds: Some("/new".into()),
            clock: Some(ClockRestore::Advanced),
            track: true,
            ..request()
        };
        let over = said.over(&base);
        assert_eq!(over.overrides.uds, Some("/new".into()));
        assert_eq!((over.clock, over.track), (ClockRestore::Advanced, true));
    }

    #[test]
    fn before_a_load_nothing_is_done_and_a_failed_one_leaves_room_for_another() {
        let loads = Loads::new().unwrap();
        let waiting = Waiting::new(&loads);
        let Outcome::Json(who) = waiting.perform(Action::Describe) else {
            panic!("not described");
        };
        assert!(who.contains("\"Not started\""), "{who}");
        assert!(matches!(waiting.perform(Action::Version), Outcome::Json(_)));
        for action in [
            Action::Pause,
            Action::Resume,
            Action::Stats,
            Action::MachineConfig,
            Action::VmConfig,
            Action::PowerButton,
            Action::Snapshot(SnapshotRequest::new("/s")),
            Action::Start,
        ] {
            let Outcome::Refused(why) = waiting.perform(action) else {
                panic!("not refused");
            };
            assert!(why.contains("PUT /snapshot/load"), "{why}");
        }
        assert!(loads.next().is_none());
        for why in ["broken", "broken too"] {
            std::thread::scope(|scope| {
                let client = scope.spawn(|| waiting.perform(Action::Load(request())));
                let load = loop {
                    match loads.next() {
                        Some(load) => break load,
                        None => std::thread::yield_now(),
                    }
                };
                assert_eq!(load.request, request());
                load.answer(Outcome::Refused(why.into()));
                assert_eq!(client.join().unwrap(), Outcome::Refused(why.into()));
            });
        }
    }

    #[test]
    fn one_that_waits_for_a_migration_says_where_and_takes_no_load() {
        let waiting = Waiting::for_migration("unix:/w", Arc::default());
        let Outcome::Json(who) = waiting.perform(Action::Describe) else {
            panic!("not described");
        };
        assert!(who.contains("\"Not started\""), "{who}");
        assert!(matches!(waiting.perform(Action::Version), Outcome::Json(_)));
        let Outcome::Json(said) = waiting.perform(Action::Migration) else {
            panic!("not said");
        };
        assert!(
            said.contains("\"waiting\"") && said.contains("unix:/w"),
            "{said}"
        );
        for action in [Action::Pause, Action::Start, Action::Load(request())] {
            let Outcome::Refused(why) = waiting.perform(action) else {
                panic!("not refused");
            };
            assert!(why.contains("waited for at unix:/w"), "{why}");
        }
        // When the machine is whole who asks waits for it, until it is known what came of it.
        waiting.landing().unwrap().is_near();
        std::thread::scope(|scope| {
            let (said, hears) = channel();
            let waiting = &waiting;
            scope.spawn(move || said.send(waiting.perform(Action::Describe)).unwrap());
            assert!(hears.recv_timeout(Duration::from_millis(20)).is_err());
            waiting.end();
            let Outcome::Json(who) = hears.recv().unwrap() else {
                panic!("not described");
            };
            assert!(who.contains("\"Not started\""), "{who}");
        });
    }

    #[test]
    fn while_memory_is_waited_for_it_is_said_and_what_is_long_waits_for_the_guest_as_long_as_it_is_wanted()
     {
        let waiting = Waiting::for_restore();
        let Outcome::Json(who) = waiting.perform(Action::Describe) else {
            panic!("not described");
        };
        assert!(who.contains("\"Not started\""), "{who}");
        assert!(who.contains("memory that the machine needs"), "{who}");
        for action in [
            Action::MachineConfig,
            Action::Migration,
            Action::PowerButton,
        ] {
            let Outcome::Refused(why) = waiting.perform(action) else {
                panic!("not refused");
            };
            assert!(why.contains("no guest here yet"), "{why}");
        }
        let gone = waiting.perform_while(Action::Pause, &|| false);
        assert!(matches!(gone, Outcome::Refused(_)));
        std::thread::scope(|scope| {
            let (said, hears) = channel();
            let waiting = &waiting;
            scope.spawn(move || said.send(waiting.perform(Action::Pause)).unwrap());
            assert!(hears.recv_timeout(Duration::from_millis(20)).is_err());
            waiting.end();
            let ended = Outcome::Refused(waiting.ends());
            assert_eq!(hears.recv().unwrap(), ended);
            // Who asks now is not told to ask again.
            for action in [Action::Pause, Action::MachineConfig] {
                assert_eq!(waiting.perform(action), ended);
            }
        });
    }

    #[test]
    fn a_load_whose_memory_another_process_brings_says_so() {
        let loads = Loads::new().unwrap();
        let waiting = Waiting::new(&loads);
        for waits in [false, true, false] {
            loads.waits_for_another(waits);
            let Outcome::Json(who) = waiting.perform(Action::Describe) else {
                panic!("not described");
            };
            assert!(who.contains("\"Not started\""), "{who}");
            assert_eq!(who.contains(MEMORY), waits, "{who}");
        }
    }

    #[test]
    fn a_load_whose_client_is_gone_is_told_to_who_makes_the_machine_unless_that_has_begun() {
        let loads = Loads::new().unwrap();
        let waiting = &Waiting::new(&loads);
        let next = || loop {
            match loads.next() {
                Some(load) => break load,
                None => std::thread::yield_now(),
            }
        };
        for before in [true, false] {
            let (wanted, looks) = (AtomicBool::new(!before), AtomicUsize::new(0));
            let end = Arc::new(EndSignal::new().unwrap());
            std::thread::scope(|scope| {
                let client = scope.spawn(|| {
                    let load = Action::Load(request());
                    let wanted = || {
                        looks.fetch_add(1, SeqCst);
                        wanted.load(SeqCst)
                    };
                    waiting.perform_while(load, &wanted)
                });
                let load = next();
                load.is_made(&end);
                if before {
                    while !end.is_told() {
                        std::thread::yield_now();
                    }
                }
                assert_eq!(load.begins(), !before);
                wanted.store(false, SeqCst);
                // The first look from here on finds that; with the second it has been dealt with.
                let until = looks.load(SeqCst) + 2;
                while looks.load(SeqCst) < until {
                    std::thread::yield_now();
                }
                load.answer(Outcome::Done);
                assert_eq!(client.join().unwrap(), Outcome::Done);
                assert_eq!(end.is_told(), before);
            });
        }
    }

    #[test]
    fn a_monitor_that_ends_refuses_the_load_that_waits_and_those_that_come() {
        let loads = Loads::new().unwrap();
        let waiting = Waiting::new(&loads);
        let refused = Outcome::Refused("the monitor ends".into());
        std::thread::scope(|scope| {
            let client = scope.spawn(|| waiting.perform(Action::Load(request())));
            while loads.lock().loads.is_empty() {
                std::thread::yield_now();
            }
            loads.close();
            assert_eq!(client.join().unwrap(), refused);
        });
        assert_eq!(waiting.perform(Action::Load(request())), refused);
        // So does who drops it in the middle.
        let loads = Loads::new().unwrap();
        let waiting = Waiting::new(&loads);
        std::thread::scope(|scope| {
            let client = scope.spawn(|| waiting.perform(Action::Load(request())));
            while loads.next().is_none() {
                std::thread::yield_now();
            }
            assert_eq!(client.join().unwrap(), refused);
        });
    }
}
