use shared::codec::{
    deflate::{deflated, payload},
    extension::WindowBits,
};

use super::{echo::EchoMode, *};
use crate::outbox::{Outbox, deflate::Deflating};

/// An echo connection that has received `early`.
fn connection(early: Vec<u8>) -> Connection {
    let metrics = Arc::<Metrics>::default();
    // It inflates; what it answers stays as it is.
    let deflating = Deflating { window: WindowBits::MAX, bytes_min: usize::MAX };
    let outbox = Outbox::to_owner(usize::MAX, metrics.clone()).deflating(Some(deflating));
    let subscriber = Arc::new(Subscriber::new(ConnectionId::random(), outbox));
    let heartbeat = Heartbeat {
        interval: Duration::from_secs(25),
        silence_max: Duration::from_secs(60),
        stall_max: Duration::from_secs(30),
    };
    let options =
        Options { message_bytes_max: 1 << 20, heartbeat: Arc::new(heartbeat), json_ping: false };
    let handler = Handler::Echo(Echo { mode: EchoMode::Verbatim });
    Connection::new(subscriber, handler, options, Arc::default(), metrics, early)
}

#[tokio::test(start_paused = true)]
async fn who_has_much_inflated_lets_others_have_their_turn() {
    let message = codec::encode(Opcode::Text, &[&vec![b'x'; 200_000]]);
    let compressed = deflated(&message, WindowBits::MAX).unwrap();
    let compressed = payload(&compressed);
    assert!(compressed.len() < 1000);
    // With a mask of zeros a client's payload stands as it is.
    let mut frame = vec![0xC1, 0x80 | 126];
    frame.extend((compressed.len() as u16).to_be_bytes());
    frame.extend([0; 4]);
    frame.extend(compressed);

    let mut connection = connection(frame.repeat(7));
    let mut turns = vec![];
    loop {
        let step = connection.handle_unread();
        turns.push(connection.subscriber.outbox.take().len());
        match step {
            Step::More => break,
            Step::Enough => {}
            _ => panic!("it neither ends nor waits"),
        }
    }
    assert_eq!(turns, [2, 2, 2, 1]);
    assert!(connection.unread.is_empty());
}
