//! The inside of every stage value: its tables, its program, its owner.

use std::{
    fmt,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use bytemuck::Pod;

use super::{
    Owner,
    directory::check_name,
    growth::{self, Carry, Grown, Growth, Sets},
    home::{map_path, open_stage, stage_path},
    next_hops::NextHops,
    own_macs::{OWN_MACS, OwnMacs},
    owner::Entered,
};
use crate::{
    Error, Result,
    abi::{event::EventsState, reason::Counters},
    flow_table::{FlowTable, Secret, Shape},
    sys::{
        self,
        map::{Map, PerCpu, TypedMap},
        mmap::LongMapping,
        object::{Loaded, Plan},
        program::Program,
    },
};

/// A map that each instance has for itself: its successor in the chain.
const SLOT: &str = "next_stage";
/// This host's MAC address until the instance is attached.
pub(crate) const TEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// What is known of a network function before it is loaded.
#[derive(Debug)]
pub(crate) struct StageKind {
    /// The name of its program, its sources, and by default its values.
    pub(crate) name: &'static str,
    /// Changes when pinned maps cannot be understood any more.
    pub(crate) abi: u64,
    /// Settings of the configuration, each with the maps that it sizes, for messages.
    pub(crate) sized_by: &'static [(&'static str, &'static [&'static str])],
    /// Maps that are made anew when tables grow at adoption.
    pub(crate) carried: &'static [&'static [(&'static str, Carry)]],
    pub(crate) load: fn(&Plan<'_>) -> Result<Loaded>,
}

impl StageKind {
    fn name_setting(&self, mut error: Error) -> Error {
        if let Error::NoMemory { map, setting, .. } = &mut error {
            let sized = self.sized_by.iter().find(|(_, maps)| maps.contains(&map.as_str()));
            *setting = sized.map_or("", |(name, _)| name);
        }
        error
    }
}

/// One program with a slot of its own.
#[derive(Debug)]
pub(crate) struct Instance {
    pub(crate) program: Program,
    pub(crate) slot: Map,
    /// What its host's MAC addresses are, where its program asks for them.
    pub(crate) own_macs: Option<Arc<OwnMacs>>,
}

/// The tables of a value, shared by all its instances.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) name: String,
    pub(crate) kind: &'static StageKind,
    pub(crate) maps: Vec<Map>,
    pub(crate) owner: Owner,
    /// Of functions that send packets on.
    pub(crate) next_hops: Option<Arc<NextHops>>,
    /// Until the tables are in the place of smaller ones.
    grown: Mutex<Option<Grown>>,
    /// One that nobody uses. To load a program is to verify it, which takes most of the time of a start or of an edit.
    spare: Mutex<Option<Instance>>,
}

impl Shared {
    fn new(name: &str, kind: &'static StageKind, maps: Vec<Map>, owner: Owner) -> Result<Self> {
        let map = |name: &str| maps.iter().find(|map| map.name() == name);
        let next_hops = map("next_hops").zip(map("links")).map(|(table, links)| NextHops::of(table, links));
        let next_hops = next_hops.transpose()?.map(Arc::new);
        let name = name.to_owned();
        Ok(Self { name, kind, maps, owner, next_hops, grown: Mutex::default(), spare: Mutex::default() })
    }

    pub(crate) fn grown(&self) -> MutexGuard<'_, Option<Grown>> {
        self.grown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another instance of the program, on the same tables, without a successor.
    pub(crate) fn instantiate(&self) -> Result<Instance> {
        if let Some(spare) = self.spare.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Ok(spare);
        }
        let loaded = (self.kind.load)(&Plan { shared: &self.maps, capacities: &[] })?;
        Ok(split(loaded)?.0)
    }

    /// Takes an instance back that no packet is in and none will come to. One is kept, for the next that is wanted.
    pub(crate) fn recycle(&self, mut instance: Instance) {
        if let Some(macs) = instance.own_macs.take() {
            // Whoever follows its addresses finds it gone.
            let Ok(macs) = Arc::try_unwrap(macs) else { return };
            macs.reset();
            instance.own_macs = Some(Arc::new(macs));
        }
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.is_none() && instance.slot.slot_clear().is_ok() {
            *spare = Some(instance);
        }
    }
}

/// The inside of every stage value.
#[derive(Debug)]
pub struct StageCore {
    pub(crate) shared: Arc<Shared>,
    /// For test runs, from the first one on.
    own: OnceLock<Instance>,
    /// The program that was loaded first, wherever it is now.
    first: OwnedFd,
    recovery: Mutex<Recovery>,
}

/// What had to be done to take over the tables of an earlier process that ended in the middle of a change. Empty in the
/// ordinary case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Recovery {
    /// Rules, services, backends and the like whose records were not whole: they are gone.
    pub dropped: Vec<String>,
    /// Tables that were not whole and were built again from records that are.
    pub rebuilt: Vec<String>,
}

impl Recovery {
    /// Whether all was whole.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.dropped.is_empty() && self.rebuilt.is_empty()
    }
}

