//! The configuration space (virtio 1.2 §5.11.4).

/// Bytes of a tag, padded with zeroes and not terminated.
pub(crate) const TAG_BYTES: usize = 36;
/// Bytes of `struct virtio_fs_config` without the notification field, whose feature is not
/// offered.
pub(crate) const CONFIG_BYTES: usize = TAG_BYTES + 4;

/// The configuration's bytes; `None` for a tag that is empty or too long.
pub(crate) fn config(tag: &str, request_queues: u16) -> Option<[u8; CONFIG_BYTES]> {
    let mut bytes = [0; CONFIG_BYTES];
    if tag.is_empty() || tag.contains('\0') {
        return None;
    }
    bytes
        .get_mut(..tag.len())
        .filter(|_| tag.len() <= TAG_BYTES)?
        .copy_from_slice(tag.as_bytes());
    bytes[TAG_BYTES..].copy_from_slice(&u32::from(request_queues).to_le_bytes());
    Some(bytes)
}
