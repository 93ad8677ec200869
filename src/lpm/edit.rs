//! Single changes while packets flow.
//!
//! A change is planned first: new nodes are written aside, stores to nodes in use are only noted. When there is
//! room for all of it, the stores are done. Each address is decided by one word of what is in use, so a packet sees
//! the old answer or the new one; and a change that does not fit, or meets what is no table, has changed nothing.

use std::sync::atomic::AtomicU32;

use super::{
    Block, Error, LEAF_END, Prefix, ROOT_ORDER, ROOT_SLOTS, Root, Slots, Table, covered, covered_by_root,
    node::{self, Node, Path, Shape, Words, is_node, is_path},
};

/// A change that is being prepared.
#[derive(Default)]
struct Plan {
    /// Word of the memory and its new value.
    stores: Vec<(usize, u32)>,
    taken: Vec<Block>,
    retired: Vec<Block>,
}

/// The prefix to change, and what becomes of each leaf inside.
struct Change<F> {
    octets: [u8; 16],
    length: u8,
    leaf: F,
}

impl<M: AsRef<[AtomicU32]>> Table<M> {
    /// Adds a prefix, or gives it another leaf. `owner_length` tells the length of the prefix that a leaf is of.
    ///
    /// # Panics
    /// When the leaf is 0, or [`LEAF_END`] or more.
    pub(crate) fn insert<P: Prefix>(
        &mut self,
        root: Root<P>,
        prefix: P,
        leaf: u32,
        owner_length: impl Fn(u32) -> u8,
    ) -> Result<(), Error> {
        assert!((1..LEAF_END).contains(&leaf), "leaves have 31 bits, not all 0");
        let length = prefix.length();
        let shorter = |old: u32| old == 0 || owner_length(old) <= length;
        self.change(root, prefix, |old| if shorter(old) { leaf } else { old })
    }

    /// Removes a prefix; `covering` is the leaf of the longest one that covers it, or 0.
    pub(crate) fn remove<P: Prefix>(
        &mut self,
        root: Root<P>,
        prefix: P,
        covering: u32,
        owner_length: impl Fn(u32) -> u8,
    ) -> Result<(), Error> {
        let length = prefix.length();
        self.change(root, prefix, |old| if old != 0 && owner_length(old) == length { covering } else { old })
    }

    fn change<P: Prefix>(&mut self, root: Root<P>, prefix: P, leaf: impl Fn(u32) -> u32) -> Result<(), Error> {
        let change = Change { octets: prefix.octets(), length: prefix.length(), leaf };
        let mut plan = Plan::default();
        let planned = self.plan_root::<P>(root, &change, &mut plan).and_then(|()| self.can_retire(&mut plan.retired));
        if let Err(error) = planned {
            self.give_back(plan.taken);
            return Err(error);
        }
        for (at, word) in plan.stores {
            self.words().store(at, word);
        }
        plan.retired.into_iter().try_for_each(|block| self.lines.retire(block))
    }

    /// Whether each of these is in use, and there once: what else leads to a node that goes would be led astray.
    fn can_retire(&self, blocks: &mut [Block]) -> Result<(), Error> {
        blocks.sort_unstable_by_key(|block| block.line);
        let twice = blocks.windows(2).find(|pair| pair[0].line == pair[1].line).map(|pair| pair[0]);
        let wrong = twice.or_else(|| blocks.iter().find(|block| !self.lines.owns(**block)).copied());
        wrong.map_or(Ok(()), |block| Err(Error::Corrupt(block.line)))
    }

    fn plan_root<P: Prefix>(
        &mut self,
        root: Root<P>,
        change: &Change<impl Fn(u32) -> u32>,
        plan: &mut Plan,
    ) -> Result<(), Error> {
        let whole = self.lines.owns(Block { line: root.line, order: ROOT_ORDER });
        if !whole || self.damaged.iter().any(|(line, _)| *line == root.line) {
            return Err(Error::Corrupt(root.line));
        }
        let slots = covered_by_root(&change.octets, change.length);
        debug_assert!(*slots.end() < ROOT_SLOTS);
        for slot in slots {
            let at = Words::flat_at(root.line, slot);
            let old = self.words().load(at);
            let new = match change.length {
                ..=16 => self.repaint::<P>(old, 2, change, plan)?,
                _ => self.descend::<P>(old, 2, change, plan)?,
            };
            if new != old {
                plan.stores.push((at, new));
            }
        }
        Ok(())
    }

