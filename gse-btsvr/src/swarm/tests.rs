use super::*;
use gse_proto::state::NodeInfo;

const ID: ManifestId = [7; 32];

fn swarms() -> Swarms {
    let swarms = Swarms::new(40, Random::seeded(1));
    swarms.open(ID, &Bytes::from_static(b"manifest"), "T", 0);
    assert!(swarms.set_secret(&ID, [1; 32]).is_empty());
    swarms
}

fn at(name: &str, zone: &str) -> Option<Reach> {
    Some(Reach {
        zone: zone.into(),
        inner: vec![format!("{name}:60020")],
        outer: vec![],
    })
}

fn there(name: &str) -> Option<Reach> {
    at(name, "")
}

fn undivided() -> Zones {
    Zones::default()
}

#[test]
fn the_graph_is_sparse_and_whole() {
    let swarms = swarms();
    swarms.join(&ID, "source", true);
    assert!(
        swarms
            .deal(&ID, "source", &undivided(), there)
            .unwrap()
            .peers
            .is_empty()
    );
    let names: Vec<String> = (0..1_000).map(|n| format!("a{n}")).collect();
    let mut edges: HashMap<String, HashSet<String>> = HashMap::default();
    for name in &names {
        swarms.join(&ID, name, false);
        let told = swarms.deal(&ID, name, &undivided(), there).unwrap();
        assert!(!told.peers.is_empty() && told.peers.len() <= 12, "{}", told.peers.len());
        assert_eq!(told.key, member_key(&[1; 32], name)[..]);
        for peer in told.peers {
            let ticket = gse_bt::ticket(&member_key(&[1; 32], &peer.agent_id), name);
            assert_eq!(peer.ticket, ticket[..]);
            edges.entry(name.clone()).or_default().insert(peer.agent_id.clone());
            edges.entry(peer.agent_id).or_default().insert(name.clone());
        }
    }
    assert!(edges.values().all(|peers| peers.len() <= 40));
    // Everybody is a few steps from the source.
    let mut near: HashSet<String> = std::iter::once("source".to_owned()).collect();
    for _ in 0..5 {
        near = near
            .iter()
            .flat_map(|name| &edges[name])
            .cloned()
            .chain(near.iter().cloned())
            .collect();
    }
    assert_eq!(near.len(), 1_001);
}

