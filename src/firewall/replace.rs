//! Replacing the whole list at once, on trial too.

use std::time::Duration;

use super::{Firewall, PendingList, Progress, Replaced, Rule, Selector};
use crate::Result;

#[allow(unused_imports, reason = "for links in the documentation")]
use crate::Error;

impl Firewall {
    /// Puts these rules in the place of all others, at once: the new list is built aside, and each packet is judged
    /// by the old one or the new one. Rules whose selector is in both keep their counters.
    ///
    /// ```no_run
    /// # fn main() -> xdpkit::Result<()> {
    /// # use xdpkit::{Firewall, FirewallConfig, Rule, read_prefix_list};
    /// # let firewall = Firewall::load(&FirewallConfig::default())?;
    /// let bad = read_prefix_list("/etc/blocklist.netset")?;
    /// let done = firewall.replace_all(bad.into_iter().map(|prefix| (prefix.into(), Rule::deny())))?;
    /// println!("{} rules are new, {} went", done.added, done.removed);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Conflict`] when a selector stands twice with different rules; else as
    /// [`Firewall::insert`], naming a rule for which there was no room. The old list is in force then, unchanged.
    pub fn replace_all(&self, rules: impl IntoIterator<Item = (Selector, Rule)>) -> Result<Replaced> {
        self.replace_all_with_progress(rules, |_| ())
    }

    /// As [`Firewall::replace_all`], telling from time to time how many of the rules have been prepared: for lists that
    /// take seconds. The last call comes with all of them, before the new list is in force. The callback must not
    /// use this firewall, which is locked meanwhile.
    ///
    /// # Errors
    /// As [`Firewall::replace_all`].
    pub fn replace_all_with_progress(
        &self,
        rules: impl IntoIterator<Item = (Selector, Rule)>,
        mut progress: impl FnMut(Progress),
    ) -> Result<Replaced> {
        let rules = rules.into_iter().collect();
        self.edit()?.replace(&self.core, rules, None, &mut progress)
    }

    /// As [`Firewall::replace_all`], but the old list returns after `timeout` unless [`PendingList::confirm`] is
    /// called before: against a list that locks out who sent it. The program sees to it, whether a process lives or not.
    /// Meanwhile, the rules cannot be changed otherwise.
    ///
    /// # Errors
    /// As [`Firewall::replace_all`].
    pub fn replace_all_unless_confirmed(
        &self,
        rules: impl IntoIterator<Item = (Selector, Rule)>,
        timeout: Duration,
    ) -> Result<PendingList<'_>> {
        let rules = rules.into_iter().collect();
        let replaced = self.edit()?.replace(&self.core, rules, Some(timeout), &mut |_| ())?;
        Ok(PendingList::new(self, Some(replaced)))
    }

    /// The list that waits for its confirmation, if there is one: also one that an earlier process has left.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn pending(&self) -> Result<Option<PendingList<'_>>> {
        let until = self.book().pending_until();
        Ok(until.map(|_| PendingList::new(self, None)))
    }
}
