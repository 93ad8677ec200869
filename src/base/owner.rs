//! Who may change a value's tables: one owner at a time.
//!
//! ```text
//! DIR/stages/NAME/            locked (flock) for each edit and for each adoption: they never interleave
//! DIR/stages/NAME/owner       the epochs, in memory that all processes share
//! DIR/stages/NAME/claim-N     locked by the adopter of epoch N as long as it lives and is not ready
//! ```
//!
//! A process that adopts takes the next epoch. From then on, edits by the earlier one are refused. When the adopter says that
//! it is ready, it is the owner for good, and the earlier one is superseded. When it ends before that (the kernel frees its
//! lock), the earlier one takes its tables back at its next edit.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use super::directory::{LOCK_PATIENCE, failure, lock_file, names_in, open, put};
use crate::{
    Error, Result,
    sys::{
        self,
        map::{self, Map},
        mmap::LongMapping,
    },
};

/// The name of its pin.
pub(crate) const OWNER: &str = "owner";
const CLAIM: &str = "claim-";

/// Words of the record: the epoch that may edit, the last one that was ready, the last one that was given, and when a
/// process waited for the lock (`CLOCK_MONOTONIC`, ns).
const CURRENT: usize = 0;
const READY: usize = 1;
const LATEST: usize = 2;
const WAITING: usize = 3;
const WORDS: usize = 4;
const RECORD_BYTES: usize = WORDS * size_of::<u64>();

/// For how long an adopter that waits counts as one, and how long editors make room for it.
const WAIT_LIFE: Duration = Duration::from_millis(200);
const MAKE_ROOM: Duration = Duration::from_millis(5);

/// One value's side of the ownership of its tables.
#[derive(Debug)]
pub(crate) struct Owner {
    stage: String,
    map: Map,
    record: LongMapping,
    /// 0: not claimed yet.
    epoch: AtomicU64,
    homes: Mutex<Homes>,
    /// The tables were another's in between: what is known of them has to be read again.
    stale: AtomicBool,
    taken_back: AtomicBool,
}

#[derive(Debug, Default)]
struct Homes {
    pinned: Vec<Home>,
    /// Held from adoption until the value is ready.
    claim: Option<File>,
}

/// A directory in which the tables are pinned.
#[derive(Debug)]
struct Home {
    path: PathBuf,
    directory: File,
}

/// The right to change the tables, until it is dropped.
#[derive(Debug)]
pub(crate) struct Entered<'o> {
    homes: MutexGuard<'o, Homes>,
    locked: usize,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        for home in &self.homes.pinned[..self.locked] {
            // Closing it would free it as well.
            let _ = home.directory.unlock();
        }
    }
}

impl Owner {
    /// Of new tables, pinned nowhere.
    pub(crate) fn fresh(stage: &str) -> Result<Self> {
        let map = Map::create_shared_record("xdpkit_owner", RECORD_BYTES)?;
        let record = LongMapping::new(&map)?;
        for at in [CURRENT, READY, LATEST] {
            record.as_ref()[at].store(1, Ordering::SeqCst);
        }
        Ok(Self::of(stage, map, record, 1))
    }

    /// Of tables that are pinned in a stage's directory, which are not its own before [`Owner::claim`].
    pub(crate) fn open(stage: &str, home: &Path) -> Result<Self> {
        let path = home.join(OWNER);
        let map = map::open_pinned(&path, OWNER)?.ok_or_else(|| Error::PinMissing { path: path.clone() })?;
        if !map.is_record_of(RECORD_BYTES) {
            return Err(Error::PinMismatch {
                path,
                what: "the record of the owner".into(),
                found: map.shape(),
                expected: format!("an array of one value of {RECORD_BYTES} bytes"),
            });
        }
        let record = LongMapping::new(&map)?;
        let owner = Self::of(stage, map, record, 0);
        owner.join(home)?;
        Ok(owner)
    }

    fn of(stage: &str, map: Map, record: LongMapping, epoch: u64) -> Self {
        Self {
            stage: stage.to_owned(),
            map,
            record,
            epoch: epoch.into(),
            homes: Mutex::default(),
            stale: AtomicBool::new(false),
            taken_back: AtomicBool::new(false),
        }
    }

