//! Placement groups: the rooms that always share a Redis server, and for which the nodes agree on
//! one together.
//!
//! A bus with a single server has one group. In a Redis Cluster each partition is a group, since
//! its slot can move to another server.

use skein_protocol::ids::RoomId;

/// The partition of a room, one of `count`. Rooms, inbox and status of one user share a partition.
pub fn partition_of(room: &RoomId, count: u16) -> u16 {
    crc16(room.without_prefix().as_bytes()) % count.max(1)
}

/// The checksum that Redis Cluster hashes keys with: CRC-16/XMODEM (Redis Cluster specification,
/// appendix A).
pub fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte) << 8, |crc, _| {
            if crc & 0x8000 != 0 { crc << 1 ^ 0x1021 } else { crc << 1 }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crc_is_the_one_of_redis_cluster() {
        // The check value of CRC-16/XMODEM, also given in the Redis Cluster specification.
        assert_eq!(crc16(b"123456789"), 0x31C3);
    }
}
