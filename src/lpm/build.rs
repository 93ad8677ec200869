//! Building a table at once, from sorted prefixes.

use std::sync::atomic::AtomicU32;

use super::{
    Block, Error, LEAF_END, Prefix, ROOT_ORDER, ROOT_SLOTS, Root, Slots, Table, covered, covered_by_root,
    node::{self, Path, Shape},
};

/// A prefix ready to be painted.
struct Entry {
    octets: [u8; 16],
    length: u8,
    leaf: u32,
}

impl<M: AsRef<[AtomicU32]>> Table<M> {
    /// Builds a table that no program knows of yet, or nothing. The prefixes are sorted by address and then by length,
    /// each is there once, and leaves are neither 0 nor [`LEAF_END`] or more.
    ///
    /// # Panics
    /// When they are not.
    pub(crate) fn build<P: Prefix>(&mut self, prefixes: &[(P, u32)]) -> Result<Root<P>, Error> {
        self.build_or_tell(prefixes).map_err(|(error, _)| error)
    }

    /// As [`Table::build`]; an error comes with the position of a prefix for which there was no room.
    pub(crate) fn build_or_tell<P: Prefix>(&mut self, prefixes: &[(P, u32)]) -> Result<Root<P>, (Error, usize)> {
        let entries: Vec<Entry> = prefixes
            .iter()
            .map(|(prefix, leaf)| Entry { octets: prefix.octets(), length: prefix.length(), leaf: *leaf })
            .collect();
        let sorted = entries.is_sorted_by(|a, b| (a.octets, a.length) < (b.octets, b.length));
        assert!(sorted, "prefixes are sorted, each is there once");
        assert!(entries.iter().all(|entry| (1..LEAF_END).contains(&entry.leaf)), "leaves have 31 bits, not all 0");

        let mut taken = Vec::new();
        let root = self.build_root::<P>(&entries, &mut taken);
        if root.is_err() {
            self.give_back(taken);
        }
        root
    }

    fn build_root<P: Prefix>(&mut self, entries: &[Entry], taken: &mut Vec<Block>) -> Result<Root<P>, (Error, usize)> {
        let block = self.lines.take(ROOT_ORDER).map_err(|error| (error, 0))?;
        taken.push(block);
        let mut slots = vec![0; ROOT_SLOTS];
        let mut rest = entries;
        while let Some(entry) = rest.first() {
            let here = covered_by_root(&entry.octets, entry.length);
            if entry.length <= 16 {
                slots[here].fill(entry.leaf);
                rest = &rest[1..];
                continue;
            }
            let slot = *here.start();
            let group = rest.iter().take_while(|other| other.octets[..2] == entry.octets[..2]).count();
            let node = self.build_node::<P>(&rest[..group], 2, slots[slot], taken);
            slots[slot] = node.map_err(|error| (error, entries.len() - rest.len()))?;
            rest = &rest[group..];
        }
        let words = self.words();
        let start = node::Words::flat_at(block.line, 0);
        slots.iter().enumerate().for_each(|(slot, word)| words.store(start + slot, *word));
        Ok(Root::at(block.line))
    }

    /// The word for a slot of which these are the longer prefixes, all alike in the bytes before `at`.
    fn build_node<P: Prefix>(
        &mut self,
        entries: &[Entry],
        at: usize,
        covering: u32,
        taken: &mut Vec<Block>,
    ) -> Result<u32, Error> {
        let mut slots: Slots = [covering; 256];
        let mut rest = entries;
        while let Some(entry) = rest.first() {
            // What covers a slot comes before the longer prefixes inside: when those are reached the slot is final.
            if usize::from(entry.length) <= 8 * (at + 1) {
                slots[covered(&entry.octets, entry.length, at)].fill(entry.leaf);
                rest = &rest[1..];
                continue;
            }
            let slot = entry.octets[at];
            let group = rest.iter().take_while(|other| other.octets[at] == slot).count();
            let word = self.build_node::<P>(&rest[..group], at + 1, slots[usize::from(slot)], taken)?;
            slots[usize::from(slot)] = word;
            rest = &rest[group..];
        }
        let runs = node::runs_of(&slots);
        if runs == 1 && !node::is_node(slots[0]) {
            return Ok(slots[0]);
        }
        if P::PATHS
            && let Some(path) = Path::of(&slots)
        {
            return self.build_path::<P>(path, at, taken);
        }
        let shape = Shape::of(runs);
        let block = self.lines.take(shape.order())?;
        taken.push(block);
        Ok(self.words().write(block, shape, &slots))
    }

    /// A step that goes on in one way only: the path there grows, or one begins.
    fn build_path<P: Prefix>(&mut self, step: Path, at: usize, taken: &mut Vec<Block>) -> Result<u32, Error> {
        if node::is_path(step.next)
            && let Some(longer) = step.joined(&self.path::<P>(step.next, at + 1)?.0, at + 1)
        {
            return Ok(self.words().write_path(node::path_block(step.next), &longer));
        }
        let block = self.lines.take(Shape::Path.order())?;
        taken.push(block);
        Ok(self.words().write_path(block, &step))
    }

    /// What was taken for a table or a change that does not come about.
    pub(super) fn give_back(&mut self, taken: Vec<Block>) {
        for block in taken {
            // All of them are in use since just now.
            let _ = self.lines.give(block);
        }
    }

    /// Retires a table that programs have been told to leave: all its lines go to the quarantine. What is damaged
    /// stays in use, and so do lines that are not known to be this table's.
    pub(crate) fn free<P: Prefix>(&mut self, root: Root<P>) {
        if let Some(at) = self.damaged.iter().position(|(line, _)| *line == root.line) {
            let (_, blocks) = self.damaged.swap_remove(at);
            for block in blocks {
                // No change of a damaged table retires any.
                let _ = self.lines.retire(block);
            }
        } else if self.lines.retire(Block { line: root.line, order: ROOT_ORDER }).is_ok() {
            for slot in 0..ROOT_SLOTS {
                self.retire_below::<P>(self.words().load(node::Words::flat_at(root.line, slot)), 2);
            }
        }
    }

    fn retire_below<P: Prefix>(&mut self, word: u32, at: usize) {
        if node::is_path(word) {
            if let Ok((path, end)) = self.path::<P>(word, at)
                && self.lines.retire(node::path_block(word)).is_ok()
            {
                self.retire_below::<P>(path.next, end);
            }
        } else if node::is_node(word)
            && let Ok(node) = self.node::<P>(word, at)
            && let Some(block) = node.block()
            && self.lines.retire(block).is_ok()
        {
            node.slots.into_iter().for_each(|word| self.retire_below::<P>(word, at + 1));
        }
    }
}
