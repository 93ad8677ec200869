//! The appliance at work: functions and chains, brought from one plan to the next.

use std::{
    collections::BTreeMap,
    error::Error,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use xdpkit::{
    AttachOptions, DsrBalancer, Firewall, NatBalancer, PacketMonitor, Pipeline, RateLimiter, Stage, open_program,
};

use crate::{
    common::Output,
    config::{FunctionPlan, InterfacePlan, Plan},
    health::{Still, Wanted, Watch},
};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// One function.
pub(crate) enum Function {
    Monitor(PacketMonitor),
    Firewall(Box<Firewall>),
    RateLimiter(Box<RateLimiter>),
    // Checks of their backends have them, too.
    DsrBalancer(Arc<DsrBalancer>),
    NatBalancer(Arc<NatBalancer>),
}

impl Function {
    /// A function of this plan: what is pinned under its name, else a new one.
    fn start(plan: &FunctionPlan, pin: Option<&Path>) -> xdpkit::Result<Self> {
        let function = match (plan, pin) {
            (FunctionPlan::Monitor(config), None) => Self::Monitor(PacketMonitor::load(config)?),
            (FunctionPlan::Monitor(config), Some(pin)) => Self::Monitor(PacketMonitor::load_or_adopt(pin, config)?),
            (FunctionPlan::Firewall(plan), None) => Self::Firewall(Firewall::load(&plan.settings)?.into()),
            (FunctionPlan::Firewall(plan), Some(pin)) => {
                Self::Firewall(Firewall::load_or_adopt(pin, &plan.settings)?.into())
            }
            (FunctionPlan::RateLimiter(plan), None) => Self::RateLimiter(RateLimiter::load(&plan.settings)?.into()),
            (FunctionPlan::RateLimiter(plan), Some(pin)) => {
                Self::RateLimiter(RateLimiter::load_or_adopt(pin, &plan.settings)?.into())
            }
            (FunctionPlan::DsrBalancer(plan), None) => Self::DsrBalancer(DsrBalancer::load(&plan.settings)?.into()),
            (FunctionPlan::DsrBalancer(plan), Some(pin)) => {
                Self::DsrBalancer(DsrBalancer::load_or_adopt(pin, &plan.settings)?.into())
            }
            (FunctionPlan::NatBalancer(plan), None) => Self::NatBalancer(NatBalancer::load(&plan.settings)?.into()),
            (FunctionPlan::NatBalancer(plan), Some(pin)) => {
                Self::NatBalancer(NatBalancer::load_or_adopt(pin, &plan.settings)?.into())
            }
        };
        Ok(function)
    }

    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Monitor(_) => "monitor",
            Self::Firewall(_) => "firewall",
            Self::RateLimiter(_) => "rate_limiter",
            Self::DsrBalancer(_) => "dsr_balancer",
            Self::NatBalancer(_) => "nat_balancer",
        }
    }

    pub(crate) fn stage(&self) -> &dyn Stage {
        match self {
            Self::Monitor(monitor) => monitor,
            Self::Firewall(firewall) => &**firewall,
            Self::RateLimiter(limiter) => &**limiter,
            Self::DsrBalancer(balancer) => &**balancer,
            Self::NatBalancer(balancer) => &**balancer,
        }
    }

    /// Brings it to its plan.
    fn apply(&self, name: &str, plan: &FunctionPlan, still: &Still<'_>) -> xdpkit::Result<()> {
        match (self, plan) {
            (Self::Monitor(monitor), FunctionPlan::Monitor(config)) => monitor.set_sample(config.sample),
            (Self::Firewall(firewall), FunctionPlan::Firewall(plan)) => plan.apply(firewall),
            (Self::RateLimiter(limiter), FunctionPlan::RateLimiter(plan)) => plan.apply(limiter),
            (Self::DsrBalancer(balancer), FunctionPlan::DsrBalancer(plan)) => plan.apply(name, balancer, still),
            (Self::NatBalancer(balancer), FunctionPlan::NatBalancer(plan)) => plan.apply(name, balancer, still),
            _ => unreachable!("`check_change` refuses another kind"),
        }
    }

    /// The backends that are to be checked.
    fn checks(&self, name: &str, plan: &FunctionPlan) -> xdpkit::Result<Vec<Wanted>> {
        match (self, plan) {
            (Self::DsrBalancer(balancer), FunctionPlan::DsrBalancer(plan)) => plan.checks(name, balancer),
            (Self::NatBalancer(balancer), FunctionPlan::NatBalancer(plan)) => Ok(plan.checks(name, balancer)),
            _ => Ok(Vec::new()),
        }
    }
}

