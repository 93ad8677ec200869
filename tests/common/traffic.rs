//! Traffic in lockstep: every denied frame must vanish and every allowed one arrive, while something is done to
//! the programs in between.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use xdpkit_lab::{PacketSocket, frame::Frame, topology::Pair};

/// Sources that tests deny. They are on the link, so that the stack would accept them.
pub(crate) const DENIED: [&str; 2] = ["10.0.0.66", "fd00::66"];

/// What was sent. All of `allowed` arrived and none of `denied`: else the thread panicked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sent {
    pub(crate) allowed: u64,
    pub(crate) denied: u64,
}

pub(crate) struct Lockstep {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Sent>,
}

impl Lockstep {
    /// Sends pairs of frames from the client to the server, both families in turn: one from a denied source,
    /// then one from the client's own address. The server's socket must see the second next, and only it.
    pub(crate) fn start(pair: &Pair) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let out = PacketSocket::open(&pair.client, "eth0").unwrap();
        let macs = (pair.client.mac("eth0").unwrap(), pair.server.mac("eth0").unwrap());
        let (servers, clients) = (pair.server_addr.both(), pair.client_addr.both());
        let sinks = servers.map(|address| pair.server.run(|| UdpSocket::bind((address, 9000)).unwrap()));
        for sink in &sinks {
            sink.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        }
        let stopping = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut sent = Sent::default();
            let mut buffer = [0; 64];
            while !stopping.load(Ordering::Relaxed) {
                for family in 0..2 {
                    let to = SocketAddr::new(servers[family], 9000);
                    let frame = |from, payload: &[u8]| {
                        Frame::udp(SocketAddr::new(from, 9001), to).macs(macs.0, macs.1).payload(payload).build()
                    };
                    out.send(&frame(DENIED[family].parse().unwrap(), b"denied")).unwrap();
                    sent.denied += 1;
                    let number = format!("allowed {}", sent.allowed);
                    out.send(&frame(clients[family], number.as_bytes())).unwrap();
                    sent.allowed += 1;
                    match sinks[family].recv(&mut buffer) {
                        Ok(length) => assert_eq!(
                            String::from_utf8_lossy(&buffer[..length]),
                            number,
                            "only the allowed frame arrives"
                        ),
                        Err(error) => panic!("allowed frame {} of family {family} was lost: {error}", sent.allowed),
                    }
                }
            }
            sent
        });
        Self { stop, thread }
    }

    pub(crate) fn is_running(&self) -> bool {
        !self.thread.is_finished()
    }

    /// Ends the traffic and answers what was sent; panics when a frame was lost or slipped by.
    pub(crate) fn stop(self) -> Sent {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("no frame was lost or slipped by")
    }
}
