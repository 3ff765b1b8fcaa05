// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A small system call tracer: what a run asks of the kernel, in which order and on which thread,
//! and what it does when one of its calls fails.
//!
//! A call is made to fail as strace's `inject` does it: at its entry its number becomes -1, which
//! no call has, so that the kernel does nothing, and at its exit the result becomes the errno.
//!
//! ptrace binds a tracee to the thread that attached, so a trace runs on the calling thread, and
//! waits for this thread's children alone (`__WNOTHREAD`): tests run side by side.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use libc::{c_long, pid_t};

/// What kind of call it is: as fine as a test tells calls apart.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A KVM ioctl, by its request number.
    Kvm(u32),
    /// `open` or `openat`, by path.
    Open(String),
    /// `mmap`, by length and flags: threads map at the same time, each its own things.
    Map(u64, i32),
    /// Any on a file below the [place](trace_in), by system call number and path from there.
    File(i64, String),
    /// Any other of the first thread, by system call number.
    Syscall(i64),
    /// Any other of any other thread.
    Elsewhere(i64),
}

impl Kind {
    /// A KVM ioctl by its name.
    pub fn kvm(name: &str) -> Self {
        match KVM_IOCTLS.iter().find(|(_, n)| *n == name) {
            Some((request, _)) => Kind::Kvm(*request),
            None => panic!("{name} is not in the tracer's table"),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Kvm(request) => match KVM_IOCTLS.iter().find(|(r, _)| r == request) {
                Some((_, name)) => f.write_str(name),
                None => write!(f, "KVM ioctl {request:#x}"),
            },
            Kind::Open(path) => write!(f, "open {path}"),
            Kind::Map(len, flags) => write!(f, "mmap of {len:#x} bytes with flags {flags:#x}"),
            Kind::File(nr, path) => {
                Kind::Syscall(*nr).fmt(f)?;
                write!(f, " of {path}")
            }
            Kind::Syscall(nr) | Kind::Elsewhere(nr) => match SYSCALLS.iter().find(|(n, _)| n == nr)
            {
                Some((_, name)) => f.write_str(name),
                None => write!(f, "system call {nr}"),
            },
        }
    }
}

/// One system call of a run.
#[derive(Clone, Debug)]
pub struct Call {
    pub kind: Kind,
    /// How many calls of this kind came before it.
    pub nth: usize,
    /// The thread, and its name when it made the call.
    pub tid: pid_t,
    pub thread: String,
    pub args: [u64; 6],
    /// What it returned (an errno negative); `None` if the process ended in it.
    pub result: Option<i64>,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] {}#{}", self.thread, self.kind, self.nth)?;
        write!(
            f,
            "({:#x}, {:#x}, {:#x})",
            self.args[0], self.args[1], self.args[2]
        )?;
        match self.result {
            Some(result) => write!(f, " = {result}"),
            None => write!(f, " = ?"),
        }
    }
}

/// Makes the `nth` call (from 0) of a kind fail.
#[derive(Clone, Debug)]
pub struct Inject {
    pub kind: Kind,
    pub nth: usize,
    pub errno: i32,
}

impl fmt::Display for Inject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let error = io::Error::from_raw_os_error(self.errno);
        write!(f, "{}#{} fails with: {error}", self.kind, self.nth)
    }
}

/// A run that was traced to its end.
#[derive(Debug)]
pub struct Trace {
    /// In the order in which they began.
    pub calls: Vec<Call>,
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
    /// It did not end by itself: where its threads stood when the watchdog killed it.
    pub hung: Option<String>,
    /// The injected failure took place.
    pub injected: bool,
}

impl Trace {
    /// The KVM ioctls, in order.
    pub fn kvm(&self) -> impl Iterator<Item = &Call> {
        self.calls
            .iter()
            .filter(|call| matches!(call.kind, Kind::Kvm(_)))
    }

