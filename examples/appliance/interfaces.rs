//! What becomes of the appliance's interfaces: each loss is told, and a chain is attached again once its interface is back.

use std::time::{Duration, Instant};

use serde_json::json;
use xdpkit::{AttachOptions, Interface, Loss, Pipeline};

use crate::{
    config::{FunctionPlan, InterfacePlan},
    state::{Appliance, Function, Outcome, unless_taken},
};

/// How often interfaces are looked at.
pub(crate) const LOOK: Duration = Duration::from_millis(100);
/// How long after a refusal it is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// An interface without its chain.
#[derive(Default)]
pub(crate) struct Lost {
    /// What refused to attach the chain last.
    refusal: Option<String>,
    not_before: Option<Instant>,
}

impl Appliance {
    /// Looks at every interface. Returns one that another process has taken over for good: this one has to end.
    pub(crate) fn tend(&mut self) -> Outcome<Option<String>> {
        let names: Vec<String> = self.chains.keys().cloned().collect();
        for name in names {
            let chain = &self.chains[&name];
            let loss = match chain.loss()? {
                // It waits for its interface for the first time.
                None if chain.interface().is_none() => Some(Loss::Detached { interface: name.clone() }),
                other => other,
            };
            match loss {
                Some(Loss::Superseded { .. }) => return Ok(Some(name)),
                Some(Loss::Detached { .. }) => {
                    self.lose(&name, "it is gone, or another program has detached the chain")?;
                }
                Some(Loss::Moved { .. }) => {
                    self.lose(&name, "it has left this network namespace, or another interface has its name now")?;
                }
                Some(Loss::Unpinned { path, .. }) => {
                    let path = path.display().to_string();
                    let line = json!({"event": "unpinned", "interface": name, "path": path});
                    self.output.line(&line, || format!("{name}: the pins were removed: {path}"));
                    self.lost.entry(name.clone()).or_default();
                }
                // It left and has come back by itself.
                None if self.lost.contains_key(&name) => self.regain(&name)?,
                _ => continue,
            }
            if self.lost.contains_key(&name) && self.attach_again(&name)? {
                return Ok(Some(name));
            }
        }
        self.watch.believe();
        Ok(None)
    }

    /// Notes and tells that an interface is without its chain, once.
    pub(crate) fn lose(&mut self, name: &str, why: &str) -> Outcome {
        if self.lost.contains_key(name) {
            return Ok(());
        }
        self.lost.insert(name.to_owned(), Lost::default());
        self.tell_detached(name, why);
        for (function, balancer) in self.probed_by(name) {
            // Its index may become another interface's.
            balancer.set_probe_interface(None).or_else(unless_taken)?;
            self.watch.lose_way(&function);
        }
        Ok(())
    }

    /// Why an interface is without its chain at the moment.
    pub(crate) fn why_lost(&self, name: &str) -> String {
        let refusal = self.lost.get(name).and_then(|lost| lost.refusal.clone());
        refusal.unwrap_or_else(|| match Interface::by_name(name) {
            Ok(_) => "its chain is not attached at the moment".into(),
            Err(error) => error.to_string(),
        })
    }

    pub(crate) fn tell_detached(&self, name: &str, why: &str) {
        let line = json!({"event": "detached", "interface": name, "why": why});
        self.output.line(&line, || format!("{name} is not guarded: {why}"));
    }

    /// Attaches a chain whose interface is back. True when another process was faster.
    fn attach_again(&mut self, name: &str) -> Outcome<bool> {
        let lost = self.lost.get_mut(name).ok_or("it is not lost")?;
        if lost.not_before.is_some_and(|then| Instant::now() < then) || Interface::by_name(name).is_err() {
            return Ok(false);
        }
        let plan = &self.plan.interfaces[name];
        let options = options(name, plan, self.pin.as_deref());
        let chain = self.chains.get_mut(name).ok_or("it has no chain")?;
        let done = match chain.interface() {
            Some(_) => chain.reattach(),
            None => chain.attach(&options),
        };
        match done {
            Ok(()) => self.regain(name)?,
            Err(xdpkit::Error::Superseded { .. }) => return Ok(true),
            // It has gone again.
            Err(xdpkit::Error::UnknownInterface { .. }) => {}
            Err(error) => {
                let text = error.to_string();
                lost.not_before = Some(Instant::now() + AGAIN);
                if lost.refusal.as_ref() != Some(&text) {
                    let line = json!({"event": "attach_failed", "interface": name, "error": text});
                    self.output.line(&line, || format!("{name} is still not guarded: {text}"));
                    lost.refusal = Some(text);
                }
            }
        }
        Ok(false)
    }

    fn regain(&mut self, name: &str) -> Outcome {
        self.lost.remove(name);
        let mode = mode(&self.chains[name]);
        let line = json!({"event": "attached", "interface": name, "mode": mode});
        self.output.line(&line, || format!("attached to {name} again, in {mode} mode"));
        let Ok(interface) = Interface::by_name(name) else { return Ok(()) };
        for (function, balancer) in self.probed_by(name) {
            balancer.set_probe_interface(Some(&interface)).or_else(unless_taken)?;
            self.watch.regain_way(&function, interface.clone());
        }
        Ok(())
    }

    /// DSR balancers whose probes come in by this interface.
    fn probed_by(&self, name: &str) -> Vec<(String, std::sync::Arc<xdpkit::DsrBalancer>)> {
        let all = self.plan.functions.iter().filter_map(|(function, plan)| {
            let FunctionPlan::DsrBalancer(plan) = plan else { return None };
            let Some(Function::DsrBalancer(balancer)) = self.functions.get(function) else { return None };
            let probes = plan.probes.as_ref().filter(|probes| probes.interface == name);
            probes.map(|_| (function.clone(), std::sync::Arc::clone(balancer)))
        });
        all.collect()
    }
}

/// How a chain is attached.
pub(crate) fn options(name: &str, plan: &InterfacePlan, pin: Option<&std::path::Path>) -> AttachOptions {
    let options = AttachOptions::new(name).mode(plan.mode).replace_chain(true).announce_ready(false);
    match pin {
        Some(pin) => options.pin(pin),
        None => options,
    }
}

/// The mode in which a chain runs now.
pub(crate) fn mode(chain: &Pipeline) -> String {
    chain.mode().map_or_else(|| "none".into(), |mode| mode.to_string())
}
