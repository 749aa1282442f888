//! Protobuf, with buffers for small messages: by default each call would begin with two of 8 KiB, and an open stream keep them.

use std::marker::PhantomData;

use prost::Message;
use prost::bytes::BufMut;
use tonic::Status;
use tonic::codec::BufferSettings;
use tonic::codec::EncodeBuf;
use tonic::codec::Encoder;
use tonic_prost::ProstDecoder;
use tonic_prost::ProstEncoder;

/// Most requests and answers fit; a buffer grows when they do not.
const BUFFER_BYTES: usize = 512;
/// From here on a stream sends what it has.
const YIELD_BYTES: usize = 32 * 1024;

#[derive(Clone, Copy, Debug)]
pub struct Codec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> tonic::codec::Codec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(buffers())
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(buffers())
    }
}

/// Answers that were written by hand, to requests that are messages.
#[derive(Clone, Copy, Debug)]
pub struct Written<U>(PhantomData<U>);

impl<U> Default for Written<U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<U: Message + Default + Send + 'static> tonic::codec::Codec for Written<U> {
    type Encode = Vec<u8>;
    type Decode = U;
    type Encoder = Bytes;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        Bytes
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(buffers())
    }
}

/// Writes what is written already.
#[derive(Clone, Copy, Debug)]
pub struct Bytes;

impl Encoder for Bytes {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, message: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.reserve(message.len());
        buffer.put_slice(&message);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        buffers()
    }
}

fn buffers() -> BufferSettings {
    BufferSettings::new(BUFFER_BYTES, YIELD_BYTES)
}
