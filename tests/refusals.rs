//! What a refusal means: capabilities, user namespaces, seccomp, memory; devices that programs cannot guard; and that nothing of
//! it goes to the standard error of the program that links us.

use std::{
    env,
    process::{Command, Output, Stdio},
};

use xdpkit::{
    AttachOptions, Error, Firewall, FirewallConfig, Interface, MonitorConfig, NatBalancer, NatConfig, PacketMonitor,
    Pipeline, Stage as _, XdpMode,
    preflight::{self, Finding, Severity},
};
use xdpkit_lab::{MemoryLimit, Namespace, bpffs::BpfFs, capability, topology::Pair, veth_with_queues};

/// What a child is to do; unset in the parent.
const ROLE: &str = "XDPKIT_TEST_ROLE";

fn monitor() -> PacketMonitor {
    PacketMonitor::load(&MonitorConfig::default()).unwrap()
}

/// In a thread of its own, which keeps what it did to its rights to itself.
fn confined<R: Send + 'static>(act: impl FnOnce() -> R + Send + 'static) -> R {
    std::thread::spawn(act).join().unwrap()
}

/// Runs the test of this name again in a process of its own, with a role.
fn child(test: &str, role: &str, wrapper: &[&str]) -> Command {
    let exe = env::current_exe().unwrap();
    let mut command = match wrapper {
        [] => Command::new(exe),
        [program, arguments @ ..] => {
            let mut command = Command::new(program);
            command.args(arguments).arg(exe);
            command
        }
    };
    command.args(["--exact", test, "--nocapture"]).env(ROLE, role);
    command
}

/// What the child printed, after seeing that it said nothing else.
fn told(output: Output) -> String {
    let (text, errors) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8_lossy(&output.stderr).into_owned());
    assert!(output.status.success(), "{text}\n{errors}");
    assert_eq!(errors, "", "the program's standard error is its own");
    text
}

#[test]
fn a_device_without_an_ethernet_header_is_refused_in_every_mode() {
    let ns = Namespace::new("tunnel").unwrap();
    let bpffs = BpfFs::new().unwrap();
    let _tun = ns.add_tun("tun0").unwrap();
    let (first, second) = (monitor(), PacketMonitor::load(&MonitorConfig::default().name("second")).unwrap());
    let mut chain = Pipeline::new(&[&first, &second]).unwrap();
    ns.run(|| {
        for mode in [XdpMode::Native, XdpMode::Generic, XdpMode::Offload, XdpMode::Auto] {
            for options in [AttachOptions::new("tun0"), AttachOptions::new("tun0").pin(bpffs.path())] {
                let options = options.mode(mode);
                for error in [first.attach(&options).unwrap_err(), chain.attach(&options).unwrap_err()] {
                    let Error::NotEthernet { interface, link_type } = &error else { panic!("{mode}: {error}") };
                    assert_eq!(
                        (interface.as_str(), link_type.as_str()),
                        ("tun0", "link type none (65534), driver tun")
                    );
                    let text = error.to_string();
                    assert!(
                        text.contains("`tun0` has no Ethernet header (link type none (65534), driver tun)"),
                        "{text}"
                    );
                }
            }
        }
        let tun = Interface::by_name("tun0").unwrap();
        for findings in [preflight::interface(&tun).unwrap(), preflight::redirect_target(&tun).unwrap()] {
            let [finding] = findings.as_slice() else { panic!("{findings:?}") };
            assert_eq!(finding.severity, Severity::Blocker);
            assert!(finding.text.contains("no Ethernet header (link type none (65534), driver tun)"), "{finding}");
            assert!(!finding.text.contains("generic"), "{finding}");
        }
    });
    assert_eq!(xdpkit::pinned(bpffs.path()).unwrap(), xdpkit::Pinned::default(), "nothing was left");
}

#[test]
fn a_missing_cap_perfmon_is_named_although_it_looks_like_the_verifiers_refusal() {
    let errors = confined(|| {
        xdpkit_lab::keep_capabilities(&[capability::BPF, capability::NET_ADMIN]).unwrap();
        [Firewall::load(&FirewallConfig::default()).unwrap_err(), NatBalancer::load(&NatConfig::default()).unwrap_err()]
    });
    for error in errors {
        assert!(
            matches!(&error, Error::MissingCapability { capability, .. } if capability == "CAP_PERFMON"),
            "{error}"
        );
        assert!(!error.to_string().contains("R1="), "no verifier log: {error}");
    }
}

