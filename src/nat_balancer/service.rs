//! Services and their backends, as a program that uses the balancer changes and lists them.

use std::{mem::offset_of, net::SocketAddr};

use super::{NatBackend, NatBackendStats, NatBalancer, NatMode, NatService, NatServiceStats, Scheduler, rule::NatRule};
use crate::{
    BackendState, Count, Error, Result, ServiceAddr,
    abi::{
        nat_balancer::{ADDRESSES_MAX, ADDRESSES_SHIFT, BY_SLOT, DESTINATION_ONLY, LEAST_LOADED, NUMBER_MAX, Settings},
        service::{SERVICE_BY_SOURCE, Service},
    },
    address::Unmapped as _,
    balancer::{
        Book, Target,
        book::{backend_stats, service_stats},
    },
};

impl NatBalancer {
    /// Adds a service.
    ///
    /// # Errors
    /// [`Error::ServiceExists`]; [`Error::Full`]; [`Error::Invalid`] for a service on any port, for backends of the other
    /// family or without a port, that stand twice, or at a virtual address of ours.
    pub fn insert(&self, service: ServiceAddr, with: &NatService) -> Result<()> {
        let service = service.unmapped();
        let list = targets(&service, &with.backends)?;
        let mut book = self.edit()?;
        let kept = with.mode == NatMode::Destination;
        let mut flags = if kept { DESTINATION_ONLY } else { 0 };
        if with.scheduler == Scheduler::SourceHash {
            flags |= SERVICE_BY_SOURCE;
        }
        let mut function = [0_u64; 5];
        let pool: Vec<u16> = book.held(service.address.is_ipv4()).collect();
        for (at, number) in pool.iter().enumerate().take(ADDRESSES_MAX) {
            function[at / 4] |= u64::from(*number) << (16 * (at % 4));
        }
        flags |= (pool.len().clamp(1, ADDRESSES_MAX) as u32 - 1) << ADDRESSES_SHIFT;
        self.refuse_own(&book, &list)?;
        if kept {
            self.number_backends(&book, &service, &list)?;
        }
        let record = Service {
            flags,
            first_line: 0,
            slots: 0,
            vip: 0,
            port: 0,
            protocol: 0,
            reserved: 0,
            scheduler: with.scheduler.number(),
            function,
        };
        // Before packets can meet the service: its port must not be given to a connection any more.
        let settings = self.connections.settings.read(0);
        if service.port.is_some_and(|port| (settings.first_port..=settings.last_port).contains(&port.into())) {
            self.set(offset_of!(Settings, ports_shared), 1);
        }
        // Nor may an answer come that nobody looks at.
        if kept {
            self.set(offset_of!(Settings, destination_only), 1);
        }
        book.insert_service(&self.core, service, record, &list)
    }

    /// A backend at one of our own addresses would get its packets back for ever.
    fn refuse_own(&self, book: &Book<NatRule>, list: &[(Target, u32)]) -> Result<()> {
        match list.iter().find(|(target, _)| book.is_ours(target.address)) {
            None => Ok(()),
            Some((target, _)) => Err(Error::Invalid {
                what: "backend",
                value: target.to_string(),
                expected: "another address than the balancer's own",
            }),
        }
    }

    /// Answers of backends whose clients keep their addresses are found by these numbers.
    fn number_backends(&self, book: &Book<NatRule>, service: &ServiceAddr, list: &[(Target, u32)]) -> Result<()> {
        let mut tuples = book.rule.tuples();
        let tuple = |target: &Target| (service.protocol, target.address, target.port);
        for (target, _) in list {
            if tuples.add(tuple(target)).is_ok() {
                continue;
            }
            tuples.retain(|known| {
                let of = |(service, entry): (&ServiceAddr, &crate::balancer::book::Entry)| {
                    let same = |target: &Target| (service.protocol, target.address, target.port) == *known;
                    entry.record.flags & DESTINATION_ONLY != 0 && entry.members.iter().any(|m| same(&m.target))
                };
                book.entries().any(of) || list.iter().any(|(target, _)| tuple(target) == *known)
            });
            tuples.add(tuple(target))?;
        }
        Ok(())
    }

