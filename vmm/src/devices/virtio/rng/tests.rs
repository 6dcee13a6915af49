//! The entropy device from the driver's side.

use super::super::{
    device::VirtioDevice,
    driver::{BUFFERS, Driver, Part, assert_hostile_chains_break},
};
use super::*;

fn rng() -> Rng {
    Rng::new("rng0".to_owned())
}

#[test]
fn requests_are_filled_up_to_the_bound() {
    let mut rng = rng();
    let mut driver = Driver::new(&[8]);
    rng.activate(driver.activation(0)).unwrap();
    for (asked, given) in [(0, 0), (64, 64), (4096, 4096), (1 << 20, 4096)] {
        driver.put(BUFFERS, &[0; 8192]);
        driver.queues[0]
            .offer(&[Part::Write(BUFFERS, asked)])
            .unwrap();
        rng.queue_kicked(0).unwrap();
        assert_eq!(driver.queues[0].take_used().unwrap().1, given);
        let given = usize::try_from(given).unwrap();
        let bytes = driver.get(BUFFERS, 8192);
        // 64 zero bytes in a row have probability 2^-512.
        assert!(
            bytes[..given]
                .chunks(64)
                .all(|chunk| chunk.iter().any(|b| *b != 0))
        );
        assert!(bytes[given..].iter().all(|byte| *byte == 0));
    }
    assert_eq!(rng.counters(), [("bytes_given", 64 + 2 * 4096)]);
}

#[test]
fn one_request_is_not_another() {
    let mut rng = rng();
    let mut driver = Driver::new(&[8]);
    rng.activate(driver.activation(0)).unwrap();
    driver.queues[0]
        .offer(&[Part::Write(BUFFERS, 16), Part::Write(BUFFERS + 64, 16)])
        .unwrap();
    rng.queue_kicked(0).unwrap();
    assert_eq!(driver.queues[0].take_used().unwrap().1, 32);
    assert_ne!(driver.get(BUFFERS, 16), driver.get(BUFFERS + 64, 16));
}

#[test]
fn hostile_drivers_break_the_device_and_no_more() {
    assert_hostile_chains_break(rng, &[8], &[0]);
    let mut rng = rng();
    let mut driver = Driver::new(&[8]);
    rng.activate(driver.activation(0)).unwrap();
    driver.queues[0].offer(&[Part::Read(BUFFERS, 8)]).unwrap();
    assert!(rng.queue_kicked(0).is_err());
    rng.reset();
    rng.queue_kicked(0).unwrap();
}
