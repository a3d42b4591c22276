//! As much of D-Bus as a few calls to systemd and logind need (D-Bus Specification 0.43, "Message Protocol"; sd-bus(3)): method
//! calls on systemd's private socket or on a bus, their answers with descriptors, and signals.
//!
//! The libraries that speak D-Bus bring an async runtime or the C library's into a program that is started for every container.

use std::collections::VecDeque;
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// The broker of a bus.
const BROKER: [&str; 3] = ["org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus"];
/// Longest that the other side may owe an answer.
const SILENCE_LIMIT: Duration = Duration::from_secs(30);
/// Messages of systemd about units are far below.
const MESSAGE_LIMIT_BYTES: usize = 1 << 20;
const FIXED_HEADER_BYTES: usize = 16;
const LITTLE_ENDIAN: u8 = b'l';
const PROTOCOL_VERSION: u8 = 1;
const METHOD_CALL: u8 = 1;
const METHOD_RETURN: u8 = 2;
const ERROR: u8 = 3;
const SIGNAL: u8 = 4;
// Fields of a header.
const PATH: u8 = 1;
const INTERFACE: u8 = 2;
const MEMBER: u8 = 3;
const ERROR_NAME: u8 = 4;
const REPLY_SERIAL: u8 = 5;
const DESTINATION: u8 = 6;
const SIGNATURE: u8 = 8;

/// A value of a property.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// `b`
    Bool(bool),
    /// `u`
    U32(u32),
    /// `i`
    I32(i32),
    /// `t`
    U64(u64),
    /// `x`
    I64(i64),
    /// `s`
    Text(String),
    /// `as`
    Texts(Vec<String>),
    /// `au`
    Numbers(Vec<u32>),
    /// `ay`
    Bytes(Vec<u8>),
}

impl Value {
    fn signature(&self) -> &'static str {
        match self {
            Self::Bool(_) => "b",
            Self::U32(_) => "u",
            Self::I32(_) => "i",
            Self::U64(_) => "t",
            Self::I64(_) => "x",
            Self::Text(_) => "s",
            Self::Texts(_) => "as",
            Self::Numbers(_) => "au",
            Self::Bytes(_) => "ay",
        }
    }
}

/// What a message is written into; every value is aligned to its size from the beginning.
#[derive(Debug, Default)]
pub struct Body(Vec<u8>);

impl Body {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    fn number<const N: usize>(&mut self, bytes: [u8; N]) -> &mut Self {
        self.align(N);
        self.0.extend(bytes);
        self
    }

    fn length(length: usize) -> [u8; 4] {
        u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes()
    }

    /// `b`
    pub fn bool(&mut self, value: bool) -> &mut Self {
        self.number(u32::from(value).to_le_bytes())
    }

    /// `i`
    pub fn i32(&mut self, value: i32) -> &mut Self {
        self.number(value.to_le_bytes())
    }

    /// `s` and `o`
    pub fn text(&mut self, text: &str) -> &mut Self {
        self.number(Self::length(text.len()));
        self.0.extend(text.as_bytes());
        self.0.push(0);
        self
    }

    fn signature(&mut self, text: &str) -> &mut Self {
        self.0.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
        self.0.extend(text.as_bytes());
        self.0.push(0);
        self
    }

    /// An array whose elements are aligned to `align`.
    pub fn array<T>(&mut self, align: usize, items: &[T], write: impl Fn(&mut Self, &T)) -> &mut Self {
        self.number([0; 4]);
        let length = self.0.len() - 4;
        self.align(align);
        let start = self.0.len();
        items.iter().for_each(|item| write(self, item));
        let bytes = Self::length(self.0.len() - start);
        self.0[length..length + 4].copy_from_slice(&bytes);
        self
    }