#[test]
fn who_is_left_alone_is_told_of_others() {
    let swarms = swarms();
    swarms.join(&ID, "source", true);
    for name in ["a", "b", "c"] {
        swarms.join(&ID, name, false);
    }
    let source_only = |name: &str| (name == "source").then(|| there("s")).flatten();
    assert_eq!(swarms.deal(&ID, "a", &undivided(), source_only).unwrap().peers.len(), 1);
    let lonely = swarms.lonely(&undivided(), |name| name == "a" || name == "b");
    let mut names: Vec<&str> = lonely.iter().map(|(_, name)| name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(swarms.deal(&ID, "a", &undivided(), there).unwrap().peers.len(), 3);
}

#[test]
fn only_members_learn_anything_and_it_ends_with_its_last_use() {
    // contract: p2p#16
    let swarms = swarms();
    swarms.join(&ID, "a", false);
    assert_eq!(swarms.manifest(&ID, "a").unwrap(), "manifest");
    assert!(swarms.manifest(&ID, "b").is_none() && swarms.deal(&ID, "b", &undivided(), there).is_none());
    swarms.open(ID, &Bytes::new(), "U", 3);
    assert!(swarms.close("T", 0).is_empty());
    assert!(swarms.close("T", 0).is_empty());
    assert_eq!(swarms.close("U", 3), [(ID, vec!["a".to_owned()])]);
    assert!(swarms.is_empty());
}

#[tokio::test]
async fn nobody_is_told_anything_before_there_is_a_secret_and_each_has_a_key_of_its_own() {
    let swarms = Swarms::new(40, Random::seeded(1));
    swarms.open(ID, &Bytes::new(), "T", 0);
    swarms.join(&ID, "a", false);
    assert!(swarms.deal(&ID, "a", &undivided(), there).is_none());
    assert_eq!(swarms.without_secret(), [ID]);
    assert_eq!(swarms.set_secret(&ID, [5; 32]), ["a"]);
    assert!(swarms.without_secret().is_empty());
    let (one, other) = (swarms.key(&ID, "a").await.unwrap(), swarms.key(&ID, "b").await.unwrap());
    assert_ne!(one, other);
    assert_eq!(swarms.deal(&ID, "a", &undivided(), there).unwrap().key, one[..]);
    assert!(swarms.key(&[8; 32], "a").await.is_none());
}

/// Two zones with two relays each, and a third one without any.
fn divided() -> (Zones, Vec<(String, Zone)>) {
    let info = |zone: &str, area: i32, relay| NodeInfo {
        zone: zone.into(),
        cloud_areas: if zone.is_empty() { vec![] } else { vec![area] },
        relay,
        ..NodeInfo::default()
    };
    let infos = [info("", 0, true), info("far", 5, true), info("bare", 6, false)];
    let relays = [("h1", ""), ("h2", ""), ("r1", "far"), ("r2", "far"), ("r3", "far")];
    let relays = relays
        .iter()
        .map(|(name, zone)| ((*name).to_owned(), Zone::from(*zone)));
    (Zones::new(infos.iter()), relays.collect())
}

/// By the letter of its name.
fn place(name: &str) -> Option<Reach> {
    let zone = match name.as_bytes().first() {
        Some(b'f' | b'r') => "far",
        Some(b'b') => "bare",
        _ => "",
    };
    let mut reach = at(name, zone)?;
    if name.starts_with(['h', 'r']) {
        reach.outer = vec![format!("{name}:10020")];
    }
    Some(reach)
}

fn names_told(told: &SwarmPeers) -> Vec<String> {
    let mut names: Vec<String> = told
        .peers
        .iter()
        .map(|peer| match peer.upstream {
            true => format!("^{}", peer.address),
            false => peer.agent_id.clone(),
        })
        .collect();
    names.sort_unstable();
    names
}

#[test]
fn only_relays_cross_a_border() {
    let swarms = swarms();
    let (zones, relays) = divided();
    swarms.join(&ID, "source", true);
    let deal = |name: &str| names_told(&swarms.deal(&ID, name, &zones, place).unwrap());
    deal("source");
    for name in ["n1", "b1"] {
        swarms.join(&ID, name, false);
        deal(name);
    }
    // Content stays where it is, or goes where there is no relay: none is needed.
    assert!(swarms.relays(&ID, &zones, &relays, true).is_empty());
    for name in ["f1", "f2"] {
        swarms.join(&ID, name, false);
    }
    assert!(deal("f1").is_empty(), "the source is across the border");
    let parts = swarms.relays(&ID, &zones, &relays, true);
    let shares: Vec<(u32, u32)> = parts.iter().map(|part| (part.share, part.shares)).collect();
    assert_eq!(shares, [(0, 2), (1, 2), (0, 0), (1, 0)]);
    assert_eq!(swarms.manifest(&ID, &parts[0].relay).unwrap(), "manifest");
    let (far, other, home) = (&parts[0].relay, &parts[1].relay, &parts[2].relay);
    swarms.join_server(&ID, far, false);
    assert!(
        deal(far).iter().all(|name| !name.starts_with('^')),
        "relays at home are on their way"
    );
    swarms.join_server(&ID, home, false);
    let told = deal(far);
    assert!(
        told.contains(&format!("^{home}:10020")) && told.contains(&"f1".to_owned()),
        "{told:?}"
    );
    assert!(
        !told.contains(&"source".to_owned()) && !told.contains(&"n1".to_owned()),
        "{told:?}"
    );
    assert!(deal(home).contains(&"source".to_owned()));
    assert_eq!(deal("f2").first().unwrap(), "f1");
    assert!(deal("f2").contains(far) && !deal("f2").contains(home));
    // Where there is no relay, members go directly.
    assert!(deal("b1").contains(&"source".to_owned()));
    // One is gone: another takes its place; one that can't is not asked again.
    let fewer: Vec<(String, Zone)> = relays.iter().filter(|(name, _)| name != other).cloned().collect();
    swarms.relay_gone(other);
    let parts = swarms.relays(&ID, &zones, &fewer, true);
    let carrying: Vec<&str> = parts
        .iter()
        .filter(|part| part.shares == 2)
        .map(|part| part.relay.as_str())
        .collect();
    assert!(carrying.len() == 2 && !carrying.contains(&other.as_str()) && carrying.contains(&far.as_str()));
    swarms.relay_failed(&ID, far);
    let parts = swarms.relays(&ID, &zones, &fewer, true);
    assert_eq!(parts.iter().filter(|part| part.shares == 1).count(), 1, "{parts:?}");
    assert!(swarms.close("T", 0)[0].1.contains(home));
}

#[test]
fn a_relay_takes_from_the_source_when_there_is_no_relay_where_that_is() {
    let swarms = swarms();
    let (zones, relays) = divided();
    swarms.join(&ID, "source", true);
    swarms.join(&ID, "f1", false);
    for name in ["source", "f1"] {
        assert!(swarms.deal(&ID, name, &zones, place).is_some());
    }
    let there: Vec<(String, Zone)> = relays.into_iter().filter(|(_, zone)| &**zone == "far").collect();
    let parts = swarms.relays(&ID, &zones, &there, true);
    assert_eq!(parts.iter().map(|part| part.shares).collect::<Vec<_>>(), [2, 2]);
    swarms.join_server(&ID, &parts[0].relay, false);
    let told = swarms.deal(&ID, &parts[0].relay, &zones, place).unwrap();
    assert_eq!(names_told(&told), ["^source:60020", "f1"]);
}

#[test]
fn content_of_a_call_is_where_its_server_is() {
    let swarms = swarms();
    let (zones, relays) = divided();
    swarms.join_origin(&ID, "h1", &"".into());
    swarms.join(&ID, "f1", false);
    assert!(swarms.deal(&ID, "f1", &zones, place).unwrap().peers.is_empty());
    let parts = swarms.relays(&ID, &zones, &relays, true);
    // It may be one of those that are asked, and stays the source.
    for part in &parts {
        assert!(swarms.join_server(&ID, &part.relay, part.relay == "h1"));
    }
    assert_eq!(swarms.relays(&ID, &zones, &relays, true).len(), 4);
    assert!(swarms.relays(&ID, &zones, &relays, false).is_empty(), "told already");
    let far = parts.iter().find(|part| part.shares == 2).unwrap();
    let told = swarms.deal(&ID, &far.relay, &zones, place).unwrap();
    assert!(names_told(&told).contains(&"^h1:10020".to_owned()), "{told:?}");
}
