//! Homes: into how many parts the rooms fall that servers are agreed on apart from each other.
//!
//! A bus with one server behind it has one home. In a Redis Cluster each partition is one, since it
//! may move from one server to another by itself.

use skein_protocol::ids::RoomId;

/// The home of a room, where there are `homes`. All that is of one user has the same.
pub fn partition_of(room: &RoomId, homes: u16) -> u16 {
    crc16(room.without_prefix().as_bytes()) % homes.max(1)
}

/// The CRC that Redis Cluster hashes keys with: CRC-16/XMODEM (Redis Cluster specification,
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
