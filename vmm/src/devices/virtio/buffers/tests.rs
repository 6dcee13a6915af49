//! What devices read and write through chains.

use super::super::driver::{BUFFERS, Driver, F_INDIRECT, Part};
use super::*;

const QUEUE_SIZE: u16 = 8;

fn driver() -> (Driver, Queue) {
    let driver = Driver::new(&[QUEUE_SIZE]);
    let queue = driver.activation(0).queues.remove(0).queue;
    (driver, queue)
}

#[test]
fn a_chain_comes_whole_and_in_order() {
    let (mut driver, mut queue) = driver();
    assert!(
        BufferChain::take(&mut queue, &driver.memory)
            .unwrap()
            .is_none()
    );
    driver.put(BUFFERS, b"hello world");
    let head = driver.queues[0]
        .offer(&[
            Part::Read(BUFFERS, 6),
            Part::Read(BUFFERS + 6, 5),
            Part::Write(BUFFERS + 0x1000, 4),
            Part::Write(BUFFERS + 0x2000, 4),
        ])
        .unwrap();
    let mut chain = BufferChain::take(&mut queue, &driver.memory)
        .unwrap()
        .unwrap();
    assert_eq!(chain.head, head);
    assert_eq!((chain.readable.len(), chain.writable.len()), (11, 8));
    assert_eq!(chain.readable.read_array(), Some(*b"hello wo"));
    assert_eq!(chain.readable.read_array::<4>(), None);
    assert_eq!(chain.readable.read_array(), Some(*b"rld"));
    assert_eq!(chain.writable.write(b"abcdefghij"), 8);
    assert_eq!(driver.get(BUFFERS + 0x1000, 4), b"abcd");
    assert_eq!(driver.get(BUFFERS + 0x2000, 4), b"efgh");
}

#[test]
fn an_indirect_chain_as_long_as_the_queue_is_fine() {
    let (mut driver, mut queue) = driver();
    let table = BUFFERS + 0x1000;
    let target = &mut driver.queues[0];
    target.write_descriptor(0, table, u32::from(QUEUE_SIZE) * 16, F_INDIRECT, 0);
    for index in 0..QUEUE_SIZE {
        let flags = u16::from(index + 1 < QUEUE_SIZE);
        target.write_descriptor_at(table, index, BUFFERS, 2, flags, index + 1);
    }
    target.publish(0);
    let chain = BufferChain::take(&mut queue, &driver.memory)
        .unwrap()
        .unwrap();
    assert_eq!(chain.readable.len(), 2 * usize::from(QUEUE_SIZE));
}

#[test]
fn views_and_advances_keep_count() {
    let sum = |buffers: &Buffers<'_>| buffers.ranges().iter().map(VolatileSlice::len).sum();
    let (mut driver, mut queue) = driver();
    driver.queues[0]
        .offer(&[Part::Write(BUFFERS, 5), Part::Write(BUFFERS + 64, 5)])
        .unwrap();
    let whole = BufferChain::take(&mut queue, &driver.memory)
        .unwrap()
        .unwrap()
        .writable;
    for (skip, count, expected) in (0..=12)
        .flat_map(|skip| (0..=12).map(move |count| (skip, count)))
        .map(|(skip, count): (usize, usize)| (skip, count, count.min(10 - skip.min(10))))
    {
        let mut view = whole.view(skip, count);
        assert_eq!(
            (view.len(), sum(&view)),
            (expected, expected),
            "{skip} {count}"
        );
        view.advance(3);
        let expected = expected.saturating_sub(3);
        assert_eq!(
            (view.len(), sum(&view)),
            (expected, expected),
            "{skip} {count}"
        );
    }
    assert_eq!((whole.len(), sum(&whole)), (10, 10));
    assert_eq!(whole.view(3, 4).write(b"abcd"), 4);
    assert_eq!(driver.get(BUFFERS + 3, 2), b"ab");
    assert_eq!(driver.get(BUFFERS + 64, 2), b"cd");
}
