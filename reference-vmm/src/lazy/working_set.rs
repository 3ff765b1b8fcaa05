// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a restored guest touches first: recorded beside the snapshot at one restore, read ahead at the next.

use std::fs::File;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_pf::PageSource;
use async_pf::working_set::{
    FileError, PlanLimits, Recorder, Refresh, RefreshPolicy, ReplayPlan, Usage, WorkingSet,
};
use memslots::Gfn;

use super::kept::{self, Kept};
use super::stats::WorkingSetHelp;
use crate::end::Chain as Words;
use crate::snapshot::chain::Chain;
use crate::snapshot::files::{Locked, STATE, lock};
use crate::snapshot::format::SnapshotId;
use crate::snapshot::link::{self, Link};
use crate::units;

/// The file's name in the snapshot's directory.
pub const WORKING_SET: &str = "working_set";

/// And of the file of its first pages.
pub const WORKING_SET_PAGES: &str = "working_set_pages";

/// The most pages that are recorded.
const MOST: usize = 1 << 20;
/// A guest that works touches the sample that is held out of what is read ahead, or other pages; one that touches less than one in so many
/// pages of the sample's size rests.
const RESTS: u64 = 8;
/// How long a record is compared with what is touched, at most.
const COMPARED: Duration = Duration::from_secs(1);

/// The records of a snapshot.
pub(super) struct WorkingSets {
    dir: PathBuf,
    id: SnapshotId,
    /// What is read is compared with the snapshot's checksums.
    checked: bool,
}

/// One that is made.
pub(super) struct Recording {
    recorder: Arc<Recorder>,
    /// For so long, of the time in which the guest runs.
    time: Duration,
}

/// How a recording came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// By its time.
    Whole,
    /// Before that: behind so much of it.
    Early(Duration),
    /// For memory did not come.
    Lost,
}

/// One that is there, and has not been looked at.
pub(super) struct Unread {
    recorder: Arc<Recorder>,
    /// Its first pages, once they are known.
    kept: Arc<OnceLock<Kept>>,
    /// What the guest has.
    pages: u64,
}

/// One that is read ahead by.
pub(super) struct Replay {
    record: WorkingSet,
    plan: ReplayPlan,
    recorder: Arc<Recorder>,
    /// How right it was, once that is known.
    judged: Option<Judged>,
}

/// What a restore showed of the record that it read ahead by.
struct Judged {
    usage: Usage,
    refresh: Refresh,
    /// What was touched, and was not there.
    touched: WorkingSet,
}

impl WorkingSets {
    pub(super) fn new(chain: &Chain) -> Self {
        let newest = chain.newest();
        WorkingSets {
            dir: newest.map(|link| link.dir().to_owned()).unwrap_or_default(),
            id: newest.map_or(SnapshotId([0; 16]), Link::id),
            checked: chain.is_checked(),
        }
    }

    /// What is done at this restore: `record`, or read ahead what was recorded. Of a guest whose last page is before
    /// `pages`. Reads nothing: the machine waits for this.
    pub(super) fn prepare(
        &self,
        record: Option<Duration>,
        pages: u64,
    ) -> (Option<Recording>, Option<Unread>) {
        let recorder = || match Recorder::new(Gfn(0), pages, MOST, self.id.0) {
            Ok(recorder) => Some(Arc::new(recorder)),
            Err(error) => {
                log::warn!("no working set: {error}");
                None
            }
        };
        if let Some(time) = record {
            self.look_for_room();
            let recorder = recorder();
            return (recorder.map(|recorder| Recording { recorder, time }), None);
        }
        match std::fs::symlink_metadata(self.dir.join(WORKING_SET)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return (None, None),
            _ => {}
        }
        let unread = recorder().map(|recorder| Unread {
            recorder,
            kept: Arc::default(),
            pages,
        });
        (None, unread)
    }