    /// Positions among all calls of those of this KVM ioctl.
    pub fn positions(&self, name: &str) -> Vec<usize> {
        let kind = Kind::kvm(name);
        let with_index = self.calls.iter().enumerate();
        with_index
            .filter(|(_, call)| call.kind == kind)
            .map(|(i, _)| i)
            .collect()
    }

    /// How often each KVM ioctl was made.
    pub fn kvm_counts(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for call in self.kvm() {
            *counts.entry(call.kind.to_string()).or_default() += 1;
        }
        counts
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(threads) = &self.hung {
            writeln!(f, "it hung; its threads then:\n{threads}")?;
        }
        match self.status.signal() {
            Some(signal) => writeln!(f, "killed by signal {signal}")?,
            None => writeln!(f, "status {:?}", self.status.code())?,
        }
        writeln!(
            f,
            "--- stdout\n{}",
            super::tail(&String::from_utf8_lossy(&self.stdout), 2000)
        )?;
        writeln!(f, "--- stderr\n{}---", super::tail(&self.stderr, 6000))
    }
}

/// The calls to refuse: the first and the last of each kind, or with `LONG_TESTS=1` all.
pub fn chosen<'a>(calls: impl Iterator<Item = &'a Call>) -> Vec<(Kind, usize)> {
    let mut kinds: BTreeMap<Kind, Vec<usize>> = BTreeMap::new();
    for call in calls {
        kinds.entry(call.kind.clone()).or_default().push(call.nth);
    }
    let of = |(kind, mut nths): (Kind, Vec<usize>)| {
        if !super::long() {
            nths.drain(1..nths.len().max(2) - 1);
        }
        nths.into_iter().map(move |nth| (kind.clone(), nth))
    };
    kinds.into_iter().flat_map(of).collect()
}

/// Runs `reference-vmm ARGS` to its end under the tracer, with the failures in `inject`. `stdin` is
/// /dev/null unless given.
pub fn trace<A: AsRef<OsStr>>(
    args: &[A],
    stdin: Option<OwnedFd>,
    inject: &[Inject],
    limit: Duration,
) -> Trace {
    trace_in(None, args, stdin, inject, limit)
}

/// The same; calls on files below `place` are told apart by their paths ([`Kind::File`]), so that they count the same in
/// each run, whatever other threads do.
pub fn trace_in<A: AsRef<OsStr>>(
    place: Option<&Path>,
    args: &[A],
    stdin: Option<OwnedFd>,
    inject: &[Inject],
    limit: Duration,
) -> Trace {
    let mut command = Command::new(super::binary());
    command
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command.stdin(stdin.map_or_else(Stdio::null, Stdio::from));
    // SAFETY: ptrace(TRACEME) is a bare system call.
    unsafe {
        command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    // The tracer waits for it, as for all of its threads.
    #[allow(clippy::zombie_processes)]
    let mut child = command.spawn().expect("the traced process starts");
    let pid = child.id() as pid_t;
    let stdout = super::Collector::start(child.stdout.take().expect("piped"));
    let stderr = super::Collector::start(child.stderr.take().expect("piped"));
    let watchdog = Watchdog::start(pid, limit);
    let mut tracer = Tracer {
        pid,
        inject,
        place,
        ..Tracer::default()
    };
    let status = tracer.run();
    let hung = watchdog.stop();
    Trace {
        calls: tracer.calls,
        status,
        stdout: stdout.finish(),
        stderr: String::from_utf8_lossy(&stderr.finish()).into_owned(),
        hung,
        injected: tracer.injected,
    }
}

#[derive(Default)]
struct Tracer<'a> {
    pid: pid_t,
    inject: &'a [Inject],
    place: Option<&'a Path>,
    calls: Vec<Call>,
    counts: HashMap<Kind, usize>,
    threads: HashSet<pid_t>,
    /// The call that each thread is in, and the errno that it is to get.
    inside: HashMap<pid_t, (usize, Option<i32>)>,
    injected: bool,
}

