//! A web server in one file, linked statically: what the pods of the demo and the tests run.
//!
//! - `hello [PORT]` serves `GET /` (who answers), `/healthz`, `/env/NAME`, `/exit/CODE`; ends with 0 on SIGTERM.
//! - `hello get URL` fetches an http URL and prints the body, for looking at a Service from inside a pod.
//! - `hello lines COUNT` prints numbered lines, then waits for SIGTERM.
#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Error, Read, Result, Write};
use std::net::{TcpListener, TcpStream};
use std::process::exit;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};

const DEFAULT_PORT: u16 = 8080;
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longer request lines are refused.
const MAX_REQUEST_BYTES: u64 = 8 * 1024;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["get", url] => get(url),
        ["lines", count] => lines(parse(count)?),
        [] => serve(DEFAULT_PORT),
        [port] => serve(parse(port)?),
        _ => Err(Error::other("usage: hello [PORT] | hello get URL | hello lines COUNT")),
    }
}

fn parse<T: std::str::FromStr>(text: &str) -> Result<T> {
    text.parse().map_err(|_| Error::other(format!("not a valid number: {text}")))
}

/// The first process of a container ignores signals it does not ask for, so ask for SIGTERM.
fn wait_for_term() -> Result<()> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.wait()?;
    Ok(())
}

fn block_term() -> Result<()> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.thread_block()?;
    Ok(())
}

fn lines(count: u64) -> Result<()> {
    block_term()?;
    let mut out = std::io::stdout().lock();
    for number in 0..count {
        writeln!(out, "line {number}")?;
    }
    out.flush()?;
    wait_for_term()
}

fn serve(port: u16) -> Result<()> {
    block_term()?;
    std::thread::spawn(|| {
        let code = i32::from(wait_for_term().is_err());
        println!("stopping");
        exit(code);
    });
    let listener = TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)))?;
    println!("listening on port {port}");
    for stream in listener.incoming() {
        std::thread::spawn(|| stream.and_then(answer));
    }
    Ok(())
}

fn host() -> String {
    nix::unistd::gethostname().map_or_else(|_| "unknown".into(), |name| name.to_string_lossy().into_owned())
}

fn answer(mut stream: TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(CLIENT_TIMEOUT))?;
    let mut request = String::new();
    let mut reader = BufReader::new(stream.try_clone()?.take(MAX_REQUEST_BYTES));
    reader.read_line(&mut request)?;
    let path = request.split(' ').nth(1).unwrap_or("/").to_owned();
    let mut header = String::new();
    while reader.read_line(&mut header)? > 2 {
        header.clear();
    }
    let (status, body) = match path.trim_start_matches('/').split_once('/') {
        Some(("env", name)) => ("200 OK", std::env::var(name).unwrap_or_default()),
        Some(("exit", code)) => exit(parse(code)?),
        _ if path == "/healthz" => ("200 OK", "ok".into()),
        _ if path == "/" => ("200 OK", format!("hello from {}", host())),
        _ => ("404 Not Found", "no such path".into()),
    };
    println!("{} {path} {status}", stream.peer_addr()?.ip());
    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}\n", body.len() + 1)
}

fn get(url: &str) -> Result<()> {
    let rest = url.strip_prefix("http://").ok_or_else(|| Error::other("only http:// URLs"))?;
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    // The colons of an IPv6 address stand in brackets.
    let has_port = host.rsplit(']').next().is_some_and(|after| after.contains(':'));
    let address = if has_port { host.to_owned() } else { format!("{host}:80") };
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(CLIENT_TIMEOUT))?;
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    let (head, body) = response.split_once("\r\n\r\n").ok_or_else(|| Error::other("no HTTP response"))?;
    if !head.split(' ').nth(1).is_some_and(|code| code.starts_with('2')) {
        return Err(Error::other(head.lines().next().unwrap_or_default().to_owned()));
    }
    print!("{body}");
    Ok(())
}
