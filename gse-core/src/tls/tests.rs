//! Handshakes over real sockets: who is let in, who is not, and that resumption happens.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
use rustls::HandshakeKind;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::certs::{Authority, LEAF_DAYS, Leaf, Pair};

struct Site {
    dir: TempDir,
    ca: Authority,
}

impl Site {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let ca = Authority::create(dir.path().join("ca")).unwrap();
        Site { dir, ca }
    }

    fn files(&self, stem: &str) -> TlsFiles {
        let at = |suffix: &str| self.dir.path().join(format!("{stem}.{suffix}"));
        TlsFiles {
            ca: self.ca.ca_path(),
            cert: at("crt"),
            key: at("key"),
        }
    }

    fn issue(&self, role: Role, id: Option<&str>) -> TlsFiles {
        let files = self.files(&format!("{role}-{}", encode_id(id.unwrap_or("shared"))));
        if !files.cert.exists() {
            self.ca
                .issue(role, id, &[], &files.cert, &files.key, LEAF_DAYS)
                .unwrap();
        }
        files
    }

    fn write(&self, stem: &str, pair: &Pair) -> TlsFiles {
        let files = self.files(stem);
        std::fs::write(&files.cert, &pair.cert_pem).unwrap();
        std::fs::write(&files.key, &pair.key_pem).unwrap();
        files
    }

    fn aged(&self, role: Role, from: SystemTime, to: SystemTime) -> TlsFiles {
        let leaf = Leaf {
            role,
            id: None,
            names: &[],
            not_before: from,
            not_after: to,
        };
        self.write("aged", &self.ca.sign(&leaf).unwrap())
    }

    /// A certificate of this authority with exactly these URIs and usages, which `Authority` itself would never issue.
    fn odd(&self, uris: &[&str], usages: &[ExtendedKeyUsagePurpose]) -> TlsFiles {
        let key = std::fs::read_to_string(self.dir.path().join("ca/gseca.key")).unwrap();
        let issuer = Issuer::from_ca_cert_pem(self.ca.ca_pem(), KeyPair::from_pem(&key).unwrap()).unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = uris
            .iter()
            .map(|uri| SanType::URI((*uri).try_into().unwrap()))
            .collect();
        params.extended_key_usages = usages.to_vec();
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &issuer).unwrap();
        self.write(
            "odd",
            &Pair {
                cert_pem: cert.pem(),
                key_pem: key.serialize_pem(),
            },
        )
    }
}

struct Seen {
    peer: PeerIdentity,
    kind: HandshakeKind,
}

/// One connection between the two configurations; `Err` when either side refused. TLS 1.3 tells a client of a refused certificate only
/// after its own handshake has ended, so a byte is carried both ways.
async fn connect(server: &Arc<ServerConfig>, client: &Arc<ClientConfig>) -> Result<(Seen, Seen), String> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = TlsAcceptor::from(Arc::clone(server));
    let served = tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let mut tls = acceptor.accept(tcp).await.map_err(|error| format!("server: {error}"))?;
        let mut byte = [0];
        tls.read_exact(&mut byte)
            .await
            .map_err(|error| format!("server: {error}"))?;
        tls.write_all(&byte).await.map_err(|error| format!("server: {error}"))?;
        tls.flush().await.map_err(|error| format!("server: {error}"))?;
        let conn = tls.get_ref().1;
        let peer = identity_of(conn).map_err(|error| format!("server: {error}"))?;
        Ok::<_, String>(Seen {
            peer,
            kind: conn.handshake_kind().unwrap(),
        })
    });
    let dialled = async {
        let tcp = TcpStream::connect(address)
            .await
            .map_err(|error| format!("client: {error}"))?;
        let connector = TlsConnector::from(Arc::clone(client));
        let mut tls = connector
            .connect(server_name(), tcp)
            .await
            .map_err(|error| format!("client: {error}"))?;
        tls.write_all(b"x").await.map_err(|error| format!("client: {error}"))?;
        let mut byte = [0];
        tls.read_exact(&mut byte)
            .await
            .map_err(|error| format!("client: {error}"))?;
        let conn = tls.get_ref().1;
        let peer = identity_of(conn).map_err(|error| format!("client: {error}"))?;
        Ok::<_, String>(Seen {
            peer,
            kind: conn.handshake_kind().unwrap(),
        })
    };
    let both = async { (dialled.await, served.await.unwrap()) };
    match tokio::time::timeout(Duration::from_secs(10), both)
        .await
        .expect("a handshake ends")
    {
        (Ok(client), Ok(server)) => Ok((server, client)),
        (client, server) => Err([client.err(), server.err()]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .join("; ")),
    }
}

async fn try_connect(
    server: &TlsFiles,
    accept: &[Role],
    client: &TlsFiles,
    expect: Role,
) -> Result<(Seen, Seen), String> {
    connect(
        &server_config(server, accept, &[]).unwrap(),
        &client_config(client, expect, &[]).unwrap(),
    )
    .await
}

