// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Two processes without a host: a wire that can be cut at each message, and a guest that writes. What must never be is
//! looked for at each step that changes whose the guest is.

use std::collections::{HashSet, VecDeque};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread::{JoinHandle, ThreadId};
use std::time::Duration;

use async_pf::{Fetched, Lane, PageSource, SourceError};
use dirty_log::estimate::Throttle;
use memslots::Gfn;
use reference_vmm::migration::guest::{
    ArrivingMemory, Blank, DestinationGuest, Dirty, Prepared, Refusal, SourceGuest,
};
use reference_vmm::migration::link::{Accept, Connect, Duplex, TICK, Wire};
use reference_vmm::migration::pages::{ReadPages, WritePages};
use reference_vmm::migration::postcopy::LastWord;
use reference_vmm::migration::postcopy::ask::{Enough, Later};

pub const PAGE: usize = 4096;
/// Two regions, over more than one stripe.
pub const MEMORY: [Range<u64>; 2] = [0..0x5_0000, 0x10_0000..0x11_0000];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Source = 0,
    Destination = 1,
}
use Side::{Destination, Source};

/// How much of the message at which it strikes arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrives {
    Nothing,
    Half,
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strike {
    /// All connections break. With `lost` what was under way on them is gone as well.
    SeverAll { lost: bool },
    /// The connection of the message breaks.
    SeverOne,
    /// All break, and so many attempts to connect find no way.
    Partition(u32),
    /// What stands between the two dies, and so many attempts to connect find nobody there, while the destination lives.
    Tunnel(u32),
    /// All break, and so many attempts to connect find another one there, or nobody, while the destination lives.
    Replaced(u32),
    /// All break, and so many attempts to connect are refused in the destination's place, while it lives.
    Firewall(u32),
    /// All break for the source, and the destination hears nothing of it.
    Freeze,
    /// All break for the source, and the message arrives when the destination has answered a question.
    Late,
    /// A process dies.
    Kill(Side),
}

#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Whose message.
    pub of: Side,
    /// Which, from 0 on.
    pub number: usize,
    pub arrives: Arrives,
    pub strike: Strike,
}

#[derive(Default)]
struct Conn {
    /// What is on its way to each side.
    to: [VecDeque<u8>; 2],
    cut: [bool; 2],
    lost: bool,
    closed: [bool; 2],
    /// Nothing comes at the destination any more, and no end.
    frozen: bool,
}

#[derive(Default)]
struct Process {
    dead: bool,
    running: bool,
    locked: bool,
}

#[derive(Default)]
struct State {
    conns: Vec<Conn>,
    backlog: VecDeque<usize>,
    deaf: bool,
    said: [usize; 2],
    fault: Option<Fault>,
    struck: bool,
    no_way: u32,
    no_tunnel: u32,
    replaced: u32,
    refused: u32,
    /// Those who have met another one last.
    others: HashSet<ThreadId>,
    late: Option<(usize, Vec<u8>)>,
    processes: [Process; 2],
    /// The guest's memory, as it is where it runs.
    memory: Vec<u8>,
    dirty: Vec<bool>,
    tracked: bool,
    random: u64,
    /// Things that must not be.
    wrong: Vec<String>,
    /// The next so many times somebody else has the disk.
    pub busy: u32,
    /// Behind the fault, so many times the destination has no descriptor for who connects.
    out_of_files: u32,
    /// And before it, from the beginning on.
    out_of_files_at_first: u32,
    over: bool,
    /// The destination cannot make the machine whole.
    spoiled: bool,
    /// It has made it so.
    prepared: bool,
    /// The guest has run on the destination.
    ran_there: bool,
    /// And all that followed it is there, as it was.
    whole: bool,
    /// It waits for strangers to say something.
    patient: bool,
    /// The destination hears of no page faults.
    no_faults: bool,
    /// What is said of pages that did not come.
    last_word: LastWord,
    /// Pages that the source has given for that.
    served: u64,
    /// What its vCPUs sleep, in percent.
    throttle: u8,
    /// No throttle slows it.
    defiant: bool,
    /// Steps of the guest.
    steps: u64,
}

impl State {
    fn process(&mut self, side: Side) -> &mut Process {
        &mut self.processes[side as usize]
    }