    /// What a slot says after the change, which lies inside; byte `at` decides in the node there.
    fn descend<P: Prefix>(
        &mut self,
        word: u32,
        at: usize,
        change: &Change<impl Fn(u32) -> u32>,
        plan: &mut Plan,
    ) -> Result<u32, Error> {
        if is_path(word) {
            return self.descend_path::<P>(word, at, change, plan);
        }
        let old = self.node::<P>(word, at)?;
        let mut new = old.slots;
        if usize::from(change.length) > 8 * (at + 1) {
            let slot = &mut new[usize::from(change.octets[at])];
            *slot = self.descend::<P>(*slot, at + 1, change, plan)?;
        } else {
            self.repaint_slots::<P>(&mut new[covered(&change.octets, change.length, at)], at + 1, change, plan)?;
        }
        self.replace::<P>(word, at, &old, &new, plan)
    }

    /// The same where a path is.
    fn descend_path<P: Prefix>(
        &mut self,
        word: u32,
        at: usize,
        change: &Change<impl Fn(u32) -> u32>,
        plan: &mut Plan,
    ) -> Result<u32, Error> {
        let (path, end) = self.path::<P>(word, at)?;
        let whole = usize::from(change.length) / 8;
        let along = (at..end.min(whole)).take_while(|byte| change.octets[*byte] == path.byte(byte - at)).count();
        if along == path.count {
            let next = match usize::from(change.length) > 8 * end {
                true => self.descend::<P>(path.next, end, change, plan)?,
                false => self.repaint::<P>(path.next, end, change, plan)?,
            };
            return self.replace_path::<P>(word, end, &path, Path { next, ..path }, plan);
        }

        let split = at + along;
        let here = usize::from(change.length) <= 8 * (split + 1);
        if (change.leaf)(path.other) == path.other {
            // Nothing changes beside the path. Does its end?
            let way = usize::from(path.byte(along));
            if !here || !covered(&change.octets, change.length, split).contains(&way) {
                return Ok(word);
            }
            let next = self.repaint::<P>(path.next, end, change, plan)?;
            return self.replace_path::<P>(word, end, &path, Path { next, ..path }, plan);
        }

        // Byte `split` gets a node, with what is left of the path before it and behind.
        let mut old: Slots = [path.other; 256];
        old[usize::from(path.byte(along))] = match along + 1 < path.count {
            true => self.write_path::<P>(end, path.tail(along + 1), plan)?,
            false => path.next,
        };
        let mut new = old;
        if here {
            let slots = &mut new[covered(&change.octets, change.length, split)];
            self.repaint_slots::<P>(slots, split + 1, change, plan)?;
        } else {
            let slot = &mut new[usize::from(change.octets[split])];
            *slot = self.descend::<P>(*slot, split + 1, change, plan)?;
        }
        let node = self.replace::<P>(path.other, split, &Node::of(old), &new, plan)?;
        plan.retired.push(node::path_block(word));
        if along == 0 || node == path.other {
            return Ok(node);
        }
        self.write_path::<P>(split, path.head(along, node), plan)
    }

    /// What a slot says after the change, which covers all of it.
    fn repaint<P: Prefix>(
        &mut self,
        word: u32,
        at: usize,
        change: &Change<impl Fn(u32) -> u32>,
        plan: &mut Plan,
    ) -> Result<u32, Error> {
        if !is_node(word) {
            return Ok((change.leaf)(word));
        }
        if is_path(word) {
            let (path, end) = self.path::<P>(word, at)?;
            let next = self.repaint::<P>(path.next, end, change, plan)?;
            let new = Path { next, other: (change.leaf)(path.other), ..path };
            return self.replace_path::<P>(word, end, &path, new, plan);
        }
        let old = self.node::<P>(word, at)?;
        let mut new = old.slots;
        self.repaint_slots::<P>(&mut new, at + 1, change, plan)?;
        self.replace::<P>(word, at, &old, &new, plan)
    }

    fn repaint_slots<P: Prefix>(
        &mut self,
        slots: &mut [u32],
        at: usize,
        change: &Change<impl Fn(u32) -> u32>,
        plan: &mut Plan,
    ) -> Result<(), Error> {
        let mut last = None;
        for slot in slots {
            // A run of equal leaves is asked for once; no two slots lead to the same node.
            match last {
                Some((old, new)) if old == *slot => *slot = new,
                _ => {
                    let old = *slot;
                    *slot = self.repaint::<P>(old, at, change, plan)?;
                    last = Some((old, *slot));
                }
            }
        }
        Ok(())
    }