const WAIT: i32 = libc::__WALL | libc::__WNOTHREAD;

impl Tracer<'_> {
    fn run(&mut self) -> ExitStatus {
        let mut raw = 0;
        // SAFETY: the status is written to a valid place. The first stop is the one of the exec.
        let pid = unsafe { libc::waitpid(self.pid, &mut raw, WAIT) };
        assert_eq!(pid, self.pid, "waitpid: {}", io::Error::last_os_error());
        let options = libc::PTRACE_O_TRACESYSGOOD
            | libc::PTRACE_O_TRACECLONE
            | libc::PTRACE_O_TRACEFORK
            | libc::PTRACE_O_TRACEVFORK
            | libc::PTRACE_O_EXITKILL;
        // SAFETY: the tracee is stopped; the options are a plain number.
        let set = unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, pid, 0, c_long::from(options)) };
        assert_eq!(set, 0, "PTRACE_SETOPTIONS: {}", io::Error::last_os_error());
        self.threads.insert(pid);
        resume(pid, 0);

        let mut status = None;
        loop {
            // SAFETY: as above.
            let tid = unsafe { libc::waitpid(-1, &mut raw, WAIT) };
            if tid < 0 {
                let error = io::Error::last_os_error();
                match error.raw_os_error() {
                    Some(libc::EINTR) => continue,
                    Some(libc::ECHILD) => break,
                    _ => panic!("waitpid: {error}"),
                }
            }
            if !libc::WIFSTOPPED(raw) {
                self.threads.remove(&tid);
                if tid == self.pid {
                    status = Some(ExitStatus::from_raw(raw));
                }
                continue;
            }
            let signal = match libc::WSTOPSIG(raw) {
                stop if stop == libc::SIGTRAP | 0x80 => {
                    self.syscall_stop(tid);
                    0
                }
                libc::SIGTRAP if raw >> 16 != 0 => 0,
                // A new thread begins with one, which is not for it.
                libc::SIGSTOP if self.threads.insert(tid) => 0,
                signal => signal,
            };
            resume(tid, signal);
        }
        status.expect("the process was waited for")
    }

    fn syscall_stop(&mut self, tid: pid_t) {
        // SAFETY: a zeroed structure of plain numbers; the call gets its size and fills it. Which
        // part of the union is valid, `op` says.
        let mut info: libc::ptrace_syscall_info = unsafe { zeroed() };
        let size = size_of::<libc::ptrace_syscall_info>();
        // SAFETY: as above.
        let got = unsafe { libc::ptrace(libc::PTRACE_GET_SYSCALL_INFO, tid, size, &mut info) };
        if got <= 0 {
            return; // killed in between
        }
        match info.op {
            libc::PTRACE_SYSCALL_INFO_ENTRY => {
                // SAFETY: an entry.
                let entry = unsafe { info.u.entry };
                let args: [u64; 6] = std::array::from_fn(|i| entry.args[i]);
                self.enter(tid, entry.nr as i64, args);
            }
            libc::PTRACE_SYSCALL_INFO_EXIT => {
                // SAFETY: an exit.
                let exit = unsafe { info.u.exit };
                self.leave(tid, exit.sval);
            }
            _ => {}
        }
    }

    fn enter(&mut self, tid: pid_t, nr: i64, args: [u64; 6]) {
        let file = self.place.and_then(|place| {
            let path = path_of(tid, nr as c_long, &args)?;
            let below = path.strip_prefix(place).ok()?;
            Some(below.display().to_string())
        });
        let kind = match (file, nr as c_long) {
            (Some(path), _) => Kind::File(nr, path),
            (_, libc::SYS_ioctl) if args[1] >> 8 & 0xff == 0xae => Kind::Kvm(args[1] as u32),
            (_, libc::SYS_openat) => Kind::Open(read_string(tid, args[1])),
            (_, libc::SYS_open) => Kind::Open(read_string(tid, args[0])),
            (_, libc::SYS_mmap) => Kind::Map(args[1], args[3] as i32),
            _ if tid == self.pid => Kind::Syscall(nr),
            _ => Kind::Elsewhere(nr),
        };
        let count = self.counts.entry(kind.clone()).or_default();
        let nth = *count;
        *count += 1;
        let inject = self.inject.iter().find(|i| i.kind == kind && i.nth == nth);
        let errno = inject.map(|inject| inject.errno);
        if errno.is_some() {
            with_registers(tid, |regs| regs.orig_rax = u64::MAX);
        }
        self.inside.insert(tid, (self.calls.len(), errno));
        let thread = std::fs::read_to_string(format!("/proc/{tid}/comm")).unwrap_or_default();
        let thread = thread.trim_end().to_owned();
        self.calls.push(Call {
            kind,
            nth,
            tid,
            thread,
            args,
            result: None,
        });
    }

    fn leave(&mut self, tid: pid_t, result: i64) {
        let Some((index, errno)) = self.inside.remove(&tid) else {
            return;
        };
        let result = errno.map_or(result, |errno| -i64::from(errno));
        if errno.is_some() {
            with_registers(tid, |regs| regs.rax = result as u64);
            self.injected = true;
        }
        self.calls[index].result = Some(result);
    }
}

