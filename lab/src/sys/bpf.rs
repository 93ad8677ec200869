//! The few bpf(2) commands that the laboratory itself needs, without libbpf.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use super::{check, check_fd};

const MAP_CREATE: libc::c_int = 0;
const PROG_LOAD: libc::c_int = 5;
const OBJ_PIN: libc::c_int = 6;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const LINK_CREATE: libc::c_int = 28;
const LINK_UPDATE: libc::c_int = 29;
const LINK_GET_FD_BY_ID: libc::c_int = 30;
const LINK_GET_NEXT_ID: libc::c_int = 31;
const LINK_DETACH: libc::c_int = 34;

const MAP_TYPE_ARRAY: u32 = 2;
const PROG_TYPE_XDP: u32 = 6;
const ATTACH_TYPE_XDP: u32 = 37;
const F_XDP_HAS_FRAGS: u32 = 1 << 5;
const LINK_TYPE_XDP: u32 = 6;
const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
pub(crate) const XDP_PASS: i32 = 2;
#[cfg(test)]
pub(crate) const XDP_TX: i32 = 3;

/// One eBPF instruction (`struct bpf_insn`).
#[repr(C)]
struct Insn {
    code: u8,
    regs: u8,
    off: i16,
    imm: i32,
}

/// The head of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// The same for `BPF_LINK_CREATE`.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

/// The same for `BPF_MAP_CREATE`.
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

/// The same for `BPF_OBJ_PIN`.
#[repr(C)]
struct ObjPin {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// The same for `BPF_LINK_UPDATE`.
#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// The same for `BPF_LINK_GET_NEXT_ID` and `BPF_LINK_GET_FD_BY_ID`.
#[repr(C)]
#[derive(Default)]
struct GetId {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

/// The same for `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
struct GetInfo {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The head of `struct bpf_link_info`.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    padding: u32,
    rest: [u64; 2],
}

/// # Safety
/// `attr` must be laid out as the head of `union bpf_attr` for `cmd`, and the addresses in it must
/// be valid for what `cmd` does with them.
unsafe fn bpf<T>(cmd: libc::c_int, attr: &T) -> libc::c_long {
    // SAFETY: the kernel reads `size_of::<T>()` bytes; the rest is the caller's promise.
    unsafe { libc::syscall(libc::SYS_bpf, cmd, attr as *const T, size_of::<T>()) }
}

/// Loads the program `return action` under a name of at most 15 bytes; it accepts multi-buffer frames if `frags`.
pub(crate) fn load_xdp_return(name: &str, action: i32, frags: bool) -> io::Result<OwnedFd> {
    let mut prog_name = [0; 16];
    if name.len() >= prog_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    prog_name[..name.len()].copy_from_slice(name.as_bytes());
    let insns = [
        Insn { code: 0xb7, regs: 0, off: 0, imm: action }, // r0 = action
        Insn { code: 0x95, regs: 0, off: 0, imm: 0 },      // exit
    ];
    let attr = ProgLoad {
        prog_type: PROG_TYPE_XDP,
        insn_cnt: insns.len() as u32,
        insns: insns.as_ptr() as u64,
        license: c"Dual BSD/GPL".as_ptr() as u64,
        prog_flags: if frags { F_XDP_HAS_FRAGS } else { 0 },
        prog_name,
        expected_attach_type: ATTACH_TYPE_XDP,
        ..ProgLoad::default()
    };
    // SAFETY: ProgLoad mirrors the attribute; the instructions and the licence outlive the call.
    check_fd(unsafe { bpf(PROG_LOAD, &attr) })
}

/// Attaches a program to the driver's XDP hook; `ifindex` counts in the calling thread's namespace.
pub(crate) fn attach_xdp_native(prog: BorrowedFd<'_>, ifindex: u32) -> io::Result<OwnedFd> {
    attach_xdp(prog, ifindex, XDP_FLAGS_DRV_MODE)
}

/// Attaches a program in generic mode, behind all that the stack merges.
pub(crate) fn attach_xdp_generic(prog: BorrowedFd<'_>, ifindex: u32) -> io::Result<OwnedFd> {
    attach_xdp(prog, ifindex, XDP_FLAGS_SKB_MODE)
}

fn attach_xdp(prog: BorrowedFd<'_>, ifindex: u32, flags: u32) -> io::Result<OwnedFd> {
    let attr =
        LinkCreate { prog_fd: prog.as_raw_fd() as u32, target_ifindex: ifindex, attach_type: ATTACH_TYPE_XDP, flags };
    // SAFETY: LinkCreate mirrors the attribute and holds no addresses.
    check_fd(unsafe { bpf(LINK_CREATE, &attr) })
}

/// The XDP link that runs a program of this id, if there is one.
pub(crate) fn xdp_link_of(program: u32) -> io::Result<Option<OwnedFd>> {
    let mut next = GetId::default();
    loop {
        // SAFETY: GetId mirrors the attribute, to which the kernel writes `next_id`.
        let found =
            check(unsafe { libc::syscall(libc::SYS_bpf, LINK_GET_NEXT_ID, &raw mut next, size_of::<GetId>()) } as i32);
        match found {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            other => other?,
        };
        next.id = next.next_id;
        // SAFETY: GetId mirrors the attribute and holds no addresses.
        let link = match check_fd(unsafe { bpf(LINK_GET_FD_BY_ID, &GetId { id: next.id, ..GetId::default() }) }) {
            // It has gone meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
            other => other?,
        };
        let mut info = LinkInfo::default();
        let length = size_of::<LinkInfo>() as u32;
        let attr = GetInfo { bpf_fd: link.as_raw_fd() as u32, info_len: length, info: &raw mut info as u64 };
        // SAFETY: GetInfo mirrors the attribute; the kernel writes at most `info_len` bytes to a live struct.
        check(unsafe { bpf(OBJ_GET_INFO_BY_FD, &attr) } as i32)?;
        if (info.kind, info.program) == (LINK_TYPE_XDP, program) {
            return Ok(Some(link));
        }
    }
}

/// Detaches a link.
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let fd = link.as_raw_fd() as u32;
    // SAFETY: the attribute is the descriptor.
    check(unsafe { bpf(LINK_DETACH, &fd) } as i32).map(drop)
}

/// Exchanges the program of a link.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let (link_fd, new_prog_fd) = (link.as_raw_fd() as u32, program.as_raw_fd() as u32);
    // SAFETY: LinkUpdate mirrors the attribute and holds no addresses.
    check(unsafe { bpf(LINK_UPDATE, &LinkUpdate { link_fd, new_prog_fd, flags: 0, old_prog_fd: 0 }) } as i32).map(drop)
}

/// Creates an array map of one value of this many bytes: something to pin.
pub(crate) fn create_array_of_one(value_size: u32) -> io::Result<OwnedFd> {
    let attr = MapCreate { map_type: MAP_TYPE_ARRAY, key_size: 4, value_size, max_entries: 1, map_flags: 0 };
    // SAFETY: MapCreate mirrors the attribute and holds no addresses.
    check_fd(unsafe { bpf(MAP_CREATE, &attr) })
}

/// Pins an object at `path`, which must lie in a bpffs.
pub(crate) fn pin(path: &CStr, object: BorrowedFd<'_>) -> io::Result<()> {
    let attr = ObjPin { pathname: path.as_ptr() as u64, bpf_fd: object.as_raw_fd() as u32, file_flags: 0 };
    // SAFETY: ObjPin mirrors the attribute; the path outlives the call.
    check(unsafe { bpf(OBJ_PIN, &attr) } as libc::c_int).map(drop)
}
