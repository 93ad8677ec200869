//! Slots in transition, from the side that begins transitions: mirror of `bpf/include/dsr_transition.h`.

use std::{mem::offset_of, net::SocketAddr, time::Duration};

use bytemuck::Zeroable as _;

use crate::{
    Result,
    abi::{
        dsr_balancer::{
            CLOSING, Paths, RECORD_KIND_SHIFT, RECORD_SIDE, RECORD_TIME_SHIFT, Settings, Side, TIME_SHIFT, Transition,
        },
        service::{Address, Backend, SLOT_BACKEND, SLOT_PREVIOUS_SHIFT},
    },
    balancer::{SlotRule, hash::raw4},
    base::{Records, StageCore},
    flow_table::FlowTable,
    sys::{self, mmap::LongMapping},
};

/// A time of the kernel's clock in the program's unit.
pub(super) fn time(duration: Duration) -> u32 {
    (duration.as_nanos() >> TIME_SHIFT) as u32
}

/// A length of time in the program's unit: not shorter than asked, and one that can be told from the past.
pub(super) fn length(duration: Duration) -> u32 {
    u32::try_from((duration.as_nanos() >> TIME_SHIFT) + 1).unwrap_or(u32::MAX).min(i32::MAX as u32)
}

pub(super) fn now() -> u32 {
    time(sys::monotonic_coarse())
}

/// How slots change hands, and the flows that are remembered meanwhile.
#[derive(Debug)]
pub(super) struct Transitions {
    transitions: Records<Transition>,
    pub(super) settings: Records<Settings>,
    flows: FlowTable<LongMapping>,
    sides: Records<Side>,
    paths: Records<Paths>,
}

/// What is known of a flow whose slot is in transition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Recorded {
    /// A record names this backend. `closing`: a SYN would begin another flow.
    Backend { id: u16, closing: bool },
    /// Nothing.
    Unknown,
}

impl Transitions {
    pub(super) fn of(core: &StageCore, flows: FlowTable<LongMapping>) -> Result<Self> {
        Ok(Self {
            transitions: Records::of(core, "transitions")?,
            settings: Records::of(core, "settings")?,
            flows,
            sides: Records::of(core, "flow_sides")?,
            paths: Records::of(core, "paths")?,
        })
    }

    /// Whether a slot's transition is over: nothing was sent elsewhere for long, or it has lasted too long.
    pub(super) fn is_over(&self, slot: u32, now: u32) -> bool {
        let settings = self.settings.read(0);
        let Transition { begin, last } = self.transitions.read(slot);
        let since = |then: u32| now.wrapping_sub(then) as i32;
        since(last) > settings.idle as i32 || since(begin) > settings.longest as i32
    }

    pub(super) fn begin_of(&self, slot: u32) -> u32 {
        self.transitions.read(slot).begin
    }

    /// Whether an unknown UDP flow counts as a new one by now.
    pub(super) fn is_past_grace(&self, slot: u32, now: u32) -> bool {
        now.wrapping_sub(self.begin_of(slot)) > self.settings.read(0).udp_grace
    }

    /// What is recorded of a flow since its slot's transition began. `any_port`: of a service on any port.
    pub(super) fn find(&self, slot: u32, service: u16, client: SocketAddr, port: u16, any_port: bool) -> Recorded {
        let ports = u32::from(port.to_be()) << 16 | u32::from(client.port().to_be());
        let address = Address::from(client.ip());
        let exact = match client.ip() {
            std::net::IpAddr::V4(ip) if !any_port => Some(raw4(ip)),
            _ => None,
        };
        let secret = self.flows.secret();
        let key = match exact {
            Some(raw) => {
                let low = u64::from(ports & 0xffff) << 12 | u64::from(service);
                secret.key(u64::from(raw) << 28 | low)
            }
            None => {
                let [a, b] = address.0;
                secret.hash(&[a as u32, (a >> 32) as u32, b as u32, (b >> 32) as u32, ports, service.into()])
            }
        };
        let Some(entry) = self.flows.get(key) else { return Recorded::Unknown };
        let value = entry.value();
        if exact.is_some() == (value & RECORD_SIDE != 0) {
            return Recorded::Unknown;
        }
        if exact.is_none() {
            let side = self.sides.read(entry.slot);
            if (side.client, side.ports, side.service) != (address, ports, service.into()) {
                return Recorded::Unknown;
            }
        }
        let then = (value >> RECORD_TIME_SHIFT) as u32;
        if (then.wrapping_sub(self.begin_of(slot)) as i32) < 0 {
            return Recorded::Unknown;
        }
        let closing = value >> RECORD_KIND_SHIFT & 3 == CLOSING;
        Recorded::Backend { id: (value & u64::from(SLOT_BACKEND)) as u16, closing }
    }

    /// Flows that are remembered: reads the whole table.
    pub(super) fn recorded(&self) -> usize {
        self.flows.len()
    }
}

impl SlotRule for Transitions {
    fn change(&self, slot: u32, word: u32, wanted: u16, is_killed: &dyn Fn(u16) -> bool) -> u32 {
        let (present, mut previous) = ((word & SLOT_BACKEND) as u16, (word >> SLOT_PREVIOUS_SHIFT) as u16);
        let now = now();
        if previous != 0 && self.is_over(slot, now) {
            previous = 0;
        }
        let with = |previous: u16| u32::from(wanted) | u32::from(previous) << SLOT_PREVIOUS_SHIFT;
        if present == wanted {
            return with(previous);
        }
        if previous != 0 {
            // Flows of the present backend are recorded. The last one served without records stays what it is.
            self.transitions.set(slot, offset_of!(Transition, last), now);
            return with(previous);
        }
        if present == 0 || is_killed(present) {
            return with(0);
        }
        self.transitions.write(slot, &Transition { begin: now, last: now });
        with(present)
    }

    fn now(&self) -> u64 {
        now().into()
    }

    fn forget(&self, id: u16) {
        self.paths.write(id.into(), &Paths::zeroed());
    }

    /// Records may name it in slots whose transition began before it left.
    fn holds(&self, _id: u16, record: &Backend, slots: &mut dyn Iterator<Item = (u32, u32)>) -> bool {
        let left = record.function[0] as u32;
        let may_name = |(slot, word): (u32, u32)| {
            word >> SLOT_PREVIOUS_SHIFT != 0 && (left.wrapping_sub(self.begin_of(slot)) as i32) >= 0
        };
        let mut slots = slots;
        Iterator::any(&mut slots, may_name)
    }
}
