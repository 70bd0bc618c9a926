//! A container that is ours to end: as long as this value lives it is there, and when it goes the container goes,
//! whatever state both are in.

use std::sync::Arc;

use super::super::Error;
use super::engine::Engine;
use super::line::Line;

/// A container on the engine. Dropping it removes the container.
pub struct Container {
    engine: Arc<Engine>,
    /// Its id; or its name, which is known before it is made.
    pub id: String,
    removed: bool,
}

impl Container {
    pub fn new(engine: Arc<Engine>, id: String) -> Container {
        Container { engine, id, removed: false }
    }

    /// Removes it, and returns when the engine knows it no more.
    pub async fn remove(&mut self) -> Result<(), Error> {
        self.engine.remove(&self.id).await?;
        self.removed = true;
        Ok(())
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if self.removed {
            return;
        }
        let (engine, id) = (self.engine.clone(), std::mem::take(&mut self.id));
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => {
                runtime.spawn(async move {
                    if let Err(why) = engine.remove(&id).await {
                        tracing::warn!(container = id, %why, "a container is left to the next start");
                    }
                });
            }
            // Its line closes with the node, and its shim with its line.
            Err(_) => tracing::debug!(container = id, "left to its shim"),
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