impl StageCore {
    pub(crate) fn load(kind: &'static StageKind, name: &str, capacities: &[(&str, u32)]) -> Result<Self> {
        check_name(name)?;
        let loaded = (kind.load)(&Plan { shared: &[], capacities }).map_err(|error| kind.name_setting(error))?;
        let (instance, maps) = split(loaded)?;
        Self::of(Shared::new(name, kind, maps, Owner::fresh(name)?)?, instance)
    }

    fn of(shared: Shared, instance: Instance) -> Result<Self> {
        let unreadable = |cause| Error::Program {
            program: shared.kind.name.to_owned(),
            operation: "duplicate its descriptor",
            cause,
        };
        let first = instance.program.as_fd().try_clone_to_owned().map_err(unreadable)?;
        shared.recycle(instance);
        Ok(Self { shared: Arc::new(shared), own: OnceLock::new(), first, recovery: Mutex::default() })
    }

    /// The instance that is attached nowhere and has no successor.
    pub(crate) fn own(&self) -> Result<&Instance> {
        if let Some(own) = self.own.get() {
            return Ok(own);
        }
        let own = self.shared.instantiate()?;
        Ok(self.own.get_or_init(|| own))
    }

    /// The program of [`Self::own`]; if that cannot be loaded, the one that was loaded first.
    pub(crate) fn program_fd(&self) -> BorrowedFd<'_> {
        self.own().map_or(self.first.as_fd(), |own| own.program.as_fd())
    }

    /// Takes over the tables that an earlier process pinned, with this build's program; larger ones, with the same in them,
    /// where `growth` asks for such. `read` reads them, and finishes or undoes what that process was at, while nobody else
    /// may change anything.
    pub(crate) fn adopt<T>(
        kind: &'static StageKind,
        directory: &Path,
        name: &str,
        growth: Option<&Growth<'_>>,
        read: impl Fn(&Self) -> Result<T>,
    ) -> Result<(Self, T)> {
        loop {
            let core = Self::open(kind, directory, name, growth)?;
            let read = match core.owner().claim()? {
                Some(_alone) => {
                    growth.map_or(Ok(()), |growth| core.fill(growth))?;
                    Some(read(&core)?)
                }
                // Larger tables were put in the place of these meanwhile.
                None => None,
            };
            if let Some(read) = read {
                return Ok((core, read));
            }
        }
    }

    fn open(kind: &'static StageKind, directory: &Path, name: &str, growth: Option<&Growth<'_>>) -> Result<Self> {
        check_name(name)?;
        let maps = open_stage(directory, name, kind)?;
        let owner = Owner::open(name, &stage_path(directory, name))?;
        let sizes = growth.and_then(|growth| growth::sizes(kind.carried, &maps, growth.wanted));
        let (replaced, capacities) = sizes.map_or_else(Default::default, |sizes| (sizes.replaced, sizes.capacities));
        let (old, kept): (Vec<Map>, Vec<Map>) = maps.into_iter().partition(|map| replaced.contains(&map.name()));
        let place = |error| match error {
            // The loader knows the map's name only.
            Error::PinMismatch { path, what, found, expected } => {
                let path = map_path(directory, name, &path.to_string_lossy());
                Error::PinMismatch { path, what, found, expected }
            }
            other => kind.name_setting(other),
        };
        let loaded = (kind.load)(&Plan { shared: &kept, capacities: &capacities }).map_err(place)?;
        let (instance, used) = split(loaded)?;
        for map in &used {
            if !kept.iter().chain(&old).any(|pinned| pinned.name() == map.name()) {
                return Err(Error::PinMissing { path: map_path(directory, name, map.name()) });
            }
        }
        let shared = Shared::new(name, kind, used, owner)?;
        shared.next_hops.iter().for_each(|next_hops| next_hops.set_pinned());
        if !old.is_empty() {
            *shared.grown() = Some(Grown { directory: directory.to_owned(), old, settles: Vec::new() });
        }
        Self::of(shared, instance)
    }

    /// Fills tables that are larger than those that are pinned.
    fn fill(&self, growth: &Growth<'_>) -> Result<()> {
        let mut grown = self.shared.grown();
        let Some(grown) = grown.as_mut() else { return Ok(()) };
        let sets = Sets { old: &grown.old, new: &self.shared.maps };
        let mut settles = growth::fill(self.shared.kind.carried, &sets, self)?;
        settles.extend((growth.fit)(&sets, self)?);
        grown.settles = settles;
        Ok(())
    }

    /// Whether the tables are larger than those that are pinned, and not in their place yet.
    pub(crate) fn is_grown(&self) -> bool {
        self.shared.grown().is_some()
    }

    /// The next hops of a function that sends packets on.
    pub(crate) fn next_hops(&self) -> &Arc<NextHops> {
        self.shared.next_hops.as_ref().expect("the function sends packets on")
    }

    pub(crate) fn owner(&self) -> &Owner {
        &self.shared.owner
    }

    /// The right to change tables, for what has no [`State`](super::State) to lock.
    pub(crate) fn enter(&self) -> Result<Entered<'_>> {
        self.owner().enter()
    }

    /// Of what an earlier process left, tells that this was not whole and is gone.
    pub(crate) fn dropped(&self, what: impl Into<String>) {
        self.recovery.lock().unwrap_or_else(PoisonError::into_inner).dropped.push(what.into());
    }

    /// Tells that this was built again from what is whole.
    pub(crate) fn rebuilt(&self, what: impl Into<String>) {
        self.recovery.lock().unwrap_or_else(PoisonError::into_inner).rebuilt.push(what.into());
    }

    pub(crate) fn recovery(&self) -> Recovery {
        self.recovery.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Refuses a configuration with another value of a setting that cannot change while the tables live. `setting` is its
    /// name in the configuration.
    pub(crate) fn is_fixed<T: PartialEq + fmt::Display>(
        &self,
        setting: &'static str,
        found: T,
        wanted: T,
    ) -> Result<()> {
        if found == wanted {
            return Ok(());
        }
        let (found, expected) = (found.to_string(), wanted.to_string());
        Err(Error::PinnedSetting { stage: self.shared.name.clone(), setting, found, expected })
    }

    /// Entries of a map.
    pub(crate) fn entries(&self, map: &str) -> u32 {
        self.map(map).capacity()
    }

    pub(crate) fn map(&self, name: &str) -> &Map {
        self.shared.maps.iter().find(|map| map.name() == name).expect("the skeleton has this map")
    }

    pub(crate) fn table<K: Pod, V: Pod>(&self, name: &str) -> TypedMap<'_, K, V> {
        TypedMap::new(self.map(name))
    }

    /// Changes the one entry of a settings table, one thread after the other. The data path sees the old or the new
    /// value of each field.
    pub(crate) fn change_settings<V: Pod>(&self, name: &str, change: impl FnOnce(&mut V)) -> Result<()> {
        let _alone = self.enter()?;
        let table = self.table::<u32, V>(name);
        let mut settings = table.get(&0)?.unwrap_or(V::zeroed());
        change(&mut settings);
        table.set(&0, &settings).map_err(|error| self.map(name).error("change the settings", error))
    }

    /// The counters of each CPU.
    pub(crate) fn counters(&self) -> Result<Vec<Counters>> {
        self.per_cpu("counters").get(0)
    }

    /// Events that found the ring full, for stages whose program includes `event.h`.
    pub(crate) fn events_lost(&self) -> Result<u64> {
        Ok(self.per_cpu::<EventsState>("events_state").get(0)?.iter().map(|cpu| cpu.lost).sum())
    }

    pub(crate) fn per_cpu<V: Pod>(&self, name: &str) -> PerCpu<'_, V> {
        PerCpu::new(self.map(name))
    }

    /// Draws the secret of a new flow table (`FLOW_TABLE(name, ...)` in C), whose map of lines was sized by this shape.
    /// Before that, programs find nothing in it and have no room.
    pub(crate) fn create_flow_table(&self, name: &str, shape: Shape) -> Result<FlowTable<LongMapping>> {
        let mut words = [0_u64; 64];
        let mut left = 0;
        let secret = Secret::draw(|| {
            if left == 0 {
                sys::fill_random(bytemuck::bytes_of_mut(&mut words));
                left = words.len();
            }
            left -= 1;
            words[left]
        });
        let [lines, header] = self.flow_table_maps(name)?;
        Ok(FlowTable::create(lines, header, shape, secret))
    }

    /// A flow table that an earlier process has created.
    pub(crate) fn adopt_flow_table(&self, name: &str) -> Result<FlowTable<LongMapping>> {
        let [lines, header] = self.flow_table_maps(name)?;
        let table = FlowTable::open(lines, header).ok_or_else(|| {
            let broken = std::io::Error::other("its header and its lines do not fit together");
            self.map(&format!("{name}_table")).error("open it", broken)
        })?;
        table.heal();
        Ok(table)
    }

    fn flow_table_maps(&self, name: &str) -> Result<[LongMapping; 2]> {
        let open = |part: &str| LongMapping::new(self.map(&format!("{name}_{part}")));
        Ok([open("lines")?, open("table")?])
    }
}

/// The instance, and the tables that it shares. Maps with a dot in their names are the compiler's (constants in
/// `.rodata`): the program holds them, they say nothing of the value's state, and could not be pinned.
fn split(loaded: Loaded) -> Result<(Instance, Vec<Map>)> {
    let tables = loaded.maps.into_iter().filter(|map| !map.name().contains('.'));
    let (mut slots, maps): (Vec<_>, Vec<_>) = tables.partition(|map| map.name() == SLOT);
    let slot = slots.pop().expect("every stage has a slot");
    let (mut own_macs, maps): (Vec<_>, Vec<_>) = maps.into_iter().partition(|map| map.name() == OWN_MACS);
    let own_macs = own_macs.pop().map(|map| OwnMacs::of(map).map(Arc::new)).transpose()?;
    own_macs.iter().for_each(|macs| macs.set(&[TEST_MAC]));
    Ok((Instance { program: loaded.program, slot, own_macs }, maps))
}