/// Says what a reload cannot do, before it does anything.
fn check_change(name: &str, old: &FunctionPlan, new: &FunctionPlan) -> Outcome {
    let refuse = |key: &str, found: String, expected: String| {
        Err(format!("{key}: `{found}`: expected {expected} as before: it can only change with a restart").into())
    };
    if old.kind() != new.kind() {
        return refuse(&format!("{}.{name}", new.kind()), new.kind().into(), format!("a {}", old.kind()));
    }
    let fixed = match (old, new) {
        (FunctionPlan::Monitor(a), FunctionPlan::Monitor(b)) => (a.ring_bytes != b.ring_bytes).then_some("ring_bytes"),
        (FunctionPlan::Firewall(a), FunctionPlan::Firewall(b)) => a.fixed_difference(b),
        (FunctionPlan::RateLimiter(a), FunctionPlan::RateLimiter(b)) => a.fixed_difference(b),
        (FunctionPlan::DsrBalancer(a), FunctionPlan::DsrBalancer(b)) => a.fixed_difference(b),
        (FunctionPlan::NatBalancer(a), FunctionPlan::NatBalancer(b)) => a.fixed_difference(b),
        _ => None,
    };
    match fixed {
        Some(key) => refuse(&format!("{}.{name}.settings.{key}", new.kind()), "changed".into(), "its value".into()),
        None => Ok(()),
    }
}

/// Functions, and the chains that they stand in.
pub(crate) struct Appliance {
    plan: Plan,
    pin: Option<PathBuf>,
    pub(crate) functions: BTreeMap<String, Function>,
    pub(crate) chains: BTreeMap<String, Pipeline>,
    pub(crate) watch: Watch,
}

impl Appliance {
    /// Starts all functions, then attaches the chains. With a pin directory, takes over what an earlier process left.
    pub(crate) fn start(plan: Plan, pin: Option<PathBuf>, output: Output) -> Outcome<Self> {
        let (functions, chains) = (BTreeMap::new(), BTreeMap::new());
        let mut appliance = Self { plan, pin, functions, chains, watch: Watch::new(output) };
        for (name, plan) in &appliance.plan.functions {
            let function = Function::start(plan, appliance.pin.as_deref()).map_err(|error| named(name, error))?;
            function.apply(name, plan, &appliance.watch.still()).map_err(|error| named(name, error))?;
            appliance.functions.insert(name.clone(), function);
        }
        for (interface, plan) in &appliance.plan.interfaces {
            let chain = appliance.chain(interface, plan, &appliance.functions)?;
            appliance.chains.insert(interface.clone(), chain);
        }
        appliance.watch_backends()?;
        Ok(appliance)
    }

    /// Checks the backends that the plan wants checked, and no others.
    fn watch_backends(&self) -> Outcome {
        let mut wanted = Vec::new();
        for (name, plan) in &self.plan.functions {
            wanted.extend(self.functions[name].checks(name, plan).map_err(|error| named(name, error))?);
        }
        self.watch.set(wanted)
    }