    /// Reads one, and has the disk begin with its first pages. Blocks for the disk. One that cannot be used is told of, and not
    /// used.
    pub(super) fn read(&self, unread: Unread) -> Option<Replay> {
        let Unread {
            recorder,
            kept,
            pages,
        } = unread;
        let path = self.dir.join(WORKING_SET);
        let record = match WorkingSet::load_of(&path, self.id.0) {
            Ok(record) => record,
            // It has just been removed.
            Err(FileError::Call { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                return None;
            }
            Err(error) => {
                log::warn!("no working set is read ahead: {}", Words(&error));
                return None;
            }
        };
        let end = record
            .runs()
            .iter()
            .map(|run| run.first.0 + run.pages)
            .max();
        let end = end.unwrap_or_default();
        if record.touched() > MOST as u64 || end > pages {
            log::warn!(
                "no working set is read ahead: {} has {} pages, up to {end:#x}, and no more than {MOST} of the guest's \
                 {pages:#x} are recorded",
                path.display(),
                record.touched()
            );
            return None;
        }
        let plan = ReplayPlan::new(&record, PlanLimits::default());
        let path = self.dir.join(WORKING_SET_PAGES);
        match Kept::load(&path, self.id) {
            // Nobody else sets it.
            Ok(Some(pages)) => drop(kept.set(pages)),
            Ok(None) => {}
            Err(error) => {
                let path = path.display();
                log::warn!("{path} is of no use, and the snapshot is read in its place: {error}");
            }
        }
        Some(Replay {
            record,
            plan,
            recorder,
            judged: None,
        })
    }

    /// Saves what was recorded, unless the directory is another snapshot's by now; whether it did. Blocks for the disk. That it cannot
    /// be saved is told of: the guest has lost nothing. What was recorded for less than its time takes no record's place that is there,
    /// for that has more.
    pub(super) fn save(&self, recording: &Recording, ended: Ended) -> bool {
        let record = recording.recorder.so_far();
        let path = self.dir.join(WORKING_SET);
        match ended {
            Ended::Whole => {}
            Ended::Lost => {
                log::warn!(
                    "no working set is saved: memory of the guest's has not come, and what it touched says nothing"
                );
                return false;
            }
            Ended::Early(after) if std::fs::symlink_metadata(&path).is_ok() => {
                let (touched, path) = (record.touched(), path.display());
                log::warn!(
                    "the recording of what the guest touches first (--record) ended after {} of {}, with {touched} pages: the older \
                     working set stays ({path}; removed, it would have been replaced)",
                    units::time(after),
                    units::time(recording.time)
                );
                return false;
            }
            Ended::Early(_) => {}
        }
        self.put(&path, &record)
    }

    /// Tells of a directory in which nothing can be written, before anything is recorded for it.
    fn look_for_room(&self) {
        let path = std::ffi::CString::new(self.dir.as_os_str().as_bytes()).unwrap_or_default();
        // SAFETY: a path that ends with a NUL and lives through the call.
        let allowed = unsafe {
            libc::faccessat(
                libc::AT_FDCWD,
                path.as_ptr(),
                libc::W_OK | libc::X_OK,
                libc::AT_EACCESS,
            )
        };
        if allowed != 0 {
            log::warn!(
                "what is recorded (--record) is to be saved in {}, which cannot be written: {}",
                self.dir.display(),
                std::io::Error::last_os_error()
            );
        }
    }

    /// Saves a record that has aged with what was touched beside it, or says that it is to be made anew. Blocks for the disk.
    pub(super) fn refresh(&self, replay: &Replay) {
        let Some(judged) = &replay.judged else {
            return;
        };
        let path = self.dir.join(WORKING_SET);
        match judged.refresh {
            Refresh::Extend => {
                let record = replay.record.with_missed(&judged.touched);
                if record.touched() <= MOST as u64 {
                    let _ = self.put(&path, &record);
                }
            }
            Refresh::Record => {
                let share = judged.usage.used_share().unwrap_or_default() * 100.0;
                log::warn!(
                    "the guest uses {share:.0} % of the working set that is read ahead ({}): record it anew, by a restore with \
                     --record, or remove it",
                    path.display()
                );
            }
            _ => {}
        }
    }

    /// Whether it is saved.
    fn put(&self, path: &Path, record: &WorkingSet) -> bool {
        let Some(_lock) = self.lock_or_say("working set is saved") else {
            return false;
        };
        let saved = record.save(path);
        match &saved {
            Ok(()) => log::info!(
                "the working set has {} pages: {}",
                record.touched(),
                path.display()
            ),
            Err(error) => log::warn!("no working set is saved: {}", Words(error)),
        }
        saved.is_ok()
    }

    /// Keeps the first pages of what was recorded, out of `source`, as long as `go_on` says so: whether it did, or there is no
    /// use in trying again. What is there of another record of this snapshot is as right as before: pages, and no order.
    pub(super) fn keep(
        &self,
        recording: &Recording,
        source: &dyn PageSource,
        go_on: &dyn Fn() -> bool,
    ) -> bool {
        if !self.checked {
            log::info!(
                "pages of the working set are not kept: nobody has checked them (--verify=off)"
            );
            return true;
        }
        let Some(_lock) = self.lock_or_say("page of the working set is kept") else {
            return true;
        };
        let path = self.dir.join(WORKING_SET_PAGES);
        let record = recording.recorder.so_far();
        match kept::save(&path, self.id, &record, source, go_on) {
            Ok(pages) => log::info!("{pages} of its pages are kept in {}", path.display()),
            Err(_) if !go_on() => return false,
            Err(error) => log::warn!("its pages are not kept in {}: {error}", path.display()),
        }
        true
    }

    fn lock_or_say(&self, what: &str) -> Option<Locked> {
        match self.lock() {
            Ok(Some(file)) => return Some(file),
            Ok(None) => log::info!("no {what}: another guest's is at this moment"),
            Err(why) => log::warn!("no {what}: {why}"),
        }
        None
    }

    /// Several guests may record at once: one saves, if the directory is the snapshot's still. The lock goes with the file;
    /// none where another has it.
    fn lock(&self) -> Result<Option<Locked>, String> {
        let state = self.dir.join(STATE);
        let locked = File::open(&state).and_then(|file| lock(file, libc::LOCK_EX));
        let file = match locked {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(format!("{}: {error}", state.display())),
        };
        match link::id_of(&self.dir) {
            Ok(id) if id == self.id => Ok(Some(file)),
            Ok(id) => {
                let dir = self.dir.display();
                Err(format!("{dir} is not that snapshot any more, but {id}"))
            }
            // Whose it is is not known: it may be this host that has no descriptor left.
            Err(error) => Err(Words(&error).to_string()),
        }
    }
}

impl Recording {
    pub(super) fn recorder(&self) -> &Arc<Recorder> {
        &self.recorder
    }

