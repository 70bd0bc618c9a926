//! The engine as this backend uses it: finds the image, makes, starts and removes containers. What they are like is
//! `hardened`'s, what is said to the shim inside is `line`'s.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use bollard::Docker;
use bollard::container::AttachContainerResults;
use bollard::errors::Error as EngineError;
use bollard::models::{ContainerCreateBody, ContainerUpdateBody, SystemInfo};
use bollard::query_parameters::{
    AttachContainerOptionsBuilder, CreateContainerOptionsBuilder, CreateImageOptionsBuilder,
    ListContainersOptionsBuilder, RemoveContainerOptionsBuilder, StatsOptionsBuilder,
};
use coinop_shim::wire::Usage;
use futures_util::StreamExt;
use tokio_util::io::ReaderStream;

use super::super::Error;
use super::shim;

/// Whose containers these are: the node's label, and that of this life of it.
pub const NODE_LABEL: &str = "coinop.node";
const RUN_LABEL: &str = "coinop.run";
/// How engines say that a container's name is another one's; their codes differ.
const NAME_TAKEN: &str = "already in use";
/// What Podman calls itself among its parts.
const PODMAN: &str = "Podman";
/// How long an engine may take to remove a container that it says it removes.
const REMOVAL: Duration = Duration::from_secs(20);

/// An image that is on the engine.
#[derive(Debug, Clone)]
pub struct Image {
    /// `sha256:…` of its configuration: names exactly one image, whatever tags move.
    pub id: String,
    /// What the operator called it, with a digest.
    pub shown: String,
    /// The PATH that its commands expect.
    pub path: Option<String>,
    /// Where it wants a disk of the engine's.
    pub volumes: Vec<String>,
    /// Whether it wants a program of its own to be run now and then.
    pub has_healthcheck: bool,
}

pub struct Engine {
    pub docker: Docker,
    pub node: String,
    pub run: String,
    pub runtime: Option<String>,
    /// Where the shim lies, and the path of that on the engine's host; not known before it was carried there.
    pub volume: String,
    pub volume_path: OnceLock<String>,
    /// As many files as the engine lets a process open; not known before a first container has told.
    pub most_files: OnceLock<u64>,
}

/// How a call to the engine failed, in the room's words, with every cause that lies below it.
pub fn failed(doing: &'static str) -> impl FnOnce(EngineError) -> Error {
    move |why| Error::Host { doing, source: io::Error::other(with_causes(&why)) }
}

fn with_causes(why: &EngineError) -> String {
    let (mut told, mut below) = (why.to_string(), std::error::Error::source(why));
    while let Some(cause) = below {
        let cause_told = cause.to_string();
        if !told.contains(&cause_told) {
            told = format!("{told}: {cause_told}");
        }
        below = cause.source();
    }
    told
}

/// As [`failed`], with what the operator may do about it.
fn unreachable(doing: &'static str) -> impl FnOnce(EngineError) -> Error {
    let next = "start the engine, or set docker.host or DOCKER_HOST to its address";
    move |why| Error::Host { doing, source: io::Error::other(format!("{}; {next}", with_causes(&why))) }
}

fn is_status(why: &EngineError, status: u16) -> bool {
    matches!(why, EngineError::DockerResponseServerError { status_code, .. } if *status_code == status)
}

/// Dials the engine, in a version of the API that it speaks.
async fn dial(host: Option<&str>) -> Result<Docker, Error> {
    // Without one, the first word of TLS would be a panic.
    if rustls::crypto::CryptoProvider::get_default().is_none()
        && rustls::crypto::ring::default_provider().install_default().is_err()
    {
        tracing::trace!("another thread was first to choose TLS");
    }
    if host.is_some_and(names_an_ssh_port) {
        // The client hands the address to ssh as a name, which a port is no part of.
        let why = "a port of ssh:// is not understood: name the host in ~/.ssh/config with its Port, and give that name";
        let source = io::Error::new(io::ErrorKind::InvalidInput, why);
        return Err(Error::Host { doing: "read the engine's address", source });
    }
    let docker = match host {
        Some(host) => Docker::connect_with_host(host),
        None => Docker::connect_with_defaults(),
    };
    let docker = docker.map_err(unreachable("read the engine's address"))?;
    docker.negotiate_version().await.map_err(unreachable("reach the engine"))
}

