//! The control-plane state of a value: what its process knows of the tables, changed under the owner's exclusion.

use std::{
    fmt,
    ops::{Deref, DerefMut},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::{StageCore, directory::LOCK_PATIENCE, owner::Entered};
use crate::Result;

type Read<S> = Box<dyn Fn(&StageCore) -> Result<S> + Send + Sync>;

/// What is known of the tables. Edits and adoptions of all processes exclude each other.
pub(crate) struct State<S> {
    state: Mutex<S>,
    /// Reads it from the tables, as an adoption does.
    read: Read<S>,
}

impl<S: fmt::Debug> fmt::Debug for State<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").field("state", &self.state).finish_non_exhaustive()
    }
}

/// The right to change state and tables, until it is dropped.
#[derive(Debug)]
pub(crate) struct Edit<'s, S> {
    // Before the lock of this process is let go, that of all.
    _owned: Entered<'s>,
    state: MutexGuard<'s, S>,
}

impl<S> Deref for Edit<'_, S> {
    type Target = S;

    fn deref(&self) -> &S {
        &self.state
    }
}

impl<S> DerefMut for Edit<'_, S> {
    fn deref_mut(&mut self) -> &mut S {
        &mut self.state
    }
}

impl<S> State<S> {
    pub(crate) fn new(state: S, read: impl Fn(&StageCore) -> Result<S> + Send + Sync + 'static) -> Self {
        Self { state: Mutex::new(state), read: Box::new(read) }
    }

    /// What this process knows; of a superseded value, what it knew.
    pub(crate) fn look(&self) -> MutexGuard<'_, S> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The right to change it.
    ///
    /// # Errors
    /// [`Error::Superseded`](crate::Error::Superseded): nothing may be changed any more;
    /// [`Error::PinsLocked`](crate::Error::PinsLocked).
    pub(crate) fn edit<'s>(&'s self, core: &'s StageCore) -> Result<Edit<'s, S>> {
        self.edit_within(core, LOCK_PATIENCE)
    }

    /// The same, for what can be left undone: where another process is at work, at once an error.
    pub(crate) fn try_edit<'s>(&'s self, core: &'s StageCore) -> Result<Edit<'s, S>> {
        self.edit_within(core, Duration::ZERO)
    }

    fn edit_within<'s>(&'s self, core: &'s StageCore, patience: Duration) -> Result<Edit<'s, S>> {
        let mut state = self.look();
        let owned = core.owner().enter_within(patience)?;
        if core.owner().is_stale() {
            *state = (self.read)(core)?;
            core.owner().set_fresh();
        }
        Ok(Edit { _owned: owned, state })
    }
}