    /// `a(sv)`
    pub fn properties(&mut self, properties: &[(String, Value)]) -> &mut Self {
        self.array(8, properties, |body, (name, value)| {
            body.align(8);
            body.text(name).signature(value.signature());
            match value {
                Value::Bool(value) => body.bool(*value),
                Value::U32(value) => body.number(value.to_le_bytes()),
                Value::I32(value) => body.number(value.to_le_bytes()),
                Value::U64(value) => body.number(value.to_le_bytes()),
                Value::I64(value) => body.number(value.to_le_bytes()),
                Value::Text(text) => body.text(text),
                Value::Texts(texts) => body.array(4, texts, |body, text| {
                    body.text(text);
                }),
                Value::Numbers(numbers) => body.array(4, numbers, |body, number| {
                    body.number(number.to_le_bytes());
                }),
                Value::Bytes(bytes) => body.array(1, bytes, |body, byte| body.0.push(*byte)),
            };
        })
    }

    fn field(&mut self, code: u8, signature: &str, text: &str) {
        self.align(8);
        self.0.push(code);
        self.signature(signature);
        if signature == "g" {
            self.signature(text)
        } else {
            self.text(text)
        };
    }
}

/// What a message is read from.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, align: usize, length: usize) -> Option<&'a [u8]> {
        let start = self.at.next_multiple_of(align);
        let taken = self.bytes.get(start..start.checked_add(length)?)?;
        self.at = start + length;
        Some(taken)
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4, 4)?.try_into().ok()?))
    }

    /// A string or an object path.
    fn text(&mut self) -> Option<String> {
        let length = usize::try_from(self.u32()?).ok()?;
        let text = self.take(1, length)?;
        self.take(1, 1)?;
        String::from_utf8(text.to_vec()).ok()
    }

    fn signature(&mut self) -> Option<&'a [u8]> {
        let length = usize::from(*self.take(1, 1)?.first()?);
        let text = self.take(1, length)?;
        self.take(1, 1)?;
        Some(text)
    }
}

/// A message of the other side's.
#[derive(Debug, Default)]
pub struct Message {
    kind: u8,
    reply_to: u32,
    /// Name of the signal.
    pub member: String,
    /// Name of the error.
    pub error: String,
    body: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Message {
    fn parse(header: &[u8], body: Vec<u8>) -> Option<Self> {
        let mut message = Self { kind: *header.get(1)?, body, ..Self::default() };
        let mut reader = Reader { bytes: header, at: FIXED_HEADER_BYTES };
        while reader.at.next_multiple_of(8) < header.len() {
            let code = *reader.take(8, 1)?.first()?;
            match (code, reader.signature()?) {
                (REPLY_SERIAL, b"u") => message.reply_to = reader.u32()?,
                (MEMBER, b"s") => message.member = reader.text()?,
                (ERROR_NAME, b"s") => message.error = reader.text()?,
                (_, b"s" | b"o") => drop(reader.text()?),
                (_, b"g") => drop(reader.signature()?),
                (_, b"u") => drop(reader.u32()?),
                _ => return None,
            }
        }
        Some(message)
    }

    /// The truth value that the body begins with.
    pub fn bool(&self) -> Option<bool> {
        Reader { bytes: &self.body, at: 0 }.u32().map(|value| value != 0)
    }

    /// The value of a property, if it is a truth value (as 0 or 1) or a number without a sign.
    pub fn property(&self) -> Option<u64> {
        let mut reader = Reader { bytes: &self.body, at: 0 };
        match reader.signature()? {
            b"b" | b"u" => reader.u32().map(u64::from),
            b"t" => Some(u64::from_le_bytes(reader.take(8, 8)?.try_into().ok()?)),
            _ => None,
        }
    }

    /// The first descriptor that came with it.
    pub fn descriptor(mut self) -> Option<OwnedFd> {
        (!self.fds.is_empty()).then(|| self.fds.swap_remove(0))
    }

    /// The strings that the body begins with, after `skip` numbers.
    pub fn texts(&self, skip: usize) -> Vec<String> {
        let mut reader = Reader { bytes: &self.body, at: skip * 4 };
        std::iter::from_fn(|| reader.text()).collect()
    }
}

/// A connection to a service that speaks D-Bus, or to the broker of a bus.
pub struct Connection {
    stream: UnixStream,
    serial: u32,
    signals: VecDeque<Message>,
}

fn garbled() -> Error {
    Error::new(ErrorKind::InvalidData, "it sent what is no message of D-Bus")
}

impl Connection {
    /// To a service without a broker between.
    ///
    /// # Errors
    /// When nobody listens, or this user is not let in.
    pub fn open(socket: &Path) -> Result<Self> {
        Self::authenticated(socket, &["OK "], "")
    }