    /// Takes the tables over: the earlier owner's edits are refused from now on. To be called once, on what [`Owner::open`]
    /// gave. What is returned keeps everybody else out until the tables have been read; `None`: these are not the stage's
    /// tables any more, others have been put in their place.
    ///
    /// # Errors
    /// [`Error::PinsLocked`] when another process holds on to them.
    pub(crate) fn claim(&self) -> Result<Option<Entered<'_>>> {
        let mut entered = self.lock(LOCK_PATIENCE)?;
        if !entered.homes.are_in_place()? {
            return Ok(None);
        }
        let epoch = self.word(LATEST).fetch_add(1, Ordering::SeqCst) + 1;
        if let Some(home) = entered.homes.pinned.first() {
            let path = home.path.join(format!("{CLAIM}{epoch}"));
            fs::create_dir(&path).map_err(failure(&path, "create the directory"))?;
            let claim = open(&path)?;
            // Another value may be looking at that moment whether it is locked.
            lock_file(&claim, &path, LOCK_PATIENCE, || ())?;
            entered.homes.claim = Some(claim);
        }
        self.epoch.store(epoch, Ordering::SeqCst);
        self.word(CURRENT).store(epoch, Ordering::SeqCst);
        Ok(Some(entered))
    }

    fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        &self.record.as_ref()[at]
    }

    fn homes(&self) -> MutexGuard<'_, Homes> {
        self.homes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps everybody else out, whoever the owner is.
    fn lock(&self, patience: Duration) -> Result<Entered<'_>> {
        let mut entered = Entered { homes: self.homes(), locked: 0 };
        let waiting = || {
            let now = u64::try_from(sys::monotonic().as_nanos()).unwrap_or(u64::MAX);
            self.word(WAITING).store(now, Ordering::Relaxed);
        };
        for at in 0..entered.homes.pinned.len() {
            let home = &entered.homes.pinned[at];
            lock_file(&home.directory, &home.path, patience, waiting)?;
            entered.locked = at + 1;
        }
        Ok(entered)
    }

    /// A process that edits without a pause would have the lock nearly always: it makes room for one that waits.
    fn make_room(&self) {
        let waited = Duration::from_nanos(self.word(WAITING).load(Ordering::Relaxed));
        if !waited.is_zero() && sys::monotonic().saturating_sub(waited) < WAIT_LIFE {
            thread::sleep(MAKE_ROOM);
        }
    }

    /// The right to change the tables.
    ///
    /// # Errors
    /// [`Error::Superseded`]; [`Error::PinsLocked`] when another process holds on to them.
    pub(crate) fn enter(&self) -> Result<Entered<'_>> {
        self.enter_within(LOCK_PATIENCE)
    }

    /// The same, with another patience.
    pub(crate) fn enter_within(&self, patience: Duration) -> Result<Entered<'_>> {
        // Without waiting for an adoption to end.
        if self.is_taken(&self.homes())? {
            return Err(self.superseded());
        }
        self.make_room();
        let entered = self.lock(patience)?;
        if self.is_taken(&entered.homes)? {
            return Err(self.superseded());
        }
        let epoch = self.epoch();
        if self.word(CURRENT).load(Ordering::SeqCst) != epoch {
            // Whoever took the tables over has ended before it was ready.
            entered.homes.remove_claims(|claim| claim > epoch)?;
            self.stale.store(true, Ordering::SeqCst);
            self.taken_back.store(true, Ordering::SeqCst);
            self.word(CURRENT).store(epoch, Ordering::SeqCst);
        }
        Ok(entered)
    }

    /// Whether another process has the tables: for good, or as long as it lives.
    fn is_taken(&self, homes: &Homes) -> Result<bool> {
        let epoch = self.epoch();
        if self.word(CURRENT).load(Ordering::SeqCst) == epoch {
            return Ok(false);
        }
        // Asked again at the end: it may have become ready meanwhile, and its claim have gone.
        Ok(self.is_superseded() || homes.successor_lives(epoch)? || self.is_superseded())
    }

    /// Whether another process has adopted the tables, and ended before it was ready.
    pub(crate) fn was_adopted(&self) -> bool {
        let adopted = self.word(CURRENT).load(Ordering::SeqCst) != self.epoch() && !self.is_superseded();
        adopted || self.taken_back.load(Ordering::SeqCst)
    }

    /// Whether edits are refused at this moment.
    pub(crate) fn refuses_edits(&self) -> Result<bool> {
        self.is_taken(&self.homes())
    }

    /// Whether what is known of the tables has to be read again. To be called by whoever has entered.
    pub(crate) fn is_stale(&self) -> bool {
        self.stale.load(Ordering::SeqCst)
    }

    pub(crate) fn set_fresh(&self) {
        self.stale.store(false, Ordering::SeqCst);
    }

    /// Says that the process goes on with the tables for good: the earlier owner gives way.
    ///
    /// # Errors
    /// [`Error::Superseded`]; [`Error::Pin`].
    pub(crate) fn ready(&self) -> Result<()> {
        self.make_ready(&mut self.enter()?)
    }

    fn make_ready(&self, entered: &mut Entered<'_>) -> Result<()> {
        let epoch = self.epoch();
        self.word(READY).fetch_max(epoch, Ordering::SeqCst);
        entered.homes.claim = None;
        // Seen by those who watch the directory.
        entered.homes.remove_claims(|claim| claim <= epoch)
    }

    /// As [`Owner::ready`], and has `exchange` put other tables into the directory's place, with nobody at them meanwhile. In
    /// this order: killed in between, what is pinned is whole and nobody else's.
    pub(crate) fn put_in_place(&self, home: &Path, exchange: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut entered = self.enter()?;
        self.make_ready(&mut entered)?;
        exchange()?;
        let directory = open(home)?;
        for known in entered.homes.pinned.iter_mut().filter(|known| known.path == home) {
            // The lock of the earlier one goes with its last descriptor.
            known.directory = directory.try_clone().map_err(failure(home, "open it"))?;
        }
        Ok(())
    }

    /// Whether another process has taken over for good.
    pub(crate) fn is_superseded(&self) -> bool {
        self.word(READY).load(Ordering::SeqCst) > self.epoch()
    }

    pub(crate) fn superseded(&self) -> Error {
        Error::Superseded { what: format!("stage `{}`", self.stage) }
    }

    /// The directories in which something changes when the owner does.
    pub(crate) fn watched(&self) -> Vec<PathBuf> {
        self.homes().pinned.iter().map(|home| home.path.clone()).collect()
    }

    /// Puts the record beside the tables that are being pinned.
    pub(crate) fn pin(&self, home: &Path) -> Result<()> {
        put(std::os::fd::AsFd::as_fd(&self.map), &home.join(OWNER))
    }

    /// From now on, edits lock this directory too: the tables are pinned there.
    pub(crate) fn join(&self, home: &Path) -> Result<()> {
        let mut homes = self.homes();
        // Of that name there may have been another one before.
        homes.pinned.retain(|known| known.path != home);
        homes.pinned.push(Home { path: home.to_owned(), directory: open(home)? });
        Ok(())
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let epoch = self.epoch();
        let mut homes = self.homes();
        if homes.claim.take().is_some() {
            // An error leaves what the next owner removes.
            let _ = homes.remove_claims(|claim| claim == epoch);
        }
    }
}

