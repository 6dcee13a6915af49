//! Persistent memory from the driver's side.

use std::{fs::File, io::Write, os::fd::AsRawFd};

use super::super::{
    device::VirtioDevice,
    driver::{BUFFERS, Driver, Part, assert_hostile_chains_break},
};
use super::{device::IMAGE_BYTES_MAX, *};

const REGION_ADDRESS: u64 = 0x1_0000_0000;

fn pmem() -> Pmem {
    let mut image = tempfile::tempfile().unwrap();
    image.write_all(&[7; 5000]).unwrap();
    let mut pmem = Pmem::new("image".to_owned(), image).unwrap();
    pmem.set_region(REGION_ADDRESS);
    pmem
}

fn config(pmem: &Pmem) -> (u64, u64) {
    let mut bytes = [[0; 8]; 2];
    pmem.read_config(0, &mut bytes[0]);
    pmem.read_config(8, &mut bytes[1]);
    (u64::from_le_bytes(bytes[0]), u64::from_le_bytes(bytes[1]))
}

#[test]
fn the_region_is_whole_pieces_around_the_file() {
    let pmem = pmem();
    assert_eq!(pmem.region_size(), Some(2 << 20));
    assert_eq!(config(&pmem), (REGION_ADDRESS, 2 << 20));
    assert!(pmem.region_file().unwrap().as_raw_fd() >= 0);
}

#[test]
fn files_that_cannot_be_shown_are_refused_by_name() {
    let refuse = |file| Pmem::new("image".to_owned(), file).unwrap_err().to_string();
    assert!(refuse(tempfile::tempfile().unwrap()).contains("pmem device image has 0 bytes"));
    assert!(refuse(File::open("/dev/null").unwrap()).contains("not a regular file"));
    let sparse = tempfile::tempfile().unwrap();
    if sparse.set_len(IMAGE_BYTES_MAX + 1).is_ok() {
        assert!(refuse(sparse).contains("bytes; it must have 1 to"));
    }
}

#[test]
fn flush_is_done_and_unknown_requests_are_errors() {
    let mut pmem = pmem();
    let mut driver = Driver::new(&[8]);
    pmem.activate(driver.activation(0)).unwrap();
    for (request, response) in [(0u32, 0u32), (1, 1), (u32::MAX, 1)] {
        driver.put(BUFFERS, &request.to_le_bytes());
        driver.put(BUFFERS + 64, &[0xff; 4]);
        driver.queues[0]
            .offer(&[Part::Read(BUFFERS, 4), Part::Write(BUFFERS + 64, 4)])
            .unwrap();
        pmem.queue_kicked(0).unwrap();
        assert_eq!(driver.queues[0].take_used().unwrap().1, 4);
        assert_eq!(driver.get(BUFFERS + 64, 4), response.to_le_bytes());
    }
    assert_eq!(pmem.counters(), [("flushes", 1)]);
}

#[test]
fn hostile_drivers_break_the_device_and_no_more() {
    assert_hostile_chains_break(pmem, &[8], &[0]);
    for parts in [
        &[Part::Read(BUFFERS, 3), Part::Write(BUFFERS, 4)][..],
        &[Part::Read(BUFFERS, 4), Part::Write(BUFFERS, 3)],
        &[Part::Read(BUFFERS, 4)],
        &[Part::Write(BUFFERS, 4)],
    ] {
        let mut pmem = pmem();
        let mut driver = Driver::new(&[8]);
        pmem.activate(driver.activation(0)).unwrap();
        driver.queues[0].offer(parts).unwrap();
        assert!(pmem.queue_kicked(0).is_err(), "{parts:?}");
        pmem.reset();
        assert_eq!(
            config(&pmem).0,
            REGION_ADDRESS,
            "the region outlives a reset"
        );
    }
}
