//! The answer to a publish: the result reaches the sender once, whatever becomes of the publish.

use std::{sync::Arc, time::SystemTime};

use skein_protocol::ids::{MessageId, RoomId};
use tokio::time::Instant;

use super::{Append, Appended, Bus, BusError, UnseenPolicy};
use crate::{
    envelope::Envelope,
    limits::quotas::{Quotas, Writer},
    telemetry::{
        metrics::{Metrics, PublishResult},
        traces::{OpenSpan, SpanKind},
        trail::MessageTrails,
    },
};

/// Receives the result of a publish.
type PublishAck = Box<dyn FnOnce(Result<Appended, BusError>) + Send>;

/// The answer that the bus owes to one publish. It takes one allocation at most.
///
/// The bus [completes](PublishTicket::complete) each ticket once. A ticket that is dropped, because
/// the task that had the publish has ended, completes itself with [`BusError::Unavailable`].
pub struct PublishTicket {
    /// `None` once it has the result.
    ack: Option<PublishAck>,
    /// `None` for a publish of the gateway itself.
    record: Option<PublishRecord>,
}

/// The record that the gateway keeps of the result of a message from a client or the application.
pub struct PublishRecord {
    /// When the publish began.
    pub started: Instant,
    /// Counts the result and the duration.
    pub metrics: Arc<Metrics>,
    /// Where the position is recorded; `None` in a room without a log.
    pub trail: Option<TrailRecord>,
    /// Charged if the append opens the inbox of an unseen user.
    pub new_inbox: Option<NewInboxCharge>,
    /// The second append of a direct, after which its sender has the result.
    pub next: Option<NextAppend>,
    /// The span of a traced publish.
    pub span: Option<Box<PublishSpan>>,
}

/// The span of a publish, which ends with its result, and the append under way.
#[derive(Debug)]
pub struct PublishSpan {
    span: OpenSpan,
    /// The append that was sent and has no result.
    append: Option<SentAppend>,
}

/// An append that was sent to a database.
#[derive(Debug)]
struct SentAppend {
    /// The database, as OpenTelemetry names it.
    system: &'static str,
    /// When it was sent first.
    at: SystemTime,
    /// How often it was sent.
    sends: i64,
}

/// The message trail of a publish in one log.
pub struct TrailRecord {
    /// The trails of this node.
    pub trails: Arc<MessageTrails>,
    /// The log that the message is appended to.
    pub log: RoomId,
    /// The id of the message.
    pub id: MessageId,
}

/// The quota of a sender whose direct may open an inbox.
pub struct NewInboxCharge {
    /// The quotas of this node.
    pub quotas: Arc<Quotas>,
    /// The sender.
    pub writer: Writer,
}

/// An append that follows another one of the same message.
pub struct NextAppend {
    /// The bus.
    pub bus: Arc<dyn Bus>,
    /// The room.
    pub room: RoomId,
    /// The content of the entry.
    pub envelope: Envelope,
    /// When the bus stops trying.
    pub deadline: Instant,
}

impl PublishTicket {
    /// The ticket of a publish of the gateway itself, of which nothing is recorded. `ack` is called
    /// once with the result.
    pub fn new(ack: impl FnOnce(Result<Appended, BusError>) + Send + 'static) -> Self {
        Self { ack: Some(Box::new(ack)), record: None }
    }

    /// The ticket of a message. `ack` is called once with the result, after it was recorded.
    pub fn recorded(
        record: PublishRecord,
        ack: impl FnOnce(Result<Appended, BusError>) + Send + 'static,
    ) -> Self {
        Self { ack: Some(Box::new(ack)), record: Some(record) }
    }

    /// Records the result and passes it to the caller. After the first append of a direct, begins
    /// the second one, which has this ticket from then on.
    pub fn complete(mut self, result: Result<Appended, BusError>) {
        self.answer(result);
    }

    /// Records that the append is sent to the database `system`, for its span. An append whose
    /// answer was lost is sent again.
    pub fn mark_sent(&mut self, system: &'static str) {
        let record = self.record.as_mut();
        if let Some(publish) = record.and_then(|record| record.span.as_mut()) {
            let new = || SentAppend { system, at: SystemTime::now(), sends: 0 };
            publish.append.get_or_insert_with(new).sends += 1;
        }
    }

    fn answer(&mut self, result: Result<Appended, BusError>) {
        let Some(ack) = self.ack.take() else { return };
        if let Some(mut record) = self.record.take() {
            if let Ok(appended) = &result {
                record.appended(appended);
                if let Some(next) = record.next.take() {
                    return next.append(ack, record);
                }
            }
            record.finished(&result);
        }
        ack(result);
    }
}

