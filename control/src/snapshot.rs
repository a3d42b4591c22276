//! `coracle snapshot`: carry the state of the embedded store away, check such a file, and begin anew from it.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Subcommand};
use coracle_store::{EmbeddedOptions, SnapshotSummary};

/// Options of `coracle snapshot`.
#[derive(Clone, Debug, Args)]
pub(crate) struct SnapshotArgs {
    #[command(subcommand)]
    command: SnapshotCommand,
    /// Key file that secrets are encrypted with on disk, if the server has one
    #[arg(long, global = true, value_name = "FILE")]
    secrets_encryption_key_file: Option<PathBuf>,
    /// Folder of everything that must survive a reboot
    #[arg(long, global = true, default_value = "/var/lib/coracle", value_name = "FOLDER")]
    data_dir: PathBuf,
}

#[derive(Clone, Debug, Subcommand)]
enum SnapshotCommand {
    /// Save the state to a file, also while the server runs
    Save {
        /// The file to write
        file: PathBuf,
    },
    /// Make the state of a stopped server out of a file; the data folder must hold none
    Restore {
        /// The file to read
        file: PathBuf,
        /// Add this to the revision, so that no client takes the old state for a newer one
        #[arg(long, default_value_t = 1_000_000_000, value_name = "NUMBER")]
        bump_revision: u64,
    },
    /// Read all of a file and tell what is in it
    Verify {
        /// The file to read
        file: PathBuf,
    },
}

/// Does what the arguments say, and prints what the snapshot holds.
pub(crate) fn run(arguments: SnapshotArgs) -> anyhow::Result<()> {
    let folder = arguments.data_dir.join("store");
    let options = EmbeddedOptions { key_file: arguments.secrets_encryption_key_file, ..EmbeddedOptions::default() };
    let (file, summary) = match arguments.command {
        SnapshotCommand::Save { file } => {
            // A folder that does not exist is a mistake of the caller, not an empty store.
            std::fs::metadata(&folder).with_context(|| format!("find the store {}", folder.display()))?;
            let summary = coracle_store::save(&folder, &file, &options).context("save the snapshot")?;
            (file, summary)
        }
        SnapshotCommand::Restore { file, bump_revision } => {
            let summary =
                coracle_store::restore(&file, &folder, bump_revision, &options).context("restore the snapshot")?;
            (file, summary)
        }
        SnapshotCommand::Verify { file } => {
            let summary = coracle_store::verify(&file, &options).context("verify the snapshot")?;
            (file, summary)
        }
    };
    let SnapshotSummary { revision, objects, bytes } = summary;
    println!("{}: revision {revision}, {objects} objects, {bytes} bytes", file.display());
    Ok(())
}
