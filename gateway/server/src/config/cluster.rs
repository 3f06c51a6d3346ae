//! Options of the cluster's Redis.

use std::path::PathBuf;

use humantime::Duration;
use skein_core::bus::{Retention, room_store::RoomStoreOptions, sessions::SessionOptions};
use skein_protocol::ids::NodeId;
use skein_redis::{
    RedisOptions,
    topology::{TlsFiles, url::RedisUrl},
};

use super::{
    reader::{OptionReader, options},
    secrets::SecretKind,
    values::{Bounds, ByteSize, Optional},
};

options! {
    /// The Redis of the cluster.
    ClusterSection in "cluster" {
        /// URL of the cluster's Redis: `redis://user:password@host:6379/0`,
        /// `redis+sentinel://user:password@s1,s2,s3/primary` or
        /// `redis+cluster://user:password@h1,h2,h3`; `rediss` for TLS. Empty: a single node that
        /// keeps logs in memory.
        redis_url: Optional<String> = "", secret SecretKind::Url;
        /// For TLS: file with the authorities that sign the certificate of Redis (PEM). Empty: the
        /// public authorities.
        redis_ca_file: Optional<PathBuf> = "";
        /// For TLS: file with the certificate that this node presents to Redis (PEM). Redis
        /// requires one unless it has `tls-auth-clients no`.
        redis_cert_file: Optional<PathBuf> = "";
        /// For TLS: file with the private key of `cluster.redis_cert_file` (PEM).
        redis_key_file: Optional<PathBuf> = "";
        /// Number of partitions that rooms are distributed over in Redis. Must be the same on all
        /// nodes, and cannot be changed later.
        partitions: u16 = "256", within 1..=16_384;
        /// How long the lease of a node lasts; the node renews it after three tenths of that time.
        /// After a crash its users stay present for this long, and a Redis that lost data waits
        /// this long for the entries that the node may hold. 1s to 1m, the same on all nodes. With
        /// a short lease, a pause of a node or of Redis suspends delivery sooner.
        lease: Duration = "10s", within Bounds::seconds(1..=60, "1s to 1m");
        /// Memory that each Redis server may use if it has no `maxmemory`. 0: unknown, so that
        /// there is no watermark.
        memory_max: ByteSize = "0";
        /// Percent of its memory above which a Redis server stores nothing new: new rooms, inboxes
        /// and room settings are rejected with `overloaded`, and logs stop growing.
        memory_watermark: u8 = "80", within 10..=99;
    }
}

impl ClusterSection {
    /// Checks the options together.
    pub(super) fn check(&self, reader: &mut OptionReader) {
        let Self { redis_ca_file: ca, redis_cert_file: cert, redis_key_file: key, .. } = self;
        let url = self.redis_url.0.as_ref().and_then(|url| {
            url.parse::<RedisUrl>()
                .map_err(|error| reader.error("cluster.redis_url", error.to_string()))
                .ok()
        });
        if url.is_some_and(|url| !url.has_tls()) {
            for (key, file) in [("cluster.redis_ca_file", ca), ("cluster.redis_cert_file", cert)] {
                if file.0.is_some() {
                    reader.error(
                        key,
                        "is for TLS only: set a cluster.redis_url that begins with rediss, or \
                         remove this option",
                    );
                }
            }
        }
        if cert.0.is_some() != key.0.is_some() {
            reader.error(
                "cluster.redis_key_file",
                "requires cluster.redis_cert_file, and vice versa: set both or neither",
            );
        }
        if self.redis_url.0.is_none() && [ca, cert, key].iter().any(|file| file.0.is_some()) {
            reader.error(
                "cluster.redis_url",
                "is required by the options for TLS files: set it, or remove them",
            );
        }
    }

    /// Whether there are other nodes.
    pub(super) fn is_cluster(&self) -> bool {
        self.redis_url.0.is_some()
    }

    /// Options of the bus on Redis; `None` for a single node in memory.
    pub(super) fn redis(
        self,
        node: &NodeId,
        retention: &Retention,
        rooms: RoomStoreOptions,
        sessions: &SessionOptions,
        archive_backlog_max: u32,
    ) -> Option<RedisOptions> {
        let identity = self.redis_cert_file.0.zip(self.redis_key_file.0);
        Some(RedisOptions {
            url: self.redis_url.0?.into(),
            tls: TlsFiles { ca: self.redis_ca_file.0, identity },
            partitions: self.partitions,
            lease: *self.lease,
            retention: retention.clone(),
            rooms,
            sessions: sessions.clone(),
            node: node.to_string(),
            archive_backlog_max,
        })
    }
}
