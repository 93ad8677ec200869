//! What the host lacks for the plan, said at the start.

use xdpkit::{Forwarding, XdpMode, preflight::BalancerKind};

use crate::{
    common::{Output, lacking, warn, warn_of_balancer},
    config::{FunctionPlan, Plan},
};

/// Says it. Nothing is attached yet; interfaces that are not there are left out.
pub(crate) fn tell(output: Output, plan: &Plan) -> xdpkit::Result<()> {
    // Where the file leaves the mode open, the appliance takes the native one.
    for (name, interface) in &plan.interfaces {
        let mode = if interface.mode == XdpMode::Native { XdpMode::Native } else { XdpMode::Auto };
        warn(output, lacking(std::iter::once(name.as_str()), mode));
    }
    for (name, function) in &plan.functions {
        let chains = plan.interfaces.iter().filter(|(_, interface)| interface.chain.contains(name));
        let names: Vec<&str> = chains.map(|(interface, _)| interface.as_str()).collect();
        let tell = |kind, addresses| warn_of_balancer(output, None, kind, &names, addresses);
        match function {
            FunctionPlan::DsrBalancer(plan) => {
                for (kind, forwarding) in
                    [(BalancerKind::DsrL2, Forwarding::L2), (BalancerKind::DsrIpip, Forwarding::IpIp)]
                {
                    tell(kind, plan.addresses(forwarding))?;
                }
            }
            FunctionPlan::NatBalancer(plan) => tell(BalancerKind::Nat, plan.addresses())?,
            _ => {}
        }
    }
    Ok(())
}