#[tokio::test]
async fn both_sides_learn_who_the_other_is() {
    let site = Site::new();
    let (server, agent) = (
        site.issue(Role::Server, None),
        site.issue(Role::Agent, Some("0:10.0.0.1")),
    );
    let (on_server, on_client) = try_connect(&server, &[Role::Agent], &agent, Role::Server)
        .await
        .unwrap();
    assert_eq!(on_server.peer.role, Role::Agent);
    assert_eq!(on_server.peer.id.as_deref(), Some("0:10.0.0.1"));
    assert_eq!(on_server.peer.fingerprint, agent.identity().unwrap().fingerprint);
    assert_eq!(on_server.peer.fingerprint.len(), 64);
    assert_eq!(on_client.peer.role, Role::Server);
}

#[tokio::test]
async fn the_shared_fleet_certificate_has_no_id() {
    let site = Site::new();
    let (server, agent) = (site.issue(Role::Server, None), site.issue(Role::Agent, None));
    let (on_server, _) = try_connect(&server, &[Role::Agent], &agent, Role::Server)
        .await
        .unwrap();
    assert_eq!((on_server.peer.role, on_server.peer.id), (Role::Agent, None));
}

#[tokio::test]
async fn servers_dial_each_other() {
    let site = Site::new();
    let server = site.issue(Role::Server, None);
    try_connect(&server, &[Role::Server], &server, Role::Server)
        .await
        .map(drop)
        .unwrap();
}

#[tokio::test]
async fn an_agent_certificate_opens_no_listener() {
    let site = Site::new();
    let agent = site.issue(Role::Agent, Some("a1"));
    // Even a client that would take an agent for a server is stopped by the key usage.
    for expect in [Role::Server, Role::Agent] {
        let refused = try_connect(&agent, &[Role::Agent], &agent, expect)
            .await
            .err()
            .expect("refused");
        assert!(refused.contains("client: "), "{refused}");
    }
}

#[tokio::test]
async fn an_agent_is_refused_where_only_servers_are_accepted() {
    let site = Site::new();
    let (server, agent) = (site.issue(Role::Server, None), site.issue(Role::Agent, None));
    let refused = try_connect(&server, &[Role::Server, Role::Operator], &agent, Role::Server)
        .await
        .err()
        .unwrap();
    assert!(
        refused.contains("its role is agent, expected server or operator") || refused.contains("WrongRole"),
        "{refused}"
    );
}

#[tokio::test]
async fn a_client_refuses_a_server_of_another_role() {
    let site = Site::new();
    let posing = site.odd(&["gse://operator"], &[ExtendedKeyUsagePurpose::ServerAuth]);
    let agent = site.issue(Role::Agent, None);
    assert!(
        try_connect(&posing, &[Role::Agent], &agent, Role::Server)
            .await
            .is_err()
    );
    assert!(
        try_connect(&posing, &[Role::Agent], &agent, Role::Operator)
            .await
            .is_ok(),
        "the refusal was about the role"
    );
}

#[tokio::test]
async fn another_authority_is_refused_on_both_sides() {
    let (ours, theirs) = (Site::new(), Site::new());
    let (server, agent) = (ours.issue(Role::Server, None), ours.issue(Role::Agent, None));
    let foreign_server = TlsFiles {
        ca: ours.ca.ca_path(),
        ..theirs.issue(Role::Server, None)
    };
    let foreign_agent = TlsFiles {
        ca: ours.ca.ca_path(),
        ..theirs.issue(Role::Agent, None)
    };
    let by_server = try_connect(&server, &[Role::Agent], &foreign_agent, Role::Server)
        .await
        .err()
        .unwrap();
    assert!(by_server.contains("server: "), "{by_server}");
    let by_client = try_connect(&foreign_server, &[Role::Agent], &agent, Role::Server)
        .await
        .err()
        .unwrap();
    assert!(
        by_client.contains("UnknownIssuer") || by_client.contains("BadSignature"),
        "{by_client}"
    );
}

#[tokio::test]
async fn expired_and_future_certificates_are_refused() {
    let site = Site::new();
    let server = site.issue(Role::Server, None);
    let now = SystemTime::now();
    let (hour, day) = (Duration::from_secs(3600), Duration::from_secs(86_400));
    for (from, to, word) in [
        (now - day, now - hour, "Expired"),
        (now + hour, now + day, "NotValidYet"),
    ] {
        let agent = site.aged(Role::Agent, from, to);
        let refused = try_connect(&server, &[Role::Agent], &agent, Role::Server)
            .await
            .err()
            .unwrap();
        assert!(
            refused.contains(word) || refused.to_lowercase().contains("expired") || refused.contains("not valid"),
            "{refused}"
        );
        let der = files::chain(&agent.cert).unwrap();
        assert_eq!(
            PeerIdentity::of_valid_certificate(&der[0], now),
            Err(IdentityError::NotValidNow)
        );
    }
}