    /// Removes a service, and ends its connections. Answers what it was.
    ///
    /// # Errors
    /// [`Error::UnknownService`]; [`Error::Map`].
    pub fn remove(&self, service: &ServiceAddr) -> Result<NatService> {
        let service = &service.unmapped();
        let mut book = self.edit()?;
        let was = service_of(book.entry(service)?);
        let number = book.entry(service)?.number;
        book.remove_service(&self.core, service)?;
        let judge = self.connections.judge()?;
        for (record, connection) in self.connections.live(&judge) {
            if connection.service == number {
                self.connections.end(record, &connection);
            }
        }
        let kept = book.entries().any(|(_, entry)| entry.record.flags & DESTINATION_ONLY != 0);
        self.set(offset_of!(Settings, destination_only), kept.into());
        Ok(was)
    }

    /// A service with the backends that get or may get new connections.
    ///
    /// # Errors
    /// [`Error::UnknownService`].
    pub fn get(&self, service: &ServiceAddr) -> Result<NatService> {
        let service = &service.unmapped();
        Ok(service_of(self.book().entry(service)?))
    }

    /// All services, sorted.
    #[must_use]
    pub fn services(&self) -> Vec<ServiceAddr> {
        self.book().entries().map(|(service, _)| *service).collect()
    }

    /// All backends of a service, those included that are leaving.
    ///
    /// # Errors
    /// [`Error::UnknownService`]; [`Error::Map`].
    pub fn backends(&self, service: &ServiceAddr) -> Result<Vec<NatBackend>> {
        let service = &service.unmapped();
        let book = self.book();
        let entry = book.entry(service)?;
        let listed = entry.members.iter().map(|member| {
            let (stats, answers) = backend_stats(&self.core, member.id)?;
            let active = self.connections.active(member.id);
            let stats = NatBackendStats { forwarded: stats.forwarded, answers, opened: stats.new_flows, active };
            let address = SocketAddr::new(member.target.address, member.target.port);
            let (weight, state, identity) = (member.weight, member.state, member.identity);
            Ok(NatBackend { address, weight, state, identity, stats })
        });
        listed.collect()
    }

    /// Adds a backend, or gives one a weight and new connections. Answers the weight that it had. 0: no new connections.
    ///
    /// # Errors
    /// [`Error::UnknownService`], [`Error::Full`], [`Error::Invalid`].
    pub fn set_backend(&self, service: &ServiceAddr, backend: SocketAddr, weight: u32) -> Result<Option<u32>> {
        let service = &service.unmapped();
        let list = targets(service, &[(backend, weight)])?;
        let mut book = self.edit()?;
        self.prepare(&book, service, &list)?;
        book.set_backend(&self.core, service, list[0].0, weight)
    }

    /// Makes this the list of backends, with one change of the table: who is not in it gets no new connections, and goes
    /// when it has none left.
    ///
    /// # Errors
    /// As [`NatBalancer::set_backend`]. Nothing was changed then.
    pub fn set_backends(&self, service: &ServiceAddr, backends: &[(SocketAddr, u32)]) -> Result<()> {
        let service = &service.unmapped();
        let list = targets(service, backends)?;
        let mut book = self.edit()?;
        self.prepare(&book, service, &list)?;
        book.set_backends(&self.core, service, &list)
    }

    fn prepare(&self, book: &Book<NatRule>, service: &ServiceAddr, list: &[(Target, u32)]) -> Result<()> {
        self.refuse_own(book, list)?;
        if book.entry(service)?.record.flags & DESTINATION_ONLY != 0 {
            self.number_backends(book, service, list)?;
        }
        Ok(())
    }

    /// Gives a backend no new connections; those that it has stay. Setting its weight brings it back.
    ///
    /// # Errors
    /// [`Error::UnknownService`], [`Error::UnknownBackend`].
    pub fn drain(&self, service: &ServiceAddr, backend: SocketAddr) -> Result<()> {
        let service = &service.unmapped();
        self.edit()?.drain(&self.core, service, target(backend))
    }

