//! `coracle image …`: arguments and what they do, for the binary to mount.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, Subcommand};
use parking_lot::Mutex;

use super::registry::{Keyring, RegistryConfig};
use super::{ImageError, ImageStore, ImportSource, Progress, Stage, StoreOptions};

/// Arguments of `coracle image`.
#[derive(Debug, Args)]
pub struct ImageArgs {
    /// Folder of the node's data
    #[arg(long, default_value = "/var/lib/coracle", env = "CORACLE_DATA_DIR", global = true)]
    data_dir: PathBuf,
    /// Mirrors, credentials and certificates of registries
    #[arg(long, default_value = "/etc/coracle/registries.yaml", global = true)]
    registries: PathBuf,
    #[command(subcommand)]
    command: ImageCommand,
}

#[derive(Debug, Subcommand)]
enum ImageCommand {
    /// Pull images from their registries
    Pull {
        /// References, e.g. nginx:1.27
        #[arg(required = true)]
        references: Vec<String>,
    },
    /// Add the images of a docker-archive or OCI layout
    Import {
        /// A tar file (plain, gzip or zstd), the folder of an OCI layout, or - for standard input
        path: PathBuf,
        /// Name for the image, if the archive holds one
        #[arg(long)]
        name: Option<String>,
    },
    /// Write images as one archive
    Export {
        /// References or IDs
        #[arg(required = true)]
        references: Vec<String>,
        /// File to write, or - for standard output
        #[arg(long, short, default_value = "-")]
        output: PathBuf,
    },
    /// List images
    Ls {
        /// Print IDs only
        #[arg(long, short)]
        quiet: bool,
    },
    /// Remove names, and with an image's last name the image
    Rm {
        /// References or IDs
        #[arg(required = true)]
        references: Vec<String>,
    },
    /// Remove images without a name, and content that nothing needs
    Prune {
        /// Remove every image that no container uses
        #[arg(long, short)]
        all: bool,
    },
}

/// Runs the command; results go to `out`, progress bars to standard error when that is a terminal.
///
/// # Errors
/// The first thing that fails.
pub async fn run(args: ImageArgs, out: &mut (dyn Write + Send)) -> Result<(), ImageError> {
    let registries = RegistryConfig::load(&args.registries)?;
    let store =
        ImageStore::open(&args.data_dir.join("images"), StoreOptions { registries, ..StoreOptions::default() })?;
    let mut say =
        |line: String| writeln!(out, "{line}").map_err(|error| ImageError::io("write", "standard output", error));
    match args.command {
        ImageCommand::Pull { references } => {
            for reference in references {
                let bars = Arc::new(Bars::default());
                let image = store.pull(&reference, &Keyring::default(), bars.clone()).await;
                bars.end();
                say(image?.id.clone())?;
            }
        }
        ImageCommand::Import { path, name } => {
            let source = if path.as_os_str() == "-" {
                ImportSource::Stream(Box::new(std::io::stdin()))
            } else {
                ImportSource::Path(path)
            };
            for image in store.import(source, name.as_deref()).await? {
                say(image.repo_tags.first().cloned().unwrap_or_else(|| image.id.clone()))?;
            }
        }
        ImageCommand::Export { references, output } => {
            let to: Box<dyn Write + Send> = if output.as_os_str() == "-" {
                Box::new(std::io::stdout())
            } else {
                Box::new(std::fs::File::create(&output).map_err(|error| ImageError::io("create", &output, error))?)
            };
            store.export(references, to).await?;
        }
        ImageCommand::Ls { quiet } => {
            let images = store.list()?;
            if quiet {
                for image in images {
                    say(image.id.clone())?;
                }
                return Ok(());
            }
            let mut rows = vec![["REPOSITORY", "TAG", "IMAGE ID", "SIZE"].map(str::to_owned)];
            for image in images {
                let id = image.id.trim_start_matches("sha256:").chars().take(12).collect::<String>();
                let size = human_bytes(image.size_bytes);
                if image.repo_tags.is_empty() {
                    rows.push(["<none>".into(), "<none>".into(), id.clone(), size.clone()]);
                }
                for tag in &image.repo_tags {
                    let (repository, tag) = tag.rsplit_once(':').unwrap_or((tag, ""));
                    rows.push([repository.to_owned(), tag.to_owned(), id.clone(), size.clone()]);
                }
            }
            let widths: Vec<usize> =
                (0..4).map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0)).collect();
            for row in rows {
                let cells: Vec<String> =
                    row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
                say(cells.join("   ").trim_end().to_owned())?;
            }
        }
        ImageCommand::Rm { references } => {
            for reference in references {
                let removed = store.remove(&reference).await?;
                for name in removed.untagged {
                    say(format!("Untagged: {name}"))?;
                }
                for id in removed.deleted {
                    say(format!("Deleted: {id}"))?;
                }
            }
        }
        ImageCommand::Prune { all } => {
            let removed = store.prune(all).await?;
            for id in &removed.deleted {
                say(format!("Deleted: {id}"))?;
            }
            say(format!("Freed: {}", human_bytes(removed.freed_bytes)))?;
        }
    }
    Ok(())
}