    fn check(&mut self) {
        let [a, b] = &self.processes;
        if a.running && b.running {
            self.wrong.push("it runs twice".into());
        }
        if a.locked && b.locked {
            self.wrong.push("its disk is locked twice".into());
        }
        if (a.running && !a.locked) || (b.running && !b.locked) {
            self.wrong.push("it runs without its disk".into());
        }
    }

    fn kill(&mut self, side: Side) {
        *self.process(side) = Process {
            dead: true,
            ..Process::default()
        };
        for conn in &mut self.conns {
            conn.cut = [true; 2];
        }
        self.deaf |= side == Destination;
    }

    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// The guest goes on for a while.
    fn guest_writes(&mut self, pages: u64) {
        if !self.processes[Source as usize].running {
            return;
        }
        for _ in 0..pages {
            // Of a hundred steps it does not make those that it sleeps through.
            self.steps += 1;
            if !self.defiant && self.steps % 100 < u64::from(self.throttle) {
                continue;
            }
            let number = self.random();
            let page = (number % self.dirty.len() as u64) as usize;
            let value = (number >> 32) as u8 & 3;
            self.memory[page * PAGE..(page + 1) * PAGE].fill(value);
            self.memory[page * PAGE + (number >> 40) as usize % PAGE] = value;
            self.dirty[page] |= self.tracked;
        }
    }
}

pub struct World {
    me: Weak<World>,
    state: Mutex<State>,
    changed: Condvar,
}

/// Where in all of memory.
fn offset(address: u64, len: u64) -> Result<usize, Refusal> {
    let mut before = 0;
    for region in MEMORY {
        if region.contains(&address) && address + len <= region.end {
            return Ok((before + address - region.start) as usize);
        }
        before += region.end - region.start;
    }
    Err(Refusal(format!("there is no memory at {address:#x}")))
}

fn len() -> usize {
    MEMORY
        .iter()
        .map(|region| (region.end - region.start) as usize)
        .sum()
}

/// Pages of all of memory.
pub fn pages() -> u64 {
    (len() / PAGE) as u64
}

fn checksum(memory: &[u8]) -> Vec<u8> {
    reference_vmm::snapshot::format::checksum(memory)
        .to_le_bytes()
        .to_vec()
}