fn names_an_ssh_port(host: &str) -> bool {
    let url = url::Url::parse(host).ok().filter(|url| url.scheme() == "ssh");
    url.is_some_and(|url| url.port().is_some())
}

/// Puts images on an engine that has no registry.
pub struct Importer(Docker);

impl Importer {
    /// # Errors
    /// When the engine cannot be reached.
    pub async fn connect(host: Option<&str>) -> Result<Importer, Error> {
        Ok(Importer(dial(host).await?))
    }

    /// Makes an image of a tar of files, with settings as lines of a Dockerfile; its id.
    ///
    /// # Errors
    /// When the tar cannot be read, or the engine refuses it.
    pub async fn import(&self, name: &str, tar: &Path, settings: Vec<String>) -> Result<String, Error> {
        let doing = "import the image";
        let version = self.0.version().await.map_err(failed(doing))?;
        let parts = version.components.unwrap_or_default();
        if settings.len() > 1 && parts.iter().any(|part| part.name.contains(PODMAN)) {
            // It would take the lines for one, and call that an image.
            let why = "this engine is Podman, whose API takes one setting with an image: `podman import --change …` takes all";
            return Err(Error::Host { doing, source: io::Error::new(io::ErrorKind::Unsupported, why) });
        }
        let file = tokio::fs::File::open(tar).await.map_err(|source| Error::Host { doing, source })?;
        let body = bollard::body_try_stream(ReaderStream::with_capacity(file, 1 << 20));
        // Podman takes no notice of a tag that stands by itself.
        let options = CreateImageOptionsBuilder::new().from_src("-").repo(name).changes(settings).build();
        let mut steps = self.0.create_image(Some(options), Some(body), None);
        while let Some(step) = steps.next().await {
            step.map_err(failed(doing))?;
        }
        let made = self.0.inspect_image(name).await.map_err(failed(doing))?;
        Ok(made.id.unwrap_or_default())
    }
}

/// A name without a tag would mean all tags that there are.
fn one_tag(name: &str) -> String {
    let tagged = name.contains('@') || repository(name) != name;
    if tagged { name.to_owned() } else { format!("{name}:latest") }
}

/// Whether a name says where the image comes from; a digest alone comes from nowhere else.
fn names_a_registry(name: &str) -> bool {
    let place = name.split_once('/').map(|(place, _)| place);
    name.contains("sha256:") || place.is_some_and(|place| place.contains(['.', ':']) || place == "localhost")
}

/// A name without its tag.
fn repository(name: &str) -> &str {
    // A registry's port is no tag.
    name.rsplit_once(':').filter(|(_, tag)| !tag.contains('/')).map_or(name, |(repository, _)| repository)
}

impl Engine {
    /// Dials the engine: `unix://`, `tcp://` (with TLS where DOCKER_TLS_VERIFY and DOCKER_CERT_PATH say so) or
    /// `ssh://`; without a host, DOCKER_HOST or the usual socket.
    pub async fn connect(
        host: Option<&str>,
        node: String,
        run: String,
        runtime: Option<String>,
    ) -> Result<Engine, Error> {
        let docker = dial(host).await?;
        let volume = shim::volume(&node);
        let (volume_path, most_files) = (OnceLock::new(), OnceLock::new());
        Ok(Engine { docker, node, run, runtime, volume, volume_path, most_files })
    }

    pub async fn info(&self) -> Result<SystemInfo, Error> {
        self.docker.info().await.map_err(failed("ask the engine what it can do"))
    }

