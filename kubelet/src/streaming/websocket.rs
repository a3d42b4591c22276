//! Kubernetes' channel protocols over WebSocket: each message begins with the number of its channel.
//! Source: apimachinery `pkg/util/remotecommand`, apiserver `pkg/util/wsstream`, KEP-4006.

use axum::extract::ws::{Message, WebSocket};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use serde_json::Value;
use tokio::sync::mpsc;

use super::session::{Input, MESSAGES_BUFFERED, Output, Remote, Size};
use super::status;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
/// v5: the channel named by the next byte is closed.
const CLOSE: u8 = 255;

/// What was agreed upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Protocol {
    /// `v5…`: channels can be closed one by one.
    closes: bool,
    /// `v4…` and later: the error channel carries a Status.
    status: bool,
    /// Text messages: the channel as a digit, then base64.
    base64: bool,
}

/// In the order of preference.
pub(super) const PROTOCOLS: [&str; 5] =
    ["v5.channel.k8s.io", "v4.channel.k8s.io", "v4.base64.channel.k8s.io", "channel.k8s.io", "base64.channel.k8s.io"];

impl Protocol {
    /// By its name; no name means the first version.
    pub(super) fn of(name: &str) -> Self {
        Self {
            closes: name.starts_with("v5."),
            status: name.starts_with("v4.") || name.starts_with("v5."),
            base64: name.contains("base64"),
        }
    }

    fn encode(self, channel: u8, bytes: &[u8]) -> Message {
        if self.base64 {
            return Message::Text(format!("{channel}{}", STANDARD.encode(bytes)).into());
        }
        let mut message = BytesMut::with_capacity(bytes.len() + 1);
        message.extend_from_slice(&[channel]);
        message.extend_from_slice(bytes);
        Message::Binary(message.freeze())
    }

    /// The channel and content of a message; `None` if it is malformed.
    fn decode(self, message: Message) -> Option<(u8, Bytes)> {
        let bytes = match message {
            Message::Binary(bytes) => bytes,
            Message::Text(text) => Bytes::copy_from_slice(text.as_bytes()),
            _ => return None,
        };
        let (first, rest) = bytes.split_first()?;
        if self.base64 {
            let content = STANDARD.decode(rest).ok()?;
            return Some((first.checked_sub(b'0')?, content.into()));
        }
        Some((*first, bytes.slice(1..)))
    }

    fn status_message(self, status: &Value) -> Message {
        let text = if self.status { status.to_string() } else { status::plain(status) };
        self.encode(ERROR, text.as_bytes())
    }
}

/// Serves the channels on a socket until either side is done. `greeting` is the channel that gets an empty message at once,
/// so that the client knows that the connection stands.
pub(super) fn remote(socket: WebSocket, protocol: Protocol, greeting: u8) -> (Remote, tokio::task::JoinHandle<()>) {
    let (input_sender, input) = mpsc::channel(MESSAGES_BUFFERED);
    let (output, output_receiver) = mpsc::channel(MESSAGES_BUFFERED);
    let task = tokio::spawn(carry(socket, protocol, greeting, input_sender, output_receiver));
    (Remote { input, output }, task)
}

/// The channel to greet on.
pub(super) fn greeting(stdout: bool, stderr: bool) -> u8 {
    if stdout {
        STDOUT
    } else if stderr {
        STDERR
    } else {
        ERROR
    }
}

async fn carry(
    socket: WebSocket,
    protocol: Protocol,
    greeting: u8,
    input: mpsc::Sender<Input>,
    mut output: mpsc::Receiver<Output>,
) {
    let (mut sink, mut source) = socket.split();
    let writing = async {
        sink.send(protocol.encode(greeting, b"")).await?;
        while let Some(message) = output.recv().await {
            match message {
                Output::Stdout(bytes) => sink.send(protocol.encode(STDOUT, &bytes)).await?,
                Output::Stderr(bytes) => sink.send(protocol.encode(STDERR, &bytes)).await?,
                Output::Status(status) => sink.send(protocol.status_message(&status)).await?,
            }
        }
        sink.send(Message::Close(Some(axum::extract::ws::CloseFrame { code: 1000, reason: "".into() }))).await?;
        Ok::<(), axum::Error>(())
    };
    // Reading goes on while writing waits: input must not stand behind output.
    let reading = async {
        while let Some(Ok(message)) = source.next().await {
            if matches!(message, Message::Ping(_) | Message::Pong(_)) {
                continue;
            }
            if matches!(message, Message::Close(_)) {
                break;
            }
            let Some((channel, bytes)) = protocol.decode(message) else { break };
            let event = match channel {
                STDIN => Input::Stdin(bytes),
                RESIZE => match serde_json::from_slice::<Size>(&bytes) {
                    Ok(size) => Input::Resize(size),
                    Err(_) => continue,
                },
                CLOSE if protocol.closes => match bytes.first() {
                    Some(&STDIN) => Input::StdinClosed,
                    _ => continue,
                },
                _ => continue,
            };
            if input.send(event).await.is_err() {
                // The session is over; the last messages still go out.
                std::future::pending::<()>().await;
            }
        }
        drop(input);
    };
    tokio::pin!(writing, reading);
    let written = tokio::select! {
        written = &mut writing => written,
        () = &mut reading => Ok(()),
    };
    if let Err(error) = written {
        tracing::debug!(%error, "WebSocket client is gone");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn messages_survive(channel in 0u8..5, bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            for name in PROTOCOLS {
                let protocol = Protocol::of(name);
                let (back, content) = protocol.decode(protocol.encode(channel, &bytes)).expect("own message");
                prop_assert_eq!(back, channel);
                prop_assert_eq!(content.as_ref(), bytes.as_slice());
            }
        }

        #[test]
        fn reading_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..50), name in prop::sample::select(PROTOCOLS.to_vec())) {
            let _message = Protocol::of(name).decode(Message::Binary(bytes.into()));
        }
    }
}
