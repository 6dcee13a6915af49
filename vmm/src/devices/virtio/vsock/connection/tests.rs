//! The state machine: a table of what each phase answers, and properties over random histories.

use proptest::prelude::*;

use super::*;

const ROOM: u32 = 1000;

fn packet(operation: Operation) -> Header {
    Header {
        operation: operation.number(),
        buf_alloc: 500,
        ..Header::default()
    }
}

fn data(len: u32) -> Header {
    Header {
        len,
        ..packet(Operation::Data)
    }
}

fn shutdown(flags: u32) -> Header {
    Header {
        flags,
        ..packet(Operation::Shutdown)
    }
}

fn requested() -> Connection {
    let mut connection = Connection::requested_by_host(ROOM);
    assert_eq!(connection.next_control(), Some((Operation::Request, 0)));
    connection
}

fn open() -> Connection {
    let mut connection = requested();
    assert_eq!(
        connection.receive(&packet(Operation::Response)),
        Event::Opened
    );
    connection
}

fn resetting() -> Connection {
    let mut connection = open();
    connection.reset();
    connection
}

fn over() -> Connection {
    let mut connection = open();
    assert_eq!(connection.receive(&packet(Operation::Reset)), Event::Reset);
    connection
}

#[test]
fn every_phase_answers_every_operation() {
    use Event::{Data, Ended, Nothing, Opened, Reset, Violation};
    use Operation::{CreditRequest, CreditUpdate, Request, Response, Shutdown};
    let operations = [
        Request,
        Response,
        Operation::Reset,
        Shutdown,
        Operation::Data,
        CreditUpdate,
        CreditRequest,
    ];
    type Make = fn() -> Connection;
    let phases: [(Make, [Event; 7]); 5] = [
        (
            || Connection::requested_by_host(ROOM),
            [
                Violation, Violation, Reset, Violation, Violation, Violation, Violation,
            ],
        ),
        (
            requested,
            [
                Violation, Opened, Reset, Violation, Violation, Violation, Violation,
            ],
        ),
        (
            open,
            [Violation, Violation, Reset, Ended, Data, Nothing, Nothing],
        ),
        (
            resetting,
            [Nothing, Nothing, Reset, Nothing, Nothing, Nothing, Nothing],
        ),
        (
            over,
            [Nothing, Nothing, Reset, Nothing, Nothing, Nothing, Nothing],
        ),
    ];
    for (make, expected) in phases {
        for (operation, event) in operations.into_iter().zip(expected) {
            let mut connection = make();
            let phase = connection.phase();
            assert_eq!(
                connection.receive(&packet(operation)),
                event,
                "{operation:?} in {phase:?}"
            );
        }
    }
    let mut connection = open();
    let unknown = Header {
        operation: 99,
        ..Header::default()
    };
    assert_eq!(connection.receive(&unknown), Violation);
    assert_eq!(connection.next_control(), Some((Operation::Reset, 0)));
    assert_eq!(connection.phase(), Phase::Over);
}

#[test]
fn a_connection_that_the_guest_never_heard_of_ends_silently() {
    let mut connection = Connection::requested_by_host(ROOM);
    connection.reset();
    assert_eq!(connection.phase(), Phase::Over);
    assert_eq!(connection.next_control(), None);
}

#[test]
fn the_guest_may_have_its_room_in_flight_and_no_more() {
    let mut connection = open();
    assert_eq!(connection.receive(&data(ROOM)), Event::Data);
    assert_eq!(connection.receive(&data(0)), Event::Data);
    assert_eq!(connection.receive(&data(1)), Event::Violation);

    let mut connection = open();
    assert_eq!(connection.receive(&data(ROOM)), Event::Data);
    connection.forwarded(10);
    assert_eq!(connection.receive(&data(10)), Event::Data);
    assert_eq!(connection.receive(&data(1)), Event::Violation);
    assert_eq!(connection.receive(&data(u32::MAX)), Event::Nothing);
}

#[test]
fn an_update_goes_when_half_of_the_room_looks_used() {
    let mut connection = open();
    connection.receive(&data(ROOM / 2));
    connection.forwarded(ROOM / 2);
    assert!(!connection.has_control());
    connection.receive(&data(1));
    assert_eq!(
        connection.next_control(),
        Some((Operation::CreditUpdate, 0))
    );
    assert_eq!(connection.tell_credit(), (ROOM, ROOM / 2));
    assert!(!connection.has_control());
    connection.receive(&packet(Operation::CreditRequest));
    assert_eq!(
        connection.next_control(),
        Some((Operation::CreditUpdate, 0))
    );
}

