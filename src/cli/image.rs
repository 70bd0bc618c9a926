//! `coinop image build`: makes the agent image from Debian packages and puts it on the engine, without a registry. The
//! script in `container/image/` does the making; this carries it and speaks to the engine.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use clap::Subcommand;
use include_dir::{Dir, include_dir};
use serde_json::json;

use super::common::{Common, Overrides, block_on};
use super::exit::{Exit, Failure, OrExit, Outcome};
use super::output;
use crate::sandbox::docker;

static IMAGE: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/container/image");
const SCRIPT: &str = "build.sh";

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    pub what: What,
}

#[derive(Debug, Subcommand)]
pub enum What {
    /// Build the agent image from Debian packages and load it into the engine; needs mmdebstrap
    Build(Build),
}

#[derive(Debug, clap::Args)]
pub struct Build {
    /// Name of the image on the engine [default: docker.image of the configuration]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Mirror for Debian's packages [default: the one that this machine's apt uses]
    #[arg(long, value_name = "URL")]
    pub mirror: Option<String>,
    /// Mirror for security updates
    #[arg(long, value_name = "URL")]
    pub security: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: Args, common: &Common) -> Outcome {
    let What::Build(args) = args.what;
    let config = common.start_quietly(Overrides::default())?;
    let name = args.name.clone().unwrap_or_else(|| config.docker.image.clone());
    block_on(async {
        // Before the long part: an engine that is not there is told at once.
        let engine = docker::Importer::connect(config.docker.host.as_deref()).await.or_exit(Exit::Failure)?;
        let folder = tempfile::tempdir().or_exit(Exit::Failure)?;
        let tar = folder.path().join("image.tar");
        let changes = make(&args, folder.path(), &tar).or_exit(Exit::Failure)?;
        let id = engine.import(&name, &tar, changes).await.or_exit(Exit::Failure)?;
        if args.json {
            output::json(&json!({ "name": name, "id": id }))?;
        } else {
            output::data(&format!("{name}  {id}"))?;
        }
        Ok::<_, Failure>(Exit::Ok)
    })
}

/// Runs the script: the image's files go into `tar`, its settings are returned.
fn make(args: &Build, folder: &Path, tar: &Path) -> anyhow::Result<Vec<String>> {
    IMAGE.extract(folder).context("cannot unpack the image's script")?;
    let script = |words: &[&str]| {
        let mut script = Command::new("bash");
        script.arg(folder.join(SCRIPT)).stderr(std::process::Stdio::inherit());
        for (flag, value) in [("--mirror", &args.mirror), ("--security", &args.security)] {
            if let Some(value) = value {
                script.args([flag, value]);
            }
        }
        script.args(words).output().context("cannot run bash")
    };
    let file = tar.to_str().context("the temporary folder's name is not text")?;
    let made = script(&["tar", file])?;
    ensure!(made.status.success(), "the image could not be made; see the output above");
    let changes = script(&["changes"])?;
    ensure!(changes.status.success(), "the image's settings cannot be read");
    Ok(String::from_utf8_lossy(&changes.stdout).lines().map(str::to_owned).collect())
}
