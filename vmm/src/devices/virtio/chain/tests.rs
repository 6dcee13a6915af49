//! Chains as drivers build them, sane and hostile, in both views.

use super::super::{
    buffers::BufferChain,
    driver::{BUFFERS, Driver, HOSTILE_CHAINS, Part},
    segments::SegmentChain,
};
use super::*;

const QUEUE_SIZE: u16 = 8;

fn driver() -> (Driver, Queue) {
    let driver = Driver::new(&[QUEUE_SIZE]);
    let queue = driver.activation(0).queues.remove(0).queue;
    (driver, queue)
}

#[test]
fn a_chain_that_is_given_back_comes_again() {
    let (mut driver, mut queue) = driver();
    driver.queues[0].offer(&[Part::Write(BUFFERS, 4)]).unwrap();
    for _ in 0..3 {
        assert!(
            BufferChain::take(&mut queue, &driver.memory)
                .unwrap()
                .is_some()
        );
        unpop(&mut queue);
    }
}

#[test]
fn hostile_chains_are_errors() {
    for (what, break_queue) in HOSTILE_CHAINS {
        let (mut driver, mut queue) = driver();
        break_queue(&mut driver.queues[0]);
        let result = BufferChain::take(&mut queue, &driver.memory);
        assert!(result.is_err(), "{what}");
        let (mut driver, mut queue) = self::driver();
        break_queue(&mut driver.queues[0]);
        let result = SegmentChain::take(&mut queue, &driver.memory);
        assert!(result.is_err(), "{what}");
    }
}
