//! The shim's way to an engine: a volume that all of a node's containers read and none can write. Each node has its own,
//! so that none changes what another one starts from.

use std::collections::HashMap;
use std::io::{self, Read};
use std::sync::Arc;

use bollard::models::{
    ContainerCreateBody, HostConfig, Mount, MountType, MountVolumeOptions, Volume, VolumeCreateRequest,
};
use bollard::query_parameters::{
    DownloadFromContainerOptionsBuilder, ListVolumesOptionsBuilder, RemoveVolumeOptions,
    UploadToContainerOptionsBuilder,
};
use bytes::Bytes;
use futures_util::StreamExt;
use jiff::Timestamp;
use sha2::{Digest, Sha256};

use super::super::Error;
use super::container::Container;
use super::engine::{Engine, Image, NODE_LABEL, failed};

/// The program that becomes process 1; built beside the node and carried in it.
pub(in crate::sandbox) const SHIM: &[u8] = include_bytes!(env!("SHIM_PROGRAM"));
const FOLDER: &str = "/.coinop";
const NAME: &str = "shim";
/// Beside it lies what containers get as /etc/hosts: without a network an engine writes none.
const HOSTS: &str = "127.0.0.1\tlocalhost coinop\n::1\tlocalhost\n";
const HOSTS_NAME: &str = "hosts";
/// What the names of all nodes' volumes begin with.
const VOLUMES: &str = "coinop-shim-";
/// A volume of another node that is older and that no container uses is one of a node that is gone. One that lives carries
/// its shim to the engine again.
const GONE_S: i64 = 24 * 60 * 60;

/// The name of a node's volume with this shim.
pub fn volume(node: &str) -> String {
    let digest = hex::encode(Sha256::new().chain_update(SHIM).chain_update(HOSTS).finalize());
    format!("{VOLUMES}{node}-{}", digest.get(..16).unwrap_or_default())
}

/// Its path inside.
pub fn program() -> String {
    format!("{FOLDER}/{NAME}")
}

pub fn mount(engine: &Engine, read_only: bool) -> Mount {
    Mount {
        target: Some(FOLDER.to_owned()),
        source: Some(engine.volume.clone()),
        typ: Some(MountType::VOLUME),
        read_only: Some(read_only),
        volume_options: Some(MountVolumeOptions { no_copy: Some(true), ..MountVolumeOptions::default() }),
        ..Mount::default()
    }
}

/// The file of names, by its path on the engine's host: a volume alone is mounted as a whole folder.
pub fn hosts_mount(engine: &Engine) -> Option<Mount> {
    let path = engine.volume_path.get().filter(|path| !path.is_empty())?;
    Some(Mount {
        target: Some("/etc/hosts".to_owned()),
        source: Some(format!("{path}/{HOSTS_NAME}")),
        typ: Some(MountType::BIND),
        read_only: Some(true),
        ..Mount::default()
    })
}

/// Whether a container could not be made or started because what it needs is not in the volume.
pub fn is_missing(engine: &Engine, why: &Error) -> bool {
    let (why, path) = (why.to_string(), engine.volume_path.get());
    why.contains(&program()) || path.is_some_and(|path| !path.is_empty() && why.contains(path))
}

/// Puts the shim into its volume, unless it is there: a node that runs beside us starts from the same one. Any image will
/// do: the container that it goes through, with the number `n`, is never started.
pub async fn carry(engine: &Arc<Engine>, image: &Image, n: u64) -> Result<(), Error> {
    let doing = "put the shim on the engine";
    let labels = HashMap::from([(NODE_LABEL.to_owned(), engine.node.clone())]);
    let (name, labels) = (Some(engine.volume.clone()), Some(labels));
    let volume = VolumeCreateRequest { name, labels, ..VolumeCreateRequest::default() };
    let made = engine.docker.create_volume(volume).await.map_err(failed(doing))?;
    engine.volume_path.get_or_init(|| made.mountpoint);
    let body = ContainerCreateBody {
        image: Some(image.id.clone()),
        entrypoint: Some(vec![program()]),
        labels: Some(engine.labels()),
        host_config: Some(HostConfig {
            network_mode: Some("none".to_owned()),
            mounts: Some(vec![mount(engine, false)]),
            ..HostConfig::default()
        }),
        ..ContainerCreateBody::default()
    };
    let mut carrier = Container::new(engine.clone(), format!("coinop-{}-shim-{n}", engine.run));
    if !carrier.make(body, doing).await? {
        return Err(Error::Host { doing, source: io::ErrorKind::AlreadyExists.into() });
    }
    if !is_there(engine, carrier.id()).await {
        let options = UploadToContainerOptionsBuilder::new().path(FOLDER).build();
        let tar = packed().map_err(|source| Error::Host { doing, source })?;
        let body = bollard::body_full(Bytes::from(tar));
        let put = engine.docker.upload_to_container(carrier.id(), Some(options), body).await;
        put.map_err(failed(doing))?;
    }
    carrier.remove().await
}