    pub(super) fn time(&self) -> Duration {
        self.time
    }
}

impl Unread {
    pub(super) fn recorder(&self) -> &Arc<Recorder> {
        &self.recorder
    }

    /// Where its first pages will be.
    pub(super) fn kept(&self) -> Arc<OnceLock<Kept>> {
        Arc::clone(&self.kept)
    }
}

impl Replay {
    /// What is read ahead, in order.
    pub(super) fn reads(&self) -> impl Iterator<Item = Range<Gfn>> {
        let reads = self.plan.reads().iter();
        reads.map(|read| read.first..Gfn(read.first.0 + read.pages))
    }

    /// How long it is compared with what is touched: as long as it was recorded, and no longer than a second, for what nobody
    /// has touched is brought behind that.
    pub(super) fn lasts(&self) -> Duration {
        let last = self.record.runs().last();
        last.map_or(Duration::ZERO, |run| run.after).min(COMPARED)
    }

    /// Compares it with what was touched until now, which is so long after the restore began.
    pub(super) fn judge(&mut self, elapsed: Duration) {
        let touched = self.recorder.so_far();
        let usage = Usage::compare(&self.record.until(elapsed), &self.plan, &touched);
        // It waits for whoever asks it something: what it will touch then is not known.
        if touched.touched() * RESTS < usage.held_out {
            log::info!("the guest has hardly begun, and nothing is known of its working set's use");
            return;
        }
        let refresh = RefreshPolicy::default().judge(&usage);
        log::info!("the working set was used: {usage:?}, so {refresh:?}");
        self.judged = Some(Judged {
            usage,
            refresh,
            touched,
        });
    }

