//! Connections, as a program that uses the balancer lists, finds and ends them.

use std::{net::SocketAddr, time::Duration};

use super::{
    Connection, ConnectionCounts, ConnectionState, NatBalancer,
    rule::NatRule,
    table::{self, Judge, state_of},
};
use crate::{Result, ServiceAddr, abi::nat_balancer as abi, address::Unmapped as _, balancer::Book};

impl NatBalancer {
    /// All connections: reads every record, some 50 ms for a capacity of a million.
    ///
    /// # Errors
    /// [`Error::TestRun`](crate::Error::TestRun) when the kernel's clock cannot be read.
    pub fn connections(&self) -> Result<Vec<Connection>> {
        let judge = self.connections.judge()?;
        let book = self.book();
        Ok(self.connections.live(&judge).filter_map(|(at, raw)| self.resolve(&book, &judge, at, raw)).collect())
    }

    /// How many connections there are, by state. Reads every record.
    ///
    /// # Errors
    /// As [`NatBalancer::connections`].
    pub fn counts(&self) -> Result<ConnectionCounts> {
        let judge = self.connections.judge()?;
        let mut counts = ConnectionCounts::default();
        for (_, connection) in self.connections.live(&judge) {
            counts.0[state_of(table::flags_of(connection.word))] += 1;
        }
        Ok(counts)
    }

    /// The connection of a client to a service.
    ///
    /// # Errors
    /// [`Error::UnknownService`](crate::Error::UnknownService); as [`NatBalancer::connections`].
    pub fn find(&self, client: SocketAddr, service: &ServiceAddr) -> Result<Option<Connection>> {
        let (client, service) = (client.unmapped(), &service.unmapped());
        let judge = self.connections.judge()?;
        let book = self.book();
        let number = book.entry(service)?.number;
        let Some(record) = self.connections.find(client, number) else { return Ok(None) };
        let found = self.connections.read(record, &judge).and_then(|raw| self.resolve(&book, &judge, record, raw));
        Ok(found.filter(|found| found.client == client && found.service == *service))
    }

    /// The connection whose packets a backend sends from `backend` to `destination`. Reads the records.
    ///
    /// # Errors
    /// As [`NatBalancer::connections`].
    pub fn find_by_backend(&self, backend: SocketAddr, destination: SocketAddr) -> Result<Vec<Connection>> {
        let (backend, destination) = (backend.unmapped(), destination.unmapped());
        let mut all = self.connections()?;
        all.retain(|connection| connection.backend == backend && connection.source == destination);
        Ok(all)
    }

    fn resolve(&self, book: &Book<NatRule>, judge: &Judge, record: u32, raw: abi::Connection) -> Option<Connection> {
        let (service, member) = book.member(raw.backend).filter(|(_, member)| member.identity == raw.identity)?;
        let flags = table::flags_of(raw.word);
        let family = if flags & abi::IPV6 != 0 { 3 } else { 2 };
        let client = SocketAddr::new(raw.client.get(family)?, u16::from_be(raw.client_port));
        let address = if flags & abi::KEPT_SOURCE != 0 { client.ip() } else { book.address(raw.address)? };
        let hertz = f64::from(self.connections.clock.hertz());
        Some(Connection {
            service: *service,
            client,
            source: SocketAddr::new(address, u16::from_be(raw.port)),
            backend: SocketAddr::new(member.target.address, member.target.port),
            state: ConnectionState::ALL[state_of(flags)],
            idle: Duration::from_secs_f64(f64::from(judge.idle(raw.word)) / hertz),
            record,
            raw,
        })
    }

    /// Terminates a connection; later packets no longer match it. Returns `false` if it was already gone.
    ///
    /// # Errors
    /// [`Error::Superseded`](crate::Error::Superseded).
    pub fn end(&self, connection: &Connection) -> Result<bool> {
        let _edit = self.edit()?;
        Ok(self.connections.end(connection.record, &connection.raw))
    }

    /// Frees the places of connections that have been silent for too long, and forgets backends that are leaving and
    /// have none left. Answers how many connections those were. The data path uses such places again by itself; calling
    /// this every second or minute keeps lists and counts true. Nothing waits meanwhile.
    ///
    /// # Errors
    /// [`Error::Map`](crate::Error::Map), [`Error::TestRun`](crate::Error::TestRun),
    /// [`Error::Superseded`](crate::Error::Superseded).
    pub fn collect(&self) -> Result<usize> {
        let mut book = self.edit()?;
        let collected = self.connections.collect(&self.connections.judge()?);
        book.release(&self.core)?;
        Ok(collected)
    }

    /// Whether nothing of any connection is left anywhere, dead ones included. For tests and the curious: reads all tables.
    ///
    /// # Errors
    /// As [`NatBalancer::connections`].
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.counts()?.total() == 0 && self.connections.entries() == 0)
    }
}
