//! The archiver: copies entries from the archive streams in Redis to the archive.
//!
//! The step that appends an entry to its log also adds it to the archive stream of its placement
//! group. The nodes read the streams as one consumer group, so that each entry goes to one node,
//! which removes it from the stream once the archive has committed it. Entries that a dead node had
//! taken go to another one. An entry may be copied twice; the archive keeps it once.
//!
//! While the archive is away, entries wait in the streams, and nothing else does. A stream that is
//! full takes no more entries but notes their rooms; those are copied from the rooms' logs once the
//! stream has space again, as far as the logs still have them.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use redis::{RedisResult, Value, aio::MultiplexedConnection};
use skein_protocol::{ids::RoomId, position::Position};
use tokio::time::Instant;

use super::{
    keyspace::Keyspace,
    log::RedisLog,
    requirements::Detector,
    retry::RetryPause,
    server::RedisServer,
    topology::connection_config,
    untrusted::{self, Lossy, or_default},
};
use skein_core::{
    archive::{Archive, ArchiveRecord, ArchiveWriter},
    bus::{BusError, ReadRange},
    delivery::{Entry, ordinal, page::READ_LEN},
    drain::Tasks,
    envelope::Envelope,
    telemetry::metrics::{ArchiveResult, InvalidValue, Metrics},
};

/// The consumer group of all nodes.
const GROUP: &str = "archive";
/// How often the streams are read while they are empty.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// The most entries of one batch, and the bytes that it should have.
const BATCH_LEN_MAX: usize = 500;
const BATCH_BYTES: usize = 4 << 20;
/// After this time, entries that a node has taken and not removed go to another node.
const CLAIM_AFTER: Duration = Duration::from_secs(60);
/// How often such entries are looked for.
const CLAIM_INTERVAL: Duration = Duration::from_secs(15);
/// How often the lag is measured.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// The lag of all servers, which the metrics show.
#[derive(Default)]
pub(super) struct ArchiveLags(Mutex<BTreeMap<usize, Lag>>);

/// The entries that wait on a server, the age of the oldest one, and the rooms that are behind.
#[derive(Clone, Copy, Debug, Default)]
struct Lag {
    entries: u64,
    oldest: Duration,
    rooms: u64,
}

impl ArchiveLags {
    fn note(&self, server: usize, lag: Option<Lag>, metrics: &Metrics) {
        let lags = &mut *self.0.lock();
        match lag {
            Some(lag) => drop(lags.insert(server, lag)),
            None => drop(lags.remove(&server)),
        }
        let sum = |value: fn(&Lag) -> u64| lags.values().map(value).sum::<u64>() as i64;
        metrics.archive_lag_entries.set(sum(|lag| lag.entries));
        metrics.archive_rooms_behind.set(sum(|lag| lag.rooms));
        let oldest = lags.values().map(|lag| lag.oldest).max().unwrap_or_default();
        metrics.archive_oldest_seconds.set(oldest.as_secs_f64());
    }
}

/// Copies the entries of one server.
struct Archiver {
    server: Arc<RedisServer>,
    log: RedisLog,
    writer: ArchiveWriter,
    lags: Arc<ArchiveLags>,
    metrics: Arc<Metrics>,
    /// The name of this node as a consumer. It is the same after a restart, so that the node goes
    /// on with what it had taken.
    consumer: String,
    /// Bytes of an entry, roughly.
    entry_bytes: AtomicUsize,
    /// Whether rooms are behind, and their stream has space again.
    rooms_wait: AtomicBool,
}