impl Homes {
    /// Whether what was opened is still what stands at its path.
    fn are_in_place(&self) -> Result<bool> {
        for home in &self.pinned {
            let fail = |cause| failure(&home.path, "look at it")(cause);
            let opened = home.directory.metadata().map_err(fail)?;
            match fs::metadata(&home.path) {
                Ok(found) if (found.dev(), found.ino()) == (opened.dev(), opened.ino()) => {}
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fail(error)),
                _ => return Ok(false),
            }
        }
        Ok(true)
    }

    fn claims(&self) -> Result<Vec<(u64, PathBuf)>> {
        let mut claims = Vec::new();
        for home in &self.pinned {
            for name in names_in(&home.path)? {
                if let Some(epoch) = name.strip_prefix(CLAIM).and_then(|epoch| epoch.parse().ok()) {
                    claims.push((epoch, home.path.join(name)));
                }
            }
        }
        Ok(claims)
    }

    /// Whether a process lives that has adopted after this epoch.
    fn successor_lives(&self, epoch: u64) -> Result<bool> {
        for (_, path) in self.claims()?.into_iter().filter(|(claim, _)| *claim > epoch) {
            match File::open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                claim => {
                    let claim = claim.map_err(failure(&path, "open it"))?;
                    if matches!(claim.try_lock(), Err(fs::TryLockError::WouldBlock)) {
                        return Ok(true);
                    }
                }
            }
        }
        Ok(false)
    }

    fn remove_claims(&self, which: impl Fn(u64) -> bool) -> Result<()> {
        for (epoch, path) in self.claims()? {
            if which(epoch) {
                fs::remove_dir(&path).or_else(gone).map_err(failure(&path, "remove it"))?;
            }
        }
        Ok(())
    }
}

fn gone(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}
