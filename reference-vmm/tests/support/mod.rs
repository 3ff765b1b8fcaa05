// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Runs the `reference-vmm` binary under a watchdog and says how it ended.
//!
//! Nothing here sleeps: output is waited for on a condition variable that the reading threads
//! signal, the end of the process on its pidfd. Both have the watchdog's time limit, and what is
//! killed for being late fails its test with what it had said so far and where its threads stood.

// Every test binary uses its own part of this.
#![allow(dead_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod heeder;
pub mod huge;
pub mod keeper;
pub mod lab;
pub mod moving;
pub mod mutate;
pub mod page_server;
pub mod pty;
pub mod rsp;
pub mod tls;
pub mod tracer;
pub mod tracked;
pub mod uffd;

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a run may take. The software KVM interprets guests, and CI hosts are shared.
pub const WATCHDOG: Duration = Duration::from_secs(30);

/// The binary under test: `REFERENCE_VMM_BIN`, or the one that cargo built for these tests.
pub fn binary() -> PathBuf {
    std::env::var_os("REFERENCE_VMM_BIN")
        .map_or_else(|| env!("CARGO_BIN_EXE_reference-vmm").into(), PathBuf::from)
}

/// Whether the long forms of the tests were asked for.
pub fn long() -> bool {
    std::env::var_os("LONG_TESTS").is_some_and(|value| value != "0")
}

/// Whether this is the lab, where guests are slow: what takes minutes there is made smaller.
pub fn in_lab() -> bool {
    std::env::var_os("REFERENCE_VMM_LAB").is_some()
}

/// Whether this is the short form in the lab, where a guest in an emulated machine is to be spared what takes minutes there:
/// this host's own KVM has run it, and the lab does with `--long`.
pub fn lab_short() -> bool {
    let short = in_lab() && !long();
    if short {
        eprintln!("left to the host, and in the lab to --long");
    }
    short
}

/// Fails unless this host has a KVM: the kvm tier is never skipped in silence.
pub fn need_kvm() {
    if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
        panic!("this test needs /dev/kvm, which cannot be opened: {error}");
    }
}

/// A file with these bytes, deleted when dropped.
pub fn file(bytes: &[u8]) -> tempfile::TempPath {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(bytes)
        .expect("the temporary file takes its bytes");
    file.into_temp_path()
}

/// An ELF64 kernel of this code.
pub fn elf(code: &[u8]) -> tempfile::TempPath {
    file(&guests::image::elf64(code))
}

/// A command line of `reference-vmm`, to be run.
#[derive(Debug)]
pub struct Vmm {
    args: Vec<OsString>,
    stdin: Input,
    stdout: Output,
    stderr: Option<OwnedFd>,
    /// `RLIMIT_FSIZE`.
    file_size: Option<u64>,
    pending: Option<i32>,
    limit: Duration,
    kernel: Option<tempfile::TempPath>,
}

#[derive(Debug)]
enum Input {
    Null,
    Pipe,
    Closed,
    File(OwnedFd),
}

#[derive(Debug)]
enum Output {
    Captured,
    File(OwnedFd),
}

impl Vmm {
    /// `reference-vmm run --kernel KERNEL`. Stdin is /dev/null.
    pub fn run(kernel: impl AsRef<OsStr>) -> Self {
        Vmm::command(["run", "--kernel"]).arg(kernel)
    }

    /// `reference-vmm run` with an ELF64 kernel of this code.
    pub fn boot(code: &[u8]) -> Self {
        let kernel = elf(code);
        let vmm = Vmm::run(&kernel);
        Vmm {
            kernel: Some(kernel),
            ..vmm
        }
    }

