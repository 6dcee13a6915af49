//! A queue that is served one chain at a time, each answered before the next is taken: all that the
//! simple devices do.

use virtio_queue::QueueT;

use super::{buffers::BufferChain, device::Activation};

/// Answers up to `chains_max` chains of a queue; `answer` tells how many bytes it wrote. What is
/// left waits for the next turn, behind all other devices.
///
/// # Errors
/// In words, what the driver did that the specification forbids, or why the answer failed.
pub(crate) fn serve(
    active: &mut Option<Activation>,
    index: u16,
    chains_max: usize,
    mut answer: impl FnMut(&mut BufferChain<'_>) -> Result<u32, String>,
) -> Result<(), String> {
    let Some(activation) = active else {
        return Ok(());
    };
    let memory = activation.memory.clone();
    let mut queues = activation.queues.iter_mut();
    let Some(found) = queues.find(|active| active.index == index) else {
        return Ok(());
    };
    let queue = &mut found.queue;
    let wrong = |error: virtio_queue::Error| error.to_string();
    let (mut used_any, mut more) = (false, true);
    for _ in 0..chains_max {
        let popped = BufferChain::take(queue, &memory).map_err(|error| error.to_string())?;
        let Some(mut chain) = popped else {
            // Asked for only here: while the device works the driver need not notify.
            if queue.enable_notification(&*memory).map_err(wrong)? {
                continue;
            }
            more = false;
            break;
        };
        let written = answer(&mut chain)?;
        let used = queue.add_used(&*memory, chain.head, written);
        used.map_err(wrong)?;
        used_any = true;
    }
    if used_any && queue.needs_notification(&*memory).map_err(wrong)? {
        activation.interrupt.signal_queue(index);
    }
    // After a whole turn, even if it emptied the queue: the driver was not asked to notify.
    if more {
        activation.kick_again(index);
    }
    Ok(())
}