impl Drop for PublishTicket {
    fn drop(&mut self) {
        self.answer(Err(BusError::Unavailable));
    }
}

impl PublishRecord {
    /// Records that a log has the message.
    fn appended(&mut self, appended: &Appended) {
        if let Some(publish) = &mut self.span {
            publish.end_append(Ok(appended));
        }
        if let Some(TrailRecord { trails, log, id }) = &self.trail {
            trails.appended(log, *id, &appended.position);
        }
        if let Some(NewInboxCharge { quotas, writer }) = &self.new_inbox
            && appended.opened_inbox
        {
            quotas.count_new_inbox(writer, Instant::now());
        }
    }

    /// Counts the result that the caller receives.
    fn finished(self, result: &Result<Appended, BusError>) {
        let label = label_of(result);
        let seconds = self.started.elapsed().as_secs_f64();
        self.metrics.publish_seconds.of(label.into()).observe(seconds);
        self.metrics.publishes.of(label).inc();
        if let Some(limit) = result.as_ref().err().and_then(|error| error.storage_limit()) {
            self.metrics.storage_rejections.of(limit).inc();
        }
        if let Some(publish) = self.span {
            publish.end(result.as_ref());
        }
    }
}

impl PublishSpan {
    /// Wraps the span of a publish.
    pub fn new(span: OpenSpan) -> Self {
        Self { span, append: None }
    }

    /// Ends the span of the append, if it was sent to a database.
    fn end_append(&mut self, result: Result<&Appended, &BusError>) {
        let Some(SentAppend { system, at, sends }) = self.append.take() else { return };
        let mut span = self.span.child("append", SpanKind::Client, at);
        span.set("db.system.name", system);
        span.set("skein.sends", sends);
        set_position(&mut span, result);
        span.end(result.err().map(ToString::to_string));
    }

    fn end(mut self, result: Result<&Appended, &BusError>) {
        self.end_append(result);
        set_position(&mut self.span, result);
        self.span.end(result.err().map(ToString::to_string));
    }
}

fn set_position(span: &mut OpenSpan, result: Result<&Appended, &BusError>) {
    if let Ok(Appended { position, duplicate, .. }) = result
        && !position.epoch.is_none()
    {
        span.set_position(position);
        span.set("skein.duplicate", *duplicate);
    }
}

impl NextAppend {
    fn append(self, ack: PublishAck, record: PublishRecord) {
        let Self { bus, room, envelope, deadline } = self;
        let trail = record.trail.map(|trail| TrailRecord { log: room.clone(), ..trail });
        let record = PublishRecord { trail, new_inbox: None, ..record };
        let ticket = PublishTicket { ack: Some(ack), record: Some(record) };
        let unseen = UnseenPolicy::Unlimited;
        bus.append(Append { room, envelope, urgent: false, unseen, deadline, ticket });
    }
}

