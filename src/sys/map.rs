//! Owned map handles and the typed maps over them.
//!
//! Own calls rather than libbpf-rs's for what that crate gets wrong or cannot do: batches that report their
//! progress and never take "buffer too small" for the end, per-CPU values with checked sizes, no allocation
//! for a look-up.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    path::Path,
    ptr,
};

use bytemuck::Pod;
use libbpf_rs::{MapCore as _, MapHandle, MapType, libbpf_sys as raw};

use super::{check, io_error, privilege};
use crate::{Error, Result};

/// Entries in one batch call: large enough to make the call's cost vanish, small enough for the heap.
const BATCH: usize = 4096;

/// A map of any type, with a file descriptor of its own.
#[derive(Debug)]
pub(crate) struct Map {
    handle: MapHandle,
    name: String,
}

impl Map {
    pub(crate) fn new(handle: MapHandle, name: impl Into<String>) -> Self {
        Self { handle, name: name.into() }
    }

    /// A one-entry array of plain data that no program knows: for facts kept beside the pins.
    pub(crate) fn create_record(name: &str, value_size: usize) -> Result<Self> {
        Self::create_array(name, value_size, 0)
    }

    /// Such a record, in memory that processes can map.
    pub(crate) fn create_shared_record(name: &str, value_size: usize) -> Result<Self> {
        Self::create_array(name, value_size, raw::BPF_F_MMAPABLE)
    }

    fn create_array(name: &str, value_size: usize, map_flags: u32) -> Result<Self> {
        let options = raw::bpf_map_create_opts {
            sz: size_of::<raw::bpf_map_create_opts>() as raw::size_t,
            map_flags,
            ..Default::default()
        };
        let size = u32::try_from(value_size).expect("a record is small");
        let handle = MapHandle::create(MapType::Array, Some(name), 4, size, 1, &options).map_err(|error| {
            let cause = io_error(&error);
            let other = |cause| Error::Map { map: name.to_owned(), operation: "create it", cause };
            privilege::refusal(format!("creating map `{name}`"), &cause).unwrap_or_else(|| other(cause))
        })?;
        Ok(Self::new(handle, name))
    }

    /// Whether it is such a record, so that it may be read as one.
    pub(crate) fn is_record_of(&self, value_size: usize) -> bool {
        self.handle.map_type() == MapType::Array
            && self.handle.key_size() == 4
            && self.handle.value_size() as usize == value_size
    }

    /// Type and sizes, for messages.
    pub(crate) fn shape(&self) -> String {
        let handle = &self.handle;
        format!(
            "{:?} with keys of {} and values of {} bytes",
            handle.map_type(),
            handle.key_size(),
            handle.value_size()
        )
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn handle(&self) -> &MapHandle {
        &self.handle
    }

    pub(crate) fn capacity(&self) -> u32 {
        self.handle.max_entries()
    }

    /// Another handle of the same map.
    pub(crate) fn duplicate(&self) -> Result<Self> {
        let handle = MapHandle::try_from(&self.handle);
        let handle = handle.map_err(|error| self.error("duplicate its descriptor", io_error(&error)))?;
        Ok(Self { handle, name: self.name.clone() })
    }

    /// The kernel's id, which tells whether two handles are of one map.
    pub(crate) fn id(&self) -> Result<u32> {
        Ok(self.handle.info().map_err(|error| self.error("read its id", io_error(&error)))?.info.id)
    }

    /// The id of the program in slot 0 of a program array; `None` when it is empty.
    pub(crate) fn slot_program(&self) -> Result<Option<u32>> {
        let mut id = 0_u32;
        match self.lookup_raw(bytemuck::bytes_of(&0_u32), bytemuck::bytes_of_mut(&mut id)) {
            Ok(found) => Ok(found.then_some(id)),
            Err(error) => Err(self.error("read the slot", error)),
        }
    }

    /// Fills slot 0 of a program array. The kernel refuses a program that does not fit the array's owner.
    pub(crate) fn slot_set(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let (key, fd) = (0_u32, program.as_raw_fd());
        self.update_raw(bytemuck::bytes_of(&key), bytemuck::bytes_of(&fd), 0)
    }

    /// Empties slot 0 of a program array.
    pub(crate) fn slot_clear(&self) -> Result<()> {
        match self.delete_raw(bytemuck::bytes_of(&0_u32)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.error("empty the slot", error)),
            _ => Ok(()),
        }
    }

    pub(crate) fn error(&self, operation: &'static str, cause: io::Error) -> Error {
        Error::Map { map: self.name.clone(), operation, cause }
    }

    fn fd(&self) -> RawFd {
        self.handle.as_fd().as_raw_fd()
    }

