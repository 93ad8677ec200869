//! Where a flow would go, and why.

use super::{DsrBalancer, DsrFlow, Placement, PlacementReason, transition, transition::Recorded};
use crate::{
    abi::service::{SLOT_BACKEND, SLOT_PREVIOUS_SHIFT},
    address::Unmapped as _,
    balancer::{BackendState, ServiceAddr, ServiceProtocol},
};

impl DsrBalancer {
    /// The backend that the flow's next packet would go to, and why; `None` when it is for no service. Leaves no trace:
    /// the program would record a flow whose slot is in transition.
    #[must_use]
    pub fn place(&self, flow: DsrFlow) -> Option<Placement> {
        let book = self.book();
        let (client, destination) = (flow.client.unmapped(), flow.destination.unmapped());
        let port = Some(destination.port()).filter(|port| *port != 0)?;
        let asked = ServiceAddr { protocol: flow.protocol, address: destination.ip(), port: Some(port) };
        let (service, entry) = book.find(&asked)?;
        let slot = book.slot(service, entry, client, port)?;
        let word = book.word(slot);
        let (present, previous) = ((word & SLOT_BACKEND) as u16, (word >> SLOT_PREVIOUS_SHIFT) as u16);
        let answer = |id: u16, reason| {
            let member = entry.members.iter().find(|member| member.id == id);
            Some(Placement { service: *service, backend: member.map(|member| member.target.address), reason })
        };
        let now = transition::now();
        if previous == 0 || book.rule.is_over(slot, now) {
            return answer(present, PlacementReason::Table);
        }
        let is_alive =
            |id: u16| entry.members.iter().any(|member| member.id == id && member.state != BackendState::Killed);
        let opens = flow.opens && flow.protocol == ServiceProtocol::Tcp;
        match book.rule.find(slot, entry.number, client, port, service.port.is_none()) {
            Recorded::Backend { id, closing } if is_alive(id) && !(opens && closing) => {
                answer(id, PlacementReason::Recorded)
            }
            _ if opens
                || !is_alive(previous)
                || flow.protocol == ServiceProtocol::Udp && book.rule.is_past_grace(slot, now) =>
            {
                answer(present, PlacementReason::New)
            }
            _ => answer(previous, PlacementReason::Previous),
        }
    }
}