impl World {
    pub fn new(fault: Option<Fault>) -> Arc<Self> {
        let mut state = State {
            fault,
            memory: vec![0; len()],
            dirty: vec![false; len() / PAGE],
            random: 0x2545_f491_4f6c_dd1d,
            ..State::default()
        };
        *state.process(Source) = Process {
            dead: false,
            running: true,
            locked: true,
        };
        state.guest_writes(40);
        Arc::new_cyclic(|me| World {
            me: me.clone(),
            state: Mutex::new(state),
            changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let changed = change(&mut state);
        state.check();
        self.changed.notify_all();
        changed
    }

    pub fn said(&self, side: Side) -> usize {
        self.lock().said[side as usize]
    }

    pub fn struck(&self) -> bool {
        self.lock().struck
    }

    pub fn runs(&self, side: Side) -> bool {
        self.lock().processes[side as usize].running
    }

    pub fn is_locked(&self, side: Side) -> bool {
        self.lock().processes[side as usize].locked
    }

    pub fn has_tunnel(&self) -> bool {
        let fault = self.lock().fault;
        fault.is_some_and(|fault| matches!(fault.strike, Strike::Tunnel(_)))
    }

    /// The destination waits for who says nothing as long as nobody ends all.
    pub fn hears_strangers_out(&self) {
        self.change(|state| state.patient = true);
    }

    /// How long it waits for who says nothing.
    pub fn greeting(&self) -> Duration {
        match self.lock().patient {
            true => Duration::MAX,
            false => Duration::from_secs(2),
        }
    }

    /// The destination cannot have memory come later.
    pub fn hears_no_faults(&self) {
        self.change(|state| state.no_faults = true);
    }

    /// This is what the destination says when it wants no more.
    pub fn says_at_last(&self, word: LastWord) {
        self.change(|state| state.last_word = word);
    }

    /// All that followed the guest is there.
    pub fn is_whole(&self) -> bool {
        self.lock().whole
    }

    /// Pages that were asked for behind the guest, a page as often as it was.
    pub fn served(&self) -> u64 {
        self.lock().served
    }

    pub fn is_tracked(&self) -> bool {
        self.lock().tracked
    }

    /// It writes as much however it is slowed.
    pub fn defies_throttles(&self) {
        self.change(|state| state.defiant = true);
    }

    pub fn throttled(&self) -> u8 {
        self.lock().throttle
    }

    pub fn wrong(&self) -> Vec<String> {
        self.lock().wrong.clone()
    }

    /// The next so many times that the source wants its disk back somebody has it.
    pub fn out_of_files(&self, times: u32) {
        self.lock().out_of_files = times;
    }

    /// The first so many times the destination accepts nobody, for want of descriptors.
    pub fn out_of_files_at_first(&self, times: u32) {
        self.lock().out_of_files_at_first = times;
    }

    /// Descriptors that it will lack still.
    pub fn lacks_files(&self) -> u32 {
        self.lock().out_of_files_at_first
    }

    /// The destination had the machine, and has dropped it.
    pub fn was_dropped(&self) -> bool {
        let state = self.lock();
        state.prepared && !state.processes[Destination as usize].locked
    }

    /// The destination has no machine to put the state into.
    pub fn spoil(&self) {
        self.change(|state| state.spoiled = true);
    }

    pub fn busy(&self, times: u32) {
        self.change(|state| state.busy = times);
    }

    /// The guest on the source ends.
    pub fn end(&self) {
        self.change(|state| {
            state.over = true;
            state.process(Source).running = false;
        });
    }

    fn connection(self: &Arc<Self>) -> (End, usize) {
        let mut state = self.lock();
        state.conns.push(Conn::default());
        let conn = state.conns.len() - 1;
        let end = End {
            world: Arc::clone(self),
            conn,
            side: Source,
        };
        (end, conn)
    }

    /// Somebody who is none of the two connects.
    pub fn stranger(self: &Arc<Self>) -> End {
        let (end, conn) = self.connection();
        self.change(|state| state.backlog.push_back(conn));
        end
    }
}

/// An end of a connection.
pub struct End {
    world: Arc<World>,
    conn: usize,
    side: Side,
}

impl ReadPages for End {}
impl WritePages for End {}

impl Wire for End {
    fn line(&self) -> Option<String> {
        Some(match (self.world.has_tunnel(), self.side) {
            (true, Source) => "to the tunnel".into(),
            (true, Destination) => "from the tunnel".into(),
            (false, _) => "from here to there".into(),
        })
    }

    fn duplex(self) -> io::Result<Duplex> {
        Ok(Box::new(Both(self)))
    }
}

/// An end that is read while it is written.
struct Both(End);

impl async_pf::peer::Wire for Both {
    fn set_tick(&self, _: Duration) -> io::Result<()> {
        Ok(())
    }

    fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read_now(into)
    }

    fn write(&self, from: &[u8]) -> io::Result<usize> {
        self.0.write_now(from)
    }

    fn shutdown(&self) {
        let (conn, me) = (self.0.conn, self.0.side as usize);
        self.0.world.change(|state| {
            state.conns[conn].cut[me] = true;
            state.conns[conn].closed[me] = true;
        });
    }
}

impl Read for End {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.read_now(bytes)
    }
}