fn label_of(result: &Result<Appended, BusError>) -> PublishResult {
    match result {
        Ok(Appended { duplicate: false, .. }) => PublishResult::Appended,
        Ok(Appended { duplicate: true, .. }) => PublishResult::Duplicate,
        Err(BusError::Unavailable) => PublishResult::Unavailable,
        Err(BusError::Overloaded) => PublishResult::Overloaded,
        Err(BusError::Rejected) => PublishResult::Failed,
        Err(BusError::MemoryFull | BusError::UnseenQuota | BusError::UnseenBytes) => {
            PublishResult::LimitReached
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::oneshot;

    use super::*;
    use crate::{
        bus::{Mailboxes, ReadRange, Retention, memory::MemoryBus},
        delivery::samples::{entry, position},
        drain::Tasks,
        limits::quotas::QuotaOptions,
        telemetry::metrics::{PublishOutcome, StorageLimit},
    };

    type Outcome = oneshot::Receiver<Result<Appended, BusError>>;

    fn record(metrics: &Arc<Metrics>) -> PublishRecord {
        let (started, metrics) = (Instant::now(), metrics.clone());
        PublishRecord { started, metrics, trail: None, new_inbox: None, next: None, span: None }
    }

    fn ticket(record: PublishRecord) -> (PublishTicket, Outcome) {
        let (sender, outcome) = oneshot::channel();
        (PublishTicket::recorded(record, move |result| drop(sender.send(result))), outcome)
    }

    fn retention() -> Retention {
        let hour = Duration::from_secs(3600);
        Retention {
            entries_min: 10,
            ttl: hour,
            inboxes: Default::default(),
            window: hour,
            bytes_max: 1 << 20,
            memory_bytes_max: 1 << 20,
            dedup_window: hour,
            limits: Default::default(),
        }
    }

    fn appended(opened_inbox: bool) -> Appended {
        Appended { position: position("e", 1), duplicate: false, opened_inbox }
    }

    #[test]
    fn complete_passes_the_result_once_and_records_it() {
        let metrics = Arc::new(Metrics::new());
        let (completed, mut outcome) = ticket(record(&metrics));
        completed.complete(Ok(appended(false)));
        assert_eq!(outcome.try_recv(), Ok(Ok(appended(false))));
        let (completed, mut outcome) = ticket(record(&metrics));
        completed.complete(Err(BusError::MemoryFull));
        assert_eq!(outcome.try_recv(), Ok(Err(BusError::MemoryFull)));
        assert_eq!(metrics.publishes.of(PublishResult::Appended).get(), 1);
        assert_eq!(metrics.publishes.of(PublishResult::LimitReached).get(), 1);
        assert_eq!(metrics.storage_rejections.of(StorageLimit::Memory).get(), 1);
        let [acknowledged, rejected, failed] =
            [PublishOutcome::Acknowledged, PublishOutcome::Rejected, PublishOutcome::Failed]
                .map(|outcome| metrics.publish_seconds.of(outcome).get_sample_count());
        assert_eq!((acknowledged, rejected, failed), (1, 1, 0));
    }

    #[test]
    fn a_dropped_ticket_answers_unavailable() {
        let metrics = Arc::new(Metrics::new());
        let (dropped, mut outcome) = ticket(record(&metrics));
        drop(dropped);
        assert_eq!(outcome.try_recv(), Ok(Err(BusError::Unavailable)));
        assert_eq!(metrics.publishes.of(PublishResult::Unavailable).get(), 1);
    }

    #[test]
    fn only_an_opened_inbox_is_charged() {
        let options = QuotaOptions { new_inboxes_per_hour: 1, ..QuotaOptions::default() };
        let (quotas, metrics) = (Arc::new(Quotas::new(options)), Arc::new(Metrics::new()));
        let writer = Writer::new("ann".parse().unwrap(), None);
        for opened_inbox in [false, true] {
            assert!(quotas.check_new_inbox(&writer, Instant::now()).is_ok());
            let charge = NewInboxCharge { quotas: quotas.clone(), writer: writer.clone() };
            let record = PublishRecord { new_inbox: Some(charge), ..record(&metrics) };
            ticket(record).0.complete(Ok(appended(opened_inbox)));
        }
        assert!(quotas.check_new_inbox(&writer, Instant::now()).is_err());
    }

    #[tokio::test]
    async fn a_direct_is_answered_after_its_second_append() {
        let (metrics, tasks) = (Arc::new(Metrics::new()), Tasks::default());
        let (mailboxes, _receivers) = Mailboxes::new(1, 16, metrics.clone());
        let (rooms, sessions) = Default::default();
        let bus = MemoryBus::start(retention(), &rooms, &sessions, mailboxes, &tasks);
        let bus: Arc<dyn Bus> = Arc::new(bus);
        let (envelope, own) = (entry("e", 1).envelope, RoomId::inbox_of(&"ann".parse().unwrap()));
        let (trails, id) = (Arc::<MessageTrails>::default(), envelope.id());
        let first = RoomId::inbox_of(&"bob".parse().unwrap());
        let direct = || PublishRecord {
            trail: Some(TrailRecord { trails: trails.clone(), log: first.clone(), id }),
            next: Some(NextAppend {
                bus: bus.clone(),
                room: own.clone(),
                envelope: envelope.clone(),
                deadline: Instant::now() + Duration::from_secs(1),
            }),
            ..record(&metrics)
        };

        // The first append has failed: nothing follows.
        let (failed, mut outcome) = ticket(direct());
        failed.complete(Err(BusError::Overloaded));
        assert_eq!(outcome.try_recv(), Ok(Err(BusError::Overloaded)));
        let range = ReadRange::Newest { limit: 9 };
        assert!(bus.read(own.clone(), range).await.unwrap().entries.is_empty());
        assert!(trails.of(id).is_empty());

        let (sent, mut outcome) = ticket(direct());
        sent.complete(Ok(appended(true)));
        let result = outcome.try_recv().unwrap().unwrap();
        let [own_copy] = &bus.read(own.clone(), range).await.unwrap().entries[..] else {
            panic!("one entry")
        };
        // The sender gets the position in its own inbox.
        assert_eq!((&own_copy.position, own_copy.envelope.id()), (&result.position, id));
        let logs: Vec<RoomId> = trails.of(id).into_iter().map(|trail| trail.log).collect();
        assert_eq!(logs, [first, own]);
        assert_eq!(metrics.publishes.of(PublishResult::Appended).get(), 1);
    }
}
