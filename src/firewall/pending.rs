//! A list that waits for its confirmation: [`PendingList`].

use std::time::Duration;

use super::{Firewall, Replaced};
use crate::{Result, sys};

/// A list that is in force for a time, and for good only when it is confirmed. Dropping this does neither.
#[derive(Debug)]
#[must_use = "the old list returns unless this one is confirmed"]
pub struct PendingList<'f> {
    firewall: &'f Firewall,
    replaced: Option<Replaced>,
}

impl<'f> PendingList<'f> {
    pub(super) fn new(firewall: &'f Firewall, replaced: Option<Replaced>) -> Self {
        Self { firewall, replaced }
    }

    /// What the new list changed; `None` for one that another process has begun.
    #[must_use]
    pub fn replaced(&self) -> Option<Replaced> {
        self.replaced
    }

    /// The time that is left; zero when the old list is in force again.
    ///
    /// # Errors
    /// [`Error::Map`](crate::Error::Map).
    pub fn remaining(&self) -> Result<Duration> {
        let until = self.firewall.book().pending_until();
        Ok(until.unwrap_or_default().saturating_sub(sys::monotonic()))
    }

    /// Keeps the new list.
    ///
    /// # Errors
    /// [`Error::NotConfirmed`](crate::Error::NotConfirmed) when it was too late: the old list is in force again;
    /// [`Error::Map`](crate::Error::Map).
    pub fn confirm(self) -> Result<()> {
        self.firewall.edit()?.confirm(&self.firewall.core)
    }

    /// Returns to the old list at once.
    ///
    /// # Errors
    /// [`Error::Map`](crate::Error::Map).
    pub fn roll_back(self) -> Result<()> {
        self.firewall.edit()?.roll_back(&self.firewall.core)
    }
}
