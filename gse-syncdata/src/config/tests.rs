//! What can't work is said before anything starts.

use super::*;

#[test]
fn digits_of_a_mode_are_octal() {
    let place = |mode| PlaceConfig {
        mode,
        ..PlaceConfig::default()
    };
    // contract: procmgr-agent-lifecycle#46
    assert_eq!(place(644).bits(), Some(0o644));
    assert_eq!(place(1755).bits(), Some(0o1755));
    assert_eq!(place(648).bits(), None);
    assert_eq!(place(17_777).bits(), None);
}

#[test]
fn a_site_with_cmdb_says_where_it_is() {
    let check = |config: &Config| {
        let mut problems = Problems::default();
        config.validate(&mut problems);
        problems
            .into_inner()
            .into_iter()
            .map(|(key, _)| key)
            .collect::<Vec<_>>()
    };
    let mut config = Config {
        source: SourceKind::Cmdb,
        ..Config::default()
    };
    assert!(check(&config).contains(&"cmdb.url".to_owned()));
    config.cmdb.url = "https://cmdb.example.com/prod".into();
    assert!(check(&config).contains(&"cmdb.ca".to_owned()));
    config.cmdb.url = "http://cmdb.example.com/prod".into();
    assert_eq!(check(&config), ["internal.tls"]);
    config.cmdb.secret = "hush".into();
    assert!(!format!("{config:?}").contains("hush"));
}