#[test]
fn a_seccomp_filter_is_named() {
    let (errors, findings) = confined(|| {
        // Made before: attaching is refused, too.
        let loaded = monitor();
        let mut chain = Pipeline::new(&[&loaded]).unwrap();
        xdpkit_lab::deny(xdpkit_lab::Call::Bpf).unwrap();
        let errors = [
            Firewall::load(&FirewallConfig::default()).unwrap_err(),
            NatBalancer::load(&NatConfig::default()).unwrap_err(),
            chain.attach(&AttachOptions::new("lo")).unwrap_err(),
        ];
        (errors, preflight::host())
    });
    for error in errors {
        let Error::Forbidden { by, .. } = &error else { panic!("{error:?}") };
        assert!(by.contains("a seccomp filter is in force") && by.contains("bpf(2)"), "{error}");
        assert!(!by.contains("user namespace"), "{error}");
    }
    let blocks = |f: &Finding| f.severity == Severity::Blocker && f.text.contains("a seccomp filter is in force");
    assert!(findings.iter().any(blocks), "{findings:?}");
    // One that lets bpf(2) through is nobody's business.
    let findings = confined(|| {
        xdpkit_lab::deny(xdpkit_lab::Call::Reboot).unwrap();
        monitor();
        preflight::host()
    });
    assert!(!findings.iter().any(blocks), "{findings:?}");
}

#[test]
fn a_user_namespace_is_named() {
    const NAME: &str = "a_user_namespace_is_named";
    if env::var_os(ROLE).is_some() {
        let error = Firewall::load(&FirewallConfig::default()).unwrap_err();
        println!("{}: {error}", if matches!(error, Error::Forbidden { .. }) { "forbidden" } else { "other" });
        return;
    }
    // Root inside, with every capability that there is; and nobody, with none.
    for arguments in [&["unshare", "--user", "--map-root-user"][..], &["unshare", "--user"]] {
        let text = told(child(NAME, "load", arguments).output().unwrap());
        assert!(text.contains("forbidden: loading program `firewall` was forbidden"), "{text}");
        assert!(text.contains("this process is in a user namespace"), "{text}");
    }
}

#[test]
fn what_libbpf_says_is_in_the_error_and_not_on_standard_error() {
    const NAME: &str = "what_libbpf_says_is_in_the_error_and_not_on_standard_error";
    match env::var(ROLE).as_deref() {
        Err(_) => {}
        Ok("capabilities") => {
            xdpkit_lab::keep_capabilities(&[]).unwrap();
            println!("{}", Firewall::load(&FirewallConfig::default()).unwrap_err());
            return;
        }
        Ok("perfmon") => {
            xdpkit_lab::keep_capabilities(&[capability::BPF, capability::NET_ADMIN]).unwrap();
            println!("{}", Firewall::load(&FirewallConfig::default()).unwrap_err());
            return;
        }
        Ok("seccomp") => {
            xdpkit_lab::deny(xdpkit_lab::Call::Bpf).unwrap();
            println!("{}", Firewall::load(&FirewallConfig::default()).unwrap_err());
            return;
        }
        Ok(_) => {
            // The driver refuses, in words of the kernel that libbpf passes on.
            let (near, far) = (Namespace::new("near").unwrap(), Namespace::new("far").unwrap());
            veth_with_queues((&near, "eth0"), (&far, "eth0"), 4, 1).unwrap();
            println!("{}", far.run(|| monitor().attach(&AttachOptions::new("eth0"))).unwrap_err());
            return;
        }
    }
    for (role, expected) in [
        ("capabilities", "CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN"),
        ("perfmon", "needs CAP_PERFMON"),
        ("seccomp", "seccomp filter"),
        ("queues", "the kernel says: "),
    ] {
        let text = told(child(NAME, role, &[]).output().unwrap());
        assert!(text.contains(expected), "{role}: {text}");
        assert!(!text.contains("libbpf:"), "{role}: {text}");
    }
}