    /// `reference-vmm ARGS`.
    pub fn command<I: IntoIterator>(args: I) -> Self
    where
        I::Item: AsRef<OsStr>,
    {
        let vmm = Vmm {
            args: Vec::new(),
            stdin: Input::Null,
            stdout: Output::Captured,
            stderr: None,
            file_size: None,
            pending: None,
            limit: WATCHDOG,
            kernel: None,
        };
        vmm.args(args)
    }

    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    pub fn args<I: IntoIterator>(mut self, args: I) -> Self
    where
        I::Item: AsRef<OsStr>,
    {
        self.args
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Each word of `text` is an argument.
    pub fn words(self, text: &str) -> Self {
        self.args(text.split_whitespace())
    }

    /// Stdin is a pipe, open until [`Running::close_stdin`].
    pub fn stdin_pipe(mut self) -> Self {
        self.stdin = Input::Pipe;
        self
    }

    /// The process has no descriptor 0.
    pub fn stdin_closed(mut self) -> Self {
        self.stdin = Input::Closed;
        self
    }

    pub fn stdin_file(mut self, file: impl Into<OwnedFd>) -> Self {
        self.stdin = Input::File(file.into());
        self
    }

    /// Stdout goes here and is not captured.
    pub fn stdout_file(mut self, file: impl Into<OwnedFd>) -> Self {
        self.stdout = Output::File(file.into());
        self
    }

    /// Stderr goes here and is not captured.
    pub fn stderr_file(mut self, file: impl Into<OwnedFd>) -> Self {
        self.stderr = Some(file.into());
        self
    }

    /// The longest file that it may write.
    pub fn file_size(mut self, bytes: u64) -> Self {
        self.file_size = Some(bytes);
        self
    }

    /// This signal has been sent before it begins, and waits until it is asked for.
    pub fn pending(mut self, signal: i32) -> Self {
        self.pending = Some(signal);
        self
    }

    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Starts it.
    pub fn start(self) -> Running {
        use std::os::unix::process::CommandExt;
        let mut command = Command::new(binary());
        command.args(&self.args).stderr(Stdio::piped());
        if let Some(bytes) = self.file_size {
            let limit = libc::rlimit {
                rlim_cur: bytes,
                rlim_max: bytes,
            };
            // A measured binary's profile would be cut off by it too, and who reads profiles fails at that.
            command.env("LLVM_PROFILE_FILE", "/dev/null");
            // SAFETY: setrlimit and signal are async-signal-safe.
            unsafe {
                command.pre_exec(move || {
                    libc::signal(libc::SIGXFSZ, libc::SIG_DFL);
                    match libc::setrlimit(libc::RLIMIT_FSIZE, &limit) {
                        0 => Ok(()),
                        _ => Err(std::io::Error::last_os_error()),
                    }
                });
            }
        }
        if let Some(file) = self.stderr {
            command.stderr(file);
        }
        // A job that a shell started in the background ignores SIGINT and SIGQUIT, and so would the
        // VMM that inherits it (as it should: `nohup` works so). These tests send them.
        // SAFETY: signal is async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM] {
                    libc::signal(signal, libc::SIG_DFL);
                }
                Ok(())
            });
        }
        if let Some(signal) = self.pending {
            // SAFETY: the calls are async-signal-safe, and the set is initialised before it is used.
            unsafe {
                command.pre_exec(move || {
                    let mut set = std::mem::MaybeUninit::uninit();
                    libc::sigemptyset(set.as_mut_ptr());
                    libc::sigaddset(set.as_mut_ptr(), signal);
                    libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
                    libc::kill(libc::getpid(), signal);
                    Ok(())
                });
            }
        }
        match self.stdin {
            Input::Null => command.stdin(Stdio::null()),
            Input::Pipe => command.stdin(Stdio::piped()),
            Input::File(file) => command.stdin(file),
            // SAFETY: close is async-signal-safe, and descriptor 0 is not used before the exec.
            Input::Closed => unsafe {
                command.stdin(Stdio::null()).pre_exec(|| {
                    libc::close(0);
                    Ok(())
                })
            },
        };
        match self.stdout {
            Output::Captured => command.stdout(Stdio::piped()),
            Output::File(file) => command.stdout(file),
        };
        let mut child = command
            .spawn()
            .unwrap_or_else(|e| panic!("{}: {e}", binary().display()));
        let stdout = child.stdout.take().map(Collector::start);
        let stderr = match child.stderr.take() {
            Some(pipe) => Collector::start(pipe),
            None => Collector::start(std::io::empty()),
        };
        let stdin = child.stdin.take();
        let words: Vec<_> = self.args.iter().map(|arg| arg.to_string_lossy()).collect();
        Running {
            what: words.join(" "),
            deadline: Instant::now() + self.limit,
            child: Some(child),
            stdin,
            stdout,
            stderr,
            _kernel: self.kernel,
        }
    }

    /// Runs it to its end.
    pub fn output(self) -> Ended {
        self.start().wait()
    }
}

