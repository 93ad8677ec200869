//! Where the tables of a stage are pinned: `DIR/stages/NAME`.

use std::{
    fs,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use bytemuck::{Pod, Zeroable};

use super::{
    Shared, StageKind,
    directory::{check_directory, check_name, create_directory, failure, names_in, put, remove_directory},
    owner::OWNER,
};
use crate::{
    Error, Result,
    sys::{
        map::{self, Map, TypedMap},
        pin as sys_pin,
    },
};

pub(crate) const STAGES: &str = "stages";
const ABI: &str = "abi";

/// The record beside a stage's maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
struct Abi {
    fingerprint: u64,
    /// Name of the kind, padded with zeros.
    kind: [u8; 24],
}

impl Abi {
    fn of(kind: &StageKind) -> Self {
        let mut name = [0; 24];
        name[..kind.name.len()].copy_from_slice(kind.name.as_bytes());
        Self { fingerprint: kind.abi, kind: name }
    }

    fn kind(&self) -> String {
        String::from_utf8_lossy(&self.kind).trim_end_matches('\0').to_owned()
    }
}

pub(crate) fn stage_path(directory: &Path, stage: &str) -> PathBuf {
    directory.join(STAGES).join(stage)
}

/// Names and kinds of the stages in a directory of pins.
pub(crate) fn pinned_stages(directory: &Path) -> Result<Vec<(String, String)>> {
    check_directory(directory, &[STAGES])?;
    // Names with `+` are half-made: a process died over them.
    let names = names_in(&directory.join(STAGES))?.into_iter().filter(|name| check_name(name).is_ok());
    names
        .map(|name| {
            let record = open_map(directory, &name, ABI)?;
            let kind = read_abi(&record, &map_path(directory, &name, ABI))?.kind();
            Ok((name, kind))
        })
        .collect()
}

pub(crate) fn map_path(directory: &Path, stage: &str, map: &str) -> PathBuf {
    stage_path(directory, stage).join(map)
}

/// One table of a stage, for who only reads it.
pub(crate) fn open_map(directory: &Path, stage: &str, name: &str) -> Result<Map> {
    check_directory(directory, &[STAGES, stage])?;
    let path = map_path(directory, stage, name);
    map::open_pinned(&path, name)?.ok_or(Error::PinMissing { path })
}

/// Opens the tables of a stage, after checking that this build understands them.
pub(crate) fn open_stage(directory: &Path, name: &str, kind: &'static StageKind) -> Result<Vec<Map>> {
    check_directory(directory, &[STAGES, name])?;
    let home = stage_path(directory, name);
    let path = home.join(ABI);
    let Some(record) = map::open_pinned(&path, ABI)? else {
        return Err(Error::PinMissing { path: home });
    };
    let (found, expected) = (read_abi(&record, &path)?, Abi::of(kind));
    let mismatch = |what: &str, found: String, expected: String| Error::PinMismatch {
        path: path.clone(),
        what: what.into(),
        found,
        expected,
    };
    if found.kind != expected.kind {
        return Err(mismatch("the kind of stage", found.kind(), expected.kind()));
    }
    if found.fingerprint != expected.fingerprint {
        let hex = |abi: Abi| format!("{:016x}", abi.fingerprint);
        return Err(mismatch("the ABI fingerprint", hex(found), hex(expected)));
    }
    let mut maps = Vec::new();
    for name in names_in(&home)?.into_iter().filter(|name| is_table(name)) {
        maps.extend(map::open_pinned(&home.join(&name), &name)?);
    }
    Ok(maps)
}

/// What else lies there says of whom the tables are.
fn is_table(name: &str) -> bool {
    name != ABI && name != OWNER && !name.contains('-')
}

fn read_abi(record: &Map, path: &Path) -> Result<Abi> {
    if !record.is_record_of(size_of::<Abi>()) {
        return Err(Error::PinMismatch {
            path: path.to_owned(),
            what: "the ABI record".into(),
            found: record.shape(),
            expected: format!("an array of one value of {} bytes", size_of::<Abi>()),
        });
    }
    Ok(TypedMap::<u32, Abi>::new(record).get(&0)?.unwrap_or(Abi::zeroed()))
}

/// Pins the tables of a stage, or checks that the ones pinned there are the same. Returns the directory if it is new.
pub(crate) fn pin_stage(directory: &Path, stage: &Shared) -> Result<Option<PathBuf>> {
    check_directory(directory, &[STAGES, &stage.name])?;
    let home = stage_path(directory, &stage.name);
    if home.exists() {
        for map in &stage.maps {
            let path = home.join(map.name());
            let pinned = map::open_pinned(&path, map.name())?.ok_or(Error::PinMissing { path: path.clone() })?;
            let (found, expected) = (pinned.id()?, map.id()?);
            if found != expected {
                return Err(Error::PinMismatch {
                    path,
                    what: format!("the table of stage `{}`", stage.name),
                    found: format!("map {found} of another value"),
                    expected: format!(
                        "map {expected} of this one (adopt the pinned stage instead of loading a new one)"
                    ),
                });
            }
        }
        stage.owner.join(&home)?;
        return Ok(None);
    }
    stage.next_hops.iter().for_each(|next_hops| next_hops.set_pinned());
    let aside = pin_aside(directory, stage)?;
    fs::rename(&aside, &home).map_err(failure(&home, "put the pins in place"))?;
    stage.owner.join(&home)?;
    Ok(Some(home))
}

/// Where tables are pinned before they are in their place, and after.
pub(crate) fn aside_path(directory: &Path, stage: &str) -> PathBuf {
    directory.join(STAGES).join(format!("{stage}+"))
}

/// Aside first, then renamed: a crash leaves no half of a stage that could be adopted.
fn pin_aside(directory: &Path, stage: &Shared) -> Result<PathBuf> {
    let aside = aside_path(directory, &stage.name);
    remove_directory(&aside)?;
    create_directory(&aside)?;
    let record = Map::create_record("xdpkit_abi", size_of::<Abi>())?;
    let table = TypedMap::<u32, Abi>::new(&record);
    table.set(&0, &Abi::of(stage.kind)).map_err(|error| record.error("write the fingerprint", error))?;
    put(record.as_fd(), &aside.join(ABI))?;
    for map in &stage.maps {
        put(map.as_fd(), &aside.join(map.name()))?;
    }
    stage.owner.pin(&aside)?;
    Ok(aside)
}

/// Puts a stage's larger tables in the place of those that are pinned; its process is the owner for good. The earlier ones
/// are aside then.
pub(crate) fn exchange_stage(directory: &Path, stage: &Shared) -> Result<()> {
    let (home, aside) = (stage_path(directory, &stage.name), pin_aside(directory, stage)?);
    stage
        .owner
        .put_in_place(&home, || sys_pin::exchange(&aside, &home).map_err(failure(&home, "put larger tables in place")))
}