/// `12.3MB`, powers of ten as registries show them.
fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes}B") } else { format!("{value:.1}{}", UNITS[unit]) }
}

/// One line per blob on a terminal, redrawn in place at most ten times a second.
#[derive(Default)]
struct Bars(Mutex<BarState>);

#[derive(Default)]
struct BarState {
    rows: Vec<(String, Stage, u64, u64)>,
    drawn_rows: usize,
    drawn_at: Option<std::time::Instant>,
    unpacking: bool,
}

/// Time between two redraws.
const REDRAW: std::time::Duration = std::time::Duration::from_millis(100);
/// Characters of a full bar.
const BAR_WIDTH: u64 = 30;

impl Bars {
    fn end(&self) {
        self.draw(&mut self.0.lock(), true);
    }

    fn draw(&self, state: &mut BarState, force: bool) {
        use std::io::IsTerminal;
        if !std::io::stderr().is_terminal() || (!force && state.drawn_at.is_some_and(|at| at.elapsed() < REDRAW)) {
            return;
        }
        let mut text = if state.drawn_rows > 0 { format!("\x1b[{}A", state.drawn_rows) } else { String::new() };
        for (digest, stage, done, total) in &state.rows {
            let filled = usize::try_from(done * BAR_WIDTH / (*total).max(1)).unwrap_or(0);
            let what = match stage {
                Stage::Exists => "exists",
                Stage::Downloading => "downloading",
                Stage::Downloaded if state.unpacking => "unpacking",
                Stage::Downloaded => "downloaded",
            };
            let short: String = digest.trim_start_matches("sha256:").chars().take(12).collect();
            let width = usize::try_from(BAR_WIDTH).unwrap_or(0);
            text.push_str(&format!(
                "\x1b[2K{short} [{:-<width$}] {:>8} / {:>8} {what}\n",
                "=".repeat(filled),
                human_bytes(*done),
                human_bytes(*total)
            ));
        }
        state.drawn_rows = state.rows.len();
        state.drawn_at = Some(std::time::Instant::now());
        // A terminal that is gone is no reason to stop the pull.
        if let Err(error) = std::io::stderr().write_all(text.as_bytes()) {
            tracing::trace!(%error, "cannot draw progress");
        }
    }
}

impl Progress for Bars {
    fn blob(&self, digest: &str, stage: Stage, done: u64, total: u64) {
        let mut state = self.0.lock();
        match state.rows.iter_mut().find(|row| row.0 == digest) {
            Some(row) => (row.1, row.2, row.3) = (stage, done, total),
            None => state.rows.push((digest.to_owned(), stage, done, total)),
        }
        self.draw(&mut state, stage != Stage::Downloading);
    }

    fn unpacking(&self) {
        let mut state = self.0.lock();
        state.unpacking = true;
        self.draw(&mut state, true);
    }
}
