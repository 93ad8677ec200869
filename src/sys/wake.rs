//! One descriptor for several sources of news (epoll(7)): readable when one of them has some.

use std::{
    fmt, io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    sync::Arc,
    time::Duration,
};

use super::net::wait_readable;

/// What can have news: its descriptor is readable then.
pub(crate) trait Source: AsFd + fmt::Debug + Send + Sync {
    /// Takes all news, so that the descriptor is readable again only after more of them.
    fn drain(&self) -> io::Result<()>;
}

impl<S: Source + ?Sized> Source for Arc<S> {
    fn drain(&self) -> io::Result<()> {
        S::drain(self)
    }
}

/// Sources that are waited for together.
#[derive(Debug)]
pub(crate) struct Sources {
    epoll: OwnedFd,
    all: Vec<Box<dyn Source>>,
}

impl Sources {
    pub(crate) fn new(all: Vec<Box<dyn Source>>) -> io::Result<Self> {
        // SAFETY: no pointers are involved.
        let epoll = owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        for source in &all {
            let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0 };
            let fd = source.as_fd().as_raw_fd();
            // SAFETY: both descriptors are open, and the event lives through the call.
            if unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(Self { epoll, all })
    }

    /// Takes all news of all sources. Whatever is looked at afterwards is no older than the next.
    pub(crate) fn drain(&self) -> io::Result<()> {
        self.all.iter().try_for_each(|source| source.drain())
    }

    /// Waits for news of any source, at most this long.
    pub(crate) fn wait(&self, timeout: Duration) -> io::Result<()> {
        wait_readable(self.epoll.as_raw_fd(), timeout).map(drop)
    }
}

impl AsFd for Sources {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

/// A source that has news again and again.
#[derive(Debug)]
pub(crate) struct Tick(OwnedFd);

impl Tick {
    pub(crate) fn every(interval: Duration) -> io::Result<Self> {
        // SAFETY: no pointers are involved.
        let timer =
            owned(unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK | libc::TFD_CLOEXEC) })?;
        let tick = Self(timer);
        tick.set(interval)?;
        Ok(tick)
    }

    /// From now on, this often.
    pub(crate) fn set(&self, interval: Duration) -> io::Result<()> {
        let each = libc::timespec {
            tv_sec: interval.as_secs() as libc::time_t,
            tv_nsec: libc::c_long::from(interval.subsec_nanos() as i32),
        };
        let setting = libc::itimerspec { it_interval: each, it_value: each };
        // SAFETY: the setting lives through the call; the old one is not asked for.
        let set = unsafe { libc::timerfd_settime(self.0.as_raw_fd(), 0, &raw const setting, std::ptr::null_mut()) };
        if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsFd for Tick {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Source for Tick {
    fn drain(&self) -> io::Result<()> {
        let mut count = 0_u64;
        // SAFETY: the kernel writes the eight bytes of a live integer.
        let read = unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), size_of::<u64>()) };
        match io::Error::last_os_error() {
            error if read < 0 && error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }
}

fn owned(fd: i32) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tick_is_news_until_it_is_taken() {
        let sources = Sources::new(vec![Box::new(Tick::every(Duration::from_millis(20)).unwrap())]).unwrap();
        let readable = |timeout| wait_readable(sources.as_fd().as_raw_fd(), timeout).unwrap();
        for _ in 0..3 {
            assert!(readable(Duration::from_secs(60)));
            sources.drain().unwrap();
        }
        sources.drain().unwrap();
        assert!(Sources::new(Vec::new()).unwrap().wait(Duration::ZERO).is_ok());
    }
}
