//! One way for all functions to start: adopt what is pinned, or load.

use std::path::Path;

use super::home::stage_path;
use crate::{Error, Result};

/// Adopts what is pinned there under this name and brings it to the configuration; loads where nothing is. `configure` refuses
/// what cannot change, and differs, before it changes anything ([`StageCore::is_fixed`](super::StageCore::is_fixed)).
pub(crate) fn load_or_adopt<T>(
    directory: &Path,
    name: &str,
    adopt: impl FnOnce(&Path, &str) -> Result<T>,
    load: impl FnOnce() -> Result<T>,
    configure: impl FnOnce(&T) -> Result<()>,
) -> Result<T> {
    match adopt(directory, name) {
        Err(Error::PinMissing { path }) if path == stage_path(directory, name) => load(),
        adopted => {
            let adopted = adopted?;
            configure(&adopted)?;
            Ok(adopted)
        }
    }
}
