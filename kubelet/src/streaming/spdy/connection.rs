//! A connection: one task reads and one writes; streams are pairs of channels.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use super::frame::{Frame, parse_frame};
use super::headers::HeaderCodec;

/// Streams of one connection at once; a port-forward has two for each connection through it.
const MAX_STREAMS: usize = 1024;
/// Data frames of one stream waiting to be taken.
const FRAMES_BUFFERED: usize = 64;
/// Frames waiting to be written, of all streams.
const WRITES_BUFFERED: usize = 64;
/// Bytes of one data frame.
const MAX_DATA_BYTES: usize = 32 << 10;
/// A stream nobody takes data from holds up all others; after this it is reset instead.
const STUCK_AFTER: Duration = Duration::from_secs(60);
/// `PROTOCOL_ERROR`, `REFUSED_STREAM`, `CANCEL`: §2.6.3.
const PROTOCOL_ERROR: u32 = 1;
const REFUSED_STREAM: u32 = 3;
const CANCEL: u32 = 5;

/// A stream that the client opened.
pub struct Incoming {
    /// Its headers; names are lower-case.
    pub headers: Vec<(String, String)>,
    /// What the client sends; ends when it closes its side.
    pub data: mpsc::Receiver<Bytes>,
    /// Our side.
    pub handle: StreamHandle,
}

