//! Ways out of a sandbox that others have found: the shared loopback, raw and abstract sockets, names asked of a
//! resolver, io_uring past the filter, descriptors that the node has left open. Classes 2, 3, 4, 5 and 7.

use std::io::ErrorKind;
use std::net::{TcpListener, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use crate::case::{NOT_SHOWN, Outcome, cases};
use crate::ground::{Ground, OPEN_SECRET, policy, run};
use crate::host;
use crate::plain::{How, Plain};

cases! {
    the_host_s_loopback_and_abstract_sockets_are_out_of_reach: "3: a shared loopback", loopback_at_large;
    no_raw_packet_and_no_netlink: "2: raw sockets", raw_at_large;
    there_is_no_route_to_any_address: "2: around a proxy", outward_at_large;
    no_name_is_asked_of_anybody: "4: data in DNS labels", dns_at_large;
    io_uring_is_not_there: "5: io_uring", uring_at_large;
    no_descriptor_of_the_node_leaks_into_a_job: "7: leaked descriptors", descriptors_at_large;
}

/// Runs the attack inside; no line of it may say that it reached anything.
pub async fn reaches_nothing(ground: &Ground, words: &[&str], lines: usize) -> String {
    let sandbox = ground.sandbox(policy()).await;
    let (said, _) = run(&*sandbox, words).await;
    sandbox.destroy().await.unwrap();
    assert!(said.lines().count() >= lines && !said.contains("REACHED"), "{said}");
    assert!(said.lines().all(|line| line.starts_with("no ")), "{said}");
    let mut why: Vec<&str> = said.lines().filter_map(|line| line.rsplit(' ').next()).collect();
    why.dedup();
    why.join(", ")
}

/// The node's own listeners on this host.
struct Listeners {
    tcp: TcpListener,
    name: String,
    unix: UnixListener,
}

impl Listeners {
    fn new() -> Listeners {
        let name = host::new_mark();
        let unix = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        unix.set_nonblocking(true).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        tcp.set_nonblocking(true).unwrap();
        Listeners { tcp, name, unix }
    }

    fn words(&self) -> [String; 3] {
        ["loopback".to_owned(), self.tcp.local_addr().unwrap().port().to_string(), self.name.clone()]
    }

    /// Who has come to the TCP port, and who to the abstract socket.
    fn visited(&self) -> (bool, bool) {
        let came = |accepted: std::io::Result<()>| match accepted {
            Ok(()) => true,
            Err(why) if why.kind() == ErrorKind::WouldBlock => false,
            Err(why) => panic!("{why}"),
        };
        (came(self.tcp.accept().map(drop)), came(self.unix.accept().map(drop)))
    }
}

fn loopback_at_large(plain: &Plain) -> Outcome {
    let listeners = Listeners::new();
    let words = listeners.words();
    let said = plain.run(How::default(), &words.each_ref().map(String::as_str))?;
    assert_eq!(said, "REACHED loopback\nREACHED abstract\n");
    assert_eq!(listeners.visited(), (true, true));
    Ok("both reached, without a network namespace".to_owned())
}

async fn the_host_s_loopback_and_abstract_sockets_are_out_of_reach(ground: &Ground) -> Outcome {
    let listeners = Listeners::new();
    let words = listeners.words();
    let why = reaches_nothing(ground, &words.each_ref().map(String::as_str), 2).await;
    assert_eq!(listeners.visited(), (false, false));
    Ok(why)
}

fn raw_at_large(plain: &Plain) -> Outcome {
    let said = plain.run(How { network: Some(":"), root: true, ..How::default() }, &["raw"])?;
    assert_eq!(said.matches("REACHED").count(), 5, "{said}");
    Ok("all five made, as root of a network of its own".to_owned())
}

async fn no_raw_packet_and_no_netlink(ground: &Ground) -> Outcome {
    Ok(reaches_nothing(ground, &["raw"], 5).await)
}

fn outward_at_large(plain: &Plain) -> Outcome {
    // An address of the documentation's range, given to a network that ends with the attack: nothing leaves the host.
    let listener = plain.dir().join("listens");
    std::fs::copy(&crate::plain::program()?.path, &listener).unwrap();
    let network = format!(
        "ip link set lo up && ip address add 192.0.2.1/32 dev lo && {{ {} listens 4000 > listening & \
         until grep -q ready listening; do :; done; }}",
        listener.display()
    );
    let said =
        plain.run(How { network: Some(&network), root: true, ..How::default() }, &["outward", "4000"])?;
    if said.is_empty() {
        return Err("no network with an address can be made here".to_owned());
    }
    assert!(said.starts_with("REACHED address\n"), "{said}");
    Ok("reached, with an address in its network".to_owned())
}

async fn there_is_no_route_to_any_address(ground: &Ground) -> Outcome {
    Ok(reaches_nothing(ground, &["outward", "4000"], 2).await)
}

/// Whether the secret label has come; the attack has ended before.
fn heard(resolver: &UdpSocket) -> bool {
    resolver.set_nonblocking(true).unwrap();
    let mut question = [0; 512];
    match resolver.recv(&mut question) {
        Ok(len) => question[..len].windows(6).any(|label| label == b"secret"),
        Err(why) if why.kind() == ErrorKind::WouldBlock => false,
        Err(why) => panic!("{why}"),
    }
}

fn dns_at_large(plain: &Plain) -> Outcome {
    let resolver = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = resolver.local_addr().unwrap().port().to_string();
    // Of the host's own resolvers none is to hear it: the file that names them is covered.
    let cover = "unshare --mount sh -c 'mount --bind /dev/null /etc/resolv.conf && exec \"$@\"' sh";
    let said = plain.run(How { root: true, before: cover, ..How::default() }, &["dns", &port])?;
    assert!(said.starts_with("REACHED port\n") && heard(&resolver), "{said}");
    Ok("the label was heard by a resolver on the host's loopback".to_owned())
}

async fn no_name_is_asked_of_anybody(ground: &Ground) -> Outcome {
    let resolver = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = resolver.local_addr().unwrap().port().to_string();
    let sandbox = ground.sandbox(policy()).await;
    let (said, _) = run(&*sandbox, &["dns", &port]).await;
    sandbox.destroy().await.unwrap();
    // A datagram to its own loopback goes nowhere, and does not say so at once.
    assert!(!said.contains("REACHED resolver"), "{said}");
    assert!(!heard(&resolver), "{said}");
    Ok("nothing was heard".to_owned())
}

fn uring_at_large(plain: &Plain) -> Outcome {
    let said = plain.run(How::default(), &["uring"])?;
    if said.contains("EPERM") || said.contains("ENOSYS") {
        return Err(format!("{NOT_SHOWN}this host's kernel refuses io_uring to everyone"));
    }
    assert_eq!(said, "REACHED io_uring\n");
    Ok("a ring was made".to_owned())
}

async fn io_uring_is_not_there(ground: &Ground) -> Outcome {
    let why = reaches_nothing(ground, &["uring"], 1).await;
    assert_eq!(why, "ENOSYS");
    Ok(why)
}

fn descriptors_at_large(plain: &Plain) -> Outcome {
    let secret = plain.dir().join(OPEN_SECRET);
    std::fs::write(&secret, "").unwrap();
    let open = format!("exec 7<{};", secret.display());
    let said = plain.run(How { before: &open, ..How::default() }, &["descriptors"])?;
    assert!(said.contains(OPEN_SECRET), "{said}");
    Ok("a file that its parent had open is its own".to_owned())
}

async fn no_descriptor_of_the_node_leaks_into_a_job(ground: &Ground) -> Outcome {
    // `Ground` holds such a file open since before the backend was made.
    let sandbox = ground.sandbox(policy()).await;
    let (said, _) = run(&*sandbox, &["descriptors"]).await;
    sandbox.destroy().await.unwrap();
    let mut numbers: Vec<&str> = said.lines().filter_map(|line| line.split(' ').next()).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, ["0", "1", "2"], "{said}");
    Ok("0, 1 and 2".to_owned())
}