/// Starts the task that copies the entries of a server.
pub(super) fn start(
    server: Arc<RedisServer>,
    archive: Arc<dyn Archive>,
    lags: Arc<ArchiveLags>,
    node: &str,
    metrics: &Arc<Metrics>,
    tasks: &Tasks,
) {
    let log = RedisLog::new(server.clone(), metrics.clone());
    let writer = ArchiveWriter::new(archive, metrics.clone());
    let (metrics, consumer) = (metrics.clone(), node.to_owned());
    let (entry_bytes, rooms_wait) = (AtomicUsize::new(1024), AtomicBool::new(false));
    let archiver =
        Archiver { server, log, writer, lags, metrics, consumer, entry_bytes, rooms_wait };
    let stopped = tasks.stopped().clone();
    tasks.spawn_service("redis_archiver", async move {
        // Both arms are cancel-safe: entries that are not removed are copied again.
        tokio::select! {
            biased;
            () = stopped.cancelled() => {}
            () = archiver.work() => {}
        }
        archiver.lags.note(archiver.key(), None, &archiver.metrics);
    });
}

/// A record of a stream with its id, and the group of the stream.
struct StreamRecord {
    group: u16,
    id: String,
    /// `None`: no gateway wrote it.
    record: Option<ArchiveRecord>,
}

impl Archiver {
    fn key(&self) -> usize {
        Arc::as_ptr(&self.server) as usize
    }

    /// Copies entries, for ever.
    async fn work(&self) {
        let mut pause = RetryPause::default();
        loop {
            pause.wait().await;
            let error = match self.server.connect(connection_config()).await {
                Ok((connection, _)) => match self.follow(connection).await {
                    Ok(never) => match never {},
                    Err(error) => error,
                },
                Err(error) => error,
            };
            pause.failed(&error);
            self.server.requirements.record(Detector::Call, &error);
            tracing::debug!(%error, "archiver connection ended");
        }
    }

    /// Copies entries while the connection lasts.
    async fn follow(&self, connection: MultiplexedConnection) -> RedisResult<Infallible> {
        let mut reporting = connection.clone();
        let report = async {
            loop {
                self.measure_lag(&mut reporting).await?;
                tokio::time::sleep(REPORT_INTERVAL).await;
            }
        };
        // The lag is measured while a batch waits for an archive that is away. Both end with the
        // connection.
        tokio::select! {
            ended = self.copy_all(connection) => ended,
            ended = report => ended,
        }
    }

    /// Copies entries while the connection lasts.
    async fn copy_all(&self, mut connection: MultiplexedConnection) -> RedisResult<Infallible> {
        // Entries that this node had taken before come first.
        while self.copy_next(&mut connection, "0").await? > 0 {}
        let mut claimed = Instant::now();
        loop {
            let copied = self.copy_next(&mut connection, ">").await?;
            if self.rooms_wait.load(Ordering::Relaxed) {
                self.copy_room_behind(&mut connection).await?;
            }
            if claimed.elapsed() >= CLAIM_INTERVAL {
                claimed = Instant::now();
                self.claim(&mut connection).await?;
            }
            if copied == 0 {
                tokio::time::sleep(POLL_INTERVAL).await;
            }
        }
    }

    fn backlog_max(&self) -> u32 {
        self.server.keyspace.archive_backlog_max
    }

    fn groups(&self) -> BTreeSet<u16> {
        self.server.owned.borrow().clone()
    }

    /// Takes the next entries of each stream, copies them and removes them. `from`: `>` for new
    /// ones, `0` for those that this node took before. Returns their number.
    async fn copy_next(
        &self,
        connection: &mut MultiplexedConnection,
        from: &str,
    ) -> RedisResult<usize> {
        let groups = self.groups();
        let count =
            (BATCH_BYTES / self.entry_bytes.load(Ordering::Relaxed)).clamp(16, BATCH_LEN_MAX);
        let count = (count / groups.len().max(1)).max(4);
        let mut pipeline = redis::Pipeline::with_capacity(groups.len());
        for group in &groups {
            let read = pipeline.cmd("XREADGROUP").arg("GROUP").arg(GROUP).arg(&self.consumer);
            let read = read.arg("COUNT").arg(count).arg("STREAMS");
            read.arg(self.server.keyspace.archive(*group)).arg(from);
        }
        pipeline.ignore_errors();
        let replies: Vec<RedisResult<Value>> = pipeline.query_async(connection).await?;
        let (mut records, mut missing) = (Vec::new(), Vec::new());
        for (group, reply) in groups.into_iter().zip(replies) {
            match reply {
                Ok(reply) => records.extend(self.records_of(group, entries_of_read(reply))),
                Err(error) if error.code() == Some("NOGROUP") => missing.push(group),
                Err(error) if untrusted::is_wrong_type(&error) => {
                    // The next append repairs the key.
                    untrusted::report(&self.metrics, InvalidValue::KeyType, "archive stream");
                }
                Err(error) => return Err(error),
            }
        }
        for group in missing {
            self.create_group(connection, group).await?;
        }
        self.copy(connection, records).await
    }