#[tokio::test]
async fn exactly_one_role_has_to_be_stated() {
    let site = Site::new();
    let server = site.issue(Role::Server, None);
    let usage = [ExtendedKeyUsagePurpose::ClientAuth];
    for uris in [
        &["gse://agent", "gse://server"][..],
        &["gse://agent/a", "gse://agent/b"],
        &["gse://agent", "GSE://server"],
        &["gse://agent/a/b"],
        &["gse://agent/"],
        &["gse://agents"],
        &["gse:agent"],
        &["https://agent"],
        &[],
    ] {
        let odd = site.odd(uris, &usage);
        let all = [Role::Agent, Role::Server, Role::ApiClient, Role::Operator];
        assert!(
            try_connect(&server, &all, &odd, Role::Server).await.is_err(),
            "{uris:?} was let in"
        );
    }
    let other_uris = site.odd(&["https://example.com/x", "gse://agent/a"], &usage);
    assert!(
        try_connect(&server, &[Role::Agent], &other_uris, Role::Server)
            .await
            .is_ok()
    );
}

#[tokio::test]
async fn a_certificate_without_key_usage_is_refused() {
    let site = Site::new();
    let server = site.issue(Role::Server, None);
    let loose = site.odd(&["gse://agent"], &[]);
    assert!(
        try_connect(&server, &[Role::Agent], &loose, Role::Server)
            .await
            .is_err()
    );
    let server_only = site.odd(&["gse://server"], &[ExtendedKeyUsagePurpose::ServerAuth]);
    assert!(
        try_connect(&server, &[Role::Server], &server_only, Role::Server)
            .await
            .is_err()
    );
}

#[tokio::test]
async fn a_client_without_certificate_is_refused() {
    let site = Site::new();
    let server = server_config(&site.issue(Role::Server, None), &[Role::Agent], &[]).unwrap();
    let mut bare = ClientConfig::clone(&client_config(&site.issue(Role::Agent, None), Role::Server, &[]).unwrap());
    bare.client_auth_cert_resolver = Arc::new(NoCertificate);
    assert!(connect(&server, &Arc::new(bare)).await.is_err());
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }
    fn has_certs(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn only_tls_1_3_is_spoken_on_our_links() {
    let site = Site::new();
    let server = server_config(&site.issue(Role::Server, None), &[Role::Agent], &[]).unwrap();
    let old = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_root_certificates(files::roots(&site.ca.ca_path()).unwrap())
        .with_no_client_auth();
    let refused = connect(&server, &Arc::new(old)).await.err().unwrap();
    assert!(
        refused.contains("ProtocolVersion") || refused.contains("peer is incompatible"),
        "{refused}"
    );
}

#[tokio::test]
async fn a_second_connection_resumes_and_still_knows_its_peer() {
    let site = Site::new();
    let server = server_config(&site.issue(Role::Server, None), &[Role::Agent], &[]).unwrap();
    let client = client_config(&site.issue(Role::Agent, Some("a1")), Role::Server, &[]).unwrap();
    let (first, _) = connect(&server, &client).await.unwrap();
    assert_eq!(first.kind, HandshakeKind::Full);
    let (on_server, on_client) = connect(&server, &client).await.unwrap();
    assert_eq!(
        (on_server.kind, on_client.kind),
        (HandshakeKind::Resumed, HandshakeKind::Resumed)
    );
    assert_eq!(on_server.peer.id.as_deref(), Some("a1"));
    // The same server after a restart takes the ticket; a listener with other roles does not, even with the same certificate.
    let restarted = server_config(&site.issue(Role::Server, None), &[Role::Agent], &[]).unwrap();
    let (again, _) = connect(&restarted, &client).await.unwrap();
    assert_eq!(
        (again.kind, again.peer.id.as_deref()),
        (HandshakeKind::Resumed, Some("a1"))
    );
    let other = server_config(&site.issue(Role::Server, None), &[Role::Agent, Role::Operator], &[]).unwrap();
    let (elsewhere, _) = connect(&other, &client).await.unwrap();
    assert_eq!(elsewhere.kind, HandshakeKind::Full);
}

#[test]
fn errors_name_the_file_and_not_its_content() {
    let site = Site::new();
    let good = site.issue(Role::Server, None);
    let other = site.issue(Role::Agent, None);
    let mixed = TlsFiles {
        key: other.key.clone(),
        ..good.clone()
    };
    assert!(matches!(
        server_config(&mixed, &[Role::Agent], &[]),
        Err(TlsError::Mismatch { .. })
    ));
    assert!(matches!(server_config(&good, &[], &[]), Err(TlsError::NoRoles)));
    let absent = TlsFiles {
        ca: PathBuf::from("/nonexistent/ca.crt"),
        ..good.clone()
    };
    let error = client_config(&absent, Role::Server, &[]).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/ca.crt"), "{error}");
    let broken = site.dir.path().join("broken.key");
    let secret = "c2VjcmV0LWNhbmFyeQ";
    std::fs::write(
        &broken,
        format!("-----BEGIN PRIVATE KEY-----\n{secret}*\n-----END PRIVATE KEY-----\n"),
    )
    .unwrap();
    let error = server_config(&TlsFiles { key: broken, ..good }, &[Role::Agent], &[]).unwrap_err();
    assert!(error.to_string().contains("broken.key"), "{error}");
    assert!(!format!("{error} {error:?}").contains(secret), "{error:?}");
}