/// A run that has not ended, or whose end was not seen yet. Killed when dropped.
#[derive(Debug)]
pub struct Running {
    what: String,
    deadline: Instant,
    child: Option<Child>,
    stdin: Option<ChildStdin>,
    stdout: Option<Collector>,
    stderr: Collector,
    /// The file, which is to be there as long as this.
    _kernel: Option<tempfile::TempPath>,
}

impl Running {
    pub fn pid(&self) -> libc::pid_t {
        self.child.as_ref().expect("running").id() as libc::pid_t
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: the child has not been waited for, so the id is its own.
        assert_eq!(unsafe { libc::kill(self.pid(), signal) }, 0, "kill");
    }

    /// Writes to stdin, which must be a pipe.
    pub fn type_in(&mut self, bytes: &[u8]) {
        let stdin = self.stdin.as_mut().expect("stdin is a pipe");
        stdin.write_all(bytes).expect("stdin takes bytes");
    }

    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Waits until stdout holds `needle`.
    pub fn wait_for(&mut self, needle: &str) {
        let found = self
            .stdout
            .as_ref()
            .expect("captured")
            .wait_for(needle, self.deadline);
        if !found {
            self.fail(&format!("stdout never said {needle:?}"));
        }
    }

    /// Waits until stdout has said `needle` so many times more than it has now.
    pub fn wait_for_more(&mut self, needle: &str, more: usize) {
        let stdout = self.stdout.as_ref().expect("captured");
        let times = stdout.count(needle) + more;
        // That it was said `times` times is more than once less.
        let least = times.saturating_sub(1);
        if !stdout.wait_for_more(needle, least, self.deadline) {
            self.fail(&format!("stdout has not said {needle:?} {more} times more"));
        }
    }

    /// Waits until stderr holds `needle`.
    pub fn wait_for_stderr(&mut self, needle: &str) {
        if !self.stderr.wait_for(needle, self.deadline) {
            self.fail(&format!("stderr never said {needle:?}"));
        }
    }

    /// What stdout has said so far.
    pub fn stdout(&self) -> String {
        let read = self
            .stdout
            .as_ref()
            .expect("captured")
            .shared
            .read
            .lock()
            .unwrap();
        String::from_utf8_lossy(&read.0).into_owned()
    }

    /// What stderr has said so far.
    pub fn stderr(&self) -> String {
        let read = self.stderr.shared.read.lock().unwrap();
        String::from_utf8_lossy(&read.0).into_owned()
    }

    /// The names of its threads, sorted.
    pub fn threads(&self) -> Vec<String> {
        let mut names: Vec<_> = tasks(self.pid())
            .into_iter()
            .map(|(_, name)| name)
            .collect();
        names.sort();
        names
    }

    /// Waits until the thread of this name sleeps, and is seen to many times, or the process has ended.
    pub fn wait_until_idle(&self, name: &str) {
        let mut seen = 0;
        while seen < 200 {
            assert!(Instant::now() < self.deadline, "{name} never slept");
            let state = tasks(self.pid())
                .into_iter()
                .find(|(_, task)| task == name)
                .and_then(|(tid, _)| {
                    let path = format!("/proc/{}/task/{tid}/stat", self.pid());
                    std::fs::read_to_string(path).ok()
                })
                .and_then(|stat| stat.rsplit(") ").next()?.chars().next());
            let ended = ends_before(self.pid(), Instant::now());
            seen = match state {
                Some('S') => seen + 1,
                _ if ended => return,
                _ => 0,
            };
            std::thread::yield_now();
        }
    }

