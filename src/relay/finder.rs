//! Asks our own relays where customers read: a one-off REQ on their sessions, for many customers at once, within a
//! bounded time. What comes of it is kept by `inbox.rs`.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use nostr_sdk::prelude::{Filter, Kind, PublicKey};
use tokio::sync::{mpsc, watch};

use super::inbox::Inbox;
use super::lock;
use super::session::{Command, Link};
use super::subscriptions::Life;
use super::verify::Wanted;

/// Customers asked for in one REQ; one REQ is open at a time.
const A_ROUND: usize = 50;
/// How long relays may take to tell what they have stored.
const WITHIN: Duration = Duration::from_secs(3);

/// One of our relays.
pub(super) struct Peer {
    pub(super) relay: String,
    pub(super) commands: mpsc::UnboundedSender<Command>,
    pub(super) link: Arc<Mutex<Link>>,
}

pub(super) struct Finder {
    pub(super) inbox: Arc<Inbox>,
    pub(super) asked: mpsc::Receiver<PublicKey>,
    pub(super) peers: Vec<Peer>,
    /// Changes when no more look-ups are wanted.
    pub(super) draining: watch::Receiver<bool>,
}

impl Finder {
    pub(super) async fn run(self) {
        let Self { inbox, mut asked, peers, mut draining } = self;
        let rounds = async {
            let mut authors = Vec::new();
            while asked.recv_many(&mut authors, A_ROUND).await > 0 {
                round(&inbox, &peers, &authors).await;
                authors.clear();
            }
        };
        tokio::select! {
            () = rounds => {}
            changed = draining.changed() => tracing::trace!(?changed, "no more look-ups"),
        }
    }
}

async fn round(inbox: &Inbox, peers: &[Peer], authors: &[PublicKey]) {
    let mut able: Vec<&Peer> = peers.iter().filter(|peer| peer.can_be_asked(true)).collect();
    if able.is_empty() {
        // The node has just started, or the network is gone: whoever comes back in time is asked then.
        able = peers.iter().filter(|peer| peer.can_be_asked(false)).collect();
    }
    let id = inbox.begin(able.iter().map(|peer| peer.relay.clone()), authors.len());
    let filter = Filter::new().kind(Kind::RelayList).authors(authors.iter().copied());
    let wanted = Wanted::new(vec![filter]);
    for peer in &able {
        if !peer.send(Command::Subscribe(id.clone(), Arc::clone(&wanted), Life::Once)) {
            inbox.tell(&peer.relay, &id, false);
        }
    }
    if tokio::time::timeout(WITHIN, inbox.all_told()).await.is_err() {
        // For those that have told, this is of no effect.
        let asked = able.iter().filter(|peer| peer.send(Command::Unsubscribe(id.clone()))).count();
        tracing::debug!(asked, "not every relay told in time where a customer reads");
    }
    inbox.end(authors);
}

impl Peer {
    /// It lets us have one subscription more than `follow.rs` needs: that is three, or one where fewer are
    /// allowed.
    fn can_be_asked(&self, connected: bool) -> bool {
        let link = lock(&self.link);
        (link.connected || !connected)
            && link.limits.max_subscriptions.is_none_or(|most| most == 2 || most > 3)
    }

    fn send(&self, command: Command) -> bool {
        self.commands.send(command).is_ok()
    }
}