    fn assert_sizes(&self, key: usize, value: usize) {
        assert_eq!(key, self.handle.key_size() as usize, "map {}: key size", self.name);
        assert_eq!(value, self.handle.value_size() as usize, "map {}: value size", self.name);
    }

    fn lookup_raw(&self, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
        self.assert_sizes(key.len(), value.len());
        // SAFETY: the map is not per CPU (Map's typed wrappers see to that), so the kernel reads `key_size`
        // bytes and writes `value_size` bytes, which the assertion above compared with the buffers.
        let answer = unsafe { raw::bpf_map_lookup_elem(self.fd(), key.as_ptr().cast(), value.as_mut_ptr().cast()) };
        found(check(answer))
    }

    fn update_raw(&self, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
        self.assert_sizes(key.len(), value.len());
        // SAFETY: as in `lookup_raw`; the kernel only reads both buffers.
        let answer = unsafe { raw::bpf_map_update_elem(self.fd(), key.as_ptr().cast(), value.as_ptr().cast(), flags) };
        check(answer).map(drop)
    }

    fn delete_raw(&self, key: &[u8]) -> io::Result<()> {
        assert_eq!(key.len(), self.handle.key_size() as usize, "map {}: key size", self.name);
        // SAFETY: the kernel reads `key_size` bytes, compared above.
        check(unsafe { raw::bpf_map_delete_elem(self.fd(), key.as_ptr().cast()) }).map(drop)
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }
}

fn found(answer: io::Result<i32>) -> io::Result<bool> {
    match answer {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// A hash, array or trie whose keys and values are plain data. Not for per-CPU maps.
#[derive(Debug)]
pub(crate) struct TypedMap<'m, K, V> {
    map: &'m Map,
    types: PhantomData<(K, V)>,
}

impl<'m, K: Pod, V: Pod> TypedMap<'m, K, V> {
    /// # Panics
    /// When the map's sizes are not those of the types, or it is per CPU: a mistake in this crate, since the
    /// layouts are asserted at compile time and pinned maps are compared before they are used.
    pub(crate) fn new(map: &'m Map) -> Self {
        map.assert_sizes(size_of::<K>(), size_of::<V>());
        assert!(!map.handle.map_type().is_percpu(), "map {} is per CPU", map.name);
        Self { map, types: PhantomData }
    }

    pub(crate) fn get(&self, key: &K) -> Result<Option<V>> {
        let mut value = V::zeroed();
        let found = self.map.lookup_raw(bytemuck::bytes_of(key), bytemuck::bytes_of_mut(&mut value));
        found.map(|found| found.then_some(value)).map_err(|error| self.map.error("look up an entry", error))
    }

    pub(crate) fn set(&self, key: &K, value: &V) -> io::Result<()> {
        self.map.update_raw(bytemuck::bytes_of(key), bytemuck::bytes_of(value), 0)
    }

    /// Whether there was such an entry.
    pub(crate) fn remove(&self, key: &K) -> Result<bool> {
        found(self.map.delete_raw(bytemuck::bytes_of(key)).map(|()| 0))
            .map_err(|error| self.map.error("remove an entry", error))
    }

    /// Writes all entries, many a call. On failure, says how many were written before the one that failed.
    pub(crate) fn set_many(&self, keys: &[K], values: &[V]) -> Result<(), (usize, io::Error)> {
        assert_eq!(keys.len(), values.len());
        let mut done = 0;
        for (keys, values) in keys.chunks(BATCH).zip(values.chunks(BATCH)) {
            let mut count = keys.len() as u32;
            // SAFETY: `new` compared the sizes of the types with the map's and excluded per-CPU maps, so the
            // kernel reads `count` keys and values from slices of that length; it writes back how many it took.
            let answer = unsafe {
                raw::bpf_map_update_batch(
                    self.map.fd(),
                    keys.as_ptr().cast(),
                    values.as_ptr().cast(),
                    &raw mut count,
                    ptr::null(),
                )
            };
            if let Err(error) = check(answer) {
                return Err((done + (count as usize).min(keys.len()), error));
            }
            done += keys.len();
        }
        Ok(())
    }

    /// All entries, in the map's order. Entries that others write or remove meanwhile may or may not be
    /// among them, and one may be there twice.
    pub(crate) fn entries(&self) -> Result<Vec<(K, V)>> {
        self.entries_by(BATCH)
    }

    /// `size`: entries to ask for at once, to begin with.
    fn entries_by(&self, mut size: usize) -> Result<Vec<(K, V)>> {
        let fail = |error| self.map.error("read its entries", error);
        let mut entries = Vec::new();
        let mut position = vec![0_u8; size_of::<K>().max(4)];
        let mut first = true;
        loop {
            let (mut keys, mut values) = (vec![K::zeroed(); size], vec![V::zeroed(); size]);
            let mut next = vec![0_u8; position.len()];
            let mut count = size as u32;
            let from = if first { ptr::null_mut() } else { position.as_mut_ptr() };
            // SAFETY: the map is not per CPU and the types have its sizes, so `count` keys and values fit the
            // vectors. The position is a bucket number of 4 bytes or a key; both fit, and it is what the
            // previous call wrote.
            let answer = unsafe {
                raw::bpf_map_lookup_batch(
                    self.map.fd(),
                    from.cast(),
                    next.as_mut_ptr().cast(),
                    keys.as_mut_ptr().cast(),
                    values.as_mut_ptr().cast(),
                    &raw mut count,
                    ptr::null(),
                )
            };
            let end = match check(answer) {
                Ok(_) => false,
                Err(error) if error.kind() == io::ErrorKind::NotFound => true,
                // A hash bucket that does not fit: nothing of it was written, so ask again with more room.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    size *= 2;
                    continue;
                }
                // Keys vanished while the kernel copied; what it has copied is valid, and so is the position.
                Err(error) if error.kind() == io::ErrorKind::Interrupted && count > 0 => false,
                Err(error) => return Err(fail(error)),
            };
            let count = (count as usize).min(size);
            entries.extend(keys.into_iter().zip(values).take(count));
            // A trie whose current key was removed by another starts over; that must not go on for ever.
            if end || entries.len() > 2 * self.map.capacity() as usize {
                return Ok(entries);
            }
            position = next;
            first = false;
        }
    }
}

