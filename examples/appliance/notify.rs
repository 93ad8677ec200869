//! Tells a service manager that the appliance is ready (sd_notify(3)): what is ordered after it begins then.

use std::{
    env, io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
};

/// Does nothing when no manager has started this process.
pub(crate) fn ready() -> io::Result<()> {
    let Some(place) = env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let address = match place.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&place),
    };
    UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address?).map(drop)
}
