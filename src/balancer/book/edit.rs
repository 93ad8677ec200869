//! Changing services and backends.

use std::{mem::offset_of, net::IpAddr, sync::atomic::Ordering};

use super::{Book, Entry, Member, SlotRule, Target, flags_of, unknown};
use crate::{
    Error, Result,
    abi::service::{
        Address, BACKEND_USED, Backend, BalancerSettings, SERVICE_USED, SLOT_LINE_WORDS, Service, ServiceCpu, Vip,
        family_of,
    },
    balancer::{BackendState, ServiceAddr, index::Key, store::lines_of},
    base::{Counted, StageCore},
    maglev::Share,
};

impl<R: SlotRule> Book<R> {
    /// Adds a service with its backends. Packets find it when all is written. `record` says what is the function's own.
    ///
    /// # Errors
    /// [`Error::ServiceExists`], [`Error::Full`], [`Error::Invalid`]. Nothing was changed then.
    pub(crate) fn insert_service(
        &mut self,
        core: &StageCore,
        service: ServiceAddr,
        record: Service,
        backends: &[(Target, u32)],
    ) -> Result<()> {
        service.check()?;
        if self.entries.contains_key(&service) {
            return Err(Error::ServiceExists { service: service.to_string() });
        }
        let full = |map: &str, capacity| Error::Full { map: map.into(), capacity, entry: service.to_string() };
        let most = self.services.len() - 1;
        let taken = |number: u32| self.entries.values().any(|entry| u32::from(entry.number) == number);
        let number = (1..=most).find(|number| !taken(*number)).ok_or_else(|| full("services", most))? as u16;

        let vip = self.vip_number(service.address).ok_or_else(|| full("vip_index", most))?;
        let record = Service {
            flags: record.flags | SERVICE_USED,
            first_line: (u32::from(number) - 1) * lines_of(self.table_size),
            slots: self.table_size,
            vip: vip.into(),
            port: service.port.unwrap_or(0).to_be(),
            protocol: service.protocol as u8,
            function: self.rule.service_words(vip, &record),
            ..record
        };
        Counted::<ServiceCpu>::of(core, "service_states").reset(number.into())?;
        for word in self.slots.range(record.first_line, record.slots) {
            word.store(0, Ordering::Relaxed);
        }
        self.entries.insert(service, Entry { number, record, members: Vec::new() });
        let added = self.set_backends(core, &service, backends);
        self.services.write(number.into(), &record);
        let new_address = self.addresses.insert(service.address, vip).is_none();
        if new_address {
            let echo = 0;
            let family = family_of(service.address);
            let record = Vip { address: Address::from(service.address), family, echo, held: 0 };
            self.vips.write(vip.into(), &record);
            self.expect_vip(service.address);
        }
        let published = added.and_then(|()| {
            let found = self.service_index.insert(Key::service(vip, &service), number)
                && (!new_address || self.vip_index.insert(Key::vip(service.address), vip));
            if found { Ok(()) } else { Err(full("service_index", most)) }
        });
        if published.is_err() {
            let _ = self.remove_service(core, &service);
            return published;
        }
        self.set_echo_service(service.address);
        Ok(())
    }

    /// Makes an address ours, with or without services, for as long as the tables live. Answers its number.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Full`].
    pub(crate) fn hold(&mut self, address: IpAddr) -> Result<u16> {
        crate::balancer::service::check_host("address", address)?;
        let full = |capacity| Error::Full { map: "vip_index".into(), capacity, entry: address.to_string() };
        let vip = self.vip_number(address).ok_or_else(|| full(self.vips.len() - 1))?;
        let new = self.addresses.insert(address, vip).is_none();
        if new {
            let record = Vip { address: address.into(), family: family_of(address), echo: 0, held: 1 };
            self.vips.write(vip.into(), &record);
            self.expect_vip(address);
            if !self.vip_index.insert(Key::vip(address), vip) {
                self.addresses.remove(&address);
                return Err(full(self.vips.len() - 1));
            }
        }
        self.vips.set(vip.into(), offset_of!(Vip, held), 1);
        self.held.insert(address);
        Ok(vip)
    }

    /// The number of a virtual address, new or old. `None` when another one looks the same in the index.
    fn vip_number(&self, address: IpAddr) -> Option<u16> {
        if let Some(number) = self.addresses.get(&address) {
            return Some(*number);
        }
        if self.vip_index.find(Key::vip(address)).is_some() {
            return None;
        }
        (1..self.vips.len() as u16).find(|number| !self.addresses.values().any(|taken| taken == number))
    }

    /// Echo requests go by the first service of their address.
    pub(super) fn set_echo_service(&self, address: IpAddr) {
        let Some(vip) = self.addresses.get(&address) else { return };
        let first = self.entries.iter().find(|(service, _)| service.address == address);
        let number = first.map_or(0, |(_, entry)| entry.number);
        self.vips.set((*vip).into(), offset_of!(Vip, echo), number.into());
    }