/// One value a CPU.
#[derive(Debug)]
pub(crate) struct PerCpu<'m, V> {
    map: &'m Map,
    types: PhantomData<V>,
}

impl<'m, V: Pod> PerCpu<'m, V> {
    /// # Panics
    /// As [`TypedMap::new`].
    pub(crate) fn new(map: &'m Map) -> Self {
        map.assert_sizes(4, size_of::<V>());
        assert_eq!(map.handle.map_type(), MapType::PercpuArray, "map {}", map.name);
        assert!(align_of::<V>() <= align_of::<u64>());
        Self { map, types: PhantomData }
    }

    /// The values of entry `index`, by CPU. Possible CPUs, whether they are on line or not.
    pub(crate) fn get(&self, index: u32) -> Result<Vec<V>> {
        let fail = |error| self.map.error("read its values", error);
        let cpus = libbpf_rs::num_possible_cpus().map_err(|error| fail(io_error(&error)))?;
        // The kernel rounds each CPU's value up to 8 bytes.
        let words = size_of::<V>().div_ceil(8);
        let mut buffer = vec![0_u64; words * cpus];
        // SAFETY: the kernel reads a 4-byte key and writes one rounded value per possible CPU, which is what
        // the buffer was made for.
        let answer =
            unsafe { raw::bpf_map_lookup_elem(self.map.fd(), (&raw const index).cast(), buffer.as_mut_ptr().cast()) };
        check(answer).map_err(fail)?;
        let value = |words: &[u64]| bytemuck::pod_read_unaligned(&bytemuck::cast_slice(words)[..size_of::<V>()]);
        Ok(buffer.chunks_exact(words).map(value).collect())
    }

    /// Writes zeroes into entry `index` of every CPU.
    pub(crate) fn reset(&self, index: u32) -> io::Result<()> {
        self.set_sum(index, &V::zeroed())
    }

    /// Writes a value into entry `index` of the first CPU, and zeroes into those of all others.
    pub(crate) fn set_sum(&self, index: u32, value: &V) -> io::Result<()> {
        let cpus = libbpf_rs::num_possible_cpus().map_err(|error| io_error(&error))?;
        let mut words = vec![0_u64; size_of::<V>().div_ceil(8) * cpus];
        bytemuck::cast_slice_mut(&mut words)[..size_of::<V>()].copy_from_slice(bytemuck::bytes_of(value));
        // SAFETY: the kernel reads a 4-byte key and one value, rounded up to 8 bytes, per possible CPU, which is what the
        // buffer was made for.
        check(unsafe { raw::bpf_map_update_elem(self.map.fd(), (&raw const index).cast(), words.as_ptr().cast(), 0) })
            .map(drop)
    }
}

/// Opens a pinned map; `Ok(None)` when nothing is pinned there.
pub(crate) fn open_pinned(path: &Path, name: &str) -> Result<Option<Map>> {
    let fail = |cause| Error::Pin { path: path.to_owned(), operation: "open it", cause };
    match super::pin::kind_of(path).map_err(fail)? {
        None => Ok(None),
        Some(super::pin::Kind::Map) => {
            let handle = MapHandle::from_pinned_path(path).map_err(|error| fail(io_error(&error)))?;
            Ok(Some(Map::new(handle, name)))
        }
        Some(other) => Err(other.mismatch(path, super::pin::Kind::Map)),
    }
}

