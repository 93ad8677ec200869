//! Taking over the tables of an earlier process, which may have died in the middle of a change.

use std::mem::offset_of;

use super::{Book, Entry, Member, SlotRule, Target};
use crate::{
    Result,
    abi::service::{BACKEND_DRAINING, BACKEND_KILLED, BACKEND_REMOVED, BACKEND_USED, SERVICE_USED, Service},
    balancer::{BackendState, ServiceAddr, ServiceProtocol, index::Key, store::lines_of},
    base::StageCore,
};

impl<R: SlotRule> Book<R> {
    /// Reads the records, and brings indices and slots to what they say: what was begun is finished.
    pub(crate) fn adopt(core: &StageCore, rule: R) -> Result<Self> {
        let mut book = Self::open(core, rule, 0)?;
        book.table_size = book.settings.read(0).table_size;
        book.read_services(core);
        let left = book.read_backends(core);
        book.forget(core, &left)?;
        book.repair_indices();
        book.addresses.keys().for_each(|address| book.set_echo_service(*address));
        let services: Vec<ServiceAddr> = book.entries.keys().copied().collect();
        for service in services {
            if let Err(error) = book.rebuild(&service) {
                core.dropped(format!("the last change of {service}'s slots: {error}"));
            }
        }
        book.release(core)?;
        Ok(book)
    }

    fn read_services(&mut self, core: &StageCore) {
        for number in 1..self.vips.len() {
            let vip = self.vips.read(number);
            if let (Some(address), true) = (vip.address.get(vip.family), vip.held != 0) {
                self.addresses.insert(address, number as u16);
                self.held.insert(address);
            }
        }
        for number in 1..self.services.len() {
            let record = self.services.read(number);
            if record.flags & SERVICE_USED == 0 {
                continue;
            }
            let vip = Some(record.vip).filter(|vip| (1..self.vips.len()).contains(vip)).map(|vip| self.vips.read(vip));
            let own_slots =
                (record.first_line, record.slots) == ((number - 1) * lines_of(self.table_size), self.table_size);
            let address = vip.filter(|_| own_slots).and_then(|vip| vip.address.get(vip.family));
            let (Some(address), Some(protocol)) = (address, ServiceProtocol::from_number(record.protocol)) else {
                core.dropped(format!("service {number}: its record is not whole"));
                self.services.set(number, offset_of!(Service, flags), 0);
                continue;
            };
            let port = Some(u16::from_be(record.port)).filter(|port| *port != 0);
            let service = ServiceAddr { protocol, address, port };
            self.addresses.insert(address, record.vip as u16);
            self.entries.insert(service, Entry { number: number as u16, record, members: Vec::new() });
        }
    }

    /// Answers those of no service: their process died while it removed or added one. They may not wait for the next
    /// service of that number.
    fn read_backends(&mut self, core: &StageCore) -> Vec<u16> {
        let mut left = Vec::new();
        self.fresh = self.backends.len() as u16;
        for id in 1..self.backends.len() {
            let record = self.backends.read(id);
            let id = id as u16;
            let entry = self.entries.values_mut().find(|entry| u32::from(entry.number) == record.service);
            if record.flags & BACKEND_USED == 0 {
                self.free.push(id);
                continue;
            }
            let (Some(entry), Some(address)) = (entry, record.address.get(record.family)) else {
                if record.address.get(record.family).is_none() {
                    core.dropped(format!("backend {id}: its record is not whole"));
                }
                left.push(id);
                continue;
            };
            let state = match record.flags {
                flags if flags & BACKEND_KILLED != 0 => BackendState::Killed,
                flags if flags & BACKEND_REMOVED != 0 => BackendState::Leaving,
                flags if flags & BACKEND_DRAINING != 0 => BackendState::Draining,
                _ => BackendState::Active,
            };
            let target = Target { address, port: u16::from_be(record.port) };
            entry.members.push(Member { id, target, weight: record.weight, state, identity: record.identity });
        }
        // The lowest first, as in a new book.
        self.free.reverse();
        for entry in self.entries.values_mut() {
            entry.members.sort_by_key(|member| member.identity);
        }
        left
    }

