//! A day in the life: connections while MACs, routes, addresses, neighbours, links and MTUs change every second. The kernel's own
//! forwarding in a laboratory of its own keeps nearly all, and the balancers as many.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use xdpkit_lab::traffic::TcpEcho;

use crate::{
    balancers::PORTS,
    bench::{balanced, beside_the_kernel, lead, routed},
    common::{is_emulated, times},
    lab::{BACK, BALANCER, FAMILIES, Lab, SECOND, reply_by},
    live::{change_macs, forget_neighbours, renumber},
};

/// How long TCP may need to find out that packets arrive again.
const RECOVERY: Duration = Duration::from_secs(30);

/// One connection, on which a word goes there and back, again and again.
struct Connection {
    name: String,
    stream: TcpStream,
    /// Words that came back.
    words: u64,
    /// Bytes of the next one that have come.
    heard: usize,
    last: Instant,
    lost: Option<String>,
}

impl Connection {
    fn open(lab: &Lab, name: &str, target: SocketAddr) -> Self {
        let stream = lab.client.run(|| TcpStream::connect_timeout(&target, RECOVERY));
        let stream = stream.unwrap_or_else(|error| panic!("{name}: {error}"));
        stream.set_nodelay(true).unwrap();
        stream.set_nonblocking(true).unwrap();
        let mut new = Self { name: name.into(), stream, words: 0, heard: 0, last: Instant::now(), lost: None };
        new.say();
        new
    }

    fn say(&mut self) {
        self.last = Instant::now();
        if let Err(error) = self.stream.write_all(&self.words.to_be_bytes()) {
            self.lost = Some(error.to_string());
        }
    }

    /// Hears what there is, and says the next word after a while.
    fn go_on(&mut self, pause: Duration) {
        let mut bytes = [0; 8];
        match self.stream.read(&mut bytes[self.heard..]) {
            Ok(0) => self.lost = Some("closed".into()),
            Ok(count) => self.heard += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => self.lost = Some(error.to_string()),
        }
        if self.heard == 8 && self.last.elapsed() >= pause {
            self.words += 1;
            self.heard = 0;
            self.say();
        }
    }
}

/// The network as it is, and how it becomes another.
struct Day<'l> {
    lab: &'l Lab,
    /// By which network the backend is reached.
    link: u8,
    /// The balancer's number and the backend's in the back network.
    numbers: [u8; 2],
    mtu: u32,
}

impl<'l> Day<'l> {
    fn new(lab: &'l Lab) -> Self {
        Self { lab, link: BACK, numbers: [BALANCER, lab.number(0)], mtu: 1500 }
    }

    fn change(&mut self, number: usize) {
        let lab = self.lab;
        match number % 6 {
            0 => change_macs(lab),
            1 => forget_neighbours(lab),
            2 => {
                let new = self.numbers.map(|number| if number < 50 { number + 50 } else { number - 50 });
                renumber(lab, [self.numbers[0], new[0]], [self.numbers[1], new[1]]);
                self.numbers = new;
            }
            3 => self.lead_by(SECOND),
            4 => {
                self.lead_by(BACK);
                thread::sleep(Duration::from_millis(300));
                lab.balancer.set_down("eth1").unwrap();
                self.replies_by(SECOND);
                thread::sleep(Duration::from_millis(400));
                lab.balancer.set_up("eth1").unwrap();
                self.lead_by(BACK);
            }
            _ => {
                self.mtu = 2900 - self.mtu;
                ["eth0", "eth1", "eth2"].iter().for_each(|dev| lab.balancer.set_mtu(dev, self.mtu).unwrap());
            }
        }
    }

    fn lead_by(&mut self, link: u8) {
        self.link = link;
        let backend = if link == BACK { self.numbers[1] } else { self.lab.number(0) };
        lead(self.lab, link, backend, None);
        self.replies_by(link);
    }

    fn replies_by(&self, link: u8) {
        let balancer = if link == BACK { self.numbers[0] } else { BALANCER };
        FAMILIES.iter().for_each(|family6| reply_by(&self.lab.backends[0], *family6, link, balancer).unwrap());
    }
}

impl Drop for Day<'_> {
    fn drop(&mut self) {
        if self.numbers[0] != BALANCER && !thread::panicking() {
            self.change(2);
        }
    }
}

/// Connections to these targets in turn, through so many changes; what became of each.
fn live(lab: &Lab, targets: &[(String, SocketAddr)], count: usize, changes: usize) -> Vec<Connection> {
    let _echoes: Vec<_> =
        PORTS.map(|port| TcpEcho::start(&lab.backends[0], SocketAddr::new([0_u8; 16].into(), port)).unwrap()).into();
    let turns = targets.iter().cycle().take(count);
    let mut connections: Vec<_> = turns.map(|(name, target)| Connection::open(lab, name, *target)).collect();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut day = Day::new(lab);
            for number in 0..changes {
                let next = Instant::now() + Duration::from_secs(1);
                day.change(number);
                thread::sleep(next.saturating_duration_since(Instant::now()));
            }
            over.store(true, Ordering::Relaxed);
        });
        let pause = Duration::from_millis(if is_emulated() { 500 } else { 50 });
        let mut end: Option<(Instant, Vec<u64>)> = None;
        loop {
            let alive = connections.iter_mut().filter(|connection| connection.lost.is_none());
            alive.for_each(|connection| connection.go_on(pause));
            if let Some((deadline, words)) = &end {
                // Two more words: what was heard last may have been said before.
                let mut open = connections.iter().zip(words).filter(|(connection, _)| connection.lost.is_none());
                if open.all(|(connection, words)| connection.words >= words + 2) || Instant::now() > *deadline {
                    break;
                }
            } else if over.load(Ordering::Relaxed) {
                end = Some((Instant::now() + RECOVERY, connections.iter().map(|c| c.words).collect()));
            }
            thread::sleep(Duration::from_millis(5));
        }
        let (_, words) = end.expect("the changes ended");
        for (connection, words) in connections.iter_mut().zip(words) {
            if connection.lost.is_none() && connection.words < words + 2 {
                connection.lost = Some(format!("silent for {:?} after {} words", connection.last.elapsed(), words));
            }
        }
    });
    connections
}

fn kept(connections: &[Connection]) -> (usize, Vec<String>) {
    let lost: Vec<_> =
        connections.iter().filter_map(|c| c.lost.as_ref().map(|why| format!("{}: {why}", c.name))).collect();
    (connections.len() - lost.len(), lost)
}

#[test]
fn connections_survive_a_day() {
    // In a full run, a whole minute: not five times what is usual.
    let [count, changes] = if times(0, 1, 0) > 0 { [200, 60] } else { [times(40, 200, 16), 6] };
    let kernel = |lab: &Lab| live(lab, &routed(lab), count, changes);
    let ours = |lab: &Lab| live(lab, &balanced(), count, changes);
    beside_the_kernel(kernel, ours, |kernel, ours| {
        let ((kernel, lost_by_kernel), (ours, lost)) = (kept(&kernel), kept(&ours));
        println!("{changes} changes: the kernel keeps {kernel} of {count} connections, the balancers {ours}");
        assert!(kernel * 10 >= count * 9, "the kernel's own forwarding keeps {kernel} of {count}: {lost_by_kernel:#?}");
        assert!(ours >= kernel, "{ours} of {count} were kept, by the kernel's own forwarding {kernel}: {lost:#?}");
    });
}
