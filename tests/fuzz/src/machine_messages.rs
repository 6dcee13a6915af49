//! Shim and VMM: what decodes encodes to the same bytes, and a refusal names a field.

use pericarp_protocol::machine::{
    Balloon, Bytes, Device, DeviceKind, ErrorCode, Event, Failure, Message, Named, Nothing, Reason,
    Request, Success, Text, decode_message, decode_request, encode_message, encode_request,
};

/// A request.
pub(crate) fn request(data: &[u8]) {
    match decode_request(data) {
        Ok((number, request)) => assert_eq!(encode_request(number, &request), data),
        Err(error) => assert!(!error.field.is_empty()),
    }
}

/// An answer or an event.
pub(crate) fn message(data: &[u8]) {
    match decode_message(data) {
        Ok((number, message)) => assert_eq!(encode_message(number, &message), data),
        Err(error) => assert!(!error.field.is_empty()),
    }
}

/// One request of each shape.
pub(crate) fn request_seeds() -> Vec<Vec<u8>> {
    let named = || Named {
        device: Text::lossy("disk0"),
    };
    let balloon = DeviceKind::Balloon(Balloon {
        deflate_on_oom: true,
        free_page_reporting: false,
    });
    let device = Device {
        name: Text::lossy("balloon"),
        kind: balloon,
    };
    [
        Request::Run(Nothing {}),
        Request::AddDevice(device),
        Request::RemoveDevice(named()),
        Request::ResizeMemory(Bytes { bytes: 1 << 30 }),
        Request::DeviceStatistics(named()),
    ]
    .iter()
    .map(|request| encode_request(7, request))
    .collect()
}

/// One message of each shape.
pub(crate) fn message_seeds() -> Vec<Vec<u8>> {
    [
        Message::Success(Success::Done(Nothing {})),
        Message::Event(Event::Started(Nothing {})),
        Message::Failure(Failure {
            code: ErrorCode::Invalid,
            reason: Reason::lossy("Machine.vcpus: 0"),
        }),
    ]
    .iter()
    .map(|message| encode_message(7, message))
    .collect()
}
