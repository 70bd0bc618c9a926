//! The shim's way to an engine: a volume that all of a node's containers read and none can write. Each node has its own,
//! so that none changes what another one starts from.

use std::collections::HashMap;
use std::io::{self, Read};
use std::sync::Arc;

use bollard::models::{
    ContainerCreateBody, HostConfig, Mount, MountType, MountVolumeOptions, VolumeCreateRequest,
};
use bollard::query_parameters::{
    DownloadFromContainerOptionsBuilder, ListVolumesOptionsBuilder, RemoveVolumeOptions,
    UploadToContainerOptionsBuilder,
};
use bytes::Bytes;
use futures_util::StreamExt;
use sha2::{Digest, Sha256};

use super::super::Error;
use super::container::Container;
use super::engine::{Engine, Image, NODE_LABEL, failed};

/// The program that becomes process 1; built beside the node and carried in it.
pub(in crate::sandbox) const SHIM: &[u8] = include_bytes!(env!("SHIM_PROGRAM"));
const FOLDER: &str = "/.coinop";
const NAME: &str = "shim";

/// The name of a node's volume with this shim.
pub fn volume(node: &str) -> String {
    let digest = hex::encode(Sha256::digest(SHIM));
    format!("coinop-shim-{node}-{}", digest.get(..16).unwrap_or_default())
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

/// Puts the shim into its volume, unless it is there: a node that runs beside us starts from the same one. Any image will
/// do: the container that it goes through, with the number `n`, is never started.
pub async fn carry(engine: &Arc<Engine>, image: &Image, n: u64) -> Result<(), Error> {
    let doing = "put the shim on the engine";
    let labels = HashMap::from([(NODE_LABEL.to_owned(), engine.node.clone())]);
    let (name, labels) = (Some(engine.volume.clone()), Some(labels));
    let volume = VolumeCreateRequest { name, labels, ..VolumeCreateRequest::default() };
    engine.docker.create_volume(volume).await.map_err(failed(doing))?;
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

/// Whether the volume holds exactly our shim. What cannot be read is not there.
async fn is_there(engine: &Engine, carrier: &str) -> bool {
    let options = DownloadFromContainerOptionsBuilder::new().path(&program()).build();
    let mut coming = engine.docker.download_from_container(carrier, Some(options));
    let mut tar = Vec::new();
    while let Some(Ok(bytes)) = coming.next().await {
        tar.extend(bytes);
        if tar.len() > 2 * SHIM.len() + (64 << 10) {
            return false;
        }
    }
    let mut archive = tar::Archive::new(&*tar);
    let Ok(mut entries) = archive.entries() else { return false };
    let Some(Ok(mut entry)) = entries.next() else { return false };
    let mut found = Vec::new();
    let read = entry.read_to_end(&mut found);
    read.is_ok() && found == SHIM && entry.header().mode().is_ok_and(|mode| mode & 0o777 == 0o755)
}

/// Removes the volumes of this node with other shims than this one.
pub async fn sweep(engine: &Engine) -> Result<(), Error> {
    let doing = "look for older shims";
    let filters = HashMap::from([("label".to_owned(), vec![format!("{NODE_LABEL}={}", engine.node)])]);
    let options = ListVolumesOptionsBuilder::new().filters(&filters).build();
    let found = engine.docker.list_volumes(Some(options)).await.map_err(failed(doing))?;
    for old in found.volumes.unwrap_or_default().into_iter().filter(|one| one.name != engine.volume) {
        if let Err(why) = engine.docker.remove_volume(&old.name, None::<RemoveVolumeOptions>).await {
            tracing::debug!(volume = old.name, %why, "an older shim stays");
        }
    }
    Ok(())
}

fn packed() -> io::Result<Vec<u8>> {
    let mut header = tar::Header::new_gnu();
    header.set_size(SHIM.len() as u64);
    header.set_mode(0o755);
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_data(&mut header, NAME, SHIM)?;
    tar.into_inner()
}
