//! A real Redis Cluster of three nodes.

use super::*;

/// A node that is in no cluster yet.
async fn node() -> Server {
    let args = [
        "--cluster-enabled",
        "yes",
        "--cluster-node-timeout",
        "1000",
        "--cluster-require-full-coverage",
        "no",
    ];
    loop {
        let node = Server::start(&args).await;
        // Its bus listens 10000 ports higher, where there has to be a port.
        if node.port() < 55_000 {
            return node;
        }
    }
}

async fn cluster() -> (Vec<Server>, StoreConfig) {
    let nodes = vec![node().await, node().await, node().await];
    let addresses: Vec<String> = nodes.iter().map(|node| format!("127.0.0.1:{}", node.port())).collect();
    let created = std::process::Command::new("redis-cli")
        .args(["--cluster", "create"])
        .args(&addresses)
        .args(["--cluster-yes"])
        .output()
        .expect("redis-cli of Debian's package redis-tools");
    assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stdout));
    let mut cfg = config(format!("redis+cluster://{}", addresses[..2].join(",")));
    cfg.connect_timeout_ms = 2000;
    cfg.command_timeout_ms = 3000;
    (nodes, cfg)
}

#[tokio::test]
async fn a_batch_is_spread_over_the_nodes_and_replies_come_in_push_order() {
    let (mut nodes, cfg) = cluster().await;
    let store = Store::connect(&cfg).await.unwrap();
    eventually(&store, Duration::from_secs(10)).await;

    let mut writes = Batch::new();
    for index in 0..3000 {
        let key = format!("{{task:{}}}:{index}", index % 100);
        writes.push(&key, redis::cmd("SET").arg(&key).arg(index).clone());
    }
    assert_eq!(store.run(writes).await.unwrap().len(), 3000);
    let mut reads = Batch::new();
    for index in 0..3000 {
        let key = format!("{{task:{}}}:{index}", index % 100);
        reads.push(&key, redis::cmd("GET").arg(&key).clone());
    }
    let values: Vec<i64> = store
        .run(reads)
        .await
        .unwrap()
        .into_iter()
        .map(|value| as_int(value).unwrap())
        .collect();
    assert_eq!(values, (0..3000).collect::<Vec<i64>>());
    for node in &nodes {
        let alone = Store::connect(&config(node.url())).await.unwrap();
        let held = as_int(alone.run(batch(&[&["DBSIZE"]])).await.unwrap().remove(0)).unwrap();
        assert!(held > 300, "a node holds {held} of 3000 keys");
    }

    // The index of a refusal is that of the whole batch, not of its group.
    let mut mixed = Batch::new();
    for index in 0..50 {
        mixed.push(
            format!("k{index}"),
            redis::cmd("SET").arg(format!("k{index}")).arg("text").clone(),
        );
    }
    mixed.push("k7", redis::cmd("INCR").arg("k7").clone());
    match store.run(mixed).await.unwrap_err() {
        StoreError::Reply { index: 50, message } => assert!(message.starts_with("ERR"), "{message}"),
        other => panic!("{other:?}"),
    }

    // slot() agrees with the server's own idea.
    for key in [
        "foo",
        "{foo}.bar",
        "x{foo}.{bar}",
        "{}foo",
        "foo{}{bar}",
        "a{b",
        "",
        "}{a}",
    ] {
        let alone = Store::connect(&config(nodes[0].url())).await.unwrap();
        let said = alone
            .run(batch(&[&["CLUSTER", "KEYSLOT", key]]))
            .await
            .unwrap()
            .remove(0);
        assert_eq!(as_int(said).unwrap(), i64::from(slot(key.as_bytes())), "{key:?}");
    }

    // A slot that moves is followed without the caller's help.
    let moving = slot(b"foo");
    store.run(batch(&[&["SET", "{foo}.moved", "before"]])).await.unwrap();
    move_slot(&nodes, moving).await;
    let seen = store
        .run(batch(&[&["GET", "{foo}.moved"], &["SET", "{foo}.new", "1"]]))
        .await
        .unwrap()
        .remove(0);
    assert_eq!(as_string(seen).unwrap().unwrap(), "before");

    // All nodes go and come back.
    for node in &mut nodes {
        node.kill();
    }
    let asked = Instant::now();
    let error = store.run(batch(&[&["GET", "foo"]])).await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    assert!(asked.elapsed() < Duration::from_millis(3500), "{:?}", asked.elapsed());
    for node in &mut nodes {
        node.restart().await;
    }
    eventually(&store, Duration::from_secs(10)).await;
    let seen = store.run(batch(&[&["GET", "{foo}.moved"]])).await.unwrap().remove(0);
    assert_eq!(as_string(seen).unwrap().unwrap(), "before");
}

#[tokio::test]
async fn a_node_that_hangs_fails_only_its_own_slots_until_its_replica_takes_over() {
    let (nodes, cfg) = cluster().await;
    let store = Store::connect(&cfg).await.unwrap();
    eventually(&store, Duration::from_secs(10)).await;
    let mut writes = Batch::new();
    for index in 0..300 {
        writes.push(
            format!("k{index}"),
            redis::cmd("SET").arg(format!("k{index}")).arg(index).clone(),
        );
    }
    store.run(writes).await.unwrap();
    one_hangs(&nodes, &store).await;
}