    /// Peak resident memory, KiB.
    pub fn peak_rss(&self) -> u64 {
        self.kib_of("VmHWM:")
    }

    /// Resident memory, KiB.
    pub fn rss(&self) -> u64 {
        self.kib_of("VmRSS:")
    }

    /// Of that what is the process's own: no file's, and nothing that is shared. KiB.
    pub fn rss_anon(&self) -> u64 {
        self.kib_of("RssAnon:")
    }

    /// Of that what lies in files, KiB: the program's own pages and its libraries', which all monitors of a host share.
    pub fn rss_file(&self) -> u64 {
        self.kib_of("RssFile:")
    }

    /// A line of its status.
    fn kib_of(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix(name));
        let value = line.unwrap_or_else(|| panic!("no {name}"));
        value.trim().trim_end_matches("kB").trim().parse().unwrap()
    }

    /// Memory that is the guest's and resident, KiB. The guest's memory is `shared`, and so has mappings of its own.
    pub fn guest_rss(&self) -> u64 {
        let maps = std::fs::read_to_string(format!("/proc/{}/smaps", self.pid())).unwrap();
        let (mut sum, mut is_guests) = (0, false);
        for line in maps.lines() {
            match line.strip_prefix("Rss:") {
                Some(rss) if is_guests => {
                    let kib = rss.trim().trim_end_matches("kB").trim();
                    sum += kib.parse::<u64>().unwrap();
                }
                Some(_) => {}
                // A mapping begins with its addresses, in small letters; what is said of it with a large one.
                None if line.starts_with(|c: char| !c.is_ascii_uppercase()) => {
                    is_guests = line.contains("memfd:guest-memory");
                }
                None => {}
            }
        }
        assert!(sum > 0, "no guest memory is told apart: {maps}");
        sum
    }

    /// Waits for its end. The watchdog kills what is too late, and the test fails.
    pub fn wait(mut self) -> Ended {
        let child = self.child.as_ref().expect("running");
        if !ends_before(child.id() as libc::pid_t, self.deadline) {
            self.fail("did not end");
        }
        self.collect()
    }

    fn collect(&mut self) -> Ended {
        self.stdin = None;
        let mut child = self.child.take().expect("running");
        let status = child.wait().expect("wait");
        Ended {
            what: self.what.clone(),
            status,
            stdout: self
                .stdout
                .take()
                .map(Collector::finish)
                .unwrap_or_default(),
            stderr: String::from_utf8_lossy(&self.stderr.join()).into_owned(),
        }
    }

    fn fail(&mut self, why: &str) -> ! {
        panic!("{}", self.give_up(why));
    }

    /// Kills it; what it had said, where its threads were, and its vCPUs' registers.
    fn give_up(&mut self, why: &str) -> String {
        let threads = describe_threads(self.pid());
        let before = timer_interrupts();
        // Twice: a loop shows itself by staying where it is. A process that has ended answers neither.
        for _ in 0..2 {
            let answers = self.stderr.count("RIP ");
            self.signal(libc::SIGUSR1);
            let soon = Instant::now() + Duration::from_secs(3);
            self.stderr.wait_for_more("RIP ", answers, soon);
        }
        let _ = self.child.as_mut().expect("running").kill();
        let after = timer_interrupts();
        let ended = self.collect();
        format!(
            "{why}; its threads then:\n{threads}the host's timer interrupts, CPU by CPU, then {before}, later {after}\n\
             the last that the host's kernel said:\n{}{ended}",
            kernel_log()
        )
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// How a run ended.
#[derive(Debug)]
pub struct Ended {
    what: String,
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Ended {
    /// What stdout got, as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Fails unless the exit status is this one.
    #[track_caller]
    pub fn expect_status(&self, code: i32) -> &Self {
        assert!(
            self.status.code() == Some(code),
            "expected status {code}\n{self}"
        );
        self
    }

    /// Fails unless stdout is exactly this.
    #[track_caller]
    pub fn expect_stdout(&self, text: &str) -> &Self {
        assert!(self.text() == text, "expected {text:?} on stdout\n{self}");
        self
    }

    /// Fails unless stderr is empty.
    #[track_caller]
    pub fn expect_silence(&self) -> &Self {
        assert!(self.stderr.is_empty(), "expected nothing on stderr\n{self}");
        self
    }

    /// Fails unless stderr is one line of the monitor, which it returns.
    #[track_caller]
    pub fn one_line(&self) -> &str {
        let problem = not_one_line(&self.stderr);
        assert!(problem.is_none(), "{}\n{self}", problem.unwrap_or_default());
        self.stderr.trim_end()
    }

    /// Fails unless stderr is one line with all of these in it.
    #[track_caller]
    pub fn expect_line(&self, needles: &[&str]) -> &Self {
        let line = self.one_line();
        for needle in needles {
            assert!(line.contains(needle), "the line has no {needle:?}\n{self}");
        }
        self
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "reference-vmm {}", self.what)?;
        match (self.status.code(), self.status.signal()) {
            (Some(code), _) => writeln!(f, "ended with status {code}")?,
            (_, Some(signal)) => writeln!(f, "was killed by signal {signal}")?,
            _ => writeln!(f, "ended: {:?}", self.status)?,
        }
        // The monitor's own words first: a log that is cut off is cut off at its end.
        writeln!(f, "--- stderr\n{}", tail(&self.stderr, 6000))?;
        writeln!(
            f,
            "--- stdout ({} bytes)\n{}---",
            self.stdout.len(),
            tail(&self.text(), 2000)
        )
    }
}

/// What keeps `stderr` from being one clear line of the monitor's.
pub fn not_one_line(stderr: &str) -> Option<&'static str> {
    let line = stderr.strip_suffix('\n').unwrap_or(stderr);
    if line.is_empty() {
        Some("nothing on stderr")
    } else if stderr.contains("panicked at") || stderr.contains("RUST_BACKTRACE") {
        Some("a panic")
    } else if line.contains('\n') {
        Some("more than one line on stderr")
    } else if line.chars().any(|c| c.is_control()) {
        Some("a control character in the message")
    } else if !line.starts_with("reference-vmm: ") {
        Some("a line that does not say who speaks")
    } else if line
        .split(": ")
        .zip(line.split(": ").skip(1))
        .any(|(one, next)| one == next)
    {
        Some("a line that says the same twice")
    } else if line.len() > 1000 {
        Some("a line that no one reads to its end")
    } else {
        None
    }
}

