//! The testbed: two gateways, each with a Redis of its own. One is attacked, the other is the
//! control.
//!
//! They share the machine, so that the control shows the cost of the CPU time that the attack
//! takes, and the difference between the two shows the effect on the gateway itself.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use skein_testkit::servers::{self, ServerError, ServerProcess, free_address};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use super::verdict::NodeUsage;
use crate::procfs::{CpuTime, ProcessUsage};

/// Key of the server API, which attackers do not know.
pub(crate) const API_KEY: &str = "abuse-7f3a9c51d2e84b06";
/// Time limit of Redis' `INFO`.
const INFO_MAX: Duration = Duration::from_secs(5);

/// Options of the nodes.
#[derive(Clone, Debug)]
pub(crate) struct NodeOptions {
    /// The gateway program.
    pub(crate) gateway: PathBuf,
    /// Redis' `maxmemory`.
    pub(crate) redis_maxmemory: Option<String>,
    /// Further options of the gateway, as `KEY=VALUE`.
    pub(crate) set: Vec<String>,
}

/// A gateway and its Redis.
#[derive(Debug)]
pub(crate) struct AbuseNode {
    gateway: ServerProcess,
    redis: ServerProcess,
    redis_address: SocketAddr,
    /// Address for clients.
    pub(crate) listen: SocketAddr,
    // Last, so that it outlives the processes that write into it.
    _scratch: TempDir,
}

impl AbuseNode {
    /// Starts both and waits until the gateway is ready.
    pub(crate) async fn start(name: &str, options: &NodeOptions) -> Result<Self, ServerError> {
        Self::start_at(name, options, free_address()?).await
    }

    /// As [`AbuseNode::start`], with the address for clients.
    pub(crate) async fn start_at(
        name: &str,
        options: &NodeOptions,
        listen: SocketAddr,
    ) -> Result<Self, ServerError> {
        let scratch = TempDir::new()?;
        let redis_address = free_address()?;
        let mut redis_options = vec!["--appendonly", "no"];
        if let Some(bytes) = &options.redis_maxmemory {
            redis_options.extend(["--maxmemory", bytes]);
        }
        let redis = servers::start_redis(redis_address, scratch.path(), &redis_options).await?;
        let gateway = start_gateway(name, options, listen, redis_address, scratch.path())?;
        gateway.wait_until_ready(listen).await?;
        Ok(Self { gateway, redis, redis_address, listen, _scratch: scratch })
    }

    /// Whether the gateway or its Redis has ended by itself.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.gateway.has_ended() || self.redis.has_ended()
    }

    /// Reads the usage of the node.
    pub(crate) async fn usage(&self) -> NodeUsage {
        // A process that has ended has no usage; `None` would be this process.
        let gateway = Some(self.gateway.pid().unwrap_or(u32::MAX));
        let redis_pid = Some(self.redis.pid().unwrap_or(u32::MAX));
        let info = timeout(INFO_MAX, info(self.redis_address)).await;
        let redis = info.ok().and_then(Result::ok).map(|text| RedisInfo::read(&text));
        let cost = ProcessUsage::read(gateway);
        let is_known = redis.is_some() && cost.is_ok();
        let redis = redis.unwrap_or_default();
        let log = std::fs::metadata(self.gateway.log()).map_or(0, |file| file.len());
        NodeUsage {
            gateway_bytes: cost.unwrap_or_default().pss_bytes,
            redis_bytes: redis.used_bytes,
            descriptors: gateway.map_or(0, descriptors),
            keys: redis.keys,
            subscriptions: redis.subscriptions,
            log_bytes: log,
            gateway_cpu_ms: CpuTime::read(gateway).unwrap_or_default().total_ms(),
            redis_cpu_ms: CpuTime::read(redis_pid).unwrap_or_default().total_ms(),
            is_known,
        }
    }

    /// Stops both gracefully.
    pub(crate) async fn stop(mut self) {
        self.gateway.stop().await;
        self.redis.stop().await;
    }
}

fn start_gateway(
    name: &str,
    options: &NodeOptions,
    listen: SocketAddr,
    redis: SocketAddr,
    scratch: &Path,
) -> Result<ServerProcess, ServerError> {
    // All other options, limits above all, are the defaults, which are under attack.
    let own = [format!("api.keys=abuse:{API_KEY}"), "drain.delay=0s".to_owned()];
    let set = [&own[..], &options.set].concat();
    let redis_url = format!("redis://{redis}");
    servers::start_gateway(name, &options.gateway, listen, &redis_url, &set, scratch)
}

/// Number of open descriptors of a process.
fn descriptors(pid: u32) -> u64 {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |files| files.count() as u64)
}

/// Requests `INFO` from Redis.
async fn info(redis: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect(redis).await?;
    stream.write_all(b"INFO\r\n").await?;
    let (mut text, mut buffer) = (Vec::new(), vec![0; 16 * 1024]);
    loop {
        let count = stream.read(&mut buffer).await?;
        text.extend_from_slice(&buffer[..count]);
        // `$<length>`, the text, and a line end.
        let length = text.strip_prefix(b"$").and_then(|rest| {
            let end = rest.windows(2).position(|two| two == b"\r\n")?;
            let digits = std::str::from_utf8(&rest[..end]).ok()?;
            Some(1 + end + 2 + digits.parse::<usize>().ok()? + 2)
        });
        if count == 0 || length.is_some_and(|length| text.len() >= length) {
            return Ok(String::from_utf8_lossy(&text).into_owned());
        }
    }
}

/// Values of `INFO` about data that clients made it keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct RedisInfo {
    used_bytes: u64,
    keys: u64,
    subscriptions: u64,
}

impl RedisInfo {
    fn read(text: &str) -> Self {
        let mut info = Self::default();
        for line in text.lines() {
            let Some((name, value)) = line.split_once(':') else { continue };
            let number = || value.trim().parse::<u64>().unwrap_or_default();
            match name {
                "used_memory" => info.used_bytes = number(),
                "pubsub_channels" | "pubsub_patterns" | "pubsubshard_channels" => {
                    info.subscriptions += number();
                }
                _ if name.starts_with("db") => {
                    let keys = value.split(',').find_map(|part| part.strip_prefix("keys="));
                    info.keys += keys.and_then(|keys| keys.parse::<u64>().ok()).unwrap_or_default();
                }
                _ => {}
            }
        }
        info
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_is_parsed() {
        let text = "# Memory\r\nused_memory:1234\r\nused_memory_peak:9\r\npubsub_channels:5\r\n\
                    pubsub_patterns:1\r\npubsubshard_channels:2\r\ndb0:keys=7,expires=1\r\ndb1:keys=1,x=2\r\n";
        let expected = RedisInfo { used_bytes: 1234, keys: 8, subscriptions: 8 };
        assert_eq!(RedisInfo::read(text), expected);
        assert_eq!(RedisInfo::read("-ERR"), RedisInfo::default());
    }

    #[test]
    fn descriptors_of_this_process_are_counted() {
        assert!(descriptors(std::process::id()) > 2);
        assert_eq!(descriptors(u32::MAX), 0);
    }
}