    async fn create_group(
        &self,
        connection: &mut MultiplexedConnection,
        group: u16,
    ) -> RedisResult<()> {
        let mut create = redis::cmd("XGROUP");
        create.arg("CREATE").arg(self.server.keyspace.archive(group)).arg(GROUP).arg("0");
        match create.arg("MKSTREAM").query_async(connection).await {
            Err(error) if error.code() == Some("BUSYGROUP") => Ok(()),
            created => created,
        }
    }

    /// Takes entries that other nodes took and did not remove in time, and copies them.
    async fn claim(&self, connection: &mut MultiplexedConnection) -> RedisResult<()> {
        for group in self.groups() {
            let mut claim = redis::cmd("XAUTOCLAIM");
            claim.arg(self.server.keyspace.archive(group)).arg(GROUP).arg(&self.consumer);
            claim.arg(CLAIM_AFTER.as_millis() as u64).arg("0-0").arg("COUNT").arg(BATCH_LEN_MAX);
            let reply: Value = match claim.query_async(connection).await {
                Err(error) if error.code() == Some("NOGROUP") => continue,
                reply => reply?,
            };
            let Value::Array(parts) = reply else { continue };
            let entries = parts.into_iter().nth(1).unwrap_or(Value::Nil);
            let records = self.records_of(group, entries);
            if !records.is_empty() {
                tracing::info!(
                    entries = records.len(),
                    "copying entries to the archive that \
                    another node had taken"
                );
            }
            self.copy(connection, records).await?;
        }
        Ok(())
    }

    /// Copies records and removes them from their streams. Returns their number.
    async fn copy(
        &self,
        connection: &mut MultiplexedConnection,
        records: Vec<StreamRecord>,
    ) -> RedisResult<usize> {
        if records.is_empty() {
            return Ok(0);
        }
        let count = records.len();
        let (mut ids, mut batch): (BTreeMap<u16, Vec<String>>, Vec<ArchiveRecord>) =
            (BTreeMap::new(), Vec::with_capacity(count));
        for StreamRecord { group, id, record } in records {
            ids.entry(group).or_default().push(id);
            batch.extend(record);
        }
        self.measure_entries(&batch);
        self.writer.apply(batch).await;
        let mut pipeline = redis::Pipeline::with_capacity(2 * ids.len());
        for (group, ids) in ids {
            let stream = self.server.keyspace.archive(group);
            pipeline.cmd("XACK").arg(&stream).arg(GROUP).arg(&ids).ignore();
            pipeline.cmd("XDEL").arg(&stream).arg(&ids).ignore();
        }
        pipeline.query_async::<()>(connection).await?;
        Ok(count)
    }

    /// Follows the size of entries, so that a batch of large ones is short.
    fn measure_entries(&self, batch: &[ArchiveRecord]) {
        if !batch.is_empty() {
            let bytes: usize = batch.iter().map(ArchiveRecord::bytes).sum();
            self.entry_bytes.store((bytes / batch.len()).max(256), Ordering::Relaxed);
        }
    }