/// Whether the volume holds exactly our shim and its file of names.
async fn is_there(engine: &Engine, carrier: &str) -> bool {
    holds(engine, carrier, NAME, SHIM, 0o755).await
        && holds(engine, carrier, HOSTS_NAME, HOSTS.as_bytes(), 0o644).await
}

/// Whether the volume holds exactly this file. What cannot be read is not there.
async fn holds(engine: &Engine, carrier: &str, name: &str, bytes: &[u8], mode: u32) -> bool {
    let path = format!("{FOLDER}/{name}");
    let options = DownloadFromContainerOptionsBuilder::new().path(&path).build();
    let mut coming = engine.docker.download_from_container(carrier, Some(options));
    let mut tar = Vec::new();
    while let Some(Ok(piece)) = coming.next().await {
        tar.extend(piece);
        if tar.len() > 2 * bytes.len() + (64 << 10) {
            return false;
        }
    }
    let mut archive = tar::Archive::new(&*tar);
    let Ok(mut entries) = archive.entries() else { return false };
    let Some(Ok(mut entry)) = entries.next() else { return false };
    let mut found = Vec::new();
    let read = entry.read_to_end(&mut found);
    read.is_ok() && found == bytes && entry.header().mode().is_ok_and(|found| found & 0o777 == mode)
}

/// Removes the volumes of this node with other shims than this one, and those of nodes that are gone. The engine keeps what
/// a container uses.
pub async fn sweep(engine: &Engine) -> Result<(), Error> {
    let doing = "look for older shims";
    let filters = HashMap::from([("label".to_owned(), vec![NODE_LABEL.to_owned()])]);
    let options = ListVolumesOptionsBuilder::new().filters(&filters).build();
    let found = engine.docker.list_volumes(Some(options)).await.map_err(failed(doing))?;
    let now = Timestamp::now();
    let left = |one: &Volume| {
        let own = one.labels.get(NODE_LABEL) == Some(&engine.node);
        one.name.starts_with(VOLUMES)
            && one.name != engine.volume
            && (own || is_of_one_gone(one.created_at.as_deref(), now))
    };
    for old in found.volumes.unwrap_or_default().into_iter().filter(left) {
        if let Err(why) = engine.docker.remove_volume(&old.name, None::<RemoveVolumeOptions>).await {
            tracing::debug!(volume = old.name, %why, "an older shim stays");
        }
    }
    Ok(())
}

/// By the time at which it was made, as the engine tells it. One of no known age is left.
fn is_of_one_gone(created: Option<&str>, now: Timestamp) -> bool {
    let created = created.and_then(|text| text.parse::<Timestamp>().ok());
    created.is_some_and(|created| now.as_second() - created.as_second() > GONE_S)
}

fn packed() -> io::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes, mode) in [(NAME, SHIM, 0o755), (HOSTS_NAME, HOSTS.as_bytes(), 0o644)] {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(mode);
        tar.append_data(&mut header, name, bytes)?;
    }
    tar.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_volume_that_was_made_more_than_a_day_ago_is_of_a_node_that_is_gone() {
        let now: Timestamp = "2026-11-29T12:00:00Z".parse().unwrap();
        for (created, gone) in [
            (Some("2026-11-28T11:59:59Z"), true),
            (Some("2026-11-28T13:00:00+02:00"), true),
            (Some("2026-11-28T12:00:01.5Z"), false),
            (Some("2026-11-30T12:00:00Z"), false),
            (Some("yesterday"), false),
            (None, false),
        ] {
            assert_eq!(is_of_one_gone(created, now), gone, "{created:?}");
        }
    }
}