    /// What is known of whether it helps.
    pub(super) fn help(&self) -> WorkingSetHelp {
        let read_ahead = self.plan.reads().iter().map(|read| read.pages).sum();
        // Where the sample is empty nothing is known.
        let judged = self.judged.as_ref();
        let found = judged.and_then(|judged| {
            let (usage, share) = (&judged.usage, judged.usage.used_share()?);
            let had = (share * usage.recorded as f64).round() as u64;
            Some((had + usage.missed, had))
        });
        let (touched, had) = found.unzip();
        WorkingSetHelp {
            read_ahead,
            touched,
            had,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::format;

    #[test]
    fn what_a_record_is_not_saved_for_is_said_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let sets = WorkingSets {
            dir: folder.path().to_owned(),
            id: SnapshotId([7; 16]),
            checked: true,
        };
        let state = folder.path().join(STATE);
        let said = sets.lock().unwrap_err();
        assert!(said.starts_with(state.to_str().unwrap()), "{said}");
        assert!(said.contains("os error 2"), "{said}");
        // One that cannot be read is not said to be another's.
        std::fs::write(&state, b"no state").unwrap();
        let said = sets.lock().unwrap_err();
        assert!(said.starts_with(state.to_str().unwrap()), "{said}");
        assert!(!said.contains("not that snapshot"), "{said}");
        let held = File::open(&state).unwrap();
        held.lock().unwrap();
        assert!(matches!(sets.lock(), Ok(None)));
    }

    #[test]
    fn what_was_recorded_for_less_than_its_time_takes_no_older_records_place() {
        let folder = tempfile::tempdir().unwrap();
        let sets = WorkingSets {
            dir: folder.path().to_owned(),
            id: SnapshotId([7; 16]),
            checked: true,
        };
        let recording = |pages: u64| {
            let recorder = Arc::new(Recorder::new(Gfn(0), 64, MOST, [7; 16]).unwrap());
            assert!((0..pages).all(|gfn| recorder.touch(Gfn(gfn))));
            let time = Duration::from_secs(10);
            Recording { recorder, time }
        };
        let state = format::encode(sets.id, &[(format::Kind::Vm, b"{}".to_vec())]);
        std::fs::write(folder.path().join(STATE), state).unwrap();
        let path = folder.path().join(WORKING_SET);
        let touched = || WorkingSet::load_of(&path, [7; 16]).map(|set| set.touched());
        assert!(!sets.save(&recording(3), Ended::Lost) && !path.exists());
        let early = Ended::Early(Duration::from_secs(1));
        assert!(sets.save(&recording(4), early));
        assert!(!sets.save(&recording(5), early));
        assert!(!sets.save(&recording(6), Ended::Lost));
        assert_eq!(touched().unwrap(), 4);
        assert!(sets.save(&recording(7), Ended::Whole));
        assert_eq!(touched().unwrap(), 7);
    }

    #[test]
    fn what_a_record_was_good_for_is_what_the_sample_says_and_what_it_missed() {
        let pages = 4096;
        let recorder = || Arc::new(Recorder::new(Gfn(0), pages, MOST, [7; 16]).unwrap());
        let recorded = recorder();
        assert!((0..1024).all(|gfn| recorded.touch(Gfn(gfn))));
        let record = recorded.so_far();
        let plan = ReplayPlan::new(&record, PlanLimits::default());
        let held_out = |gfn: &u64| plan.hold_out().has(Gfn(*gfn));
        let sample: Vec<_> = (0..1024).filter(held_out).collect();
        assert!(sample.len() > 8, "{}", sample.len());
        let mut replay = Replay {
            plan: plan.clone(),
            record,
            recorder: recorder(),
            judged: None,
        };
        let read_ahead = 1024 - sample.len() as u64;
        let help = replay.help();
        assert_eq!((help.touched, help.had), (None, None));
        assert!((read_ahead..=1024).contains(&help.read_ahead), "{help:?}");
        // It waits for somebody: of what it will touch nothing is known.
        assert!(replay.recorder.touch(Gfn(sample[0])));
        replay.judge(Duration::from_secs(1));
        assert_eq!((replay.help().touched, replay.help().had), (None, None));
        // Half of the sample, and a hundred that are none of it.
        let used = sample.len() / 2;
        let mut touched = sample[1..used].iter().copied().chain(2000..2100);
        assert!(touched.all(|gfn| replay.recorder.touch(Gfn(gfn))));
        replay.judge(Duration::from_secs(1));
        let had = (1024.0 * used as f64 / sample.len() as f64).round() as u64;
        let help = replay.help();
        assert_eq!((help.touched, help.had), (Some(had + 100), Some(had)));
    }
}
