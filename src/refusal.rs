//! What the kernel's refusal to attach means: whose program stands there, what is missing, what the driver cannot.

use std::{io, os::fd::BorrowedFd};

use crate::{
    Error, Interface, XdpMode,
    sys::{
        self,
        device::{self, Device},
        net::{Channels, Offload},
        privilege,
    },
};

/// The error for an attachment that was refused. [`Error::ModeRefused`] for everything that means "not in this mode".
pub(crate) fn explain(
    interface: &Interface,
    program: BorrowedFd<'_>,
    mode: XdpMode,
    flags: u32,
    cause: io::Error,
) -> Error {
    let name = interface.name().to_owned();
    if let Some(error) = privilege::refusal(format!("attaching XDP to `{name}`"), &cause) {
        return error;
    }
    match cause.raw_os_error() {
        Some(libc::ENODEV) => return Error::UnknownInterface { interface: name },
        Some(libc::EBUSY | libc::EEXIST) => {
            let foreign = foreign(interface, None).or_else(|| {
                let (master, _) = interface.describe().ok()?.master?;
                foreign(&Interface::by_index(master).ok()?, Some(name.clone()))
            });
            if let Some(error) = foreign {
                return error;
            }
        }
        _ => {}
    }
    let hint = if mode == XdpMode::Offload {
        "offload takes a program made for the card, which ours are not".to_owned()
    } else {
        let words = sys::net::refusal_words(interface.index(), program, flags);
        Situation::of(interface, words).hint(interface.name(), cause.raw_os_error().unwrap_or(0), mode)
    };
    Error::ModeRefused { interface: name, mode, hint, cause }
}

fn foreign(interface: &Interface, member: Option<String>) -> Option<Error> {
    let program_id = sys::net::xdp_state(interface.index()).ok()?.program()?;
    let program = sys::program::name_of(program_id);
    Some(Error::ForeignProgram { interface: interface.name().to_owned(), member, program_id, program })
}

/// What is known of an interface that refuses a mode.
#[derive(Debug, Default)]
struct Situation {
    /// The kernel's own words.
    words: Option<String>,
    device: Device,
    /// Name of the bond, team or bridge that it belongs to.
    master: Option<String>,
    /// What stands against native XDP at each of its own members.
    members: Vec<String>,
    channels: Option<Channels>,
    /// The other end of a veth pair.
    peer: Option<Device>,
    large_receive: bool,
}

impl Situation {
    fn of(interface: &Interface, words: Option<String>) -> Self {
        let device = interface.describe().unwrap_or_default();
        let master = device.master.as_ref().and_then(|(index, _)| sys::net::name_of(*index));
        let bundle = matches!(device.kind.as_str(), "bond" | "team");
        let members = if bundle { device::members_of(interface.index()) } else { Vec::new() };
        Self {
            words,
            master,
            members: members.into_iter().map(|(index, member)| state_of_member(index, &member.name)).collect(),
            channels: sys::net::channels(interface.name()).ok(),
            peer: device.peer().ok().flatten(),
            large_receive: sys::net::offload_is_on(interface.name(), Offload::LargeReceive).unwrap_or(false),
            device,
        }
    }

    fn hint(&self, name: &str, errno: i32, mode: XdpMode) -> String {
        let words = self.words.clone().unwrap_or_default();
        let says = |any: &[&str]| any.iter().any(|word| words.to_lowercase().contains(word));
        // Where the kernel is silent, everything is told that may be behind this number.
        let limits = words.is_empty() && matches!(errno, libc::EINVAL | libc::ERANGE | libc::E2BIG);
        let full = words.is_empty() && matches!(errno, libc::ENOSPC | libc::ENOMEM);
        let mut hints = Vec::new();
        if !words.is_empty() {
            hints.push(format!("the kernel says: {words}"));
        }
        if let (Some(master), Some((_, kind))) = (&self.master, &self.device.master)
            && matches!(kind.as_str(), "bond" | "team")
        {
            hints.push(format!("it is a member of the {kind} `{master}`"));
        }
        if !self.members.is_empty() {
            hints.push(format!(
                "every member of a {} has to support native XDP and be without a program: {}",
                self.device.kind,
                self.members.join(", ")
            ));
        }
        if says(&["queue", "channel", " ring"]) || limits || full {
            hints.extend(self.queues(name));
        }
        if says(&["mtu", "frame size", "frame length"]) || limits {
            hints.push(format!("its MTU is {}: ip link set {name} mtu N", self.device.mtu));
            if let Some(peer) = &self.peer {
                hints.push(format!("that of the other end `{}` is {}", peer.name, peer.mtu));
            }
        }
        if says(&["lro", "large receive"]) || (self.large_receive && words.is_empty()) {
            hints.push(format!("LRO stands against it: ethtool -K {name} lro off"));
        }
        if says(&["gro_hw", "gro-hw", "csum", "guest"]) {
            hints.push(format!(
                "ethtool -K {name} lro off rx-gro-hw off; where that is fixed, as on virtio without control of guest \
                 offloads, the hypervisor has to take them off the device (QEMU: \
                 guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off)"
            ));
        }
        if mode == XdpMode::Native {
            if hints.is_empty() {
                hints.push("its driver does not support it".to_owned());
            }
            hints.push("generic mode, or auto, works here, several times slower".to_owned());
        }
        if hints.is_empty() { "the kernel does not say why".to_owned() } else { hints.join("; ") }
    }