fn resume(tid: pid_t, signal: i32) {
    // SAFETY: the tracee is stopped, or gone, which is no matter: its end is waited for.
    unsafe { libc::ptrace(libc::PTRACE_SYSCALL, tid, 0, c_long::from(signal)) };
}

fn with_registers(tid: pid_t, change: impl FnOnce(&mut libc::user_regs_struct)) {
    // SAFETY: the tracee is stopped; the structure is plain numbers, filled by the first call and
    // written back whole by the second, if the first succeeded.
    unsafe {
        let mut regs: libc::user_regs_struct = zeroed();
        if libc::ptrace(libc::PTRACE_GETREGS, tid, 0, &mut regs) == 0 {
            change(&mut regs);
            libc::ptrace(libc::PTRACE_SETREGS, tid, 0, &regs);
        }
    }
}

/// The file that a call is about; of two, the first.
fn path_of(tid: pid_t, nr: c_long, args: &[u64; 6]) -> Option<PathBuf> {
    let open = |fd: u64| std::fs::read_link(format!("/proc/{tid}/fd/{}", fd as i32)).ok();
    let named = |dir: Option<u64>, at: u64| {
        let name = read_string(tid, at);
        let dir = dir.filter(|dir| *dir as i32 != libc::AT_FDCWD);
        match dir.and_then(open) {
            // The descriptor itself (AT_EMPTY_PATH).
            Some(dir) if name.is_empty() => Some(dir),
            Some(dir) => Some(dir.join(name)),
            None => Some(name.into()),
        }
    };
    match nr {
        libc::SYS_open | libc::SYS_mkdir | libc::SYS_rmdir | libc::SYS_unlink => {
            named(None, args[0])
        }
        libc::SYS_openat
        | libc::SYS_mkdirat
        | libc::SYS_unlinkat
        | libc::SYS_renameat2
        | libc::SYS_newfstatat
        | libc::SYS_statx => named(Some(args[0]), args[1]),
        libc::SYS_read
        | libc::SYS_pread64
        | libc::SYS_write
        | libc::SYS_pwrite64
        | libc::SYS_fsync
        | libc::SYS_fdatasync
        | libc::SYS_ftruncate
        | libc::SYS_fallocate
        | libc::SYS_flock
        | libc::SYS_lseek
        | libc::SYS_fstat
        | libc::SYS_getdents64
        | libc::SYS_ioctl => open(args[0]),
        libc::SYS_mmap if args[3] as i32 & libc::MAP_ANONYMOUS == 0 => open(args[4]),
        _ => None,
    }
}