#[test]
fn a_queue_shortage_is_named_with_the_numbers_and_auto_says_that_it_fell_back() {
    let (near, far) = (Namespace::new("near").unwrap(), Namespace::new("far").unwrap());
    veth_with_queues((&near, "eth0"), (&far, "eth0"), 4, 1).unwrap();
    let monitor = monitor();
    let refused = |error: &Error| {
        let Error::ModeRefused { mode: XdpMode::Native, hint, .. } = error else { panic!("{error:?}") };
        assert!(hint.starts_with("the kernel says: "), "{hint}");
        assert!(hint.contains("XDP expects number of rx queues not less than peer tx queues"), "{hint}");
        assert!(hint.contains("its queues (`ethtool -l eth0`) are 1 rx of at most 1, 1 tx of at most 1"), "{hint}");
        assert!(hint.contains("the other end sends on, which are at most 4: there ethtool -L eth0 tx 1"), "{hint}");
    };
    refused(&far.run(|| monitor.attach(&AttachOptions::new("eth0"))).unwrap_err());
    let attachment = far.run(|| monitor.attach(&AttachOptions::new("eth0").mode(XdpMode::Auto))).unwrap();
    assert_eq!(attachment.mode(), Some(XdpMode::Generic));
    refused(attachment.fallback().expect("it says why"));
    drop(attachment);
    // Asked for, it is no fallback; and the end with queues enough takes native mode.
    let generic = far.run(|| monitor.attach(&AttachOptions::new("eth0").mode(XdpMode::Generic))).unwrap();
    assert!(generic.fallback().is_none());
    let native = near.run(|| monitor.attach(&AttachOptions::new("eth0").mode(XdpMode::Auto))).unwrap();
    assert!(native.mode() == Some(XdpMode::Native) && native.fallback().is_none());
}

#[test]
fn a_program_on_the_bridge_above_is_named() {
    let pair = Pair::new().unwrap();
    pair.server.add_bridge("br0", &["eth0"]).unwrap();
    let above = monitor();
    let attachment = pair.server.run(|| above.attach(&AttachOptions::new("br0").mode(XdpMode::Generic))).unwrap();
    for mode in [XdpMode::Native, XdpMode::Generic, XdpMode::Auto] {
        let error = pair.server.run(|| monitor().attach(&AttachOptions::new("eth0").mode(mode))).unwrap_err();
        let Error::ForeignProgram { interface, member, .. } = &error else { panic!("{mode}: {error:?}") };
        assert_eq!((interface.as_str(), member.as_deref()), ("br0", Some("eth0")));
        assert!(error.to_string().contains("`br0`, which `eth0` belongs to, already runs XDP program"), "{error}");
    }
    let findings = pair.server.run(|| preflight::interface(&Interface::by_name("eth0").unwrap())).unwrap();
    assert!(findings.iter().any(|f| f.severity == Severity::Blocker && f.text.contains("`br0`")), "{findings:?}");
    attachment.detach().unwrap();
}

#[test]
fn a_map_without_memory_is_named_with_its_setting_and_its_bytes() {
    const NAME: &str = "a_map_without_memory_is_named_with_its_setting_and_its_bytes";
    if env::var_os(ROLE).is_some() {
        // Until the parent has put us into the group.
        std::io::stdin().read_line(&mut String::new()).unwrap();
        let error = Firewall::load(&FirewallConfig::default().capacity(4 << 20)).unwrap_err();
        let Error::NoMemory { program, map, setting, entries, bytes, memory_limit, .. } = &error else {
            panic!("{error:?}")
        };
        assert_eq!(program, "firewall");
        assert!(setting.contains("capacity") && !map.is_empty() && *entries > 4 << 20, "{error:?}");
        assert!(*bytes > u64::from(*entries), "{error:?}");
        let (group, limit) = memory_limit.as_ref().expect("the group that limits it");
        assert!(group.contains("xdpkit-lab-") && *limit == 128 << 20, "{error:?}");
        println!("{error}");
        return;
    }
    let limit = MemoryLimit::new(128 << 20).unwrap();
    let mut command = child(NAME, "load", &[]);
    let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    limit.add(process.id()).unwrap();
    drop(process.stdin.take());
    let text = told(process.wait_with_output().unwrap());
    assert!(text.contains("ask for less (the configuration's `capacity"), "{text}");
    assert!(text.contains("raise the memory limit of control group") && text.contains("128 MiB"), "{text}");
}