/// Maps as programs have them, for unit tests without a program.
#[cfg(test)]
impl Map {
    pub(crate) fn test_next_hops(entries: u32) -> Self {
        Self::test_map(MapType::Array, [4, 64, entries], raw::BPF_F_MMAPABLE)
    }

    pub(crate) fn test_links() -> Self {
        Self::test_map(MapType::Hash, [8, 16, 1024], 0)
    }

    fn test_map(kind: MapType, [key, value, entries]: [u32; 3], map_flags: u32) -> Self {
        let sz = size_of::<raw::bpf_map_create_opts>() as raw::size_t;
        let options = raw::bpf_map_create_opts { sz, map_flags, ..Default::default() };
        Self::new(MapHandle::create(kind, Some("test"), key, value, entries, &options).expect("needs root"), "test")
    }
}

#[cfg(test)]
mod tests {
    //! What the library underneath gets wrong; these need root.

    use super::*;

    fn create(kind: MapType, key: u32, value: u32, entries: u32, flags: u32) -> Map {
        Map::test_map(kind, [key, value, entries], flags)
    }

    #[test]
    fn a_batch_smaller_than_a_bucket_does_not_end_the_iteration() {
        let map = create(MapType::Hash, 4, 8, 1000, 0);
        let table = TypedMap::<u32, u64>::new(&map);
        let keys: Vec<u32> = (0..300).collect();
        let values: Vec<u64> = keys.iter().map(|key| u64::from(*key) * 7).collect();
        table.set_many(&keys, &values).unwrap();
        for size in [1, 2, 3, 4, 64, 4096] {
            let mut entries = table.entries_by(size).unwrap();
            entries.sort_unstable();
            assert!(entries.iter().copied().eq(keys.iter().copied().zip(values.iter().copied())), "{size} at once");
        }
    }

    #[test]
    fn a_batch_that_does_not_fit_says_how_far_it_came() {
        let map = create(MapType::Hash, 4, 4, 5, 0);
        let table = TypedMap::<u32, u32>::new(&map);
        let keys: Vec<u32> = (0..9).collect();
        let (done, error) = table.set_many(&keys, &keys).unwrap_err();
        assert_eq!((done, error.raw_os_error()), (5, Some(libc::E2BIG)));
        assert_eq!(table.entries().unwrap().len(), 5);
        table.set_many(&[], &[]).unwrap();
    }

    #[test]
    fn per_cpu_values_of_odd_sizes_are_read_whole() {
        let map = create(MapType::PercpuArray, 4, 12, 3, 0);
        let values = PerCpu::<[u32; 3]>::new(&map).get(2).unwrap();
        assert_eq!(values.len(), libbpf_rs::num_possible_cpus().unwrap());
        assert!(values.iter().all(|value| *value == [0; 3]));
        let error = PerCpu::<[u32; 3]>::new(&map).get(3).unwrap_err();
        assert!(matches!(error, Error::Map { .. }), "{error}");
    }

    #[test]
    fn a_trie_is_read_whole_in_small_batches() {
        const NO_PREALLOC: u32 = 1;
        let map = create(MapType::LpmTrie, 8, 4, 1000, NO_PREALLOC);
        let table = TypedMap::<[u8; 8], u32>::new(&map);
        let key = |n: u8| [24, 0, 0, 0, 10, n, 0, 0];
        for n in 0..200 {
            table.set(&key(n), &u32::from(n)).unwrap();
        }
        for size in [1, 3, 64, 200, 201] {
            let mut entries = table.entries_by(size).unwrap();
            entries.sort_unstable();
            assert!(entries.into_iter().eq((0..200).map(|n| (key(n), u32::from(n)))), "{size} at once");
        }
        assert!(table.remove(&key(7)).unwrap());
        assert!(!table.remove(&key(7)).unwrap());
        assert_eq!(table.get(&key(7)).unwrap(), None);
    }

    #[test]
    #[should_panic(expected = "value size")]
    fn a_map_of_another_size_is_not_read() {
        TypedMap::<u32, u64>::new(&create(MapType::Array, 4, 4, 1, 0));
    }

    #[test]
    #[should_panic(expected = "per CPU")]
    fn a_per_cpu_map_is_not_read_as_if_it_were_not() {
        TypedMap::<u32, u64>::new(&create(MapType::PercpuArray, 4, 8, 1, 0));
    }
}