    /// Measures how far the archive is behind.
    async fn measure_lag(&self, connection: &mut MultiplexedConnection) -> RedisResult<()> {
        let groups = self.groups();
        let mut pipeline = redis::Pipeline::with_capacity(3 * groups.len() + 1);
        pipeline.cmd("TIME");
        for group in &groups {
            let (stream, behind) =
                (self.server.keyspace.archive(*group), self.server.keyspace.archive_behind(*group));
            pipeline.cmd("XLEN").arg(&stream).cmd("SCARD").arg(behind);
            pipeline.cmd("XRANGE").arg(&stream).arg("-").arg("+").arg("COUNT").arg(1);
        }
        pipeline.ignore_errors();
        let mut replies =
            pipeline.query_async::<Vec<RedisResult<Value>>>(connection).await?.into_iter();
        let time = replies.next().unwrap_or(Ok(Value::Nil))?;
        let (seconds, micros): (u64, u64) = redis::from_redis_value(time)?;
        let now_ms = seconds * 1000 + micros / 1000;
        let mut lag = Lag::default();
        let number = |reply: Option<RedisResult<Value>>| {
            or_default::<u64>(&self.metrics, "archive stream", reply.unwrap_or(Ok(Value::Nil)))
        };
        for _ in &groups {
            lag.entries += number(replies.next())?;
            lag.rooms += number(replies.next())?;
            let oldest =
                stream_entries(replies.next().unwrap_or(Ok(Value::Nil)).unwrap_or(Value::Nil));
            let at = oldest.first().and_then(|(id, _)| id.split('-').next()?.parse::<u64>().ok());
            let age = at.map_or(0, |at| now_ms.saturating_sub(at));
            lag.oldest = lag.oldest.max(Duration::from_millis(age));
        }
        self.lags.note(self.key(), Some(lag), &self.metrics);
        let has_space = lag.entries < u64::from(self.backlog_max()) / 2;
        self.rooms_wait.store(lag.rooms > 0 && has_space, Ordering::Relaxed);
        Ok(())
    }

    /// Copies the log of a room that has entries for which its stream had no space.
    async fn copy_room_behind(&self, connection: &mut MultiplexedConnection) -> RedisResult<()> {
        for group in self.groups() {
            let behind = self.server.keyspace.archive_behind(group);
            let mut take = redis::cmd("SRANDMEMBER");
            let channel: Option<Lossy> = take.arg(&behind).query_async(connection).await?;
            let Some(Lossy(channel)) = channel else { continue };
            // Removed first, so that entries without space that follow put it back.
            redis::cmd("SREM").arg(&behind).arg(&channel).query_async::<()>(connection).await?;
            let Some(room) = Keyspace::room(&channel) else {
                untrusted::report(&self.metrics, InvalidValue::Entry, "archive:behind");
                continue;
            };
            if let Err(error) = self.copy_log(&room).await {
                tracing::debug!(%room, %error, "cannot copy a log to the archive");
                let mut put_back = redis::cmd("SADD");
                put_back.arg(&behind).arg(&channel).query_async::<()>(connection).await?;
            }
        }
        Ok(())
    }

    async fn copy_log(&self, room: &RoomId) -> Result<(), BusError> {
        let mut seq = 0;
        loop {
            let page =
                self.log.read(room.clone(), ReadRange::After { seq, limit: READ_LEN }).await?;
            let Some(last) = page.entries.last() else { return Ok(()) };
            seq = last.position.seq;
            let record = |Entry { position, envelope, .. }: Entry| ArchiveRecord::Entry {
                room: room.clone(),
                position,
                envelope,
            };
            self.writer.apply(page.entries.into_iter().map(record).collect()).await;
        }
    }

    /// The records of a stream.
    fn records_of(&self, group: u16, entries: Value) -> Vec<StreamRecord> {
        let record = |(id, fields): (String, Vec<Bytes>)| {
            let record = record_of(&fields);
            if record.is_none() {
                self.metrics.archive_entries.of(ArchiveResult::Invalid).inc();
                untrusted::report(&self.metrics, InvalidValue::Entry, "archive stream");
            }
            StreamRecord { group, id, record }
        };
        stream_entries(entries).into_iter().map(record).collect()
    }
}