impl End {
    fn read_now(&self, bytes: &mut [u8]) -> io::Result<usize> {
        let mut state = self.world.lock();
        let (me, peer) = (self.side as usize, 1 - self.side as usize);
        for waited in [false, true] {
            let dead = state.processes[me].dead;
            let conn = &mut state.conns[self.conn];
            let gone = conn.cut[me] && conn.lost;
            let frozen = conn.frozen && me == Destination as usize && !conn.closed[me];
            let there = !conn.to[me].is_empty() && !gone && !frozen;
            if dead {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            if there {
                return conn.to[me].read(bytes);
            }
            if conn.cut[me] {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            if conn.closed[peer] && !frozen {
                return Ok(0);
            }
            if !waited {
                (state, _) = self.world.changed.wait_timeout(state, TICK).unwrap();
            }
        }
        Err(io::ErrorKind::WouldBlock.into())
    }
}

impl Write for End {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_now(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl End {
    fn write_now(&self, bytes: &[u8]) -> io::Result<usize> {
        let (me, peer) = (self.side as usize, 1 - self.side as usize);
        let world = &self.world;
        world.change(|state| {
            let conn = &state.conns[self.conn];
            let frozen = conn.frozen && me == Destination as usize;
            if frozen && !conn.cut[me] && !state.processes[me].dead {
                return Ok(bytes.len());
            }
            if state.processes[me].dead || conn.cut[me] || conn.closed[peer] {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let number = state.said[me];
            state.said[me] += 1;
            let at = (self.side, number);
            let fault = state.fault.filter(|fault| (fault.of, fault.number) == at);
            let arrives = match fault.map(|fault| fault.arrives) {
                Some(Arrives::Nothing) => 0,
                Some(Arrives::Half) => bytes.len() / 2,
                Some(Arrives::All) | None => bytes.len(),
            };
            if let Some(Strike::Late) = fault.map(|fault| fault.strike) {
                state.late = Some((self.conn, bytes.to_vec()));
            } else {
                state.conns[self.conn].to[peer].extend(&bytes[..arrives]);
            }
            if self.side == Destination
                && state.struck
                && let Some((conn, bytes)) = state.late.take()
            {
                state.conns[conn].to[Destination as usize].extend(bytes);
            }
            let Some(fault) = fault else {
                return Ok(bytes.len());
            };
            state.struck = true;
            match fault.strike {
                Strike::SeverAll { lost } => state.conns.iter_mut().for_each(|conn| {
                    (conn.cut, conn.lost) = ([true; 2], lost);
                }),
                Strike::Partition(times) => {
                    state.no_way = times;
                    state.conns.iter_mut().for_each(|conn| conn.cut = [true; 2]);
                }
                Strike::Replaced(times) => {
                    state.replaced = times;
                    state.conns.iter_mut().for_each(|conn| conn.cut = [true; 2]);
                }
                Strike::Tunnel(times) => {
                    state.no_tunnel = times;
                    state.conns.iter_mut().for_each(|conn| conn.cut = [true; 2]);
                }
                Strike::Firewall(times) => {
                    state.refused = times;
                    state.conns.iter_mut().for_each(|conn| conn.cut = [true; 2]);
                }
                Strike::Freeze => state.conns.iter_mut().for_each(|conn| {
                    conn.cut[Source as usize] = true;
                    conn.frozen = true;
                }),
                Strike::SeverOne => state.conns[self.conn].cut = [true; 2],
                Strike::Late => state.conns.iter_mut().for_each(|conn| {
                    conn.cut[Source as usize] = true;
                }),
                Strike::Kill(side) => state.kill(side),
            }
            Ok(bytes.len())
        })
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.world.change(|state| {
            let late = state.late.as_ref().is_some_and(|late| late.0 == self.conn);
            state.conns[self.conn].closed[self.side as usize] = !late;
        });
    }
}

/// The source's way to the destination.
pub struct Dial(pub Arc<World>);

impl Connect for Dial {
    type Wire = End;

    fn connect(&self, _: Duration) -> io::Result<End> {
        let mut state = self.0.lock();
        if state.processes[Source as usize].dead {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if state.no_way > 0 {
            state.no_way -= 1;
            return Err(io::ErrorKind::TimedOut.into());
        }
        let me = std::thread::current().id();
        state.others.remove(&me);
        if state.replaced > 0 {
            state.replaced -= 1;
            state.others.insert(me);
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        if state.refused > 0 {
            state.refused -= 1;
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        if state.no_tunnel > 0 {
            state.no_tunnel -= 1;
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        if state.deaf {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        drop(state);
        Ok(self.0.stranger())
    }

    fn is_still(&self, _: &str) -> bool {
        !self.0.lock().others.contains(&std::thread::current().id())
    }

    fn is_refusal_proof(&self) -> bool {
        let fault = self.0.lock().fault;
        !fault.is_some_and(|fault| matches!(fault.strike, Strike::Firewall(_)))
    }
}

/// The destination's ear.
pub struct Ear(pub Arc<World>);

impl Accept for Ear {
    type Wire = End;
    type Caller = End;

    fn accept(&self) -> io::Result<Option<End>> {
        let mut state = self.0.lock();
        if state.backlog.is_empty() {
            (state, _) = self.0.changed.wait_timeout(state, TICK).unwrap();
        }
        if state.processes[Destination as usize].dead {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let lacks = if state.struck {
            &mut state.out_of_files
        } else {
            &mut state.out_of_files_at_first
        };
        if *lacks > 0 {
            *lacks -= 1;
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        Ok(state.backlog.pop_front().map(|conn| End {
            world: Arc::clone(&self.0),
            conn,
            side: Destination,
        }))
    }

    fn answer(caller: End, _: &dyn Fn() -> bool) -> Option<End> {
        Some(caller)
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        // Who has connected and was not accepted hears that nobody does.
        self.0.change(|state| {
            state.deaf = true;
            while let Some(conn) = state.backlog.pop_front() {
                state.conns[conn].cut = [true; 2];
            }
        });
    }
}

pub struct Found<'a> {
    world: &'a World,
    pages: Vec<u64>,
}

impl Dirty for Found<'_> {
    fn pages(&self) -> u64 {
        self.pages.len() as u64
    }

    fn runs(&self, each: &mut dyn FnMut(Range<u64>) -> bool) {
        let _ = self
            .pages
            .iter()
            .all(|page| each(*page..*page + PAGE as u64));
    }

    fn commit(mut self) {
        self.pages.clear();
    }
}

impl Drop for Found<'_> {
    fn drop(&mut self) {
        self.world.change(|state| {
            for page in &self.pages {
                let at = offset(*page, 1).unwrap() / PAGE;
                state.dirty[at] = true;
            }
        });
    }
}

impl World {
    fn alive(state: &State, side: Side) -> Result<(), Refusal> {
        match state.processes[side as usize].dead {
            true => Err(Refusal("the process is dead".into())),
            false => Ok(()),
        }
    }
}

impl SourceGuest for World {
    type Dirty<'a> = Found<'a>;

    fn memory(&self) -> u64 {
        len() as u64
    }

    fn over(&self) -> Option<String> {
        let state = self.lock();
        let dead = state.processes[Source as usize].dead;
        (dead || state.over).then(|| "it powered off".into())
    }

    fn rehearse(&self) -> Result<Vec<u8>, Refusal> {
        Ok(b"offer".to_vec())
    }

    fn start_tracking(&self) -> Result<(), Refusal> {
        self.change(|state| {
            World::alive(state, Source)?;
            state.tracked = true;
            state.dirty.fill(true);
            Ok(())
        })
    }

    fn stop_tracking(&self) {
        self.change(|state| state.tracked = false);
    }

    fn harvest(&self) -> Result<Found<'_>, Refusal> {
        self.change(|state| {
            World::alive(state, Source)?;
            state.guest_writes(5);
            let mut pages = Vec::new();
            let mut at = 0;
            for region in MEMORY {
                for page in region.step_by(PAGE) {
                    if std::mem::take(&mut state.dirty[at]) {
                        pages.push(page);
                    }
                    at += 1;
                }
            }
            Ok(Found { world: self, pages })
        })
    }

    fn holes(&self, pages: Range<u64>) -> Vec<Range<u64>> {
        let Ok(at) = offset(pages.start, pages.end - pages.start) else {
            return Vec::new();
        };
        self.change(|state| {
            let places = pages.clone().step_by(PAGE).enumerate();
            let holes = places.filter(|(number, _)| {
                let page = at + number * PAGE;
                state.memory[page..page + PAGE]
                    .iter()
                    .all(|byte| *byte == 0)
            });
            let holes = holes.map(|(_, page)| page..page + PAGE as u64).collect();
            // It goes on to write there, of which the next harvest knows.
            state.guest_writes(2);
            holes
        })
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Refusal> {
        let at = offset(address, bytes.len() as u64)?;
        self.change(|state| {
            World::alive(state, Source)?;
            bytes.copy_from_slice(&state.memory[at..at + bytes.len()]);
            state.guest_writes(2);
            Ok(())
        })
    }

    fn serve(&self) -> Result<Arc<dyn PageSource>, Refusal> {
        Ok(Arc::new(Still(self.me.upgrade().unwrap())))
    }

    fn throttle(&self, throttle: Throttle) -> Result<(), Refusal> {
        self.change(|state| {
            state.throttle = throttle.as_percent();
            Ok(())
        })
    }

    fn hold(&self) -> Result<(), Refusal> {
        self.change(|state| {
            World::alive(state, Source)?;
            state.process(Source).running = false;
            Ok(())
        })
    }

    fn state(&self) -> Result<Vec<u8>, Refusal> {
        self.change(|state| {
            World::alive(state, Source)?;
            Ok(checksum(&state.memory))
        })
    }

    fn release(&self) -> Result<(), Refusal> {
        self.change(|state| {
            World::alive(state, Source)?;
            state.process(Source).locked = false;
            Ok(())
        })
    }

    fn take_back(&self) -> Result<(), Refusal> {
        self.change(|state| {
            World::alive(state, Source)?;
            if state.busy > 0 {
                state.busy -= 1;
                return Err(Refusal("somebody has the disk".into()));
            }
            if state.processes[Destination as usize].locked {
                return Err(Refusal("the destination has the disk".into()));
            }
            if state.ran_there {
                state
                    .wrong
                    .push("it goes on from before it ran elsewhere".into());
            }
            if state.throttle > 0 {
                state.wrong.push("it goes on slowed".into());
            }
            let running = !state.over;
            *state.process(Source) = Process {
                dead: false,
                running,
                locked: true,
            };
            Ok(())
        })
    }
}

/// The source's memory, when the guest has gone.
struct Still(Arc<World>);

impl PageSource for Still {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        let at = offset(first.0 * PAGE as u64, into.len() as u64);
        let at = at.map_err(|_| SourceError::NoSuchPage { gfn: first })?;
        self.0.change(|state| {
            state.served += (into.len() / PAGE) as u64;
            into.copy_from_slice(&state.memory[at..at + into.len()]);
        });
        Ok(Fetched::Bytes)
    }
}

/// What makes the guest on the destination.
pub struct Maker {
    pub world: Arc<World>,
    pub refuses: Option<&'static str>,
}

/// The guest there.
pub struct Made {
    world: Arc<World>,
    memory: Arc<Mutex<Vec<u8>>>,
    locked: bool,
    later: Mutex<Option<Later>>,
    enough: Arc<Mutex<Option<Enough>>>,
    brings: Option<JoinHandle<()>>,
}

impl DestinationGuest for Maker {
    type Blank = Made;

    fn offered(self, state: &[u8]) -> Result<Made, Refusal> {
        assert_eq!(state, b"offer");
        match self.refuses {
            Some(why) => Err(Refusal(why.into())),
            None => Ok(Made {
                world: self.world,
                memory: Arc::new(Mutex::new(vec![0; len()])),
                locked: false,
                later: Mutex::default(),
                enough: Arc::default(),
                brings: None,
            }),
        }
    }
}

impl ArrivingMemory for &Made {
    fn page(&self, address: u64, bytes: &[u8]) -> Result<(), Refusal> {
        let at = offset(address, bytes.len() as u64)?;
        self.memory.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn zero(&self, address: u64, len: u64) -> Result<(), Refusal> {
        let at = offset(address, len)?;
        self.memory.lock().unwrap()[at..at + len as usize].fill(0);
        Ok(())
    }
}

impl Blank for Made {
    type Memory<'a> = &'a Made;
    type Prepared = Made;

    fn memory(&self) -> &Made {
        self
    }

    fn can_come_later(&self) -> Result<(), Refusal> {
        match self.world.lock().no_faults {
            true => Err(Refusal("there is no userfaultfd: have one".into())),
            false => Ok(()),
        }
    }

    fn prepare_later(mut self, _: &[u8], mut later: Later) -> Result<Made, Refusal> {
        let world = Arc::clone(&self.world);
        world.change(|state| {
            World::alive(state, Destination)?;
            if state.spoiled {
                return Err(Refusal("the machine cannot be made whole".into()));
            }
            if state.processes[Source as usize].locked {
                return Err(Refusal("the source has the disk".into()));
            }
            state.process(Destination).locked = true;
            (self.locked, state.prepared) = (true, true);
            Ok(())
        })?;
        let enough = std::mem::replace(&mut later.enough, Box::new(|_, _| {}));
        *self.enough.lock().unwrap() = Some(enough);
        // What is there of it is not as it was.
        for run in later.missing.runs() {
            let at = offset(run.start, 1).unwrap();
            self.memory.lock().unwrap()[at..at + (run.end - run.start) as usize].fill(0xee);
        }
        // As KVM does, when it has a vCPU's state.
        let first = later.missing.runs()[0].start;
        bring(
            &later,
            &self.memory,
            first..first + PAGE as u64,
            Lane::Fault,
        )
        .map_err(|why| Refusal(why.to_string()))?;
        self.later = Mutex::new(Some(later));
        Ok(self)
    }

    fn prepare(mut self, said: &[u8]) -> Result<Made, Refusal> {
        let world = Arc::clone(&self.world);
        world.change(|state| {
            World::alive(state, Destination)?;
            if state.spoiled {
                return Err(Refusal("the machine cannot be made whole".into()));
            }
            if said != checksum(&self.memory.lock().unwrap()) {
                state.wrong.push("its memory is another one".into());
            }
            if state.processes[Source as usize].locked {
                return Err(Refusal("the source has the disk".into()));
            }
            state.process(Destination).locked = true;
            (self.locked, state.prepared) = (true, true);
            Ok(())
        })?;
        Ok(self)
    }
}

/// Has these pages come.
fn bring(
    later: &Later,
    memory: &Mutex<Vec<u8>>,
    run: Range<u64>,
    lane: Lane,
) -> Result<(), SourceError> {
    let mut bytes = vec![0; (run.end - run.start) as usize];
    let fetched = later
        .source
        .fetch_for(lane, Gfn(run.start / PAGE as u64), &mut bytes)?;
    if fetched == Fetched::Zero {
        bytes.fill(0);
    }
    let at = offset(run.start, bytes.len() as u64).unwrap();
    memory.lock().unwrap()[at..at + bytes.len()].copy_from_slice(&bytes);
    Ok(())
}

/// Has all come that is missing, a few pages at a time, on one lane and the other.
fn bring_all(
    world: &World,
    later: &Later,
    memory: &Mutex<Vec<u8>>,
    enough: &Mutex<Option<Enough>>,
) -> Result<(), SourceError> {
    let step = 16 * PAGE as u64;
    let pieces = later.missing.runs().iter().flat_map(|run| {
        let starts = run.clone().step_by(step as usize);
        starts.map(|start| start..run.end.min(start + step))
    });
    for (number, mut piece) in pieces.enumerate() {
        // The first page has come before.
        piece.start += if number == 0 { PAGE as u64 } else { 0 };
        if piece.is_empty() {
            continue;
        }
        let lane = [Lane::Prefetch, Lane::Fault][usize::from(number % 3 == 1)];
        bring(later, memory, piece, lane)?;
    }
    world.change(|state| {
        if *memory.lock().unwrap() != state.memory {
            state
                .wrong
                .push("what followed it is another memory".into());
        }
        state.whole = true;
    });
    let word = world.lock().last_word.clone();
    if let Some(enough) = enough.lock().unwrap().take() {
        enough(word, Duration::ZERO);
    }
    Ok(())
}

impl Prepared for Made {
    type Running = Made;

    fn start(mut self) -> Result<Made, Refusal> {
        let later = self.later.lock().unwrap().take();
        if let Some(later) = later {
            let world = Arc::clone(&self.world);
            world.change(|state| {
                World::alive(state, Destination)?;
                state.process(Destination).running = true;
                state.ran_there = true;
                Ok(())
            })?;
            let (memory, enough) = (Arc::clone(&self.memory), Arc::clone(&self.enough));
            let brings = move || {
                // It is closed, and what is missing is lost.
                let _ = bring_all(&world, &later, &memory, &enough);
            };
            self.brings = Some(std::thread::spawn(brings));
            return Ok(self);
        }
        let world = Arc::clone(&self.world);
        world.change(|state| {
            World::alive(state, Destination)?;
            state.process(Destination).running = true;
            state.ran_there = true;
            if *self.memory.lock().unwrap() != state.memory {
                state.wrong.push("it starts with another memory".into());
            }
            Ok(())
        })?;
        Ok(self)
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        let enough = self.enough.lock().unwrap().take();
        if let Some(enough) = enough {
            enough(LastWord::default(), Duration::ZERO);
        }
        if let Some(brings) = self.brings.take() {
            brings.join().unwrap();
        }
        self.world.change(|state| {
            let process = state.process(Destination);
            process.running = false;
            process.locked &= !self.locked;
        });
    }
}
