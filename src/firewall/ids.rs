//! Which rule numbers are free. A number stands for a record and for a counter, and each of the two lists may use
//! either; it is free again when nobody does and a grace period has passed.

/// Uses of a number, by list.
pub(super) const RECORD: u8 = 1;
pub(super) const COUNTER: u8 = 4;
/// A packet may still be looking.
const QUARANTINE: u8 = 16;

#[derive(Debug)]
pub(super) struct Ids {
    uses: Vec<u8>,
    free: Vec<u32>,
    /// Numbers from here on were never used.
    fresh: u32,
    quarantine: Vec<u32>,
}

impl Ids {
    /// 0 is no rule.
    pub(super) fn new(total: u32) -> Self {
        Self { uses: vec![0; total as usize], free: Vec::new(), fresh: 1, quarantine: Vec::new() }
    }

    /// A number that nobody uses, for a list.
    pub(super) fn take(&mut self, list: usize, what: u8) -> Option<u32> {
        let id = self.free.pop().or_else(|| {
            let id = (self.fresh as usize..self.uses.len()).find(|id| self.uses[*id] == 0)? as u32;
            self.fresh = id + 1;
            Some(id)
        })?;
        self.add(id, list, what);
        Some(id)
    }

    pub(super) fn add(&mut self, id: u32, list: usize, what: u8) {
        self.uses[id as usize] |= what << list;
    }

    pub(super) fn remove(&mut self, id: u32, list: usize, what: u8) {
        let uses = &mut self.uses[id as usize];
        *uses &= !(what << list);
        if *uses & QUARANTINE == 0 {
            *uses |= QUARANTINE;
            self.quarantine.push(id);
        }
    }

    /// Lets go of a number unless somebody uses it: nobody knows what became of it.
    pub(super) fn retire(&mut self, id: u32) {
        if self.uses[id as usize] == 0 {
            self.remove(id, 0, 0);
        }
    }

    /// Whether the record of a number may be written: it has none, and no packet can be reading an earlier one.
    pub(super) fn has_free_record(&self, id: u32) -> bool {
        self.uses[id as usize] & (RECORD | RECORD << 1 | QUARANTINE) == 0
    }

    pub(super) fn has_quarantine(&self) -> bool {
        !self.quarantine.is_empty()
    }

    /// After a grace period; `forget` is called for each number that is free now.
    pub(super) fn release(&mut self, mut forget: impl FnMut(u32)) {
        for id in std::mem::take(&mut self.quarantine) {
            let uses = &mut self.uses[id as usize];
            *uses &= !QUARANTINE;
            if *uses == 0 {
                forget(id);
                self.free.push(id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_comes_back_when_nobody_uses_it_and_a_grace_period_is_over() {
        let mut ids = Ids::new(3);
        let (a, b) = (ids.take(0, RECORD | COUNTER).unwrap(), ids.take(1, RECORD).unwrap());
        assert_eq!((a, b, ids.take(0, RECORD)), (1, 2, None));
        ids.add(a, 1, COUNTER);
        ids.remove(a, 0, RECORD | COUNTER);
        assert!(!ids.has_free_record(a));
        ids.release(|_| panic!("list 1 still counts"));
        assert!(ids.has_free_record(a));
        assert_eq!(ids.take(0, RECORD), None);
        ids.remove(a, 1, COUNTER);
        assert_eq!(ids.take(0, RECORD), None);
        let mut forgotten = Vec::new();
        ids.release(|id| forgotten.push(id));
        assert_eq!((forgotten, ids.take(0, RECORD)), (vec![a], Some(a)));
    }
}