impl Incoming {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// Our side of a stream.
#[derive(Clone)]
pub struct StreamHandle {
    id: u32,
    writes: mpsc::Sender<Write>,
}

enum Write {
    Frame(Frame),
    Accept(u32),
}

impl StreamHandle {
    /// Sends data.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn send(&self, mut bytes: Bytes) -> io::Result<()> {
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(MAX_DATA_BYTES));
            self.write(Frame::Data { stream: self.id, fin: false, bytes: piece }).await?;
        }
        Ok(())
    }

    /// Closes our side.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn close(&self) -> io::Result<()> {
        self.write(Frame::Data { stream: self.id, fin: true, bytes: Bytes::new() }).await
    }

    /// Ends the stream at once.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn reset(&self) -> io::Result<()> {
        self.write(Frame::Reset { stream: self.id, status: CANCEL }).await
    }

    async fn write(&self, frame: Frame) -> io::Result<()> {
        self.writes.send(Write::Frame(frame)).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

/// The streams of a connection, as the client opens them.
pub struct Connection {
    incoming: mpsc::Receiver<Incoming>,
    tasks: tokio::task::JoinSet<()>,
}

type Streams = HashMap<u32, mpsc::Sender<Bytes>>;

impl Connection {
    /// Serves SPDY on `io`.
    pub fn new(io: impl AsyncRead + AsyncWrite + Send + 'static) -> Self {
        let (reader, writer) = tokio::io::split(io);
        let (opened, incoming) = mpsc::channel(FRAMES_BUFFERED);
        let (writes, waiting) = mpsc::channel(WRITES_BUFFERED);
        let codec = Arc::new(Mutex::new(HeaderCodec::default()));
        let mut tasks = tokio::task::JoinSet::new();
        let decoding = codec.clone();
        tasks.spawn(async move {
            if let Err(error) = read(reader, opened, writes, decoding).await {
                tracing::debug!(%error, "SPDY connection ended");
            }
        });
        tasks.spawn(async move {
            if let Err(error) = write(writer, waiting, codec).await {
                tracing::debug!(%error, "SPDY client is gone");
            }
        });
        Self { incoming, tasks }
    }

    /// The next stream; `None` when the client is gone.
    pub async fn accept(&mut self) -> Option<Incoming> {
        self.incoming.recv().await
    }

    /// Waits until everything that streams still send is written and the client has closed, at most `limit`.
    pub async fn finish(mut self, limit: Duration) {
        self.incoming.close();
        let ended = tokio::time::timeout(limit, async { while self.tasks.join_next().await.is_some() {} }).await;
        if ended.is_err() {
            tracing::debug!("SPDY client did not close");
        }
    }
}

async fn read(
    mut reader: impl AsyncRead + Unpin,
    opened: mpsc::Sender<Incoming>,
    writes: mpsc::Sender<Write>,
    codec: Arc<Mutex<HeaderCodec>>,
) -> io::Result<()> {
    let mut streams: Streams = HashMap::new();
    let mut buffer = BytesMut::with_capacity(64 << 10);
    loop {
        while let Some(frame) = parse_frame(&mut buffer).map_err(io::Error::other)? {
            handle(frame, &mut streams, &opened, &writes, &codec).await?;
        }
        if reader.read_buf(&mut buffer).await? == 0 {
            return Ok(());
        }
    }
}

async fn handle(
    frame: Frame,
    streams: &mut Streams,
    opened: &mpsc::Sender<Incoming>,
    writes: &mpsc::Sender<Write>,
    codec: &Mutex<HeaderCodec>,
) -> io::Result<()> {
    let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
    let reset = |stream, status| writes.send(Write::Frame(Frame::Reset { stream, status }));
    match frame {
        Frame::SynStream { stream, fin, block } => {
            // Every block must be decoded, also of a refused stream: they share one compression state.
            let headers = codec.lock().decode(&block).ok_or_else(|| io::Error::other("malformed SPDY headers"))?;
            if stream % 2 == 0 || streams.contains_key(&stream) {
                return reset(stream, PROTOCOL_ERROR).await.map_err(gone);
            }
            streams.retain(|_, sender| !sender.is_closed());
            if streams.len() >= MAX_STREAMS {
                return reset(stream, REFUSED_STREAM).await.map_err(gone);
            }
            let (sender, data) = mpsc::channel(FRAMES_BUFFERED);
            if !fin {
                streams.insert(stream, sender);
            }
            writes.send(Write::Accept(stream)).await.map_err(gone)?;
            let handle = StreamHandle { id: stream, writes: writes.clone() };
            // Nobody takes streams any more: the session is about to end.
            if opened.send(Incoming { headers, data, handle }).await.is_err() {
                streams.remove(&stream);
                reset(stream, REFUSED_STREAM).await.map_err(gone)?;
            }
        }
        Frame::Data { stream, fin, bytes } => {
            if let Some(sender) = streams.get(&stream) {
                if !bytes.is_empty()
                    && let Err(mpsc::error::SendTimeoutError::Timeout(_)) =
                        sender.send_timeout(bytes, STUCK_AFTER).await
                {
                    streams.remove(&stream);
                    return reset(stream, CANCEL).await.map_err(gone);
                }
                if fin {
                    streams.remove(&stream);
                }
            }
        }
        Frame::Reset { stream, .. } => {
            streams.remove(&stream);
        }
        // Ours have even numbers; an answer to ours does not come, as we send none.
        Frame::Ping { id } if id % 2 == 1 => writes.send(Write::Frame(Frame::Ping { id })).await.map_err(gone)?,
        Frame::Headers { block, .. } | Frame::SynReply { block, .. } => {
            codec.lock().decode(&block).ok_or_else(|| io::Error::other("malformed SPDY headers"))?;
        }
        Frame::Ping { .. } | Frame::Settings | Frame::WindowUpdate | Frame::GoAway { .. } => {}
    }
    Ok(())
}

async fn write(
    mut writer: impl AsyncWrite + Unpin,
    mut waiting: mpsc::Receiver<Write>,
    codec: Arc<Mutex<HeaderCodec>>,
) -> io::Result<()> {
    let mut out = BytesMut::with_capacity(64 << 10);
    while let Some(first) = waiting.recv().await {
        let mut next = Some(first);
        // What has gathered goes out in one write.
        while let Some(item) = next {
            match item {
                Write::Frame(frame) => frame.write(&mut out),
                Write::Accept(stream) => {
                    let block = codec.lock().encode(&[]);
                    Frame::SynReply { stream, fin: false, block }.write(&mut out);
                }
            }
            next = if out.len() < MAX_DATA_BYTES { waiting.try_recv().ok() } else { None };
        }
        writer.write_all(&out).await?;
        writer.flush().await?;
        out.clear();
    }
    writer.shutdown().await
}