/// A NUL-terminated string of the tracee, of at most 4 KiB.
fn read_string(tid: pid_t, mut address: u64) -> String {
    let mut bytes = Vec::new();
    while bytes.len() < 4096 {
        // To the end of the page: the next one may not be mapped.
        let mut chunk = [0u8; 256];
        let len = (4096 - (address % 4096) as usize).min(chunk.len());
        let local = libc::iovec {
            iov_base: chunk.as_mut_ptr().cast(),
            iov_len: len,
        };
        let remote = libc::iovec {
            iov_base: address as *mut libc::c_void,
            iov_len: len,
        };
        // SAFETY: the local buffer has the length given; the remote one is the kernel's to check.
        let read = unsafe { libc::process_vm_readv(tid, &local, 1, &remote, 1, 0) };
        let Ok(read) = usize::try_from(read) else {
            break;
        };
        match chunk[..read].iter().position(|byte| *byte == 0) {
            Some(end) => {
                bytes.extend_from_slice(&chunk[..end]);
                break;
            }
            None if read == 0 => break,
            None => bytes.extend_from_slice(&chunk[..read]),
        }
        address += read as u64;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Kills a process that is late. It holds the process by a pidfd, so that no other can be hit.
struct Watchdog {
    done: Arc<(Mutex<bool>, Condvar)>,
    thread: std::thread::JoinHandle<Option<String>>,
}

impl Watchdog {
    fn start(pid: pid_t, limit: Duration) -> Self {
        let pidfd = super::pidfd(pid);
        let done = Arc::new((Mutex::new(false), Condvar::new()));
        let shared = done.clone();
        let thread = std::thread::spawn(move || {
            let deadline = Instant::now() + limit;
            let mut over = shared.0.lock().unwrap();
            while !*over {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    let threads = super::describe_threads(pid);
                    // SAFETY: plain numbers and no siginfo.
                    unsafe {
                        let fd = pidfd.as_raw_fd();
                        libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, 0, 0);
                    }
                    return Some(threads);
                }
                over = shared.1.wait_timeout(over, left).unwrap().0;
            }
            None
        });
        Watchdog { done, thread }
    }

    /// What it saw, if it had to kill.
    fn stop(self) -> Option<String> {
        *self.done.0.lock().unwrap() = true;
        self.done.1.notify_all();
        self.thread.join().unwrap()
    }
}