/// The end of a text: enough to see what went wrong.
fn tail(text: &str, length: usize) -> &str {
    let mut at = text.len().saturating_sub(length);
    while !text.is_char_boundary(at) {
        at += 1;
    }
    &text[at..]
}

/// Reads a stream to its end on a thread.
#[derive(Debug)]
struct Collector {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    /// What was read, and whether that is all.
    read: Mutex<(Vec<u8>, bool)>,
    more: Condvar,
}

impl Collector {
    fn start(mut stream: impl Read + Send + 'static) -> Self {
        let shared = Arc::new(Shared::default());
        let reader = shared.clone();
        let thread = std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            loop {
                // A pty master reads as EIO once the last slave is closed.
                let n = stream.read(&mut chunk).unwrap_or(0);
                let mut read = reader.read.lock().unwrap();
                read.0.extend_from_slice(&chunk[..n]);
                read.1 = n == 0;
                reader.more.notify_all();
                if n == 0 {
                    return;
                }
            }
        });
        Collector {
            shared,
            thread: Some(thread),
        }
    }

    fn wait_for(&self, needle: &str, deadline: Instant) -> bool {
        self.wait_for_more(needle, 0, deadline)
    }

    /// How often `needle` has come.
    fn count(&self, needle: &str) -> usize {
        count(&self.shared.read.lock().unwrap().0, needle.as_bytes())
    }

    /// Waits until `needle` has come more than `times`.
    fn wait_for_more(&self, needle: &str, times: usize, deadline: Instant) -> bool {
        let mut read = self.shared.read.lock().unwrap();
        loop {
            if count(&read.0, needle.as_bytes()) > times {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if read.1 || left.is_zero() {
                return false;
            }
            read = self.shared.more.wait_timeout(read, left).unwrap().0;
        }
    }

    fn join(&mut self) -> Vec<u8> {
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        std::mem::take(&mut self.shared.read.lock().unwrap().0)
    }

    fn finish(mut self) -> Vec<u8> {
        self.join()
    }
}