    fn repair_indices(&mut self) {
        let vips: Vec<_> = self.addresses.iter().map(|(address, number)| (Key::vip(*address), *number)).collect();
        let services: Vec<_> = self
            .entries
            .iter()
            .map(|(service, entry)| (Key::service(entry.record.vip as u16, service), entry.number))
            .collect();
        self.addresses.keys().for_each(|address| self.expect_vip(*address));
        for (index, wanted) in [(&self.vip_index, vips), (&self.service_index, services)] {
            index.retain(|word| wanted.iter().any(|(key, number)| key.is(word, *number)));
            for (key, number) in wanted {
                if index.find(key).is_none() {
                    // There was room for it when it was added, and nothing was added since.
                    let _ = index.insert(key, number);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    //! These need root.

    use super::*;
    use crate::{DsrBalancer, DsrConfig, abi::service::Backend, balancer::BookConfig, stage::sealed::Sealed as _};

    /// Slots go from one backend to the next at once, and nothing else leads to one.
    #[derive(Debug)]
    struct AtOnce;

    impl SlotRule for AtOnce {
        fn change(&self, _slot: u32, _word: u32, wanted: u16, _is_killed: &dyn Fn(u16) -> bool) -> u32 {
            wanted.into()
        }

        fn now(&self) -> u64 {
            0
        }

        fn holds(&self, _id: u16, _record: &Backend, _slots: &mut dyn Iterator<Item = (u32, u32)>) -> bool {
            false
        }
    }

    #[test]
    fn echo_requests_do_not_go_by_a_service_that_was_half_removed() {
        let balancer = DsrBalancer::load(&DsrConfig::default()).expect("needs root");
        let core = balancer.core();
        let mut book = Book::adopt(core, AtOnce).unwrap();
        let record = bytemuck::Zeroable::zeroed();
        for text in ["tcp/10.0.0.100:80", "tcp/10.0.0.100:81"] {
            book.insert_service(core, text.parse().unwrap(), record, &[]).unwrap();
        }
        let echo = |book: &Book<AtOnce>| book.vips.read(1).echo;
        assert_eq!(echo(&book), 1);
        // Its process dies over it.
        book.services.set(1, std::mem::offset_of!(crate::abi::service::Service, flags), 0);
        assert_eq!(echo(&Book::adopt(core, AtOnce).unwrap()), 2);
    }

    #[test]
    fn backends_of_a_service_that_was_half_removed_do_not_come_back_with_the_next_one() {
        let balancer = DsrBalancer::load(&DsrConfig::default()).expect("needs root");
        let core = balancer.core();
        let config = BookConfig {
            services: 64,
            backends: 1024,
            table_size: crate::maglev::DEFAULT_SIZE,
            held: 0,
            seed: 0,
            echo: crate::Echo::Answer,
            answers_per_second: 1,
        };
        let target = |last: u8| Target { address: std::net::Ipv4Addr::new(192, 168, 178, last).into(), port: 80 };
        let service = |text: &str| text.parse::<ServiceAddr>().unwrap();
        let (old, next) = (service("tcp/10.0.0.100:80"), service("tcp/10.0.0.101:80"));
        let record = bytemuck::Zeroable::zeroed();
        let mut book = Book::new(core, &config, AtOnce).unwrap();
        book.insert_service(core, old, record, &[(target(11), 1), (target(12), 1), (target(13), 1)]).unwrap();
        // Its process dies over it.
        book.services.set(1, std::mem::offset_of!(crate::abi::service::Service, flags), 0);
        let mut book = Book::adopt(core, AtOnce).unwrap();
        book.insert_service(core, next, record, &[(target(14), 1)]).unwrap();
        let book = Book::adopt(core, AtOnce).unwrap();
        let members: Vec<_> = book.entry(&next).unwrap().members.iter().map(|member| member.target).collect();
        assert_eq!(members, [target(14)]);
    }

    #[test]
    fn records_that_are_not_whole_are_dropped_with_an_account() {
        let balancer = DsrBalancer::load(&DsrConfig::default()).expect("needs root");
        let core = balancer.core();
        let target = |last: u8| Target { address: std::net::Ipv4Addr::new(192, 168, 178, last).into(), port: 0 };
        let mut book = Book::adopt(core, AtOnce).unwrap();
        let record = bytemuck::Zeroable::zeroed();
        for text in ["tcp/10.0.0.100:80", "tcp/10.0.0.101:80", "tcp/10.0.0.102:80"] {
            book.insert_service(core, text.parse().unwrap(), record, &[(target(11), 1), (target(12), 1)]).unwrap();
        }
        // Slots that are another service's; and a backend that is nowhere.
        book.services.set(2, offset_of!(Service, first_line), 0);
        book.backends.set(1, offset_of!(Backend, family), 9);
        let book = Book::adopt(core, AtOnce).unwrap();
        let left: Vec<String> = book.entries().map(|(service, _)| service.to_string()).collect();
        assert_eq!(left, ["tcp/10.0.0.100:80", "tcp/10.0.0.102:80"]);
        let members = |text: &str| book.entry(&text.parse().unwrap()).unwrap().members.len();
        assert_eq!((members("tcp/10.0.0.100:80"), members("tcp/10.0.0.102:80")), (1, 2));
        assert_eq!(core.recovery().dropped.len(), 2, "{:?}", core.recovery());
    }
}
