//! The appliance at work: functions and chains, brought from one plan to the next.

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    mem,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use xdpkit::{
    DsrBalancer, Firewall, Interface, NatBalancer, PacketMonitor, Pipeline, RateLimiter, Stage, open_program,
};

use crate::{
    common::Output,
    config::{Fixed, FunctionPlan, InterfacePlan, Plan, first_of},
    health::{Still, Wanted, Watch},
    interfaces::{Lost, options},
};

pub(crate) type Outcome<T = ()> = Result<T, Box<dyn Error>>;

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

    /// What has to be done now and then: connections and changes that are over are let go of, and so are the backends that
    /// were kept for them.
    fn tidy(&self) -> xdpkit::Result<()> {
        match self {
            // What it is asked for, it brings up to date.
            Self::DsrBalancer(balancer) => balancer.services().map(drop),
            Self::NatBalancer(balancer) => balancer.collect().map(drop),
            _ => Ok(()),
        }
    }

    /// Does of its plan what can be refused, and takes nothing away.
    fn add(&self, name: &str, plan: &FunctionPlan, still: &Still<'_>) -> xdpkit::Result<()> {
        match (self, plan) {
            (Self::DsrBalancer(balancer), FunctionPlan::DsrBalancer(plan)) => plan.add(name, balancer, still),
            (Self::NatBalancer(balancer), FunctionPlan::NatBalancer(plan)) => plan.add(name, balancer, still),
            _ => Ok(()),
        }
    }

    /// Brings it to its plan.
    fn apply(&self, name: &str, plan: &FunctionPlan, still: &Still<'_>) -> xdpkit::Result<()> {
        match (self, plan) {
            (Self::Monitor(monitor), FunctionPlan::Monitor(config)) => monitor.configure(config),
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
fn check_change(name: &str, old: &FunctionPlan, new: &FunctionPlan, pinned: bool) -> Outcome {
    let refuse = |key: &str, found: String, expected: String, grows: bool| {
        // Pinned tables outlive a restart, and may grow with it.
        let way_out =
            if pinned && !grows { "give the function another name" } else { "it can only change with a restart" };
        Err(format!("{key}: `{found}`: expected {expected} as before: {way_out}").into())
    };
    if old.kind() != new.kind() {
        return refuse(&format!("{}.{name}", new.kind()), new.kind().into(), format!("a {}", old.kind()), false);
    }
    let fixed = match (old, new) {
        (FunctionPlan::Monitor(a), FunctionPlan::Monitor(b)) => {
            first_of([(a.ring_bytes != b.ring_bytes, Fixed { key: "ring_bytes", grows: false })])
        }
        (FunctionPlan::Firewall(a), FunctionPlan::Firewall(b)) => a.fixed_difference(b),
        (FunctionPlan::RateLimiter(a), FunctionPlan::RateLimiter(b)) => a.fixed_difference(b),
        (FunctionPlan::DsrBalancer(a), FunctionPlan::DsrBalancer(b)) => a.fixed_difference(b),
        (FunctionPlan::NatBalancer(a), FunctionPlan::NatBalancer(b)) => a.fixed_difference(b),
        _ => None,
    };
    match fixed {
        Some(Fixed { key, grows }) => {
            refuse(&format!("{}.{name}.settings.{key}", new.kind()), "changed".into(), "its value".into(), grows)
        }
        None => Ok(()),
    }
}

/// Functions, and the chains that they stand in.
pub(crate) struct Appliance {
    pub(crate) output: Output,
    pub(crate) plan: Plan,
    pub(crate) pin: Option<PathBuf>,
    /// Opened when the plan came: their pins may be gone when a reload is undone.
    lasts: BTreeMap<String, OwnedFd>,
    pub(crate) functions: BTreeMap<String, Function>,
    /// Of every interface of the plan, whether it is there or not.
    pub(crate) chains: BTreeMap<String, Pipeline>,
    /// Interfaces that are without their chains, told as such.
    pub(crate) lost: BTreeMap<String, Lost>,
    pub(crate) watch: Watch,
}

impl Appliance {
    /// Starts all functions, then attaches the chains. With a pin directory, takes over what an earlier process left.
    /// Interfaces that are not there are waited for, as long as there is one.
    pub(crate) fn start(plan: Plan, pin: Option<PathBuf>, output: Output) -> Outcome<Self> {
        let (functions, chains, lasts) = (BTreeMap::new(), BTreeMap::new(), lasts(&plan)?);
        let (lost, watch) = (BTreeMap::new(), Watch::new(output));
        let mut appliance = Self { output, plan, pin, lasts, functions, chains, lost, watch };
        appliance.start_functions()?;
        appliance.bring_to_plan(true)?;
        Ok(appliance)
    }

    /// Starts the functions of the plan that there are not yet.
    fn start_functions(&mut self) -> Outcome {
        for (name, plan) in &self.plan.functions {
            if !self.functions.contains_key(name) {
                let function = Function::start(plan, self.pin.as_deref()).map_err(|error| named(name, error))?;
                self.functions.insert(name.clone(), function);
            }
        }
        Ok(())
    }

    /// Brings functions to the plan: first whatever can be refused, in all of them.
    fn apply(&self, which: impl Fn(&str) -> bool) -> Outcome {
        let still = self.watch.still();
        let wanted = || self.plan.functions.iter().filter(|(name, _)| which(name));
        for (name, plan) in wanted() {
            self.functions[name].add(name, plan, &still).map_err(|error| named(name, error))?;
        }
        for (name, plan) in wanted() {
            self.functions[name].apply(name, plan, &still).map_err(|error| named(name, error))?;
        }
        Ok(())
    }

    /// Checks the backends that the plan wants checked, and no others.
    fn watch_backends(&self) -> Outcome {
        let (mut wanted, mut ways) = (Vec::new(), BTreeMap::new());
        for (name, plan) in &self.plan.functions {
            wanted.extend(self.functions[name].checks(name, plan).map_err(|error| named(name, error))?);
            if let FunctionPlan::DsrBalancer(plan) = plan
                && let Some(probes) = &plan.probes
            {
                let there = !self.lost.contains_key(&probes.interface);
                ways.insert(name.clone(), Interface::by_name(&probes.interface).ok().filter(|_| there));
            }
        }
        self.watch.set_ways(ways);
        self.watch.set(wanted)
    }

    /// A chain, not attached yet.
    fn chain(&self, interface: &str, plan: &InterfacePlan) -> Outcome<Pipeline> {
        let mut chain = Pipeline::new(&stages(plan, &self.functions))?;
        if let Some(last) = self.lasts.get(interface) {
            chain.set_last(Some(last.as_fd()))?;
        }
        Ok(chain)
    }

    /// Brings everything to another plan, or leaves everything as it was.
    pub(crate) fn reload(&mut self, plan: Plan) -> Outcome {
        self.check_changes(&plan)?;
        let lasts = lasts(&plan)?;
        let old = (mem::replace(&mut self.plan, plan), mem::replace(&mut self.lasts, lasts));
        let Err(error) = self.start_functions().and_then(|()| self.bring_to_plan(false)) else { return Ok(()) };
        (self.plan, self.lasts) = old;
        match self.bring_to_plan(false) {
            Ok(()) => Err(error),
            Err(other) => {
                self.watch.go_on();
                Err(format!("{error}; and not all went back to what was before: {other}").into())
            }
        }
    }

    /// Says what cannot be reloaded.
    fn check_changes(&self, plan: &Plan) -> Outcome {
        for (name, new) in &plan.functions {
            if let Some(old) = self.plan.functions.get(name) {
                check_change(name, old, new, self.pin.is_some())?;
            }
        }
        for (interface, new) in &plan.interfaces {
            if self.plan.interfaces.get(interface).is_some_and(|old| old.mode != new.mode) {
                let way_out = match self.pin {
                    None => "it can only change with a restart",
                    Some(_) => {
                        "a pinned link keeps its mode: take the interface out of the file, reload, and put it back"
                    }
                };
                let problem = format!("expected the mode as before: {way_out}");
                return Err(format!("interface.{interface}.mode: `{}`: {problem}", new.mode).into());
            }
        }
        Ok(())
    }

    /// Brings functions and chains from whatever they are to the plan. Functions that no packet meets yet come first,
    /// then new interfaces, where most can fail; what is taken away comes last. `may_lack`: interfaces that are not there
    /// are waited for, if one is.
    fn bring_to_plan(&mut self, may_lack: bool) -> Outcome {
        let at_work: BTreeSet<String> = self.chains.values().flat_map(Pipeline::stages).map(str::to_owned).collect();
        self.apply(|name| !at_work.contains(name))?;
        let plans = self.plan.interfaces.clone();
        let (present, new): (Vec<_>, Vec<_>) = plans.iter().partition(|(name, _)| self.chains.contains_key(*name));
        let mut lacking = None;
        for (interface, plan) in new {
            let mut chain = self.chain(interface, plan)?;
            match chain.attach(&options(interface, plan, self.pin.as_deref())) {
                Err(error @ xdpkit::Error::UnknownInterface { .. }) if may_lack => {
                    self.lost.insert(interface.clone(), Lost::default());
                    lacking.get_or_insert(error);
                }
                done => done?,
            }
            self.chains.insert(interface.clone(), chain);
        }
        if let Some(error) = lacking
            && self.lost.len() == self.chains.len()
        {
            return Err(error.into());
        }
        self.apply(|name| at_work.contains(name))?;
        for (interface, plan) in present {
            self.bring_chain(interface, plan)?;
        }
        self.watch_backends()?;
        let gone: Vec<String> =
            self.chains.keys().filter(|name| !self.plan.interfaces.contains_key(*name)).cloned().collect();
        for name in gone {
            self.lost.remove(&name);
            if let Some(chain) = self.chains.remove(&name) {
                chain.detach()?;
            }
        }
        self.functions.retain(|name, _| self.plan.functions.contains_key(name));
        Ok(())
    }

    /// All is at work: an earlier process gives way.
    pub(crate) fn ready(&self) -> Outcome {
        for (name, function) in &self.functions {
            function.stage().ready().map_err(|error| named(name, error))?;
        }
        Ok(())
    }

    /// Brings the chain of an interface to the plan. What is without its interface cannot be edited: it is made anew, and
    /// attached when the interface is back.
    fn bring_chain(&mut self, interface: &str, plan: &InterfacePlan) -> Outcome {
        let Some(chain) = self.chains.get_mut(interface) else { return Ok(()) };
        if chain.is_attached()? {
            let last = self.lasts.get(interface).map(AsFd::as_fd);
            match chain.set_stages(&stages(plan, &self.functions)).and_then(|()| chain.set_last(last)) {
                Err(xdpkit::Error::Detached { .. }) => {}
                other => return Ok(other?),
            }
        } else if chain.is_superseded()? {
            return Err(format!("interface `{interface}`: another process has taken over").into());
        }
        self.lose(interface, "it is gone")?;
        let fresh = self.chain(interface, plan)?;
        if let Some(old) = self.chains.insert(interface.to_owned(), fresh) {
            old.detach()?;
        }
        Ok(())
    }

    /// Once in a few seconds.
    pub(crate) fn tidy(&self) -> Outcome {
        for (name, function) in &self.functions {
            function.tidy().or_else(unless_taken).map_err(|error| named(name, error))?;
        }
        self.watch.tell_unsent();
        Ok(())
    }

    /// Ends: what is pinned stays at work for the next process, the rest is detached.
    pub(crate) fn stop(&mut self) -> Outcome {
        for chain in std::mem::take(&mut self.chains).into_values() {
            if self.pin.is_none() {
                match chain.detach() {
                    // Another program was put into its link, which ends with this process.
                    Err(xdpkit::Error::Superseded { .. }) => {}
                    done => done?,
                }
            }
        }
        Ok(())
    }
}

/// While another process takes over, nothing can be changed: if it does not get ready, the next time will do.
pub(crate) fn unless_taken(error: xdpkit::Error) -> xdpkit::Result<()> {
    match error {
        xdpkit::Error::Superseded { .. } | xdpkit::Error::PinsLocked { .. } => Ok(()),
        error => Err(error),
    }
}

fn stages<'a>(plan: &InterfacePlan, functions: &'a BTreeMap<String, Function>) -> Vec<&'a dyn Stage> {
    plan.chain.iter().map(|name| functions[name].stage()).collect()
}

/// The users' own programs, by interface.
fn lasts(plan: &Plan) -> Outcome<BTreeMap<String, OwnedFd>> {
    let mut lasts = BTreeMap::new();
    for (interface, plan) in &plan.interfaces {
        if let Some(path) = &plan.last {
            lasts.insert(interface.clone(), open_program(path)?);
        }
    }
    Ok(lasts)
}

fn named(name: &str, error: xdpkit::Error) -> String {
    format!("`{name}`: {error}")
}
