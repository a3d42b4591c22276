//! Bytes in one direction over WebSocket, as a client gets a log that it asks for that way. Source: apiserver
//! `pkg/util/wsstream`, `Reader`.

use std::io;

use axum::extract::FromRequestParts;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::{SinkExt, Stream, StreamExt};

const BASE64: &str = "base64.binary.k8s.io";
const PROTOCOLS: [&str; 2] = ["binary.k8s.io", BASE64];

/// Upgrades the connection and sends each piece as a message, until there are no more or the client is gone.
pub(crate) async fn serve<S>(mut parts: http::request::Parts, pieces: S) -> Response
where
    S: Stream<Item = io::Result<Bytes>> + Send + 'static,
{
    let upgrade = match WebSocketUpgrade::from_request_parts(&mut parts, &()).await {
        Ok(upgrade) => upgrade.protocols(PROTOCOLS),
        Err(refused) => return refused.into_response(),
    };
    let base64 = upgrade.selected_protocol().is_some_and(|name| name == BASE64);
    upgrade.on_upgrade(move |socket| carry(socket, base64, pieces))
}

async fn carry(socket: WebSocket, base64: bool, pieces: impl Stream<Item = io::Result<Bytes>>) {
    let (mut sink, mut source) = socket.split();
    let writing = async {
        tokio::pin!(pieces);
        while let Some(Ok(piece)) = pieces.next().await {
            let message = if base64 { Message::Text(STANDARD.encode(&piece).into()) } else { Message::Binary(piece) };
            sink.send(message).await?;
        }
        sink.send(Message::Close(None)).await
    };
    let gone = async { while let Some(Ok(_)) = source.next().await {} };
    tokio::select! {
        sent = writing => if let Err(error) = sent { tracing::debug!(%error, "WebSocket client is gone") },
        () = gone => {}
    }
}
