//! Taking over tables that an earlier process has built, and maybe damaged.

use std::{collections::HashSet, sync::atomic::AtomicU32};

use super::{
    Block, Error, Prefix, ROOT_LINES, ROOT_ORDER, ROOT_SLOTS, Root, Table,
    node::{self, Words, is_node, is_path},
};

/// What leads on from a slot.
struct Found {
    block: Block,
    /// The byte of an address that decides there.
    at: usize,
    ways: Vec<u32>,
}

#[derive(Default)]
struct Adoption {
    taken: Vec<Block>,
    damaged: usize,
    /// Nodes in lines that something else has, too: asked once.
    shared: HashSet<u32>,
}

impl<M: AsRef<[AtomicU32]>> Table<M> {
    /// Counts the lines of a table as used that is in the memory already. To be called on a new [`Table`], once for
    /// every root that programs may be reading.
    pub(crate) fn adopt<P: Prefix>(&mut self, root: Root<P>) -> Result<(), Error> {
        match self.adopt_what_is_whole(root) {
            0 => Ok(()),
            _ => Err(Error::Corrupt(root.line)),
        }
    }

    /// The same, whatever is in the memory: counts every line as used that is reached from the root, and returns how
    /// many nodes are damaged. None: the table can be changed as if this process had built it. Otherwise each change
    /// of it is refused; packets go on as before, until the caller has built a table beside it, has published that
    /// one's root, and hands this one to [`Table::free`]. Two roots that share a node: that of the first is whole.
    pub(crate) fn adopt_what_is_whole<P: Prefix>(&mut self, root: Root<P>) -> usize {
        let mut adoption = Adoption::default();
        self.claim(Block { line: root.line, order: ROOT_ORDER }, &mut adoption);
        if self.is_in_memory(root.line) {
            for slot in 0..ROOT_SLOTS {
                self.adopt_word::<P>(self.words().load(Words::flat_at(root.line, slot)), 2, &mut adoption);
            }
        }
        if adoption.damaged > 0 {
            self.damaged.push((root.line, adoption.taken));
        }
        adoption.damaged
    }

    fn is_in_memory(&self, root: u32) -> bool {
        root.checked_add(ROOT_LINES).is_some_and(|end| end <= self.lines.total())
    }

    /// At most as deep as an address is long. No two slots lead to the same node, unless something is damaged.
    fn adopt_word<P: Prefix>(&mut self, word: u32, at: usize, adoption: &mut Adoption) {
        if !is_node(word) {
            return;
        }
        let line = word & node::LINE_MASK;
        let Ok(found) = self.read::<P>(word, at) else {
            adoption.damaged += 1;
            self.claim_lines(Block { line, order: 0 }, adoption);
            return;
        };
        if self.claim(found.block, adoption) || adoption.shared.insert(word) {
            found.ways.into_iter().for_each(|word| self.adopt_word::<P>(word, found.at, adoption));
        }
    }

    fn read<P: Prefix>(&self, word: u32, at: usize) -> Result<Found, Error> {
        if is_path(word) {
            let path = self.words().path(word)?;
            let block = Block { line: word & node::LINE_MASK, order: 0 };
            let end = path.end::<P>(at).ok_or(Error::Corrupt(block.line))?;
            return Ok(Found { block, at: end, ways: vec![path.next] });
        }
        let node = self.words().node(word)?;
        let corrupt = Error::Corrupt(word & node::LINE_MASK);
        let block = node.block().filter(|_| at < node::end_of::<P>()).ok_or(corrupt)?;
        let ways = node.slots.into_iter().filter(|word| is_node(*word)).collect();
        Ok(Found { block, at: at + 1, ways })
    }

    /// Whether all of a block was free. Otherwise that is damage, and what was free of it is taken.
    fn claim(&mut self, block: Block, adoption: &mut Adoption) -> bool {
        if self.lines.take_at(block) {
            adoption.taken.push(block);
            return true;
        }
        adoption.damaged += 1;
        self.claim_lines(block, adoption);
        false
    }

    fn claim_lines(&mut self, block: Block, adoption: &mut Adoption) {
        for line in block.line..block.line.saturating_add(block.lines()) {
            let line = Block { line, order: 0 };
            if self.lines.take_at(line) {
                adoption.taken.push(line);
            }
        }
    }
}
