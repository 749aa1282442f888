use super::*;

const LEASE: Duration = Duration::from_secs(15);

fn kick(n: i64) -> Order {
    Order::Kick(KickOrder { user_id: n, ..KickOrder::default() })
}

fn delivery(bytes: usize) -> Order {
    Order::Delivery(Arc::new(Envelope { message: vec![b'x'; bytes].into(), ..Envelope::default() }))
}

fn streams(lease: Duration) -> Arc<Streams> {
    Streams::new(lease, Memory::new(1 << 30), Metrics::new())
}

async fn next(attached: &mut Attached) -> Option<Order> {
    attached.next().await.map(|(order, _)| order)
}

#[tokio::test]
async fn a_slow_reader_is_not_waited_for_and_delays_nobody() {
    let streams = streams(LEASE);
    let mut slow = streams.attach(Epoch(1), 1);
    let _other = streams.attach(Epoch(2), 1);
    for n in 0..STREAM_QUEUE as i64 {
        assert_eq!(streams.hand(Epoch(1), kick(n)), Handed::Taken);
    }
    assert_eq!(streams.hand(Epoch(1), kick(-1)), Handed::Full);
    assert_eq!(streams.hand(Epoch(2), kick(0)), Handed::Taken);
    assert_eq!(streams.depth(), STREAM_QUEUE + 1);
    assert_eq!(next(&mut slow).await, Some(kick(0)));
    assert_eq!(streams.hand(Epoch(1), kick(-2)), Handed::Taken);
    assert_eq!(streams.hand(Epoch(3), kick(0)), Handed::NotHere);
}

#[tokio::test]
async fn who_has_many_for_one_gateway_waits_for_it_to_read_and_in_order() {
    let streams = streams(LEASE);
    let (mut reads, _silent) = (streams.attach(Epoch(1), 1), streams.attach(Epoch(2), 1));
    let many = 3 * STREAM_QUEUE as i64;
    let orders: Vec<_> = (0..many).map(|n| (Epoch(1), kick(n))).chain((0..many).map(|n| (Epoch(2), kick(n)))).collect();
    let until = Instant::now() + Duration::from_secs(1);
    let read = async {
        for n in 0..many {
            assert_eq!(next(&mut reads).await, Some(kick(n)));
        }
        Instant::now()
    };
    let (handed, read_at) = tokio::join!(streams.hand_all(&orders, until), read);
    assert!(handed[..many as usize].iter().all(|handed| *handed == Handed::Taken));
    assert!(read_at < until, "the silent one keeps nobody waiting");
    let taken = handed[many as usize..].iter().filter(|handed| **handed == Handed::Taken).count();
    assert_eq!((taken, handed.last()), (STREAM_QUEUE, Some(&Handed::Full)));
    let few = streams.hand_all(&[(Epoch(2), kick(0))], Instant::now() + LEASE).await;
    assert_eq!(few, [Handed::Full], "a single one is told at once");
}

#[tokio::test]
async fn a_queue_is_bounded_in_bytes_and_so_are_all_together() {
    const LARGE: usize = 64 * 1024;
    const FIT: usize = STREAM_QUEUE_BYTES / (LARGE + ORDER_BYTES);
    let memory = Memory::new(4 * STREAM_QUEUE_BYTES);
    let streams = Streams::new(LEASE, memory.clone(), Metrics::new());
    let mut silent: Vec<Attached> = (1..=3).map(|epoch| streams.attach(Epoch(epoch), 1)).collect();
    let taken = |epoch| (0..2 * FIT).filter(|_| streams.hand(Epoch(epoch), delivery(LARGE)) == Handed::Taken).count();
    assert_eq!((taken(1), taken(2)), (FIT, FIT));
    assert!(taken(3) < 3, "half of all the memory is taken");
    let written = silent[0].next().await;
    assert_eq!(streams.hand(Epoch(1), delivery(LARGE)), Handed::Full, "it is not written yet");
    drop(written);
    assert_eq!(streams.hand(Epoch(1), delivery(LARGE)), Handed::Taken);
    drop((silent, streams));
    assert_eq!(memory.taken(), 0);
}

#[tokio::test]
async fn the_newest_stream_of_a_life_counts() {
    let streams = streams(LEASE);
    let first = streams.attach(Epoch(1), 1);
    let mut third = streams.attach(Epoch(1), 3);
    assert!(first.replaced.is_cancelled());
    assert!(streams.attach(Epoch(1), 2).replaced.is_cancelled(), "it came late");
    streams.detach(Epoch(1), 1); // and so does the end of the first
    assert_eq!(streams.hand(Epoch(1), kick(0)), Handed::Taken);
    assert_eq!(next(&mut third).await, Some(kick(0)));
    streams.end_unless(|_, no| no == 4);
    assert!(third.replaced.is_cancelled());
    assert_eq!(streams.hand(Epoch(1), kick(0)), Handed::NotHere);
}

#[tokio::test]
async fn kicks_that_a_stream_took_lately_go_to_the_next_or_come_back_at_its_end() {
    let streams = streams(LEASE);
    let mut first = streams.attach(Epoch(1), 1);
    streams.hand(Epoch(1), kick(1));
    assert_eq!(next(&mut first).await, Some(kick(1)), "it was written, and who knows whether it arrived");
    streams.hand(Epoch(1), kick(2));
    let mut second = streams.attach(Epoch(1), 2);
    assert_eq!((next(&mut second).await, next(&mut second).await), (Some(kick(1)), Some(kick(2))));
    streams.hand(Epoch(1), kick(3));
    assert_eq!(streams.detach(Epoch(1), 1), [], "the second has them");
    let lost: Vec<Order> = streams.detach(Epoch(1), 2).into_iter().map(Order::Kick).collect();
    assert_eq!(lost, [kick(1), kick(2), kick(3)]);
}

#[tokio::test]
async fn a_kick_that_was_written_a_lease_ago_has_arrived_and_one_in_the_queue_has_not() {
    let streams = streams(Duration::ZERO);
    let mut stream = streams.attach(Epoch(1), 1);
    for n in 0..STREAM_QUEUE as i64 {
        streams.hand(Epoch(1), kick(n));
    }
    for n in [0, 1] {
        assert_eq!(next(&mut stream).await, Some(kick(n)));
        assert_eq!(streams.hand(Epoch(1), kick(-n)), Handed::Taken);
    }
    let lost: Vec<Order> = streams.detach(Epoch(1), 1).into_iter().map(Order::Kick).collect();
    assert_eq!((lost.len(), &lost[..1], &lost[STREAM_QUEUE - 1..]), (STREAM_QUEUE, &[kick(2)][..], &[kick(-1)][..]));
}