    /// Removes a service. Its packets are none of ours from now on; its backends are gone.
    ///
    /// # Errors
    /// [`Error::UnknownService`]; [`Error::Map`].
    pub(crate) fn remove_service(&mut self, core: &StageCore, service: &ServiceAddr) -> Result<()> {
        let entry = self.entries.remove(service).ok_or_else(|| unknown(service))?;
        self.services.set(entry.number.into(), offset_of!(Service, flags), 0);
        let vip = entry.record.vip as u16;
        self.service_index.remove(Key::service(vip, service));
        let last =
            !self.entries.keys().any(|other| other.address == service.address) && !self.held.contains(&service.address);
        if last {
            self.vip_index.remove(Key::vip(service.address));
        } else {
            self.set_echo_service(service.address);
        }
        self.wait(core)?;
        if last {
            self.addresses.remove(&service.address);
            self.vips.set(vip.into(), offset_of!(Vip, family), 0);
        }
        for (at, word) in (entry.first_slot()..).zip(self.slots.range(entry.record.first_line, entry.record.slots)) {
            let before = word.swap(0, Ordering::AcqRel);
            // The rule forgets what it knows of the slot: nothing remains that could be moved.
            self.rule.change(at, before, 0, &|_| true);
        }
        let members: Vec<u16> = entry.members.iter().map(|member| member.id).collect();
        self.forget(core, &members)
    }

    /// Adds a backend, or gives one that is there a weight (0: no new flows) and new flows. Answers its weight before.
    /// One that is leaving is another backend, although of the same address: it is killed.
    ///
    /// # Errors
    /// [`Error::UnknownService`], [`Error::Full`], [`Error::Invalid`] when the table has too few slots.
    pub(crate) fn set_backend(
        &mut self,
        core: &StageCore,
        service: &ServiceAddr,
        target: Target,
        weight: u32,
    ) -> Result<Option<u32>> {
        let staying = self.entry(service)?.staying(target);
        let before = staying.map(|member| member.share());
        let mut list = self.wanted(service)?;
        list.retain(|(other, _)| *other != target);
        list.push((target, weight));
        self.check_list(service, &list)?;
        self.put(core, service, target, weight)?;
        self.rebuild(service)?;
        self.release(core)?;
        Ok(before)
    }

    /// Makes this the list of backends: adds, gives weights, and removes (see [`Book::remove_backend`]) those that are
    /// not in it; all with one change of the table.
    ///
    /// # Errors
    /// As [`Book::set_backend`]. Nothing was changed then.
    pub(crate) fn set_backends(
        &mut self,
        core: &StageCore,
        service: &ServiceAddr,
        list: &[(Target, u32)],
    ) -> Result<()> {
        self.check_list(service, list)?;
        let new = list.iter().filter(|(target, _)| self.staying(service, *target).is_none()).count();
        self.make_room(core, service, new)?;
        for (target, weight) in list {
            self.put(core, service, *target, *weight)?;
        }
        let gone: Vec<u16> = self.entry(service)?.members.iter().filter(|m| m.is_staying()).map(|m| m.id).collect();
        for id in gone {
            let kept = |member: &Member| list.iter().any(|(target, _)| *target == member.target);
            self.change(service, id, |member| {
                if !kept(member) {
                    member.state = BackendState::Leaving;
                }
            });
        }
        self.rebuild(service)?;
        self.release(core)
    }

    /// Gives a backend no new flows; those that it has stay.
    ///
    /// # Errors
    /// [`Error::UnknownService`], [`Error::UnknownBackend`].
    pub(crate) fn drain(&mut self, core: &StageCore, service: &ServiceAddr, target: Target) -> Result<()> {
        self.retire(core, service, target, BackendState::Draining)
    }

    /// As [`Book::drain`]; the backend goes when it can have no flows any more.
    ///
    /// # Errors
    /// As [`Book::drain`].
    pub(crate) fn remove_backend(&mut self, core: &StageCore, service: &ServiceAddr, target: Target) -> Result<()> {
        self.retire(core, service, target, BackendState::Leaving)
    }

    /// Ends a backend and all flows that it has, also one that is leaving.
    ///
    /// # Errors
    /// As [`Book::drain`].
    pub(crate) fn kill(&mut self, core: &StageCore, service: &ServiceAddr, target: Target) -> Result<()> {
        self.retire(core, service, target, BackendState::Killed)
    }

    fn retire(&mut self, core: &StageCore, service: &ServiceAddr, target: Target, state: BackendState) -> Result<()> {
        let members = &self.entry(service)?.members;
        let found = members.iter().find(|member| {
            member.target == target
                && (member.is_staying() || state == BackendState::Killed && member.state == BackendState::Leaving)
        });
        let Some(id) = found.map(|member| member.id) else {
            return Err(Error::UnknownBackend { service: service.to_string(), backend: target.to_string() });
        };
        self.change(service, id, |member| member.state = state);
        self.rebuild(service)?;
        self.release(core)
    }

