#!/bin/sh
# A real Kafka broker (KRaft, one node) for tests, in the foreground: broker.sh DIR PORT SASL_PORT CONTROLLER_PORT
#
# PORT takes anybody; SASL_PORT takes the user "gse" (password "gse-password") by SCRAM-SHA-512. Apache Kafka is fetched from Maven Central
# into a directory that stays (GSE_TESTS_KAFKA, else gse-tests/kafka-VERSION in the user's cache). Ends with 77, and a line that says
# why, where it cannot be had.
set -eu
version=3.9.1
dir=$1 port=$2 sasl=$3 controller=$4
skip() {
    echo "no Kafka: $1" >&2
    exit 77
}
command -v java >/dev/null || skip "there is no java"
cache=${GSE_TESTS_KAFKA:-${XDG_CACHE_HOME:-${HOME:-/var/tmp}/.cache}/gse-tests/kafka-$version}
mkdir -p "$dir"
if [ ! -f "$cache/complete" ]; then
    command -v mvn >/dev/null || skip "there is no mvn to fetch it with, and nothing in $cache"
    cat >"$dir/pom.xml" <<EOF
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>gse.test</groupId>
  <artifactId>kafka</artifactId>
  <version>1</version>
  <packaging>pom</packaging>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>$version</version></dependency>
    <dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>1.7.36</version></dependency>
  </dependencies>
</project>
EOF
    mkdir -p "$cache"
    (cd "$dir" && mvn -q -B dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$cache/lib") \
        >"$dir/mvn.log" 2>&1 || skip "mvn cannot fetch it, see $dir/mvn.log: $(grep -m1 ERROR "$dir/mvn.log")"
    touch "$cache/complete"
fi
cat >"$dir/server.properties" <<EOF
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:$controller
listeners=PLAIN://127.0.0.1:$port,SASL://127.0.0.1:$sasl,CONTROLLER://127.0.0.1:$controller
advertised.listeners=PLAIN://127.0.0.1:$port,SASL://127.0.0.1:$sasl
listener.security.protocol.map=PLAIN:PLAINTEXT,SASL:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAIN
sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.sasl.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
log.dirs=$dir/logs
num.partitions=1
message.max.bytes=11534336
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
auto.create.topics.enable=true
broker.session.timeout.ms=1500
broker.heartbeat.interval.ms=300
EOF
options="-Xmx512m -Xshare:auto -XX:TieredStopAtLevel=1 -Dorg.slf4j.simpleLogger.defaultLogLevel=warn -Dorg.slf4j.simpleLogger.showDateTime=true -Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss"
# A broker that comes again has its records still.
if [ ! -f "$dir/logs/meta.properties" ]; then
    # shellcheck disable=SC2086
    java $options -cp "$cache/lib/*" kafka.tools.StorageTool format -c "$dir/server.properties" -t "$(printf gse-tests-cluster | base64 | cut -c1-22)" \
        -S 'SCRAM-SHA-512=[name=gse,password=gse-password]'
fi
# shellcheck disable=SC2086
exec java $options -cp "$cache/lib/*" kafka.Kafka "$dir/server.properties"
