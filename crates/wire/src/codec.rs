//! Length-prefixed messages: a little-endian `u32` length, then a postcard body.

use serde::{Serialize, de::DeserializeOwned};

/// Bytes of the length prefix.
pub const PREFIX: usize = 4;

/// Why bytes are not a message, or a message does not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The announced or produced length is over the limit of this stream.
    #[error("a message of {length} bytes is over this stream's limit of {limit}")]
    TooLong {
        /// The length.
        length: usize,
        /// The limit.
        limit: usize,
    },
    /// The bytes do not decode to the expected message.
    #[error("malformed message")]
    Malformed,
}

/// Encodes a message with its length prefix.
pub fn encode<T: Serialize>(message: &T, limit: usize) -> Result<Vec<u8>, CodecError> {
    let body = postcard::to_allocvec(message).map_err(|_| CodecError::Malformed)?;
    check(body.len(), limit)?;
    let length = u32::try_from(body.len()).map_err(|_| CodecError::TooLong { length: body.len(), limit })?;
    let mut bytes = Vec::with_capacity(PREFIX + body.len());
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// Reads a length prefix.
///
/// INVARIANT: called before any memory is taken for the body.
pub fn body_length(prefix: [u8; PREFIX], limit: usize) -> Result<usize, CodecError> {
    let length = usize::try_from(u32::from_le_bytes(prefix)).unwrap_or(usize::MAX);
    check(length, limit)?;
    Ok(length)
}

/// Decodes a body, which must be consumed whole.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, CodecError> {
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        _ => Err(CodecError::Malformed),
    }
}

fn check(length: usize, limit: usize) -> Result<(), CodecError> {
    if length > limit { Err(CodecError::TooLong { length, limit }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_over_the_limit_is_refused_before_the_body() {
        assert_eq!(
            body_length(u32::MAX.to_le_bytes(), 1000),
            Err(CodecError::TooLong { length: u32::MAX as usize, limit: 1000 })
        );
    }

    #[test]
    fn trailing_bytes_are_refused() {
        let bytes = encode(&7u32, 100).unwrap();
        assert_eq!(decode::<u32>(&bytes[PREFIX..]), Ok(7));
        assert_eq!(decode::<u32>(&[bytes[PREFIX], 0]), Err(CodecError::Malformed));
    }
}