    fn wanted(&self, service: &ServiceAddr) -> Result<Vec<(Target, u32)>> {
        let members = self.entry(service)?.members.iter().filter(|member| member.is_staying());
        Ok(members.map(|member| (member.target, member.share())).collect())
    }

    fn check_list(&self, service: &ServiceAddr, list: &[(Target, u32)]) -> Result<()> {
        for (at, (target, _)) in list.iter().enumerate() {
            crate::balancer::service::check_host("backend", target.address)?;
            if target.address == service.address {
                let expected = "another address than the service's";
                return Err(Error::Invalid { what: "backend", value: target.to_string(), expected });
            }
            if list[..at].iter().any(|(other, _)| other == target) {
                let expected = "to stand once in a list";
                return Err(Error::Invalid { what: "backend", value: target.to_string(), expected });
            }
        }
        let weighted = list.iter().filter(|(_, weight)| *weight > 0).count();
        if weighted > self.table_size as usize {
            let expected = "a prime of at least the number of backends";
            return Err(Error::Invalid { what: "table_size", value: self.table_size.to_string(), expected });
        }
        Ok(())
    }

    fn staying(&self, service: &ServiceAddr, target: Target) -> Option<&Member> {
        self.entries.get(service)?.staying(target)
    }

    /// Adds a backend or gives it a weight; the table does not know yet.
    fn put(&mut self, core: &StageCore, service: &ServiceAddr, target: Target, weight: u32) -> Result<()> {
        if let Some(id) = self.staying(service, target).map(|member| member.id) {
            self.change(service, id, |member| {
                member.weight = weight;
                member.state = BackendState::Active;
            });
            return Ok(());
        }
        let full = |book: &Self| Error::Full {
            map: "backends".into(),
            capacity: book.backends.len() - 1,
            entry: format!("{target} of {service}"),
        };
        self.make_room(core, service, 1)?;
        let id = self.take_id().ok_or_else(|| full(self))?;
        let leaving: Vec<u16> =
            self.entry(service)?.members.iter().filter(|m| m.target == target).map(|m| m.id).collect();
        for id in leaving {
            self.change(service, id, |member| member.state = BackendState::Killed);
        }
        let settings = self.settings.read(0);
        let identity = settings.next_identity as u32;
        self.settings.set(0, offset_of!(BalancerSettings, next_identity), identity.wrapping_add(1));
        let entry = self.entries.get_mut(service).ok_or_else(|| unknown(service))?;
        let record = Backend {
            address: Address::from(target.address),
            family: family_of(target.address),
            flags: 0,
            service: entry.number.into(),
            weight,
            port: target.port.to_be(),
            reserved: 0,
            identity,
            function: self.rule.backend_words(service.protocol, target, &entry.record),
        };
        entry.members.push(Member { id, target, weight, state: BackendState::Active, identity });
        self.rule.forget(id);
        self.backends.write(id.into(), &record);
        self.backends.set(id.into(), offset_of!(Backend, flags), BACKEND_USED);
        Ok(())
    }

    /// Changes a backend in the book and in its record.
    fn change(&mut self, service: &ServiceAddr, id: u16, change: impl FnOnce(&mut Member)) {
        let entry = self.entries.get_mut(service);
        let Some(member) = entry.and_then(|entry| entry.members.iter_mut().find(|member| member.id == id)) else {
            return;
        };
        let was_staying = member.is_staying();
        change(member);
        if was_staying && !member.is_staying() {
            let now = self.rule.now();
            for half in 0..2 {
                let offset = offset_of!(Backend, function) + 4 * half;
                self.backends.set(id.into(), offset, (now >> (32 * half)) as u32);
            }
        }
        self.backends.set(id.into(), offset_of!(Backend, weight), member.weight);
        self.backends.set(id.into(), offset_of!(Backend, flags), BACKEND_USED | flags_of(member.state));
    }

    /// Brings a service's slots to what its list asks for.
    pub(super) fn rebuild(&mut self, service: &ServiceAddr) -> Result<()> {
        self.next_hops.wanted_changed();
        let entry = self.entries.get(service).ok_or_else(|| unknown(service))?;
        let names: Vec<_> = entry.members.iter().map(|member| member.target.name()).collect();
        let shares: Vec<_> =
            names.iter().zip(&entry.members).map(|(name, member)| Share { name, weight: member.share() }).collect();
        let table = self.rule.table(&entry.record, &shares, entry.record.slots, self.settings.read(0).seed)?;
        let killed = |id: u16| {
            let member = entry.members.iter().find(|member| member.id == id);
            member.is_none_or(|member| member.state == BackendState::Killed)
        };
        let words = self.slots.range(entry.record.first_line, entry.record.slots);
        for (at, word) in words.iter().enumerate() {
            let wanted = table.get(at).map_or(0, |index| entry.members[*index as usize].id);
            let slot = entry.record.first_line * SLOT_LINE_WORDS as u32 + at as u32;
            // A program may end the slot's transition meanwhile.
            let next = |word| Some(self.rule.change(slot, word, wanted, &killed));
            let _ = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
        }
        Ok(())
    }
}
