//! What programs are told of links: the map `links`.

use std::{collections::BTreeMap, io};

use super::{
    egress::{Transmit, leaving},
    links::LinkTable,
    neighbours::Neighbours,
};
use crate::{
    abi::next_hop::{Egress, LinkInfo, LinkKey, tags_word},
    base::NextHops,
};

/// What the map of a table holds.
#[derive(Debug)]
pub(super) struct LinkMap(BTreeMap<LinkKey, LinkInfo>);

impl LinkMap {
    /// As an earlier resolver has left it.
    pub(super) fn of(table: &NextHops) -> io::Result<Self> {
        let entries = table.links().entries().map_err(io::Error::other)?;
        Ok(Self(entries.into_iter().collect()))
    }

    /// Writes what differs.
    pub(super) fn write(&mut self, table: &NextHops, links: &LinkTable, transmit: Transmit) -> io::Result<()> {
        let now = entries_of(links, transmit);
        let map = table.links();
        for key in self.0.keys().filter(|key| !now.contains_key(key)) {
            map.remove(key).map_err(io::Error::other)?;
        }
        self.0.retain(|key, _| now.contains_key(key));
        // The interfaces themselves first, for there may be more VLANs than room.
        let (plain, tagged): (Vec<_>, Vec<_>) = now.into_iter().partition(|(key, _)| key.tags == 0);
        for (key, info) in plain.into_iter().chain(tagged) {
            if self.0.get(&key) == Some(&info) {
                continue;
            }
            match map.set(&key, &info) {
                Err(error) if error.raw_os_error() == Some(libc::E2BIG) => {}
                set => {
                    set?;
                    self.0.insert(key, info);
                }
            }
        }
        Ok(())
    }
}

/// What `links` is to hold.
fn entries_of(links: &LinkTable, transmit: Transmit) -> BTreeMap<LinkKey, LinkInfo> {
    let mut now = BTreeMap::new();
    let nobody = Neighbours::default();
    for (device, _) in links.iter() {
        let egress = leaving(links, &nobody, device, None, transmit).egress.word();
        let layer3 = links.layer3(device, &[]).unwrap_or_default();
        now.insert(LinkKey { device, tags: 0 }, LinkInfo { egress, layer3, reserved: 0 });
    }
    for (device, tags) in links.tagged_arrivals() {
        if let Some(layer3) = links.layer3(device, &tags) {
            let info = LinkInfo { egress: Egress::None.word(), layer3, reserved: 0 };
            now.insert(LinkKey { device, tags: tags_word(&tags) }, info);
        }
    }
    now
}

#[cfg(test)]
mod tests {
    //! These need root.

    use super::{
        super::links::{
            Kind,
            tests::{link, links, tag},
        },
        *,
    };
    use crate::{abi::next_hop::Tag, base::next_hops};

    #[test]
    fn only_what_differs_is_written() {
        let trunk = |id| links([(1, link(Kind::Device, None, None)), (2, link(Kind::Vlan(tag(id)), None, Some(1)))]);
        let table = next_hops();
        let mut map = LinkMap::of(&table).unwrap();
        map.write(&table, &trunk(100), Transmit::Native).unwrap();
        let entries = || table.links().entries().unwrap().into_iter().collect::<BTreeMap<_, _>>();
        let key = |device, tags: &[Tag]| LinkKey { device, tags: tags_word(tags) };
        let info = |egress: Egress, layer3| LinkInfo { egress: egress.word(), layer3, reserved: 0 };
        let plain = info(Egress::Device(1, vec![]), 1);
        assert_eq!(
            entries(),
            [
                (key(1, &[]), plain),
                (key(1, &[tag(100)]), info(Egress::None, 2)),
                (key(2, &[]), info(Egress::Device(1, vec![tag(100)]), 2)),
            ]
            .into()
        );
        // What others have written there shows that nobody writes it again.
        let other = info(Egress::None, 77);
        table.links().set(&key(1, &[]), &other).unwrap();
        map.write(&table, &trunk(200), Transmit::Native).unwrap();
        assert!(entries().keys().eq(&[key(1, &[]), key(1, &[tag(200)]), key(2, &[])]));
        assert_eq!(entries()[&key(1, &[])], other);
        // A resolver that comes later begins with what is there.
        LinkMap::of(&table).unwrap().write(&table, &trunk(200), Transmit::Native).unwrap();
        assert_eq!(entries()[&key(1, &[])], plain);
    }

    #[test]
    fn interfaces_come_before_vlans_where_there_is_no_room_for_all() {
        let vlans = (2..1500).map(|id| (id, link(Kind::Vlan(tag(id as u16)), None, Some(9000))));
        let all = vlans.chain([(9000, link(Kind::Device, None, None))]).collect();
        let table = next_hops();
        LinkMap::of(&table).unwrap().write(&table, &LinkTable::new(all), Transmit::Native).unwrap();
        let entries = table.links().entries().unwrap();
        assert!(entries.iter().all(|(key, _)| key.tags == 0));
    }
}