fn count(text: &[u8], needle: &[u8]) -> usize {
    text.windows(needle.len())
        .filter(|window| *window == needle)
        .count()
}

/// A descriptor of the process, readable when it has ended.
pub fn pidfd(pid: libc::pid_t) -> OwnedFd {
    // SAFETY: the call takes plain numbers; its result is checked before it is owned.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0) as i32;
        assert!(fd >= 0, "pidfd_open: {}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    }
}

fn ends_before(pid: libc::pid_t, deadline: Instant) -> bool {
    let pidfd = pidfd(pid);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut poll = libc::pollfd {
            fd: pidfd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd.
        match unsafe { libc::poll(&mut poll, 1, left.as_millis() as i32) } {
            0 => return false,
            n if n > 0 => return true,
            _ => {}
        }
    }
}

/// Threads of a process: id and name.
fn tasks(pid: libc::pid_t) -> Vec<(String, String)> {
    let Ok(dir) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    dir.filter_map(|entry| {
        let entry = entry.ok()?;
        let name = std::fs::read_to_string(entry.path().join("comm")).ok()?;
        Some((
            entry.file_name().into_string().ok()?,
            name.trim_end().to_owned(),
        ))
    })
    .collect()
}

/// How many timer interrupts each CPU of the host had: a CPU that runs a guest and gets none has lost its timer.
fn timer_interrupts() -> String {
    let all = std::fs::read_to_string("/proc/interrupts").unwrap_or_default();
    let line = all
        .lines()
        .find_map(|line| line.trim_start().strip_prefix("LOC:"));
    let counts = line.and_then(|line| line.split("Local").next());
    counts.unwrap_or("unknown").trim().to_owned()
}

/// The last lines of the host's kernel log, where we may read it.
fn kernel_log() -> String {
    /// `SYSLOG_ACTION_READ_ALL` of syslog(2).
    const READ_ALL: i32 = 3;
    let mut log = vec![0_u8; 1 << 18];
    // SAFETY: the buffer is as long as said.
    let length = unsafe { libc::klogctl(READ_ALL, log.as_mut_ptr().cast(), log.len() as i32) };
    log.truncate(usize::try_from(length).unwrap_or(0));
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(8)..]
        .iter()
        .flat_map(|line| ["  ", line, "\n"])
        .collect()
}

/// Where each thread of a process is: for the message of a run that hangs.
pub fn describe_threads(pid: libc::pid_t) -> String {
    let mut text = String::new();
    for (tid, name) in tasks(pid) {
        let of = |file| {
            let path = Path::new("/proc").join(&tid).join(file);
            std::fs::read_to_string(path)
                .unwrap_or_default()
                .trim_end()
                .to_owned()
        };
        let _ = writeln!(
            text,
            "  {tid} {name}: syscall {} in {}",
            of("syscall"),
            of("wchan")
        );
    }
    text
}