/// The record of an entry of a stream; `None` if no gateway wrote it.
fn record_of(fields: &[Bytes]) -> Option<ArchiveRecord> {
    let [c, channel, n, position, p, envelope] = fields else { return None };
    if (&c[..], &n[..], &p[..]) != (b"c", b"n", b"p") {
        return None;
    }
    let room = Keyspace::room(std::str::from_utf8(channel).ok()?)?;
    let (epoch, seq) = std::str::from_utf8(position).ok()?.rsplit_once(':')?;
    let (epoch, seq) = (epoch.parse().ok()?, seq.parse().ok()?);
    if envelope.is_empty() {
        return Some(ArchiveRecord::Deleted { room, ordinal: ordinal(&epoch) });
    }
    let envelope = Envelope::parse_for_room(envelope.clone(), &room).ok()?;
    Some(ArchiveRecord::Entry { room, position: Position::new(epoch, seq), envelope })
}

/// The entries in the reply of `XREADGROUP` for one stream: a map from RESP3, else a list.
fn entries_of_read(reply: Value) -> Value {
    match reply {
        Value::Map(streams) => {
            streams.into_iter().next().map_or(Value::Nil, |(_, entries)| entries)
        }
        Value::Array(streams) => match streams.into_iter().next() {
            Some(Value::Array(mut stream)) => stream.pop().unwrap_or(Value::Nil),
            _ => Value::Nil,
        },
        _ => Value::Nil,
    }
}

/// Id and fields of the entries of a stream. An entry that was removed meanwhile has no fields.
fn stream_entries(entries: Value) -> Vec<(String, Vec<Bytes>)> {
    let Value::Array(entries) = entries else { return Vec::new() };
    let entry = |entry: Value| {
        let Value::Array(parts) = entry else { return None };
        let [id, fields]: [Value; 2] = parts.try_into().ok()?;
        let Value::BulkString(id) = id else { return None };
        let fields = match fields {
            Value::Array(fields) => fields,
            _ => Vec::new(),
        };
        let bytes = |field: Value| match field {
            Value::BulkString(bytes) => Bytes::from(bytes),
            _ => Bytes::new(),
        };
        Some((String::from_utf8_lossy(&id).into_owned(), fields.into_iter().map(bytes).collect()))
    };
    entries.into_iter().filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(parts: [&str; 6]) -> Vec<Bytes> {
        parts.iter().map(|part| Bytes::copy_from_slice(part.as_bytes())).collect()
    }

    #[test]
    fn records_that_no_gateway_wrote_are_invalid() {
        let deleted = record_of(&fields(["c", "gw:{7}:r:lobby", "n", "4-abc:0", "p", ""]));
        let room: RoomId = "lobby".parse().unwrap();
        assert_eq!(deleted, Some(ArchiveRecord::Deleted { room, ordinal: 4 }));
        for bad in [
            ["x", "gw:{7}:r:lobby", "n", "4-abc:0", "p", ""],
            ["c", "gw:{7}:x:lobby", "n", "4-abc:0", "p", ""],
            ["c", "gw:{7}:r:lobby", "n", "4-abc", "p", ""],
            ["c", "gw:{7}:r:lobby", "n", "4-abc:x", "p", ""],
            ["c", "gw:{7}:r:lobby", "n", "4-abc:5", "p", "no envelope"],
        ] {
            assert_eq!(record_of(&fields(bad)), None, "{bad:?}");
        }
        assert_eq!(record_of(&[]), None);
    }

    #[test]
    fn reads_of_both_protocols_are_parsed() {
        let bulk = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let entry = Value::Array(vec![bulk("5-0"), Value::Array(vec![bulk("c"), bulk("x")])]);
        let removed = Value::Array(vec![bulk("6-0"), Value::Nil]);
        let entries = Value::Array(vec![entry, removed]);
        let expected = vec![
            ("5-0".to_owned(), vec![Bytes::from("c"), Bytes::from("x")]),
            ("6-0".to_owned(), Vec::new()),
        ];
        let map = Value::Map(vec![(bulk("gw:archive"), entries.clone())]);
        assert_eq!(stream_entries(entries_of_read(map)), expected);
        let list = Value::Array(vec![Value::Array(vec![bulk("gw:archive"), entries])]);
        assert_eq!(stream_entries(entries_of_read(list)), expected);
        assert!(stream_entries(entries_of_read(Value::Nil)).is_empty());
    }
}
