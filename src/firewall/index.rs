//! What leads from an address to its rules: the two engines, each with room for both lists.

use std::io;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::store::Rules;
use crate::{
    Error, Result,
    abi::firewall::{Key4, Key6, LEAF_RULE},
    base::StageCore,
    lpm::{self, Root, Table},
    sys::{map::TypedMap, mmap::Mapping},
};

/// Why a prefix could not be set.
#[derive(Debug)]
pub(super) enum Refusal {
    /// There may be room after a grace period and [`Index::release`].
    Later,
    Error(Error),
}

#[derive(Debug)]
pub(super) enum Index {
    Trie,
    Compiled { table: Table<Mapping>, roots: [Option<Roots>; 2] },
}

/// Of a list, by family.
pub(super) type Roots = (Root<Ipv4Net>, Root<Ipv6Net>);

/// Of both families, of the list in force and of the one that is built beside it.
const ROOTS: u32 = 4;

const TRIES: [[&str; 2]; 2] = [["trie_v4_a", "trie_v6_a"], ["trie_v4_b", "trie_v6_b"]];

fn trie4(core: &StageCore, list: usize) -> TypedMap<'_, Key4, u32> {
    core.table(TRIES[list][0])
}

fn trie6(core: &StageCore, list: usize) -> TypedMap<'_, Key6, u32> {
    core.table(TRIES[list][1])
}

impl Index {
    pub(super) fn compiled(core: &StageCore) -> Result<Self> {
        let table = Table::with_roots(Mapping::new(core.map("lpm_lines"))?, ROOTS);
        Ok(Self::Compiled { table, roots: [None; 2] })
    }

    /// Marks what the roots of a list lead to as used, before anything is built. Returns how many nodes are damaged: such a
    /// list cannot be changed, only replaced.
    pub(super) fn adopt(&mut self, list: usize, roots: [u32; 2]) -> usize {
        let Self::Compiled { table, roots: mine } = self else { return 0 };
        if roots == [0; 2] {
            return 0;
        }
        let adopted = (Root::at(roots[0]), Root::at(roots[1]));
        mine[list] = Some(adopted);
        table.adopt_what_is_whole(adopted.0) + table.adopt_what_is_whole(adopted.1)
    }

    /// Builds a list that is not in force from sorted prefixes, each with its leaf, or nothing. The compiled engine
    /// answers the roots that are to be published with it.
    pub(super) fn build(&mut self, core: &StageCore, list: usize, rules: &[(IpNet, u32)]) -> Result<[u32; 2], Refusal> {
        let split = rules.partition_point(|(net, _)| matches!(net, IpNet::V4(_)));
        let (v4, v6) = rules.split_at(split);
        let v4: Vec<_> = v4.iter().filter_map(|(net, leaf)| Some((v4_of(*net)?, *leaf))).collect();
        let v6: Vec<_> = v6.iter().filter_map(|(net, leaf)| Some((v6_of(*net)?, *leaf))).collect();
        match self {
            Self::Trie => {
                let keys: (Vec<Key4>, Vec<Key6>) = (
                    v4.iter().map(|(net, _)| (*net).into()).collect(),
                    v6.iter().map(|(net, _)| (*net).into()).collect(),
                );
                let leaves: (Vec<u32>, Vec<u32>) =
                    (v4.iter().map(|(_, leaf)| *leaf).collect(), v6.iter().map(|(_, leaf)| *leaf).collect());
                let built = trie4(core, list)
                    .set_many(&keys.0, &leaves.0)
                    .map_err(|(at, error)| refused(core, TRIES[list][0], rules[at.min(rules.len() - 1)].0, error))
                    .and_then(|()| {
                        trie6(core, list).set_many(&keys.1, &leaves.1).map_err(|(at, error)| {
                            refused(core, TRIES[list][1], rules[(split + at).min(rules.len() - 1)].0, error)
                        })
                    });
                if let Err(error) = built {
                    self.clear(core, list, rules.iter().map(|(net, _)| *net))?;
                    return Err(error);
                }
                Ok([0; 2])
            }
            Self::Compiled { table, roots } => {
                let named = |at: usize| rules.get(at).map(|(net, _)| *net);
                let root4 = table.build_or_tell(&v4).map_err(|(error, at)| no_lines(core, named(at), error))?;
                let root6 = match table.build_or_tell(&v6) {
                    Ok(root) => root,
                    Err((error, at)) => {
                        table.free(root4);
                        return Err(no_lines(core, named(split + at), error));
                    }
                };
                roots[list] = Some((root4, root6));
                Ok([root4.line(), root6.line()])
            }
        }
    }

    /// Lets go of a list that is not in force any more, before the grace period: packets may be in it.
    pub(super) fn retire(&mut self, list: usize) {
        let roots = self.take_roots(list);
        self.free_roots(roots);
    }

    /// The roots of a list, which has none then.
    pub(super) fn take_roots(&mut self, list: usize) -> Option<Roots> {
        if let Self::Compiled { roots, .. } = self { roots[list].take() } else { None }
    }

    pub(super) fn put_roots(&mut self, list: usize, given: Option<Roots>) {
        if let Self::Compiled { roots, .. } = self {
            roots[list] = given;
        }
    }