/// A node that hangs fails the batches of its own slots and no others, until its replica takes them over.
async fn one_hangs(nodes: &[Server], store: &Store) {
    let mut keys = Vec::new();
    for node in nodes {
        let alone = Store::connect(&config(node.url())).await.unwrap();
        let key = alone.run(batch(&[&["RANDOMKEY"]])).await.unwrap().remove(0);
        keys.push(as_string(key).unwrap().unwrap());
    }
    let _replica = replica_of(&nodes[2]).await;

    nodes[2].stop();
    let stop = tokio_util::sync::CancellationToken::new();
    let others = tokio::spawn({
        let (store, stop, keys) = (store.clone(), stop.clone(), keys.clone());
        async move {
            let mut served = 0;
            while !stop.is_cancelled() {
                store
                    .run(batch(&[&["GET", &keys[0]], &["GET", &keys[1]]]))
                    .await
                    .unwrap();
                served += 1;
                sleep(Duration::from_millis(20)).await;
            }
            served
        }
    });
    let error = store.run(batch(&[&["GET", &keys[2]]])).await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    let end = Instant::now() + Duration::from_secs(15);
    while let Err(error) = store.run(batch(&[&["GET", &keys[2]]])).await {
        assert!(Instant::now() < end, "the replica is not used: {error}");
    }
    stop.cancel();
    let served = others.await.expect("the other nodes' slots are served all the time");
    assert!(served > 20, "{served}");
    nodes[2].go_on();
    sleep(Duration::from_millis(500)).await;
    store
        .run(batch(&[&["GET", &keys[0]], &["GET", &keys[1]], &["GET", &keys[2]]]))
        .await
        .unwrap();
}

/// Starts a replica of `primary` and waits until it has its data.
async fn replica_of(primary: &Server) -> Server {
    let replica = node().await;
    let to_primary = Store::connect(&config(primary.url())).await.unwrap();
    let to_replica = Store::connect(&config(replica.url())).await.unwrap();
    let id = as_string(to_primary.run(batch(&[&["CLUSTER", "MYID"]])).await.unwrap().remove(0))
        .unwrap()
        .unwrap();
    to_replica
        .run(batch(&[&["CLUSTER", "MEET", "127.0.0.1", &primary.port().to_string()]]))
        .await
        .unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    // Refused until the two have met.
    while let Err(error) = to_replica.run(batch(&[&["CLUSTER", "REPLICATE", &id]])).await {
        assert!(Instant::now() < end, "no replica: {error}");
        sleep(Duration::from_millis(50)).await;
    }
    loop {
        let info = as_string(
            to_replica
                .run(batch(&[&["INFO", "replication"]]))
                .await
                .unwrap()
                .remove(0),
        )
        .unwrap()
        .unwrap();
        if info.contains("master_link_status:up") {
            return replica;
        }
        assert!(Instant::now() < end, "the replica does not follow: {info}");
        sleep(Duration::from_millis(50)).await;
    }
}

/// Moves a slot with its keys from the node that has it to another one.
async fn move_slot(nodes: &[Server], moving: u16) {
    let mut stores = Vec::new();
    for node in nodes {
        let store = Store::connect(&config(node.url())).await.unwrap();
        let id = as_string(store.run(batch(&[&["CLUSTER", "MYID"]])).await.unwrap().remove(0))
            .unwrap()
            .unwrap();
        let count = store
            .run(batch(&[&["CLUSTER", "COUNTKEYSINSLOT", &moving.to_string()]]))
            .await
            .unwrap()
            .remove(0);
        stores.push((store, id, as_int(count).unwrap(), node.port()));
    }
    let from = stores.iter().position(|(_, _, count, _)| *count > 0).unwrap();
    let to = (from + 1) % stores.len();
    let slot = moving.to_string();
    let (source, source_id, count, _) = &stores[from];
    let (target, target_id, _, port) = &stores[to];
    target
        .run(batch(&[&["CLUSTER", "SETSLOT", &slot, "IMPORTING", source_id]]))
        .await
        .unwrap();
    source
        .run(batch(&[&["CLUSTER", "SETSLOT", &slot, "MIGRATING", target_id]]))
        .await
        .unwrap();
    let keys = source
        .run(batch(&[&["CLUSTER", "GETKEYSINSLOT", &slot, &count.to_string()]]))
        .await
        .unwrap()
        .remove(0);
    for key in as_array(keys).unwrap() {
        let key = as_string(key).unwrap().unwrap();
        source
            .run(batch(&[&[
                "MIGRATE",
                "127.0.0.1",
                &port.to_string(),
                &key,
                "0",
                "1000",
            ]]))
            .await
            .unwrap();
    }
    for (store, ..) in [&stores[to], &stores[from]] {
        store
            .run(batch(&[&["CLUSTER", "SETSLOT", &slot, "NODE", target_id]]))
            .await
            .unwrap();
    }
}