#[test]
fn credit_follows_the_guests_claims_and_survives_lies() {
    let mut connection = open();
    assert_eq!(connection.credit(), 500);
    connection.sent(500);
    assert_eq!(connection.credit(), 0);
    connection.want_credit();
    assert_eq!(
        connection.next_control(),
        Some((Operation::CreditRequest, 0))
    );
    connection.want_credit();
    assert!(!connection.has_control(), "asked once");
    let mut update = packet(Operation::CreditUpdate);
    update.fwd_cnt = 200;
    connection.receive(&update);
    assert_eq!(connection.credit(), 200);
    for (buf_alloc, fwd_cnt) in [(500, 501), (500, u32::MAX), (0, 500), (499, 0)] {
        update.buf_alloc = buf_alloc;
        update.fwd_cnt = fwd_cnt;
        connection.receive(&update);
        assert_eq!(connection.credit(), 0, "{buf_alloc} {fwd_cnt}");
    }
}

#[test]
fn directions_end_one_by_one() {
    let mut connection = open();
    assert_eq!(connection.receive(&shutdown(SHUTDOWN_SEND)), Event::Ended);
    assert_eq!(connection.credit(), 500, "the guest still receives");
    assert_eq!(connection.receive(&shutdown(0)), Event::Ended);
    assert!(!connection.guest_ended().receive);
    assert_eq!(
        connection.receive(&shutdown(SHUTDOWN_RECEIVE)),
        Event::Ended
    );
    assert_eq!(connection.guest_ended(), Ended::BOTH);
    assert_eq!(connection.credit(), 0);

    let mut connection = open();
    connection.end_by_host(Ended {
        send: true,
        receive: false,
    });
    assert_eq!(
        connection.next_control(),
        Some((Operation::Shutdown, SHUTDOWN_SEND))
    );
    assert_eq!(connection.next_control(), None);
    assert_eq!(
        connection.receive(&data(10)),
        Event::Data,
        "the guest still sends"
    );
    connection.end_by_host(Ended::BOTH);
    let both = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
    assert_eq!(connection.next_control(), Some((Operation::Shutdown, both)));

    let mut connection = open();
    connection.receive(&shutdown(SHUTDOWN_SEND));
    assert_eq!(connection.receive(&data(1)), Event::Violation);
}

#[derive(Debug, Clone)]
enum Step {
    Packet(Header),
    Forward(u32),
    Send(u32),
    End(bool, bool),
    Reset,
    Control,
    WantCredit,
}

fn steps() -> impl Strategy<Value = Step> {
    let small = prop_oneof![0..600u32, any::<u32>()];
    let header = (
        0..9u16,
        small.clone(),
        0..4u32,
        small.clone(),
        small.clone(),
    )
        .prop_map(|(operation, len, flags, buf_alloc, fwd_cnt)| Header {
            operation,
            len,
            flags,
            buf_alloc,
            fwd_cnt,
            ..Header::default()
        });
    prop_oneof![
        6 => header.prop_map(Step::Packet),
        2 => small.clone().prop_map(Step::Forward),
        2 => small.prop_map(Step::Send),
        1 => (any::<bool>(), any::<bool>()).prop_map(|(send, receive)| Step::End(send, receive)),
        1 => Just(Step::Reset),
        3 => Just(Step::Control),
        1 => Just(Step::WantCredit),
    ]
}

proptest! {
    #[test]
    fn histories_keep_the_bounds(
        by_guest in any::<bool>(),
        first in steps().prop_filter("a packet", |step| matches!(step, Step::Packet(_))),
        history in prop::collection::vec(steps(), 0..200),
    ) {
        let Step::Packet(request) = first else { unreachable!() };
        let mut connection = if by_guest {
            Connection::requested_by_guest(ROOM, &request)
        } else {
            Connection::requested_by_host(ROOM)
        };
        let mut resets = 0;
        for step in history {
            let before = connection.phase();
            match step {
                Step::Packet(header) => {
                    let event = connection.receive(&header);
                    prop_assert_eq!(event == Event::Data, before == Phase::Open
                        && header.operation == 5 && connection.phase() == Phase::Open);
                }
                Step::Forward(count) => connection.forwarded(count.min(connection.in_flight())),
                Step::Send(count) => connection.sent(count.min(connection.credit())),
                Step::End(send, receive) => connection.end_by_host(Ended { send, receive }),
                Step::Reset => connection.reset(),
                Step::Control => {
                    let had = connection.has_control();
                    let control = connection.next_control();
                    prop_assert_eq!(had, control.is_some());
                    if control.is_some() {
                        let (room, _) = connection.tell_credit();
                        prop_assert_eq!(room, ROOM);
                    }
                    resets += usize::from(control.is_some_and(|(op, _)| op == Operation::Reset));
                }
                Step::WantCredit => connection.want_credit(),
            }
            prop_assert!(connection.in_flight() <= ROOM);
            prop_assert!(resets <= 1);
            prop_assert!(before != Phase::Over || connection.phase() == Phase::Over);
            if connection.phase() == Phase::Over {
                prop_assert!(!connection.has_control());
                prop_assert_eq!(connection.credit(), 0);
            }
        }
    }
}