    /// The image of this name; pulled where the engine knows a registry that has it.
    pub async fn image(&self, name: &str) -> Result<Image, Error> {
        // As Podman calls an image that was made there and came from nowhere.
        let made_there = format!("localhost/{name}");
        for name in [name, &made_there].into_iter().take(if names_a_registry(name) { 1 } else { 2 }) {
            match self.find(name).await {
                Err(why) if is_status(&why, 404) => {}
                other => return other.map_err(failed("look for its image")),
            }
        }
        let options = CreateImageOptionsBuilder::new().from_image(&one_tag(name)).build();
        let mut pulling = self.docker.create_image(Some(options), None, None);
        while let Some(step) = pulling.next().await {
            let step = step.map_err(|why| {
                let why = format!("{name} is not on the engine, and cannot be pulled: {why}");
                Error::Host { doing: "find its image", source: io::Error::other(why) }
            })?;
            let (status, id) = (step.status.unwrap_or_default(), step.id.unwrap_or_default());
            let done = step.progress_detail.and_then(|detail| Some((detail.current?, detail.total?)));
            match done {
                Some((current, total)) => tracing::debug!(image = name, id, current, total, "{status}"),
                None => tracing::info!(image = name, id, "{status}"),
            }
        }
        self.find(name).await.map_err(failed("find the image that was pulled"))
    }

    async fn find(&self, name: &str) -> Result<Image, EngineError> {
        let found = self.docker.inspect_image(name).await?;
        let id = found.id.unwrap_or_default();
        // An image can have come from several places: the one that was asked for, if it is among them.
        let place = format!("{}@", name.split_once('@').map_or(repository(name), |(place, _)| place));
        let digests = found.repo_digests.unwrap_or_default();
        let digest = digests.iter().find(|digest| digest.starts_with(&place)).or(digests.first()).cloned();
        let config = found.config.unwrap_or_default();
        let (env, volumes) = (config.env.unwrap_or_default(), config.volumes.unwrap_or_default());
        let path = env.iter().find_map(|pair| pair.strip_prefix("PATH=")).map(str::to_owned);
        let shown = match digest {
            Some(digest) => digest,
            None if name.contains("sha256:") => name.to_owned(),
            None => format!("{name}@{id}"),
        };
        let has_healthcheck = config.healthcheck.is_some();
        Ok(Image { id, shown, path, volumes, has_healthcheck })
    }