    /// The word for a slot that led to a node with the slots `old`, or was a leaf, and shall be as `new`.
    fn replace<P: Prefix>(
        &mut self,
        word: u32,
        at: usize,
        old: &Node,
        new: &Slots,
        plan: &mut Plan,
    ) -> Result<u32, Error> {
        if old.slots == *new {
            return Ok(word);
        }
        let runs = node::runs_of(new);
        if runs == 1 && !is_node(new[0]) {
            plan.retired.extend(old.block());
            return Ok(new[0]);
        }
        if P::PATHS
            && let Some(path) = Path::of(new)
        {
            let written = self.write_path::<P>(at + 1, path, plan);
            return Self::or_in_place(written, word, old, new, plan);
        }
        let shape = Shape::of(runs);
        let shrinks = old.block().is_some_and(|block| block.order > shape.order());
        // A flat node stays flat for a while, lest a prefix that comes and goes rebuilds it each time.
        let stays = !shrinks || old.is_flat() && runs > node::COMPRESSED_RUNS / 2;
        if stays && plan_stores(old, new, plan) {
            return Ok(word);
        }
        let written = self.lines.take(shape.order()).map(|block| {
            plan.taken.push(block);
            self.words().write(block, shape, new)
        });
        Self::or_in_place(written, word, old, new, plan)
    }

    /// A removal needs no room: every run that is left started where one did before.
    fn or_in_place(
        written: Result<u32, Error>,
        word: u32,
        old: &Node,
        new: &Slots,
        plan: &mut Plan,
    ) -> Result<u32, Error> {
        match written {
            Ok(written) => {
                plan.retired.extend(old.block());
                Ok(written)
            }
            Err(Error::Full | Error::Quarantined) if plan_stores(old, new, plan) => Ok(word),
            Err(error) => Err(error),
        }
    }

    /// The same for a path that ends before byte `end`.
    fn replace_path<P: Prefix>(
        &mut self,
        word: u32,
        end: usize,
        old: &Path,
        new: Path,
        plan: &mut Plan,
    ) -> Result<u32, Error> {
        if *old == new {
            return Ok(word);
        }
        if new.next == new.other {
            plan.retired.push(node::path_block(word));
            return Ok(new.other);
        }
        if self.joined::<P>(end, &new, plan)?.is_some()
            && let Ok(written) = self.write_path::<P>(end, new, plan)
        {
            plan.retired.push(node::path_block(word));
            return Ok(written);
        }
        plan.stores.push((Words::path_next_at(word), new.next));
        plan.stores.push((Words::path_other_at(word), new.other));
        Ok(word)
    }

    /// Writes a path aside, which ends before byte `end`, joined with the one that follows it.
    fn write_path<P: Prefix>(&mut self, end: usize, path: Path, plan: &mut Plan) -> Result<u32, Error> {
        let block = self.lines.take(Shape::Path.order())?;
        plan.taken.push(block);
        let joined = self.joined::<P>(end, &path, plan)?;
        if joined.is_some() {
            plan.retired.push(node::path_block(path.next));
        }
        Ok(self.words().write_path(block, &joined.unwrap_or(path)))
    }

    /// A path and the one that follows it, as one.
    fn joined<P: Prefix>(&self, end: usize, path: &Path, plan: &Plan) -> Result<Option<Path>, Error> {
        // What the plan changes in that one is not there yet. It comes last: there is nothing else below.
        let changes = |next: u32| plan.stores.last().is_some_and(|(at, _)| *at == Words::path_other_at(next));
        if !is_path(path.next) || changes(path.next) {
            return Ok(None);
        }
        Ok(path.joined(&self.path::<P>(path.next, end)?.0, end))
    }
}

/// Changes a node where it is, if its shape allows that.
fn plan_stores(old: &Node, new: &Slots, plan: &mut Plan) -> bool {
    let before = plan.stores.len();
    let fits = old.block().is_some()
        && (0..new.len()).all(|slot| match old.own_word(slot) {
            Some(at) => {
                if new[slot] != old.slots[slot] {
                    plan.stores.push((at, new[slot]));
                }
                true
            }
            None => slot > 0 && new[slot] == new[slot - 1],
        });
    if !fits {
        plan.stores.truncate(before);
    }
    fits
}
