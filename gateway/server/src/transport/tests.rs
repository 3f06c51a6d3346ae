use skein_websocket::{
    deflate::{compress_frame, frame_payload},
    extension::WindowBits,
};

use super::{echo::EchoMode, *};
use skein_core::{
    connection::{encoding::DeflateOptions, outbox::Outbox},
    limits::meter::MeterRates,
};

/// Returns an echo connection that has received `early`.
fn connection(early: Vec<u8>) -> WebSocketConnection {
    let metrics = Arc::<Metrics>::default();
    // Input is compressed; replies are not.
    let deflating = DeflateOptions { window: WindowBits::MAX, bytes_min: usize::MAX };
    let outbox =
        Outbox::to_owner(usize::MAX, metrics.clone()).with_encoding(Encoding::Deflate(deflating));
    let handle = Arc::new(ConnectionHandle::new(ConnectionId::random(), outbox));
    let heartbeat = Heartbeat {
        interval: Duration::from_secs(25),
        idle_timeout: Duration::from_secs(60),
        write_timeout: Duration::from_secs(30),
    };
    let options = ConnectionOptions {
        message_bytes_max: 1 << 20,
        heartbeat: Arc::new(heartbeat),
        json_ping: false,
    };
    let handler = Handler::Echo(Echo { mode: EchoMode::Verbatim });
    let meter = Meter::new(Arc::new(MeterRates::new(50, 200, 4 << 20)), None);
    WebSocketConnection::new(handle, handler, options, meter, Arc::default(), metrics, early)
}

#[tokio::test(start_paused = true)]
async fn a_connection_with_much_inflated_input_yields() {
    let message = skein_websocket::encode(Opcode::Text, &[&vec![b'x'; 200_000]]);
    let compressed = compress_frame(&message, WindowBits::MAX).unwrap();
    let compressed = frame_payload(&compressed);
    assert!(compressed.len() < 1000);
    // A mask of zeros leaves the payload unchanged.
    let mut frame = vec![0xC1, 0x80 | 126];
    frame.extend((compressed.len() as u16).to_be_bytes());
    frame.extend([0; 4]);
    frame.extend(compressed);

    let mut connection = connection(frame.repeat(7));
    let mut turns = vec![];
    while !connection.unread.is_empty() {
        let step = connection.handle_unread(&mut InputBudget::default());
        assert!(matches!(step, InputStep::More));
        turns.push(connection.handle.outbox.take().len());
    }
    assert_eq!(turns, [2, 2, 2, 1]);
}

#[tokio::test(start_paused = true)]
async fn frames_without_content_end_a_turn_and_are_throttled() {
    for (name, frame) in [
        ("pings", &[0x89, 0x80, 0, 0, 0, 0][..]),
        ("pongs", &[0x8A, 0x80, 0, 0, 0, 0]),
        ("continuations", &[0x00, 0x80, 0, 0, 0, 0]),
    ] {
        let first = if name == "continuations" { &[0x01, 0x80, 0, 0, 0, 0][..] } else { &[] };
        let mut connection = connection([first, &frame.repeat(10_000)].concat());
        let mut handled = 0;
        while !connection.is_paused() {
            let before = connection.unread.len();
            let _ = connection.handle_unread(&mut InputBudget::default());
            let batch = (before - connection.unread.len()) / 6;
            assert_eq!(batch, 64, "{name}");
            handled += batch;
        }
        assert_eq!(handled, 1024, "{name}: the burst of 1,000, in whole turns");
        tokio::time::advance(Duration::from_millis(200)).await;
        assert!(!connection.is_paused(), "{name}");
    }
}
