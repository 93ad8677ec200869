//! One way for all functions to start: adopt what is pinned, or load.

use std::path::Path;

use super::home::stage_path;
use crate::{Error, Result};

/// A network function, as its start sees it.
pub(crate) trait Function: Sized {
    type Config;

    fn name_in(config: &Self::Config) -> &str;

    /// With new tables.
    fn load_new(config: &Self::Config) -> Result<Self>;

    /// With the tables that are pinned there.
    fn adopt_pinned(directory: &Path, name: &str) -> Result<Self>;

    /// Brings each setting that can change to the configuration. One that cannot and differs is refused before anything is
    /// changed, by its name there ([`StageCore::is_fixed`](super::StageCore::is_fixed)).
    fn apply(&self, config: &Self::Config) -> Result<()>;
}

/// Adopts what is pinned under the configuration's name and brings it to the configuration; loads where nothing is.
pub(crate) fn load_or_adopt<F: Function>(directory: &Path, config: &F::Config) -> Result<F> {
    let name = F::name_in(config);
    match F::adopt_pinned(directory, name) {
        Err(Error::PinMissing { path }) if path == stage_path(directory, name) => F::load_new(config),
        adopted => {
            let adopted = adopted?;
            adopted.apply(config)?;
            Ok(adopted)
        }
    }
}
