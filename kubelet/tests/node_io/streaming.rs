//! The node's API as clients use it: WebSocket channels, SPDY, tunnels, logs, and who may.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use coracle_kubelet::certificates::NodeCertificate;
use coracle_kubelet::server::{NodeServer, ServerConfig};
use coracle_kubelet::streaming::spdy::{Frame, HeaderCodec, parse_frame};
use futures::{SinkExt, StreamExt};
use http::Request;
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use crate::fake_api::FakeApi;
use crate::fake_runtime::{FakeNode, FakeRuntime};

const LIMIT: Duration = Duration::from_secs(10);

pub(crate) struct Fixture {
    pub(crate) dir: tempfile::TempDir,
    runtime: Arc<FakeRuntime>,
    pub(crate) server: NodeServer,
    certificate: String,
    client_ca: rcgen::CertifiedKey<rcgen::KeyPair>,
}

pub(crate) fn fixture() -> Fixture {
    let dir = tempfile::tempdir().expect("temp folder");
    let runtime = FakeRuntime::new(dir.path());
    let own = rcgen::generate_simple_self_signed(vec!["127.0.0.1".into()]).expect("certificate");
    let ca_key = rcgen::KeyPair::generate().expect("key");
    let mut parameters = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca = parameters.self_signed(&ca_key).expect("CA");
    let config = ServerConfig {
        node_name: "node-1".into(),
        certificate: NodeCertificate::from_pem(own.cert.pem().as_bytes(), own.signing_key.serialize_pem().as_bytes())
            .expect("a certificate"),
        client_ca: Some(ca.pem().into_bytes()),
        log_folder: dir.path().to_owned(),
    };
    let server = NodeServer::new(config, FakeApi::new().client(), Arc::new(FakeNode(runtime.clone()))).expect("server");
    let client_ca = rcgen::CertifiedKey { cert: ca, signing_key: ca_key };
    Fixture { dir, runtime, server, certificate: own.cert.pem(), client_ca }
}

impl Fixture {
    fn connect(&self) -> DuplexStream {
        let (near, far) = tokio::io::duplex(256 << 10);
        let server = self.server.clone();
        tokio::spawn(async move { server.serve_trusted(far).await });
        near
    }

    async fn get(&self, path: &str) -> (u16, String) {
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(self.connect())).await.expect("handshake");
        tokio::spawn(connection);
        let request = Request::get(path).header("host", "node").body(Body::empty()).expect("request");
        let response = sender.send_request(request).await.expect("response");
        let status = response.status().as_u16();
        let body = tokio::time::timeout(LIMIT, response.into_body().collect()).await.expect("in time").expect("body");
        (status, String::from_utf8_lossy(&body.to_bytes()).into_owned())
    }

    async fn websocket(&self, path: &str, protocol: &str) -> tokio_tungstenite::WebSocketStream<DuplexStream> {
        let mut request = format!("ws://node{path}").into_client_request().expect("request");
        request.headers_mut().insert("sec-websocket-protocol", protocol.parse().expect("header"));
        let (socket, response) = tokio_tungstenite::client_async(request, self.connect()).await.expect("upgrade");
        assert_eq!(response.headers()["sec-websocket-protocol"], protocol.split(',').next().expect("one"));
        socket
    }
}

/// Everything that comes on each channel, until the server closes.
async fn drain<S: AsyncRead + AsyncWrite + Unpin>(
    mut socket: tokio_tungstenite::WebSocketStream<S>,
) -> BTreeMap<u8, Vec<u8>> {
    let mut channels: BTreeMap<u8, Vec<u8>> = BTreeMap::new();
    let all = async {
        while let Some(Ok(message)) = socket.next().await {
            if let Message::Binary(bytes) = message {
                channels.entry(bytes[0]).or_default().extend_from_slice(&bytes[1..]);
            }
        }
    };
    tokio::time::timeout(LIMIT, all).await.expect("the server closes");
    channels
}

