//! Shim and VMM: fixed-size messages on one SEQPACKET socket, with file descriptors from shim to VMM.