    /// As [`NatBalancer::drain`]; the backend goes when it has no connection left. Added again before, it is
    /// another one, and what the old one still had ends.
    ///
    /// # Errors
    /// As [`NatBalancer::drain`].
    pub fn remove_backend(&self, service: &ServiceAddr, backend: SocketAddr) -> Result<()> {
        let service = &service.unmapped();
        self.edit()?.remove_backend(&self.core, service, target(backend))
    }

    /// Ends a backend and all its connections at once. With [`NatConfig::reset_unknown`](crate::NatConfig::reset_unknown), their next packets are answered
    /// with RST.
    ///
    /// # Errors
    /// As [`NatBalancer::drain`].
    pub fn kill(&self, service: &ServiceAddr, backend: SocketAddr) -> Result<()> {
        let service = &service.unmapped();
        let mut book = self.edit()?;
        let wanted = target(backend);
        let ids: Vec<u16> = book.entry(service)?.members.iter().filter(|m| m.target == wanted).map(|m| m.id).collect();
        book.kill(&self.core, service, wanted)?;
        // No program gives it a connection any more.
        book.wait(&self.core)?;
        let judge = self.connections.judge()?;
        for (record, connection) in self.connections.live(&judge) {
            if ids.contains(&connection.backend) {
                self.connections.end(record, &connection);
            }
        }
        book.release(&self.core)
    }

    /// What was counted for a service.
    ///
    /// # Errors
    /// [`Error::UnknownService`]; [`Error::Map`].
    pub fn service_stats(&self, service: &ServiceAddr) -> Result<NatServiceStats> {
        let service = &service.unmapped();
        let number = self.book().entry(service)?.number;
        let (stats, [answers, answered_bytes, refused]) = service_stats(&self.core, number)?;
        Ok(NatServiceStats {
            forwarded: stats.received,
            answered: Count { packets: answers, bytes: answered_bytes },
            opened: stats.new_flows,
            no_backend: stats.no_backend,
            refused,
            too_big: stats.too_big,
        })
    }
}

/// A service with the backends that get or may get new connections.
fn service_of(entry: &crate::balancer::book::Entry) -> NatService {
    let staying = |state| matches!(state, BackendState::Active | BackendState::Draining);
    let share = |member: &crate::balancer::book::Member| {
        let weight = if member.state == BackendState::Active { member.weight } else { 0 };
        (SocketAddr::new(member.target.address, member.target.port), weight)
    };
    NatService {
        mode: if entry.record.flags & DESTINATION_ONLY != 0 { NatMode::Destination } else { NatMode::Full },
        scheduler: match (entry.record.scheduler, entry.record.flags & SERVICE_BY_SOURCE) {
            (BY_SLOT, 0) => Scheduler::Maglev,
            (BY_SLOT, _) => Scheduler::SourceHash,
            (LEAST_LOADED, _) => Scheduler::LeastConnections,
            _ => Scheduler::RoundRobin,
        },
        backends: entry.members.iter().filter(|member| staying(member.state)).map(share).collect(),
    }
}

fn target(backend: SocketAddr) -> Target {
    let backend = backend.unmapped();
    Target { address: backend.ip(), port: backend.port() }
}

/// Refuses what cannot be translated.
fn targets(service: &ServiceAddr, backends: &[(SocketAddr, u32)]) -> Result<Vec<(Target, u32)>> {
    if service.port.is_none() {
        let expected = "one port: others are for the connections to backends";
        return Err(Error::Invalid { what: "service", value: service.to_string(), expected });
    }
    let wrong =
        |backend: &SocketAddr, expected| Err(Error::Invalid { what: "backend", value: backend.to_string(), expected });
    for (backend, _) in backends {
        if backend.unmapped().is_ipv4() != service.address.is_ipv4() {
            return wrong(backend, "an address of the service's family");
        }
        if backend.port() == 0 {
            return wrong(backend, "a port from 1 to 65535");
        }
    }
    Ok(backends.iter().map(|(backend, weight)| (target(*backend), *weight)).collect())
}

/// Numbers of services fit a key.
const _: () = assert!(NUMBER_MAX > 4096);
