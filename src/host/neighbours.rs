//! Neighbours and the stations that bridges have learnt, as the kernel tells them; and orders to the kernel about neighbours.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::IpAddr,
};

use netlink_packet_core::NLM_F_CREATE;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{
        NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage, NeighbourState,
    },
    route::RouteType,
};

use super::requests::Requests;

/// A neighbour by its interface.
pub(super) type Place = (u32, IpAddr);

/// What the kernel knows of a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Neighbour {
    /// Its address, while the kernel itself uses it.
    pub(super) mac: Option<[u8; 6]>,
    pub(super) standing: Standing,
    /// The kernel resolves it again by itself.
    pub(super) managed: bool,
}

/// Who sees to it that a neighbour's address is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// An administrator or a control plane that wrote it.
    Fixed,
    /// The kernel: it was confirmed lately, or is being asked for.
    Confirmed,
    /// Nobody, until something uses it.
    Doubtful,
}

/// What has become of a neighbour or a station; `None` when it is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Neighbour(Place, Option<Neighbour>),
    /// The port of the bridge by which the station with this MAC address is reached.
    Station(Station, Option<u32>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Station {
    pub(super) bridge: u32,
    /// 0 where the bridge does not filter.
    pub(super) vlan: u16,
    pub(super) mac: [u8; 6],
}

/// Mirrors of both tables.
#[derive(Debug, Default)]
pub(super) struct Neighbours {
    neighbours: BTreeMap<Place, Neighbour>,
    stations: HashMap<Station, u32>,
}

impl Neighbours {
    /// These and no others.
    pub(super) fn of(changes: Vec<Change>) -> Self {
        let mut all = Self::default();
        changes.into_iter().for_each(|change| all.apply(change));
        all
    }

    pub(super) fn apply(&mut self, change: Change) {
        match change {
            Change::Neighbour(place, Some(neighbour)) => drop(self.neighbours.insert(place, neighbour)),
            Change::Neighbour(place, None) => drop(self.neighbours.remove(&place)),
            Change::Station(station, Some(port)) => drop(self.stations.insert(station, port)),
            Change::Station(station, None) => drop(self.stations.remove(&station)),
        }
    }

    pub(super) fn get(&self, place: Place) -> Option<&Neighbour> {
        self.neighbours.get(&place)
    }

    pub(super) fn port_of(&self, station: Station) -> Option<u32> {
        self.stations.get(&station).copied()
    }
}

/// What a message tells; `None` for what concerns nobody here.
pub(super) fn change_of(message: &RouteNetlinkMessage) -> Option<Change> {
    let (entry, gone) = match message {
        RouteNetlinkMessage::NewNeighbour(entry) => (entry, false),
        RouteNetlinkMessage::DelNeighbour(entry) => (entry, true),
        _ => return None,
    };
    if entry.header.family == AddressFamily::Bridge {
        return station_of(entry, gone);
    }
    if entry.header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let (mut address, mut mac, mut managed) = (None, None, false);
    for attribute in &entry.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => address = Some(IpAddr::V4(*ip)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => address = Some(IpAddr::V6(*ip)),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            NeighbourAttribute::ExtFlags(flags) => managed = flags.contains(NeighbourExtFlags::Managed),
            _ => {}
        }
    }
    let (valid, standing) = match entry.header.state {
        NeighbourState::Permanent | NeighbourState::Noarp => (true, Standing::Fixed),
        NeighbourState::Reachable | NeighbourState::Delay | NeighbourState::Probe => (true, Standing::Confirmed),
        NeighbourState::Stale => (true, Standing::Doubtful),
        NeighbourState::Incomplete => (false, Standing::Confirmed),
        _ => (false, Standing::Doubtful),
    };
    let learned = entry.header.flags.contains(NeighbourFlags::ExtLearned);
    let neighbour =
        Neighbour { mac: mac.filter(|_| valid), standing: if learned { Standing::Fixed } else { standing }, managed };
    Some(Change::Neighbour((entry.header.ifindex, address?), (!gone).then_some(neighbour)))
}

/// A station that a bridge has learnt or was told of. Addresses of the bridge's own, and what ports know by themselves, are
/// none.
fn station_of(entry: &NeighbourMessage, gone: bool) -> Option<Change> {
    if entry.header.flags.contains(NeighbourFlags::Own) {
        return None;
    }
    let (mut bridge, mut mac, mut vlan) = (None, None, 0);
    for attribute in &entry.attributes {
        match attribute {
            NeighbourAttribute::Controller(index) => bridge = Some(*index),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            NeighbourAttribute::Vlan(id) => vlan = *id,
            _ => {}
        }
    }
    let local = entry.header.state == NeighbourState::Permanent;
    let port = (!gone && !local).then_some(entry.header.ifindex);
    Some(Change::Station(Station { bridge: bridge?, vlan, mac: mac? }, port))
}

