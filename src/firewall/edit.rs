//! Changing rules of the list in force: one by one, or many that are all changed or none.

use super::{
    Firewall, Rule, Selector,
    book::{Before, Book},
};
use crate::Result;

#[allow(unused_imports, reason = "for links in the documentation")]
use crate::Error;

/// What [`Firewall::insert_many`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Inserted {
    /// Rules that are new.
    pub added: usize,
    /// Rules that were there and changed.
    pub changed: usize,
    /// Elements that said what was so already.
    pub duplicates: usize,
}

impl Firewall {
    /// Sets a rule, and answers the one that was there for the same packets.
    ///
    /// # Errors
    /// [`Error::Full`] when there is no room; [`Error::TooManyRules`] when
    /// the source prefix has 32 rules, or a packet would have to be compared with more than 63 that are not plain
    /// (a plain rule has no qualifier and no end and does not only count);
    /// [`Error::ListPending`]; [`Error::Map`]. Nothing was changed then.
    pub fn insert(&self, selector: Selector, rule: Rule) -> Result<Option<Rule>> {
        self.edit()?.insert(&self.core, selector, rule)
    }

    /// Sets many rules, each as [`Firewall::insert`] does: all of them, or none. Packets see one after the other. A
    /// selector that stands twice gets the later rule. To set most of a list, [`Firewall::replace_all`] is faster.
    ///
    /// # Errors
    /// As [`Firewall::insert`], naming the first rule that was refused. The earlier rules are back then.
    pub fn insert_many(&self, rules: impl IntoIterator<Item = (Selector, Rule)>) -> Result<Inserted> {
        let mut book = self.edit()?;
        let mut done = Vec::new();
        let mut report = Inserted::default();
        for (selector, rule) in rules {
            match book.insert(&self.core, selector, rule) {
                Ok(before) => {
                    match before {
                        None => report.added += 1,
                        Some(before) if before == rule => report.duplicates += 1,
                        Some(_) => report.changed += 1,
                    }
                    if before != Some(rule) {
                        done.push(Before { selector, rule: before });
                    }
                }
                Err(error) => {
                    self.undo(&mut book, done);
                    return Err(error);
                }
            }
        }
        Ok(report)
    }

    /// Removes the rule with exactly this selector, and answers it.
    ///
    /// # Errors
    /// [`Error::TooManyRules`] when packets would then be compared with more rules than they
    /// may; [`Error::ListPending`]; [`Error::Map`].
    pub fn remove(&self, selector: Selector) -> Result<Option<Rule>> {
        self.edit()?.remove(&self.core, &selector)
    }

    /// Removes the rules with these selectors, all of them or none, and answers how many there were.
    ///
    /// # Errors
    /// As [`Firewall::remove`].
    pub fn remove_many(&self, selectors: impl IntoIterator<Item = Selector>) -> Result<usize> {
        let mut book = self.edit()?;
        let mut done = Vec::new();
        for selector in selectors {
            match book.remove(&self.core, &selector) {
                Ok(None) => {}
                Ok(rule) => done.push(Before { selector, rule }),
                Err(error) => {
                    self.undo(&mut book, done);
                    return Err(error);
                }
            }
        }
        Ok(done.len())
    }

    /// Removes the rules that have expired, and answers how many there were. They decide nothing, but take room.
    ///
    /// # Errors
    /// As [`Firewall::remove`].
    pub fn remove_expired(&self) -> Result<usize> {
        let expired: Vec<_> =
            self.iter()?.filter(|entry| entry.rule.is_expired()).map(|entry| entry.selector).collect();
        self.remove_many(expired)
    }

    fn undo(&self, book: &mut Book, done: Vec<Before>) {
        for Before { selector, rule } in done.into_iter().rev() {
            // What was there before had room; the first error is the one to tell of.
            let _ = match rule {
                Some(rule) => book.insert(&self.core, selector, rule).map(drop),
                None => book.remove(&self.core, &selector).map(drop),
            };
        }
    }
}
