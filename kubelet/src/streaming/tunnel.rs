//! A WebSocket as a plain stream of bytes: SPDY tunnelled for `kubectl port-forward` (KEP-4006).

use axum::extract::ws::{Message, WebSocket};
use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

/// Bytes buffered in each direction.
const BUFFER_BYTES: usize = 64 << 10;

/// The other end of the tunnel.
pub(super) fn open(socket: WebSocket) -> DuplexStream {
    let (near, far) = tokio::io::duplex(BUFFER_BYTES);
    let (mut reader, mut writer) = tokio::io::split(far);
    let (mut sink, mut source) = socket.split();
    tokio::spawn(async move {
        let incoming = async {
            while let Some(Ok(message)) = source.next().await {
                let bytes = match message {
                    Message::Binary(bytes) => bytes,
                    Message::Text(text) => Bytes::copy_from_slice(text.as_bytes()),
                    Message::Close(_) => break,
                    Message::Ping(_) | Message::Pong(_) => continue,
                };
                if writer.write_all(&bytes).await.is_err() {
                    break;
                }
            }
            // The near end may be gone already, which is what this is to tell it.
            let _told = writer.shutdown().await;
        };
        let outgoing = async {
            let mut buffer = vec![0; BUFFER_BYTES / 2];
            while let Ok(count @ 1..) = reader.read(&mut buffer).await {
                if sink.send(Message::Binary(Bytes::copy_from_slice(&buffer[..count]))).await.is_err() {
                    return;
                }
            }
            // A client that is gone needs no farewell.
            let _told = sink.send(Message::Close(None)).await;
        };
        tokio::join!(incoming, outgoing);
    });
    near
}
