//! What rtnetlink tells of an interface (`RTM_GETLINK`): its link type, its driver's kind, what it belongs to.

use std::{ffi::CStr, io};

use super::netlink;

/// `struct ifinfomsg`.
const MESSAGE: usize = 16;
/// `IFLA_INFO_SLAVE_KIND` in `IFLA_LINKINFO`.
const INFO_SLAVE_KIND: u16 = 4;
/// `IFLA_XDP_DRV_PROG_ID` in `IFLA_XDP`.
const XDP_NATIVE: u16 = 5;

/// An interface, as the kernel describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Device {
    /// `ARPHRD_*`: what its frames begin with.
    pub(crate) link_type: u16,
    pub(crate) name: String,
    /// `None` for a device without one.
    pub(crate) mac: Option<[u8; 6]>,
    /// `veth`, `bond`, `wireguard`, ...; empty for hardware.
    pub(crate) kind: String,
    pub(crate) mtu: u32,
    /// Transmit queues that it was made with; fewer may be in use.
    pub(crate) transmit_queues: u32,
    /// Index of the bond, team or bridge that it belongs to, and the kind of that.
    pub(crate) master: Option<(u32, String)>,
    /// Of a veth end, the other one.
    pub(crate) peer: Option<Peer>,
    /// Id of its native XDP program; 0: none.
    pub(crate) native_program: u32,
}

/// Where the other end of a veth pair is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    index: u32,
    /// The id by which this namespace knows the other one's; `None` for the same.
    namespace: Option<i32>,
}

/// An interface of the calling thread's network namespace.
pub(crate) fn describe(index: u32) -> io::Result<Device> {
    get(index, None)
}

impl Device {
    /// The other end of a veth pair, in whatever namespace it is; an error where this process may not look there.
    pub(crate) fn peer(&self) -> io::Result<Option<Self>> {
        match self.peer {
            Some(peer) if self.kind == "veth" => get(peer.index, peer.namespace).map(Some),
            _ => Ok(None),
        }
    }

    /// Whether its frames have the header that programs parse.
    pub(crate) fn is_ethernet(&self) -> bool {
        matches!(self.link_type, libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK)
    }

    /// Its link type, and the kind of its driver where there is one.
    pub(crate) fn type_name(&self) -> String {
        let name = match self.link_type {
            libc::ARPHRD_PPP => "PPP",
            libc::ARPHRD_TUNNEL => "IP-in-IP",
            libc::ARPHRD_TUNNEL6 => "IPv6 tunnel",
            libc::ARPHRD_SIT => "SIT",
            libc::ARPHRD_IPGRE => "GRE",
            823 => "GRE over IPv6", // ARPHRD_IP6GRE
            519 => "raw IP",        // ARPHRD_RAWIP
            libc::ARPHRD_INFINIBAND => "InfiniBand",
            libc::ARPHRD_IEEE80211_RADIOTAP => "802.11 with radiotap",
            824 => "netlink monitor", // ARPHRD_NETLINK
            280 => "CAN",             // ARPHRD_CAN
            libc::ARPHRD_NONE => "none",
            _ => "unknown",
        };
        let driver = if self.kind.is_empty() { String::new() } else { format!(", driver {}", self.kind) };
        format!("link type {name} ({}){driver}", self.link_type)
    }
}

/// The members of a bond, team or bridge.
pub(crate) fn members_of(master: u32) -> Vec<(u32, Device)> {
    let devices = indices().into_iter().filter_map(|index| Some((index, describe(index).ok()?)));
    devices.filter(|(_, device)| device.master.as_ref().is_some_and(|(index, _)| *index == master)).collect()
}

/// All interfaces of the namespace.
fn indices() -> Vec<u32> {
    // SAFETY: no pointers are involved.
    let list = unsafe { libc::if_nameindex() };
    let mut found = Vec::new();
    if list.is_null() {
        return found;
    }
    let mut at = list;
    // SAFETY: the list ends with an entry of index 0, before which every entry is valid.
    while unsafe { (*at).if_index } != 0 {
        // SAFETY: as above.
        found.push(unsafe { (*at).if_index });
        // SAFETY: as above, so there is another entry.
        at = unsafe { at.add(1) };
    }
    // SAFETY: the list is the call's, and nothing points into it any more.
    unsafe { libc::if_freenameindex(list) };
    found
}

fn get(index: u32, namespace: Option<i32>) -> io::Result<Device> {
    let mut request = vec![0_u8; MESSAGE];
    request[4..8].copy_from_slice(&index.to_ne_bytes());
    if let Some(namespace) = namespace {
        netlink::put(&mut request, libc::IFLA_TARGET_NETNSID, &namespace.to_ne_bytes());
    }
    let answer = netlink::ask(libc::RTM_GETLINK, &request)?;
    parse(&answer).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer is cut short"))
}

fn parse(answer: &[u8]) -> Option<Device> {
    let link_type = u16::from_ne_bytes(*answer.get(2..)?.first_chunk()?);
    let mut device = Device { link_type, ..Device::default() };
    let (mut master, mut master_kind, mut link, mut namespace) = (None, String::new(), None, None);
    for (kind, value) in netlink::attributes(answer.get(MESSAGE..)?) {
        match kind {
            libc::IFLA_IFNAME => device.name = text(value),
            libc::IFLA_ADDRESS => device.mac = value.try_into().ok(),
            libc::IFLA_MTU => device.mtu = netlink::u32_of(value)?,
            libc::IFLA_NUM_TX_QUEUES => device.transmit_queues = netlink::u32_of(value)?,
            libc::IFLA_MASTER => master = netlink::u32_of(value),
            libc::IFLA_LINK => link = netlink::u32_of(value),
            libc::IFLA_LINK_NETNSID => namespace = netlink::u32_of(value).map(|id| id as i32),
            libc::IFLA_LINKINFO => {
                for (kind, value) in netlink::attributes(value) {
                    match kind {
                        libc::IFLA_INFO_KIND => device.kind = text(value),
                        INFO_SLAVE_KIND => master_kind = text(value),
                        _ => {}
                    }
                }
            }
            libc::IFLA_XDP => {
                for (kind, value) in netlink::attributes(value) {
                    if kind == XDP_NATIVE {
                        device.native_program = netlink::u32_of(value)?;
                    }
                }
            }
            _ => {}
        }
    }
    device.master = master.map(|index| (index, master_kind));
    device.peer = link.map(|index| Peer { index, namespace });
    Some(device)
}

fn text(value: &[u8]) -> String {
    CStr::from_bytes_until_nul(value).unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_described() {
        let index = super::super::net::index_of("lo").expect("every namespace has one");
        let device = describe(index).unwrap();
        assert_eq!((device.link_type, device.name.as_str()), (libc::ARPHRD_LOOPBACK, "lo"));
        assert!(device.is_ethernet() && device.mtu > 0 && device.peer().unwrap().is_none());
        assert_eq!(describe(0x7fff_fff0).unwrap_err().raw_os_error(), Some(libc::ENODEV));
    }

    #[test]
    fn link_types_have_names() {
        let of = |link_type, kind: &str| Device { link_type, kind: kind.into(), ..Device::default() };
        assert_eq!(of(libc::ARPHRD_NONE, "wireguard").type_name(), "link type none (65534), driver wireguard");
        assert_eq!(of(libc::ARPHRD_PPP, "").type_name(), "link type PPP (512)");
        for foreign in [512, 519, 768, 769, 776, 778, 803, 823, 65534] {
            assert!(!of(foreign, "").is_ethernet(), "{foreign}");
        }
        assert!(of(1, "").is_ethernet() && of(772, "").is_ethernet());
    }
}
