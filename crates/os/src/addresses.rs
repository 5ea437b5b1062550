//! Addresses of this machine on the base network.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures_util::{FutureExt, StreamExt, TryStreamExt};
use rtnetlink::{
    Handle, MulticastGroup, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressHeaderFlags},
        link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType},
        route::{RouteAttribute, RouteMessage},
    },
};
use tokio_util::task::AbortOnDropHandle;

/// Why the addresses could not be listed.
#[derive(Debug, thiserror::Error)]
pub enum AddressesError {
    /// The kernel could not be asked.
    #[error("cannot ask the kernel about network interfaces")]
    Connect(#[source] std::io::Error),
    /// The kernel refused to answer.
    #[error("the kernel does not list network interfaces")]
    List(#[source] rtnetlink::Error),
}

/// Addresses of interfaces that are up, neither loopback nor TUN; link-local ones are left out. Ordered.
pub async fn local() -> Result<Vec<IpAddr>, AddressesError> {
    let kernel = connect()?;
    Ok(sorted(by_interface(&kernel, false).await?))
}

/// Addresses of TUN interfaces, the clan's own and others', that are up. Ordered.
pub async fn inside_tunnels() -> Result<Vec<IpAddr>, AddressesError> {
    let kernel = connect()?;
    Ok(sorted(by_interface(&kernel, true).await?))
}

/// Addresses of point-to-point devices, among which are all TUN devices, right now and without waiting.
pub fn point_to_point() -> std::io::Result<BTreeSet<IpAddr>> {
    let all = getifaddrs::getifaddrs()?;
    let theirs = all.filter(|interface| interface.flags.contains(getifaddrs::InterfaceFlags::POINTTOPOINT));
    Ok(theirs.filter_map(|interface| interface.address.ip_addr()).collect())
}

/// At most one IPv4 and one IPv6 address to bind to, in this order, such that nothing sent from there takes the clan's
/// own device: of the interface with the default route, else of the first that has one.
pub async fn physical() -> Result<Vec<IpAddr>, AddressesError> {
    let kernel = connect()?;
    let interfaces = by_interface(&kernel, false).await?;
    let mut chosen = Vec::new();
    for v4 in [true, false] {
        let default = default_interface(&kernel, v4, &interfaces).await?;
        let preferred = default.and_then(|index| interfaces.get(&index)).into_iter();
        chosen.extend(preferred.chain(interfaces.values()).flatten().find(|a| a.is_ipv4() == v4));
    }
    Ok(chosen)
}

/// Tells of changes of interfaces, addresses and routes. Listens no longer than it is kept.
pub struct Changes {
    messages: futures_util::stream::BoxStream<'static, ()>,
    /// By itself the task would end with the next message only, which it would then complain that nobody wants.
    _connection: AbortOnDropHandle<()>,
}

/// Listens for changes.
pub fn changes() -> Result<Changes, AddressesError> {
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
    ];
    let (connection, _, messages) = rtnetlink::new_multicast_connection(&groups).map_err(AddressesError::Connect)?;
    let connection = AbortOnDropHandle::new(tokio::spawn(connection));
    Ok(Changes { messages: messages.map(drop).boxed(), _connection: connection })
}

impl Changes {
    /// Waits for the next change, or a number of them; for ever if the kernel tells no more.
    pub async fn next(&mut self) {
        match self.messages.next().await {
            // What came with it needs no look of its own.
            Some(()) => while self.messages.next().now_or_never().flatten().is_some() {},
            None => std::future::pending().await,
        }
    }
}

fn connect() -> Result<Handle, AddressesError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(AddressesError::Connect)?;
    // Ends by itself when the handle is dropped.
    tokio::spawn(connection);
    Ok(handle)
}

fn sorted(interfaces: BTreeMap<u32, Vec<IpAddr>>) -> Vec<IpAddr> {
    let mut addresses: Vec<_> = interfaces.into_values().flatten().collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

/// Addresses of which others could make use, by interface index: of TUN interfaces, or of all others.
async fn by_interface(kernel: &Handle, tunnels: bool) -> Result<BTreeMap<u32, Vec<IpAddr>>, AddressesError> {
    let mut interfaces = BTreeMap::new();
    let mut links = kernel.link().get().execute();
    while let Some(link) = links.try_next().await.map_err(AddressesError::List)? {
        let tunnel = link.header.link_layer_type == LinkLayerType::None
            || link
                .attributes
                .iter()
                .any(|a| matches!(a, LinkAttribute::LinkInfo(infos) if infos.contains(&LinkInfo::Kind(InfoKind::Tun))));
        if link.header.flags.contains(LinkFlags::Up)
            && !link.header.flags.contains(LinkFlags::Loopback)
            && tunnel == tunnels
        {
            interfaces.insert(link.header.index, Vec::new());
        }
    }
    let mut addresses = kernel.address().get().execute();
    while let Some(message) = addresses.try_next().await.map_err(AddressesError::List)? {
        let Some(interface) = interfaces.get_mut(&message.header.index) else { continue };
        if message.header.flags.intersects(AddressHeaderFlags::Tentative | AddressHeaderFlags::Deprecated) {
            continue;
        }
        // Where both are given, `Local` is ours and `Address` is the other end of a point-to-point link.
        let find = |local| {
            message.attributes.iter().find_map(|a| match a {
                AddressAttribute::Local(ip) if local => Some(*ip),
                AddressAttribute::Address(ip) if !local => Some(*ip),
                _ => None,
            })
        };
        if let Some(ip) = find(true).or_else(|| find(false))
            && is_routable(ip)
        {
            interface.push(ip);
        }
    }
    Ok(interfaces)
}

async fn default_interface(
    kernel: &Handle,
    v4: bool,
    among: &BTreeMap<u32, Vec<IpAddr>>,
) -> Result<Option<u32>, AddressesError> {
    let question = if v4 {
        RouteMessageBuilder::<Ipv4Addr>::new().build()
    } else {
        RouteMessageBuilder::<Ipv6Addr>::new().build()
    };
    let family = if v4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let mut routes = kernel.route().get(question).execute();
    let mut best: Option<(u32, u32)> = None;
    while let Some(route) = routes.try_next().await.map_err(AddressesError::List)? {
        if route.header.address_family == family
            && route.header.destination_prefix_length == 0
            && let Some((metric, index)) = metric_and_interface(&route)
            && among.contains_key(&index)
        {
            best = Some(best.map_or((metric, index), |b| b.min((metric, index))));
        }
    }
    Ok(best.map(|(_, index)| index))
}

fn metric_and_interface(route: &RouteMessage) -> Option<(u32, u32)> {
    let mut metric = 0;
    let mut index = None;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::Oif(oif) => index = Some(*oif),
            _ => {}
        }
    }
    Some((metric, index?))
}

fn is_routable(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local() && !ip.is_unspecified(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local() && !ip.is_unspecified(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn nothing_listens_any_more_once_nobody_waits_for_changes() {
        let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
        let listening = changes().unwrap();
        assert_eq!(tasks(), 1);
        drop(listening);
        let ended = tokio::time::timeout(Duration::from_secs(10), async {
            while tasks() > 0 {
                tokio::task::yield_now().await;
            }
        });
        ended.await.expect("the connection to the kernel ends with its listener");
    }
}