/// System calls that the tests speak of.
const SYSCALLS: &[(i64, &str)] = &[
    (libc::SYS_mmap, "mmap"),
    (libc::SYS_munmap, "munmap"),
    (libc::SYS_mprotect, "mprotect"),
    (libc::SYS_madvise, "madvise"),
    (libc::SYS_brk, "brk"),
    (libc::SYS_read, "read"),
    (libc::SYS_pread64, "pread64"),
    (libc::SYS_write, "write"),
    (libc::SYS_close, "close"),
    (libc::SYS_ioctl, "ioctl"),
    (libc::SYS_fcntl, "fcntl"),
    (libc::SYS_fstat, "fstat"),
    (libc::SYS_statx, "statx"),
    (libc::SYS_lseek, "lseek"),
    (libc::SYS_eventfd2, "eventfd2"),
    (libc::SYS_signalfd4, "signalfd4"),
    (libc::SYS_timerfd_create, "timerfd_create"),
    (libc::SYS_timerfd_settime, "timerfd_settime"),
    (libc::SYS_epoll_create1, "epoll_create1"),
    (libc::SYS_epoll_ctl, "epoll_ctl"),
    (libc::SYS_epoll_wait, "epoll_wait"),
    (libc::SYS_epoll_pwait, "epoll_pwait"),
    (libc::SYS_memfd_create, "memfd_create"),
    (libc::SYS_clone, "clone"),
    (libc::SYS_clone3, "clone3"),
    (libc::SYS_prctl, "prctl"),
    (libc::SYS_rt_sigaction, "rt_sigaction"),
    (libc::SYS_rt_sigprocmask, "rt_sigprocmask"),
    (libc::SYS_tgkill, "tgkill"),
    (libc::SYS_futex, "futex"),
    (libc::SYS_dup, "dup"),
    (libc::SYS_socket, "socket"),
    (libc::SYS_fchmod, "fchmod"),
    (libc::SYS_bind, "bind"),
    (libc::SYS_listen, "listen"),
    (libc::SYS_accept4, "accept4"),
    (libc::SYS_recvfrom, "recvfrom"),
    (libc::SYS_sendto, "sendto"),
    (libc::SYS_poll, "poll"),
    (libc::SYS_exit_group, "exit_group"),
    (libc::SYS_openat, "openat"),
    (libc::SYS_mkdir, "mkdir"),
    (libc::SYS_rmdir, "rmdir"),
    (libc::SYS_unlink, "unlink"),
    (libc::SYS_unlinkat, "unlinkat"),
    (libc::SYS_renameat2, "renameat2"),
    (libc::SYS_pwrite64, "pwrite64"),
    (libc::SYS_fsync, "fsync"),
    (libc::SYS_fdatasync, "fdatasync"),
    (libc::SYS_ftruncate, "ftruncate"),
    (libc::SYS_fallocate, "fallocate"),
    (libc::SYS_flock, "flock"),
    (libc::SYS_newfstatat, "newfstatat"),
    (libc::SYS_getdents64, "getdents64"),
];

