// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a restored guest touches first: recorded beside the snapshot at one restore, read ahead at the next.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_pf::PageSource;
use async_pf::working_set::{
    FileError, PlanLimits, Recorder, RefreshPolicy, ReplayPlan, Usage, WorkingSet,
};
use memslots::Gfn;

use super::kept::{self, Kept};
use crate::end::Chain as Words;
use crate::snapshot::chain::Chain;
use crate::snapshot::format::SnapshotId;
use crate::snapshot::link::{self, Link};

/// The file's name in the snapshot's directory.
pub const WORKING_SET: &str = "working_set";

/// And of the file of its first pages.
pub const WORKING_SET_PAGES: &str = "working_set_pages";

/// The most pages that are recorded.
const MOST: usize = 1 << 20;

/// The records of a snapshot.
pub(super) struct WorkingSets {
    dir: PathBuf,
    id: SnapshotId,
}

/// One that is made.
pub(super) struct Recording {
    recorder: Arc<Recorder>,
    until: Instant,
}

/// One that is read ahead by.
pub(super) struct Replay {
    record: WorkingSet,
    plan: ReplayPlan,
    recorder: Arc<Recorder>,
    /// Its first pages, until they are taken.
    kept: Option<Kept>,
}

impl WorkingSets {
    pub(super) fn new(chain: &Chain) -> Self {
        let newest = chain.newest();
        WorkingSets {
            dir: newest.map(|link| link.dir().to_owned()).unwrap_or_default(),
            id: newest.map_or(SnapshotId([0; 16]), Link::id),
        }
    }

    /// What is done at this restore: `record`, or read ahead what was recorded. Of a guest whose last page is before
    /// `pages`. A record that cannot be used is told of, and not used.
    pub(super) fn prepare(
        &self,
        record: Option<Duration>,
        pages: u64,
    ) -> (Option<Recording>, Option<Replay>) {
        let recorder = || match Recorder::new(Gfn(0), pages, MOST, self.id.0) {
            Ok(recorder) => Some(Arc::new(recorder)),
            Err(error) => {
                log::warn!("no working set: {error}");
                None
            }
        };
        if let Some(time) = record {
            let recorder = recorder();
            let until = Instant::now().checked_add(time);
            let until = until.unwrap_or_else(Instant::now);
            return (recorder.map(|recorder| Recording { recorder, until }), None);
        }
        let path = self.dir.join(WORKING_SET);
        let record = match WorkingSet::load_of(&path, self.id.0) {
            Ok(record) => record,
            Err(FileError::Call { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                return (None, None);
            }
            Err(error) => {
                log::warn!("no working set is read ahead: {}", Words(&error));
                return (None, None);
            }
        };
        let plan = ReplayPlan::new(&record, PlanLimits::default());
        let path = self.dir.join(WORKING_SET_PAGES);
        let kept = Kept::load(&path, self.id).unwrap_or_else(|error| {
            let path = path.display();
            log::warn!("{path} is of no use, and the snapshot is read in its place: {error}");
            None
        });
        let replay = recorder().map(|recorder| Replay {
            record,
            plan,
            recorder,
            kept,
        });
        (None, replay)
    }

    /// Saves what was recorded, and its first pages out of `source` if that is here, unless the directory is another snapshot's by now. Blocks
    /// for the disk. That it cannot be saved is told of: the guest has lost nothing.
    pub(super) fn save(
        &self,
        recording: &Recording,
        source: Option<&dyn PageSource>,
        go_on: &dyn Fn() -> bool,
    ) {
        let record = recording.recorder.so_far();
        let path = self.dir.join(WORKING_SET);
        match link::id_of(&self.dir) {
            Ok(id) if id == self.id => {}
            _ => {
                let dir = self.dir.display();
                return log::warn!("no working set is saved: {dir} is not that snapshot any more");
            }
        }
        match record.save(&path) {
            Ok(()) => log::info!(
                "the working set has {} pages: {}",
                record.touched(),
                path.display()
            ),
            Err(error) => return log::warn!("no working set is saved: {}", Words(&error)),
        }
        // Another host's disk is no matter of where they lie here.
        let Some(source) = source else {
            return;
        };
        // What is there of another record of this snapshot is as right as before: pages, and no order.
        let path = self.dir.join(WORKING_SET_PAGES);
        match kept::save(&path, self.id, &record, source, go_on) {
            Ok(pages) => log::info!("{pages} of its pages are kept in {}", path.display()),
            Err(error) => log::warn!("its pages are not kept in {}: {error}", path.display()),
        }
    }
}

impl Recording {
    pub(super) fn recorder(&self) -> &Arc<Recorder> {
        &self.recorder
    }

    pub(super) fn until(&self) -> Instant {
        self.until
    }
}

impl Replay {
    pub(super) fn recorder(&self) -> &Arc<Recorder> {
        &self.recorder
    }

    /// Its first pages, once.
    pub(super) fn take_kept(&mut self) -> Option<Kept> {
        self.kept.take()
    }

    /// What is read ahead, in order.
    pub(super) fn reads(&self) -> impl Iterator<Item = Range<Gfn>> {
        let reads = self.plan.reads().iter();
        reads.map(|read| read.first..Gfn(read.first.0 + read.pages))
    }

    /// Says how right it was.
    pub(super) fn tell(&self) {
        let usage = Usage::compare(&self.record, &self.plan, &self.recorder.so_far());
        let judged = RefreshPolicy::default().judge(&usage);
        log::info!("the working set was used: {usage:?}, so {judged:?}");
    }
}