    fn queues(&self, name: &str) -> Vec<String> {
        let Some(Channels { receive, transmit, combined }) = self.channels else { return Vec::new() };
        let mut parts = Vec::new();
        for (what, (now, most)) in [("rx", receive), ("tx", transmit), ("combined", combined)] {
            if most > 0 {
                parts.push(format!("{now} {what} of at most {most}"));
            }
        }
        let mut hints = vec![format!("its queues (`ethtool -l {name}`) are {}", parts.join(", "))];
        match &self.peer {
            Some(peer) => {
                hints.push(format!(
                    "on veth it has to receive on as many queues as the other end sends on, which are at most {}: there \
                     ethtool -L {} tx {}",
                    peer.transmit_queues, peer.name, receive.0
                ));
                if receive.1 > receive.0 {
                    hints.push(format!("or ethtool -L {name} rx {}", receive.1.min(peer.transmit_queues)));
                }
            }
            None if combined.1 > 0 => hints.push(format!(
                "XDP takes queues of its own to send, one a CPU: ethtool -L {name} combined {}",
                (combined.1 / 2).max(1)
            )),
            None => hints.push(format!("XDP takes queues of its own to send, one a CPU: ethtool -L {name} rx N tx N")),
        }
        hints
    }
}

fn state_of_member(index: u32, name: &str) -> String {
    const BASIC: u64 = 1;
    let Ok(state) = sys::net::xdp_state(index) else { return format!("`{name}`") };
    match state.program() {
        Some(id) => format!("`{name}` runs XDP program {id}"),
        None => match state.features {
            Some(bits) if bits & BASIC == 0 => format!("`{name}` has no native XDP"),
            Some(_) => format!("`{name}` is fit"),
            None => format!("`{name}`"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hint(situation: &Situation, errno: i32) -> String {
        situation.hint("eth0", errno, XdpMode::Native)
    }

    fn said(words: &str) -> Situation {
        let channels = Channels { combined: (8, 8), ..Channels::default() };
        let device = Device { mtu: 9000, ..Device::default() };
        Situation { words: Some(words.into()), channels: Some(channels), device, ..Situation::default() }
    }

    /// As drivers say it that are not to be had in a laboratory.
    #[test]
    fn the_kernels_words_lead_to_the_way_out() {
        let virtio = "virtio_net: Can't set XDP while host is implementing GRO_HW/CSUM, disable GRO_HW/CSUM first";
        for (words, way_out) in [
            (virtio, "ethtool -K eth0 lro off rx-gro-hw off"),
            (virtio, "guest_tso4=off"),
            ("virtio_net: Too few free TX rings available", "8 combined of at most 8"),
            ("virtio_net: Too few free TX rings available", "ethtool -L eth0 combined 4"),
            ("MTU too large to enable XDP", "its MTU is 9000: ip link set eth0 mtu N"),
            ("XDP is not supported with LRO enabled", "ethtool -K eth0 lro off"),
        ] {
            let text = hint(&said(words), libc::EOPNOTSUPP);
            assert!(text.starts_with(&format!("the kernel says: {words}")) && text.contains(way_out), "{text}");
            assert!(text.ends_with("generic mode, or auto, works here, several times slower"), "{text}");
        }
    }

    #[test]
    fn a_silent_kernel_leaves_what_may_be_behind_the_number() {
        let silent = Situation { words: None, ..said("") };
        let text = hint(&silent, libc::EINVAL);
        assert!(text.contains("its MTU is 9000") && text.contains("8 combined of at most 8"), "{text}");
        let text = hint(&silent, libc::ENOMEM);
        assert!(text.contains("8 combined of at most 8") && !text.contains("MTU"), "{text}");
        let text = hint(&silent, libc::EOPNOTSUPP);
        assert!(text.starts_with("its driver does not support it"), "{text}");
    }

    #[test]
    fn a_member_of_a_bond_names_it_and_a_bond_its_members() {
        let mut member = said("Underlying driver does not support XDP in native mode");
        member.device.master = Some((7, "bond".into()));
        member.master = Some("bond0".into());
        let text = hint(&member, libc::EOPNOTSUPP);
        assert!(text.contains("it is a member of the bond `bond0`") && text.contains("generic"), "{text}");
        let mut bond = said("Slave device does not support XDP");
        bond.device.kind = "bond".into();
        bond.members = vec!["`eth1` has no native XDP".into(), "`eth2` is fit".into()];
        let text = hint(&bond, libc::EOPNOTSUPP);
        assert!(text.contains("without a program: `eth1` has no native XDP, `eth2` is fit"), "{text}");
    }
}
