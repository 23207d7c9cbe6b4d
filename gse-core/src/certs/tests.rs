use std::os::unix::fs::PermissionsExt;

use tempfile::TempDir;

use super::*;
use crate::tls::{TlsFiles, identity_of_file};

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn keys_are_private_and_directories_too() {
    let home = TempDir::new().unwrap();
    let dir = home.path().join("etc/certs");
    let ca = Authority::create(&dir).unwrap();
    let (cert, key) = names::pair(Role::Agent);
    let (cert, key) = (dir.join("agents/a1").join(cert), dir.join("agents/a1").join(key));
    ca.issue(Role::Agent, Some("0:1.2.3.4"), &[], &cert, &key, LEAF_DAYS)
        .unwrap();
    assert_eq!(mode(&dir), 0o700);
    assert_eq!(mode(&dir.join("agents")), 0o700);
    assert_eq!(mode(&dir.join(names::CA_KEY)), 0o600);
    assert_eq!(mode(&key), 0o600);
    assert_eq!(identity_of_file(&cert).unwrap().id.as_deref(), Some("0:1.2.3.4"));
    let leftovers: Vec<_> = fs::read_dir(cert.parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(leftovers.len(), 2, "{leftovers:?}");
}

#[test]
fn nothing_is_overwritten_unless_asked() {
    let home = TempDir::new().unwrap();
    let ca = Authority::create(home.path()).unwrap();
    let before = fs::read(home.path().join(names::CA_KEY)).unwrap();
    assert!(matches!(Authority::create(home.path()), Err(CertsError::Exists(_))));
    assert_eq!(fs::read(home.path().join(names::CA_KEY)).unwrap(), before);

    let (cert, key) = (home.path().join("s.crt"), home.path().join("s.key"));
    ca.issue(Role::Server, None, &[], &cert, &key, 10).unwrap();
    let first = fs::read(&key).unwrap();
    assert!(matches!(
        ca.issue(Role::Server, None, &[], &cert, &key, 10),
        Err(CertsError::Exists(_))
    ));
    fs::remove_file(&cert).unwrap();
    assert!(matches!(
        ca.issue(Role::Server, None, &[], &cert, &key, 10),
        Err(CertsError::Exists(_))
    ));
    assert!(!cert.exists(), "half a pair was written");
    ca.reissue(Role::Server, None, &[], &cert, &key, 10).unwrap();
    assert_ne!(fs::read(&key).unwrap(), first);

    Authority::recreate(home.path()).unwrap();
    assert_ne!(fs::read(home.path().join(names::CA_KEY)).unwrap(), before);
}

#[test]
fn an_authority_is_opened_again_and_signs_what_it_signed_before() {
    let home = TempDir::new().unwrap();
    assert!(matches!(Authority::open(home.path()), Err(CertsError::Missing { .. })));
    let made = Authority::open_or_create(home.path()).unwrap();
    let opened = Authority::open_or_create(home.path()).unwrap();
    assert_eq!(made.ca_pem(), opened.ca_pem());
    let (cert, key) = (home.path().join("s.crt"), home.path().join("s.key"));
    opened
        .issue(
            Role::Server,
            None,
            &["localhost".into(), "127.0.0.1".into()],
            &cert,
            &key,
            LEAF_DAYS,
        )
        .unwrap();
    let files = TlsFiles {
        ca: made.ca_path(),
        cert: cert.clone(),
        key,
    };
    crate::tls::server_config(&files, &[Role::Agent], &[]).unwrap();
    let pem = fs::read(&cert).unwrap();
    let (_, pem) = x509_parser::pem::parse_x509_pem(&pem).unwrap();
    let leaf = pem.parse_x509().unwrap();
    let (_, ca_pem) = x509_parser::pem::parse_x509_pem(made.ca_pem().as_bytes()).unwrap();
    let authority = ca_pem.parse_x509().unwrap();
    leaf.verify_signature(Some(authority.public_key())).unwrap();
    let basic = authority.basic_constraints().unwrap().unwrap().value;
    assert_eq!((basic.ca, basic.path_len_constraint), (true, Some(0)));
    let days = (leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp()) / 86_400;
    assert_eq!(days, i64::from(LEAF_DAYS));
    assert!(!leaf.is_ca());
}

#[test]
fn two_that_come_at_once_get_one_authority() {
    let home = TempDir::new().unwrap();
    let pems: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..6)
            .map(|_| scope.spawn(|| Authority::open_or_create(home.path()).unwrap().ca_pem().to_owned()))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(pems.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn an_unusable_authority_is_said_to_be_so() {
    let home = TempDir::new().unwrap();
    Authority::create(home.path()).unwrap();
    let other = TempDir::new().unwrap();
    Authority::create(other.path()).unwrap();
    fs::copy(other.path().join(names::CA_KEY), home.path().join(names::CA_KEY)).unwrap();
    let error = Authority::open(home.path()).unwrap_err().to_string();
    assert!(error.contains("do not belong together"), "{error}");
    fs::write(home.path().join(names::CA_KEY), "nonsense").unwrap();
    assert!(matches!(Authority::open(home.path()), Err(CertsError::Unusable { .. })));
    fs::remove_file(home.path().join(names::CA_KEY)).unwrap();
    assert!(matches!(
        Authority::open_or_create(home.path()),
        Err(CertsError::Missing { .. })
    ));
}

#[test]
fn bad_requests_are_refused_before_anything_is_written() {
    let home = TempDir::new().unwrap();
    let ca = Authority::create(home.path()).unwrap();
    let (cert, key) = (home.path().join("x.crt"), home.path().join("x.key"));
    let issue = |id: Option<&str>, name: &str, days| ca.issue(Role::Agent, id, &[name.to_owned()], &cert, &key, days);
    assert!(matches!(issue(None, "ok.example", 0), Err(CertsError::Days(0))));
    assert!(matches!(issue(None, "ok.example", 100_000), Err(CertsError::Days(_))));
    assert!(matches!(issue(None, "not a name", 10), Err(CertsError::Name(_))));
    assert!(matches!(issue(None, "-x.example", 10), Err(CertsError::Name(_))));
    assert!(matches!(issue(Some(""), "ok.example", 10), Err(CertsError::Id(_))));
    assert!(matches!(issue(Some("a\nb"), "ok.example", 10), Err(CertsError::Id(_))));
    assert!(!cert.exists() && !key.exists());
    issue(Some("主机-1"), "ok.example", 10).unwrap();
    assert_eq!(identity_of_file(&cert).unwrap().id.as_deref(), Some("主机-1"));
}

#[test]
fn keys_do_not_print() {
    let home = TempDir::new().unwrap();
    let ca = Authority::create(home.path()).unwrap();
    assert!(!format!("{ca:?}").contains("PRIVATE"));
}
