//! A container that is ours to end: as long as this value lives it is there, and when it goes the container goes,
//! whatever state both are in.

use std::sync::Arc;

use bollard::models::ContainerCreateBody;

use super::super::Error;
use super::engine::Engine;
use super::line::Line;
use super::uids::Lease;

/// A container on the engine. Dropping it removes the container.
pub struct Container {
    engine: Arc<Engine>,
    name: String,
    /// Not known before it is made.
    id: Option<String>,
    /// Given back when the engine knows the container no more.
    uid: Option<Lease>,
    removed: bool,
}

impl Container {
    /// Of a name that no other container can have.
    pub fn new(engine: Arc<Engine>, name: String) -> Container {
        Container { engine, name, id: None, uid: None, removed: false }
    }

    /// One that runs its job as this uid. Its name is the uid's alone on the whole engine.
    pub fn of_uid(engine: Arc<Engine>, uid: Lease) -> Container {
        let mut container = Container::new(engine, format!("coinop-{}", uid.uid()));
        container.uid = Some(uid);
        container
    }

    /// Its id; its name, before it is made.
    pub fn id(&self) -> &str {
        self.id.as_deref().unwrap_or(&self.name)
    }

    /// Makes it, not yet started; false when another container has its name.
    pub async fn make(&mut self, body: ContainerCreateBody, doing: &'static str) -> Result<bool, Error> {
        self.id = self.engine.create(&self.name, body, doing).await?;
        // What is there is somebody else's.
        self.removed = self.id.is_none();
        Ok(self.id.is_some())
    }

    /// The other one's uid, to be kept from being proposed again.
    pub fn into_uid(mut self) -> Option<Lease> {
        self.uid.take()
    }

    /// Removes it after a failure, of which the caller tells.
    pub async fn give_up(mut self) {
        if let Err(why) = self.remove().await {
            tracing::debug!(container = self.name, %why, "it is tried once more");
        }
    }

    /// Removes it, and returns when the engine knows it no more.
    pub async fn remove(&mut self) -> Result<(), Error> {
        remove(&self.engine, &self.name, self.id.as_deref()).await?;
        self.removed = true;
        self.uid = None;
        Ok(())
    }
}

async fn remove(engine: &Engine, name: &str, id: Option<&str>) -> Result<(), Error> {
    match id {
        Some(id) => engine.remove(id).await,
        // Whether it was made was never told; under its name may be somebody else's.
        None => match engine.own(name).await? {
            Some(id) => engine.remove(&id).await,
            None => Ok(()),
        },
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if self.removed {
            return;
        }
        let (engine, name, id) = (self.engine.clone(), std::mem::take(&mut self.name), self.id.take());
        let uid = self.uid.take();
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => {
                runtime.spawn(async move {
                    match remove(&engine, &name, id.as_deref()).await {
                        Ok(()) => drop(uid),
                        Err(why) => {
                            tracing::warn!(container = name, %why, "a container is left to the next start");
                            // It may live on: its uid is given to nobody in this life of the node.
                            std::mem::forget(uid);
                        }
                    }
                });
            }
            // Its line closes with the node, and its shim with its line.
            Err(_) => tracing::debug!(container = name, "left to its shim"),
        }
    }
}

/// A container whose shim has answered. Dropping it ends what runs there at once, and then removes it.
pub struct Started {
    pub container: Container,
    pub line: Arc<Line>,
    /// What all that runs there may have together.
    pub memory_bytes: u64,
}

impl Drop for Started {
    fn drop(&mut self) {
        // The shim hears that sooner than from the engine.
        self.line.cut("the sandbox was given up");
    }
}
