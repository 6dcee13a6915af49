//! The file descriptors that come with a request.

use std::os::fd::OwnedFd;

use pericarp_protocol::machine::{Descriptor, FieldError};

/// The descriptors of one request, each taken once.
#[derive(Debug, Default)]
pub(crate) struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// Those of one request, in order.
    pub(crate) fn new(received: Vec<OwnedFd>) -> Self {
        Self(received.into_iter().map(Some).collect())
    }

    /// Takes the one at a position; `field` is named when there is none.
    pub(crate) fn take(
        &mut self,
        field: &'static str,
        descriptor: Descriptor,
    ) -> Result<OwnedFd, FieldError> {
        let count = self.0.len();
        let Some(place) = self.0.get_mut(usize::from(descriptor.position)) else {
            let reason = format!("position {} of {count} descriptors", descriptor.position);
            return Err(FieldError::new(field, reason));
        };
        place.take().ok_or_else(|| {
            let reason = format!("the descriptor at {} has another use", descriptor.position);
            FieldError::new(field, reason)
        })
    }
}