    /// A chain, attached.
    fn chain(
        &self,
        interface: &str,
        plan: &InterfacePlan,
        functions: &BTreeMap<String, Function>,
    ) -> Outcome<Pipeline> {
        let mut chain = Pipeline::new(&stages(plan, functions))?;
        if let Some(last) = last(plan)? {
            chain.set_last(Some(std::os::fd::AsFd::as_fd(&last)))?;
        }
        let mut options = AttachOptions::new(interface).mode(plan.mode).replace_chain(true);
        if let Some(pin) = &self.pin {
            options = options.pin(pin);
        }
        chain.attach(&options)?;
        Ok(chain)
    }

    /// Brings everything to another plan. What can fail comes first; where something fails all the same, the functions
    /// go back to the plan before.
    pub(crate) fn reload(&mut self, plan: Plan) -> Outcome {
        for (name, new) in &plan.functions {
            if let Some(old) = self.plan.functions.get(name) {
                check_change(name, old, new)?;
            }
        }
        for (interface, new) in &plan.interfaces {
            if self.plan.interfaces.get(interface).is_some_and(|old| old.mode != new.mode) {
                let problem = "expected the mode as before: it can only change with a restart";
                return Err(format!("interface.{interface}.mode: `{}`: {problem}", new.mode).into());
            }
        }
        let mut lasts = BTreeMap::new();
        for (interface, new) in &plan.interfaces {
            lasts.insert(interface.clone(), last(new)?);
        }
        let mut fresh = BTreeMap::new();
        for (name, new) in plan.functions.iter().filter(|(name, _)| !self.functions.contains_key(*name)) {
            let function = Function::start(new, self.pin.as_deref()).map_err(|error| named(name, error))?;
            function.apply(name, new, &self.watch.still()).map_err(|error| named(name, error))?;
            fresh.insert(name.clone(), function);
        }
        let still = self.watch.still();
        let mut done = Vec::new();
        for (name, new) in &plan.functions {
            let Some(function) = self.functions.get(name) else { continue };
            done.push(name);
            if let Err(error) = function.apply(name, new, &still) {
                for name in done {
                    // It was so a moment ago; the first error is the one to tell of.
                    let _ = self.functions[name].apply(name, &self.plan.functions[name], &still);
                }
                return Err(named(name, error).into());
            }
        }
        drop(still);
        self.functions.extend(fresh);
        for (interface, new) in &plan.interfaces {
            match self.chains.get_mut(interface) {
                Some(chain) => {
                    chain.set_stages(&stages(new, &self.functions))?;
                    chain.set_last(lasts[interface].as_ref().map(std::os::fd::AsFd::as_fd))?;
                }
                None => {
                    let chain = self.chain(interface, new, &self.functions)?;
                    self.chains.insert(interface.clone(), chain);
                }
            }
        }
        let gone: Vec<String> =
            self.chains.keys().filter(|name| !plan.interfaces.contains_key(*name)).cloned().collect();
        for name in gone {
            if let Some(chain) = self.chains.remove(&name) {
                chain.detach()?;
            }
        }
        self.functions.retain(|name, _| plan.functions.contains_key(name));
        self.plan = plan;
        self.watch_backends()
    }

    /// Ends: what is pinned stays at work for the next process, the rest is detached.
    pub(crate) fn stop(&mut self) -> Outcome {
        for chain in std::mem::take(&mut self.chains).into_values() {
            if self.pin.is_none() {
                chain.detach()?;
            }
        }
        Ok(())
    }
}

fn stages<'a>(plan: &InterfacePlan, functions: &'a BTreeMap<String, Function>) -> Vec<&'a dyn Stage> {
    plan.chain.iter().map(|name| functions[name].stage()).collect()
}

fn last(plan: &InterfacePlan) -> Outcome<Option<OwnedFd>> {
    Ok(plan.last.as_ref().map(open_program).transpose()?)
}

fn named(name: &str, error: xdpkit::Error) -> String {
    format!("`{name}`: {error}")
}