    pub(super) fn free_roots(&mut self, given: Option<Roots>) {
        if let (Self::Compiled { table, .. }, Some((root4, root6))) = (self, given) {
            table.free(root4);
            table.free(root6);
        }
    }

    /// Empties a list that no packet can be in any more.
    pub(super) fn clear(
        &mut self,
        core: &StageCore,
        list: usize,
        prefixes: impl Iterator<Item = IpNet>,
    ) -> Result<(), Refusal> {
        if let Self::Trie = self {
            for prefix in prefixes {
                remove_from_trie(core, list, prefix)?;
            }
        }
        Ok(())
    }

    /// Adds a prefix to a list, or changes its leaf.
    pub(super) fn set(
        &mut self,
        core: &StageCore,
        records: &Rules,
        list: usize,
        prefix: IpNet,
        leaf: u32,
    ) -> Result<(), Refusal> {
        let length = |leaf: u32| records.source_length(leaf & LEAF_RULE);
        match (self, prefix) {
            (Self::Trie, IpNet::V4(net)) => {
                trie4(core, list).set(&net.into(), &leaf).map_err(|error| refused(core, TRIES[list][0], prefix, error))
            }
            (Self::Trie, IpNet::V6(net)) => {
                trie6(core, list).set(&net.into(), &leaf).map_err(|error| refused(core, TRIES[list][1], prefix, error))
            }
            (Self::Compiled { table, roots }, prefix) => {
                let (root4, root6) = roots[list].expect("a list in force has roots");
                match prefix {
                    IpNet::V4(net) => table.insert(root4, net, leaf, length),
                    IpNet::V6(net) => table.insert(root6, net, leaf, length),
                }
                .map_err(|error| no_lines(core, Some(prefix), error))
            }
        }
    }

    /// Removes a prefix; `covering` is the leaf of the next shorter one.
    pub(super) fn remove(
        &mut self,
        core: &StageCore,
        records: &Rules,
        list: usize,
        prefix: IpNet,
        covering: u32,
    ) -> Result<(), Refusal> {
        let length = |leaf: u32| records.source_length(leaf & LEAF_RULE);
        match (self, prefix) {
            (Self::Trie, prefix) => remove_from_trie(core, list, prefix),
            (Self::Compiled { table, roots }, prefix) => {
                let (root4, root6) = roots[list].expect("a list in force has roots");
                match prefix {
                    IpNet::V4(net) => table.remove(root4, net, covering, length),
                    IpNet::V6(net) => table.remove(root6, net, covering, length),
                }
                .map_err(|error| no_lines(core, Some(prefix), error))
            }
        }
    }

    /// What a list's trie holds, in no order; nothing for the compiled engine.
    pub(super) fn entries(&self, core: &StageCore, list: usize) -> Result<Vec<(IpNet, u32)>> {
        let Self::Trie = self else { return Ok(Vec::new()) };
        let v4 = trie4(core, list).entries()?.into_iter().filter_map(|(key, leaf)| Some((key.net()?, leaf)));
        let v6 = trie6(core, list).entries()?.into_iter().filter_map(|(key, leaf)| Some((key.net()?, leaf)));
        Ok(v4.chain(v6).collect())
    }

    pub(super) fn is_compiled(&self) -> bool {
        matches!(self, Self::Compiled { .. })
    }

    /// After a grace period.
    pub(super) fn release(&mut self) {
        if let Self::Compiled { table, .. } = self {
            table.release();
        }
    }
}

fn remove_from_trie(core: &StageCore, list: usize, prefix: IpNet) -> Result<(), Refusal> {
    match prefix {
        IpNet::V4(net) => trie4(core, list).remove(&net.into()),
        IpNet::V6(net) => trie6(core, list).remove(&net.into()),
    }
    .map(drop)
    .map_err(Refusal::Error)
}

fn refused(core: &StageCore, map: &str, prefix: IpNet, error: io::Error) -> Refusal {
    let map = core.map(map);
    Refusal::Error(match error.raw_os_error() {
        Some(libc::ENOSPC) => {
            Error::Full { map: map.name().to_owned(), capacity: map.capacity(), entry: prefix.to_string() }
        }
        _ => map.error("set a rule", error),
    })
}

fn no_lines(core: &StageCore, prefix: Option<IpNet>, error: lpm::Error) -> Refusal {
    let map = core.map("lpm_lines");
    match error {
        lpm::Error::Quarantined => Refusal::Later,
        lpm::Error::Full => Refusal::Error(Error::Full {
            map: map.name().to_owned(),
            capacity: map.capacity(),
            entry: prefix.map_or_else(String::new, |prefix| prefix.to_string()),
        }),
        lpm::Error::Corrupt(_) => Refusal::Error(map.error("change it", io::Error::other(error))),
    }
}

fn v4_of(net: IpNet) -> Option<Ipv4Net> {
    if let IpNet::V4(net) = net { Some(net) } else { None }
}

fn v6_of(net: IpNet) -> Option<Ipv6Net> {
    if let IpNet::V6(net) = net { Some(net) } else { None }
}