fn status_of(channel: &[u8]) -> Value {
    serde_json::from_slice(channel).unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(channel)))
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_over_websocket_carries_streams_and_the_exit_code() {
    let fixture = fixture();
    let path =
        "/exec/ns/web/c?command=sh&command=-c&command=cat;echo%20err%20%3E%262;exit%203&input=1&output=1&error=1";
    let mut socket = fixture.websocket(path, "v5.channel.k8s.io").await;
    socket.send(Message::Binary(Bytes::from_static(b"\x00hello"))).await.expect("send");
    // v5: end of input without closing the connection.
    socket.send(Message::Binary(Bytes::from_static(&[255, 0]))).await.expect("send");
    let channels = drain(socket).await;
    assert_eq!((channels[&1].as_slice(), channels[&2].as_slice()), (b"hello".as_slice(), b"err\n".as_slice()));
    let status = status_of(&channels[&3]);
    assert_eq!((&status["status"], &status["reason"]), (&"Failure".into(), &"NonZeroExitCode".into()));
    assert_eq!(status["details"]["causes"][0]["message"], "3");
    // A command that cannot be started is told on the error channel.
    let socket = fixture.websocket("/exec/ns/web/c?command=/none&output=1", "v4.channel.k8s.io").await;
    assert_eq!(status_of(&drain(socket).await[&3])["reason"], "InternalError");
}

#[tokio::test(flavor = "multi_thread")]
async fn large_output_arrives_whole_and_base64_too() {
    let fixture = fixture();
    let socket = fixture.websocket("/exec/ns/web/c?command=seq&command=200000&output=1", "v4.channel.k8s.io").await;
    let channels = drain(socket).await;
    let expected: String = (1..=200_000).map(|number| format!("{number}\n")).collect();
    assert!(channels[&1] == expected.as_bytes());
    assert_eq!(status_of(&channels[&3])["status"], "Success");
    let mut socket =
        fixture.websocket("/exec/ns/web/c?command=echo&command=hi&output=1", "v4.base64.channel.k8s.io").await;
    let mut texts = Vec::new();
    while let Some(Ok(message)) = tokio::time::timeout(LIMIT, socket.next()).await.expect("in time") {
        if let Message::Text(text) = message {
            texts.push(text.to_string());
        }
    }
    assert_eq!(texts[..2], ["1".to_owned(), "1aGkK".to_owned()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_has_a_size() {
    let fixture = fixture();
    let path =
        "/exec/ns/web/c?command=sh&command=-c&command=read%20x;stty%20size;exit%200&input=1&output=1&error=1&tty=1";
    let mut socket = fixture.websocket(path, "v5.channel.k8s.io").await;
    socket.send(Message::Binary(Bytes::from_static(b"\x04{\"Width\":132,\"Height\":43}"))).await.expect("send");
    socket.send(Message::Binary(Bytes::from_static(b"\x00go\n"))).await.expect("send");
    let channels = drain(socket).await;
    let output = String::from_utf8_lossy(&channels[&1]).into_owned();
    assert!(output.contains("43 132"), "{output}");
    assert_eq!(status_of(&channels[&3])["status"], "Success");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_takes_its_command_along() {
    let fixture = fixture();
    let marker = fixture.dir.path().join("pid");
    let script = format!("echo%20$$%20%3E{};exec%20sleep%20600", marker.display());
    let socket = fixture
        .websocket(&format!("/exec/ns/web/c?command=sh&command=-c&command={script}&output=1"), "v5.channel.k8s.io")
        .await;
    coracle_testkit::assert_eventually_async!(
        5,
        fs::read_to_string(&marker).is_ok_and(|text| text.ends_with('\n')),
        "the command runs"
    );
    let pid = fs::read_to_string(&marker).expect("pid").trim().to_owned();
    drop(socket);
    coracle_testkit::assert_eventually_async!(
        5,
        !std::path::Path::new(&format!("/proc/{pid}")).exists(),
        "the command is gone"
    );
}

/// A client of SPDY, as Go's spdystream behaves.
struct SpdyClient<S> {
    io: S,
    codec: HeaderCodec,
    buffer: BytesMut,
}

impl<S: AsyncRead + AsyncWrite + Unpin> SpdyClient<S> {
    fn new(io: S) -> Self {
        Self { io, codec: HeaderCodec::default(), buffer: BytesMut::new() }
    }

    async fn send(&mut self, frame: Frame) {
        let mut out = BytesMut::new();
        frame.write(&mut out);
        self.io.write_all(&out).await.expect("write");
    }

    async fn open(&mut self, stream: u32, headers: &[(&str, &str)]) {
        let block = self.codec.encode(headers);
        self.send(Frame::SynStream { stream, fin: false, block }).await;
    }

    async fn data(&mut self, stream: u32, bytes: &'static [u8], fin: bool) {
        self.send(Frame::Data { stream, fin, bytes: Bytes::from_static(bytes) }).await;
    }

    async fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = parse_frame(&mut self.buffer).expect("SPDY") {
                return Some(frame);
            }
            let read = tokio::time::timeout(LIMIT, self.io.read_buf(&mut self.buffer)).await.expect("in time");
            if read.unwrap_or(0) == 0 {
                return None;
            }
        }
    }

    /// Data by stream, until `streams` have ended.
    async fn collect(&mut self, streams: &[u32]) -> BTreeMap<u32, Vec<u8>> {
        let (mut all, mut open) = (BTreeMap::<u32, Vec<u8>>::new(), streams.to_vec());
        while !open.is_empty() {
            match self.next().await.expect("not before the streams end") {
                Frame::Data { stream, fin, bytes } => {
                    all.entry(stream).or_default().extend_from_slice(&bytes);
                    open.retain(|known| !(fin && *known == stream));
                }
                Frame::Reset { stream, .. } => panic!("stream {stream} was reset"),
                _ => {}
            }
        }
        all
    }
}

async fn spdy(fixture: &Fixture, path: &str, protocol: &str) -> SpdyClient<TokioIo<hyper::upgrade::Upgraded>> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(fixture.connect())).await.expect("handshake");
    tokio::spawn(connection.with_upgrades());
    let request = Request::post(path)
        .header("host", "node")
        .header("connection", "Upgrade")
        .header("upgrade", "SPDY/3.1")
        .header("x-stream-protocol-version", protocol)
        .body(Body::empty())
        .expect("request");
    let response = sender.send_request(request).await.expect("response");
    assert_eq!(response.status(), 101);
    assert_eq!(response.headers()["x-stream-protocol-version"], protocol);
    SpdyClient {
        io: TokioIo::new(hyper::upgrade::on(response).await.expect("upgrade")),
        codec: HeaderCodec::default(),
        buffer: BytesMut::new(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_over_spdy() {
    let fixture = fixture();
    let path = "/exec/ns/web/c?command=sh&command=-c&command=cat;echo%20e%20%3E%262;exit%207&input=1&output=1&error=1";
    let mut client = spdy(&fixture, path, "v4.channel.k8s.io").await;
    for (stream, kind) in [(1, "error"), (3, "stdin"), (5, "stdout"), (7, "stderr")] {
        client.open(stream, &[("streamType", kind)]).await;
    }
    client.send(Frame::Ping { id: 1 }).await;
    client.data(3, b"over spdy", true).await;
    let all = client.collect(&[1, 5, 7]).await;
    assert_eq!((all[&5].as_slice(), all[&7].as_slice()), (b"over spdy".as_slice(), b"e\n".as_slice()));
    assert_eq!(status_of(&all[&1])["details"]["causes"][0]["message"], "7");
}

pub(crate) async fn echo_server() -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let port = listener.local_addr().expect("address").port();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = socket.into_split();
                tokio::io::copy(&mut reader, &mut writer).await
            });
        }
    });
    port
}

