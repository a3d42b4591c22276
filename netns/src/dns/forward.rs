//! Asking other resolvers.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::Config;

/// How long one resolver is waited for; the next is asked then.
const WAIT: Duration = Duration::from_secs(2);
/// Resolvers asked for one question, and how often they are gone through.
const UPSTREAMS_MAX: usize = 3;
const ROUNDS: usize = 2;
/// The port of DNS.
const PORT: u16 = 53;
/// The largest answer by UDP that we ask for.
const PAYLOAD_BYTES: u16 = 1232;

/// Where names outside of the cluster are looked up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Upstreams {
    general: Vec<SocketAddr>,
    /// Domains (labels, lower case) with resolvers of their own, the longest first.
    stubs: Vec<(Vec<String>, Vec<SocketAddr>)>,
}

impl Upstreams {
    /// Those of the settings, or of the host's resolver file.
    pub(super) fn new(config: &Config) -> Self {
        let general =
            if config.upstreams.is_empty() { from_file(&config.resolv_conf) } else { config.upstreams.clone() };
        // Asking ourselves would go round in circles.
        let general = general
            .into_iter()
            .filter(|upstream| !config.dns_ips.contains(&upstream.ip()))
            .take(UPSTREAMS_MAX)
            .collect();
        let mut stubs: Vec<_> = config
            .stub_domains
            .iter()
            .map(|(domain, upstreams)| {
                (
                    domain.trim_matches('.').to_ascii_lowercase().split('.').map(str::to_owned).collect(),
                    upstreams.clone(),
                )
            })
            .collect();
        stubs.sort_by_key(|(labels, _): &(Vec<String>, _)| std::cmp::Reverse(labels.len()));
        Self { general, stubs }
    }

    fn of(&self, question: &Query) -> &[SocketAddr] {
        let labels: Vec<String> =
            question.name.iter().map(|label| String::from_utf8_lossy(label).to_ascii_lowercase()).collect();
        let stub = self.stubs.iter().find(|(domain, _)| labels.ends_with(domain));
        stub.map_or(&self.general, |(_, upstreams)| upstreams)
    }

    /// Whether anybody can be asked.
    pub(super) fn has(&self, question: &Query) -> bool {
        !self.of(question).is_empty()
    }

    /// Asks one after the other until one answers.
    pub(super) async fn ask(&self, question: &Query, dnssec: (bool, bool)) -> io::Result<Message> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "no resolver is known for the name");
        for upstream in std::iter::repeat_n(self.of(question), ROUNDS).flatten() {
            match timeout(WAIT, exchange(*upstream, question, dnssec)).await {
                Ok(Ok(message)) if message.metadata.response_code != ResponseCode::ServFail => return Ok(message),
                Ok(Ok(_)) => last = io::Error::other(format!("{upstream} failed")),
                Ok(Err(error)) => last = error,
                Err(_) => last = io::Error::new(io::ErrorKind::TimedOut, format!("{upstream} did not answer")),
            }
        }
        Err(last)
    }
}

/// The resolvers of a resolver file (resolv.conf(5)).
fn from_file(path: &Path) -> Vec<SocketAddr> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "no resolvers for names outside of the cluster");
            return Vec::new();
        }
    };
    parse(&text)
}

fn parse(text: &str) -> Vec<SocketAddr> {
    let servers = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    servers
        .filter_map(|rest| rest.trim().parse::<IpAddr>().ok())
        .map(|address| SocketAddr::new(address, PORT))
        .collect()
}

/// One question to one resolver, by UDP and, if the answer does not fit, by TCP. A port of its own and a random number guard against forged answers.
async fn exchange(upstream: SocketAddr, question: &Query, dnssec: (bool, bool)) -> io::Result<Message> {
    let any: IpAddr = if upstream.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let mut request = Message::query();
    request.metadata.message_type = MessageType::Query;
    request.metadata.op_code = OpCode::Query;
    request.metadata.recursion_desired = true;
    request.metadata.checking_disabled = dnssec.1;
    request.add_query(question.clone());
    let mut edns = Edns::new();
    edns.set_max_payload(PAYLOAD_BYTES).set_version(0).set_dnssec_ok(dnssec.0);
    request.set_edns(edns);
    let bytes = request.to_vec().map_err(io::Error::other)?;
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(upstream).await?;
    socket.send(&bytes).await?;
    let mut buffer = [0; 4096];
    let answer = loop {
        let len = socket.recv(&mut buffer).await?;
        if let Some(answer) = matching(&request, &buffer[..len]) {
            break answer;
        }
    };
    if !answer.metadata.truncation {
        return Ok(answer);
    }
    let mut stream = TcpStream::connect(upstream).await?;
    let len = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    stream.write_all(&[&len.to_be_bytes()[..], &bytes].concat()).await?;
    let mut whole = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut whole).await?;
    matching(&request, &whole)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{upstream} answered something else")))
}

/// The answer in a datagram, if it is the one to our question.
fn matching(request: &Message, bytes: &[u8]) -> Option<Message> {
    let answer = Message::from_vec(bytes).ok()?;
    let same = answer.metadata.id == request.metadata.id
        && answer.metadata.message_type == MessageType::Response
        && answer.queries.len() == 1
        && answer.queries[0].name == request.queries[0].name
        && answer.queries[0].query_type == request.queries[0].query_type;
    same.then_some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolver_files_are_read() {
        let text = "# c\nnameserver 192.0.2.1\n search x\nnameserver\tfe80::1\nnameserver nonsense\n";
        assert_eq!(parse(text), ["192.0.2.1:53".parse().unwrap(), "[fe80::1]:53".parse::<SocketAddr>().unwrap()]);
    }
}