    pub fn labels(&self) -> HashMap<String, String> {
        [(NODE_LABEL, &self.node), (RUN_LABEL, &self.run)]
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.clone()))
            .collect()
    }

    /// Makes a container, not yet started; its id, or none where another container has this name.
    pub async fn create(
        &self,
        name: &str,
        body: ContainerCreateBody,
        doing: &'static str,
    ) -> Result<Option<String>, Error> {
        let options = CreateContainerOptionsBuilder::new().name(name).build();
        match self.docker.create_container(Some(options), body).await {
            Ok(made) => Ok(Some(made.id)),
            Err(EngineError::DockerResponseServerError { message, .. }) if message.contains(NAME_TAKEN) => {
                Ok(None)
            }
            Err(why) => Err(failed(doing)(why)),
        }
    }

    /// The container of this name, where this life of the node has made it.
    pub async fn own(&self, name: &str) -> Result<Option<String>, Error> {
        match self.docker.inspect_container(name, None).await {
            Ok(found) => {
                let labels = found.config.and_then(|config| config.labels).unwrap_or_default();
                Ok(found.id.filter(|_| labels.get(RUN_LABEL) == Some(&self.run)))
            }
            Err(why) if is_status(&why, 404) => Ok(None),
            Err(why) => Err(failed("look for its container")(why)),
        }
    }

    /// Attaches first, so that nothing the shim says is lost.
    pub async fn start(&self, container: &str) -> Result<AttachContainerResults, Error> {
        let streams = AttachContainerOptionsBuilder::new().stream(true).stdin(true).stdout(true).stderr(true);
        // No bytes are a person's keys: Podman would take ^P ^Q for the wish to let go.
        let options = streams.detach_keys("").build();
        let attached = self.docker.attach_container(container, Some(options)).await;
        let attached = attached.map_err(failed("attach to its container"))?;
        self.docker.start_container(container, None).await.map_err(failed("start its container"))?;
        Ok(attached)
    }

    /// The process 1 of a container that runs, by its number on the engine's host.
    pub async fn pid(&self, container: &str) -> Result<Option<i64>, Error> {
        let found = self.docker.inspect_container(container, None).await;
        let found = found.map_err(failed("look for its container's process"))?;
        Ok(found.state.and_then(|state| state.pid).filter(|pid| *pid > 0))
    }

    /// Sets the memory of a container that runs, and the swap beyond it.
    pub async fn give_memory(&self, container: &str, bytes: u64, swap_bytes: u64) -> Result<(), Error> {
        let number = |value: u64| Some(i64::try_from(value).unwrap_or(i64::MAX));
        let (memory, memory_swap) = (number(bytes), number(bytes.saturating_add(swap_bytes)));
        let update = ContainerUpdateBody { memory, memory_swap, ..ContainerUpdateBody::default() };
        self.docker.update_container(container, update).await.map_err(failed("give it memory"))
    }

    /// What a living container has used, as the engine counts it; of its files it knows nothing.
    pub async fn used(&self, container: &str) -> Result<Usage, Error> {
        let options = StatsOptionsBuilder::new().stream(false).one_shot(true).build();
        let found = self.docker.stats(container, Some(options)).next().await.transpose();
        let found = found.map_err(failed("read what it used"))?.unwrap_or_default();
        let cpu_ns = found.cpu_stats.and_then(|cpu| cpu.cpu_usage?.total_usage);
        // Version 2 of cgroups has no peak here.
        let peak = found.memory_stats.and_then(|memory| memory.max_usage.or(memory.usage));
        Ok(Usage { cpu_us: cpu_ns.map(|ns| ns / 1000), peak_memory_bytes: peak, disk_bytes: 0 })
    }

    pub async fn kill(&self, container: &str) -> Result<(), Error> {
        match self.docker.kill_container(container, None).await {
            // It has ended, or is gone.
            Err(why) if is_status(&why, 409) || is_status(&why, 404) => Ok(()),
            other => other.map_err(failed("kill its container")),
        }
    }

    /// Removes a container with all that is its own, and returns when the engine knows it no more. One that is gone is
    /// no error.
    pub async fn remove(&self, container: &str) -> Result<(), Error> {
        let doing = "remove its container";
        let late = tokio::time::Instant::now() + REMOVAL;
        loop {
            let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
            match self.docker.remove_container(container, Some(options)).await {
                Ok(()) => return Ok(()),
                Err(why) if is_status(&why, 404) => return Ok(()),
                // It is being removed already, as one is that has ended.
                Err(why) if is_status(&why, 409) && tokio::time::Instant::now() < late => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                Err(why) => return Err(failed(doing)(why)),
            }
        }
    }

    /// Containers that an earlier life of this node left.
    pub async fn leftovers(&self) -> Result<Vec<String>, Error> {
        let of_this_node = vec![format!("{NODE_LABEL}={}", self.node)];
        let filters = HashMap::from([("label".to_owned(), of_this_node)]);
        let options = ListContainersOptionsBuilder::new().all(true).filters(&filters).build();
        let found = self.docker.list_containers(Some(options)).await;
        let found = found.map_err(failed("look for leftovers"))?.into_iter();
        let this_run = |labels: &HashMap<String, String>| labels.get(RUN_LABEL) == Some(&self.run);
        Ok(found.filter(|one| !one.labels.as_ref().is_some_and(this_run)).filter_map(|one| one.id).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_on_the_engine_is_looked_for_unless_the_name_says_where_it_comes_from() {
        for local in ["coinop-agent:bookworm", "coinop-agent", "team/agent:1"] {
            assert!(!names_a_registry(local), "{local}");
        }
        for from in [
            "127.0.0.1:1/nobody/x:none",
            "ghcr.io/a/b",
            "localhost/x:1",
            "host:5000/x",
            "sha256:00",
            "a@sha256:00",
        ] {
            assert!(names_a_registry(from), "{from}");
        }
    }

    #[test]
    fn one_image_is_pulled_not_all_tags_of_a_name() {
        for (name, pulled) in [
            ("debian", "debian:latest"),
            ("debian:12", "debian:12"),
            ("host:5000/debian", "host:5000/debian:latest"),
            ("host:5000/debian:12", "host:5000/debian:12"),
            ("debian@sha256:00", "debian@sha256:00"),
        ] {
            assert_eq!(one_tag(name), pulled);
        }
    }
}