/// KVM's ioctls on x86 (`linux/kvm.h`).
#[rustfmt::skip]
const KVM_IOCTLS: &[(u32, &str)] = &[
    (0xae00, "KVM_GET_API_VERSION"),
    (0xae01, "KVM_CREATE_VM"),
    (0xc004ae02, "KVM_GET_MSR_INDEX_LIST"),
    (0xae03, "KVM_CHECK_EXTENSION"),
    (0xae04, "KVM_GET_VCPU_MMAP_SIZE"),
    (0xc008ae05, "KVM_GET_SUPPORTED_CPUID"),
    (0xc008ae09, "KVM_GET_EMULATED_CPUID"),
    (0xc004ae0a, "KVM_GET_MSR_FEATURE_INDEX_LIST"),
    (0xae41, "KVM_CREATE_VCPU"),
    (0x4010ae42, "KVM_GET_DIRTY_LOG"),
    (0xae44, "KVM_SET_NR_MMU_PAGES"),
    (0xae45, "KVM_GET_NR_MMU_PAGES"),
    (0x4020ae46, "KVM_SET_USER_MEMORY_REGION"),
    (0xae47, "KVM_SET_TSS_ADDR"),
    (0x4008ae48, "KVM_SET_IDENTITY_MAP_ADDR"),
    (0xae60, "KVM_CREATE_IRQCHIP"),
    (0x4008ae61, "KVM_IRQ_LINE"),
    (0xc208ae62, "KVM_GET_IRQCHIP"),
    (0x8208ae63, "KVM_SET_IRQCHIP"),
    (0xc008ae67, "KVM_IRQ_LINE_STATUS"),
    (0x4010ae67, "KVM_REGISTER_COALESCED_MMIO"),
    (0x4010ae68, "KVM_UNREGISTER_COALESCED_MMIO"),
    (0x4008ae6a, "KVM_SET_GSI_ROUTING"),
    (0xae71, "KVM_REINJECT_CONTROL"),
    (0x4020ae76, "KVM_IRQFD"),
    (0x4040ae77, "KVM_CREATE_PIT2"),
    (0xae78, "KVM_SET_BOOT_CPU_ID"),
    (0x4040ae79, "KVM_IOEVENTFD"),
    (0x4030ae7b, "KVM_SET_CLOCK"),
    (0x8030ae7c, "KVM_GET_CLOCK"),
    (0x8070ae9f, "KVM_GET_PIT2"),
    (0x4070aea0, "KVM_SET_PIT2"),
    (0xaea2, "KVM_SET_TSC_KHZ"),
    (0xaea3, "KVM_GET_TSC_KHZ"),
    (0x4020aea5, "KVM_SIGNAL_MSI"),
    (0x4020aeb2, "KVM_SET_PMU_EVENT_FILTER"),
    (0xc00caee0, "KVM_CREATE_DEVICE"),
    (0x4018aee1, "KVM_SET_DEVICE_ATTR"),
    (0x4018aee2, "KVM_GET_DEVICE_ATTR"),
    (0x4018aee3, "KVM_HAS_DEVICE_ATTR"),
    (0xae80, "KVM_RUN"),
    (0x8090ae81, "KVM_GET_REGS"),
    (0x4090ae82, "KVM_SET_REGS"),
    (0x8138ae83, "KVM_GET_SREGS"),
    (0x4138ae84, "KVM_SET_SREGS"),
    (0xc018ae85, "KVM_TRANSLATE"),
    (0x4004ae86, "KVM_INTERRUPT"),
    (0xc008ae88, "KVM_GET_MSRS"),
    (0x4008ae89, "KVM_SET_MSRS"),
    (0x4008ae8a, "KVM_SET_CPUID"),
    (0x4004ae8b, "KVM_SET_SIGNAL_MASK"),
    (0x81a0ae8c, "KVM_GET_FPU"),
    (0x41a0ae8d, "KVM_SET_FPU"),
    (0x8400ae8e, "KVM_GET_LAPIC"),
    (0x4400ae8f, "KVM_SET_LAPIC"),
    (0x4008ae90, "KVM_SET_CPUID2"),
    (0xc008ae91, "KVM_GET_CPUID2"),
    (0xc028ae92, "KVM_TPR_ACCESS_REPORTING"),
    (0x4008ae93, "KVM_SET_VAPIC_ADDR"),
    (0x8004ae98, "KVM_GET_MP_STATE"),
    (0x4004ae99, "KVM_SET_MP_STATE"),
    (0xae9a, "KVM_NMI"),
    (0x4048ae9b, "KVM_SET_GUEST_DEBUG"),
    (0x4008ae9c, "KVM_X86_SETUP_MCE"),
    (0x8008ae9d, "KVM_X86_GET_MCE_CAP_SUPPORTED"),
    (0x4040ae9e, "KVM_X86_SET_MCE"),
    (0x8040ae9f, "KVM_GET_VCPU_EVENTS"),
    (0x4040aea0, "KVM_SET_VCPU_EVENTS"),
    (0x4068aea3, "KVM_ENABLE_CAP"),
    (0x9000aea4, "KVM_GET_XSAVE"),
    (0x5000aea5, "KVM_SET_XSAVE"),
    (0x8188aea6, "KVM_GET_XCRS"),
    (0x4188aea7, "KVM_SET_XCRS"),
    (0xaead, "KVM_KVMCLOCK_CTRL"),
    (0xaeb7, "KVM_SMI"),
    (0x4018aebd, "KVM_HYPERV_EVENTFD"),
    (0xc018aec0, "KVM_CLEAR_DIRTY_LOG"),
    (0xc008aec1, "KVM_GET_SUPPORTED_HV_CPUID"),
    (0x4188aec6, "KVM_X86_SET_MSR_FILTER"),
    (0xaec7, "KVM_RESET_DIRTY_RINGS"),
    (0x8140aecc, "KVM_GET_SREGS2"),
    (0x4140aecd, "KVM_SET_SREGS2"),
    (0xaece, "KVM_GET_STATS_FD"),
    (0x9000aecf, "KVM_GET_XSAVE2"),
    (0x40a0ae49, "KVM_SET_USER_MEMORY_REGION2"),
];