async fn forward<S: AsyncRead + AsyncWrite + Unpin>(mut client: SpdyClient<S>, port: u16) {
    let (port, closed) = (port.to_string(), "1");
    for (first, request, port) in [(1, "0", port.as_str()), (5, "1", closed)] {
        client.open(first, &[("streamType", "error"), ("port", port), ("requestID", request)]).await;
        client.data(first, b"", true).await;
        client.open(first + 2, &[("streamType", "data"), ("port", port), ("requestID", request)]).await;
    }
    client.data(3, b"through the tunnel", true).await;
    let all = client.collect(&[1, 3, 5]).await;
    assert_eq!(all[&3], b"through the tunnel");
    assert_eq!(all[&1], b"");
    assert!(String::from_utf8_lossy(&all[&5]).contains("failed to connect to localhost:1"), "{all:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_are_forwarded_over_spdy_tunnel_and_channels() {
    let fixture = fixture();
    let port = echo_server().await;
    forward(spdy(&fixture, "/portForward/ns/web", "portforward.k8s.io").await, port).await;
    // What kubectl does: SPDY in a WebSocket.
    let mut socket = fixture.websocket("/portForward/ns/web", "SPDY/3.1+portforward.k8s.io").await;
    let (near, far) = tokio::io::duplex(64 << 10);
    tokio::spawn(async move {
        let (mut reader, mut writer) = tokio::io::split(far);
        let mut buffer = vec![0; 8192];
        loop {
            tokio::select! {
                count = reader.read(&mut buffer) => match count {
                    Ok(count @ 1..) => socket.send(Message::Binary(Bytes::copy_from_slice(&buffer[..count]))).await.expect("send"),
                    _ => return,
                },
                message = socket.next() => match message {
                    Some(Ok(Message::Binary(bytes))) => writer.write_all(&bytes).await.expect("write"),
                    _ => return,
                },
            }
        }
    });
    forward(SpdyClient::new(near), port).await;
    // The elder way: two channels for each port.
    let mut socket = fixture.websocket(&format!("/portForward/ns/web?port={port}"), "v4.channel.k8s.io").await;
    socket.send(Message::Binary(Bytes::from_static(b"\x00by channel"))).await.expect("send");
    let mut data = Vec::new();
    while data.len() < 2 + "by channel".len() {
        let message =
            tokio::time::timeout(LIMIT, socket.next()).await.expect("in time").expect("message").expect("message");
        if let Message::Binary(bytes) = message
            && bytes[0] == 0
        {
            data.extend_from_slice(&bytes[1..]);
        }
    }
    assert_eq!(data[..2], port.to_le_bytes());
    assert_eq!(&data[2..], b"by channel");
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_are_reached_inside_a_network_namespace() {
    let name = format!("nodeio-{}", std::process::id());
    let ip = coracle_testkit::need("ip", "iproute2");
    crate::host::run(&ip, &["netns", "add", &name]);
    let path = std::path::PathBuf::from("/run/netns").join(&name);
    let inside = path.clone();
    let outcome = std::thread::spawn(move || {
        let handle = fs::File::open(&inside).expect("namespace");
        nix::sched::setns(&handle, nix::sched::CloneFlags::CLONE_NEWNET).expect("setns");
        crate::host::run(&ip, &["link", "set", "lo", "up"]);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let port = listener.local_addr().expect("address").port();
        std::thread::spawn(move || {
            use std::io::Write;
            listener.accept().expect("accept").0.write_all(b"from inside").expect("write");
        });
        port
    })
    .join();
    let port = outcome.expect("server");
    let connected = coracle_kubelet::streaming::connect_in(Some(&path), port).await;
    let outside = coracle_kubelet::streaming::connect_in(None, port).await;
    crate::host::run(&coracle_testkit::need("ip", "iproute2"), &["netns", "delete", &name]);
    let mut text = String::new();
    tokio::time::timeout(LIMIT, connected.expect("inside").read_to_string(&mut text))
        .await
        .expect("in time")
        .expect("read");
    assert_eq!(text, "from inside");
    assert!(outside.is_err(), "the port is open only inside");
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_are_served_and_followed() {
    let fixture = fixture();
    let line = |text: &str| format!("2026-01-31T00:00:00.000000000Z stdout F {text}\n");
    fs::write(fixture.dir.path().join("0.log"), line("before")).expect("write");
    fs::write(fixture.dir.path().join("1.log"), line("one") + &line("two")).expect("write");
    let base = "/containerLogs/ns/web/c";
    assert_eq!(fixture.get(base).await, (200, "one\ntwo\n".into()));
    assert_eq!(fixture.get(&format!("{base}?tailLines=1")).await, (200, "two\n".into()));
    assert_eq!(
        fixture.get(&format!("{base}?previous=true&timestamps=true")).await.1,
        "2026-01-31T00:00:00.000000000Z before\n"
    );
    assert_eq!(fixture.get(&format!("{base}?tailLines=-1")).await.0, 422);
    for (protocol, message) in
        [("binary.k8s.io", Message::Binary("two\n".into())), ("base64.binary.k8s.io", Message::Text("dHdvCg==".into()))]
    {
        let mut socket = fixture.websocket(&format!("{base}?tailLines=1"), protocol).await;
        assert_eq!(socket.next().await.expect("a message").expect("well formed"), message);
        assert!(matches!(socket.next().await, Some(Ok(Message::Close(_)))), "the log ends");
    }
    assert_eq!(fixture.get("/containerLogs/ns/none/c").await.0, 404);
    let (status, text) = fixture.get("/containerLogs/ns/web/waiting").await;
    assert_eq!(
        (status, text.trim()),
        (400, "container \"waiting\" in pod \"web\" is waiting to start: ContainerCreating")
    );
    // Following ends when the container does, with its last words.
    let (path, runtime) = (fixture.dir.path().join("1.log"), fixture.runtime.clone());
    let writer = async {
        coracle_testkit::assert_eventually_async!(5, runtime.events.receiver_count() > 0, "somebody follows");
        let mut file = fs::OpenOptions::new().append(true).open(path).expect("open");
        std::io::Write::write_all(&mut file, line("last").as_bytes()).expect("write");
        runtime.stop();
    };
    let follow = format!("{base}?follow=true");
    let (answer, ()) = tokio::join!(fixture.get(&follow), writer);
    assert_eq!(answer, (200, "one\ntwo\nlast\n".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_is_shown_in_every_form() {
    let fixture = fixture();
    let (status, text) = fixture.get("/stats/summary").await;
    let summary: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(status, 200);
    assert_eq!(summary["pods"][0]["containers"][0]["memory"]["workingSetBytes"], 4096);
    assert!(summary["node"]["memory"]["workingSetBytes"].as_u64().expect("number") > 0);
    let resource = fixture.get("/metrics/resource").await.1;
    assert!(
        resource.contains("container_cpu_usage_seconds_total{container=\"c\",namespace=\"ns\",pod=\"web\"} 2"),
        "{resource}"
    );
    assert!(resource.contains("node_memory_working_set_bytes "), "{resource}");
    let cadvisor = fixture.get("/metrics/cadvisor").await.1;
    assert!(cadvisor.contains("container_memory_working_set_bytes{container=\"c\""), "{cadvisor}");
    assert!(fixture.get("/metrics").await.1.contains("kubelet_running_pods 1"));
    assert_eq!(fixture.get("/healthz").await, (200, "ok".into()));
    let pods: Value = serde_json::from_str(&fixture.get("/pods").await.1).expect("JSON");
    assert_eq!((&pods["kind"], &pods["items"][0]["metadata"]["name"]), (&"PodList".into(), &"web".into()));
    // Node logs: listed, read, and no way out.
    fs::write(fixture.dir.path().join("sys.log"), "words").expect("write");
    std::os::unix::fs::symlink("/etc/passwd", fixture.dir.path().join("evil")).expect("link");
    assert!(fixture.get("/logs/").await.1.contains("sys.log"));
    assert_eq!(fixture.get("/logs/sys.log").await, (200, "words".into()));
    assert_eq!(fixture.get("/logs/evil").await.0, 404);
    assert_eq!(fixture.get("/logs/..%2f..%2fetc%2fpasswd").await.0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_callers_are_known_and_held_to_their_rights() {
    let fixture = fixture();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let server = fixture.server.clone();
    tokio::spawn(async move { server.serve(listener).await });
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    use rustls::pki_types::pem::PemObject;
    roots
        .add(rustls::pki_types::CertificateDer::from_pem_slice(fixture.certificate.as_bytes()).expect("PEM"))
        .expect("root");
    let builder = || {
        rustls::ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots.clone())
    };
    let signed = |common_name: &str| {
        let key = rcgen::KeyPair::generate().expect("key");
        let mut parameters = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
        parameters.distinguished_name.push(rcgen::DnType::CommonName, common_name);
        let ca_key = &fixture.client_ca.signing_key;
        let mut ca_parameters = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
        ca_parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let issuer = rcgen::Issuer::new(ca_parameters, ca_key);
        let certificate = parameters.signed_by(&key, &issuer).expect("certificate");
        let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).expect("key");
        builder().with_client_auth_cert(vec![certificate.der().clone()], key).expect("config")
    };
    let ask = |config: rustls::ClientConfig, path: &'static str, token: Option<&'static str>| async move {
        let socket = tokio::net::TcpStream::connect(address).await.expect("connect");
        let name = rustls::pki_types::ServerName::try_from("127.0.0.1").expect("name");
        let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, socket).await.expect("TLS");
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("handshake");
        tokio::spawn(connection);
        let mut request = Request::get(path).header("host", "node");
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        sender.send_request(request.body(Body::empty()).expect("request")).await.expect("response").status().as_u16()
    };
    let nobody = || builder().with_no_client_auth();
    assert_eq!(ask(nobody(), "/pods", None).await, 401);
    assert_eq!(ask(nobody(), "/healthz", None).await, 401);
    assert_eq!(ask(nobody(), "/pods", Some("wrong")).await, 401);
    assert_eq!(ask(nobody(), "/pods", Some("admin")).await, 200);
    assert_eq!(ask(nobody(), "/metrics/resource", Some("reader")).await, 200);
    assert_eq!(ask(nobody(), "/pods", Some("reader")).await, 403);
    assert_eq!(ask(signed("system:apiserver"), "/pods", None).await, 200);
    assert_eq!(ask(signed("somebody"), "/pods", None).await, 403);
}