/// Has the kernel manage a neighbour (`NTF_EXT_MANAGED`), and see to it at once (`NTF_USE`).
pub(super) fn manage(requests: &mut Requests, place: Place) -> io::Result<()> {
    let mut entry = entry(place, NeighbourFlags::Use);
    entry.attributes.push(NeighbourAttribute::ExtFlags(NeighbourExtFlags::Managed));
    requests.order(RouteNetlinkMessage::NewNeighbour(entry), NLM_F_CREATE)
}

/// Leaves a neighbour to what uses it. An order without a flag takes the flag away.
pub(super) fn release(requests: &mut Requests, place: Place) -> io::Result<()> {
    requests.order(RouteNetlinkMessage::NewNeighbour(entry(place, NeighbourFlags::Use)), 0)
}

/// Has a neighbour whose address is known asked whether it is still there, so that bridges on the path learn where it is.
pub(super) fn probe(requests: &mut Requests, place: Place) -> io::Result<()> {
    let mut entry = entry(place, NeighbourFlags::empty());
    entry.header.state = NeighbourState::Probe;
    requests.order(RouteNetlinkMessage::NewNeighbour(entry), 0)?;
    manage(requests, place)
}

fn entry((interface, address): Place, flags: NeighbourFlags) -> NeighbourMessage {
    let mut entry = NeighbourMessage::default();
    entry.header.ifindex = interface;
    entry.header.flags = flags;
    entry.header.kind = RouteType::Unicast;
    let address = match address {
        IpAddr::V4(ip) => {
            entry.header.family = AddressFamily::Inet;
            NeighbourAddress::Inet(ip)
        }
        IpAddr::V6(ip) => {
            entry.header.family = AddressFamily::Inet6;
            NeighbourAddress::Inet6(ip)
        }
    };
    entry.attributes = vec![NeighbourAttribute::Destination(address)];
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(state: NeighbourState, flags: NeighbourFlags) -> Neighbour {
        let mut message = entry((3, IpAddr::from([192, 0, 2, 1])), flags);
        message.header.state = state;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(vec![2, 0, 0, 0, 0, 1]));
        match change_of(&RouteNetlinkMessage::NewNeighbour(message)) {
            Some(Change::Neighbour(_, Some(neighbour))) => neighbour,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_address_counts_while_the_kernel_uses_it() {
        use NeighbourState::{Delay, Failed, Incomplete, Noarp, None, Permanent, Probe, Reachable, Stale};
        let plain = |state| told(state, NeighbourFlags::empty());
        for (state, valid, standing) in [
            (Reachable, true, Standing::Confirmed),
            (Delay, true, Standing::Confirmed),
            (Probe, true, Standing::Confirmed),
            (Stale, true, Standing::Doubtful),
            (Incomplete, false, Standing::Confirmed),
            (Failed, false, Standing::Doubtful),
            (None, false, Standing::Doubtful),
            (Permanent, true, Standing::Fixed),
            (Noarp, true, Standing::Fixed),
        ] {
            assert_eq!((plain(state).mac.is_some(), plain(state).standing), (valid, standing), "{state}");
        }
        assert_eq!(told(Stale, NeighbourFlags::ExtLearned).standing, Standing::Fixed);
    }

    #[test]
    fn stations_are_those_of_ports() {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = 4;
        message.header.state = NeighbourState::Reachable;
        let mac = [2, 0, 0, 0, 0, 1];
        message.attributes = vec![
            NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
            NeighbourAttribute::Controller(9),
            NeighbourAttribute::Vlan(100),
        ];
        let station = Station { bridge: 9, vlan: 100, mac };
        let change = |message: &NeighbourMessage| change_of(&RouteNetlinkMessage::NewNeighbour(message.clone()));
        assert_eq!(change(&message), Some(Change::Station(station, Some(4))));
        let gone = change_of(&RouteNetlinkMessage::DelNeighbour(message.clone()));
        assert_eq!(gone, Some(Change::Station(station, None)));
        message.header.state = NeighbourState::Permanent;
        assert_eq!(change(&message), Some(Change::Station(station, None)), "the bridge's own");
        message.header.flags = NeighbourFlags::Own;
        assert_eq!(change(&message), None);
    }
}