    /// To a bus.
    ///
    /// # Errors
    /// When nobody listens, or this user is not let in.
    pub fn on_bus(socket: &Path) -> Result<Self> {
        let mut connection = Self::authenticated(socket, &["OK ", "AGREE_UNIX_FD"], "NEGOTIATE_UNIX_FD\r\n")?;
        let answer = connection.call(BROKER, "Hello", "", &Body::default())?;
        if answer.error.is_empty() { Ok(connection) } else { Err(Error::other(answer.error)) }
    }

    fn authenticated(socket: &Path, answers: &[&str], wish: &str) -> Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(SILENCE_LIMIT))?;
        // Who we are says the kernel; the user id is the mechanism's form (D-Bus Specification, "EXTERNAL").
        let uid: String = nix::unistd::geteuid().to_string().bytes().map(|digit| format!("{digit:x}")).collect();
        // In one go: systemd does not look again at what it has read together with the word BEGIN, so no call may be there yet
        // when it reads that.
        stream.write_all(format!("\0AUTH EXTERNAL {uid}\r\n{wish}BEGIN\r\n").as_bytes())?;
        for expected in answers {
            let mut answer = Vec::new();
            while !answer.ends_with(b"\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte)?;
                answer.push(byte[0]);
                if answer.len() > MESSAGE_LIMIT_BYTES {
                    return Err(garbled());
                }
            }
            if !answer.starts_with(expected.as_bytes()) {
                return Err(Error::new(ErrorKind::PermissionDenied, "it does not let this user in"));
            }
        }
        Ok(Self { stream, serial: 0, signals: VecDeque::new() })
    }

    /// Asks the broker for the signals that fit a rule.
    ///
    /// # Errors
    /// When the connection fails, or the broker refuses.
    pub fn subscribe(&mut self, rule: &str) -> Result<()> {
        let mut body = Body::default();
        body.text(rule);
        let answer = self.call(BROKER, "AddMatch", "s", &body)?;
        if answer.error.is_empty() { Ok(()) } else { Err(Error::other(answer.error)) }
    }

    /// Calls a method and returns its answer, which may be an error of the other side.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn call(&mut self, target: [&str; 3], member: &str, signature: &str, body: &Body) -> Result<Message> {
        let [destination, path, interface] = target;
        self.serial += 1;
        let mut message = Body(vec![LITTLE_ENDIAN, METHOD_CALL, 0, PROTOCOL_VERSION]);
        message.number(Body::length(body.0.len())).number(self.serial.to_le_bytes());
        let mut fields = vec![
            (PATH, "o", path),
            (INTERFACE, "s", interface),
            (MEMBER, "s", member),
            (DESTINATION, "s", destination),
        ];
        if !signature.is_empty() {
            fields.push((SIGNATURE, "g", signature));
        }
        message.array(8, &fields, |message, (code, signature, text)| message.field(*code, signature, text));
        message.align(8);
        message.0.extend(&body.0);
        self.stream.write_all(&message.0)?;
        loop {
            let message = self.receive()?;
            match message.kind {
                METHOD_RETURN | ERROR if message.reply_to == self.serial => return Ok(message),
                SIGNAL => self.signals.push_back(message),
                _ => {}
            }
        }
    }

    /// The next signal.
    ///
    /// # Errors
    /// When the connection fails, or nothing is said for the time that an answer may take.
    pub fn signal(&mut self) -> Result<Message> {
        if let Some(message) = self.signals.pop_front() {
            return Ok(message);
        }
        loop {
            let message = self.receive()?;
            if message.kind == SIGNAL {
                return Ok(message);
            }
        }
    }

    /// The next signal, however long it takes.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn signal_some_day(&mut self) -> Result<Message> {
        self.stream.set_read_timeout(None)?;
        let signal = self.signal();
        self.stream.set_read_timeout(Some(SILENCE_LIMIT))?;
        signal
    }

    /// Fills `buffer`; descriptors come with the first byte of their message.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<Vec<OwnedFd>> {
        let mut fds = Vec::new();
        let mut filled = 0;
        while filled < buffer.len() {
            match coracle_sys::packet::receive(self.stream.as_fd(), &mut buffer[filled..]) {
                Ok((0, _)) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok((bytes, more)) => {
                    filled += bytes;
                    fds.extend(more);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(fds)
    }

    fn receive(&mut self) -> Result<Message> {
        let mut header = vec![0; FIXED_HEADER_BYTES];
        let fds = self.fill(&mut header)?;
        let number = |at: usize| {
            header[at..at + 4].try_into().ok().and_then(|bytes| usize::try_from(u32::from_le_bytes(bytes)).ok())
        };
        let (Some(body), Some(fields)) = (number(4), number(12)) else { return Err(garbled()) };
        if header[0] != LITTLE_ENDIAN || body > MESSAGE_LIMIT_BYTES || fields > MESSAGE_LIMIT_BYTES {
            return Err(garbled());
        }
        let end = FIXED_HEADER_BYTES + fields;
        header.resize(end.next_multiple_of(8), 0);
        self.stream.read_exact(&mut header[FIXED_HEADER_BYTES..])?;
        header.truncate(end);
        let mut content = vec![0; body];
        self.stream.read_exact(&mut content)?;
        let message = Message::parse(&header, content).ok_or_else(garbled)?;
        Ok(Message { fds, ..message })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_aligned_from_the_beginning() {
        let mut body = Body::default();
        body.text("ab").bool(true).properties(&[("P".into(), Value::U64(7)), ("Q".into(), Value::Bytes(vec![9]))]);
        let expected = [
            &[2, 0, 0, 0, b'a', b'b', 0, 0, 1, 0, 0, 0][..],
            &[41, 0, 0, 0, 1, 0, 0, 0, b'P', 0, 1, b't', 0, 0, 0, 0],
            &[0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0],
        ]
        .concat();
        assert_eq!(body.0[..expected.len() - 12], expected[..expected.len() - 12]);
        assert!(body.0.ends_with(&[1, 0, 0, 0, b'Q', 0, 2, b'a', b'y', 0, 0, 0, 1, 0, 0, 0, 9]));
    }

    #[test]
    fn what_is_sent_is_read_back_and_cut_messages_are_not() {
        let mut header = Body(vec![LITTLE_ENDIAN, SIGNAL, 0, PROTOCOL_VERSION]);
        header.number([0; 4]).number([1, 0, 0, 0]);
        let fields = [(PATH, "o", "/x"), (MEMBER, "s", "JobRemoved"), (SIGNATURE, "g", "uoss")];
        header.array(8, &fields, |header, (code, signature, text)| header.field(*code, signature, text));
        let mut body = Body::default();
        body.number(5_u32.to_le_bytes()).text("/job/5").text("a.scope").text("done");
        let message = Message::parse(&header.0, body.0.clone()).expect("a message");
        assert_eq!((message.kind, message.member.as_str()), (SIGNAL, "JobRemoved"));
        assert_eq!(message.texts(1), ["/job/5", "a.scope", "done"]);
        assert_eq!(message.bool(), Some(true));
        let number =
            Message { body: [&[1, b't', 0, 0, 0, 0, 0, 0][..], &7_u64.to_le_bytes()].concat(), ..Message::default() };
        assert_eq!(number.property(), Some(7));
        for cut in FIXED_HEADER_BYTES + 1..header.0.len() {
            assert!(Message::parse(&header.0[..cut], Vec::new()).is_none_or(|message| message.kind == SIGNAL));
        }
    }
}
