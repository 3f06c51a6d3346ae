use super::*;

const MIB: u64 = 1 << 20;

fn rates() -> Arc<MeterRates> {
    Arc::new(MeterRates::new(50, 200, 4 * MIB))
}

fn wait(verdict: MeterDecision) -> Duration {
    match verdict {
        MeterDecision::Pause(wait, _) => wait,
        MeterDecision::Continue => Duration::ZERO,
        MeterDecision::Close => panic!("it is closed"),
    }
}

/// Repeats `send` as often as the meter allows, for `seconds`. Returns the number of repetitions,
/// and whether the connection was closed.
fn flood(meter: &mut Meter, seconds: u64, mut send: impl FnMut(&mut Meter)) -> (u64, bool) {
    let begun = Instant::now();
    let (mut now, mut repeats) = (begun, 0);
    while now < begun + Duration::from_secs(seconds) {
        send(meter);
        repeats += 1;
        match meter.settle(now) {
            // A budget takes its time.
            MeterDecision::Continue => now += INPUT_TIME_MAX,
            MeterDecision::Pause(wait, _) => now += wait.max(INPUT_TIME_MAX),
            MeterDecision::Close => return (repeats, true),
        }
    }
    (repeats, false)
}

#[test]
fn overhead_is_throttled_and_then_closed() {
    for (name, per_repeat, send) in [
        ("pings", 64, (|meter| (0..64).for_each(|_| meter.control(0))) as fn(&mut Meter)),
        ("fragments", 64, |meter| (0..64).for_each(|_| meter.fragment(0))),
        ("refused", 32, |meter| {
            (0..32).for_each(|_| meter.data(1));
            meter.rejected(32);
        }),
    ] {
        let mut meter = Meter::new(rates(), None);
        let (repeats, closed) = flood(&mut meter, 60, send);
        assert!(closed, "{name}");
        // The burst and 10 s of the rate; a rejected frame counts twice.
        let units = repeats * if name == "refused" { 2 * per_repeat } else { per_repeat };
        assert!((2900..3300).contains(&units), "{name}: {units}");
    }
}

#[test]
fn volume_is_throttled_and_never_closed() {
    let mut meter = Meter::new(rates(), None);
    let (repeats, closed) = flood(&mut meter, 60, |meter| meter.data(250_000));
    let expected = (60 + 2) * 4 * MIB / 250_128;
    assert!(!closed && repeats.abs_diff(expected) <= 10, "{repeats} messages, {expected} expected");
    let mut meter = Meter::new(rates(), None);
    let (repeats, closed) = flood(&mut meter, 10, |meter| (0..64).for_each(|_| meter.data(0)));
    let per_second = repeats * 64 / 12;
    assert!(!closed && (30_000..35_000).contains(&per_second), "{per_second} empty messages/s");
}

#[test]
fn client_within_its_rates_never_waits() {
    let mut meter = Meter::new(rates(), None);
    let begun = Instant::now();
    for seconds in 0..3600 {
        let now = begun + Duration::from_secs(seconds);
        // Everything that its rates allow, heartbeats, and now and then a message in large
        // fragments.
        for _ in 0..50 {
            assert_eq!(meter.take_message(now), Ok(()));
            meter.data(2_000);
        }
        for _ in 0..200 {
            assert_eq!(meter.take_frame(0, now), Ok(()));
            meter.data(100);
        }
        meter.control(0);
        if seconds % 60 == 0 {
            (0..256).for_each(|_| meter.fragment(1024));
            meter.data(262_144);
            meter.rejected(10);
        }
        assert_eq!(meter.settle(now), MeterDecision::Continue);
    }
}

#[test]
fn excess_that_ends_is_forgiven() {
    let mut meter = Meter::new(rates(), None);
    let mut now = Instant::now();
    for _ in 0..10 {
        (0..1500).for_each(|_| meter.control(0));
        let wait = wait(meter.settle(now));
        assert!(wait > Duration::from_secs(2), "{wait:?}");
        now += Duration::from_secs(9);
        assert_eq!(meter.settle(now), MeterDecision::Continue, "it has rested");
    }
}

#[test]
fn address_has_the_overhead_of_a_few_connections() {
    let (addresses, key) = (Arc::new(AddressMeters::default()), "192.0.2.1".parse().unwrap());
    let mut many: Vec<_> =
        (0..1000).map(|_| Meter::new(rates(), Some((addresses.clone(), key)))).collect();
    let mut honest = Meter::new(rates(), Some((addresses.clone(), key)));
    let mut other = Meter::new(rates(), Some((addresses, "192.0.2.2".parse().unwrap())));
    let begun = Instant::now();
    let mut paused = vec![begun; many.len()];
    let (mut control, mut closed) = (0, vec![false; many.len()]);
    for tick in 0..100 {
        let now = begun + Duration::from_millis(100) * tick;
        for (i, meter) in many.iter_mut().enumerate() {
            if paused[i] > now || closed[i] {
                continue;
            }
            (0..64).for_each(|_| meter.control(0));
            control += 64;
            match meter.settle(now) {
                MeterDecision::Pause(wait, _) => paused[i] = now + wait,
                MeterDecision::Close => closed[i] = true,
                MeterDecision::Continue => {}
            }
        }
        for meter in [&mut honest, &mut other] {
            meter.control(0);
            assert_eq!(
                meter.settle(now),
                MeterDecision::Continue,
                "a connection that caused little does not wait"
            );
        }
    }
    // A connection below an eighth of its burst never waits: 1,000 times 125, and twice as much
    // with the budget in which it passes that.
    assert!(control < 300_000, "{control} control frames in 10 s");
}

#[test]
fn names_in_a_frame_are_charged() {
    let mut meter = Meter::new(rates(), None);
    let now = Instant::now();
    let taken = (0..1000).take_while(|_| meter.take_frame(100, now).is_ok()).count();
    assert_eq!(taken, 38, "1,000 units at once, and 26 for 100 names");
    // 988 units are used: 14 too many.
    assert!(meter.take_frame(100, now + Duration::from_millis(69)).is_err());
    assert_eq!(meter.take_frame(100, now + Duration::from_millis(70)), Ok(()));
}

#[test]
fn rates_of_zero_are_no_limits() {
    let mut meter = Meter::new(Arc::new(MeterRates::unlimited()), None);
    let now = Instant::now();
    for _ in 0..10_000 {
        meter.control(100);
        meter.rejected(1);
        meter.data(1 << 20);
        assert_eq!(meter.settle(now), MeterDecision::Continue);
        assert_eq!(meter.take_message(now), Ok(()));
        assert_eq!(meter.take_frame(100, now), Ok(()));
        assert_eq!(meter.take_password(now), Ok(()));
    }
}

#[test]
fn input_budget_ends_by_frames_bytes_and_time() {
    let none = Duration::ZERO;
    let mut budget = InputBudget::default();
    (0..INPUT_FRAMES_MAX - 1).for_each(|_| budget.frame(0));
    assert!(!budget.is_over(none));
    budget.frame(0);
    assert!(budget.is_over(none));
    let mut budget = InputBudget::default();
    budget.frame(INPUT_BYTES_MAX);
    assert!(budget.is_over(none));
    let mut budget = InputBudget::default();
    budget.time(INPUT_TIME_MAX / 2);
    assert!(!budget.is_over(none) && budget.is_over(INPUT_TIME_MAX / 2));
    let mut budget = InputBudget::default();
    (0..8).for_each(|_| budget.request());
    assert!(budget.is_over(none));
}
